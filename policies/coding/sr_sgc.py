"""SR-SGC: gradient coding in which what a round lacks is repeated B rounds later.

Gradient t starts in round t and is decoded by the end of round t + B, so B + 1 models take turns.
Round r works on gradient r with an (n, s) code; if gradient r - B lacks answers, as many of the
workers that have not answered it work on it instead, the lowest first. With B dividing W - 1 and
s = ceil(B lambda / (W - 1 + B)), (B, W, lambda)-bursty stragglers are withstood at load (s+1) / n.

Source: Krishnan, Ebrahimi, Khisti, ICLR 2023. Letters: N workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.coding.codes import Bools, Code, Decoded, Floats, Ints, Undecodable
from policies.coding.stragglers import Bursty

IDLE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SrSgc:
    """Selective repeat: `burst` (B) divides `window` - 1 (W - 1); `distinct` is lambda."""

    burst: int
    window: int
    distinct: int
    kind: Literal["sr_sgc"] = "sr_sgc"

    def __post_init__(self) -> None:
        if not 0 < self.burst < self.window or (self.window - 1) % self.burst:
            raise ValueError(
                f"sr_sgc: burst must divide window - 1, not {self.burst} of {self.window - 1}"
            )
        if self.distinct < 1:
            raise ValueError(f"sr_sgc: distinct must be at least 1, not {self.distinct}")

    @property
    def num_stragglers(self) -> int:
        """The s of the code that is used in each round."""
        return -(-self.burst * self.distinct // (self.window - 1 + self.burst))

    @property
    def delay(self) -> int:
        """Rounds from the start of a gradient to its decoding (T)."""
        return self.burst

    @property
    def model(self) -> Bursty:
        return Bursty(self.burst, self.window, self.distinct)

    def load(self, num_workers: int) -> float:
        """The share of a global batch that a worker computes in one round."""
        return (self.num_stragglers + 1) / num_workers

    def begin(self, num_workers: int, num_gradients: int) -> SrSgcRounds:
        """Before the first round.

        Raises:
            ValueError: the code would have to withstand more stragglers than there are workers.
        """
        if self.num_stragglers >= num_workers or self.distinct > num_workers:
            raise ValueError(
                f"sr_sgc: {self.distinct} distinct stragglers of {num_workers} workers need codes "
                f"for {self.num_stragglers} stragglers"
            )
        return SrSgcRounds(self, num_workers, num_gradients)


class SrSgcRounds:
    """What has been answered so far, and what the next round is to work on."""

    def __init__(self, scheme: SrSgc, num_workers: int, num_gradients: int) -> None:
        self.scheme = scheme
        self.num_workers = num_workers
        self.num_gradients = num_gradients
        self.round = 0
        self._got: list[Bools] = []
        """Of each gradient, who has answered it."""

    @property
    def num_rounds(self) -> int:
        return self.num_gradients + self.scheme.delay

    @property
    def _needed(self) -> int:
        return self.num_workers - self.scheme.num_stragglers

    @property
    def due(self) -> int:
        """The gradient that this round must complete; negative if none."""
        return self.round - self.scheme.delay

    def work(self) -> Ints:
        """The gradient that each worker works on in this round; IDLE: none."""
        now = self.round if self.round < self.num_gradients else IDLE
        work_N = np.full(self.num_workers, now)
        if self.due >= 0:
            absent = np.flatnonzero(~self._got[self.due])
            lacking = max(0, self._needed - (self.num_workers - len(absent)))
            work_N[absent[:lacking]] = self.due
        return work_N

    def loads(self) -> Floats:
        """The share of a global batch that each worker computes in this round."""
        loads_N: Floats = np.where(self.work() == IDLE, 0.0, self.scheme.load(self.num_workers))
        return loads_N

    def allows(self, answered_N: Bools) -> bool:
        """Whether the round may end with these answers: the gradient that is due is complete.

        All later ones can still be completed, if nobody straggles any more.
        """
        if self.due < 0:
            return True
        got_N = self._got[self.due] | (answered_N & (self.work() == self.due))
        return int(got_N.sum()) >= self._needed

    def close(self, answered_N: Bools) -> None:
        """End the round with these answers."""
        work_N = self.work()
        if self.round < self.num_gradients:
            self._got.append(answered_N & (work_N == self.round))
        if self.due >= 0:
            self._got[self.due] |= answered_N & (work_N == self.due)
        self.round += 1

    def say(self, gradient: int, has_N: Bools) -> None:
        """Between rounds: who has answered a gradient, if that is known better than by `close`."""
        self._got[gradient] = has_N

    def decode(self, gradient: int, code: Code) -> Decoded | Undecodable:
        """Coefficients of the answers of each worker to this gradient, in whichever round."""
        decoded = code.decode(np.flatnonzero(self._got[gradient]).tolist())
        if isinstance(decoded, Undecodable):
            return Undecodable(f"gradient {gradient}: {decoded.reason}")
        return decoded
