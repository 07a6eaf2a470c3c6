"""The promise: what happens to workers, aggregator and coordinator changes no bit of the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.core.faults import AGGREGATOR_POINTS, WORKER_POINTS
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import (
    Outcome,
    check_faults_fired,
    kinds,
    make_job,
    outcome,
    run_job,
    write_faults,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]


def test_a_run_with_every_kind_of_fault_equals_the_undisturbed_one(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "kill", "at": {"step": 3, "point": "after_grant"}, "target": "worker-1"},
            {"do": "nan_gradient", "at": {"step": 5}, "target": "worker-0"},
            {"do": "kill_coordinator", "at": {"step": 6}},
            {"do": "stop", "at": {"step": 7}, "target": "worker-2", "for_s": 1.0},
            {"do": "slow", "at": {"step": 8}, "target": "worker-0", "factor": 2.0, "for_s": 1.0},
            {"do": "stop_aggregator", "at": {"step": 9}},
            {"do": "add_worker", "at": {"step": 14}},
            {"do": "remove_worker", "at": {"step": 16}, "target": "worker-0"},
            {"do": "kill_aggregator", "at": {"step": 20, "point": "mid_update"}},
        ],
    )
    job = make_job(
        "disturbed",
        workers=3,
        spare=1,
        standby=True,
        steps=NUM_STEPS,
        checkpoint={"every": 10, "keep_last": 2},
    )
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)
    happened = {"worker_lost", "worker_joined", "worker_left", "nonfinite", "checkpoint_written"}
    happened |= {"aggregator_lost", "aggregator_took_over", "coordinator_restarted"}
    assert happened <= set(kinds(result))


@pytest.mark.parametrize("standby", [True, False], ids=["standby", "no standby"])
def test_an_aggregator_may_die_at_every_point(
    standby: bool, undisturbed: Outcome, tmp_path: Path
) -> None:
    """Workers die too, at the points of the worker and at those of the aggregator."""
    kills = [
        {"do": "kill_aggregator", "at": {"step": 6 + 4 * number, "point": point}}
        for number, point in enumerate(AGGREGATOR_POINTS)
    ]
    here = [*WORKER_POINTS, "after_row", "before_flip"] if standby else _OTHER_WORKER_KILLS
    kills += [
        {"do": "kill", "at": {"step": 3 + 4 * number, "point": point}, "target": f"worker-{number}"}
        for number, point in enumerate(here)
    ]
    faults = write_faults(tmp_path / "faults.yaml", kills)
    job = make_job("points", workers=3, standby=standby, steps=NUM_STEPS)
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)
    assert kinds(result).count("aggregator_took_over") >= standby
    assert kinds(result).count("worker_lost") == len(here)


_OTHER_WORKER_KILLS = ("step_start", "before_grant", "after_grant", "mid_update", "after_flip")
