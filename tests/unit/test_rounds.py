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
from actors.rounds import COUNTERS, SQUARES, Rounds, round_number
from elastic.core.errors import ProtocolError
from elastic.core.layout import BUFFERS
from elastic.core.mapped import Version
from elastic.core.protocol.events import Update
from elastic.core.protocol.frames import Block, Stage
from elastic.core.update import Plan, Snapshot, Updater
from policies.resharding import Move

MakeNode = Callable[..., Any]
NUM = 4  # micro-batches
TERM = 5

Keepers = Sequence[Sequence[int]]


def wide() -> nn.Module:
    """Several chunks of 1024 elements, float buffers and an integer counter."""
    return nn.Sequential(
        nn.Linear(6, 200), nn.BatchNorm1d(200), nn.Linear(200, 13), nn.Linear(13, 1)
    )


def parameters(version: Version) -> list[torch.Tensor]:
    """What every node has of a version."""
    return [version.values, version.counters]


def state(version: Version, chunk: Any) -> list[torch.Tensor]:
    """What those that keep a chunk have of it besides."""
    if chunk.group == BUFFERS:
        return []
    part = slice(chunk.start, chunk.stop)
    tensors = [one[part] for one in version.states.values()]
    return [*tensors, *(one[chunk.index] for one in version.scalars.values())]


def same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def in_turn(num_chunks: int, nodes: Sequence[int], replicas: int) -> Keepers:
    """Owners in turn, replicas behind them."""
    return tuple(
        tuple(nodes[(chunk + one) % len(nodes)] for one in range(replicas))
        for chunk in range(num_chunks)
    )


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
            node.sizes,
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

    @property
    def chunks(self) -> Sequence[Any]:
        chunks: Sequence[Any] = self.node.spec.layout.chunks
        return chunks

    def begin(
        self,
        number: int,
        nodes: Sequence[int],
        weight: float,
        *,
        teller: int = 0,
        keepers: Keepers | None = None,
        moves: Sequence[Move] = (),
        observers: Sequence[int] = (),
    ) -> None:
        """Begin a round. If `keepers` are not named, all nodes keep all chunks."""
        counters = None
        if self.me == teller:
            counters = self.node.slots[self.me].counters[self.node.live[self.me]]
        update = Update(
            round=number,
            nodes=tuple(nodes),
            step=self.node.state.step,
            slots=(),
            exponents=(),
            weight=weight,
            num_updates=0,
            keepers=in_turn(len(self.chunks), nodes, len(nodes)) if keepers is None else keepers,  # type: ignore[arg-type]
            moves=tuple(moves),
            observers=tuple(observers),
        )
        self.norm = None
        plan = self.plan(weight)
        self.rounds.begin(TERM, update, plan, links=self.links, counters=counters)
        for node, link in self.links.items():
            if link.waits:
                self.read(node)

    def equals(self, expected: Version) -> bool:
        """All parameters, and the state of those chunks that are kept here."""
        ours = self.next_version
        return same(parameters(ours), parameters(expected)) and all(
            same(state(ours, self.chunks[index]), state(expected, self.chunks[index]))
            for index in ours.kept_chunks
        )

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
    first = world.alone.versions[0].values.clone()
    for step in range(3):
        expected = world.step_alone()
        shares = share(num_nodes, step)
        weight = sum(m.compute(part) for m, part in zip(world.members, shares, strict=True))
        for member in world.members:
            member.begin(step, range(num_nodes), weight, teller=step % num_nodes)
        world.finish()
        for member in world.members:
            assert member.equals(expected)
            assert len(member.next_version.kept_chunks) == len(member.chunks)
            assert member.norm == world.norms[step]
            member.node.commit()
    assert not torch.equal(first, world.alone.versions[1].values)
    assert world.alone.versions[1].counters.numel()


def test_a_node_without_a_slot_gets_the_same_version(make_world: MakeWorld) -> None:
    world = make_world(3)
    expected = world.step_alone()
    weight = world.members[1].compute(range(NUM))
    for member in world.members:
        member.begin(0, range(3), weight, teller=1)
    assert world.members[2].plan(weight).slots == []
    world.finish()
    assert all(member.equals(expected) for member in world.members)


