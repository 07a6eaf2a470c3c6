"""When a step under an inexact policy ends without all of its micro-batches.

Part of the aggregator's protocol, which asks `may_end` after each event, and counts what was
granted by then. Beside it, without I/O: a successor that has forgotten everything measures anew.
Never ends a pass that only takes maxima, nor an evaluation: those are not begun here.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Set

from policies.dropping import MEMORY, Deadline, DropCompute, Dropped

NEWS = 1.25
"""A deadline is told again once it is so many times longer or shorter."""


class Dropping:
    """Watches the steps of one policy. Without one no step ever ends early."""

    def __init__(self, policy: Dropped | None) -> None:
        self.policy = policy
        self.due_s = math.inf
        """When the step that runs may end, if it has a deadline."""
        self._is_on = False
        self._shares: dict[int, frozenset[int]] = {}
        self._begin_s = 0.0
        self._grants_s: list[float] = []
        self._measures = False
        self._num_workers = 0
        self._num_since = 0
        self._steps: deque[tuple[float, ...]] = deque(maxlen=MEMORY)
        self._rests_s: deque[float] = deque(maxlen=MEMORY)
        self._end_s: float | None = None
        self._deadline: Deadline | None = None
        self._told_s = 0.0

    def forget(self) -> None:
        """Another pass."""
        self._is_on, self.due_s = False, math.inf

    def begin(self, now_s: float, shares: Mapping[int, Collection[int]], num_workers: int) -> str:
        """A pass is shared out of which some may be dropped; what to tell, if anything.

        Args:
            shares: the micro-batches of each worker.
            num_workers: members; with another number of them nothing that was seen counts.
        """
        if self.policy is None:
            return ""
        self._is_on, self._begin_s = True, now_s
        self._shares = {worker: frozenset(share) for worker, share in shares.items() if share}
        if not isinstance(self.policy, DropCompute):
            return ""
        if self._end_s is not None:
            self._rests_s.append(now_s - self._end_s)
        if num_workers != self._num_workers:
            self._num_workers, self._deadline = num_workers, None
            self._steps.clear()
            self._rests_s.clear()
        self._grants_s.clear()
        self._measures = self.policy.measures(len(self._steps), self._num_since)
        if self._measures:
            return ""
        if self._deadline is None:
            rest_s = statistics.median(self._rests_s) if self._rests_s else 0.0
            self._deadline = self.policy.decide(self._steps, rest_s)
        self.due_s = now_s + self._deadline.seconds
        return self._news(self._deadline)

    def _news(self, deadline: Deadline) -> str:
        before_s, seconds = self._told_s, deadline.seconds
        if seconds == before_s or before_s / NEWS < seconds < before_s * NEWS:
            return ""
        self._told_s = seconds
        return f"drop_compute with a deadline of {deadline.reason}"

    def granted(self, now_s: float) -> None:
        """One more counts."""
        self._grants_s.append(now_s - self._begin_s)

    def may_end(self, now_s: float, granted: Set[int], held: Mapping[int, Collection[int]]) -> bool:
        """Whether the step may end with what was granted.

        Args:
            held: the micro-batches that each worker is still to answer, granted to others or not.
        """
        if not self._is_on or not granted:
            return False
        if self.policy is None or isinstance(self.policy, DropCompute):
            return now_s >= self.due_s
        answered = sum(
            share <= granted and share.isdisjoint(held.get(worker, ()))
            for worker, share in self._shares.items()
        )
        return answered >= self.policy.wait_for

    def end(self, now_s: float) -> None:
        """The step is complete, or ends without the rest."""
        if not self._is_on:
            return
        self._end_s = now_s
        self._num_since += 1
        if self._measures and self._grants_s:
            self._steps.append(tuple(self._grants_s))
            self._num_since, self._deadline = 0, None
        self.forget()
