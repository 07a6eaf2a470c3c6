"""Wrong inputs to `ElasticTrainer`: each error names the value, what is allowed, and the setting.

None comes after anything has started: not a worker, not even Ray.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)

from elastic import ElasticTrainer
from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder

JOB: dict[str, Any] = {
    "name": "typed",
    "steps": 3,
    "batch": {"micro_batches": 4, "micro_batch_size": 8},
}


class Task:
    """Complete in form; never computes."""

    held: Any = None

    def model(self) -> Any: ...

    def dataset(self) -> Any: ...

    def loss(self, model: Any, micro_batch: Any) -> Any: ...

    def optimizer(self, named_parameters: Any) -> Any: ...


class WithoutLoss:
    def model(self) -> Any: ...

    def dataset(self) -> Any: ...

    def optimizer(self, named_parameters: Any) -> Any: ...


def holding(value: Any) -> Task:
    task = Task()
    task.held = value
    return task


def scaled(**fields: Any) -> dict[str, Any]:
    return {"scaling_config": ScalingConfig(**{"num_workers": 2, **fields})}


def running(**fields: Any) -> dict[str, Any]:
    return {"run_config": RunConfig(**{"name": "typed", **fields})}


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    # of the job, by keyword, mapping or file
    "steps 0": ({"steps": 0}, ["steps", "got 0", "at least 1"]),
    "steps as text": ({"steps": "many"}, ["steps", "'many'", "a whole number"]),
    "steps as float": ({"steps": 10.5}, ["steps", "10.5", "a whole number"]),
    "an unknown setting": ({"step": 3}, ["step", "unknown key", "did you mean steps"]),
    "a part of a section": (
        {"batch": {"micro_batches": 0}},
        ["batch.micro_batches", "got 0", "from 1 to 4096"],
    ),
    "a section that is none": ({"batch": 32}, ["batch", "32", "micro_batch_size"]),
    "an unknown part": ({"workers": {"strat": 2}}, ["workers.strat", "did you mean start"]),
    "a range upside down": (
        {"workers": {"min": 5, "start": 4}},
        ["workers", "min 5, start 4", "min <= start <= max"],
    ),
    "too many workers": ({"workers": {"max": 2000}}, ["workers.max", "2000", "1024"]),
    "a seed below 0": ({"seed": -1}, ["seed", "-1", "from 0"]),
    "clip_norm 0": ({"clip_norm": 0.0}, ["clip_norm", "0.0", "above 0", "or null"]),
    "clip_norm NaN": ({"clip_norm": float("nan")}, ["clip_norm", "nan", "a number"]),
    "a precision unknown": ({"precision": "fp16"}, ["precision", "'fp16'", "bfloat16"]),
    "a device unknown": ({"device": "tpu"}, ["device", "'tpu'", "cpu"]),
    "keep_last 0": ({"checkpoint": {"keep_last": 0}}, ["checkpoint.keep_last", "got 0", "1"]),
    "chunks uneven": ({"chunk_elements": 1000}, ["chunk_elements", "1000", "multiple of 16"]),
    "a name with a slash": ({"name": "a/b"}, ["name", "'a/b'", "1 to 64 letters"]),
    "a job that is a number": ({"job": 3}, ["job", "got 3", "a path, a mapping or a JobConfig"]),
    "a file that is missing": ({"job": "nowhere.yaml"}, ["nowhere.yaml", "no such file"]),
    "nothing at all": ({"job": {}, "task": None}, ["name: missing", "steps: missing", "batch"]),
    # of the task
    "no task": ({"task": None}, ["task", "neither ElasticTrainer(task=...) nor the job file"]),
    "a class": ({"task": Task}, ["task", "the class Task", "an object: Task("]),
    "a method too few": ({"task": WithoutLoss()}, ["task", "WithoutLoss", "lacks loss"]),
    "a task that cannot travel": (
        {"task": holding(threading.Lock())},
        ["task", "Task cannot be sent", "lock", "`dataset()`"],
    ),
    "a task that no module has": (
        {"job": {**JOB, "task": "examples.nothing:Task"}, "task": None},
        ["task", "examples.nothing:Task", "No module named"],
    ),
    "a task that is no class": (
        {"job": {**JOB, "task": "examples/task.py"}, "task": None},
        ["task", "'examples/task.py'", "package.module:Class"],
    ),
    # of Ray Train
    "no workers": (scaled(num_workers=0), ["ScalingConfig.num_workers", "got 0", "1 to 1024"]),
    "a range from 0": (scaled(num_workers=(0, 4)), ["ScalingConfig.num_workers", "workers.min"]),
    "TPUs": (
        {"scaling_config": ScalingConfig(num_workers=1, use_tpu=True)},
        ["ScalingConfig.use_tpu", "True", "device"],
    ),
    "resources": (
        scaled(resources_per_worker={"CPU": 2}),
        ["ScalingConfig.resources_per_worker", "{'CPU': 2}", "threads: N"],
    ),
    "placement": (
        scaled(placement_strategy="SPREAD"),
        ["ScalingConfig.placement_strategy", "'SPREAD'", "one machine"],
    ),
    "accelerator": (scaled(accelerator_type="A100"), ["ScalingConfig.accelerator_type", "'A100'"]),
    "topology": (scaled(topology="2x2"), ["ScalingConfig.topology", "'2x2'", "one machine"]),
    "labels": (scaled(label_selector={"a": "b"}), ["ScalingConfig.label_selector", "{'a': 'b'}"]),
    "resizing": (
        scaled(elastic_resize_monitor_interval_s=0.0),
        ["ScalingConfig.elastic_resize_monitor_interval_s", "0.0", "elastic scale"],
    ),
    "a config that is none": (
        {"scaling_config": {"num_workers": 2}},
        ["ScalingConfig", "{'num_workers': 2}", "ray.train.ScalingConfig"],
    ),
    "a run's name": (running(name="my run"), ["RunConfig.name", "'my run'", "1 to 64 letters"]),
    "a bucket": (
        running(name=None, storage_path="s3://bucket/runs"),
        ["RunConfig.storage_path", "'s3://bucket/runs'", "needs RunConfig.name"],
    ),
    "a bucket unknown": (
        running(storage_path="ftp://bucket/runs"),
        ["RunConfig.storage_path", "ftp://bucket/runs", "s3"],
    ),
    "a metric without a name": (
        running(
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="f 1")
        ),
        ["CheckpointConfig.checkpoint_score_attribute", "'f 1'", "loss or a metric"],
    ),
    "the best of none": (
        running(checkpoint_config=CheckpointConfig(checkpoint_score_attribute="loss")),
        ["CheckpointConfig.checkpoint_score_attribute", "'loss'", "num_to_keep"],
    ),
    "an environment": (
        running(worker_runtime_env={"pip": ["x"]}),
        ["RunConfig.worker_runtime_env", "{'pip': ['x']}", "install packages"],
    ),
    "logging": (
        running(logging_config=LoggingConfig(log_level="DEBUG")),
        ["RunConfig.logging_config", "DEBUG", "logging"],
    ),
    "Ray's callbacks": (
        running(callbacks=[UserCallback()]),
        ["callbacks", "UserCallback", "no elastic.Callback", "derive from it"],
    ),
    "failures": (
        running(failure_config=FailureConfig(max_failures=-2)),
        ["FailureConfig.max_failures", "-2", "-1 for no limit"],
    ),
    "preemption": (
        running(failure_config=FailureConfig(max_preemption_failures=3)),
        ["FailureConfig.max_preemption_failures", "got 3", "preemption: {source: auto}"],
    ),
    "the controller": (
        running(failure_config=FailureConfig(controller_failure_limit=3)),
        ["FailureConfig.controller_failure_limit", "got 3", "without limit"],
    ),
    "a training loop": (
        {"train_loop_per_worker": print},
        ["train_loop_per_worker", "not supported", "a task's `loss`"],
    ),
    "data sets": ({"datasets": {}}, ["datasets", "not supported", "`dataset()`"]),
    "a checkpoint to begin at": (
        {"resume_from_checkpoint": "x"},
        ["resume_from_checkpoint", "not supported", "RunConfig.name"],
    ),
    "a callback that is none": (
        {"callbacks": [print]},
        ["callbacks", "print", "no elastic.Callback", "derive from it"],
    ),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, where nothing may have started."""
    monkeypatch.chdir(tmp_path)
    before = ray.is_initialized()  # other tests may hold a cluster
    yield
    assert ray.is_initialized() == before
    assert list(tmp_path.glob("**/events.jsonl")) == []


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_refused(case: str) -> None:
    arguments, words = WRONG[case]
    given = {"task": Task(), "job": JOB, **arguments}
    with pytest.raises(ConfigError) as error:
        ElasticTrainer(given.pop("task"), **given).fit()
    for word in words:
        assert word in str(error.value)


