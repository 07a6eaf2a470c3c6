"""The last steps of many things at once: how far each is off, in means over windows and in votes.

Pure: a history is never changed, a later one is returned. Values are excesses over what is usual
among peers: 0 for a healthy one, 0.5 for half as long again. Sums over windows are carried along,
so that a step costs no more than its own row.

Letters: E things (workers, nodes, links), K windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from policies.signals import Bools, Floats, Ints

GOOD_STEPS = 3
"""After so many good steps in a row what is bad later begins later."""

CLIP = 0.6
"""No step counts for more than that in a mean: one long pause is no slowness."""

MAD_TO_SIGMA = 1.4826
"""The median absolute deviation of a normal distribution, times this, is its sigma."""

Row = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class History:
    """`id_E` ascending. `rows`: the excess of all, one row a step, the newest last; NaN: unknown.

    `step`: the newest. `since_E`: the step at which a thing began to be off; -1 if it is not.
    `is_open_E`: there is a verdict on it. `windows` are lengths in steps, and what follows are
    their numbers of known steps, sums and sums of squares, of excesses that are clipped to `clip`.
    """

    windows: tuple[int, ...]
    id_E: Ints
    rows: tuple[Row, ...]
    since_E: Ints
    is_open_E: Bools
    known_KE: Floats
    sums_KE: Floats
    squares_KE: Floats
    step: int = -1
    clip: float = CLIP

    @classmethod
    def empty(cls, windows: Sequence[int], clip: float = CLIP) -> Self:
        """Of nothing, to begin with."""
        return cls(
            windows=tuple(windows),
            id_E=np.empty(0, np.int64),
            rows=(),
            since_E=np.empty(0, np.int64),
            is_open_E=np.empty(0, np.bool_),
            known_KE=np.empty((len(windows), 0)),
            sums_KE=np.empty((len(windows), 0)),
            squares_KE=np.empty((len(windows), 0)),
            clip=clip,
        )

    def of(self, id_E: Ints) -> History:
        """The history of exactly these things: newcomers have none, others are forgotten."""
        if np.array_equal(id_E, self.id_E):
            return self
        is_known_E = np.isin(id_E, self.id_E)
        place = np.searchsorted(self.id_E, id_E[is_known_E])

        def moved(old: npt.NDArray[np.generic], new: float) -> npt.NDArray[np.generic]:
            values = np.full((*old.shape[:-1], len(id_E)), new, old.dtype)
            values[..., is_known_E] = old[..., place]
            return values

        return History(
            windows=self.windows,
            id_E=id_E,
            rows=tuple(moved(row, np.nan) for row in self.rows),  # type: ignore[misc]
            since_E=moved(self.since_E, -1),  # type: ignore[arg-type]
            is_open_E=moved(self.is_open_E, False),  # type: ignore[arg-type]
            known_KE=moved(self.known_KE, 0),  # type: ignore[arg-type]
            sums_KE=moved(self.sums_KE, 0),  # type: ignore[arg-type]
            squares_KE=moved(self.squares_KE, 0),  # type: ignore[arg-type]
            step=self.step,
            clip=self.clip,
        )

    def added(self, excess_E: Floats, step: int, *, vote: float) -> History:
        """With one more step: NaN where nothing is known. From `vote` on a step is a bad one."""
        row = excess_E.astype(np.float32)
        rows = (*self.rows, row)
        known_KE, sums_KE, squares_KE = (
            self.known_KE.copy(),
            self.sums_KE.copy(),
            self.squares_KE.copy(),
        )
        for k, num in enumerate(self.windows):
            signed = [(row, 1.0)] if len(rows) <= num else [(row, 1.0), (rows[-num - 1], -1.0)]
            for one, sign in signed:
                is_known_E, value_E = _clipped(one, self.clip)
                known_KE[k] += sign * is_known_E
                sums_KE[k] += sign * value_E
                squares_KE[k] += sign * value_E * value_E
        is_bad_E = row >= vote
        is_good_E = ~np.isnan(row)
        for one in rows[-GOOD_STEPS:]:
            is_good_E &= ~(one >= vote)
        since_E = np.where(is_bad_E & (self.since_E < 0), step, self.since_E)
        return replace(
            self,
            step=step,
            rows=rows[-max(self.windows) :],
            since_E=np.where(is_good_E & ~self.is_open_E, -1, since_E),
            known_KE=known_KE,
            sums_KE=sums_KE,
            squares_KE=squares_KE,
        )

    def marked(self, is_open_E: Bools) -> History:
        """With verdicts on these. What a verdict was about is forgotten when it ends."""
        return replace(self.without(self.is_open_E & ~is_open_E), is_open_E=is_open_E)

    def without(self, gone_E: Bools) -> History:
        """Forget what is known of these."""
        if not gone_E.any():
            return self
        return replace(
            self,
            rows=tuple(np.where(gone_E, np.float32(np.nan), row) for row in self.rows),
            since_E=np.where(gone_E, -1, self.since_E),
            known_KE=np.where(gone_E, 0.0, self.known_KE),
            sums_KE=np.where(gone_E, 0.0, self.sums_KE),
            squares_KE=np.where(gone_E, 0.0, self.squares_KE),
        )

    def mean(self, k: int, *, least: int) -> Floats:
        """Of the clipped excess in window `k`; NaN where fewer than `least` steps are known."""
        known_E = self.known_KE[k]
        return np.where(known_E >= least, self.sums_KE[k] / np.maximum(known_E, 1), np.nan)

    def variance(self, k: int) -> Floats:
        """From step to step, within window `k`."""
        known_E = np.maximum(self.known_KE[k], 1)
        variance_E: Floats = self.squares_KE[k] / known_E - (self.sums_KE[k] / known_E) ** 2
        return np.maximum(variance_E, 0.0)

    def last(self, k: int, places: Ints) -> npt.NDArray[np.float32]:
        """The excesses of some things in window `k`, unclipped: a row a step, a column a thing."""
        if not len(places) or not self.rows:
            return np.empty((0, len(places)), np.float32)
        return np.stack([row[places] for row in self.rows[-self.windows[k] :]])


def _clipped(row: Row, clip: float) -> tuple[Bools, Floats]:
    is_known_E = ~np.isnan(row)
    return is_known_E, np.where(is_known_E, np.clip(row, -clip, clip), 0.0).astype(np.float64)


def sigma(values: Floats) -> float:
    """How far healthy ones are apart: robust, whatever up to half of them do. NaN are left out."""
    own = values[~np.isnan(values)]
    return MAD_TO_SIGMA * float(np.median(np.abs(own - np.median(own)))) if len(own) else np.nan


def places_by(key_E: Ints) -> list[Ints]:
    """The places of each key; keys are small numbers from 0 on."""
    if not len(key_E):
        return []
    keys = np.flatnonzero(np.bincount(key_E)).tolist()
    if len(keys) == 1:
        return [np.arange(len(key_E))]
    return [np.flatnonzero(key_E == key) for key in keys]


def lookup(id_E: Ints, wanted: Ints) -> tuple[Ints, Bools]:
    """The place of each wanted number in `id_E`, which ascends, and whether it is there."""
    if not len(id_E):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    first, span = int(id_E[0]), int(id_E[-1] - id_E[0]) + 1
    if span > 8 * len(id_E) + 1024:
        place = np.minimum(np.searchsorted(id_E, wanted), len(id_E) - 1)
        return place, id_E[place] == wanted
    table = np.full(span, -1)  # several times as fast as a search, where numbers lie close
    table[id_E - first] = np.arange(len(id_E))
    inside = (wanted >= first) & (wanted < first + span)
    place = np.where(inside, table[np.where(inside, wanted - first, 0)], -1)
    return np.maximum(place, 0), place >= 0
