"""Even loads: who holds, owns or sends what, so that no node has more than it must.

The part of `resharding` that searches, and pure like it: equal choices go to the lower number.
Nodes are places in the sorted membership, 0, 1, ...; what a node holds, owns or sends is its load.
"""

from __future__ import annotations

import heapq
from collections import deque
from itertools import permutations

NUM_TAKERS = 8  # nodes that are compared, to take a copy
NUM_CHUNKS = 32  # chunks that are compared, to be handed over; with 4, few replace a lost node

Nodes = list[int]


def _loads(chosen: list[Nodes], num_nodes: int) -> list[int]:
    load = [0] * num_nodes
    for nodes in chosen:
        for node in nodes:
            load[node] += 1
    return load


def even(chosen: list[Nodes], options: list[Nodes], num_nodes: int) -> None:
    """Change `chosen`, some of the `options` of each item, until loads are as even as can be.

    As long as a chain of exchanges leads from a node to one with at least two items less, it is
    carried out; when there is none the loads are optimal (Harvey, Ladner, Lovasz, Tamir 2006,
    "Semi-matchings for bipartite graphs and load balancing"). A first pass does nearly all.
    """
    load = _loads(chosen, num_nodes)
    items_of: list[list[int]] = [[] for _ in range(num_nodes)]
    for item, (nodes, allowed) in enumerate(zip(chosen, options, strict=True)):
        if len(nodes) == len(allowed):
            continue
        for node in allowed:
            items_of[node].append(item)
        low = min((node for node in allowed if node not in nodes), key=load.__getitem__)
        high = max(nodes, key=load.__getitem__)
        if load[high] >= load[low] + 2:
            nodes[nodes.index(high)] = low
            load[high] -= 1
            load[low] += 1
    is_done = [False] * num_nodes
    heap = [(held, node) for node, held in enumerate(load)]
    heapq.heapify(heap)
    while heap:
        held, node = heapq.heappop(heap)
        if held == load[node] and not is_done[node]:
            for changed in _take(node, chosen, items_of, load, is_done):
                heapq.heappush(heap, (load[changed], changed))


def _take(
    node: int,
    chosen: list[Nodes],
    items_of: list[list[int]],
    load: list[int],
    is_done: list[bool],
) -> Nodes:
    """Carry out a shortest chain that ends at the node; return the two nodes whose load changed.

    If there is none, no chain can ever pass through what was searched: it is done.
    """
    through = {node: (-1, -1)}  # a giver: the item it would give, and to whom
    queue = [node]
    for taker in queue:
        for item in items_of[taker]:
            if taker in chosen[item]:
                continue
            for giver in chosen[item]:
                if giver in through or is_done[giver]:
                    continue
                through[giver] = item, taker
                queue.append(giver)
                if load[giver] >= load[node] + 2:
                    load[giver] -= 1
                    load[node] += 1
                    at = giver
                    while at != node:
                        given, to = through[at]
                        chosen[given][chosen[given].index(at)] = to
                        at = to
                    return [giver, node]
    for seen in through:
        is_done[seen] = True
    return []