def test_a_round_is_not_complete_before_the_counters_are_there(make_world: MakeWorld) -> None:
    world = make_world(2)
    expected = world.step_alone()
    weight = sum(m.compute(part) for m, part in zip(world.members, share(2), strict=True))
    zero, one = world.members
    for member in world.members:
        member.begin(0, range(2), weight, teller=-1)
    running = [member.rounds._running for member in world.members]
    world.run(lambda: all(one is not None and one.is_complete for one in running))
    assert (zero.norm, one.norm) == (None, None)
    counters = zero.node.slots[0].counters[zero.node.live[0]]
    block = Block(round_number(TERM, 0), Stage.TOTAL, COUNTERS, 0, 0, counters.numel())
    zero.links[1].send_block(block, counters.numpy().data)
    world.run(lambda: one.norm is not None)
    assert zero.norm is None
    assert one.equals(expected)


# --- state on some nodes only ----------------------------------------------------------------


@pytest.mark.parametrize("job", [{}, {"clip_norm": 0.1}], ids=["plain", "clipped"])
@pytest.mark.parametrize(("num_nodes", "replicas"), [(2, 1), (3, 1), (3, 2)])
def test_all_have_the_parameters_and_keepers_the_state(
    num_nodes: int, replicas: int, job: Mapping[str, Any], make_world: MakeWorld
) -> None:
    world = make_world(num_nodes, **job)
    num_chunks = len(world.members[0].chunks)
    keepers = in_turn(num_chunks, range(num_nodes), replicas)
    for step in range(3):
        expected = world.step_alone()
        shares = share(num_nodes, step)
        weight = sum(m.compute(part) for m, part in zip(world.members, shares, strict=True))
        for member in world.members:
            member.begin(step, range(num_nodes), weight, keepers=keepers)
        world.finish()
        for member in world.members:
            kept = {chunk for chunk in range(num_chunks) if member.me in keepers[chunk]}
            assert 0 < len(kept) < num_chunks
            assert member.next_version.kept_chunks == kept
            assert member.equals(expected)
            assert member.norm == world.norms[step]
            member.node.commit()


def test_state_that_moved_is_the_senders_and_is_gone_on_with(make_world: MakeWorld) -> None:
    """Once with it, the receiver may be the only one that keeps a chunk."""
    world = make_world(3)
    num_chunks = len(world.members[0].chunks)
    before = in_turn(num_chunks, range(3), 1)
    moves = [Move(chunk, row[0], (row[0] + 1) % 3) for chunk, row in enumerate(before)]
    after = tuple((move.receiver,) for move in moves)
    for step, (keepers, now) in enumerate([(before, []), (before, moves), (after, [])]):
        expected = world.step_alone()
        weight = sum(m.compute(part) for m, part in zip(world.members, share(3), strict=True))
        for member in world.members:
            member.begin(step, range(3), weight, keepers=keepers, moves=now)
        world.finish()
        for member in world.members:
            kept = {chunk for chunk, row in enumerate(keepers) if member.me in row}
            kept |= {move.chunk for move in now if move.receiver == member.me}
            assert member.next_version.kept_chunks == kept
            assert member.equals(expected)
            member.node.commit()


def test_who_observes_gets_everything_but_state_and_nobody_waits_for_it(
    make_world: MakeWorld,
) -> None:
    world = make_world(3)
    *members, observer = world.members
    num_chunks = len(observer.chunks)
    expected = world.step_alone()
    weight = sum(m.compute(part) for m, part in zip(members, share(2), strict=True))
    keepers = in_turn(num_chunks, range(2), 1)
    for member in members:
        member.begin(0, range(2), weight, keepers=keepers, observers=[2])
    world.run(lambda: all(member.norm is not None for member in members))
    assert all(member.equals(expected) for member in members)
    assert not same(parameters(observer.next_version), parameters(expected))
    observer.begin(0, range(2), weight, keepers=keepers, observers=[2])
    world.finish()
    assert same(parameters(observer.next_version), parameters(expected))
    assert observer.next_version.kept_chunks == frozenset()


