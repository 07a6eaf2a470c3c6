"""What rounds that were really run say of the delays: how load counts, and who straggles how.

From the fastest workers at several loads comes how much of a task's time shrinks with it, from the
spread at those loads whether delays come on top or slow down all of a worker's work. Delays that
were cut off are drawn from the longer ones, as likely as Kaplan and Meier (1958) estimate them.
Letters: R rounds, N workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.coding.codes import Bools, Floats
from policies.coding.delays import SLOW, Delays, additive, proportional, shuffled

FASTEST = 32
"""One worker of so many is fast; they are seen in every round, whatever it waits for."""
CLEAR = 1.15
"""A load must lengthen tasks by so much to show how delays go with the load."""
LONGER = 1.5
"""A delay that was cut off is taken to be so much longer, where no longer one was ever seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Rounds that were run: the load of each worker, and its seconds.

    `ends_R` is when each round ended. A worker whose seconds are infinite was abandoned then and
    would have taken longer; of one with NaN nothing is known.
    """

    loads_RN: Floats
    seconds_RN: Floats
    ends_R: Floats

    def __len__(self) -> int:
        return len(self.ends_R)

    def usual(self) -> tuple[Floats, Floats]:
        """The load of most workers in each round, shape (R,), and their seconds, shape (R, N).

        NaN are those of the others.
        """
        has_work_RN = ~np.isnan(self.seconds_RN)
        rows = zip(self.loads_RN, has_work_RN, strict=True)
        loads_R = np.array([_most_common(loads_N[has_work_N]) for loads_N, has_work_N in rows])
        is_usual_RN = self.loads_RN == loads_R[:, None]
        return loads_R, np.where(is_usual_RN, self.seconds_RN, np.nan)

    def last(self, num: int) -> Seen:
        """The latest rounds."""
        return Seen(self.loads_RN[-num:], self.seconds_RN[-num:], self.ends_R[-num:])

    def and_then(self, other: Seen) -> Seen:
        """These rounds and later ones."""
        return Seen(
            np.concatenate([self.loads_RN, other.loads_RN]),
            np.concatenate([self.seconds_RN, other.seconds_RN]),
            np.concatenate([self.ends_R, other.ends_R]),
        )


@dataclass(frozen=True, slots=True)
class LoadModel:
    """A worker that computes a share L of the batch takes `fixed_s` + `rate_s` L, typically."""

    fixed_s: float
    rate_s: float
    is_proportional: bool

    def typical_s(self, load: float) -> float:
        return self.fixed_s + self.rate_s * load

    def fixed_share(self, load: float) -> float:
        """Which share of a task's time does not shrink with its load (f)."""
        return self.fixed_s / self.typical_s(load)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Delays of all workers at `load`, nothing missing, and how they go with the load."""

    load: float
    seconds_RN: Floats
    model: LoadModel

    @property
    def straggler_rate(self) -> float:
        fastest_R1 = self.seconds_RN.min(axis=1, keepdims=True)
        return float((self.seconds_RN > SLOW * fastest_R1).mean())

    def last(self, num: int) -> Measured:
        """The latest rounds."""
        return Measured(self.load, self.seconds_RN[-num:], self.model)

    def delays(self, num_rounds: int, dice: np.random.Generator) -> Delays:
        """Rounds to simulate: those measured, over and over, workers changing places."""
        drawn_RN = shuffled(self.seconds_RN, num_rounds, dice)
        if self.model.is_proportional:
            return proportional(drawn_RN, self.load, self.model.fixed_share(self.load))
        return additive(drawn_RN, self.load, self.model.rate_s)


def load_model(seen: Seen) -> LoadModel:
    """Least squares of the fastest answers over the loads; all fixed if there is one load."""
    all_loads_R, seconds_RN = seen.usual()
    num_fast = max(1, seconds_RN.shape[1] // FASTEST)
    fast_R = np.partition(seconds_RN, num_fast - 1, axis=1)[:, num_fast - 1]
    is_known_R = np.isfinite(fast_R)
    fast_R, loads_R = fast_R[is_known_R], all_loads_R[is_known_R]
    low, high = float(loads_R.min()), float(loads_R.max())
    if low == high:
        return LoadModel(float(np.median(fast_R)), 0.0, False)
    centred_R = loads_R - loads_R.mean()
    slope = float(centred_R @ fast_R / (centred_R @ centred_R))
    rate_s = min(max(0.0, slope), float(fast_R.mean() / loads_R.mean()))
    fixed_s = float(fast_R.mean() - rate_s * loads_R.mean())
    spreads = {
        load: _spread(seconds_RN[all_loads_R == load]) for load in sorted(set(loads_R.tolist()))
    }
    known = [load for load, spread in spreads.items() if spread is not None]
    if len(known) < 2:
        return LoadModel(fixed_s, rate_s, False)
    longer = (fixed_s + rate_s * known[-1]) / (fixed_s + rate_s * known[0])
    wider = (spreads[known[-1]] or 0.0) / max(spreads[known[0]] or 0.0, 1e-12)
    return LoadModel(fixed_s, rate_s, longer > CLEAR and wider > longer**0.5)


def _most_common(loads: Floats) -> float:
    values, counts = np.unique(loads, return_counts=True)
    return float(values[counts.argmax()])


def _spread(seconds_RN: Floats) -> float | None:
    """From the 10th percentile to the median in rounds of one load; None: they were never seen.

    Below the median, so that neither stragglers nor what was cut off count.
    """
    sorted_RN = np.sort(seconds_RN, axis=1)
    num_workers = sorted_RN.shape[1]
    high_R = sorted_RN[:, num_workers // 2]
    low_R = sorted_RN[:, num_workers // 10]
    is_known_R = np.isfinite(high_R)
    if not is_known_R.any():
        return None
    return float(np.median(high_R[is_known_R] - low_R[is_known_R]))


def measure(seen: Seen, load: float, dice: np.random.Generator) -> Measured:
    """The rounds as they would have been at `load`, with what was cut off filled in."""
    model = load_model(seen)
    ratio_RN = model.typical_s(load) / (model.fixed_s + model.rate_s * seen.loads_RN)
    shift_RN = model.rate_s * (load - seen.loads_RN)
    if model.is_proportional:
        seconds_RN, ends_RN = seen.seconds_RN * ratio_RN, seen.ends_R[:, None] * ratio_RN
    else:
        seconds_RN, ends_RN = seen.seconds_RN + shift_RN, seen.ends_R[:, None] + shift_RN
    is_known_RN = np.isfinite(seconds_RN)
    ends_RN = np.where(np.isnan(seen.seconds_RN), 0.0, ends_RN)  # known to be longer than that
    floor_s = 0.1 * float(np.median(seconds_RN[is_known_RN]))
    seconds_RN = np.maximum(np.where(is_known_RN, seconds_RN, ends_RN), floor_s)
    filled_RN = seconds_RN.copy()
    filled_RN[~is_known_RN] = _longer(seconds_RN, is_known_RN, dice)
    return Measured(load, filled_RN, model)


def _longer(seconds_RN: Floats, is_known_RN: Bools, dice: np.random.Generator) -> Floats:
    """For each delay that was cut off, one that is longer than that."""
    order = np.lexsort((~is_known_RN.ravel(), seconds_RN.ravel()))
    sorted_s, is_known = seconds_RN.ravel()[order], is_known_RN.ravel()[order]
    survival = np.cumprod(1 - is_known / np.arange(len(order), 0, -1))
    cut_s = seconds_RN[~is_known_RN]
    reached = np.searchsorted(sorted_s, cut_s, side="right") - 1
    drawn = survival[reached] * (1 - dice.random(len(cut_s)))
    places = np.searchsorted(-survival, -drawn, side="left")
    is_beyond = places >= len(sorted_s)
    found_s = sorted_s[np.minimum(places, len(sorted_s) - 1)]
    longest_s = np.full(len(cut_s), LONGER) * np.maximum(cut_s, sorted_s[-1])
    return np.where(is_beyond, longest_s, np.maximum(found_s, cut_s))
