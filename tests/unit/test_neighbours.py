"""A node among the others: what arrives becomes events in order, and no link is stuck for ever."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from actors.collecting import Receiver, Sender
from actors.links import WAIT, Link, Memory
from actors.listener import Listener
from actors.mesh import COORDINATOR, Address, Mesh, find_address
from actors.neighbours import Neighbours, Parts, inherit
from actors.rounds import Rounds, round_number
from actors.setup import JobSetup
from elastic.core.config import JobConfig
from elastic.core.errors import ChannelClosed
from elastic.core.protocol import events, node
from elastic.core.protocol.frames import Block, Stage
from elastic.core.protocol.handshake import Credentials
from elastic.core.protocol.messages import Admit, Membership, Message, Peers, Stop
from elastic.core.protocol.orders import NodeMessage, Order, Progress
from elastic.core.runs import RunFolder
from elastic.core.update import Plan, Snapshot

HOST, SECRET = "127.0.0.1", bytes(32)
BLOCK = Block(round_number(5, 7), Stage.TOTAL, 0, 0, 0, 4)
UPDATE = events.Update(
    step=3,
    slots=(),
    exponents=(),
    weight=1.0,
    num_updates=3,
    skip=False,
    round=9,
    nodes=(0, 1),
)


@dataclass
class FakeRounds:
    """Says what the test says, and remembers what it was told."""

    memory: Memory = None
    norm: float | None = None
    begun: list[int] = field(default_factory=list)
    num_given_up: int = 0
    num_arrived: int = 0
    passed_over: int = 0
    is_closed: bool = False

    def place(self, node: int, block: Block) -> Memory:
        return self.memory

    def arrived(self, node: int, block: Block) -> None:
        self.num_arrived += 1

    def turn(self) -> float | None:
        norm, self.norm = self.norm, None
        return norm

    def begin(self, term: int, update: events.Update, plan: Plan, **_: Any) -> None:
        self.begun.append(round_number(term, update.round))

    def pass_over(self, number: int) -> None:
        self.passed_over = max(self.passed_over, number)

    def give_up(self) -> None:
        self.num_given_up += 1

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeSender:
    """Remembers what it was told to send."""

    begun: list[tuple[int, events.Copy, Link | None]] = field(default_factory=list)
    is_closed: bool = False

    def begin(self, number: int, copy: events.Copy, link: Link | None) -> None:
        self.begun.append((number, copy, link))

    def turn(self, links: Mapping[int, Link]) -> None: ...

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeReceiver:
    """Has a place for whatever comes, and remembers who was lost."""

    memory: Memory = None
    begun: list[tuple[int, events.Copy]] = field(default_factory=list)
    arrivals: list[tuple[int, Block]] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    def begin(self, number: int, copy: events.Copy, *_: Any) -> None:
        self.begun.append((number, copy))

    def place(self, node: int, block: Block) -> Memory:
        return self.memory

    def arrived(self, node: int, block: Block) -> None:
        self.arrivals.append((node, block))

    def lost(self, node: int) -> None:
        self.gone.append(node)


@dataclass
class World:
    """Node 1 of a job; node 0 and the coordinator are the test."""

    setup: JobSetup
    folder: Path
    selector: selectors.BaseSelector
    others: dict[int, Mesh]
    neighbours: list[Neighbours] = field(default_factory=list)
    rounds: FakeRounds = field(default_factory=FakeRounds)
    sender: FakeSender = field(default_factory=FakeSender)
    receiver: FakeReceiver = field(default_factory=FakeReceiver)
    handled: list[node.NodeEvent] = field(default_factory=list)
    heard: list[Message | None] = field(default_factory=list)
    term: int | None = 5

    def begin(self, inherited: socket.socket | None = None) -> Neighbours:
        """The node's process starts, or its successor's does."""
        parts = Parts(
            cast(Rounds, self.rounds), cast(Sender, self.sender), cast(Receiver, self.receiver)
        )
        made = Neighbours(
            self.setup,
            self.folder,
            self.selector,
            handle=self.handled.append,
            term=lambda: self.term,
            hear=self.heard.append,
            parts=lambda _: parts,
            inherited=inherited,
        )
        self.neighbours.append(made)
        return made

    @property
    def address(self) -> Address:
        address = find_address(self.folder, HOST)
        assert address is not None
        return address

    def link(self, other: int) -> Link:
        """The other's end of its link to this node."""
        self.until(lambda: 1 in self.others[other].links)
        return self.others[other].links[1]

    def until(self, condition: Callable[[], Any]) -> None:
        """Let everybody take turns until it is so."""
        deadline_s = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline_s, "it does not happen"
            for mesh in self.others.values():
                mesh.turn()
                for other, link in list(mesh.links.items()):
                    try:
                        link.receive(lambda _: None)
                    except ChannelClosed as error:
                        mesh.close(other, str(error))
            for key, mask in self.selector.select(0.01):
                key.data(mask)
            self.neighbours[-1].turn()


