"""Which checkpoints to remove once another one is written: the last few stay, and the best.

Pure: steps and the values of the metric arrive in the view. Never removes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that is there. `value`: the metric that decides, None where it is not known."""

    step: int
    value: float | None = None


@dataclass(frozen=True, slots=True)
class RetentionView:
    """`written`: the step just written. Newer ones, left by a run that went back, are not seen."""

    written: int
    checkpoints: Sequence[Kept]


@dataclass(frozen=True, slots=True)
class Remove:
    """Steps, oldest first; perhaps none."""

    steps: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LastAndBest:
    """Keep the last `keep_last`, and the `keep_best` of the lowest or highest value besides."""

    keep_last: int
    keep_best: int = 0
    mode: Literal["min", "max"] = "min"
    kind: Literal["last_and_best"] = "last_and_best"

    def decide(self, view: RetentionView) -> Remove:
        seen = sorted(one.step for one in view.checkpoints if one.step <= view.written)
        last = set(seen[-self.keep_last :])
        ranked = self.ranked([one for one in view.checkpoints if one.step <= view.written])
        best = {one.step for one in ranked[: self.keep_best]}
        steps = tuple(step for step in seen if step not in last | best)
        return Remove(steps, f"kept: the last {len(last)}, and of the best {len(best - last)} more")

    def ranked(self, checkpoints: Sequence[Kept]) -> list[Kept]:
        """Those whose value is known, best first; of equal ones the newest."""
        known = [one for one in checkpoints if one.value is not None]
        sign = 1 if self.mode == "min" else -1
        return sorted(known, key=lambda one: (sign * (one.value or 0.0), -one.step))
