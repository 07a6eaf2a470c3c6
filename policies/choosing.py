"""`stragglers: auto` for jobs: which policy of `scheduling` makes steps the shortest.

Every step says when each worker answered first, and how long of that it was computing. So the share
of a task's time that does not shrink with its load is seen in any step, and probing costs nothing:
the first steps run the default policy. Then the policies are simulated, as they really lease, on
what was seen, and the fastest is taken; after twice as many steps, or when steps take other than
expected, again. Pure: steps come in with the view, the choice goes out with its reason.

Letters: R steps, N workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from policies.coding.codes import Floats
from policies.coding.delays import Delays
from policies.coding.leases import Step
from policies.coding.measuring import LoadModel, Measured, Seen, measure
from policies.gradient_coding import (
    COPIES,
    DRIFT_ROUNDS,
    LOYAL,
    MEMORY,
    SIMPLER,
    Expected,
    surprise,
)
from policies.scheduling import LEAST_S, Shares

PROBE_STEPS = 10
"""Steps before the first choice, under the default policy."""
MAX_ROUNDS = 40
WORK = 4000
"""Steps simulated for each candidate times workers times micro-batches, about; at most MAX_ROUNDS
and at least MIN_ROUNDS steps. A choice then takes tenths of a second."""
MIN_ROUNDS = 8
MAX_WORKERS = 16
MAX_SHARE = 4
"""More workers, or more micro-batches for each, are not simulated: fewer workers and larger
micro-batches stand for them. An aggregator that thinks for seconds is taken to hang."""
SLOW = 1.5
"""Times the fastest answer of a step, from which on slow workers are looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class StepsSeen:
    """Steps that were run, the latest last.

    `first_RN` is when each worker first answered, infinite if not before the end; `computing_RN`
    how long of that it was computing, NaN if not known; `ends_R` when all was there. Seconds from
    the beginning of the step.
    """

    first_RN: Floats
    computing_RN: Floats
    ends_R: Floats

    def __len__(self) -> int:
        return len(self.ends_R)

    def last(self, num: int) -> StepsSeen:
        """The latest steps."""
        return StepsSeen(self.first_RN[-num:], self.computing_RN[-num:], self.ends_R[-num:])


@dataclass(frozen=True, slots=True, eq=False)
class StepsView:
    """`current` is what was followed in the last `num_since` steps."""

    steps: StepsSeen
    num_micro_batches: int
    seed: int
    current: Choice | None = None
    num_since: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """What the next steps run, and how long they are expected to take; unknown in a probe."""

    policy: Shares
    reason: str
    expected: Expected | None = None


