"""The command line as a user runs it: other processes, exit codes, what is printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from elastic.core.runs import RunFolder
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import TAG, Outcome, make_job, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-c", "from elastic.cli import main; main()"]
NAME = f"typed{TAG}"
LONG_STEPS = 1000


def elastic(*arguments: str | Path, cluster: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, on a cluster that is there already or one of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=os.environ | ({"RAY_ADDRESS": cluster} if cluster is not None else {}),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@contextmanager
def started(*arguments: str | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that goes on in the background."""
    with log.open("w") as file:
        process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(make_job("typed", workers=2).model_dump(mode="json")))
    return path


@pytest.fixture
def slow_faults(tmp_path: Path) -> Path:
    """Every worker sleeps in every step, so that commands come in time."""
    path = tmp_path / "faults.yaml"
    sleepy = [
        {"do": "slow", "at": {"step": 0}, "target": f"worker-{worker}", "sleep_s": 0.5}
        for worker in range(2)
    ]
    path.write_text(yaml.safe_dump(sleepy))
    return path


def test_train_status_scale_stop_resume_report(
    undisturbed: Outcome, cluster: str, job_file: Path, slow_faults: Path, tmp_path: Path
) -> None:
    """Trained on a cluster of its own, resumed on the one of the tests."""
    run = RunFolder(tmp_path / "run")
    log = tmp_path / "train.log"
    arguments = [job_file, f"steps={LONG_STEPS}", "--faults", slow_faults, "--run-dir", run.path]
    with started("train", *arguments, log=log) as training:

        def is_training() -> bool:
            assert training.poll() is None, log.read_text()
            return len(run.read_metrics()) > 2

        wait_until(is_training, "steps are done", timeout_s=120)
        status = elastic("status", run.path)
        assert status.returncode == 0, status.stderr
        assert f"of {LONG_STEPS}" in status.stdout
        assert "workers" in status.stdout
        scale = elastic("scale", run.path, "--workers", "1")
        assert (scale.returncode, "2 → 1 workers" in scale.stdout) == (0, True), scale.stderr
        refused = elastic("scale", run.path, "--workers", "64")
        assert refused.returncode == 1
        assert "workers.max is 4" in refused.stderr
        stop = elastic("stop", run.path)
        assert stop.returncode == 0, stop.stderr
        assert f"elastic resume {run.path}" in stop.stdout
        assert training.wait(timeout=60) == 0, log.read_text()
    stopped = run.read_json(run.result_json)
    assert stopped["outcome"] == "stopped"
    assert "worker_left" in [event["kind"] for event in run.read_events()]

    again = elastic("train", job_file, "--run-dir", run.path)
    assert again.returncode == 1
    assert f"elastic resume {run.path}" in again.stderr

    num_steps = stopped["steps"] + 5
    arguments = [f"steps={num_steps}", "workers.start=1"]
    resumed = elastic("resume", run.path, *arguments, cluster=cluster)
    assert resumed.returncode == 0, resumed.stderr
    result = run.read_json(run.result_json)
    assert (result["outcome"], result["steps"]) == ("finished", num_steps)
    assert result["params_sha256"][:12] in resumed.stdout
    losses = [f"step={one['step']} loss={one['loss']!r}" for one in run.read_metrics()]
    num_known = min(num_steps, NUM_STEPS)
    known = [" ".join(line.split()[:2]) for line in undisturbed.series]
    assert losses[:num_known] == known[:num_known]

    report = elastic("report", run.path)
    assert report.returncode == 0, report.stderr
    assert str(run.report_png) in report.stdout
    assert run.report_png.read_bytes().startswith(b"\x89PNG")
    assert run.report_png.stat().st_size > 20_000


def test_a_wrong_job_file_gives_all_its_errors_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("name: x\nsteps: 0\nbatch: {micro_batches: many}\ncolour: red\n")
    wrong = elastic("train", path)
    assert wrong.returncode == 1
    for text in (str(path), "steps", "micro_batches", "micro_batch_size", "colour"):
        assert text in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("command", ["status", "stop", "resume", "report"])
def test_an_unknown_name_is_refused(command: str, cluster: str) -> None:
    unknown = elastic(command, f"nobody-{os.getpid()}", cluster=cluster)
    assert unknown.returncode == 1
    assert f"nobody-{os.getpid()}" in unknown.stderr
    assert "Traceback" not in unknown.stderr
