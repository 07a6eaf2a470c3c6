"""Callbacks: each step, evaluation, checkpoint and event is told once and in order."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ray.train import RunConfig

from elastic import Callback, CSVLogger, TensorBoardLogger
from elastic.callbacks import check_callbacks
from elastic.core.config import JobConfig
from elastic.core.errors import CallbackError, ConfigError
from elastic.core.runs import Lines, RunFolder
from elastic.follower import Follower
from elastic.result import Result

DOCS = Path(__file__).parents[2] / "docs" / "callbacks.md"
METHODS = ("on_start", "on_step", "on_evaluation", "on_checkpoint", "on_event", "on_end")


class Recorder(Callback):
    """Remembers what it was told; raises where asked to."""

    def __init__(self, raise_in: str = "") -> None:
        self.told: list[tuple[str, Any]] = []
        self._raise_in = raise_in

    def _record(self, method: str, value: Any) -> None:
        self.told.append((method, value))
        if method == self._raise_in:
            raise ValueError("no more")

    def on_start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        self._record("on_start", step)

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._record("on_step", metrics["step"])

    def on_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self._record("on_evaluation", evaluation["step"])

    def on_checkpoint(self, path: str) -> None:
        self._record("on_checkpoint", path)

    def on_event(self, event: Mapping[str, Any]) -> None:
        self._record("on_event", event["kind"])

    def on_end(self, result: Result | None) -> None:
        self._record("on_end", result)

    def of(self, method: str) -> list[Any]:
        return [value for told, value in self.told if told == method]


def a_step(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "time_s": 1000.0 + step,
        "step_s": 0.5,
        "loss": 4.0 / (step + 1),
        "grad_norm": 1.0,
        "lr": 0.1,
        "samples": 8,
        "num_workers": 2,
        "metrics": {"accuracy": 0.1 * step},
        "work": [],
    }


def an_evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "time_s": 1000.0, "loss": 1.5, "metrics": {"accuracy": 0.5}}


def an_event(kind: str, reason: str = "because") -> dict[str, Any]:
    return {"time_s": 1.0, "kind": kind, "step": 0, "worker": None, "reason": reason}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


@pytest.fixture
def job(make_job: Callable[..., JobConfig]) -> JobConfig:
    return make_job()


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = Lines(path)
    assert lines.read() == []
    path.write_bytes(b'{"a": 1}\n{"a"')
    assert lines.read() == [{"a": 1}]
    assert lines.read() == []
    with path.open("ab") as file:
        file.write(b': 2}\n{"torn\n{"a": 3}\n')
    assert lines.read() == [{"a": 2}, {"a": 3}]
    assert Lines(path, from_end=True).read() == []


def test_a_slow_driver_misses_nothing(run: RunFolder, job: JobConfig) -> None:
    told = Recorder()
    follower = Follower([told], run)
    run.append_metrics(a_step(0))  # of the run before
    follower.start(job, 1)
    for step in range(1, 4):
        run.append_metrics(a_step(step))
        run.append_event(an_event("worker_joined"))
    run.append_evaluation(an_evaluation(2))
    follower.poll()
    follower.poll()
    run.append_metrics(a_step(4))
    follower.end(None)
    assert told.of("on_step") == [1, 2, 3, 4]
    assert told.of("on_event") == ["worker_joined"] * 3
    assert told.of("on_evaluation") == [2]
    assert (told.told[0], told.told[-1]) == (("on_start", 1), ("on_end", None))


def test_a_step_computed_again_is_told_once(run: RunFolder, job: JobConfig) -> None:
    told = Recorder()
    follower = Follower([told], run)
    follower.start(job, 0)
    for step in (0, 1, 2, 1, 2, 3):  # the job failed after step 2, and began again at 1
        run.append_metrics(a_step(step))
        follower.poll()
    assert told.of("on_step") == [0, 1, 2, 3]


def test_models_that_overtake_each_other_are_told_of(run: RunFolder, job: JobConfig) -> None:
    told = Recorder()
    follower = Follower([told], run)
    follower.start(job, 0)
    for step in (0, 2, 1, 3, 2, 5, 4):
        run.append_metrics({**a_step(step), "model": step % 2})
        run.append_evaluation({**an_evaluation(step), "model": step % 2})
    follower.end(None)
    assert told.of("on_step") == [0, 2, 1, 3, 5, 4]
    assert told.of("on_evaluation") == [0, 2, 1, 3, 5, 4]


@pytest.mark.parametrize(
    "reason", ["step 50: {}", "the last one, step 50: {}"], ids=["on the way", "the last one"]
)
@pytest.mark.parametrize("path", ["/runs/a step 3/step-00000050", "s3://bucket/run/step-00000050"])
def test_checkpoints_are_told_by_path(
    run: RunFolder, job: JobConfig, reason: str, path: str
) -> None:
    told = Recorder()
    follower = Follower([told], run)
    follower.start(job, 0)
    run.append_event(an_event("checkpoint_written", reason.format(path)))
    follower.poll()
    assert told.of("on_checkpoint") == [path]
    assert told.of("on_event") == ["checkpoint_written"]


@pytest.mark.parametrize("method", METHODS)
def test_an_error_is_kept_and_the_others_go_on(
    run: RunFolder, job: JobConfig, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong, right = Recorder(raise_in=method), Recorder()
    follower = Follower([wrong, right], run)
    follower.start(job, 0)
    for step in range(2):
        run.append_metrics(a_step(step))
    run.append_event(an_event("checkpoint_written", "step 2: /there"))
    run.append_event(an_event("worker_lost"))
    for step in (2, 4, 2, 4):
        run.append_evaluation(an_evaluation(step))
    follower.end(None)
    assert isinstance(follower.error, CallbackError)
    assert str(follower.error) == f"Recorder.{method}: ValueError: no more"
    assert isinstance(follower.error.__cause__, ValueError)
    assert f"Recorder.{method} raised" in caplog.text
    assert wrong.told[-1][0] == method, "it is told nothing more"
    assert [len(right.of(one)) for one in METHODS] == [1, 2, 2, 1, 2, 1]


def test_nothing_is_told_of_a_job_that_never_began(run: RunFolder) -> None:
    told = Recorder()
    Follower([told], run).end(None)
    assert told.told == []


def test_a_table_of_several_models_goes_on_where_each_of_them_does(
    run: RunFolder, make_job: Callable[..., JobConfig]
) -> None:
    job = make_job(models=2)
    first, again = [0, 1, 2, 3, 4, 6], [3, 8, 5, 7, 9]  # model 0 is ahead
    for begin, steps in ((0, first), (3, again)):
        follower = Follower([CSVLogger()], run)
        follower.start(job, begin)
        for step in steps:
            run.append_metrics({**a_step(step), "model": step % 2})
        follower.end(None)
        assert follower.error is None
    with (run.path / "steps.csv").open(newline="") as file:
        assert sorted(int(line["step"]) for line in csv.DictReader(file)) == list(range(10))


def test_ray_trains_run_config_takes_ours(run: RunFolder) -> None:
    assert RunConfig(callbacks=[Recorder()]).callbacks
    with pytest.raises(ConfigError, match=r"callbacks: .*Recorder.*needs an object: Recorder\("):
        check_callbacks([Recorder])


def test_a_table_goes_on_where_its_run_does(run: RunFolder, job: JobConfig) -> None:
    for begin, end in ((0, 4), (2, 6)):
        follower = Follower([CSVLogger()], run)
        follower.start(job, begin)
        for step in range(begin, end):
            run.append_metrics(a_step(step))
        follower.end(None)
        assert follower.error is None
    with (run.path / "steps.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(6))
    assert float(lines[5]["loss"]) == a_step(5)["loss"]
    assert tuple(lines[0]) == (*CSVLogger.COLUMNS, "accuracy")


def test_tensorboard_gets_the_series(run: RunFolder, job: JobConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follower = Follower([TensorBoardLogger()], run)
    follower.start(job, 0)
    for step in range(3):
        run.append_metrics(a_step(step))
    run.append_metrics({**a_step(3), "loss": None})
    run.append_evaluation(an_evaluation(2))
    run.append_event(an_event("worker_lost"))
    follower.end(None)
    assert follower.error is None
    series = EventAccumulator(str(run.path / "tensorboard"))
    series.Reload()
    assert [one.step for one in series.Scalars("train/loss")] == [0, 1, 2]
    assert [one.step for one in series.Scalars("train/lr")] == [0, 1, 2, 3]
    assert [one.step for one in series.Scalars("train/accuracy")] == [0, 1, 2, 3]
    assert [one.value for one in series.Scalars("eval/accuracy")] == [0.5]
    assert [one.value for one in series.Scalars("eval/loss")] == [1.5]


def test_tensorboard_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"pip install 'elastic\[tensorboard\]'"):
        TensorBoardLogger()


class FakeWandb(ModuleType):
    """Stands where `wandb` would be; remembers what was logged."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.exit_code: int | None = None

    def init(self, **settings: Any) -> FakeWandb:
        self.settings = settings
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_the_documented_ones_work(
    run: RunFolder, job: JobConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block, names)
    follower = Follower([names["PrintBest"](), names["WandbLogger"]("ours")], run)
    follower.start(job, 0)
    run.append_metrics(a_step(0))
    run.append_evaluation(an_evaluation(1))
    follower.end(None)
    assert follower.error is None
    assert capsys.readouterr().out == "after 1 steps: 1.5000\n"
    assert (wandb.settings["project"], wandb.settings["id"]) == ("ours", "run")
    (step, values), (_, evaluation) = wandb.logged
    assert (step, values["loss"], values["accuracy"]) == (0, 4.0, 0.0)
    assert evaluation == {"eval/loss": 1.5, "eval/accuracy": 0.5}
    assert wandb.exit_code == 1
