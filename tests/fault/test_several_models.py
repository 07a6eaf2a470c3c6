"""Several models trained in turn: each ends as a job of its own would, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.core.config import JobConfig
from elastic.core.runs import RunFolder
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

NUM_STEPS = 12
MODELS: list[dict[str, Any]] = [
    {},
    {"seed": 5},
    {"task_args": {"lr": 0.01, "width": 128}},
]


def several(name: str, **settings: Any) -> JobConfig:
    return make_job(name, steps=NUM_STEPS, models=MODELS, **settings)


@pytest.fixture(scope="module")
def alone(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """What each model gives as a job of its own, on one worker that nothing happens to."""
    job, folder = several("alone"), tmp_path_factory.mktemp("alone")
    return [
        outcome(run_job(job.of_model(one), run_dir=folder / str(one))) for one in range(len(MODELS))
    ]


def outcomes(result: Result) -> list[Outcome]:
    return [outcome(one) for one in result.models]


def test_each_model_ends_as_a_job_of_its_own_would(alone: list[Outcome], tmp_path: Path) -> None:
    result = run_job(several("several", workers=2), run_dir=tmp_path / "run")
    assert outcomes(result) == alone
    assert len({one.params_sha256 for one in alone}) == len(MODELS)
    steps = RunFolder(tmp_path / "run").read_metrics()
    assert [(one["step"], one["model"]) for one in steps] == [
        (step, step % len(MODELS)) for step in range(NUM_STEPS * len(MODELS))
    ]


def test_no_fault_changes_what_any_of_them_computes(alone: list[Outcome], tmp_path: Path) -> None:
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "kill", "at": {"step": 5, "point": "after_grant"}, "target": "worker-1"},
            {"do": "kill_aggregator", "at": {"step": 10, "point": "after_grant"}},
            {"do": "add_worker", "at": {"step": 14}},
            {"do": "kill_aggregator", "at": {"step": 19, "point": "mid_update"}},
            {"do": "stop", "at": {"step": 22}, "target": "worker-2", "for_s": 1.0},
            {"do": "kill_aggregator", "at": {"step": 26, "point": "after_flip"}},
        ],
    )
    job = several("disturbed", workers=3, spare=1, standby=True, checkpoint={"every": 5})
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcomes(result) == alone
    check_faults_fired(result, faults)
    happened = {"worker_lost", "worker_joined", "aggregator_took_over", "checkpoint_written"}
    assert happened <= set(kinds(result))
