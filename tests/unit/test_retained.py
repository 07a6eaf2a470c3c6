"""What is known of the checkpoints that a run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.core.checkpoint import META_FILE, write_checkpoint
from elastic.core.config import CheckpointConfig
from elastic.core.errors import ConfigError
from elastic.core.retained import check_metric, kept_checkpoints, metrics_at, retention
from elastic.core.runs import RunFolder
from elastic.core.storage import LocalStorage
from policies.retention import LastAndBest


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was evaluated after steps 10 and 20, the latter twice."""
    run = RunFolder(tmp_path)
    run.create()
    for step, loss, accuracy in ((10, 0.7, 0.6), (20, 9.9, 0.1), (20, 0.4, None)):
        run.append_evaluation({"step": step, "loss": loss, "metrics": {"accuracy": accuracy}})
    return run


def write(run: RunFolder, step: int, **metrics: float) -> None:
    write_checkpoint(
        LocalStorage(run.checkpoints),
        step=step,
        weights={"w": torch.ones(1)},
        state={},
        meta={"metrics": metrics},
    )


def kept(run: RunFolder, **config: Any) -> list[tuple[str, dict[str, float]]]:
    found = kept_checkpoints(str(run.checkpoints), run, CheckpointConfig(**config))
    return [(Path(path).name, metrics) for path, metrics in found]


def test_what_is_known_of_a_step(run: RunFolder) -> None:
    known = metrics_at(run, 10, {"loss": 0.5, "grad": float("inf"), "none": None})
    assert known == {"loss": 0.5, "eval.loss": 0.7, "eval.accuracy": 0.6}
    assert metrics_at(run, 20, {"loss": 0.5}) == {"loss": 0.5, "eval.loss": 0.4}
    assert metrics_at(run, 15, {}) == {}


def test_without_a_metric_the_newest_comes_first(run: RunFolder) -> None:
    write(run, 10, loss=0.1)
    write(run, 30, loss=0.3)
    assert kept(run) == [
        ("step-00000030", {"loss": 0.3}),
        ("step-00000010", {"loss": 0.1, "eval.loss": 0.7, "eval.accuracy": 0.6}),
    ]


def test_the_best_come_first_also_by_what_came_after_the_checkpoint(run: RunFolder) -> None:
    for step in (10, 20, 30):
        write(run, step, loss=1.0 / step)
    names = [name for name, _ in kept(run, keep_best=2, metric="eval.loss")]
    assert names == ["step-00000020", "step-00000010", "step-00000030"]
    names = [name for name, _ in kept(run, keep_best=1, metric="loss", mode="max")]
    assert names == ["step-00000010", "step-00000020", "step-00000030"]


def test_a_damaged_one_is_not_listed(run: RunFolder) -> None:
    write(run, 10)
    write(run, 20)
    meta = run.checkpoints / "step-00000020" / META_FILE
    meta.write_text(json.dumps({"meta": {}}))
    assert [name for name, _ in kept(run)] == ["step-00000010"]


def test_the_policy_is_what_the_job_says() -> None:
    config = CheckpointConfig(keep_last=2, keep_best=1, mode="max")
    assert retention(config) == LastAndBest(keep_last=2, keep_best=1, mode="max")


@pytest.mark.parametrize(
    ("metric", "evaluated", "message"),
    [
        ("accuracy", ["f1"], "got 'accuracy'; this job knows loss, top5, eval.loss, eval.f1"),
        ("eval.top5", ["f1"], "got 'eval.top5'; this job knows"),
        ("eval.loss", None, "got 'eval.loss'; this job knows loss, top5; set evaluate.every"),
    ],
)
def test_a_metric_that_will_never_be_known_is_refused(
    metric: str, evaluated: list[str] | None, message: str
) -> None:
    config = CheckpointConfig(keep_best=1, metric=metric)
    with pytest.raises(ConfigError, match=message):
        check_metric(config, ["top5"], evaluated)
    check_metric(CheckpointConfig(metric=metric), ["top5"], evaluated)


@pytest.mark.parametrize("metric", ["loss", "top5", "eval.loss", "eval.f1"])
def test_a_metric_that_the_job_has_is_accepted(metric: str) -> None:
    check_metric(CheckpointConfig(keep_best=1, metric=metric), ["top5"], ["f1"])
