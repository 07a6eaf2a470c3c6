"""However blocks are delivered, every node ends with the same totals, each sum counted once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.errors import ProtocolError
from elastic.core.layout import Chunk
from elastic.core.protocol.exchange import (
    Add,
    Arrived,
    ChunkComplete,
    Event,
    Exchange,
    RoundComplete,
    SendBlock,
    SumReady,
    TotalComplete,
    Updated,
)
from elastic.core.protocol.frames import Block, Stage

NUMBER = 5
BLOCK_BYTES = 16


def make_chunks(sizes: Sequence[int]) -> list[Chunk]:
    starts = np.cumsum([0, *sizes]).tolist()
    return [Chunk(index, 0, starts[index], size) for index, size in enumerate(sizes)]


def interleaved(num_chunks: int, nodes: Sequence[int], num_replicas: int) -> np.ndarray:
    """Who keeps what: owners in turn, replicas behind them."""
    return np.array(
        [
            [nodes[(chunk + replica) % len(nodes)] for replica in range(num_replicas)]
            for chunk in range(num_chunks)
        ]
    )


class Cluster:
    """Some nodes in one round; every delivery is drawn by dice."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        nodes: Sequence[int],
        nodes_CR: np.ndarray,
        seed: int,
        observers: Sequence[int] = (),
    ) -> None:
        everybody = (*nodes, *observers)
        numbers = np.random.default_rng(seed)
        size = sum(chunk.size for chunk in chunks)
        self.chunks, self.dice = chunks, random.Random(seed)
        self.exchanges = {
            me: Exchange(
                NUMBER,
                me=me,
                nodes=nodes,
                nodes_CR=nodes_CR,
                chunks=chunks,
                observers=observers,
                block_bytes=BLOCK_BYTES,
            )
            for me in everybody
        }
        self.sums = {me: numbers.integers(-1000, 1000, size, np.int32) for me in nodes}
        self.totals = {me: np.full(size, 77, np.int32) for me in everybody}
        self.values = {me: np.full(size, 77, np.int32) for me in everybody}
        self.sent_bytes = dict.fromkeys(everybody, 0)
        self.completed: dict[int, list[int]] = {me: [] for me in everybody}
        self.finished: list[int] = []
        self.pending: list[tuple[int, Event, np.ndarray | None]] = [
            (me, SumReady(chunk), None) for me in nodes for chunk in self.exchanges[me].order()
        ]

    def part(self, array: np.ndarray, block: Block) -> np.ndarray:
        start = self.chunks[block.chunk].start + block.offset // 4
        return array[start : start + block.length // 4]

    def run(self) -> None:
        while self.pending:
            self.deliver(*self.pending.pop(self.dice.randrange(len(self.pending))))

    def deliver(self, me: int, event: Event, payload: np.ndarray | None) -> None:
        if isinstance(event, Arrived):
            self.exchanges[me].check(event.node, event.block)
            if event.block.stage is not Stage.NODE_SUM:
                kinds = {Stage.TOTAL: self.totals, Stage.PARAMETERS: self.values}
                self.part(kinds[event.block.stage][me], event.block)[:] = payload
        for action in self.exchanges[me].handle(event):
            match action:
                case SendBlock(node, block):
                    kinds = {
                        Stage.NODE_SUM: self.sums,
                        Stage.TOTAL: self.totals,
                        Stage.PARAMETERS: self.values,
                    }
                    assert node != me
                    data = self.part(kinds[block.stage][me], block).copy()
                    self.sent_bytes[me] += block.length
                    self.pending.append((node, Arrived(me, block), data))
                case Add(block, fresh, own, arrived):
                    total = self.part(self.totals[me], block)
                    if fresh:
                        total[:] = 0
                    if own:
                        total += self.part(self.sums[me], block)
                    if arrived:
                        total += payload
                case TotalComplete(index):
                    chunk = self.chunks[index]
                    part = slice(chunk.start, chunk.stop)
                    self.values[me][part] = 3 * self.totals[me][part] + index
                    self.pending.append((me, Updated(index), None))
                case ChunkComplete(index):
                    self.completed[me].append(index)
                case RoundComplete():
                    self.finished.append(me)


clusters = st.integers(1, 5).flatmap(
    lambda num_nodes: st.tuples(
        st.permutations(range(10, 10 + num_nodes)),
        st.integers(1, num_nodes),
        st.lists(st.integers(1, 14), min_size=1, max_size=12),
        st.integers(0, 2),
    )
)


@settings(max_examples=300, deadline=None)
@given(clusters, st.integers(0, 2**32 - 1))
def test_any_order_of_deliveries_ends_with_the_same_numbers(
    drawn: tuple[list[int], int, list[int], int], seed: int
) -> None:
    nodes, num_replicas, sizes, num_observers = drawn
    chunks, observers = make_chunks(sizes), range(num_observers)
    nodes_CR = interleaved(len(chunks), nodes, num_replicas)
    cluster = Cluster(chunks, nodes, nodes_CR, seed, observers)
    cluster.run()
    total = sum(cluster.sums.values())
    values = np.concatenate([3 * total[c.start : c.stop] + c.index for c in chunks])
    for me in (*nodes, *observers):
        assert (cluster.values[me] == values).all()
        for chunk in chunks:
            if me in nodes_CR[chunk.index] or me in observers:
                part = slice(chunk.start, chunk.stop)
                assert (cluster.totals[me][part] == total[part]).all()
        assert cluster.exchanges[me].has_totals
        assert sorted(cluster.completed[me]) == list(range(len(chunks)))
    assert sorted(cluster.finished) == sorted((*observers, *nodes))
    copies = 2 * (len(nodes) - 1) + num_observers
    assert sum(cluster.sent_bytes.values()) == copies * 4 * len(total)
    assert not any(cluster.sent_bytes[me] for me in observers)


@pytest.mark.parametrize("num_nodes", [2, 3, 5])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_each_node_sends_no_more_than_it_must(num_nodes: int, num_replicas: int) -> None:
    """2(N-1)/N of the flat space, where chunks are shared out evenly."""
    chunks, nodes = make_chunks([8] * 30), list(range(num_nodes))
    cluster = Cluster(chunks, nodes, interleaved(30, nodes, num_replicas), 0)
    cluster.run()
    bound = 2 * (num_nodes - 1) * 4 * 240 // num_nodes
    assert list(cluster.sent_bytes.values()) == [bound] * num_nodes


# --- pipelining ------------------------------------------------------------------------------


def two_nodes(sizes: Sequence[int] = (10, 10)) -> Exchange:
    """Node 1 of nodes 1 and 2; it owns chunk 0."""
    return Exchange(
        NUMBER,
        me=1,
        nodes=[1, 2],
        nodes_CR=np.array([[1, 2], [2, 1]]),
        chunks=make_chunks(sizes),
        block_bytes=BLOCK_BYTES,
    )


def block(stage: Stage, chunk: int, index: int, length: int = 16) -> Block:
    return Block(NUMBER, stage, 0, chunk, 16 * index, length)


def test_the_total_of_a_block_goes_on_before_the_next_one_has_arrived() -> None:
    exchange = two_nodes()
    assert exchange.handle(SumReady(0)) == []
    first, last = block(Stage.NODE_SUM, 0, 0), block(Stage.NODE_SUM, 0, 2, 8)
    assert exchange.handle(Arrived(2, first)) == [
        Add(first, fresh=True, own=True, arrived=True),
        SendBlock(2, block(Stage.TOTAL, 0, 0)),
    ]
    exchange.handle(Arrived(2, block(Stage.NODE_SUM, 0, 1)))
    assert exchange.handle(Arrived(2, last)) == [
        Add(last, fresh=True, own=True, arrived=True),
        SendBlock(2, block(Stage.TOTAL, 0, 2, 8)),
        TotalComplete(0),
    ]


def test_what_arrives_before_this_node_is_ready_is_not_lost() -> None:
    exchange = two_nodes()
    first = block(Stage.NODE_SUM, 0, 0)
    assert exchange.handle(Arrived(2, first)) == [
        Add(first, fresh=True, own=False, arrived=True),
    ]
    assert exchange.handle(SumReady(0)) == [
        Add(first, fresh=False, own=True, arrived=False),
        SendBlock(2, block(Stage.TOTAL, 0, 0)),
    ]


def test_sums_are_sent_as_they_become_ready() -> None:
    sent = two_nodes().handle(SumReady(1))
    assert sent == [
        SendBlock(2, block(Stage.NODE_SUM, 1, 0)),
        SendBlock(2, block(Stage.NODE_SUM, 1, 1)),
        SendBlock(2, block(Stage.NODE_SUM, 1, 2, 8)),
    ]


def test_a_node_alone_sends_nothing() -> None:
    exchange = Exchange(
        1, me=4, nodes=[4], nodes_CR=np.array([[4]]), chunks=make_chunks([3]), block_bytes=16
    )
    only = Block(1, Stage.NODE_SUM, 0, 0, 0, 12)
    assert exchange.handle(SumReady(0)) == [
        Add(only, fresh=True, own=True, arrived=False),
        TotalComplete(0),
    ]
    assert exchange.handle(Updated(0)) == [ChunkComplete(0), RoundComplete()]


def test_not_all_nodes_begin_with_the_same_owner() -> None:
    nodes, chunks = [3, 1, 2], make_chunks([1] * 7)
    nodes_CR = interleaved(7, nodes, 1)
    orders = {}
    for me in nodes:
        one = Exchange(0, me=me, nodes=nodes, nodes_CR=nodes_CR, chunks=chunks)
        orders[me] = one.order()
        assert sorted(orders[me]) == list(range(7))
    for at in range(6):
        assert len({nodes_CR[order[at], 0] for order in orders.values()}) == 3, at
    assert [nodes_CR[chunk, 0] for chunk in orders[3]] == [1, 2, 3, 1, 2, 3, 3]


def test_totals_leave_in_turn_too() -> None:
    nodes = [0, 1, 2, 3]
    exchange = Exchange(
        0,
        me=2,
        nodes=nodes,
        nodes_CR=np.array([[2, 0, 1, 3]]),
        chunks=make_chunks([1]),
    )
    exchange.handle(SumReady(0))
    sum_of = Block(0, Stage.NODE_SUM, 0, 0, 0, 4)
    actions = [action for node in (0, 3, 1) for action in exchange.handle(Arrived(node, sum_of))]
    assert [one.node for one in actions if isinstance(one, SendBlock)] == [3, 0, 1]


def test_an_observer_gets_all_totals_and_nobody_waits_for_it() -> None:
    nodes_CR = np.array([[1], [2]])
    rounds = {
        me: Exchange(
            NUMBER,
            me=me,
            nodes=[1, 2],
            nodes_CR=nodes_CR,
            chunks=make_chunks([4, 4]),
            observers=[7],
            block_bytes=BLOCK_BYTES,
        )
        for me in (1, 7)
    }
    rounds[1].handle(SumReady(0))
    own = rounds[1].handle(Arrived(2, block(Stage.NODE_SUM, 0, 0)))
    total = block(Stage.TOTAL, 0, 0)
    assert own[1:] == [SendBlock(7, total), TotalComplete(0)]
    assert rounds[1].handle(Updated(0)) == [
        SendBlock(2, block(Stage.PARAMETERS, 0, 0)),
        ChunkComplete(0),
    ]
    assert rounds[1].handle(Arrived(2, block(Stage.PARAMETERS, 1, 0)))[-1] == RoundComplete()
    assert rounds[7].handle(Arrived(1, total)) == [TotalComplete(0)]
    assert rounds[7].handle(Updated(0)) == [ChunkComplete(0)], "its parameters go nowhere"
    with pytest.raises(ProtocolError, match="not its to send"):
        rounds[7].check(2, block(Stage.PARAMETERS, 1, 0))
    with pytest.raises(ProtocolError, match="not its to send"):
        rounds[1].check(7, block(Stage.NODE_SUM, 0, 0))
    with pytest.raises(AssertionError, match="no sum"):
        rounds[7].handle(SumReady(1))


# --- what is refused -------------------------------------------------------------------------


def three_nodes() -> Exchange:
    """Node 1 of 1, 2 and 3. It owns chunk 0, keeps chunk 1, and only receives chunk 2."""
    return Exchange(
        NUMBER,
        me=1,
        nodes=[1, 2, 3],
        nodes_CR=np.array([[1, 2], [2, 1], [3, 2]]),
        chunks=make_chunks([10, 10, 10]),
        block_bytes=BLOCK_BYTES,
    )


GOOD = [
    (2, block(Stage.NODE_SUM, 0, 0)),
    (3, block(Stage.NODE_SUM, 0, 2, 8)),
    (2, block(Stage.TOTAL, 1, 1)),
    (3, block(Stage.PARAMETERS, 2, 0)),
]
BAD = {
    "a stranger": (4, block(Stage.NODE_SUM, 0, 0)),
    "oneself": (1, block(Stage.NODE_SUM, 0, 0)),
    "a sum for another owner": (3, block(Stage.NODE_SUM, 1, 0)),
    "a total by a replica": (3, block(Stage.TOTAL, 1, 0)),
    "a total of a chunk not kept": (3, block(Stage.TOTAL, 2, 0)),
    "parameters of a chunk kept": (2, block(Stage.PARAMETERS, 1, 0)),
    "parameters by a replica": (2, block(Stage.PARAMETERS, 2, 0)),
    "state": (2, block(Stage.STATE, 1, 0)),
    "another tensor": (2, block(Stage.TOTAL, 1, 0)._replace(tensor=1)),
    "no chunk": (2, block(Stage.TOTAL, 3, 0)),
    "between blocks": (2, block(Stage.TOTAL, 1, 0)._replace(offset=4)),
    "too short": (2, block(Stage.TOTAL, 1, 0, 12)),
    "too long": (2, block(Stage.TOTAL, 1, 2, 16)),
    "behind the end": (2, block(Stage.TOTAL, 1, 3, 8)),
}


@pytest.mark.parametrize(("node", "good"), GOOD)
def test_each_block_is_let_in_once(node: int, good: Block) -> None:
    exchange = three_nodes()
    exchange.check(node, good)
    exchange.handle(Arrived(node, good))
    with pytest.raises(ProtocolError, match=f"node {node} sends Block.* twice"):
        exchange.check(node, good)
    with pytest.raises(ProtocolError, match="twice"):
        exchange.handle(Arrived(node, good))


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_nodes_to_send_is_refused(name: str) -> None:
    node, bad = BAD[name]
    with pytest.raises(ProtocolError, match=f"node {node} sends .* not its to send"):
        three_nodes().check(node, bad)


def test_the_order_of_a_round_is_ours_to_keep() -> None:
    exchange = three_nodes()
    exchange.handle(SumReady(0))
    for early in (SumReady(0), Updated(0), Updated(2)):
        with pytest.raises(AssertionError, match="chunk"):
            exchange.handle(early)
