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
from policies.resharding import Move

NUMBER = 5
BLOCK_BYTES = 16


def make_chunks(sizes: Sequence[int]) -> list[Chunk]:
    starts = np.cumsum([0, *sizes]).tolist()
    return [Chunk(index, 0, starts[index], size) for index, size in enumerate(sizes)]


def lengths(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Each chunk's state is one tensor as long as its parameters."""
    return [[4 * chunk.size, 4 * chunk.size] for chunk in chunks]


def interleaved(num_chunks: int, nodes: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Who keeps what: owners in turn, replicas behind them."""
    return [
        [nodes[(chunk + replica) % len(nodes)] for replica in range(num_replicas)]
        for chunk in range(num_chunks)
    ]


def drawn_moves(keepers: Sequence[Sequence[int]], nodes: Sequence[int], seed: int) -> list[Move]:
    """About half of the chunks get another keeper, where there is one."""
    dice = random.Random(seed)
    moves = []
    for chunk, row in enumerate(keepers):
        others = [node for node in nodes if node not in row]
        if others and dice.random() < 0.5:
            moves.append(Move(chunk, dice.choice(row), dice.choice(others)))
    return moves


class Cluster:
    """Some nodes in one round; every delivery is drawn by dice."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        nodes: Sequence[int],
        keepers: Sequence[Sequence[int]],
        seed: int,
        observers: Sequence[int] = (),
        moves: Sequence[Move] = (),
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
                keepers=keepers,
                lengths=lengths(chunks),
                moves=moves,
                observers=observers,
                block_bytes=BLOCK_BYTES,
            )
            for me in everybody
        }
        self.sums = {me: numbers.integers(-1000, 1000, size, np.int32) for me in nodes}
        self.totals = {me: np.full(size, 77, np.int32) for me in everybody}
        self.values = {me: np.full(size, 77, np.int32) for me in everybody}
        self.states = {me: np.full(size, 77, np.int32) for me in everybody}
        self.sent_bytes = dict.fromkeys(everybody, 0)
        self.completed: dict[int, list[int]] = {me: [] for me in everybody}
        self.finished: list[int] = []
        self.pending: list[tuple[int, Event, np.ndarray | None]] = [
            (me, SumReady(chunk), None) for me in nodes for chunk in self.exchanges[me].order()
        ]

    def memory(self, me: int, block: Block) -> np.ndarray:
        """Where the numbers of a block are, or belong."""
        match block.stage:
            case Stage.NODE_SUM:
                return self.part(self.sums[me], block)
            case Stage.TOTAL:
                return self.part(self.totals[me], block)
            case _:
                return self.part((self.states if block.tensor else self.values)[me], block)

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
                self.memory(me, event.block)[:] = payload
        for action in self.exchanges[me].handle(event):
            match action:
                case SendBlock(node, block):
                    assert node != me
                    data = self.memory(me, block).copy()
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
                    self.states[me][part] = 5 * self.totals[me][part] + index
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
    keepers = interleaved(len(chunks), nodes, num_replicas)
    moves = drawn_moves(keepers, nodes, seed)
    cluster = Cluster(chunks, nodes, keepers, seed, observers, moves)
    cluster.run()
    total = sum(cluster.sums.values())
    values = np.concatenate([3 * total[c.start : c.stop] + c.index for c in chunks])
    for me in (*nodes, *observers):
        assert (cluster.values[me] == values).all()
        for chunk in chunks:
            part = slice(chunk.start, chunk.stop)
            keeps = me in keepers[chunk.index]
            if keeps:
                assert (cluster.totals[me][part] == total[part]).all()
            gains = any(one.receiver == me for one in moves if one.chunk == chunk.index)
            state = 5 * total[part] + chunk.index if keeps or gains else 77
            assert (cluster.states[me][part] == state).all()
        assert cluster.exchanges[me].has_totals
        assert sorted(cluster.completed[me]) == list(range(len(chunks)))
    assert sorted(cluster.finished) == sorted((*observers, *nodes))
    copies = 2 * (len(nodes) - 1) + num_observers
    moved_bytes = sum(4 * chunks[move.chunk].size for move in moves)
    assert sum(cluster.sent_bytes.values()) == copies * 4 * len(total) + moved_bytes
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
        keepers=[[1, 2], [2, 1]],
        lengths=lengths(make_chunks(sizes)),
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
    exchange = Exchange(1, me=4, nodes=[4], keepers=[[4]], lengths=[[12]], block_bytes=16)
    only = Block(1, Stage.NODE_SUM, 0, 0, 0, 12)
    assert exchange.handle(SumReady(0)) == [
        Add(only, fresh=True, own=True, arrived=False),
        TotalComplete(0),
    ]
    assert exchange.handle(Updated(0)) == [ChunkComplete(0), RoundComplete()]


