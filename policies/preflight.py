"""Which workers are not fit to compute: those whose short probe takes far longer than the fleet's.

Before a worker becomes a member it multiplies two matrices and copies memory, a few times each; the
best counts, so that a neighbour that is busy for a moment spoils nothing. Compared is with the
fleet's median. Pure: what was measured arrives in the view. Who is left out is not for here.

Twice the median is what DLRover's pre-flight takes for a bad host
(https://github.com/intelligent-machine-learning/dlrover, node check).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Probe:
    """Seconds of the best of a few tries: a product of two matrices, a copy of memory.

    `is_right`: the product was what it must be.
    """

    multiply_s: float
    copy_s: float
    is_right: bool = True

    def best(self, other: Probe) -> Probe:
        """Of two probes of one worker the shorter times; both must be right."""
        return Probe(
            min(self.multiply_s, other.multiply_s),
            min(self.copy_s, other.copy_s),
            is_right=self.is_right and other.is_right,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitness:
    """Unfit: more than `limit` times the median of all that were probed, in either measure."""

    limit: float = 2.0
    kind: Literal["fitness"] = "fitness"

    def decide(self, probes: Mapping[int, Probe]) -> dict[int, str]:
        """Who is unfit, and why.

        Args:
            probes: of the workers that live.
        """
        if not probes:
            return {}
        # of an even number half are as good: the smaller one of the two in the middle
        multiply_s = statistics.median_low(one.multiply_s for one in probes.values())
        copy_s = statistics.median_low(one.copy_s for one in probes.values())
        unfit = {}
        for worker, probe in probes.items():
            reasons = []
            if not probe.is_right:
                reasons.append("a product of matrices comes out wrong")
            reasons += self._slow("multiplies matrices", probe.multiply_s, multiply_s)
            reasons += self._slow("copies memory", probe.copy_s, copy_s)
            if reasons:
                unfit[worker] = "; ".join(reasons)
        return unfit

    def _slow(self, what: str, took_s: float, usual_s: float) -> list[str]:
        if took_s <= self.limit * usual_s:
            return []
        times = f"{took_s / usual_s:.1f} times the fleet's median"
        return [f"{what} in {1000 * took_s:.2f} ms, {times} (workers.preflight {self.limit:g})"]
