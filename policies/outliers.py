"""Which of many alike are slower than the rest, for good: means over windows, and m of n votes.

The limit calibrates itself: it lies `sigmas` times as far out as healthy ones differ, by chance or
for ever, and never below `min_excess`. A short window finds large faults soon, a long one small
ones in noise. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.signals import Bools, Floats, Ints
from policies.windows import History, sigma

NUM_SAMPLED = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Of each thing: whether it is off, the limit, and its mean excess in the shortest window.

    `by_E`: the window that says so.
    """

    is_off_E: Bools
    excess_E: Floats
    limit_E: Floats
    by_E: Ints


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is off: the median excess in the window that says so, and its bad steps."""

    place: int
    excess: float
    limit: float
    votes: int
    known: int
    since_step: int

    @property
    def confidence(self) -> float:
        """The chance that the next step is bad, too: Laplace's rule of succession."""
        return (self.votes + 1) / (self.known + 2)

    @property
    def evidence(self) -> dict[str, float]:
        return {
            "excess_ratio": self.excess,
            "limit_ratio": self.limit,
            "bad_steps": self.votes,
            "steps": self.known,
        }

    def __str__(self) -> str:
        return (
            f"since step {self.since_step}: in {self.votes} of {self.known} steps"
            f" (limit {self.limit:.0%})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """Off: by more than the limit in mean and median of a window, and in `votes` of its steps by
    half of it. No longer off: less than half of `min_excess` in the mean of the shortest window.
    """

    min_excess: float = 0.15
    max_apart: float = 0.4
    """Lasting differences among peers widen the limit so far; beyond, they are no peers."""
    sigmas: float = 7.0
    steps: tuple[int, ...] = (10, 40)
    votes: float = 0.65
    """A share of the window: 7 of 10, 26 of 40."""

    @property
    def vote(self) -> float:
        """An excess from which on a step may belong to a fault."""
        return self.min_excess / 2

    def judge(
        self,
        history: History,
        peers: Sequence[Ints],
        *,
        scatter_E: Floats | None = None,
        is_sick_E: Bools | None = None,
        patient: bool = False,
    ) -> Judged:
        """Whatever is off now. `peers`: places of things that are compared with each other.

        `scatter_E`: how many times as much as its peers each one varies from step to step.
        `is_sick_E`: known to be no healthy peer, beside those with a verdict.
        `patient`: the shortest window alone says too little.
        """
        scatter_E = np.ones(len(history.id_E)) if scatter_E is None else scatter_E
        is_sick_E = history.is_open_E if is_sick_E is None else history.is_open_E | is_sick_E
        healthy = [healthy_of(places, is_sick_E) for places in peers]
        short_E = history.mean(0, least=self._least(0))
        limit_E = self._limits(history, 0, short_E, peers, healthy) * scatter_E
        is_off_E = self._are_off(history, 0, short_E, limit_E)
        if patient:
            is_off_E[:] = False
        is_off_E |= history.is_open_E & ~(short_E < self.vote)
        by_E = np.zeros(len(is_off_E), np.int64)
        for k in range(1, len(self.steps)):
            long_E = history.mean(k, least=self._least(k))
            limits_E = self._limits(history, k, long_E, peers, healthy) * scatter_E
            # What has ended is not off any more, however long it lasted.
            new_E = self._are_off(history, k, long_E, limits_E) & (short_E > self.vote) & ~is_off_E
            by_E[new_E], limit_E = k, np.where(new_E, limits_E, limit_E)
            is_off_E |= new_E
        return Judged(is_off_E, short_E, limit_E, by_E)

    def findings(self, history: History, judged: Judged) -> list[Finding]:
        """The numbers of everything that is off."""
        return [
            self.finding(history, judged, place)
            for place in np.flatnonzero(judged.is_off_E).tolist()
        ]

    def finding(self, history: History, judged: Judged, place: int) -> Finding:
        """The numbers of one of them."""
        k, limit = int(judged.by_E[place]), float(judged.limit_E[place])
        seen = history.last(k, np.array([place]))[:, 0]
        bad = seen[seen >= self.vote]
        since, begin = int(history.since_E[place]), history.step + 1 - len(seen)
        if not 0 <= since < begin and len(bad):
            since = begin + int(np.argmax(seen >= self.vote))
        return Finding(
            place=int(place),
            excess=float(np.median(bad)) if len(bad) else 0.0,
            limit=limit,
            votes=len(bad),
            known=int(np.count_nonzero(~np.isnan(seen))),
            since_step=since,
        )

    def _least(self, k: int) -> int:
        return int(np.ceil(self.votes * self.steps[k]))

    def _are_off(self, history: History, k: int, mean_E: Floats, limit_E: Floats) -> Bools:
        is_off_E = mean_E > limit_E
        places = np.flatnonzero(is_off_E)
        if len(places):
            last_SE = history.last(k, places)
            votes = np.count_nonzero(last_SE >= limit_E[places] / 2, axis=0)
            is_wide = np.nanmedian(last_SE, axis=0) > limit_E[places]
            is_off_E[places] = is_wide & (votes >= self._least(k))
        return is_off_E

    def _limits(
        self,
        history: History,
        k: int,
        mean_E: Floats,
        peers: Sequence[Ints],
        healthy: Sequence[Ints],
    ) -> Floats:
        """As far out as chance and lasting differences go; the larger of two estimates."""
        variance_E, limit_E = history.variance(k), np.full(len(mean_E), np.inf)
        for places, well in zip(peers, healthy, strict=True):
            known = sample(well[~np.isnan(mean_E[well])])
            if len(known):
                by_chance = float(np.sqrt(np.median(variance_E[known]) / self.steps[k]))
                apart = min(self.sigmas * sigma(mean_E[known]), self.max_apart)
                limit_E[places] = max(self.min_excess, self.sigmas * by_chance, apart)
        return limit_E


def healthy_of(places: Ints, is_sick_E: Bools) -> Ints:
    """Those that show what is usual: all but the sick, unless hardly anybody is well."""
    well = places[~is_sick_E[places]]
    return well if len(well) >= max(2, len(places) // 3) else places


def sample(places: Ints) -> Ints:
    """Some thousands of them, evenly spread: enough to tell how far all are apart."""
    return places[:: max(1, len(places) // NUM_SAMPLED)]
