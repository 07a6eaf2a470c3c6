"""A circuit breaker: leaves an expert out once it fails, and tries it again by one call.

    CLOSED ── failures in a row ──▶ OPEN ── cool-down is over ──▶ HALF_OPEN ── success ──▶ CLOSED
                                      ▲                               │
                                      └────────── failure, twice the cool-down

Time is passed in. Never calls anything itself.
"""

from __future__ import annotations

from enum import Enum

from serve.settings import Failing


class State(Enum):
    """How an expert is doing; the numbers are those of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Of one expert."""

    def __init__(self, settings: Failing) -> None:
        self._settings = settings
        self.state = State.CLOSED
        self.reason = ""
        self._failures = 0
        self._cool_down_s = settings.cool_down_s
        self._retry_s = 0.0

    def may_ask(self, now_s: float) -> bool:
        """Whether a call may be made; when the cool-down is over, one call may."""
        if self.state is State.OPEN and now_s >= self._retry_s:
            self.state = State.HALF_OPEN
        return self.state is not State.OPEN

    def retry_after_s(self, now_s: float) -> float:
        """How long until it is tried again."""
        return max(self._retry_s - now_s, 0.0) if self.state is State.OPEN else 0.0

    def succeeded(self) -> None:
        """A call gave an answer."""
        self.state, self._failures, self.reason = State.CLOSED, 0, ""
        self._cool_down_s = self._settings.cool_down_s

    def failed(self, reason: str, now_s: float, *, at_once: bool = False) -> None:
        """A call failed or gave garbage; `at_once`: no further one is worth its time."""
        self._failures += 1
        self.reason = reason
        if self.state is State.HALF_OPEN:
            self._cool_down_s = min(2 * self._cool_down_s, self._settings.max_cool_down_s)
        elif self._failures < self._settings.failures and not at_once:
            return
        self.state, self._retry_s = State.OPEN, now_s + self._cool_down_s
