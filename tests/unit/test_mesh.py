"""The links of a node to all others: who calls whom, when again, and who is given up."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from actors.links import PING_S, WAIT, Link
from actors.listener import Listener, Unreachable
from actors.mesh import COORDINATOR, Address, Down, Mesh, Up, find_address
from elastic.core.errors import ChannelClosed
from elastic.core.protocol.frames import Block, Stage
from elastic.core.protocol.handshake import Credentials
from policies.cuts import SILENT_S

HOST, SECRET = "127.0.0.1", bytes(32)
PLACES: dict[int, Address] = {node: (HOST, 100 + node) for node in range(4)}
STEP_S = SILENT_S / 4


@dataclass
class FakeClock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeListener:
    """Remembers who is called; the test says what comes of it."""

    made: list[Link | Unreachable] = field(default_factory=list)
    calls: list[tuple[int, Address]] = field(default_factory=list)
    probes: list[tuple[int, Address]] = field(default_factory=list)
    is_closed: bool = False

    def call(self, node: int, address: Address) -> None:
        self.calls.append((node, address))

    def probe(self, node: int, address: Address) -> None:
        self.probes.append((node, address))

    def turn(self) -> list[Link | Unreachable]:
        made, self.made = self.made, []
        return made

    def close(self) -> None:
        self.is_closed = True


@dataclass
class World:
    """One node's mesh, and the other ends of its links."""

    mesh: Mesh
    clock: FakeClock
    listener: FakeListener
    ends: list[Link] = field(default_factory=list)

    def link(self, node: int) -> tuple[Link, Link]:
        """A link to a node comes about: this end, the other end."""
        with socket.create_server((HOST, 0)) as server:
            ours = Link(socket.create_connection(server.getsockname()), node, self.clock)
            theirs = Link(server.accept()[0], 9, self.clock)
        self.ends += [ours, theirs]
        self.listener.made.append(ours)
        return ours, theirs

    def turn(self, after_s: float = 0.0) -> list[Up | Down]:
        self.clock.now_s += after_s
        return self.mesh.turn()


MakeWorld = Callable[[int], World]


@pytest.fixture
def make_world() -> Iterator[MakeWorld]:
    worlds: list[World] = []

    def make(me: int) -> World:
        clock, listener = FakeClock(), FakeListener()
        worlds.append(World(Mesh(me, cast(Listener, listener), clock), clock, listener))
        return worlds[-1]

    yield make
    for world in worlds:
        for end in world.ends:
            end.close()


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """Of node 2, which was told of all."""
    made = make_world(2)
    made.mesh.tell(PLACES)
    return made


def readable(link: Link) -> None:
    """Wait until bytes are there."""
    with selectors.DefaultSelector() as selector:
        selector.register(link.fileno(), selectors.EVENT_READ)
        assert selector.select(10), "nothing arrives"


def hear(link: Link) -> None:
    """Read what has been sent, once it is there."""
    readable(link)
    assert link.receive(lambda _: None) is None


def leave_waiting(ours: Link, theirs: Link) -> None:
    """The first block of a round that nobody knows of yet."""
    theirs.send_block(Block(7, Stage.TOTAL, 0, 0, 0, 4), memoryview(bytes(4)))
    theirs.flush()
    readable(ours)
    assert ours.receive(lambda _: WAIT) is None
    assert ours.waits


# --- who calls whom --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("me", "called"), [(0, []), (2, [0, 1]), (COORDINATOR, [0, 1, 2, 3])], ids=str
)
def test_the_greater_calls_the_lesser(make_world: MakeWorld, me: int, called: list[int]) -> None:
    """Once each, and the coordinator calls all."""
    world = make_world(me)
    world.mesh.tell(PLACES | {COORDINATOR: (HOST, 1)})
    assert world.turn() == world.turn(STEP_S) == []
    assert world.listener.calls == [(node, PLACES[node]) for node in called]


def test_a_node_that_cannot_be_reached_is_called_again_a_little_later(world: World) -> None:
    world.turn()
    world.listener.made.append(Unreachable(0, "refused"))
    assert world.turn() == []
    world.turn(0.01)
    assert len(world.listener.calls) == 2
    world.turn(STEP_S)
    assert world.listener.calls[2:] == [(0, PLACES[0])]  # and the call to node 1 is under way


def test_a_link_that_comes_is_up_and_its_node_is_called_no_more(world: World) -> None:
    world.turn()
    (zero, _), (three, _) = world.link(0), world.link(3)
    ups = world.turn()
    assert [(up.node, up.link) for up in ups if isinstance(up, Up)] == [(0, zero), (3, three)]
    assert world.mesh.links == {0: zero, 3: three}
    world.turn(STEP_S)
    assert len(world.listener.calls) == 2


def test_a_node_is_called_again_as_soon_as_its_link_is_lost(world: World) -> None:
    world.turn()
    ours, _ = world.link(0)
    world.turn()
    assert world.mesh.close(0, "end of file") == Down(0, "end of file")
    assert world.mesh.links == {}
    assert ours.fileno() == -1
    world.turn()
    assert world.listener.calls[2:] == [(0, PLACES[0])]


def test_a_node_that_calls_again_has_given_up_its_link(world: World) -> None:
    first, _ = world.link(3)
    world.turn()
    second, _ = world.link(3)
    down, up = world.turn()
    assert down == Down(3, "it calls again")
    assert isinstance(up, Up)
    assert (up.node, up.link, world.mesh.links) == (3, second, {3: second})
    assert first.fileno() == -1


def test_where_a_call_is_refused_nobody_will_come(world: World) -> None:
    """Unless there is a link by now: it was another process that had left."""
    world.turn()
    world.link(1)
    world.turn()
    world.listener.made += [Unreachable(one, "refused", refused=True) for one in (0, 1)]
    assert world.turn() == [Down(0, "refused", for_good=True)]


