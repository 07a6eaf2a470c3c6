"""Updates that several nodes compute together: the bits are those of one node with all slots."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import nn

from actors.links import WAIT, Link
from actors.rounds import COUNTERS, Rounds, round_number
from elastic.core.errors import ProtocolError
from elastic.core.mapped import Version
from elastic.core.protocol.frames import Block, Stage
from elastic.core.update import Plan, Updater

MakeNode = Callable[..., Any]
NUM = 4  # micro-batches
TERM = 5


def wide() -> nn.Module:
    """Several chunks of 1024 elements, float buffers and an integer counter."""
    return nn.Sequential(
        nn.Linear(6, 200), nn.BatchNorm1d(200), nn.Linear(200, 13), nn.Linear(13, 1)
    )


def bits(version: Version) -> list[torch.Tensor]:
    """Everything in a version."""
    return [version.values, version.counters, *version.states.values(), *version.scalars.values()]


def equal(one: Version, other: Version) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


class Member:
    """One node of several: its store, its links, and its rounds."""

    def __init__(self, me: int, node: Any, updater: Updater | None = None) -> None:
        self.me, self.node, self.links = me, node, dict[int, Link]()
        self.worker = node.worker()
        node.measure(self.worker)
        self.updater = node.updater(num_threads=2) if updater is None else updater
        self.woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.rounds = Rounds(
            self.updater,
            node.versions,
            node.spec.layout,
            me,
            lambda: os.eventfd_write(self.woken, 1),
        )
        self.norm: float | None = None

    @property
    def next_version(self) -> Version:
        version: Version = self.node.versions[1 - self.node.state.step % 2]
        return version

    def compute(self, micro_batches: Sequence[int]) -> float:
        """What is computed on this node; the weight of it."""
        return sum(self.node.accumulate(self.worker, self.me, m).weight for m in micro_batches)

    def plan(self, weight: float) -> Plan:
        plan: Plan = self.node.plan(weight=weight)
        return plan

    def begin(self, number: int, nodes: Sequence[int], weight: float, teller: int = 0) -> None:
        counters = None
        if self.me == teller:
            counters = self.node.slots[self.me].counters[self.node.live[self.me]]
        self.norm = None
        self.rounds.begin(
            round_number(TERM, number),
            self.plan(weight),
            nodes=nodes,
            observers=(),
            links=self.links,
            counters=counters,
        )
        for node, link in self.links.items():
            if link.waits:
                self.read(node)

    def read(self, node: int) -> None:
        link = self.links[node]
        while (frame := link.receive(lambda block: self.rounds.place(node, block))) is not None:
            assert isinstance(frame, Block)
            self.rounds.arrived(node, frame)

    def turn(self) -> None:
        norm = self.rounds.turn()
        if norm is not None:
            self.norm = norm

    def close(self) -> None:
        self.rounds.close()
        self.updater.close()
        for link in self.links.values():
            link.close()
        os.close(self.woken)


@dataclass
class World:
    """Nodes of one job in this process, and one node that has everything, to compare with."""

    members: list[Member]
    alone: Any
    alone_updater: Updater
    worker: Any
    norms: list[float] = field(default_factory=list)

    def step_alone(self) -> Version:
        """The version that one node with all slots makes of the step."""
        weight = sum(self.alone.accumulate(self.worker, 0, m).weight for m in range(NUM))
        self.norms.append(self.alone_updater.run(self.alone.plan(weight=weight), lambda _: None))
        self.alone.commit()
        version: Version = self.alone.versions[self.alone.state.step % 2]
        return version

    def run(self, until: Callable[[], bool]) -> None:
        """Let links carry what they can, and threads do what they do, until it is so."""
        deadline_s = time.monotonic() + 10
        with selectors.DefaultSelector() as selector:
            for member in self.members:
                selector.register(member.woken, selectors.EVENT_READ, None)
                for node, link in member.links.items():
                    link.attach(selector, (member, node))
            try:
                while not until():
                    assert time.monotonic() < deadline_s, "it does not happen"
                    for key, mask in selector.select(1):
                        self._use(key, mask)
                    for member in self.members:
                        member.turn()
            finally:
                for member in self.members:
                    for link in member.links.values():
                        link.detach()

    def _use(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.data is None:
            os.eventfd_read(key.fd)
            return
        member, node = key.data
        if mask & selectors.EVENT_WRITE:
            member.links[node].flush()
        if mask & selectors.EVENT_READ:
            member.read(node)

    def finish(self) -> None:
        """Run until all have the next version."""
        self.run(lambda: all(member.norm is not None for member in self.members))


def share(num_nodes: int, step: int = 0) -> list[list[int]]:
    """Who computes what; other nodes in other steps."""
    return [[m for m in range(NUM) if (m + step) % num_nodes == node] for node in range(num_nodes)]


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(make_node: MakeNode, tiny_task: Any) -> Iterator[MakeWorld]:
    worlds: list[World] = []

    def make(num_nodes: int, **job: Any) -> World:
        task = tiny_task(wide)
        members = [Member(me, make_node(task, **job)) for me in range(num_nodes)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            for one in members:
                for other in members[: one.me]:
                    ours = socket.create_connection(server.getsockname())
                    one.links[other.me] = Link(ours, other.me)
                    other.links[one.me] = Link(server.accept()[0], one.me)
        alone = make_node(task, **job)
        worker = alone.worker()
        alone.measure(worker)
        worlds.append(World(members, alone, alone.updater(), worker))
        return worlds[-1]

    yield make
    for world in worlds:
        world.alone_updater.close()
        for member in world.members:
            member.close()


# --- the numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_nodes", [2, 3])
@pytest.mark.parametrize(
    "job", [{}, {"clip_norm": 0.1}, {"ema": {"decay": 0.75}}], ids=["plain", "clipped", "averaged"]
)
def test_steps_equal_those_of_one_node_with_all_slots(
    num_nodes: int, job: Mapping[str, Any], make_world: MakeWorld
) -> None:
    """Bit for bit: parameters, float buffers, integer counters, the optimizer's state, the norm."""
    world = make_world(num_nodes, **job)
    first = [one.clone() for one in bits(world.alone.versions[0])]
    for step in range(3):
        expected = world.step_alone()
        shares = share(num_nodes, step)
        weight = sum(m.compute(part) for m, part in zip(world.members, shares, strict=True))
        for member in world.members:
            member.begin(step, range(num_nodes), weight, teller=step % num_nodes)
        world.finish()
        for member in world.members:
            assert equal(member.next_version, expected)
            assert member.norm == world.norms[step]
            member.node.commit()
    last = bits(world.alone.versions[1])
    assert not any(torch.equal(a, b) for a, b in zip(first, last, strict=True) if a.numel())
    assert world.alone.versions[1].counters.numel()