PROBE = Choice(Shares(), f"auto: speculation for {PROBE_STEPS} steps, then what they say")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Chosen by measurement, among what real workers can run."""

    kind: str = "auto"

    def is_due(self, view: StepsView) -> bool:
        """Whether to decide: after the probe, after twice as many steps, or after a surprise."""
        if len(view.steps) < PROBE_STEPS:
            return view.current is None
        if view.current is None or view.current.expected is None:
            return True
        if self.surprise(view):
            return True
        return view.num_since >= max(PROBE_STEPS, len(view.steps) - view.num_since)

    def surprise(self, view: StepsView) -> str:
        """Whether the latest steps were other than expected; with "median" only they still count:
        the pattern has changed."""
        expected = view.current.expected if view.current is not None else None
        return surprise(view.steps.ends_R, expected, view.num_since)

    def decide(self, view: StepsView) -> Choice:
        """The policy that is fastest on what the latest steps have shown."""
        if len(view.steps) < PROBE_STEPS:
            return PROBE
        steps = view.steps.last(DRIFT_ROUNDS if self.surprise(view) == "median" else MEMORY)
        dice = np.random.default_rng(view.seed)
        measured = measured_of(steps, view.num_micro_batches, dice)
        num_workers = steps.first_RN.shape[1]
        num = min(num_workers, MAX_WORKERS)
        work = num * min(view.num_micro_batches, MAX_SHARE * num)
        num_rounds = min(MAX_ROUNDS, WORK // work)
        delays = measured.delays(max(MIN_ROUNDS, num_rounds), dice)
        tried = {
            policy: expect(policy, delays, view.num_micro_batches)
            for policy in candidates(num_workers)
        }
        if view.current is not None and view.current.policy in tried:
            tried = _scaled(tried, view.current.policy, steps.ends_R[-max(1, view.num_since) :])
        chosen = _pick(tried, view.current)
        return Choice(chosen, _explain(chosen, measured, tried), tried[chosen])


def candidates(num_workers: int) -> Iterator[Shares]:
    """What is tried, the simplest first."""
    yield Shares(helps=False)
    yield Shares()
    groups = {num_workers // copies: copies for copies in reversed(COPIES)}
    for num_groups, copies in sorted(groups.items(), reverse=True):
        if num_groups:
            yield Shares(copies=copies)


def expect(policy: Shares, delays: Delays, num_micro_batches: int) -> Expected:
    """Simulated seconds of a step."""
    num_workers = min(delays.num_workers, MAX_WORKERS)
    per_worker = num_micro_batches / delays.num_workers
    num = max(1, round(num_workers * min(per_worker, MAX_SHARE)))
    size = per_worker * num_workers / num / num_micro_batches  # of one, as a share of the batch
    fixed_RN, costs_RN = delays.fixed_RN[:, :num_workers], size * delays.rate_RN[:, :num_workers]
    pace_s = float(np.median(fixed_RN)) * num_workers / num + float(np.median(costs_RN))
    rounds_R = [
        Step(policy, num, fixed_N, costs_N, pace_s).run()
        for fixed_N, costs_N in zip(fixed_RN, costs_RN, strict=True)
    ]
    return Expected(*(max(LEAST_S, float(one)) for one in (np.mean(rounds_R), np.median(rounds_R))))


def measured_of(steps: StepsSeen, num_micro_batches: int, dice: np.random.Generator) -> Measured:
    """How long workers would have taken, each for an even share of the micro-batches.

    What was not answered before the end of its step is drawn from what took longer, see `measure`.
    """
    num_workers = steps.first_RN.shape[1]
    per_worker = num_micro_batches / num_workers
    cost_s = _cost_s(steps)
    costs_RN = np.where(np.isnan(steps.computing_RN), cost_s, steps.computing_RN)
    seconds_RN = steps.first_RN + (per_worker - 1) * costs_RN
    seen = Seen(np.full_like(seconds_RN, 1 / num_workers), seconds_RN, steps.ends_R)
    fast_s = float(np.median(np.where(np.isfinite(seconds_RN), seconds_RN, np.inf).min(axis=1)))
    fixed_s = max(0.0, fast_s - per_worker * cost_s)
    rate_s = cost_s * num_micro_batches
    model = LoadModel(fixed_s, rate_s, _computes_slowly(steps, fast_s, cost_s))
    return replace(measure(seen, 1 / num_workers, dice), model=model)


def _cost_s(steps: StepsSeen) -> float:
    """Seconds of a micro-batch; a quarter of them took less: a slow worker is no measure."""
    known = steps.computing_RN[~np.isnan(steps.computing_RN)]
    return float(np.quantile(known, 0.25)) if len(known) else 0.0


def _computes_slowly(steps: StepsSeen, fast_s: float, cost_s: float) -> bool:
    """Whether who answers late has computed for longer, or only began later."""
    is_late_RN = np.isfinite(steps.first_RN) & ~np.isnan(steps.computing_RN)
    is_late_RN &= steps.first_RN > SLOW * steps.first_RN.min(axis=1, keepdims=True)
    if not is_late_RN.any() or not cost_s > 0:
        return False
    excess_s = steps.first_RN[is_late_RN] - fast_s
    excess_of_computing_s = steps.computing_RN[is_late_RN] - cost_s
    return float(excess_of_computing_s.sum()) > 0.5 * float(excess_s.sum())


def _scaled(
    tried: dict[Shares, Expected], current: Shares, ends_R: Floats
) -> dict[Shares, Expected]:
    """By what simulated steps are too short: they know of no messages, and of no shared cores."""
    ratio = float(ends_R.mean()) / tried[current].mean_s
    return {
        policy: Expected(ratio * found.mean_s, ratio * found.median_s)
        for policy, found in tried.items()
    }


def _pick(tried: dict[Shares, Expected], current: Choice | None) -> Shares:
    """The fastest; a simpler one if hardly slower, the present one if little slower."""
    fastest_s = min(one.mean_s for one in tried.values())
    if current is not None and current.expected is not None:
        stays_s = tried[current.policy].mean_s if current.policy in tried else np.inf
        if stays_s <= LOYAL * fastest_s:
            return current.policy
    return next(one for one, found in tried.items() if found.mean_s <= SIMPLER * fastest_s)


def _explain(chosen: Shares, measured: Measured, tried: dict[Shares, Expected]) -> str:
    others = ", ".join(
        f"{policy.name} {found.mean_s:.3g}" for policy, found in tried.items() if policy != chosen
    )
    return (
        f"auto: {chosen.name}: {tried[chosen].mean_s:.3g} s a step simulated, {others}; of a "
        f"task's time {measured.model.fixed_share(measured.load):.0%} does not shrink with its "
        f"load, {measured.straggler_rate:.1%} of answers straggle "
        f"(last {len(measured.seconds_RN)} steps)"
    )
