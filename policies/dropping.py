"""Inexact: a step ends without all of its micro-batches, at a deadline or after so many workers.

Who computes what is as with speculation and FRC; only when a step ends is another matter. What is
missing then is dropped: the step is still divided by the number of all its micro-batches. So the
result depends on who was slow, and says `exact: false`. Never chosen by `auto`. Pure.

Sources: DropCompute: Giladi et al., NeurIPS 2023, arXiv 2306.10598. ErasureHead: Wang, Charles,
Papailiopoulos 2019, arXiv 1901.09671.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.coding.codes import Floats
from policies.scheduling import Shares

MEASURED = 10
"""Steps that wait for all before the first deadline, and again with another number of workers."""
EVERY = 10
"""Afterwards one step in so many waits for all, so that the deadline follows what it measures."""
MEMORY = 40
"""Steps that a deadline looks back on."""
WORTH = 1.02
"""Times as many micro-batches in the same time; for less nothing is dropped."""
NUM_TRIED = 256


@dataclass(frozen=True, slots=True)
class Deadline:
    """Seconds from the beginning of a step, infinite: it waits for all; and why."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DropCompute:
    """A step ends at a deadline with what has been granted by then, and with one at least."""

    deadline_s: float | None = None
    """None: the one that gets most done in the same time, measured."""
    kind: Literal["drop_compute"] = "drop_compute"

    @property
    def shares(self) -> Shares:
        """Who computes what."""
        return Shares()

    def measures(self, num_measured: int, num_since: int) -> bool:
        """Whether the next step waits for all, to be measured.

        Args:
            num_measured: steps that were, since workers came or went.
            num_since: steps since the last one that was.
        """
        return self.deadline_s is None and (num_measured < MEASURED or num_since >= EVERY - 1)

    def decide(self, steps: Sequence[Sequence[float]], rest_s: float) -> Deadline:
        """The deadline, by steps that waited for all.

        The one that maximises the effective speed-up, the mean over the steps of
        (1 - dropped) / (1 - time saved), as DropCompute does (section 4.4 there).

        Args:
            steps: of each step, seconds from its beginning to each grant.
            rest_s: what a step takes besides, its update above all.
        """
        if self.deadline_s is not None:
            return Deadline(self.deadline_s, f"{self.deadline_s:g} s, as set")
        grants = [np.sort(np.asarray(one, np.float64)) for one in steps]
        tried_T = np.unique(np.concatenate(grants))
        if len(tried_T) > NUM_TRIED:
            tried_T = np.quantile(tried_T, np.linspace(0, 1, NUM_TRIED))
        gains_T = np.mean([_gain(one, tried_T, rest_s) for one in grants], axis=0)
        best = int(gains_T.argmax())
        if gains_T[best] < WORTH:
            return Deadline(math.inf, f"none: none gets {WORTH - 1:.0%} more done")
        lost = np.mean([np.mean(one > tried_T[best]) for one in grants])
        reason = f"{tried_T[best]:.2g} s: {gains_T[best] - 1:.0%} more done, {lost:.1%} dropped"
        return Deadline(float(tried_T[best]), f"{reason} (last {len(steps)} measured steps)")


def _gain(grants_s: Floats, tried_T: Floats, rest_s: float) -> Floats:
    """The effective speed-up of each deadline, in a step whose grants were at these times."""
    counts_T = np.maximum(1, np.searchsorted(grants_s, tried_T, side="right"))
    ends_T = np.clip(tried_T, grants_s[0], grants_s[-1])
    whole_s = max(grants_s[-1] + rest_s, 1e-9)
    gains_T: Floats = counts_T / len(grants_s) * whole_s / np.maximum(ends_T + rest_s, 1e-9)
    return gains_T


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasureHead:
    """FRC of `stragglers`, and a step ends once `wait_for` workers have answered all they have.

    A part is lost if all of the stragglers + 1 workers that compute it are late.
    """

    stragglers: int
    wait_for: int
    kind: Literal["erasure_head"] = "erasure_head"

    @property
    def shares(self) -> Shares:
        """Who computes what."""
        return Shares(copies=1 + self.stragglers)


Dropped = DropCompute | ErasureHead
