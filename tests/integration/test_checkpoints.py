"""Checkpoints on real processes: in buckets, on disks that refuse, as a beginning, the best."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import elastic
import examples.finetune
from elastic.core.checkpoint import MODEL_FILE, latest_checkpoint
from elastic.core.config import JobConfig, load_job
from elastic.core.errors import ConfigError, FatalError
from elastic.core.faults import Fault
from elastic.core.runs import RunFolder
from elastic.core.status import Status
from elastic.core.storage import open_storage
from elastic.handle import connect
from examples.finetune.task import write_pretrained
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import (
    TAG,
    Once,
    Outcome,
    kinds,
    make_job,
    outcome,
    run_job,
    write_faults,
)
from tests.integration.tasks import Tiny
from tests.s3 import new_bucket, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]

SLEEP_S = 0.1  # of every worker in each step, so that a step can be hit


def slow_job(name: str, **checkpoint: Any) -> JobConfig:
    settings = {"every": 5, "keep_last": 2, **checkpoint}
    return make_job(name, workers=2, steps=NUM_STEPS, checkpoint=settings)


@pytest.fixture
def slowly(tmp_path: Path) -> tuple[Fault, ...]:
    return write_faults(
        tmp_path / "slow.yaml",
        [
            {"do": "slow", "at": {"step": 0}, "target": f"worker-{worker}", "sleep_s": SLEEP_S}
            for worker in range(2)
        ],
    )


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


def test_a_run_goes_on_from_a_bucket_past_a_damaged_checkpoint(
    port: int, undisturbed: Outcome, slowly: tuple[Fault, ...], tmp_path: Path
) -> None:
    location = new_bucket(port).uri("runs/a")
    job = slow_job("bucket", storage=location)
    stop = Once(12, lambda status: connect(status.run_dir).stop())
    run_job(job, run_dir=tmp_path / "run", faults=slowly, on_status=stop)
    storage = open_storage(location)
    newest = max(storage.names())
    data = storage.read(f"{newest}/{MODEL_FILE}")
    assert data is not None
    storage.write(f"{newest}/{MODEL_FILE}", data[:-1], replace=True)
    with pytest.raises(ConfigError, match=r"checkpoint\.storage: .* holds checkpoints already"):
        run_job(job, run_dir=tmp_path / "new")

    result = run_job(job, run_dir=tmp_path / "run", resume=True)
    assert outcome(result) == undisturbed
    (damaged,) = [one for one in result.events if one["kind"] == "checkpoint_damaged"]
    assert f"{newest}/{MODEL_FILE}" in damaged["reason"].replace(f"?{location.split('?')[1]}", "")
    assert storage.names()[1:] == [f"step-{NUM_STEPS:08d}"]  # an upload may take several steps
    assert storage.read("owner.json") is None
    assert list(RunFolder(tmp_path / "run").checkpoints.iterdir()) == []
    assert result.checkpoint is not None
    assert result.checkpoint.path.endswith(f"runs/a/step-{NUM_STEPS:08d}")
    for source in (result.checkpoint, tmp_path / "run", location):
        assert not elastic.load_model(source, Tiny()).training


class Disk:
    """A folder that refuses everything while a file is in its place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._away = folder, folder.with_suffix(".away")

    def refuse(self, _: Status | None = None) -> None:
        self.folder.rename(self._away)
        self.folder.write_text("in the way")

    def recover(self, _: Status | None = None) -> None:
        self.folder.unlink()
        self._away.rename(self.folder)


def both(*calls: Callable[[Status], None]) -> Callable[[Status], None]:
    def call(status: Status) -> None:
        for one in calls:
            one(status)

    return call


def test_training_goes_on_while_the_disk_refuses(
    undisturbed: Outcome, slowly: tuple[Fault, ...], tmp_path: Path
) -> None:
    disk = Disk(tmp_path / "disk")
    job = slow_job("refused", storage=str(disk.folder))
    refuse = Once(0, disk.refuse, event="checkpoint_written")
    recover = Once(0, disk.recover, event="checkpoint_failed")
    result = run_job(job, run_dir=tmp_path / "run", faults=slowly, on_status=both(refuse, recover))
    assert refuse.done
    assert recover.done
    assert outcome(result) == undisturbed
    told = [one for one in kinds(result) if one.startswith("checkpoint_")]
    assert told[0] == told[-1] == "checkpoint_written"
    assert "checkpoint_failed" in told
    assert result.metrics["last_checkpoint_failure"] == ""
    assert str(latest_checkpoint(disk.folder)).endswith(f"step-{NUM_STEPS:08d}")


