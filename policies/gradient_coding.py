"""What is done about stragglers: a fixed scheme, or `auto`, which measures and chooses.

`auto` probes some rounds that count like all others, fits how delays go with the load, simulates
the candidates on what it has seen and takes the fastest; after twice as many rounds, or when rounds
take other than expected, it does so again. Pure: rounds come in with the view, the plan goes out
with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.coding.codes import Floats
from policies.coding.delays import Delays
from policies.coding.m_sgc import MSgc
from policies.coding.measuring import Measured, Seen, load_model, measure
from policies.coding.simulation import (
    Coded,
    Dropping,
    Frc,
    Minimal,
    Scheme,
    Speculation,
    Uncoded,
    delay_of,
    simulate,
)
from policies.coding.sr_sgc import SrSgc
from policies.dropping import ErasureHead

PROBE_COPIES = (1, 1, 2, 1, 1, 4, 1, 1, 2, 1)
"""How many workers compute each part in the rounds of the probe."""
HEAVY = 1.3
"""If twice the load takes so much longer, more of it is not probed: it would cost too much."""
MIN_ROUNDS = 80
"""Rounds that each candidate is simulated for, at least."""
MEMORY = 200
"""Rounds that a choice looks back on, as long as nothing has changed."""
SIMPLER = 1.01
"""A simpler scheme is taken if it is slower by no more than this."""
LOYAL = 1.03
"""A choice is kept as long as no other is expected to be faster by more than this."""
DRIFT = 1.5
"""A choice is reconsidered if rounds take so many times longer or shorter than expected."""
DRIFT_ROUNDS = 10
FACTORS = (1.25, 1.5, 2.0)
COPIES = (2, 3, 4, 5, 6, 8, 10, 13, 16, 22, 32)
PATIENCES = (0.25, 1.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next rounds run, and how long they are expected to take; unknown in a probe."""

    scheme: Scheme
    closing: Minimal
    reason: str
    expected: Expected | None = None

    @property
    def is_probe(self) -> bool:
        return self.expected is None


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds of a round, simulated."""

    mean_s: float
    median_s: float


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """`seen` holds all rounds so far, the latest last. In a probe nobody's work is abandoned.

    `current` is what was followed last, since `num_since` rounds.
    """

    num_workers: int
    seen: Seen
    seed: int
    current: Plan | None = None
    num_since: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """Chosen by measurement; `models` are trained in turn, so many rounds a gradient may take."""

    models: int = 1
    kind: Literal["auto"] = "auto"

    def surprise(self, view: View) -> str:
        """Whether the latest rounds were other than expected: "", "mean" or "median".

        A mean that is off may be chance, or delays that had never been seen; with the median off,
        the pattern has changed, and what was seen before says little of what is now.
        """
        expected = view.current.expected if view.current is not None else None
        return surprise(view.seen.ends_R, expected, view.num_since)

    def is_due(self, view: View) -> bool:
        """Whether to decide: in a probe, after twice as many rounds, or after a surprise."""
        if view.current is None or view.current.is_probe:
            return True
        return len(view.seen) >= 2 * (len(view.seen) - view.num_since) or bool(self.surprise(view))

    def decide(self, view: View) -> Plan:
        """The scheme that is fastest on what the latest rounds have shown."""
        if len(view.seen) < len(PROBE_COPIES):
            return self._probe(view)
        dice = np.random.default_rng(view.seed)
        memory = 2 * DRIFT_ROUNDS if self.surprise(view) == "median" else MEMORY
        measured = measure(view.seen, 1 / view.num_workers, dice).last(memory)
        delays = measured.delays(max(MIN_ROUNDS, len(measured.seconds_RN)), dice)
        tried = {
            candidate: _expect(*candidate, delays)
            for candidate in self.candidates(view.num_workers)
        }
        fastest_s = min(one.mean_s for one in tried.values())
        chosen = next(one for one, found in tried.items() if found.mean_s <= SIMPLER * fastest_s)
        if view.current is not None and not view.current.is_probe:
            current = view.current.scheme, view.current.closing
            if current in tried and tried[current].mean_s <= LOYAL * fastest_s:
                chosen = current
        return Plan(*chosen, _explain(chosen[0], measured, tried), tried[chosen])

    def _probe(self, view: View) -> Plan:
        done = len(view.seen)
        copies = min(PROBE_COPIES[done], view.num_workers)
        if copies > 2:
            model = load_model(view.seen)
            base = 1 / view.num_workers
            if model.typical_s(2 * base) > HEAVY * model.typical_s(base):
                copies = 1
        scheme: Scheme = Speculation() if copies == 1 else Frc(stragglers=copies - 1)
        reason = f"probe {done + 1} of {len(PROBE_COPIES)}, at {copies} times the load of uncoded"
        return Plan(scheme, Minimal(), reason)

    def candidates(self, num_workers: int) -> Iterator[tuple[Scheme, Minimal]]:
        """What is tried, the simplest first.

        Codes of one round other than frc are never faster where workers are alike: with the same s
        they compute as much, and wait for any n-s answers where frc waits for one of each group.
        """
        once = Minimal()
        yield Uncoded(), once
        for factor in FACTORS:
            yield Speculation(factor=factor), once
        groups = {num_workers // copies: copies for copies in reversed(COPIES)}
        for num_groups, copies in sorted(groups.items(), reverse=True):
            if num_groups:
                yield Frc(stragglers=copies - 1), once
        for window in range(2, self.models + 1):
            for burst in range(1, min(window, self.models - window + 2)):
                for distinct in sorted({num_workers, max(1, num_workers // 8)}):
                    for patience in PATIENCES:
                        scheme = MSgc(burst=burst, window=window, distinct=distinct)
                        yield scheme, Minimal(patience=patience)


def surprise(ends_R: Floats, expected: Expected | None, num_since: int) -> str:
    """Whether the latest of these rounds were other than expected: see `Auto.surprise`."""
    if expected is None or num_since < DRIFT_ROUNDS:
        return ""
    recent_R = ends_R[-DRIFT_ROUNDS:]
    if not 1 / DRIFT < float(np.median(recent_R)) / expected.median_s < DRIFT:
        return "median"
    return "" if float(recent_R.mean()) < DRIFT * expected.mean_s else "mean"


StragglerPolicy = Auto | Uncoded | Speculation | Frc | Coded | SrSgc | MSgc
"""The registry: a policy is picked by its `kind`."""


def named(scheme: Scheme) -> str:
    """The scheme and its parameters in words."""
    match scheme:
        case Frc():
            return f"frc with s={scheme.stragglers}"
        case Coded():
            return f"{scheme.kind} with s={scheme.stragglers}"
        case Dropping():
            return f"drop_compute/{scheme.num_each} (inexact)"
        case ErasureHead():
            return f"erasure_head/{scheme.stragglers}/{scheme.wait_for} (inexact)"
        case Speculation():
            return f"speculation at {scheme.factor:g} times the median"
        case SrSgc() | MSgc():
            inner = " (frc inside)" if isinstance(scheme, MSgc) and scheme.inner == "frc" else ""
            return f"{scheme.kind} ({scheme.burst}, {scheme.window}, {scheme.distinct}){inner}"
        case _:
            return scheme.kind


def _expect(scheme: Scheme, closing: Minimal, delays: Delays) -> Expected:
    """Without the rounds in which a sequential scheme begins and ends."""
    warm_up = delay_of(scheme)
    run = simulate(scheme, delays, delays.num_rounds - warm_up, closing=closing)
    rounds_R = run.rounds_R[warm_up : delays.num_rounds - warm_up]
    return Expected(float(rounds_R.mean()), float(np.median(rounds_R)))


def _explain(
    chosen: Scheme, measured: Measured, tried: Mapping[tuple[Scheme, Minimal], Expected]
) -> str:
    best_s: dict[str, float] = {}
    for (scheme, _), found in tried.items():
        best_s[scheme.kind] = min(found.mean_s, best_s.get(scheme.kind, found.mean_s))
    took_s = min(found.mean_s for (scheme, _), found in tried.items() if scheme == chosen)
    num_rounds = len(measured.seconds_RN)
    others = ", ".join(f"{kind} {best:.3g}" for kind, best in best_s.items() if kind != chosen.kind)
    return (
        f"{named(chosen)}: {took_s:.3g} s a round simulated, {others}; of a task's time "
        f"{measured.model.fixed_share(measured.load):.0%} does not shrink with its load, "
        f"{measured.straggler_rate:.1%} of answers straggle (last {num_rounds} rounds)"
    )
