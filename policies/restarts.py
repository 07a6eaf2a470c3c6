"""Whether to start another worker after some have died: back-off, then giving up.

Pure: deaths and the time arrive in the view. Never starts anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from policies.pauses import pause_s


@dataclass(frozen=True, slots=True)
class RestartView:
    """Deaths: when each worker that died without being asked to was seen dead, oldest first."""

    now_s: float
    deaths_s: Sequence[float]
    failed_starts: int = 0
    """Workers in a row that died before they could compute."""


@dataclass(frozen=True, slots=True)
class Start:
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """Wait twice as long after each death within `window_s`; give up after `limit` of them."""

    limit: int = 12
    start_limit: int = 6
    window_s: float = 60.0
    base_s: float = 0.25
    cap_s: float = 10.0
    kind: Literal["back_off"] = "back_off"

    def decide(self, view: RestartView) -> Start | Hold | GiveUp:
        recent = [death_s for death_s in view.deaths_s if view.now_s - death_s < self.window_s]
        if view.failed_starts >= self.start_limit:
            return GiveUp(
                f"{view.failed_starts} workers in a row died while starting (limit"
                f" {self.start_limit}): starting more would not help; `elastic scale` tries again"
            )
        if len(recent) >= self.limit:
            return GiveUp(
                f"{len(recent)} workers died within {self.window_s:.0f} s (limit {self.limit}):"
                " starting more would not help; `elastic scale` tries again"
            )
        if len(recent) < 2:  # one death is an accident
            return Start(f"{len(recent)} deaths within {self.window_s:.0f} s")
        wait_s = pause_s(len(recent) - 2, base_s=self.base_s, cap_s=self.cap_s)
        until_s = recent[-1] + wait_s
        if view.now_s < until_s:
            return Hold(until_s, f"backing off {wait_s:.1f} s after {len(recent)} deaths")
        return Start(f"{len(recent)} deaths within {self.window_s:.0f} s")
