"""Ctrl-C on `elastic train`, sent as a terminal does: to every process of the group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from elastic.core import checkpoint
from elastic.core.runs import RunFolder
from elastic.core.store import ROOT
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import (
    TAG,
    Outcome,
    make_job,
    outcome,
    run_job,
    session,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-c", "from elastic.cli import main; main()"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A job file and a schedule in which each step takes a while, and a run folder to be."""
    job = make_job("stopped", steps=NUM_STEPS, workers=2, checkpoint={"every": 2})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    sleepy = [
        {"do": "slow", "at": {"step": 0}, "target": f"worker-{worker}", "sleep_s": 0.7}
        for worker in range(2)
    ]
    (tmp_path / "faults.yaml").write_text(yaml.safe_dump(sleepy))
    return RunFolder(tmp_path / "run")


@contextmanager
def training(run: RunFolder) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`elastic train` in a group of its own, behind its first checkpoint."""
    folder = run.path.parent
    log = folder / "train.log"
    arguments = [folder / "job.yaml", "--faults", folder / "faults.yaml", "--run-dir", run.path]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "train", *map(str, arguments)],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )

    def is_behind_a_checkpoint() -> bool:
        assert process.poll() is None, log.read_text()
        return checkpoint.latest_checkpoint(run.checkpoints) is not None

    try:
        wait_until(is_behind_a_checkpoint, "a checkpoint is written", timeout_s=150)
        yield process, log
    finally:
        for pid in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def go_on(run: RunFolder, cluster: str) -> Outcome:
    """Resume to the end, on the cluster of the tests."""
    job = make_job("stopped", steps=NUM_STEPS, checkpoint={"every": 0})
    return outcome(run_job(job, run_dir=run.path, resume=True))


def test_one_finishes_the_step(undisturbed: Outcome, run: RunFolder, cluster: str) -> None:
    with training(run) as (process, log):
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()
    result = run.read_json(run.result_json)
    assert result["outcome"] == "stopped"
    newest = checkpoint.latest_checkpoint(run.checkpoints)
    assert newest is not None
    assert Path(newest).name == f"step-{result['steps']:08d}"
    assert "elastic resume" in log.read_text()
    assert go_on(run, cluster) == undisturbed


def test_a_second_one_quits_at_once(undisturbed: Outcome, run: RunFolder, cluster: str) -> None:
    with training(run) as (process, log):
        os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: "Ctrl-C ends it at once" in log.read_text(), "the first is noticed")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 130, log.read_text()
        wait_until(lambda: not session(process.pid), "no process is left", timeout_s=20)
    assert "Traceback" not in log.read_text()
    assert "interrupted" in log.read_text()
    assert not run.result_json.exists()
    assert not run.ray_json.exists()
    assert [event["kind"] for event in run.read_events()][-1] == "job_interrupted"
    assert not list(ROOT.glob(f"stopped{TAG}.*")), "no shared memory is left"
    assert go_on(run, cluster) == undisturbed
