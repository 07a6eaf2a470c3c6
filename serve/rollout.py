"""Which version answers a request: the current one, a new one on trial, or one that is pinned.

Requests in work keep the version they began with, so a swap drops none. Time is passed in by what
is recorded. Never loads a version.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from policies.canary import Arm, CanaryView, Compare, Promote, RollBack
from serve.metrics import Metrics
from serve.refusals import unknown
from serve.settings import Canary
from serve.version import Version

log = logging.getLogger(__name__)

_NUM_OLD = 2
"""Old versions that stay for requests that pin them."""


@dataclass
class _Record:
    num: int = 0
    num_failed: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=500))

    def arm(self) -> Arm:
        return Arm(self.num, self.num_failed, median(self.seconds) if self.seconds else 0.0)


class Rollout:
    """Starts with one version."""

    def __init__(self, first: Version, settings: Canary, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._compare = Compare(
            min_requests=settings.min_requests,
            max_failed=settings.max_failed,
            max_slowdown=settings.max_slowdown,
        )
        self._lock = threading.RLock()
        self.current = first
        self.candidate: Version | None = None
        self._old: list[Version] = []
        self._records: dict[str, _Record] = {}
        self.refused: dict[str, str] = {}
        """Versions that were taken back, and why."""
        self._tell()

    def versions(self) -> list[Version]:
        """All that may be asked for, the current one first."""
        with self._lock:
            trial = [] if self.candidate is None else [self.candidate]
            return [self.current, *trial, *self._old]

    def offer(self, version: Version) -> None:
        """A new version, loaded and checked."""
        with self._lock:
            if version.identity == self.current.identity:
                self.candidate = None  # whoever put the old manifest back wants the old version
            elif self._settings.percent >= 100 or self._was_here(version):
                self._promote(version)
            else:
                self.candidate, self._records = version, {}
                log.info("version %s answers %g %%", version.identity, self._settings.percent)
            self._tell()

    def choose(self, request_id: str) -> Version:
        """Who answers a request; the same one for the same id."""
        with self._lock:
            if self.candidate is None:
                return self.current
            digest = hashlib.sha256(request_id.encode("utf-8", "surrogateescape")).digest()
            share = int.from_bytes(digest[:4], "big") / 2**32
            return self.candidate if 100 * share < self._settings.percent else self.current

    def find(self, identity: str) -> Version:
        """A version by its name. Raises Refusal: 404."""
        found = self.versions()
        for one in found:
            if one.identity == identity:
                return one
        names = ", ".join(one.identity for one in found)
        raise unknown(f"no version {identity[:40]!r}; there are {names}")

    def record(self, version: Version, took_s: float, *, is_good: bool) -> Version | None:
        """A request was answered, or not. The version that is taken back for it, if any."""
        with self._lock:
            if self.candidate is None:
                return None
            record = self._records.setdefault(version.identity, _Record())
            record.num += 1
            record.num_failed += not is_good
            record.seconds.append(took_s)
            return self._judge(self.candidate) if version is self.candidate else None

    def _was_here(self, version: Version) -> bool:
        """An old one needs no trial, and whoever puts it back is in a hurry."""
        return any(version.identity == one.identity for one in self._old)

    def _judge(self, candidate: Version) -> Version | None:
        arms = (self._records.get(one.identity, _Record()) for one in (self.current, candidate))
        old, new = (one.arm() for one in arms)
        decision = self._compare.decide(CanaryView(old, new))
        if isinstance(decision, Promote):
            log.info("version %s takes over: %s", candidate.identity, decision.reason)
            self._promote(candidate)
        elif isinstance(decision, RollBack):
            log.warning("version %s is taken back: %s", candidate.identity, decision.reason)
            self.refused[candidate.identity] = decision.reason
            self._metrics.swaps.labels("rolled_back").inc()
            self.candidate = None
        self._tell()
        return candidate if isinstance(decision, RollBack) else None

    def _promote(self, version: Version) -> None:
        self._old = [one for one in self._old if one.identity != version.identity]
        self._old = [self.current, *self._old][:_NUM_OLD]
        self.current, self.candidate = version, None
        self._metrics.swaps.labels("promoted").inc()

    def _tell(self) -> None:
        percent = self._settings.percent if self.candidate is not None else 0.0
        shares: Iterable[tuple[Version, float]] = [(self.current, 1 - percent / 100)]
        if self.candidate is not None:
            shares = [*shares, (self.candidate, percent / 100)]
        self._metrics.version.clear()
        for version, share in shares:
            self._metrics.version.labels(version.identity).set(share)
