"""Inexact policies on real workers: no step waits for who is late, and the result says so."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from elastic.core.runs import RunFolder
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

PATIENT = {
    "a deadline that never comes": {"kind": "drop_compute", "deadline_s": 3600.0},
    "more workers than there are": {"kind": "erasure_head", "stragglers": 1, "wait_for": 4},
}


@pytest.mark.parametrize("policy", PATIENT)
def test_what_drops_nothing_is_the_exact_run_and_does_not_claim_it(
    policy: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    kill = {"do": "kill", "at": {"step": 4, "point": "before_compute"}, "target": "worker-1"}
    np.savez(tmp_path / "calm.npz", dur=np.full((1, 4), 0.15))  # so that it is there in time
    calm = {"do": "delays", "trace": str(tmp_path / "calm.npz")}
    faults = write_faults(tmp_path / "faults.yaml", [kill, calm])
    job = make_job("patient", workers=3, steps=NUM_STEPS, stragglers=PATIENT[policy])
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    check_faults_fired(result, faults)
    assert outcome(result) == undisturbed
    assert result.metrics["dropped_micro_batches"] == 0
    assert not result.exact, "another time it may drop something"
    (told,) = [one["reason"] for one in result.events if one["kind"] == "inexact"]
    assert PATIENT[policy]["kind"] in str(told)


def test_a_step_does_not_wait_for_who_is_late(tmp_path: Path) -> None:
    """Worker 1 sleeps for an hour in each step; worker 0 alone would need 1.6 s for all of it. An
    aggregator that takes over within a step goes on with what its predecessor had granted."""
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "slow", "at": {"step": 0}, "target": "worker-1", "sleep_s": 3600.0},
            {"do": "kill_aggregator", "at": {"step": 5, "point": "mid_update"}},
        ],
    )
    job = make_job(
        "late",
        workers=2,
        steps=12,
        standby=True,
        task="tests.integration.tasks:TakesTime",
        task_args={"layer_s": 0.05},
        stragglers={"kind": "drop_compute", "deadline_s": 0.7},
        audit=1e-9,
    )
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    check_faults_fired(result, faults)
    assert {"inexact", "aggregator_took_over"} <= set(kinds(result))
    assert not result.exact
    assert result.path is not None
    lines = RunFolder(result.path).read_metrics()
    dropped = [line["num_dropped"] for line in lines]
    assert all(0 < num < 8 for num in dropped[6:]), dropped
    assert all(line["samples"] == (8 - line["num_dropped"]) * 16 for line in lines[6:])
    assert sum(dropped) <= result.metrics["dropped_micro_batches"]
    assert statistics.median(line["step_s"] for line in lines[6:]) < 1.4


def test_erasure_head_ends_a_step_with_its_first_workers(tmp_path: Path) -> None:
    """Two of three sleep for an hour, one for which all copies are: their shares are lost, but for
    what the third one has done besides its own."""
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "slow", "at": {"step": 0}, "target": f"worker-{one}", "sleep_s": 3600.0}
            for one in (1, 2, 3)
        ],
    )
    job = make_job(
        "erased",
        workers=4,
        steps=10,
        task="tests.integration.tasks:TakesTime",
        task_args={"layer_s": 0.02},
        stragglers={"kind": "erasure_head", "stragglers": 1, "wait_for": 1},
    )
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert not result.exact
    assert result.path is not None
    lines = RunFolder(result.path).read_metrics()
    together = [line["num_dropped"] for line in lines if line["num_workers"] == 4]
    assert any(num == 4 for num in together), "one of two shares of four"
    assert all(num <= 4 for num in together), together
