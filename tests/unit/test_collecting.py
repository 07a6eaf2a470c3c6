"""The state of chunks for a checkpoint: what others keep comes over links into a snapshot."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from actors.collecting import Receiver, Sender
from actors.links import WAIT, Link
from elastic.core.errors import ProtocolError, StorageError
from elastic.core.layout import BUFFERS
from elastic.core.mapped import Version
from elastic.core.protocol.events import Copy
from elastic.core.protocol.frames import Block, Stage
from elastic.core.update import Snapshot, Updater, tensors_of

MakeNode = Callable[..., Any]
STEP = 2  # its version is the first of the two


def wide() -> nn.Module:
    """Several chunks, the last one of float buffers."""
    return nn.Sequential(nn.Linear(6, 200), nn.BatchNorm1d(200), nn.Linear(200, 13))


class World:
    """Node 0 writes a checkpoint; it and node 1 keep every other chunk each."""

    def __init__(self, zero: Any, one: Any) -> None:
        self.sizes = zero.sizes
        self.chunks = zero.spec.layout.chunks
        self.ours, self.theirs = zero.versions[0], one.versions[0]
        for version, offset in ((self.ours, 0.0), (self.theirs, 0.5)):
            version.values.copy_(torch.arange(len(version.values)))
            for tensor in (*version.states.values(), *version.scalars.values()):
                tensor.copy_(torch.arange(len(tensor)) + offset)
            version.kept.zero_()
        self.ours.kept[::2] = 1
        self.theirs.kept[1::2] = 1
        self.senders = tuple(chunk.index % 2 for chunk in self.chunks)
        self.updater: Updater = one.updater()
        self.sender = Sender(1, self.sizes, self.updater, one.versions, lambda: None)
        self.receiver = Receiver(self.sizes)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.to_0 = Link(socket.create_connection(server.getsockname()), 0)
            self.from_1 = Link(server.accept()[0], 1)

    def collect(self, number: int, *, linked: bool = True) -> Snapshot:
        """Begin copy `number` at the node that writes."""
        snapshot = Snapshot(self.sizes, 0, self.ours)
        snapshot.copy()
        links = {1: self.from_1} if linked else {}
        self.receiver.begin(number, self.copy(number), snapshot, links)
        return snapshot

    def copy(self, number: int) -> Copy:
        return Copy(number, 0, STEP, self.senders)

    def run(self, until: Callable[[], bool]) -> None:
        """Let the link carry what it can until it is so."""
        deadline_s = time.monotonic() + 10
        with selectors.DefaultSelector() as selector:
            self.to_0.attach(selector, self.to_0.flush)
            self.from_1.attach(selector, self.read)
            while not until():
                assert time.monotonic() < deadline_s, "it does not happen"
                self.sender.turn({0: self.to_0})
                for key, _ in selector.select(0.01):
                    key.data()
            self.to_0.detach()
            self.from_1.detach()

    def read(self) -> None:
        while (frame := self.from_1.receive(lambda one: self.receiver.place(1, one))) is not None:
            assert isinstance(frame, Block)
            self.receiver.arrived(1, frame)

    def expect(self, snapshot: Snapshot) -> None:
        """It has the state of each chunk from the one that keeps it."""
        snapshot.wait_until_whole(0.0)
        for chunk in self.chunks:
            if chunk.group == BUFFERS:
                continue
            source: Version = (self.ours, self.theirs)[self.senders[chunk.index]]
            part = slice(chunk.start, chunk.stop)
            for key, tensor in snapshot.states.items():
                assert torch.equal(tensor[part], source.states[key][part])
            for key, scalars in snapshot.scalars.items():
                assert scalars[chunk.index] == source.scalars[key][chunk.index]
        assert torch.equal(snapshot.values, self.ours.values)

    def close(self) -> None:
        self.sender.close()
        self.updater.close()
        self.to_0.close()
        self.from_1.close()


@pytest.fixture
def world(make_node: MakeNode, tiny_task: Any) -> Iterator[World]:
    world = World(make_node(tiny_task(wide)), make_node(tiny_task(wide)))
    yield world
    world.close()


def test_a_snapshot_becomes_whole_with_what_others_keep(world: World) -> None:
    snapshot = world.collect(1)
    assert snapshot.missing
    with pytest.raises(StorageError, match="chunks is missing: it did not come within 0 s"):
        snapshot.wait_until_whole(0.0)
    world.sender.begin(1, world.copy(1), world.to_0)
    world.run(lambda: not snapshot.missing)
    world.expect(snapshot)
    assert world.updater.held == [], "nobody waits for it any more"


def test_training_goes_on_once_the_senders_copy_is_made(world: World) -> None:
    snapshot = world.collect(1)
    world.sender.begin(1, world.copy(1), world.to_0)
    (sent,) = world.updater.held
    for chunk in world.chunks:
        sent.wait_for(chunk.index)
    before = {key: tensor.clone() for key, tensor in world.theirs.states.items()}
    for tensor in world.theirs.states.values():
        tensor.fill_(-1)
    world.run(lambda: not snapshot.missing)
    for key, tensor in before.items():
        world.theirs.states[key].copy_(tensor)
    world.expect(snapshot)


def test_who_has_no_share_sends_nothing(world: World) -> None:
    world.sender.begin(1, Copy(1, 0, STEP, (0,) * len(world.chunks)), world.to_0)
    world.sender.begin(2, world.copy(2), None)
    world.sender.turn({0: world.to_0})
    assert world.updater.held == []
    assert not world.to_0.has_unsent


def test_what_was_begun_over_another_link_is_not_sent(world: World) -> None:
    world.sender.begin(1, world.copy(1), world.to_0)
    world.sender._thread.submit(int).result()
    world.sender.turn({0: world.from_1})
    assert world.updater.held == []
    assert not world.to_0.has_unsent


@pytest.mark.parametrize("linked", [True, False], ids=["later", "from the beginning"])
def test_a_sender_that_is_lost_fails_it(linked: bool, world: World) -> None:
    snapshot = world.collect(1, linked=linked)
    if linked:
        world.receiver.lost(1)
    with pytest.raises(StorageError, match="chunks is missing: node 1 was lost"):
        snapshot.wait_until_whole(30.0)
    (block,) = first_block(world, 1)
    assert world.receiver.place(1, block) is None


def test_one_that_has_sent_everything_may_be_lost(world: World) -> None:
    snapshot = world.collect(1)
    world.sender.begin(1, world.copy(1), world.to_0)
    world.run(lambda: not snapshot.missing)
    world.receiver.lost(1)
    world.receiver.lost(2)
    world.expect(snapshot)


def test_a_second_copy_ends_the_first(world: World) -> None:
    first = world.collect(1)
    world.sender.begin(1, world.copy(1), world.to_0)
    second = world.collect(2)
    with pytest.raises(StorageError, match="another checkpoint was begun"):
        first.wait_until_whole(30.0)
    world.sender.begin(2, world.copy(2), world.to_0)
    world.run(lambda: not second.missing)
    world.expect(second)
    assert first.missing


def first_block(world: World, number: int) -> list[Block]:
    chunk = world.chunks[1]
    return [Block(number, Stage.STATE, 1, chunk.index, 0, 4 * chunk.size)]


def test_a_block_has_a_place_only_in_its_copy(world: World) -> None:
    (block,) = first_block(world, 1)
    assert world.receiver.place(1, block) is WAIT, "the lead may still tell of it"
    world.collect(1)
    memory = world.receiver.place(1, block)
    assert isinstance(memory, memoryview)
    assert memory.nbytes == block.length
    assert world.receiver.place(1, block._replace(round=0)) is None
    assert world.receiver.place(1, block._replace(round=2)) is WAIT


@pytest.mark.parametrize(
    "wrong", [{"tensor": 0}, {"tensor": 9}, {"chunk": 0}, {"offset": 4}, {"length": 4}], ids=str
)
def test_what_is_not_a_nodes_to_send_is_refused(wrong: dict[str, int], world: World) -> None:
    world.collect(1)
    (block,) = first_block(world, 1)
    with pytest.raises(ProtocolError, match=r"node 1 sends .* not its to send"):
        world.receiver.place(1, block._replace(**wrong))
    with pytest.raises(ProtocolError, match=r"node 2 sends .* not its to send"):
        world.receiver.place(2, block)


def test_a_block_that_comes_twice_is_refused(world: World) -> None:
    world.collect(1)
    (block,) = first_block(world, 1)
    assert tensors_of(world.ours)[1].nbytes > block.length
    world.receiver.place(1, block)
    world.receiver.arrived(1, block)
    with pytest.raises(ProtocolError, match="not its to send"):
        world.receiver.place(1, block)