def test_all_mistakes_of_one_kind_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        ElasticTrainer(
            Task(),
            job=JOB,
            scaling_config=ScalingConfig(num_workers=2, topology="2x2", accelerator_type="A100"),
            run_config=RunConfig(storage_path="s3://x", worker_runtime_env={"pip": ["x"]}),
        )
    names = [line.partition(":")[0] for line in str(error.value).splitlines()]
    assert names == [
        "ScalingConfig.accelerator_type",
        "ScalingConfig.topology",
        "RunConfig.worker_runtime_env",
        "RunConfig.storage_path",
    ]


def finished_run(folder: Path, steps: int = 3) -> RunFolder:
    """A run folder as a finished job leaves it, without its checkpoints."""
    run = RunFolder(folder)
    run.create()
    run.write_json(run.job_json, {**ElasticTrainer(Task(), job=JOB)._job.model_dump(mode="json")})
    result = {"outcome": "finished", "failure": "", "steps": steps, "exact": True, "loss": 1.0}
    run.write_json(run.result_json, {**result, "params_sha256": "ab", "samples_sha256": "cd"})
    return run


def fit_named(**settings: Any) -> Any:
    config = RunConfig(name="typed", storage_path=os.fspath(Path.cwd()))
    return ElasticTrainer(Task(), job=JOB, run_config=config, **settings).fit()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1}, ["seed", "begun with 0", "got 1"]),
        ({"batch": {"micro_batches": 8}}, ["batch", "'micro_batches': 8", "start a new run"]),
        ({"steps": 2}, ["steps", "got 2", "has 3 already", "another run folder"]),
    ],
    ids=["seed", "batch", "fewer steps"],
)
def test_a_name_that_holds_another_run_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    run = finished_run(tmp_path / "typed")
    before = {path: path.read_bytes() for path in run.path.glob("*.json")}
    with pytest.raises(ConfigError) as error:
        fit_named(**settings)
    for word in words:
        assert word in str(error.value)
    assert {path: path.read_bytes() for path in run.path.glob("*.json")} == before