def test_not_all_nodes_begin_with_the_same_owner() -> None:
    nodes, chunks = [3, 1, 2], make_chunks([1] * 7)
    keepers = interleaved(7, nodes, 1)
    orders = {}
    for me in nodes:
        one = Exchange(0, me=me, nodes=nodes, keepers=keepers, lengths=lengths(chunks))
        orders[me] = one.order()
        assert sorted(orders[me]) == list(range(7))
    for at in range(6):
        assert len({keepers[order[at]][0] for order in orders.values()}) == 3, at
    assert [keepers[chunk][0] for chunk in orders[3]] == [1, 2, 3, 1, 2, 3, 3]


def test_a_slow_link_begins_first_and_all_end_together() -> None:
    nodes = [0, 1, 2]
    keepers = interleaved(30, nodes, 1)
    one = Exchange(0, me=0, nodes=nodes, keepers=keepers, lengths=lengths(make_chunks([1] * 30)))
    assert one.order({1: 9e6, 2: 1e7}) == one.order(), "about as fast: in turn"
    owners = [keepers[chunk][0] for chunk in one.order({1: 1e9, 2: 1e8})]
    assert sorted(one.order({1: 1e9, 2: 1e8})) == list(range(30))
    assert owners[:6] == [2] * 6
    assert owners[-9:].count(2) == 1, "the others are as far as it is"


def test_totals_leave_in_turn_too() -> None:
    nodes = [0, 1, 2, 3]
    exchange = Exchange(
        0,
        me=2,
        nodes=nodes,
        keepers=[[2, 0, 1, 3]],
        lengths=lengths(make_chunks([1])),
    )
    exchange.handle(SumReady(0))
    sum_of = Block(0, Stage.NODE_SUM, 0, 0, 0, 4)
    actions = [action for node in (0, 3, 1) for action in exchange.handle(Arrived(node, sum_of))]
    assert [one.node for one in actions if isinstance(one, SendBlock)] == [3, 0, 1]


def test_an_observer_gets_all_parameters_and_nobody_waits_for_it() -> None:
    rounds = {
        me: Exchange(
            NUMBER,
            me=me,
            nodes=[1, 2],
            keepers=[[1], [2]],
            lengths=lengths(make_chunks([4, 4])),
            observers=[7],
            block_bytes=BLOCK_BYTES,
        )
        for me in (1, 7)
    }
    rounds[1].handle(SumReady(0))
    own = rounds[1].handle(Arrived(2, block(Stage.NODE_SUM, 0, 0)))
    assert own[1:] == [TotalComplete(0)]
    mine = block(Stage.PARAMETERS, 0, 0)
    assert rounds[1].handle(Updated(0)) == [
        SendBlock(2, mine),
        SendBlock(7, mine),
        ChunkComplete(0),
    ]
    assert rounds[1].handle(Arrived(2, block(Stage.PARAMETERS, 1, 0)))[-1] == RoundComplete()
    assert rounds[7].has_totals
    assert rounds[7].handle(Arrived(1, mine)) == [ChunkComplete(0)]
    with pytest.raises(ProtocolError, match="not its to send"):
        rounds[7].check(2, block(Stage.TOTAL, 1, 0))
    with pytest.raises(ProtocolError, match="not its to send"):
        rounds[1].check(7, block(Stage.NODE_SUM, 0, 0))
    with pytest.raises(AssertionError, match="no sum"):
        rounds[7].handle(SumReady(1))


# --- what is refused -------------------------------------------------------------------------


def three_nodes() -> Exchange:
    """Node 1 of 1, 2 and 3. It owns chunk 0, keeps chunk 1, receives chunk 2, and is to keep 3."""
    return Exchange(
        NUMBER,
        me=1,
        nodes=[1, 2, 3],
        keepers=[[1, 2], [2, 1], [3, 2], [3, 2]],
        lengths=lengths(make_chunks([10, 10, 10, 10])),
        moves=[Move(3, 2, 1)],
        block_bytes=BLOCK_BYTES,
    )


GOOD = [
    (2, block(Stage.NODE_SUM, 0, 0)),
    (3, block(Stage.NODE_SUM, 0, 2, 8)),
    (2, block(Stage.TOTAL, 1, 1)),
    (3, block(Stage.PARAMETERS, 2, 0)),
    (3, block(Stage.PARAMETERS, 3, 0)),
    (2, block(Stage.PARAMETERS, 3, 0)._replace(tensor=1)),
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
    "state by one that is not to send it": (3, block(Stage.PARAMETERS, 3, 0)._replace(tensor=1)),
    "state that does not move": (3, block(Stage.PARAMETERS, 2, 0)._replace(tensor=1)),
    "no tensor": (2, block(Stage.PARAMETERS, 3, 0)._replace(tensor=2)),
    "no chunk": (2, block(Stage.TOTAL, 4, 0)),
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
