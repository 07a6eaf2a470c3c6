"""How each expert is doing: breakers, answers examined, and who is tried again.

An operator may also take experts out. Time is passed in. Never calls an expert itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from policies.routing import Bools
from serve.breaker import Breaker, State
from serve.metrics import Metrics
from serve.pool import Slow
from serve.settings import Failing
from serve.version import Version, fault_of

UNLOADED = 3
"""Of the metric, besides the breaker's states."""


@dataclass(frozen=True)
class Condition:
    """How an expert is doing, in words."""

    name: str
    version: str
    state: str
    reason: str


class Patients:
    """A breaker for each expert and version, shared by all versions that have it in common."""

    def __init__(self, settings: Failing, clock: Callable[[], float], metrics: Metrics) -> None:
        self._settings, self._clock, self._metrics = settings, clock, metrics
        self._breakers: dict[str, Breaker] = {}
        self._lock = threading.RLock()
        self.unloaded: frozenset[str] = frozenset()

    def alive(self, version: Version) -> Bools:
        """Who may be asked (K,). One that is tried again may not, before that went well."""
        with self._lock:
            return np.array([self._lives(name, key) for name, key in _experts(version)], np.bool_)

    def to_probe(self, version: Version) -> list[int]:
        """Whom to try again by one call, outside of any request; each is named once."""
        now_s, found = self._clock(), []
        with self._lock:
            for k, key in enumerate(version.keys):
                breaker = self._breaker(key)
                if breaker.state is State.OPEN and breaker.may_ask(now_s):
                    found.append(k)
        return found

    def retry_after_s(self, version: Version) -> float:
        """How long until somebody is tried again."""
        now_s = self._clock()
        with self._lock:
            waits = [self._breaker(key).retry_after_s(now_s) for key in version.keys]
        return min(waits)

    def examine(
        self, version: Version, k: int, answer: Tensor | Exception, rows: int, took_s: float
    ) -> Tensor | None:
        """The answer if it is one; what went wrong counts against the expert."""
        name = version.names[k]
        if isinstance(answer, Tensor):
            fault = fault_of(version, answer, rows)
            outcome = "ok" if fault is None else "garbage"
        else:
            fault = str(answer) or type(answer).__name__
            outcome = "slow" if isinstance(answer, Slow) else "error"
        self._metrics.called(name, outcome, took_s, rows)
        with self._lock:
            breaker = self._breaker(version.keys[k])
            if fault is None:
                breaker.succeeded()
            else:
                breaker.failed(fault, self._clock(), at_once=outcome == "slow")
        return answer if fault is None and isinstance(answer, Tensor) else None

    def conditions(self, version: Version) -> list[Condition]:
        """How the experts of a version are doing."""
        with self._lock:
            return [
                Condition(entry.name, entry.version, *self._words(entry.name, key))
                for entry, key in zip(version.manifest.experts, version.keys, strict=True)
            ]

    def states(self, version: Version) -> dict[str, int]:
        """The same as numbers, of the metric."""
        with self._lock:
            return {
                name: UNLOADED if name in self.unloaded else self._breaker(key).state.value
                for name, key in _experts(version)
            }

    def condemn(self, version: Version, wrong: dict[str, str]) -> None:
        """Leave out experts that a check found wanting."""
        with self._lock:
            for name, fault in wrong.items():
                breaker = self._breaker(version.keys[version.index[name]])
                breaker.failed(fault, self._clock(), at_once=True)

    def keep(self, keys: Collection[str]) -> None:
        """Forget experts that no version has any more."""
        with self._lock:
            self._breakers = {key: one for key, one in self._breakers.items() if key in keys}

    def _lives(self, name: str, key: str) -> bool:
        return name not in self.unloaded and self._breaker(key).state is State.CLOSED

    def _breaker(self, key: str) -> Breaker:
        found = self._breakers.get(key)
        if found is None:
            found = self._breakers[key] = Breaker(self._settings)
        return found

    def _words(self, name: str, key: str) -> tuple[str, str]:
        breaker = self._breaker(key)
        if name in self.unloaded:
            return "UNAVAILABLE", "unloaded"
        if breaker.state is State.CLOSED:
            return "READY", ""
        return "UNAVAILABLE", breaker.reason


def _experts(version: Version) -> zip[tuple[str, str]]:
    return zip(version.names, version.keys, strict=True)
