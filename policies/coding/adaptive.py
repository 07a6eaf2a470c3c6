"""A run under `auto` in virtual time: its probe, its choices and what they are based on included.

Letters: R rounds, N workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.coding.codes import Floats
from policies.coding.delays import Delays
from policies.coding.measuring import Seen
from policies.coding.simulation import Run, delay_of, simulate
from policies.gradient_coding import DRIFT_ROUNDS, Auto, Plan, View


@dataclass(frozen=True, slots=True, eq=False)
class AdaptiveRun:
    """Seconds of each round, and the plans with the round from which each was followed."""

    rounds_R: Floats
    plans: list[tuple[int, Plan]]

    @property
    def total_s(self) -> float:
        return float(self.rounds_R.sum())


def simulate_auto(auto: Auto, delays: Delays, num_gradients: int, *, seed: int = 0) -> AdaptiveRun:
    """Run `auto` over the delays; changing over from a sequential scheme waits for what is due."""
    num_workers = delays.num_workers
    none_RN = np.zeros((0, num_workers))
    view = View(num_workers, Seen(none_RN, none_RN, np.zeros(0)), seed)
    parts: list[Floats] = []
    plans: list[tuple[int, Plan]] = []
    done = 0
    while done < num_gradients:
        plan = auto.decide(view)
        plans.append((done, plan))
        num = 1 if plan.is_probe else min(num_gradients, 2 * done) - done
        run = _run(plan, delays, num, done)
        for row in range(DRIFT_ROUNDS, num - delay_of(plan.scheme)):
            if auto.surprise(_after(view, plan, run, row)):
                num = row
                run = _run(plan, delays, num, done)
                break
        parts.append(run.rounds_R)
        done += num
        view = _after(view, plan, run, len(run.rounds_R))
    return AdaptiveRun(np.concatenate(parts), plans)


def _run(plan: Plan, delays: Delays, num: int, begin: int) -> Run:
    return simulate(
        plan.scheme,
        delays,
        num,
        closing=plan.closing,
        first_round=begin,
        cancels=not plan.is_probe,
    )


def _after(view: View, plan: Plan, run: Run, num: int) -> View:
    """What is known after the first `num` rounds of a run."""
    rows = np.flatnonzero(run.loads_RN[:num].any(axis=1))  # in some of the last nobody had work
    new = Seen(run.loads_RN[rows], run.seconds_RN[rows], run.rounds_R[rows])
    return View(view.num_workers, view.seen.and_then(new), view.seed + num, plan, num)
