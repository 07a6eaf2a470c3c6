"""M-SGC: many gradients at once, most parts with one worker only, the last ones coded.

Gradient t starts in round t and is decoded by the end of round t + T, T = W - 2 + B. A round has
W - 1 + B slots; slot m of round r works on gradient r - m. Of the parts of a gradient

    D1: (W-1) n parts, worker i alone holds i(W-1) .. i(W-1) + W-2
    D2: B groups of parts, coded so that any lambda workers may be missing

A worker computes its D1 parts in slots 0 .. W-2; in later slots it retries the earliest that it
still lacks, and answers group k of D2 in slot W-1+k if it lacks none. Who straggles in a round
loses all its slots. Without D2 (lambda = n) all later slots are for retries.

    `inner`   D2 in a group                            load
    coded     n parts of 1/(lambda+1) of a D1 part     (lambda+1)(W-1+B) / (n(B + (W-1)(lambda+1)))
    frc       floor(n/(lambda+1)) parts like those     (W-1+B) / ((W-1)n + B floor(n/(lambda+1)))
              of D1, one for each group of workers
    lambda=n  none                                     (W-1+B) / (n(W-1))

Withstands (B, W, lambda)-bursty and (B, W+B-1, lambda)-arbitrary stragglers.
Source: Krishnan, Ebrahimi, Khisti, ICLR 2023; frc inside is ours. Letters: M slots (a gradient's
place is its number modulo M), N workers, G groups of workers, B groups of D2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.coding.codes import (
    Bools,
    Code,
    Decoded,
    Floats,
    Undecodable,
    crc,
    frc,
)
from policies.coding.parts import check_micro_batches
from policies.coding.stragglers import Bursty


@dataclass(frozen=True, slots=True)
class Slot:
    """One sum of parts: a D1 part alone, or the parts of a D2 group with their coefficients."""

    gradient: int
    group: int | None
    """Of D2; None: a D1 part."""
    parts: tuple[int, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MSgc:
    """Multiplexed: `burst` (B) < `window` (W), `distinct` (lambda) up to n."""

    burst: int
    window: int
    distinct: int
    inner: Literal["frc", "coded"] = "frc"
    kind: Literal["m_sgc"] = "m_sgc"

    def __post_init__(self) -> None:
        if not 0 < self.burst < self.window:
            raise ValueError(
                f"m_sgc: burst must be 1 to window - 1, not {self.burst} of {self.window}"
            )
        if self.distinct < 1:
            raise ValueError(f"m_sgc: distinct must be at least 1, not {self.distinct}")

    @property
    def num_slots(self) -> int:
        return self.window - 1 + self.burst

    @property
    def delay(self) -> int:
        """Rounds from the start of a gradient to its decoding (T)."""
        return self.num_slots - 1

    @property
    def model(self) -> Bursty:
        return Bursty(self.burst, self.window, self.distinct)

    def num_parts(self, num_workers: int) -> int:
        """In parts of D1; for `coded` a part of D2 is 1/(lambda+1) of one."""
        return (self.window - 1) * num_workers + self.burst * self._units(num_workers)

    def _units(self, num_workers: int) -> int:
        if self.distinct >= num_workers:
            return 0
        return num_workers // (self.distinct + 1)

    def multiple(self, num_workers: int) -> int:
        """The number of micro-batches must be a multiple of this."""
        if self.distinct >= num_workers:
            return num_workers * (self.window - 1)
        if self.inner == "frc":
            return self.num_parts(num_workers)
        return num_workers * (self.burst + (self.window - 1) * (self.distinct + 1))

    def check(self, num_workers: int, num_micro_batches: int) -> None:
        """Refuse what cannot be cut into parts.

        Raises:
            ValueError: lambda is above n, or M no multiple; names the nearest.
        """
        self._check_workers(num_workers)
        scheme = f"m_sgc ({self.burst}, {self.window}, {self.distinct}) with {num_workers} workers"
        check_micro_batches(num_micro_batches, self.multiple(num_workers), scheme)

    def _check_workers(self, num_workers: int) -> None:
        if self.distinct > num_workers:
            raise ValueError(
                f"m_sgc: distinct is {self.distinct}, with {num_workers} workers at most "
                f"{num_workers}"
            )

    def slot_load(self, num_workers: int) -> float:
        """The share of a global batch that one slot computes."""
        if self.distinct < num_workers and self.inner == "coded":
            copies = self.distinct + 1
            return copies / (num_workers * (self.burst + (self.window - 1) * copies))
        return 1 / self.num_parts(num_workers)

    def load(self, num_workers: int) -> float:
        """The share of a global batch that a worker computes in a round, at most."""
        return self.num_slots * self.slot_load(num_workers)

    def begin(self, num_workers: int, num_gradients: int) -> MSgcRounds:
        """Before the first round.

        Raises:
            ValueError: lambda is above n.
        """
        self._check_workers(num_workers)
        return MSgcRounds(self, num_workers, num_gradients)

    def code(self, num_workers: int) -> Code | None:
        """The code within each group of D2; None without D2."""
        if self.distinct >= num_workers:
            return None
        make = frc if self.inner == "frc" else crc
        return make(num_workers, self.distinct)


class MSgcRounds:
    """What has been answered so far, and what the next round is to work on."""

    def __init__(self, scheme: MSgc, num_workers: int, num_gradients: int) -> None:
        self.scheme = scheme
        self.num_workers = num_workers
        self.num_gradients = num_gradients
        self.round = 0
        slots = scheme.num_slots
        self._has_D2 = scheme.distinct < num_workers
        # By a gradient's place: D1 parts that a worker lacks, and its answers to groups of D2.
        self._lacks = np.ones((slots, num_workers, scheme.window - 1), np.bool_)
        self._coded = np.zeros((slots, scheme.burst, num_workers), np.bool_)
        self._repetition = None
        if self._has_D2 and scheme.inner == "frc":
            self._repetition = frc(num_workers, scheme.distinct)

    @property
    def num_rounds(self) -> int:
        return self.num_gradients + self.scheme.delay

    @property
    def due(self) -> int:
        """The gradient that this round must complete; negative if none."""
        return self.round - self.scheme.delay

    def _active(self) -> list[int]:
        """The slots that have a gradient."""
        first = max(0, self.round - self.num_gradients + 1)
        return list(range(first, min(self.scheme.num_slots, self.round + 1)))

    def loads(self) -> Floats:
        """The share of a global batch that each worker computes in this round."""
        num_slots_N = np.zeros(self.num_workers)
        for slot in self._active():
            if slot < self.scheme.window - 1 or self._has_D2:
                num_slots_N += 1
            else:
                num_slots_N += self._lacks[self._place(slot)].any(axis=1)
        return num_slots_N * self.scheme.slot_load(self.num_workers)

    def _place(self, slot: int) -> int:
        return (self.round - slot) % self.scheme.num_slots

    def work(self, worker: int, code: Code | None) -> list[Slot]:
        """What a worker computes in this round, slot by slot. `code` is that of the scheme."""
        made = []
        for gradient, own, group in self.slots(worker):
            if group is None:
                made.append(Slot(gradient, None, (own,), (1.0,)))
            elif code is not None:
                row_K = code.row(worker)
                parts = np.flatnonzero(row_K)
                base = self.num_workers * (self.scheme.window - 1) + group * len(row_K)
                numbers = tuple(int(base + part) for part in parts)
                values = tuple(float(one) for one in row_K[parts])
                made.append(Slot(gradient, group, numbers, values))
        return made

    def slots(self, worker: int) -> list[tuple[int, int, int | None]]:
        """Of each slot of a worker in this round: the gradient, and its part of D1; or, if a group
        is named, it answers that group of D2."""
        made: list[tuple[int, int, int | None]] = []
        first = worker * (self.scheme.window - 1)
        for slot in self._active():
            gradient, group = self.round - slot, slot - (self.scheme.window - 1)
            lacks = self._lacks[self._place(slot), worker]
            if group < 0:
                made.append((gradient, first + slot, None))
            elif lacks.any():
                made.append((gradient, first + int(lacks.argmax()), None))
            elif self._has_D2:
                made.append((gradient, first, group))
        return made

    def say(self, gradient: int, own_NW: Bools, coded_BN: Bools) -> None:
        """Between rounds: which parts of D1 of each worker are there, and which of its answers to
        groups of D2, if that is known better than by `close`."""
        place = gradient % self.scheme.num_slots
        self._lacks[place], self._coded[place] = ~own_NW, coded_BN

    def allows(self, answered_N: Bools) -> bool:
        """Whether the round may end with these answers.

        Every active gradient can then still be decoded in time, if nobody straggles any more: the
        more have answered, the better.
        """
        return all(self._is_feasible(slot, answered_N) for slot in self._active())

    def _is_feasible(self, slot: int, answered_N: Bools) -> bool:
        scheme, place = self.scheme, self._place(slot)
        lacking_N = self._lacks[place].sum(axis=1)
        was_lacking_N = lacking_N > 0
        lacking_N = lacking_N - (answered_N & was_lacking_N)
        num_left = scheme.num_slots - 1 - slot
        if lacking_N.max() > num_left:
            return False
        if not self._has_D2:
            return True
        for group in range(scheme.burst):
            ahead = scheme.window - 1 + group - slot
            if ahead > 0:  # who will have no part to retry by then
                will_N = lacking_N < ahead
            else:
                will_N = self._coded[place, group]
                if ahead == 0:
                    will_N = will_N | (answered_N & ~was_lacking_N)
            if not self._suffices(will_N):
                return False
        return True

    def _suffices(self, has_N: Bools) -> bool:
        """Whether these answers to a group of D2 can be decoded."""
        if self._repetition is not None:
            return self._repetition.covers(has_N)
        return int(np.count_nonzero(has_N)) >= self.num_workers - self.scheme.distinct

    def close(self, answered_N: Bools) -> None:
        """End the round with these answers: who is not among them has lost all its slots."""
        workers = np.flatnonzero(answered_N)
        for slot in self._active():
            place, group = self._place(slot), slot - (self.scheme.window - 1)
            if group < 0:
                self._lacks[place, workers, slot] = False
                continue
            lacks_AW = self._lacks[place, workers]
            is_retry_A = lacks_AW.any(axis=1)
            retries = workers[is_retry_A]
            self._lacks[place, retries, lacks_AW[is_retry_A].argmax(axis=1)] = False
            self._coded[place, group, workers[~is_retry_A]] = True
        self.round += 1
        place = self._place(0)  # the next gradient takes the place of the oldest
        if self.round > self.scheme.delay:
            self._lacks[place], self._coded[place] = True, False

    def decode(self, answered_N: Bools, code: Code | None) -> list[Decoded] | Undecodable:
        """Of the gradient that is due, if its last round ends with these answers.

        Coefficients of the answers to each group of D2; all D1 parts count with coefficient 1.
        """
        slot = self.scheme.num_slots - 1
        place, last = self._place(slot), self.scheme.burst - 1
        lacking_N = self._lacks[place].sum(axis=1)
        was_lacking_N = lacking_N > 0
        left = np.flatnonzero(lacking_N - (answered_N & was_lacking_N))
        if len(left):
            return Undecodable(
                f"gradient {self.due}: worker {left[0]} has not computed all its own parts"
                + (f", nor have {len(left) - 1} others" if len(left) > 1 else "")
            )
        if code is None:
            return []
        groups = []
        for group in range(self.scheme.burst):
            has_N = self._coded[place, group]
            if group == last:
                has_N = has_N | (answered_N & ~was_lacking_N)
            decoded = code.decode(np.flatnonzero(has_N).tolist())
            if isinstance(decoded, Undecodable):
                return Undecodable(f"gradient {self.due}, group {group}: {decoded.reason}")
            groups.append(decoded)
        return groups