def test_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "typed")
    again = fit_named(workers={"start": 2})
    assert (again.params_sha256, again.path) == ("ab", str(run.path))
    assert again.metrics["steps"] == 3


@pytest.fixture
def settings_of(tmp_path: Path) -> Callable[..., Any]:
    """The job that a trainer would run."""

    def resolve(**arguments: Any) -> Any:
        return ElasticTrainer(Task(), **arguments)._job

    return resolve


def test_what_is_given_later_wins(tmp_path: Path, settings_of: Callable[..., Any]) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: filed\nsteps: 10\nbatch: {micro_batches: 2, micro_batch_size: 4}\n"
        "workers: {start: 2, max: 3, threads: 2}\n"
    )
    job = settings_of(
        job="job.yaml",
        steps=20,
        batch={"micro_batches": 8},
        scaling_config=ScalingConfig(num_workers=6),
        run_config=RunConfig(name="named", checkpoint_config=CheckpointConfig(num_to_keep=7)),
    )
    assert (job.name, job.steps) == ("named", 20)
    assert (job.batch.micro_batches, job.batch.micro_batch_size) == (8, 4)
    assert (job.workers.start, job.workers.min, job.workers.max) == (6, 1, 6)
    assert (job.workers.threads, job.checkpoint.keep_last) == (2, 7)


@pytest.mark.parametrize(
    ("num_workers", "workers"),
    [(1, (1, 1, 8)), (9, (9, 1, 9)), ((2, 3), (3, 2, 3)), ((6, 12), (6, 6, 12))],
)
def test_numbers_of_workers(
    settings_of: Callable[..., Any], num_workers: Any, workers: tuple[int, int, int]
) -> None:
    now = settings_of(job=JOB, scaling_config=ScalingConfig(num_workers=num_workers)).workers
    assert (now.start, now.min, now.max) == workers


def test_use_gpu_is_a_device(settings_of: Callable[..., Any]) -> None:
    config = ScalingConfig(num_workers=2, use_gpu=True)
    assert settings_of(job=JOB, scaling_config=config).device == "cuda"


def test_the_best_checkpoints_in_a_bucket(settings_of: Callable[..., Any]) -> None:
    checkpoints = CheckpointConfig(
        num_to_keep=2, checkpoint_score_attribute="eval.loss", checkpoint_score_order="min"
    )
    run = RunConfig(name="a", storage_path="s3://bucket/runs", checkpoint_config=checkpoints)
    now = settings_of(job=JOB, run_config=run).checkpoint
    assert (now.keep_best, now.metric, now.mode) == (2, "eval.loss", "min")
    assert (now.keep_last, now.storage) == (3, "s3://bucket/runs/a")


def test_a_config_that_says_nothing_changes_nothing(settings_of: Callable[..., Any]) -> None:
    assert settings_of(job=JOB, run_config=RunConfig()) == settings_of(job=JOB)


def test_a_job_without_a_name_has_that_of_its_task(settings_of: Callable[..., Any]) -> None:
    unnamed = {key: value for key, value in JOB.items() if key != "name"}
    assert settings_of(**unnamed).name == "Task"
    assert settings_of(job=unnamed).name == "Task"
    assert settings_of(job=unnamed, run_config=RunConfig(name="given")).name == "given"