@pytest.fixture
def world(tmp_path: Path, make_job: Callable[..., JobConfig]) -> Iterator[World]:
    setup = JobSetup(make_job(), RunFolder(tmp_path), "12ab", SECRET, node=1, address=HOST)
    others = {me: Mesh(me, Listener(HOST, Credentials(me, SECRET))) for me in (0, COORDINATOR)}
    world = World(setup, tmp_path, selectors.DefaultSelector(), others)
    world.begin()
    yield world
    world.neighbours[-1].close()
    world.selector.close()
    for mesh in others.values():
        mesh.end()


def meet(world: World) -> None:
    """The coordinator calls this node, and tells it of node 0."""
    coordinator = world.others[COORDINATOR]
    coordinator.tell({1: world.address})
    world.link(COORDINATOR).send(Peers(((0, *world.others[0].listener.address), (1, HOST, 1))))
    world.link(0)
    world.until(lambda: world.handled == [node.Reached(0)])
    world.handled.clear()


def test_what_is_said_becomes_events_of_who_said_it(world: World) -> None:
    meet(world)
    assert world.neighbours[-1].hears_coordinator
    admit, progress = Admit(Membership(generation=4)), Progress(5, {6: 7})
    world.link(COORDINATOR).send(admit)
    world.link(0).send(progress)
    world.until(lambda: world.heard and world.handled)
    assert world.heard == [admit]
    (said,) = world.handled
    assert isinstance(said, node.FromNode)
    assert (said.node, said.message) == (0, progress)


def test_what_is_told_arrives(world: World) -> None:
    meet(world)
    ours, said = world.neighbours[-1], list[Message | NodeMessage | Block]()
    ours.tell(Stop("to the coordinator"))
    ours.send(0, Progress(1, {}))
    ours.send(5, Progress(2, {}))  # to nobody
    for other in (COORDINATOR, 0):
        link = world.link(other)
        with selectors.DefaultSelector() as selector:
            selector.register(link.fileno(), selectors.EVENT_READ)
            assert selector.select(10)
        frame = link.receive(lambda _: None)
        assert frame is not None
        said.append(frame)
    assert said == [Stop("to the coordinator"), Progress(1, {})]


def test_links_that_are_lost_are_told_of_once(world: World) -> None:
    meet(world)
    world.others[COORDINATOR].tell({})
    for mesh in world.others.values():
        mesh.close(1, "the test says so")
    world.until(lambda: world.heard and len(world.handled) == 2)
    assert not world.neighbours[-1].hears_coordinator
    assert (world.heard, world.handled) == ([None], [node.Lost(0), node.Reached(0)])


def test_who_cannot_be_told_is_lost_in_the_next_turn(world: World) -> None:
    """Never at once: nothing is handled while an action is carried out."""
    meet(world)
    ours = world.neighbours[-1]
    ours._mesh.links[0]._socket.close()
    ours.send(0, Progress(1, {}))
    ours.send(0, Progress(2, {}))
    assert world.handled == []
    assert world.selector.select(0), "the loop is woken"
    ours.turn()
    assert world.handled == [node.Lost(0)]


def wait_for_a_place(world: World) -> None:
    """A block has no place yet, and a message lies behind it."""
    meet(world)
    world.rounds.memory = WAIT
    world.link(0).send_block(BLOCK, memoryview(b"1234"))
    world.link(0).flush()
    world.until(lambda: world.neighbours[-1]._mesh.links[0].waits)
    world.link(0).send(Progress(1, {}))
    assert world.handled == []


@pytest.mark.parametrize(
    ("then", "num_arrived"), [(None, 0), (memoryview(bytearray(4)), 1)], ids=["dropped", "placed"]
)
def test_a_link_goes_on_when_its_block_waits_no_more(
    then: Memory, num_arrived: int, world: World
) -> None:
    """This node has been told of the round, or of a later one."""
    wait_for_a_place(world)
    world.rounds.memory = then
    world.neighbours[-1].begin(UPDATE, cast(Plan, None), term=4, counters=None)
    world.until(lambda: world.handled)
    assert world.rounds.num_arrived == num_arrived


def test_a_block_of_a_lead_that_is_gone_holds_up_no_link(world: World) -> None:
    """The next lead's question may lie behind it."""
    wait_for_a_place(world)
    world.term = None
    world.until(lambda: world.handled)
    assert world.rounds.num_arrived == 0


