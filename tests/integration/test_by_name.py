"""A run is found by its name: one that ended early goes on, a finished one gives its result again.

Callbacks are told each step once, whatever happens on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.train import FailureConfig, RunConfig

from elastic import Callback, CSVLogger, ElasticTrainer, Result
from elastic.core.errors import CallbackError, ProcessError
from elastic.core.runs import RunFolder
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import TAG, Outcome, kinds, make_job, outcome
from tests.integration.tasks import Flaky

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]

FAIL_STEP = 12


class Told(Callback):
    """Remembers the steps, checkpoints and the end."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.checkpoints: list[str] = []
        self.ends: list[Result | None] = []

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.steps.append(metrics["step"])

    def on_checkpoint(self, path: str) -> None:
        self.checkpoints.append(path)

    def on_end(self, result: Result | None) -> None:
        self.ends.append(result)


class Raising(Callback):
    def on_step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == FAIL_STEP:
            raise ValueError("enough")


def trainer(folder: Path, *callbacks: Callback, name: str = "named", **more: Any) -> ElasticTrainer:
    config = RunConfig(
        name=name + TAG,
        storage_path=str(folder),
        callbacks=list(callbacks),
        failure_config=more.pop("failure_config", None),
    )
    job = make_job(name, steps=NUM_STEPS, checkpoint={"every": 10})
    return ElasticTrainer(more.pop("task", None), job=job, run_config=config, **more)


def test_a_run_goes_on_by_its_name(undisturbed: Outcome, tmp_path: Path) -> None:
    stale = RunFolder(tmp_path / f"named{TAG}")  # of a run that died before its first checkpoint
    stale.create()
    stale.write_json(stale.job_json, make_job("named", seed=7).model_dump(mode="json"))
    stale.append_metrics({"step": NUM_STEPS + 1, "time_s": 0.0})
    stale.close()

    first = Told()
    with pytest.raises(CallbackError, match=r"Raising\.on_step: ValueError: enough") as error:
        trainer(tmp_path, Raising(), first, CSVLogger()).fit()
    assert isinstance(error.value.__cause__, ValueError)
    stopped = stale.read_json(stale.result_json)
    assert stopped["outcome"] == "stopped"
    assert FAIL_STEP < stopped["steps"] < NUM_STEPS
    assert first.steps == list(range(stopped["steps"]))
    assert Path(first.checkpoints[-1]).name == f"step-{stopped['steps']:08d}"
    (ended,) = first.ends
    assert ended is not None
    assert ended.metrics["outcome"] == "stopped"

    second = Told()
    result = trainer(tmp_path, second, CSVLogger()).fit()
    assert outcome(result) == undisturbed
    assert second.steps == list(range(stopped["steps"], NUM_STEPS))
    assert second.ends == [result]
    table = (stale.path / "steps.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in table] == ["step", *map(str, range(NUM_STEPS))]

    third = Told()
    again = trainer(tmp_path, third).fit()
    assert outcome(again) == undisturbed
    assert again.events == result.events, "nothing was computed"
    assert third.ends == []

    longer = trainer(tmp_path, steps=NUM_STEPS + 5).fit()
    assert longer.metrics["steps"] == NUM_STEPS + 5
    assert kinds(longer).count("job_resumed") == 2


class Trouble(Told):
    """Makes the trouble at a step; it passes once the job has failed, if ever."""

    def __init__(self, path: Path, *, passes: bool) -> None:
        super().__init__()
        self._path, self._passes = path, passes

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        super().on_step(metrics)
        if metrics["step"] == FAIL_STEP:
            self._path.touch()

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "job_failed" and self._passes:
            self._path.unlink(missing_ok=True)


def test_a_job_that_failed_begins_again(undisturbed: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "away"
    told = Trouble(path, passes=True)
    task = Flaky(path=str(path))
    unlimited = FailureConfig(max_failures=-1)
    result = trainer(tmp_path, told, name="flaky", task=task, failure_config=unlimited).fit()
    assert outcome(result) == undisturbed
    assert told.steps == list(range(NUM_STEPS))
    assert kinds(result).count("job_resumed") >= 1


def test_without_a_budget_it_does_not(tmp_path: Path) -> None:
    path = tmp_path / "away"
    told = Trouble(path, passes=False)
    task = Flaky(path=str(path))
    with pytest.raises(ProcessError, match="OSError: the network is away"):
        trainer(tmp_path, told, name="flaky", task=task).fit()
    assert told.ends == [None]
    run = RunFolder(tmp_path / f"flaky{TAG}")
    assert [event["kind"] for event in run.read_events()].count("job_started") == 1