def test_parameters_wait_until_a_snapshot_has_copied_what_they_replace(
    make_world: MakeWorld,
) -> None:
    world = make_world(2)
    zero = world.members[0]
    version = zero.next_version
    version.values.fill_(7)
    snapshot = Snapshot(zero.node.sizes, 1, version)
    zero.updater.held.append(snapshot)
    expected = world.step_alone()
    weight = sum(m.compute(part) for m, part in zip(world.members, share(2), strict=True))
    keepers = ((1,),) * len(zero.chunks)
    for member in world.members:
        member.begin(0, range(2), weight, keepers=keepers)
    world.run(lambda: zero.links[1].waits)
    assert zero.norm is None
    assert (version.values == 7).all()
    snapshot.copy()
    zero.read(1)
    world.finish()
    assert zero.equals(expected)
    for chunk in zero.chunks:
        assert (snapshot.values[chunk.start : chunk.stop] == 7).all()


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
    assert all(member.equals(expected) for member in world.members)


class Held:
    """An updater whose `what` begins when the test says so."""

    def __init__(self, updater: Updater, what: str) -> None:
        self._updater, self._what = updater, what
        self.begun, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == self._what:
            self.begun.set()
            assert self.go.wait(30)
        return getattr(self._updater, name)


def test_a_node_that_is_left_alone_goes_on_by_itself(make_world: MakeWorld) -> None:
    """Once nothing of the round that was given up is written any more."""
    world = make_world(2)
    expected = world.step_alone()
    shares = share(2)
    weight = sum(m.compute(part) for m, part in zip(world.members, shares, strict=True))
    left = world.members[0]
    held = Held(left.updater, "step")
    left.rounds._updater = cast(Updater, held)
    for member in world.members:
        member.begin(1, range(2), weight)
    world.run(held.begun.is_set)
    settling = threading.Thread(target=left.rounds.settle)
    settling.start()
    settling.join(0.1)
    assert settling.is_alive()
    held.go.set()
    settling.join(30)
    left.compute(shares[1])
    left.updater.run(left.plan(weight), lambda _: None)
    left.turn()
    assert len(left.next_version.kept_chunks) == len(left.chunks)
    assert left.equals(expected)
    assert left.norm is None


@pytest.mark.parametrize("what", ["take", "step"])
def test_a_round_given_up_by_its_second_half_is_begun_anew(
    what: str, make_world: MakeWorld
) -> None:
    """One node has told its norms, or updated its chunks already; another one has not yet."""
    world = make_world(2, clip_norm=0.1)
    expected = world.step_alone()
    weight = sum(m.compute(part) for m, part in zip(world.members, share(2), strict=True))
    keepers = in_turn(len(world.members[0].chunks), range(2), 1)
    zero, one = world.members
    held = Held(one.updater, what)
    one.rounds._updater = cast(Updater, held)
    for member in world.members:
        member.begin(1, range(2), weight, keepers=keepers)
    running = zero.rounds._running
    assert running is not None
    if what == "take":
        world.run(lambda: held.begun.is_set() and running.has_told)
        assert running.stepping is None
    else:
        world.run(lambda: held.begun.is_set() and bool(running.stepping))
        assert running.stepping is not None
        running.stepping.result(30)
    for member in world.members:
        member.rounds.give_up()
    for member in world.members:
        member.begin(2, range(2), weight, keepers=keepers)
    held.go.set()
    world.finish()
    assert all(member.equals(expected) for member in world.members)
    assert (zero.norm, one.norm) == (world.norms[0], world.norms[0])


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


def test_squares_are_let_in_once_and_of_each_owner_as_many_as_it_owns(
    make_world: MakeWorld,
) -> None:
    world = make_world(3)
    member = world.members[0]
    keepers = [(0,), *[(1, 2)] * (len(member.chunks) - 1)]
    member.begin(0, range(3), member.compute(range(NUM)), keepers=keepers)
    size_bytes = 8 * (len(member.chunks) - 1)
    block = Block(round_number(TERM, 0), Stage.TOTAL, SQUARES, 0, 0, size_bytes)
    assert isinstance(member.rounds.place(1, block), memoryview)
    for node, wrong in [
        (1, block._replace(length=size_bytes - 8)),
        (1, block._replace(chunk=1)),
        (2, block),
        (2, block._replace(length=8)),
    ]:
        with pytest.raises(ProtocolError, match="not its to send"):
            member.rounds.place(node, wrong)
    member.rounds.arrived(1, block)
    with pytest.raises(ProtocolError, match="not its to send"):
        member.rounds.place(1, block)


@pytest.mark.parametrize("half", ["add_up", "take"])
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
