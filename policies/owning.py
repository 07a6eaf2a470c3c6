"""Who of those that keep a chunk owns it where links are slow, so that less goes over these.

Pure, and free: all keepers of a chunk compute the same from its total, so no state moves, and no
bit changes. In a round every node sends its sum of a chunk to the owner and gets one result of it
from there. So between nodes a and b go, in each direction, as many chunks as both own together.

With o chunks owned by each node and f times the usual time for a byte, the least is sought of

    sum over pairs a, b of (f_ab (o_a + o_b))^2

chunk by chunk. That is near the smallest time of the slowest link, never overloads what is healthy
for little. Factors count in whole numbers, so that the sum does: it gets smaller by one at least
with every change, and the search ends. (With fractions two owners of a chunk may each seem better
than the other, by what rounding leaves.) One chunk at least stays on every link, or nobody would
see that it is well again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_UNIT = 64
"""What a byte over a healthy link counts; over a slow one a whole number, too."""

_MAX_PASSES = 50
"""Over all chunks; then it is good enough. A few are usual."""

Rows = Sequence[tuple[int, ...]]
"""Of each chunk: the nodes that keep it, its owner first."""


class SlowLink(NamedTuple):
    """Between two nodes, in either direction, a byte takes `factor` times as long as is usual.

    `other`, None: any; all links of the node are slow.
    """

    one: int
    other: int | None
    factor: float


def decide(keepers: Rows, slow: Sequence[SlowLink]) -> list[tuple[int, ...]]:
    """The same keepers, the owner first that it is best to have. As they are if no link is slow."""
    rows, search = list(keepers), _Search(keepers, slow)
    for _ in range(_MAX_PASSES if search.slow else 0):
        is_new = False
        for chunk, row in enumerate(rows):
            best = min(row, key=lambda one: search.change(row[0], one), default=None)
            if best is not None and search.change(row[0], best) < 0:
                search.move(row[0], best)
                rows[chunk] = (best, *(one for one in row if one != best))
                is_new = True
        if not is_new:
            break
    return rows


def carried(keepers: Rows, one: int, other: int | None) -> int:
    """How many chunks go between two nodes, in each direction. None: how many the one owns."""
    return sum(row[0] in (one, other) for row in keepers if row)


class _Search:
    """What each node owns so far, and what a change of that costs."""

    def __init__(self, keepers: Rows, slow: Sequence[SlowLink]) -> None:
        self._nodes = {node for row in keepers for node in row}
        self._owned = Counter(row[0] for row in keepers if row)
        self.slow: dict[int, dict[int, int]] = {}
        """Of each node: by how much more than usual what goes to others counts."""
        for one, other, factor in slow:
            for end in self._nodes if other is None else {other}:
                weight = round(_UNIT * (factor**2 - 1))
                if weight > 0 and one != end and {one, end} <= self._nodes:
                    self.slow.setdefault(one, {})[end] = weight
                    self.slow.setdefault(end, {})[one] = weight

    def change(self, before: int, after: int) -> float:
        """What the sum grows by if one chunk gets another owner."""
        if before == after:
            return 0
        own, theirs = self._owned[before], self._owned[after]
        grown: float = 2 * _UNIT * (len(self._nodes) - 2) * (1 - own + theirs)
        for node, weight in self.slow.get(before, {}).items():
            if node != after:
                if own + self._owned[node] == 1:
                    return math.inf
                grown += weight * (1 - 2 * (own + self._owned[node]))
        for node, weight in self.slow.get(after, {}).items():
            if node != before:
                grown += weight * (1 + 2 * (theirs + self._owned[node]))
        return grown

    def move(self, before: int, after: int) -> None:
        self._owned[before] -= 1
        self._owned[after] += 1
