"""Whether to write a checkpoint now: when one is due, and again, with back-off, after a failure.

Pure: what happened and the time arrive in the view. Never writes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from policies.pauses import pause_s


@dataclass(frozen=True, slots=True)
class SavingView:
    """Where the job stands. Times are of one clock, in seconds."""

    now_s: float
    step: int
    """Steps committed: what a checkpoint written now would hold."""
    tried_step: int
    """What the newest try held, whatever came of it."""
    failures_s: Sequence[float] = ()
    """When each try since the last good one failed, oldest first."""
    ended_s: float | None = None
    """Since when the job has ended, and only its last checkpoint is missing."""


@dataclass(frozen=True, slots=True)
class Save:
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveWithBackOff:
    """Save every `every` steps, and at the end. After a failure wait twice as long each time.

    A retry holds the state as it is then. A due checkpoint does not wait for the back-off; the last
    one is tried for `patience_s`.
    """

    every: int
    patience_s: float
    base_s: float = 1.0
    cap_s: float = 60.0
    kind: Literal["back_off"] = "back_off"

    def decide(self, view: SavingView) -> Save | Hold | GiveUp:
        if view.ended_s is None and self._is_due(view):
            return Save(f"due at step {view.step}, every {self.every}")
        if not view.failures_s:
            return Save("the last one") if view.ended_s is not None else Hold(0.0, "not due")
        num, failed_s = len(view.failures_s), view.failures_s[-1]
        wait_s = pause_s(num - 1, base_s=self.base_s, cap_s=self.cap_s)
        until_s = failed_s + wait_s
        if view.ended_s is not None:
            if failed_s < view.ended_s:
                return Save(f"the last one, after {num} failures in a row")
            if failed_s >= view.ended_s + self.patience_s:
                return GiveUp(f"tried for {self.patience_s:g} s after the end")
            until_s = min(until_s, view.ended_s + self.patience_s)
        if view.now_s < until_s:
            return Hold(until_s, f"backing off {wait_s:g} s after {num} failures in a row")
        return Save(f"again after {num} failures in a row")

    def _is_due(self, view: SavingView) -> bool:
        return self.every > 0 and view.step // self.every > view.tried_step // self.every
