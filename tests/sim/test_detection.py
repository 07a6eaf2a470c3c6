"""The fault detector on made-up fleets: what it finds, whom it never blames, what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elastic.core.simulator.fleet import FleetPlan, MadeUpFleet, random_faults
from elastic.core.simulator.judging import Judgement, judge
from policies.verdicts import Kind

COST_S = 0.02
"""Of a step at 10,000 workers; tests on a busy machine are given four times as much."""


def judged(num_workers: int, num_steps: int, *, every_s: float, seed: int) -> Judgement:
    plan = FleetPlan(num_workers=num_workers, seed=seed)
    faults = random_faults(plan, num_steps=num_steps, every_s=every_s)
    return judge(replace(plan, faults=faults), num_steps)


def test_mixed_and_simultaneous_faults_among_a_thousand_workers_are_found() -> None:
    seed = 7
    result = judged(1000, 400, every_s=20, seed=seed)
    print(f"seed {seed}: {result.confusion}")
    assert result.num_faults > 20
    assert {kind for kind, _ in result.confusion} >= {Kind.SLOW_LINK, Kind.SLOW_COMPUTATION}
    assert result.wrong == []
    assert result.recall >= 0.97
    large = [steps for one, steps in result.steps_to_verdict.items() if one.excess >= 0.5]
    assert np.median(large) <= 10


@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_is_blamed_in_a_healthy_fleet(seed: int) -> None:
    plan = FleetPlan(num_workers=1000, seed=seed, load_spread=0.5, join=1e-4)
    result = judge(plan, 300)
    assert [verdict.reason for _, verdict in result.wrong] == []


def test_ten_thousand_workers_cost_little() -> None:
    result = judged(10_000, 30, every_s=1, seed=3)
    assert np.median(result.cost_s) < 4 * COST_S


def test_a_seed_decides_everything() -> None:
    plan = FleetPlan(num_workers=64, seed=9)
    plan = replace(plan, faults=random_faults(plan, num_steps=90, every_s=5))
    first, again = (list(MadeUpFleet(plan).steps(30)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.computed.end_s_B, other.computed.end_s_B)
    other_plan = replace(plan, seed=10)
    assert random_faults(other_plan, num_steps=90, every_s=5) != plan.faults


def test_a_newcomer_has_a_new_number_and_the_order_stays() -> None:
    plan = FleetPlan(num_workers=64, seed=9, join=0.02)
    seen: set[int] = set()
    for view in MadeUpFleet(plan).steps(50):
        assert (np.diff(view.fleet.worker_W) > 0).all()
        seen |= set(view.fleet.worker_W.tolist())
        assert set(view.computed.worker_B.tolist()) <= set(view.fleet.worker_W.tolist())
    assert len(seen) > 64
