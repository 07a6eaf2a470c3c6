"""Which patterns of stragglers a scheme withstands, checked round by round.

A pattern conforms if every round did when it came: the checks are incremental, and need only the
rounds of a window. Letters: R past rounds, the latest last; N workers.

Sources: Tandon et al. 2017 (s per round); Krishnan, Ebrahimi, Khisti, ICLR 2023 (the others).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.coding.codes import Bools


@dataclass(frozen=True, slots=True)
class PerRound:
    """At most `most` stragglers in each round (s)."""

    most: int

    def allows(self, past_RN: Bools, now_N: Bools) -> bool:
        """Whether the pattern still conforms with the stragglers of this round."""
        return int(np.count_nonzero(now_N)) <= self.most


@dataclass(frozen=True, slots=True)
class Bursty:
    """In every window (W) at most `distinct` (lambda) stragglers, each only within `burst` (B)."""

    burst: int
    window: int
    distinct: int

    def allows(self, past_RN: Bools, now_N: Bools) -> bool:
        """Whether the pattern still conforms with the stragglers of this round."""
        recent_RN = past_RN[max(0, len(past_RN) - self.window + 1) :]
        if np.count_nonzero(recent_RN.any(axis=0) | now_N) > self.distinct:
            return False
        before_RN = recent_RN[: max(0, len(recent_RN) - self.burst + 1)]
        return not (before_RN.any(axis=0) & now_N).any()


@dataclass(frozen=True, slots=True)
class Arbitrary:
    """In every window (W') at most `distinct` (lambda') stragglers, each at most `times` (N)."""

    times: int
    window: int
    distinct: int

    def allows(self, past_RN: Bools, now_N: Bools) -> bool:
        """Whether the pattern still conforms with the stragglers of this round."""
        recent_RN = past_RN[max(0, len(past_RN) - self.window + 1) :]
        counts_N = recent_RN.sum(axis=0) + now_N
        return int(np.count_nonzero(counts_N)) <= self.distinct and counts_N.max() <= self.times


StragglerModel = PerRound | Bursty | Arbitrary