def test_a_node_without_a_slot_gets_the_same_version(make_world: MakeWorld) -> None:
    world = make_world(3)
    expected = world.step_alone()
    weight = world.members[1].compute(range(NUM))
    for member in world.members:
        member.begin(0, range(3), weight, teller=1)
    assert world.members[2].plan(weight).slots == []
    world.finish()
    assert all(equal(member.next_version, expected) for member in world.members)


def test_a_round_is_not_complete_before_the_counters_are_there(make_world: MakeWorld) -> None:
    world = make_world(2)
    expected = world.step_alone()
    weight = sum(m.compute(part) for m, part in zip(world.members, share(2), strict=True))
    zero, one = world.members
    for member in world.members:
        member.begin(0, range(2), weight, teller=-1)
    done = [member.rounds._running.round.exchange for member in world.members]
    world.run(lambda: all(exchange.has_totals for exchange in done))
    assert (zero.norm, one.norm) == (None, None)
    counters = zero.node.slots[0].counters[zero.node.live[0]]
    block = Block(round_number(TERM, 0), Stage.TOTAL, COUNTERS, 0, 0, counters.numel())
    zero.links[1].send_block(block, counters.numpy().data)
    world.run(lambda: one.norm is not None)
    assert zero.norm is None
    assert equal(one.next_version, expected)


# --- rounds that are given up ----------------------------------------------------------------


@pytest.mark.parametrize("told", [(0, 1), (0,)], ids=["both had begun", "one had begun"])
def test_a_round_begun_anew_with_other_slots_gives_the_right_version(
    told: Sequence[int], make_world: MakeWorld
) -> None:
    """A node is lost in the midst; another one computes what that had, and two go on."""
    world = make_world(3)
    expected = world.step_alone()
    shares = share(3)
    weight = sum(m.compute(part) for m, part in zip(world.members, shares, strict=True))
    for me in told:
        world.members[me].begin(1, range(3), weight)
    lost = world.members.pop()
    world.run(lambda: not any(world.members[me].links[1 - me].has_unsent for me in told))
    lost.close()
    for member in world.members:
        member.links.pop(2).close()
        member.rounds.give_up()
    world.members[1].compute(shares[2])
    for member in world.members:
        member.begin(2, range(2), weight)
    world.finish()
    assert all(equal(member.next_version, expected) for member in world.members)


class Held:
    """An updater whose second half begins when the test says so."""

    def __init__(self, updater: Updater) -> None:
        self.add_up, self._finish = updater.add_up, updater.finish
        self.go = threading.Event()

    def finish(self, *given: Any) -> float:
        assert self.go.wait(30)
        return self._finish(*given)


