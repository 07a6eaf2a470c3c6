"""Raises a worker's word while it computes, by how much of the micro-batch is done.

Layers take unequally long, and a backward pass longer than a forward one. So a place that is passed
counts as much as it did in the micro-batch of its kind that took least: the one that nobody
disturbed. Never decides anything: `elastic.core.protocol.advance` says how the word is read.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise

from elastic.core.protocol.advance import WHOLE, rounded_up


class Meter:
    """Moves `word` on, at every place that a computation passes, and by what it is worth.

    The word only grows, and its lower half is 0 between two micro-batches: words of several models
    may be added.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.word = memoryview(bytearray(8)).cast("Q")
        self._clock = clock
        self._known: dict[Hashable, tuple[float, list[int]]] = {}
        self._worth: list[int] = []
        self._passed_s = [0.0]

    @contextlib.contextmanager
    def micro_batch(self, kind: Hashable) -> Iterator[None]:
        """Around one computation; those of one kind pass the same places."""
        least_s, self._worth = self._known.get(kind, (math.inf, []))
        self._passed_s = [self._clock()]
        try:
            yield
            self.move()  # what is awaited last, on a GPU nearly all of the time
            took_s = self._passed_s[-1] - self._passed_s[0]
            if took_s < least_s or len(self._passed_s) != len(self._worth) + 1:
                self._known[kind] = took_s, self._worth_of(took_s)
        finally:
            self.word[0] = rounded_up(self.word[0])

    def _worth_of(self, took_s: float) -> list[int]:
        scale = WHOLE / took_s if took_s else 0.0
        return [int(scale * (after - before)) for before, after in pairwise(self._passed_s)]

    def move(self) -> None:
        """A place is passed."""
        place = len(self._passed_s) - 1
        self.word[0] += max(1, self._worth[place] if place < len(self._worth) else 0)
        self._passed_s.append(self._clock())
