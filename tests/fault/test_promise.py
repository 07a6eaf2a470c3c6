"""The promise: what happens to workers, aggregator and coordinator changes no bit of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
            {"do": "stop", "at": {"step": 7}, "target": "worker-2", "for_s": 1.0},
            {"do": "slow", "at": {"step": 8}, "target": "worker-0", "factor": 2.0, "for_s": 1.0},
            {"do": "stop_aggregator", "at": {"step": 9}},
            {"do": "add_worker", "at": {"step": 14}},
            {"do": "remove_worker", "at": {"step": 16}, "target": "worker-0"},
            {"do": "kill_aggregator", "at": {"step": 20, "point": "mid_update"}},
            # last: who dies while none lives, before being a member, is told of by nobody
            {"do": "kill_coordinator", "at": {"step": 30}},
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
    # not "nonfinite": where the micro-batch was a duplicate, it may have come too late to be seen
    happened = {"worker_lost", "worker_joined", "worker_left", "checkpoint_written"}
    happened |= {"aggregator_lost", "aggregator_took_over", "coordinator_restarted"}
    assert happened <= set(kinds(result))


POINTS = {
    "with standby": (AGGREGATOR_POINTS, (*WORKER_POINTS, "after_row", "before_flip")),
    "alone": (
        ("before_grant", "after_grant", "mid_update", "after_flip"),
        ("step_start", "before_grant", "after_grant", "mid_update", "after_flip"),
    ),
}
"""Where aggregators die, one after the other, and where workers do."""


@pytest.mark.parametrize("case", POINTS)
def test_aggregators_and_workers_may_die_at_every_point(
    case: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    aggregator_points, worker_points = POINTS[case]
    kills: list[dict[str, Any]] = [
        {"do": "kill_aggregator", "at": {"step": 6 + 4 * number, "point": point}}
        for number, point in enumerate(aggregator_points)
    ]
    kills += [
        {"do": "kill", "at": {"step": 3 + 4 * number, "point": point}, "target": f"worker-{number}"}
        for number, point in enumerate(worker_points)
    ]
    faults = write_faults(tmp_path / "faults.yaml", kills)
    job = make_job("points", workers=3, standby=case != "alone", steps=NUM_STEPS)
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)
    assert kinds(result).count("aggregator_took_over") == len(aggregator_points)
    assert kinds(result).count("worker_lost") == len(worker_points)