@pytest.mark.parametrize(("term", "expected"), [(5, round_number(5, 9)), (4, 0)])
def test_nobody_waits_for_the_blocks_of_an_update_that_was_ordered(
    term: int, expected: int, world: World
) -> None:
    """One that joins may ignore the order, while the owners send it parameters."""
    meet(world)
    world.link(0).send(Order(term, UPDATE))
    world.until(lambda: world.handled)
    assert world.rounds.passed_over == expected


def test_an_update_is_told_of_once_its_round_is_complete(world: World) -> None:
    meet(world)
    ours = world.neighbours[-1]
    ours.begin(UPDATE, cast(Plan, None), term=4, counters=None)
    assert world.rounds.begun == [round_number(4, UPDATE.round)]
    ours.turn()
    assert world.handled == []
    world.rounds.norm = 2.5
    ours.turn()
    assert world.handled == [events.Updated(2.5, UPDATE.round)]


def test_only_the_round_that_is_under_way_can_be_given_up(world: World) -> None:
    meet(world)
    ours = world.neighbours[-1]
    ours.give_up(UPDATE.round)
    ours.begin(UPDATE, cast(Plan, None), term=4, counters=None)
    ours.give_up(UPDATE.round - 1)
    assert world.rounds.num_given_up == 0
    ours.give_up(UPDATE.round)
    assert world.rounds.num_given_up == 1
    world.rounds.norm = 2.5  # of a thread that had just ended
    ours.turn()
    assert world.handled == []


COPY = events.Copy(2, 1, 3, (0, 1))


def test_what_is_missing_from_a_checkpoint_comes_over_the_links(world: World) -> None:
    """Beside rounds: it has places of its own, and numbers of its own in each term."""
    meet(world)
    world.neighbours[-1].collect(COPY, cast(Snapshot, None), term=5)
    assert world.receiver.begun == [(round_number(5, 2), COPY)]
    memory = bytearray(4)
    world.receiver.memory = memoryview(memory)
    part = Block(round_number(5, 2), Stage.STATE, 1, 0, 0, 4)
    world.link(0).send_block(part, memoryview(b"1234"))
    world.link(0).flush()
    world.until(lambda: world.receiver.arrivals)
    assert world.receiver.arrivals == [(0, part)]
    assert memory == b"1234"
    assert world.rounds.num_arrived == 0


def test_state_is_sent_to_the_one_that_writes_if_there_is_a_link(world: World) -> None:
    meet(world)
    ours = world.neighbours[-1]
    to_0, to_7 = replace(COPY, node=0), replace(COPY, node=7)
    ours.send_state(to_0, term=5)
    ours.send_state(to_7, term=5)
    number = round_number(5, 2)
    assert world.sender.begun == [(number, to_0, ours._mesh.links[0]), (number, to_7, None)]


def test_a_checkpoint_hears_of_a_link_that_is_lost(world: World) -> None:
    meet(world)
    world.others[0].close(1, "the test says so")
    world.until(lambda: world.receiver.gone)
    assert world.receiver.gone == [0]


def test_a_successor_listens_there_and_knows_the_others(world: World) -> None:
    meet(world)
    succeed(world)
    world.until(lambda: node.Reached(0) in world.handled)
    world.until(lambda: world.neighbours[-1].hears_coordinator)


def succeed(world: World, inherited: socket.socket | None = None) -> None:
    """The node's process ends, and another one begins where it was."""
    address = world.address
    world.neighbours[-1].close()
    assert world.rounds.is_closed
    assert world.sender.is_closed
    world.selector.close()
    world.selector = selectors.DefaultSelector()
    if inherited is not None:
        socket.create_connection(address).close()  # nobody is refused meanwhile
    world.begin(inherited)
    assert world.address == address


def test_an_heir_holds_the_place(world: World, tmp_path: Path) -> None:
    assert inherit(tmp_path / "nowhere") is None
    found: list[socket.socket | None] = []
    heir = threading.Thread(target=lambda: found.append(inherit(tmp_path)))
    heir.start()
    world.until(lambda: not heir.is_alive())
    (place,) = found
    assert place is not None
    meet(world)
    succeed(world, place)
    world.until(lambda: node.Reached(0) in world.handled)


def test_where_the_place_was_taken_a_successor_listens_elsewhere(
    world: World, tmp_path: Path
) -> None:
    """Somebody else was given the port meanwhile; the others are told of the new one."""
    taken = world.others[0].listener.address
    (tmp_path / "port").write_text(str(taken[1]))
    successor = world.begin()
    assert world.address != taken
    world.neighbours.remove(successor)
    successor.close()
