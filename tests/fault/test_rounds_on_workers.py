"""Several models in rounds of a sequential code: each ends as a job of its own would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.core.config import JobConfig
from elastic.result import Result
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

NUM_STEPS = 24
MODELS: list[dict[str, Any]] = [{}, {"seed": 5}, {"task_args": {"lr": 0.01, "width": 128}}]
SCHEMES: dict[str, dict[str, Any]] = {
    "sr_sgc": {"kind": "sr_sgc", "burst": 1, "window": 2, "distinct": 2},
    "m_sgc": {"kind": "m_sgc", "burst": 1, "window": 2, "distinct": 4},
    "m_sgc with frc inside": {"kind": "m_sgc", "burst": 1, "window": 3, "distinct": 3},
}


def several(name: str, scheme: str, **settings: Any) -> JobConfig:
    num_parts = 9 if "frc" in scheme else 8
    batch = {"micro_batches": num_parts, "micro_batch_size": 16}
    return make_job(name, steps=NUM_STEPS, models=MODELS, batch=batch, **settings)


_ALONE: dict[int, list[Outcome]] = {}


def alone(scheme: str, folder: Path) -> list[Outcome]:
    """What each model gives as a job of its own, on one worker that nothing happens to."""
    job = several("alone", scheme)
    num = job.batch.micro_batches
    if num not in _ALONE:
        _ALONE[num] = [
            outcome(run_job(job.of_model(one), run_dir=folder / f"alone-{one}"))
            for one in range(len(MODELS))
        ]
    return _ALONE[num]


def told(result: Result) -> list[str]:
    return [str(one["reason"]) for one in result.events if one["kind"] == "scheduling"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_fault_changes_what_any_of_them_computes(scheme: str, tmp_path: Path) -> None:
    """A tenth of a second more for a worker in six; a kill, a join, and two successors."""
    dice = np.random.default_rng(0)
    seconds_RN = np.where(dice.random((NUM_STEPS * len(MODELS), 4)) < 1 / 6, 0.15, 0.05)
    np.savez(tmp_path / "delays.npz", dur=seconds_RN)
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "delays", "trace": str(tmp_path / "delays.npz")},
            {"do": "kill", "at": {"step": 30, "point": "after_encode"}, "target": "worker-1"},
            {"do": "kill_aggregator", "at": {"step": 40, "point": "after_grant"}},
            {"do": "remove_worker", "at": {"step": 50}, "target": "worker-0"},
            {"do": "add_worker", "at": {"step": 52}},
            {"do": "kill_aggregator", "at": {"step": 62, "point": "mid_update"}},
        ],
    )
    stragglers = SCHEMES[scheme]
    job = several("rounds", scheme, workers=4, spare=1, standby=True, stragglers=stragglers)
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert [outcome(one) for one in result.models] == alone(scheme, tmp_path)
    check_faults_fired(result, faults)
    assert {"worker_lost", "worker_joined", "aggregator_took_over"} <= set(kinds(result))
    assert any("rounds of 4 workers" in one for one in told(result)), told(result)


def test_who_never_answers_is_given_up_and_begins_the_next_round(tmp_path: Path) -> None:
    """It sleeps for an hour, in a third of the rounds: its sleep ends with each of them."""
    np.savez(tmp_path / "calm.npz", dur=np.full((1, 4), 0.05))  # so that all are there in time
    slow = {"do": "slow", "at": {"step": 12}, "target": "worker-1", "sleep_s": 3600.0}
    calm = {"do": "delays", "trace": str(tmp_path / "calm.npz")}
    faults = write_faults(tmp_path / "faults.yaml", [{**slow, "probability": 0.3}, calm])
    job = several("never", "m_sgc", workers=4, stragglers=SCHEMES["m_sgc"])
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert [outcome(one) for one in result.models] == alone("m_sgc", tmp_path)
    assert any("rounds of 4 workers" in one for one in told(result)), told(result)
    assert "worker_lost" not in kinds(result)
