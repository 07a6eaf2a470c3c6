"""Which workers hang: no progress for far longer than anybody's usual gap.

Pure: progress and the time arrive in the view. A hung worker delays nobody (its micro-batches are
duplicated at once); the verdict only decides that it is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """`silent_s`: seconds since its progress counter moved; `busy`: it holds work."""

    worker: int
    silent_s: float
    busy: bool
    has_committed: bool


@dataclass(frozen=True, slots=True)
class Hung:
    worker: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Hung when silent for `factor` usual micro-batches and at least `floor_s`.

    A worker that has not committed anything yet may be compiling or loading: `patience` as long.
    """

    factor: float = 30.0
    floor_s: float = 10.0
    patience: float = 6.0
    kind: Literal["silence"] = "silence"

    def decide(self, workers: Sequence[WorkerProgress], pace_s: float) -> list[Hung]:
        limit_s = max(self.floor_s, self.factor * pace_s)
        hung = []
        for one in workers:
            bound_s = limit_s if one.has_committed else self.patience * limit_s
            if one.busy and one.silent_s > bound_s:
                reason = f"no progress for {one.silent_s:.1f} s (limit {bound_s:.1f} s)"
                hung.append(Hung(one.worker, reason))
        return hung
