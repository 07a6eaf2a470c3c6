"""Which nodes keep the state of which chunk, as the lead knows it, and what moves between them.

State is what the optimizer remembers of a chunk; parameters are on every node. Copies move inside
rounds: a node that keeps a chunk sends what it has just computed to the one that is to keep it,
too, a few chunks in each step. So nothing is caught up with, and a round that is given up has
moved nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from policies.owning import SlowLink, carried, decide
from policies.resharding import NOBODY, Interleaved, Lost, MembersView, Move, Placement

SHARE = 4
"""In one step a node sends, and receives, the state of at most one in so many of the chunks that
it owns, but of one at least."""

_MAX_TOLD = 3


class Keeping:
    """The copies that exist in the committed version, and those that are to be in the next one.

    A copy that is not wanted any more exists until a round is committed without it.

    Args:
        replicas: wanted copies of each chunk, the owner's included.
    """

    def __init__(self, replicas: int, num_chunks: int) -> None:
        self._policy = Interleaved(replicas=replicas)
        self._num_chunks = num_chunks
        self._rows: list[tuple[int, ...]] = [()] * num_chunks
        self._next: list[tuple[int, ...]] = []
        self._wanted: list[tuple[int, ...]] = []
        self._slow: tuple[SlowLink, ...] = ()
        self._routed: tuple[tuple[int, ...], ...] | None = None
        self._rounds: deque[tuple[Move, ...]] = deque()
        self._num_moved = self._num_steps = 0
        self._nodes: tuple[int, ...] = ()
        self._departing: tuple[int, ...] = ()

    @property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """Of each chunk: who has its state in the committed version, its owner first."""
        return tuple(self._rows)

    @property
    def keepers(self) -> tuple[tuple[int, ...], ...]:
        """Of each chunk: who is to compute its state in the next round, its owner first."""
        if self._routed is None:
            self._routed = tuple(decide(self._next, self._slow))
        return self._routed

    def route(self, slow: Sequence[SlowLink]) -> str:
        """Less is to go over these links from the next round on: owners change, not who keeps what.

        To be said as long as it holds. Returns what that brings, if it is new.
        """
        if self._slow == (*slow,):
            return ""
        before, self._slow, self._routed = self.keepers, (*slow,), None
        if not slow:
            return "no link is slow any more: all nodes own as many chunks again"
        num = len(self._next)
        told = [
            f"{carried(self.keepers, one, other)} of {num} chunks"
            f" {f'are owned by node {one}' if other is None else f'go over link {one} - {other}'},"
            f" {carried(before, one, other)} before"
            for one, other, _ in self._slow[:_MAX_TOLD]
        ]
        more = ["..."] * (len(slow) > _MAX_TOLD)
        return "; ".join([*told, *more])

    @property
    def is_moving(self) -> bool:
        """Whether copies are still to be sent."""
        return bool(self._rounds)

    def begin(
        self, kept: Mapping[int, Iterable[int]], nodes: Sequence[int], departing: Sequence[int]
    ) -> str:
        """Take up what each node says that it keeps. Returns why nobody could go on, or nothing."""
        holders: list[list[int]] = [[] for _ in range(self._num_chunks)]
        for node in sorted(kept):
            for chunk in kept[node]:
                holders[chunk].append(node)
        self._rows = [tuple(row) for row in holders]
        return self.admit(nodes, departing)

    def there(self, node: int, kept: Iterable[int]) -> str:
        """A member says anew what it keeps. Returns as `begin`."""
        mine = set(kept)
        if mine == {chunk for chunk, row in enumerate(self._rows) if node in row}:
            return ""
        for chunk, row in enumerate(self._rows):
            others = tuple(one for one in row if one != node)
            self._rows[chunk] = (*others, node) if chunk in mine else others
        return self.admit(self._nodes, self._departing)

    def admit(self, nodes: Sequence[int], departing: Sequence[int]) -> str:
        """These are the members from now on. Returns as `begin`."""
        self._nodes, self._departing = tuple(nodes), tuple(departing)
        if all(len(row) == len(nodes) and {*row} == {*nodes} for row in self._rows):
            stay = [node for node in nodes if node not in departing]  # as a job begins
            self._wanted = _rows(self._policy.place([1] * self._num_chunks, stay))
            self._rounds.clear()
        else:
            view = MembersView(_placement(self._rows), nodes, departing)
            decision = self._policy.decide(view)
            if isinstance(decision, Lost):
                self._rounds.clear()
                self._wanted = []
                return decision.reason
            self._rows = _rows(decision.recovered)
            self._wanted = _rows(decision.placement)
            self._rounds = deque(decision.rounds)
        self._next = [self._settled(chunk) for chunk in range(self._num_chunks)]
        self._routed = None
        return ""

    def moves(self) -> tuple[Move, ...]:
        """What is to move in the next round."""
        num = max(1, self._num_chunks // (SHARE * max(1, len(self._nodes))))
        return tuple(move for pairs in list(self._rounds)[:num] for move in pairs)

    def moved(self, moves: Sequence[Move]) -> str:
        """A round with these was committed. Returns what was done, once all is where it belongs."""
        self._rows = self._next.copy()
        for move in moves:
            self._rows[move.chunk] += (move.receiver,)
            self._next[move.chunk] = self._settled(move.chunk)
        if moves:
            self._routed = None
            sent = set(moves)
            rounds = (tuple(one for one in pairs if one not in sent) for pairs in self._rounds)
            self._rounds = deque(pairs for pairs in rounds if pairs)
        self._num_moved += len(moves)
        self._num_steps += bool(moves)
        if self._rounds or not self._num_moved:
            return ""
        done = f"{self._num_moved} copies of chunks' state were sent in {self._num_steps} steps"
        self._num_moved = self._num_steps = 0
        return done

    def _settled(self, chunk: int) -> tuple[int, ...]:
        """The copies of a chunk without those that are not wanted, once all that are wanted exist.

        Those on departing nodes stay for as long as these do: another node may be lost meanwhile.
        """
        wanted, row = self._wanted[chunk], self._rows[chunk]
        if not set(wanted) <= set(row):
            return row
        return (*wanted, *(one for one in row if one in self._departing and one not in wanted))


def _placement(rows: Sequence[Sequence[int]]) -> Placement:
    width = max(map(len, rows), default=0)
    padded = [[*row, *[NOBODY] * (width - len(row))] for row in rows]
    return Placement(np.array(padded, np.int32).reshape(len(rows), width))


def _rows(placement: Placement) -> list[tuple[int, ...]]:
    return [tuple(node for node in row if node != NOBODY) for row in placement.nodes_CR.tolist()]