def test_a_last_checkpoint_that_cannot_be_written_fails_the_job_and_it_resumes(
    undisturbed: Outcome, slowly: tuple[Fault, ...], tmp_path: Path
) -> None:
    disk = Disk(tmp_path / "disk")
    job = slow_job("lost", storage=str(disk.folder), patience_s=1.5)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(FatalError, match=f"last checkpoint, of step {NUM_STEPS}, could not be"):
        run_job(job, run_dir=run.path, faults=slowly, on_status=Once(12, disk.refuse))
    disk.recover()
    result = run.read_json(run.result_json)
    assert result["outcome"] == "failed"
    assert "tried for 1.5 s" in result["last_checkpoint_failure"]
    assert result["params_sha256"] == undisturbed.params_sha256
    resumed = run_job(job, run_dir=run.path, resume=True)
    assert outcome(resumed) == undisturbed


def test_a_second_writer_is_refused_and_the_first_undisturbed(
    undisturbed: Outcome, slowly: tuple[Fault, ...], tmp_path: Path
) -> None:
    storage = str(tmp_path / "shared")
    refusals: list[str] = []

    def begin_another(_: Status) -> None:
        with pytest.raises(ConfigError) as caught:
            run_job(slow_job("second", storage=storage), run_dir=tmp_path / "second")
        refusals.append(str(caught.value))

    job = slow_job("first", storage=storage)
    run_dir = tmp_path / "first"
    result = run_job(job, run_dir=run_dir, faults=slowly, on_status=Once(1, begin_another))
    assert outcome(result) == undisturbed
    (refusal,) = refusals
    assert f"{storage} belongs to the run {run_dir}" in refusal


def test_a_job_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    first = run_job(make_job("teacher", steps=3), run_dir=tmp_path / "first")
    still = {"lr": 0.0}
    job = make_job("pupil", steps=2, task_args=still, init_from=str(tmp_path / "first"))
    second = run_job(job, run_dir=tmp_path / "second")
    assert second.params_sha256 == first.params_sha256
    assert first.checkpoint is not None
    weights = Path(first.checkpoint.path, MODEL_FILE).read_bytes()
    assert second.metrics["init_sha256"] == hashlib.sha256(weights).hexdigest()
    assert "initialized" in kinds(second)
    a, b = elastic.load_model(first.checkpoint), elastic.load_model(tmp_path / "second")
    assert all(torch.equal(one, b.state_dict()[name]) for name, one in a.state_dict().items())


def test_the_example_fine_tunes_a_frozen_backbone(tmp_path: Path) -> None:
    path = tmp_path / "digits-0-4.safetensors"
    write_pretrained(path)
    settings = [f"name=finetune{TAG}", f"init_from={path}", "workers.spare=0", "standby=false"]
    job = load_job(Path(examples.finetune.__file__).with_name("job.yaml"), settings)
    result = run_job(job, run_dir=tmp_path / "run")
    (best, known), *rest = result.best_checkpoints
    assert known["eval.accuracy"] >= max(one.get("eval.accuracy", 0.0) for _, one in rest)
    assert known["eval.accuracy"] > 0.9
    weights = load_file(path)
    tuned = elastic.load_model(best).state_dict()
    same = {name for name, one in weights.items() if torch.equal(tuned[name], one)}
    assert same == {name for name in weights if name.startswith("backbone.")}


def test_weights_that_do_not_fit_end_the_job_before_a_worker_computes(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"layers.0.weight": torch.ones(256, 16), "layers.9.bias": torch.ones(4)}, path)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        run_job(make_job("misfit", init_from=str(path)), run_dir=run.path)
    text = str(caught.value)
    assert "layers.9.bias: unexpected" in text
    assert "layers.0.bias: missing; the model has it with shape (256,)" in text
    assert not {"worker_joined", "step"} & {one["kind"] for one in run.read_events()}
    assert run.read_metrics() == []


def test_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoint = {"every": 4, "keep_last": 1, "keep_best": 2}
    job = make_job("best", steps=22, checkpoint=checkpoint)
    run = RunFolder(tmp_path / "run")
    result = run_job(job, run_dir=run.path)
    losses = {one["step"] + 1: one["loss"] for one in run.read_metrics()}
    written = [
        int(one["reason"].partition("step ")[2].partition(":")[0])
        for one in result.events
        if one["kind"] == "checkpoint_written"
    ]
    assert written[-1] == 22
    expected = sorted(written, key=lambda step: losses[step])[:2]
    kept = [(int(one.path[-8:]), metrics["loss"]) for one, metrics in result.best_checkpoints]
    rest = [(22, losses[22])] if 22 not in expected else []
    assert kept == [(step, losses[step]) for step in expected] + rest
    best = result.get_best_checkpoint("loss", "min")
    assert best is not None
    assert best.path.endswith(f"{expected[0]:08d}")
