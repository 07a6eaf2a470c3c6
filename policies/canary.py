"""Whether a new version that answers some of the requests takes over, or is taken back.

Pure: what both versions did arrives in the view. Never routes a request.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arm:
    """What a version did since the new one came."""

    num_requests: int
    num_failed: int
    """Failed, or answered without an expert that should have."""
    median_s: float

    @property
    def failed_share(self) -> float:
        return self.num_failed / self.num_requests if self.num_requests else 0.0


@dataclass(frozen=True, slots=True)
class CanaryView:
    """The version that was there and the one that may replace it."""

    old: Arm
    new: Arm


@dataclass(frozen=True, slots=True)
class Promote:
    reason: str


@dataclass(frozen=True, slots=True)
class RollBack:
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Judge after `min_requests`; a version that fails often is taken back before that."""

    min_requests: int
    max_failed: float
    """Largest share of failed requests beyond that of the old version."""
    max_slowdown: float
    """Largest ratio of the medians of latency."""

    def decide(self, view: CanaryView) -> Promote | RollBack | Hold:
        old, new = view.old, view.new
        allowed = old.failed_share + self.max_failed
        if new.num_failed > max(allowed * self.min_requests, 1):
            return RollBack(f"{new.num_failed} of {new.num_requests} requests failed")
        if new.num_requests < self.min_requests:
            return Hold(f"{new.num_requests} of {self.min_requests} requests")
        if new.failed_share > allowed:
            return RollBack(f"{new.failed_share:.1%} of requests failed; allowed {allowed:.1%}")
        if (
            old.num_requests >= self.min_requests
            and new.median_s > self.max_slowdown * old.median_s
        ):
            slower = f"{new.median_s:.3f} s instead of {old.median_s:.3f} s"
            return RollBack(f"median latency {slower}; allowed {self.max_slowdown:g} times")
        return Promote(f"{new.num_requests} requests, {new.failed_share:.1%} failed")