def test_who_would_call_is_asked_whether_it_is_still_there(world: World) -> None:
    """Others are called again anyway."""
    for node in (0, 3, COORDINATOR):
        world.link(node)
    world.turn()
    for node in (0, 3, COORDINATOR):
        world.mesh.close(node, "end of file")
    assert world.listener.probes == [(3, PLACES[3])]


def test_new_addresses_count_at_once(world: World) -> None:
    """A successor listens elsewhere; nobody waits until the old place may be called again."""
    world.turn()
    world.listener.made.append(Unreachable(0, "refused"))
    world.turn()
    world.mesh.tell({0: (HOST, 5000), 1: (HOST, 5001)})
    world.turn()
    assert world.listener.calls[2:] == [(0, (HOST, 5000))]


def test_who_is_not_named_any_more_is_called_no_more(world: World) -> None:
    world.turn()
    world.link(0)
    world.turn()
    world.mesh.tell({1: PLACES[1]})
    world.mesh.close(0, "end of file")
    world.listener.made.append(Unreachable(1, "refused"))
    world.turn(STEP_S)
    world.turn(STEP_S)
    assert world.listener.calls[2:] == [(1, PLACES[1])]


# --- who is given up -------------------------------------------------------------------------


def test_a_silent_link_is_given_up(world: World) -> None:
    world.link(0)
    _, theirs = world.link(3)
    world.turn()
    changes: list[Up | Down] = []
    for _ in range(4):
        changes += world.turn(STEP_S)
        theirs.tick()
        hear(world.mesh.links[3])
    assert changes == []  # SILENT_S, and no longer
    assert world.turn(STEP_S) == [Down(0, "nothing was heard for 1.2 s", for_good=True)]
    assert set(world.mesh.links) == {3}
    assert world.mesh.cuts == {0: 1}
    assert world.mesh.unanswered == {0: 0}, "its kernel took the pings"


def test_who_was_away_judges_nobody_before_having_listened(world: World) -> None:
    """What others have said meanwhile waits to be read."""
    (silent, _), (ours, theirs) = world.link(0), world.link(3)
    world.turn()
    assert world.turn(10 * SILENT_S) == []
    assert world.mesh.links == {0: silent, 3: ours}
    theirs.tick()
    hear(ours)
    assert [change.node for change in world.turn(STEP_S)] == [0]


def test_a_link_that_is_not_read_is_not_silent(world: World) -> None:
    """Its next block waits until this node is told of the round."""
    ours, theirs = world.link(3)
    world.turn()
    leave_waiting(ours, theirs)
    assert [world.turn(STEP_S) for _ in range(8)] == [[]] * 8


def test_a_peer_that_is_gone_is_noticed_on_a_link_that_is_not_read(world: World) -> None:
    ours, theirs = world.link(3)
    world.turn()
    leave_waiting(ours, theirs)
    theirs.close()
    deadline_s = time.monotonic() + 10
    while not (changes := world.turn()):
        assert time.monotonic() < deadline_s, "nobody notices"
    assert changes == [Down(3, "node 3 is gone")]


def test_every_link_is_pinged_while_nothing_is_said(world: World) -> None:
    ours, theirs = world.link(3)
    world.turn()
    assert ours.traffic.bytes_out == 0
    world.turn(PING_S)
    readable(theirs)


def test_at_the_end_everything_is_closed(world: World) -> None:
    (ours, _), (others, _) = world.link(0), world.link(3)
    world.turn()
    world.mesh.end()
    assert (ours.fileno(), others.fileno(), world.mesh.links) == (-1, -1, {})
    assert world.listener.is_closed


# --- on real links ---------------------------------------------------------------------------


def test_all_find_each_other_and_a_successor(until: Callable[..., None]) -> None:
    """Three nodes and the coordinator; then node 1 dies, and another process takes its place."""
    nodes = (0, 1, 2, COORDINATOR)
    meshes = {me: Mesh(me, Listener(HOST, Credentials(me, SECRET))) for me in nodes}

    def introduce() -> None:
        places = {me: mesh.listener.address for me, mesh in meshes.items() if me != COORDINATOR}
        for mesh in meshes.values():
            mesh.tell(places)

    def all_are_linked() -> bool:
        return all(set(mesh.links) == set(nodes) - {me} for me, mesh in meshes.items())

    introduce()
    until(meshes, all_are_linked)
    dead, meshes[1] = meshes[1], Mesh(1, Listener(HOST, Credentials(1, SECRET)))
    kept = meshes[0].links[2]
    dead.end()
    until(meshes, lambda: not any(1 in mesh.links for mesh in meshes.values()))
    introduce()
    until(meshes, all_are_linked)
    assert meshes[0].links[2] is kept


@pytest.fixture
def until() -> Iterator[Callable[[dict[int, Mesh], Callable[[], bool]], None]]:
    """Let meshes take turns until it is so; they are ended with the test."""
    used: dict[int, Mesh] = {}

    def until(meshes: dict[int, Mesh], condition: Callable[[], bool]) -> None:
        used.update(meshes)
        deadline_s = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline_s, "it does not happen"
            for mesh in meshes.values():
                mesh.turn()
                for node, link in list(mesh.links.items()):
                    try:
                        link.receive(lambda _: None)
                    except ChannelClosed as error:
                        mesh.close(node, str(error))

    yield until
    for mesh in used.values():
        mesh.end()


def test_where_an_aggregator_listens_is_found_once_it_has_begun_to(tmp_path: Path) -> None:
    assert find_address(tmp_path, HOST) is None
    (tmp_path / "port").write_text("4711")
    assert find_address(tmp_path, HOST) == (HOST, 4711)