class Copies:
    """Who holds each chunk, while copies are given to nodes that have too few.

    Of nodes with room, and of chunks to hand over, the choice is the one whose other holders share
    the fewest chunks with the node: then a node that is lost later is replaced by all the others.
    """

    def __init__(self, left: list[Nodes], num_copies: int, num_nodes: int) -> None:
        self.holders = [nodes[:num_copies] for nodes in left]
        even(self.holders, left, num_nodes)  # which copies to drop, where there are too many
        self._left = left
        self._num_copies = num_copies
        self._load = _loads(self.holders, num_nodes)
        self._least, num_more = divmod(num_copies * len(left), num_nodes)
        # How many nodes may still grow from the least to one more; negative: so many must shrink.
        self._spare = num_more - sum(held > self._least for held in self._load)
        self._heap = [(held, node) for node, held in enumerate(self._load)]
        heapq.heapify(self._heap)
        self._shared: dict[tuple[int, int], int] = {}
        for nodes in self.holders:
            for pair in permutations(nodes, 2):
                self._shared[pair] = self._shared.get(pair, 0) + 1

    def complete(self) -> None:
        """Give every chunk the copies that it lacks."""
        for chunk, nodes in enumerate(self.holders):
            while len(nodes) < self._num_copies:
                takers = self._with_room(nodes, NUM_TAKERS)
                if takers:
                    shares = [(self._num_shared(node, nodes), node) for node in takers]
                    self._give(chunk, min(shares)[1])
                else:
                    self._exchange(chunk)

    def relieve(self) -> None:
        """Let nodes hand over what they hold too many of."""
        chunks_of: dict[int, deque[int]] = {
            node: deque() for node, held in enumerate(self._load) if self._must_shrink(held)
        }
        for chunk, nodes in enumerate(self.holders if chunks_of else []):
            for node in nodes:
                if node in chunks_of:
                    chunks_of[node].append(chunk)
        for giver, chunks in chunks_of.items():
            while self._must_shrink(self._load[giver]):
                (taker,) = self._with_room([], 1)
                self._give(self._choose(chunks, giver, taker), taker, giver)

    def _must_shrink(self, held: int) -> bool:
        return held > self._least + 1 or (held > self._least and self._spare < 0)

    def _has_room(self, node: int) -> bool:
        held = self._load[node]
        return held < self._least or (held == self._least and self._spare > 0)

    def _with_room(self, holders: Nodes, limit: int) -> Nodes:
        """Up to `limit` nodes that have room and are not among the holders, the emptiest first."""
        seen: list[tuple[int, int]] = []
        found: Nodes = []
        while self._heap and len(found) < limit:
            held, node = heapq.heappop(self._heap)
            if held == self._load[node] and self._has_room(node):
                seen.append((held, node))
                if node not in holders:
                    found.append(node)
        for entry in seen:
            heapq.heappush(self._heap, entry)
        return found

    def _num_shared(self, node: int, others: Nodes) -> int:
        return sum(self._shared.get((node, other), 0) for other in others)

    def _choose(self, chunks: deque[int], giver: int, taker: int) -> int:
        """One of the giver's chunks that the taker lacks; there is one, as the taker has fewer."""
        found: list[tuple[int, int]] = []
        for _ in range(len(chunks)):
            chunk = chunks.popleft()
            nodes = self.holders[chunk]
            if taker in nodes:
                chunks.append(chunk)
                continue
            others = [node for node in nodes if node != giver]
            gain = self._num_shared(giver, others) - self._num_shared(taker, others)
            found.append((-gain, chunk))
            if len(found) == NUM_CHUNKS:
                break
        best = min(found)
        chunks.extendleft(one for _, one in reversed(found) if one != best[1])
        return best[1]

    def _exchange(self, chunk: int) -> None:
        """All that have room hold the chunk: a full node takes it and hands them another one.

        Such a node has one, as it holds as many as they and lacks this. If it is to be sent that
        one anyway, nothing more is sent; else one copy is sent beyond the bound.
        """
        takers = [node for node in range(len(self._load)) if self._has_room(node)]
        best: tuple[int, int, int] | None = None
        for other, nodes in enumerate(self.holders):
            lacking = [node for node in takers if node not in nodes]
            givers = [node for node in nodes if node not in self.holders[chunk]]
            new = [node for node in givers if node not in self._left[other]]
            if lacking and givers and (new or best is None):
                best = other, lacking[0], (new or givers)[0]
                if new:
                    break
        assert best is not None
        other, taker, giver = best
        self._give(other, taker, giver)
        self._give(chunk, giver)

    def _give(self, chunk: int, taker: int, giver: int | None = None) -> None:
        """One more copy, at the taker; the giver, if there is one, no longer has its own."""
        nodes = self.holders[chunk]
        if giver is not None:
            nodes.remove(giver)
            self._count(giver, nodes, -1)
        self._count(taker, nodes, 1)
        nodes.append(taker)

    def _count(self, node: int, others: Nodes, change: int) -> None:
        """The node holds one more, or one less, together with these others."""
        before = self._load[node]
        self._load[node] += change
        self._spare += (before > self._least) - (self._load[node] > self._least)
        heapq.heappush(self._heap, (self._load[node], node))
        for other in others:
            for pair in ((node, other), (other, node)):
                self._shared[pair] = self._shared.get(pair, 0) + change
