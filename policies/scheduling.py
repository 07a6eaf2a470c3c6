"""Who computes what: shares by measured speed, taking what is left, then duplicates.

Pure: the time and the measured paces arrive in the view. Never decides who is a member, and never
whether a result counts: duplicates are safe because every answer to a micro-batch is the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SILENCE = 0.5  # micro-batch times without progress, after which nothing is expected any more
SILENCE_FLOOR_S = 0.03  # a runnable process may wait that long for a core
MARGIN = 0.5  # of a micro-batch time, by which a duplicate must be expected to win
PACE_WINDOW = 9  # samples; the median of them outvotes four bad ones


@dataclass(frozen=True, slots=True)
class Queue:
    """What one worker holds: micro-batches in the order in which it computes them.

    `since_s` is when it began with the first of them, as far as is known; `silent_s` for how long
    its progress counter is known not to have moved.
    """

    worker: int
    micro_batches: tuple[int, ...]
    since_s: float
    pace_s: float
    silent_s: float = 0.0

    @property
    def is_silent(self) -> bool:
        """Stopped, asleep or stuck, for all that can be seen; a slow one still moves on."""
        return self.silent_s > max(SILENCE_FLOOR_S, SILENCE * self.pace_s)

    def expected_end_s(self, position: int, now_s: float) -> float:
        """When the micro-batch at `position` will be done.

        A worker that is late is expected to need as long again as it is late: the remaining time
        of a heavy-tailed delay grows with its age.
        """
        if self.is_silent:
            return math.inf
        first = self.since_s + self.pace_s
        if first < now_s:
            first = now_s + (now_s - first)
        return first + position * self.pace_s


@dataclass(frozen=True, slots=True)
class IdleView:
    """A worker with nothing to do. `pending` are the micro-batches that nobody holds."""

    now_s: float
    worker: int
    pace_s: float
    pending: Sequence[int]
    queues: Sequence[Queue]


@dataclass(frozen=True, slots=True)
class Take:
    """Compute a micro-batch that nobody has begun; `holder` loses it, if there is one."""

    micro_batch: int
    holder: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Compute a micro-batch that `holder` is computing too; whoever is first counts."""

    micro_batch: int
    holder: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing worth doing; ask again at `until_s`, or when something changes."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares in proportion to speed, then what is left, then duplicates of what is late."""

    kind: Literal["shares"] = "shares"

    def shares(self, paces: Mapping[int, float], num: int) -> dict[int, int]:
        """Split `num` micro-batches over workers so that the last one ends as early as possible.

        Args:
            paces: seconds per micro-batch of each worker, > 0.
        """
        ends = dict.fromkeys(paces, 0.0)
        shares = dict.fromkeys(paces, 0)
        for _ in range(num if paces else 0):
            worker = min(ends, key=lambda one: (ends[one] + paces[one], one))
            ends[worker] += paces[worker]
            shares[worker] += 1
        return shares

    def decide(self, view: IdleView) -> Take | Duplicate | Wait:
        """What an idle worker should do next."""
        if view.pending:
            return Take(view.pending[0], None, "nobody holds it")
        mine_s = view.now_s + view.pace_s
        ends_s: dict[int, float] = {}
        for queue in view.queues:
            for position, micro_batch in enumerate(queue.micro_batches):
                end_s = queue.expected_end_s(position, view.now_s)
                ends_s[micro_batch] = min(end_s, ends_s.get(micro_batch, end_s))
        held = [queue for queue in view.queues if queue.micro_batches]
        latest = max(held, key=lambda queue: ends_s[queue.micro_batches[-1]], default=None)
        wait = Wait(view.now_s + max(view.pace_s / 8, 0.005), "every holder will be done first")
        if latest is None:
            return wait
        micro_batch = latest.micro_batches[-1]
        gain_s = ends_s[micro_batch] - mine_s
        reason = f"worker {latest.worker} is expected {gain_s:.3f} s later"
        if gain_s == math.inf:
            reason = f"worker {latest.worker} has made no progress for {latest.silent_s:.3f} s"
        if len(latest.micro_batches) > 1 and gain_s > 0:
            return Take(micro_batch, latest.worker, reason)
        if gain_s > MARGIN * view.pace_s:
            return Duplicate(micro_batch, latest.worker, reason)
        return wait


def pace(samples_s: Sequence[float], fallback_s: float) -> float:
    """Seconds per micro-batch: the median of the last samples, robust to a few bad ones."""
    recent = list(samples_s)[-PACE_WINDOW:]
    return statistics.median(recent) if recent else fallback_s
