"""Rounds over real links: the numbers are right, and those of another round change nothing."""

from __future__ import annotations

import functools
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from actors.exchanging import Arrays, Round
from actors.links import WAIT, Link
from elastic.core.errors import ProtocolError
from elastic.core.layout import Chunk, Layout
from elastic.core.mapped import Sizes
from elastic.core.protocol.exchange import (
    Arrived,
    Exchange,
    RoundComplete,
    SumReady,
    TotalComplete,
    Updated,
)
from elastic.core.protocol.frames import Block, Stage, block_header
from elastic.core.protocol.messages import Stop
from policies.resharding import Move

SIZES = (3000, 20, 5000, 1, 700)
SIZE = sum(SIZES)
CHUNKS = [Chunk(i, 0, sum(SIZES[:i]), size) for i, size in enumerate(SIZES)]
LAYOUT = Layout((), (), (), tuple(CHUNKS))
STORE = Sizes(LAYOUT, 1, optimizer_keys=("momentum",), scalar_keys=("step",))
BLOCK_BYTES = 4096

Keepers = list[list[int]]


class Node:
    """One node: its arrays, its links, and the round that it is in."""

    def __init__(self, me: int) -> None:
        dice = np.random.default_rng(me)
        sums_N = dice.integers(-(2**28), 2**28, SIZE, np.int32)
        self.values_N = np.zeros(SIZE, np.float32)
        self.momenta_N = np.zeros(SIZE, np.float32)
        self.steps_C = np.zeros(len(CHUNKS), np.float64)
        tensors = [one.data.cast("B") for one in (self.values_N, self.momenta_N, self.steps_C)]
        self.arrays = Arrays(sums_N, np.full(SIZE, 7, np.int32), tensors)
        self.me, self.links = me, dict[int, Link]()
        self.is_complete = False

    def begin(
        self,
        number: int,
        keepers: Keepers,
        nodes: Sequence[int],
        *,
        moves: Sequence[Move] = (),
        observers: Sequence[int] = (),
    ) -> None:
        exchange = Exchange(
            number,
            me=self.me,
            nodes=nodes,
            keepers=keepers,
            lengths=[STORE.lengths(chunk) for chunk in CHUNKS],
            moves=moves,
            observers=observers,
            block_bytes=BLOCK_BYTES,
        )
        self.round = Round(
            exchange, sizes=STORE, links={**self.links}, arrays=self.arrays, observers=observers
        )
        self.is_complete = False

    def contribute(self) -> None:
        for chunk in self.round.exchange.order():
            self.handle(SumReady(chunk))

    def handle(self, event: SumReady | Arrived | Updated) -> None:
        for left in self.round.handle(event):
            match left:
                case TotalComplete(index):
                    chunk = CHUNKS[index]
                    part = slice(chunk.start, chunk.stop)
                    self.values_N[part] = self.arrays.totals_N[part] / 8
                    self.momenta_N[part] = self.arrays.totals_N[part] / 4
                    self.steps_C[index] = 1 + index
                    self.handle(Updated(index))
                case RoundComplete():
                    self.is_complete = True

    def read(self, node: int) -> None:
        place = functools.partial(self.round.place, node)
        while (frame := self.links[node].receive(place)) is not None:
            assert isinstance(frame, Block), frame
            self.handle(Arrived(node, frame))


