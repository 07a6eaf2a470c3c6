"""Several models trained in turn: each ends as a job of its own would, whatever happens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from elastic.core.config import JobConfig
from elastic.core.errors import ConfigError, FatalError
from elastic.core.runs import RunFolder
from elastic.handle import connect
from elastic.result import Result
from tests.integration.support import (
    Once,
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


SLOW = {"do": "slow", "at": {"step": 0}, "target": "any", "sleep_s": 0.15, "probability": 0.95}
"""One worker in each step: or the first that is there would have done all before others come."""


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
            SLOW,
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


@pytest.mark.parametrize("kind", ["frc", "uncoded", "auto"])
def test_no_policy_changes_what_any_of_them_computes(
    kind: str, alone: list[Outcome], tmp_path: Path
) -> None:
    kill = {"do": "kill", "at": {"step": 8, "point": "after_encode"}, "target": "any"}
    faults = write_faults(tmp_path / "faults.yaml", [SLOW, kill])
    stragglers = {"kind": kind, "stragglers": 1 if kind == "frc" else 0}
    job = several(kind, workers=3, stragglers=stragglers, audit=0.2)
    assert outcomes(run_job(job, run_dir=tmp_path / "run", faults=faults)) == alone


def test_a_stopped_job_goes_on_with_each_model_from_its_newest_checkpoint(
    alone: list[Outcome], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    stop = Once(7, lambda status: connect(status.run_dir).stop())
    slow = {"do": "slow", "at": {"step": 0}, "target": "worker-0", "sleep_s": 0.1}
    faults = write_faults(tmp_path / "slow.yaml", [slow])
    job = several("stopped", workers=1, checkpoint={"every": 2})
    stopped = run_job(job, run_dir=run.path, faults=faults, on_status=stop)
    assert stopped.metrics["outcome"] == "stopped"
    assert 2 <= stopped.metrics["steps"] < NUM_STEPS
    newest = [one.checkpoint for one in stopped.models]
    assert newest[1] is not None
    shutil.rmtree(newest[1].path)  # so that this model has to catch up with the others
    with pytest.raises(ConfigError, match="models: the run was begun with"):
        run_job(make_job("stopped", models=2), run_dir=run.path, resume=True)
    result = run_job(job, run_dir=run.path, resume=True)
    told = [event["reason"] for event in result.events if event["kind"] == "job_resumed"]
    assert newest[0] is not None
    assert told[-1].startswith(f"from model 0: {newest[0].path}, model 1: ")
    # an evaluation of where it stopped is one more than there would have been
    assert [(one.params_sha256, one.samples_sha256) for one in outcomes(result)] == [
        (one.params_sha256, one.samples_sha256) for one in alone
    ]
    assert [one.series for one in outcomes(result)] == [one.series for one in alone]
    again = run_job(job, run_dir=run.path, resume=True)  # nothing is left to be done
    assert again.params_sha256 == result.params_sha256


def test_a_model_that_diverges_ends_alone_and_fails_the_job_at_its_end(
    alone: list[Outcome], tmp_path: Path
) -> None:
    models = [*MODELS[:2], {"task_args": {"broken": [7]}}]
    job = make_job("diverging", steps=NUM_STEPS, models=models)
    with pytest.raises(FatalError, match=r"model 2: step \d+, micro-batch \d: the loss or"):
        run_job(job, run_dir=tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    result = run.read_json(run.result_json)
    assert [one["outcome"] for one in result["models"]] == ["finished", "finished", "failed"]
    hashes = [one["params_sha256"] for one in result["models"]]
    assert hashes[:2] == [one.params_sha256 for one in alone[:2]]