def test_a_node_that_is_left_alone_goes_on_by_itself(make_world: MakeWorld) -> None:
    """Once nothing of the round that was given up is written any more."""
    world = make_world(2)
    expected = world.step_alone()
    shares = share(2)
    weight = sum(m.compute(part) for m, part in zip(world.members, shares, strict=True))
    left = world.members[0]
    held = Held(left.updater)
    left.rounds._updater = cast(Updater, held)
    for member in world.members:
        member.begin(1, range(2), weight)
    running = left.rounds._running
    assert running is not None
    world.run(lambda: running.is_finishing)
    settling = threading.Thread(target=left.rounds.settle)
    settling.start()
    settling.join(0.1)
    assert settling.is_alive()
    held.go.set()
    settling.join(30)
    left.compute(shares[1])
    left.updater.run(left.plan(weight), lambda _: None)
    left.turn()
    assert equal(left.next_version, expected)
    assert left.norm is None


def test_what_waits_to_be_sent_of_a_round_that_is_given_up_is_not_sent(
    make_world: MakeWorld,
) -> None:
    world = make_world(2)
    member = world.members[1]
    member.begin(1, range(2), member.compute(range(NUM)))
    assert member.rounds._job is not None
    member.rounds._job.result(30)
    member.turn()
    assert member.links[0].has_unsent
    member.rounds.give_up()
    assert not member.links[0].has_unsent


def test_a_block_has_a_place_only_in_its_round(make_world: MakeWorld) -> None:
    """One of a round that is over is dropped; one that the lead may still tell of waits."""
    member = make_world(2).members[0]
    rounds, weight = member.rounds, member.compute(range(NUM))
    block = Block(round_number(TERM, 3), Stage.NODE_SUM, 0, 0, 0, 4096)
    assert rounds.place(1, block) is WAIT
    member.begin(3, range(2), weight)
    assert isinstance(rounds.place(1, block), memoryview)
    assert rounds.place(1, block._replace(round=round_number(TERM, 2))) is None
    assert rounds.place(1, block._replace(round=round_number(TERM, 4))) is WAIT
    rounds.give_up()
    assert rounds.place(1, block) is None
    assert rounds.place(1, block._replace(round=round_number(TERM, 4))) is WAIT


def test_rounds_of_later_terms_have_greater_numbers() -> None:
    numbers = [round_number(term, number) for term in (7, 8) for number in (0, 1, 2**22 - 1)]
    assert numbers == sorted(set(numbers))


# --- what must not happen --------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"length": 4}, {"length": 4096}, {"tensor": 0}, {"offset": 4}], ids=str
)
def test_counters_of_another_model_are_refused(
    wrong: Mapping[str, int], make_world: MakeWorld
) -> None:
    world = make_world(2)
    member, size_bytes = world.members[1], world.alone.versions[0].counters.numel()
    weight = member.compute(range(NUM))
    member.begin(0, range(2), weight)
    block = Block(round_number(TERM, 0), Stage.TOTAL, COUNTERS, 0, 0, size_bytes)
    place = member.rounds.place(0, block)
    assert isinstance(place, memoryview)
    assert place.nbytes == size_bytes
    with pytest.raises(ProtocolError, match="not its to send"):
        member.rounds.place(0, block._replace(**wrong))


def test_counters_that_come_twice_are_refused(make_world: MakeWorld) -> None:
    world = make_world(2)
    member, size_bytes = world.members[1], world.alone.versions[0].counters.numel()
    member.begin(0, range(2), member.compute(range(NUM)))
    block = Block(round_number(TERM, 0), Stage.TOTAL, COUNTERS, 0, 0, size_bytes)
    assert isinstance(member.rounds.place(0, block), memoryview)
    member.rounds.arrived(0, block)
    with pytest.raises(ProtocolError, match="not its to send"):
        member.rounds.place(0, block)


@pytest.mark.parametrize("half", ["add_up", "finish"])
def test_an_error_on_a_thread_ends_the_node(half: str, make_world: MakeWorld) -> None:
    """It escapes from the loop, like those of a node that is alone."""
    world = make_world(2)
    weight = world.members[0].compute(range(NUM))
    plan = world.members[1].plan(weight)
    broken = replace(plan, slots=[(None, 0)]) if half == "add_up" else replace(plan, exponents=[])
    world.members[1].plan = lambda _: broken  # type: ignore[method-assign]
    for member in world.members:
        member.begin(0, range(2), weight)
    with pytest.raises((AttributeError, IndexError)):
        world.run(lambda: False)