Connect = Callable[[int], list[Node]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Nodes with a link between each two."""
    made: list[Link] = []

    def connect(num_nodes: int) -> list[Node]:
        nodes = [Node(me) for me in range(num_nodes)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            for one in nodes:
                for other in nodes[: one.me]:
                    one.links[other.me] = Link(
                        socket.create_connection(server.getsockname()), other.me
                    )
                    other.links[one.me] = Link(server.accept()[0], one.me)
        made.extend(link for node in nodes for link in node.links.values())
        return nodes

    yield connect
    for link in made:
        link.close()


def run(nodes: Sequence[Node], until: Callable[[], bool]) -> None:
    """Let the links of these nodes carry what they can until it is so."""
    deadline_s = time.monotonic() + 10
    links = [(link, node) for node in nodes for link in node.links.values()]
    with selectors.DefaultSelector() as selector:
        try:
            for link, node in links:
                link.attach(selector, node)
            while not until():
                assert time.monotonic() < deadline_s, "the round does not complete"
                for key, events in selector.select(0.1):
                    assert isinstance(key.fileobj, Link)
                    if events & selectors.EVENT_WRITE:
                        key.fileobj.flush()
                    if events & selectors.EVENT_READ:
                        key.data.read(key.fileobj.node)
        finally:
            for link, _ in links:
                link.detach()


def keepers(num_nodes: int, num_replicas: int) -> Keepers:
    return [
        [(chunk + replica) % num_nodes for replica in range(num_replicas)]
        for chunk in range(len(CHUNKS))
    ]


@pytest.mark.parametrize(("num_nodes", "num_replicas"), [(2, 2), (2, 1), (3, 3), (3, 2), (4, 1)])
def test_all_nodes_end_with_the_same_numbers(
    connect: Connect, num_nodes: int, num_replicas: int
) -> None:
    nodes = connect(num_nodes)
    before = [node.arrays.sums_N.copy() for node in nodes]
    for number in (1, 2):  # a second one finds nothing of the first in its way
        for node in nodes:
            node.begin(number, keepers(num_nodes, num_replicas), range(num_nodes))
            node.contribute()
        run(nodes, lambda: all(node.is_complete for node in nodes))
        total = np.sum(before, axis=0, dtype=np.int32)
        for node, sums in zip(nodes, before, strict=True):
            assert (node.values_N == (total / 8).astype(np.float32)).all()
            assert (node.arrays.sums_N == sums).all()
            node.values_N.fill(0)
            node.arrays.totals_N.fill(7)


def test_state_that_moves_is_that_of_its_sender(connect: Connect) -> None:
    """All tensors of it; of other chunks nothing changes."""
    nodes = connect(3)
    moves = [Move(0, 0, 2), Move(2, 2, 1), Move(4, 1, 0)]
    for node in nodes:
        node.begin(1, keepers(3, 1), range(3), moves=moves)
        node.contribute()
    run(nodes, lambda: all(node.is_complete for node in nodes))
    for chunk in CHUNKS:
        part = slice(chunk.start, chunk.stop)
        has = {chunk.index % 3, *(one.receiver for one in moves if one.chunk == chunk.index)}
        owner = nodes[chunk.index % 3]
        assert owner.momenta_N[part].any()
        for node in nodes:
            if node.me in has:
                assert (node.momenta_N[part] == owner.momenta_N[part]).all()
                assert node.steps_C[chunk.index] == 1 + chunk.index
            else:
                assert not node.momenta_N[part].any()
                assert not node.steps_C[chunk.index]


def test_what_goes_to_an_observer_is_a_copy(connect: Connect) -> None:
    """Nobody waits until it is sent: what it is sent from is overwritten meanwhile."""
    nodes = connect(3)
    members, observer = nodes[:2], nodes[2]
    for node in nodes:
        node.begin(1, keepers(2, 2), range(2), observers=[2])
    for node in members:
        node.contribute()
    unread = [node.links.pop(2) for node in members]
    run(members, lambda: all(node.is_complete for node in members))
    assert all(link.has_unsent for link in unread)
    expected = members[0].values_N.copy()
    for node in members:
        node.values_N.fill(0)
        node.links[2] = unread[node.me]
    run(nodes, lambda: observer.is_complete)
    assert (observer.values_N == expected).all()
    assert not observer.momenta_N.any()


def test_a_node_that_begins_later_finds_what_was_sent(connect: Connect) -> None:
    """The others' blocks wait in its links until it knows of the round."""
    nodes = connect(3)
    early, late = nodes[:2], nodes[2]
    late.begin(0, keepers(3, 2), range(3))
    for node in early:
        node.begin(1, keepers(3, 2), range(3))
        node.contribute()
    run(nodes, lambda: all(link.waits for link in late.links.values()))
    late.begin(1, keepers(3, 2), range(3))
    for node in late.links:
        late.read(node)
    late.contribute()
    run(nodes, lambda: all(node.is_complete for node in nodes))


def test_a_round_given_up_leaves_nothing_behind(connect: Connect) -> None:
    """Half of a round with three nodes; then one is gone, and two begin again."""
    nodes = connect(3)
    for node in nodes[:2]:
        node.begin(1, keepers(3, 3), range(3))
        node.contribute()
    left = nodes[:2]
    run([nodes[0]], lambda: not nodes[0].links[1].has_unsent)
    for node in left:
        node.links.pop(2).close()
        node.round.give_up()
        node.begin(2, keepers(2, 2), range(2))
        node.contribute()
    run(left, lambda: all(node.is_complete for node in left))
    total = left[0].arrays.sums_N + left[1].arrays.sums_N
    for node in left:
        assert (node.arrays.totals_N == total).all()
        assert node.links[1 - node.me].traffic.blocks_in > 0


def test_only_blocks_of_this_round_have_a_place(connect: Connect) -> None:
    node = connect(2)[0]
    node.begin(5, keepers(2, 2), range(2))
    block = Block(5, Stage.NODE_SUM, 0, 0, 0, BLOCK_BYTES)
    memory = node.round.place(1, block)
    assert isinstance(memory, memoryview)
    assert memory.nbytes == BLOCK_BYTES
    assert node.round.place(1, block._replace(round=4)) is None
    assert node.round.place(1, block._replace(round=6)) is WAIT
    with pytest.raises(ProtocolError, match="not its to send"):
        node.round.place(1, block._replace(stage=Stage.PARAMETERS))


def test_half_a_block_of_a_round_given_up_is_written_no_further(connect: Connect) -> None:
    """What lies in its place by then belongs to the next round."""
    node, peer = connect(2)
    node.begin(1, keepers(2, 2), range(2))
    total = Block(1, Stage.TOTAL, 0, 1, 0, 4 * SIZES[1])
    peer.links[0]._socket.sendall(block_header(total) + b"\1" * 20)
    part = node.arrays.totals_N[CHUNKS[1].start : CHUNKS[1].stop]
    run([node], lambda: bool(part[4] == 0x01010101))
    node.round.give_up()
    node.begin(2, keepers(2, 2), range(2))
    peer.links[0]._socket.sendall(b"\1" * (total.length - 20))
    run([node], lambda: node.links[1].traffic.blocks_in == 1)
    assert (part[:5] == 0x01010101).all()
    assert (part[5:] == 7).all()
    peer.links[0].send(Stop("and the link goes on"))
    peer.links[0].flush()
    with pytest.raises(AssertionError, match="Stop"):
        run([node], lambda: False)
