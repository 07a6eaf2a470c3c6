"""The records and the result of a job of several models, and who reads them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.setup import JobSetup, datasets_of, load_tasks
from actors.several import Results, Scribes
from elastic import driver
from elastic.core.config import JobConfig, load_job
from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder
from elastic.core.status import ModelStatus, Status, read_status, write_status
from elastic.progress import event_line, numbers_line, print_summary
from elastic.report.story import read_story
from monitoring.tally import Tally
from tests.fake_steps import event, healthy, step_line

BATCH = {"micro_batches": 4, "micro_batch_size": 2}


def make_job(**settings: Any) -> JobConfig:
    given = {"name": "sweep", "task": "tests.integration.tasks:Tiny", "steps": 10, "batch": BATCH}
    return load_job({**given, "models": 2, **settings})


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    job, run = make_job(), RunFolder(tmp_path / "run")
    whole = JobSetup(job=job, run=run, run_id="12ab", secret=bytes(32))
    lanes = [
        replace(whole, job=job.of_model(one), run=run.of_model(one), model=one) for one in (0, 1)
    ]
    for folder in (run, *(lane.run for lane in lanes)):
        folder.create()
        folder.write_json(folder.job_json, job.model_dump(mode="json"))
    return replace(whole, models=tuple(lanes))


def committed(model: int, step: int, time_s: float) -> dict[str, Any]:
    line = {**step_line(step, healthy()), "time_s": time_s, "loss": 1.0 + model}
    return {"kind": "committed", "model": model, "line": line}


def test_a_step_of_a_model_is_one_of_the_job_too(setup: JobSetup) -> None:
    scribes = Scribes(setup)
    for step in (0, 1):
        for model in (0, 1):
            scribes(committed(model, step, time_s=10.0 + 3 * step + model))
    steps = setup.run.read_metrics()
    assert [(one["step"], one["model"]) for one in steps] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert [one["step_s"] for one in steps] == [1.0, 1.0, 2.0, 1.0]  # the first says so itself
    own = setup.models[1].run.read_metrics()
    assert [(one["step"], one["time_s"]) for one in own] == [(0, 11.0), (1, 14.0)]
    assert "model" not in own[0]


def test_a_successor_adds_only_what_is_missing(setup: JobSetup) -> None:
    before = Scribes(setup)
    before(committed(0, 0, time_s=10.0))
    after = Scribes(setup)
    for model in (0, 1):
        line = {**committed(model, 0, time_s=12.0)["line"], "step_s": 0.5}
        after({"kind": "take_over", "model": model, "line": line, "time_s": 12.0})
    after({"kind": "take_over", "model": 1, "line": None, "time_s": 12.0})
    steps = setup.run.read_metrics()
    assert [(one["step"], one["time_s"], one["step_s"]) for one in steps] == [
        (0, 10.0, 1.0),
        (1, 12.0, 2.0),
    ]
    assert [len(lane.run.read_metrics()) for lane in setup.models] == [1, 1]


def test_an_event_of_a_model_names_it_and_does_not_end_the_job(setup: JobSetup) -> None:
    scribes = Scribes(setup)
    scribes.write_as(1)({"kind": "event", "line": event("job_finished", 9.0)})
    scribes({"kind": "event", "line": event("aggregator_hung", 9.5)})
    told = setup.run.read_events()
    assert [(one["kind"], one.get("model")) for one in told] == [
        ("model_finished", 1),
        ("aggregator_hung", None),
    ]
    assert [one["kind"] for one in setup.models[1].run.read_events()] == ["job_finished"]


def result(model: int, **other: Any) -> dict[str, Any]:
    same = {"name": "sweep", "num_generations": 1, "init_sha256": None, "faults_fired": []}
    own = {"outcome": "finished", "failure": "", "steps": 10, "loss": 1.0 + model, "exact": True}
    own |= {"params_sha256": f"p{model}", "samples_sha256": f"s{model}", "first_loss": 2.0}
    own |= {"overflows": 1, "skipped_steps": [3], "metrics": {}, "evaluation": None}
    return {
        **same, **own, "versions": {}, "last_checkpoint_failure": "", "dropped_micro_batches": 0,
        **other,
    }  # fmt: skip


def test_the_result_comes_once_all_models_have_theirs(setup: JobSetup) -> None:
    told: list[tuple[str, str]] = []
    results = Results(setup, lambda kind, reason: told.append((kind, reason)))
    first, second = (lane.run for lane in setup.models)
    first.write_json(first.result_json, result(0))
    results.complete()
    assert not setup.run.result_json.exists()
    later = {"faults_fired": [0, 2], "num_generations": 5}  # it ended after model 0
    failed = result(1, outcome="failed", failure="NaN", steps=4, **later)
    second.write_json(second.result_json, failed)
    results.complete()
    results.complete()
    whole = setup.run.read_json(setup.run.result_json)
    assert (whole["outcome"], whole["failure"], whole["steps"]) == ("failed", "model 1: NaN", 4)
    assert (whole["overflows"], whole["skipped_steps"]) == (2, [6, 7])
    assert (whole["faults_fired"], whole["num_generations"]) == ([0, 2], 5)
    assert [one["params_sha256"] for one in whole["models"]] == ["p0", "p1"]
    assert [one["seed"] for one in whole["models"]] == [0, 1]
    assert told == [("job_failed", "model 1: NaN")]


def test_a_list_of_one_model_is_that_model(tmp_path: Path) -> None:
    job = make_job(models=[{"seed": 7, "task_args": {"width": 8}}])
    setup = driver._make_setup(job, RunFolder(tmp_path / "run"), None, (), resume=False)
    assert [(one.job.seed, one.job.task_args, one.model) for one in setup.lanes] == [
        (7, {"width": 8}, None)
    ]


def test_models_that_differ_in_the_seed_alone_share_a_task(setup: JobSetup) -> None:
    first, second = load_tasks(setup)
    assert first is second
    other = make_job(models=[{}, {"task_args": {"width": 8}}])
    lanes = tuple(replace(lane, job=other.of_model(one)) for one, lane in enumerate(setup.models))
    first, second = load_tasks(replace(setup, models=lanes))
    assert (first.width, second.width) == (256, 8)  # type: ignore[attr-defined]


def test_a_data_set_is_made_once_for_models_that_share_a_task(
    tiny_task: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    dataset = tiny_task.dataset

    def counted(self: Any) -> Any:
        made.append(self)
        return dataset(self)

    monkeypatch.setattr(tiny_task, "dataset", counted)
    shared, other = tiny_task(), tiny_task()
    first, second, third = datasets_of([shared, shared, other])
    assert first is second
    assert third is not first
    assert made == [shared, other]


def test_a_report_draws_each_models_loss(setup: JobSetup) -> None:
    scribes = Scribes(setup)
    for step in (0, 1):
        for model in (0, 1):
            scribes(committed(model, step, time_s=10.0 + 2 * step + model))
    setup.run.append_event(event("job_started", 8.0))
    story = read_story(setup.run.path)
    assert story.num_steps == 20
    assert story.losses[0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert story.losses[1].tolist()[1:] == [2.0, 2.0, 2.0]


def test_a_checkpoint_takes_as_long_as_since_its_models_step() -> None:
    tally = Tally(make_job().model_dump(mode="json"))
    for step in range(4):
        tally.add("step", {**step_line(step, healthy()), "time_s": 10.0 + step})
    reason = "step 2: /run/models/1/checkpoints/step-00000002"
    tally.add("event", {**event("checkpoint_written", 15.0, reason=reason), "model": 1})
    assert tally.checkpoint_s.sum_s == 2.0  # its second step was the job's fourth, at 13 s


def test_a_task_object_takes_no_arguments_of_a_model(tmp_path: Path) -> None:
    job = make_job(models=[{}, {"task_args": {"lr": 1.0}}])
    task = load_tasks(JobSetup(job=job, run=RunFolder(tmp_path), run_id="a", secret=b""))[0]
    with pytest.raises(ConfigError, match=r"models: got task_args \{'lr': 1.0\}, and a task obj"):
        driver.run_job(job, run_dir=tmp_path / "run", task=task)


@pytest.mark.parametrize("models", [1, 3, [{}, {"seed": 9}]])
def test_a_run_does_not_go_on_with_other_models(models: Any, setup: JobSetup) -> None:
    with pytest.raises(ConfigError, match="models: the run was begun with 2, got"):
        driver.run_job(make_job(models=models), run_dir=setup.run.path, resume=True)


def test_progress_shows_each_model(tmp_path: Path) -> None:
    models = (ModelStatus(3, 0.5), ModelStatus(3, None), ModelStatus())
    status = Status(phase="training", num_steps=30, run_dir=str(tmp_path), step=6, models=models)
    assert "losses 0.5000 - -" in numbers_line(status).plain
    run = RunFolder(tmp_path)
    write_status(run, status)
    assert read_status(run) == status
    line = {**event("evaluated", 3.0), "model": 2}
    assert "evaluated model-2" in event_line(line, 0.0).plain
    ended = {**event("model_finished", 3.0), "model": 2}
    assert "model-2 finished" in event_line(ended, 0.0).plain


def test_the_summary_lists_each_model(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    one = {"run": "/run/models/0", "seed": 3, "task_args": {"lr": 0.1}, **result(0)}
    print_summary(console, tmp_path, {**result(0), "loss": None, "models": [one]}, [])
    assert "model 0        seed 3, lr 0.1: finished, loss 1.0000, p0" in console.export_text()
