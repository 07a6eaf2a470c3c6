"""Who goes and comes again and again: more often than chance explains, given how often others do.

Pure: the departures of some time arrive in the view.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from policies.verdicts import Culprit, Kind, Verdict


@dataclass(frozen=True, slots=True)
class Departure:
    """At this time a worker or node was lost without being asked to go, or a link broke."""

    time_s: float
    step: int
    culprit: Culprit


@dataclass(frozen=True, slots=True)
class DeparturesView:
    """`departures` of the last `window_s` at least. `num_alike`: how many there are that could have
    been the culprit, of each type: workers, nodes or links."""

    now_s: float
    departures: Sequence[Departure]
    num_alike: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flapping:
    """At least `least` departures within the window, so many that chance gives them to one of all
    with a probability of at most `chance`, all having left as often as the others do.

    A worker's number is never used again: for workers, name the node or the slot that they had.
    """

    window_s: float = 3600.0
    least: int = 3
    chance: float = 5e-3

    def decide(self, view: DeparturesView) -> list[Verdict]:
        """Who flaps now."""
        recent = [one for one in view.departures if view.now_s - one.time_s <= self.window_s]
        counts = Counter(one.culprit for one in recent)
        verdicts = []
        for culprit, num in counts.items():
            same = sum(n for other, n in counts.items() if type(other) is type(culprit))
            others = max(view.num_alike - 1, 1)
            # One more than was seen: none at all in an hour does not mean never.
            usual = (same - num + 1) / (others + 1)
            chance = min(1.0, view.num_alike * poisson_tail(num, usual))
            if num >= self.least and chance <= self.chance:
                own = [one.step for one in recent if one.culprit == culprit]
                verdicts.append(_verdict(culprit, num, usual, chance, min(own), self.window_s))
        return verdicts


def _verdict(
    culprit: Culprit, num: int, usual: float, chance: float, since_step: int, window_s: float
) -> Verdict:
    return Verdict(
        kind=Kind.FLAPPING,
        culprit=culprit,
        since_step=since_step,
        confidence=1 - chance,
        reason=(
            f"{culprit} left {num} times within {window_s:.0f} s; others did {usual:.2g} times on"
            f" average (by chance: {chance:.1g})"
        ),
        evidence={"departures": num, "usual": usual, "chance": chance, "window_s": window_s},
    )


def poisson_tail(num: int, mean: float) -> float:
    """The probability of `num` or more events where `mean` are expected."""
    below = sum(mean**k / math.factorial(k) for k in range(num)) * math.exp(-mean)
    return max(0.0, 1 - below)
