"""`ray job submit -- elastic train`: logs, exit codes, where runs lie, stopping, tokens."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic.core import checkpoint
from elastic.core.config import load_job
from elastic.core.runs import RunFolder, find_run
from elastic.driver import run_job
from elastic.result import read_result
from tests.integration.fixtures import NUM_STEPS
from tests.integration.heads import Head, started_head
from tests.integration.support import TAG, Outcome, make_job, outcome, wait_until
from tests.integration.tasks import Tiny
from tests.metadata import SPOT, Metadata, metadata_server

DRAIN = """
import time
import ray
from ray._raylet import GcsClient

context = ray.init(logging_level="ERROR")
(node,) = ray.nodes()
gcs = GcsClient(context.address_info["gcs_address"])
accepted, why = gcs.drain_node(node["NodeID"], 2, "spot", int(1000 * (time.time() + 60)))
assert accepted, why
"""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("cluster") / "home") as head:
        yield head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a user has at home: a task in a module, a job file, and perhaps faults."""
    path = tmp_path / "mine"
    path.mkdir()
    (path / "points.py").write_text("from tests.integration.tasks import Tiny as Points\n")
    write_job(path, "submitted")
    return path


def write_job(folder: Path, name: str, *, sleep_s: float = 0.0) -> None:
    """A job of `NUM_STEPS` steps. `sleep_s`: each of its workers sleeps so long in every step."""
    settings: dict[str, Any] = {"task": "points:Points", "checkpoint": {"every": 1}}
    job = make_job(name, steps=NUM_STEPS, workers=2, **settings)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    sleepy = [
        {"do": "slow", "at": {"step": 0}, "target": f"worker-{worker}", "sleep_s": sleep_s}
        for worker in range(2)
    ]
    (folder / "faults.yaml").write_text(yaml.safe_dump(sleepy))


def run_of(head: Head, name: str) -> RunFolder:
    """Where its run must lie: not in the copy of the folder, which Ray deletes."""
    return find_run(name + TAG, base=head.home / "ray_results", running=False)


def check_result(run: RunFolder, undisturbed: Outcome) -> None:
    assert outcome(read_result(run)) == undisturbed


def test_a_submitted_job_trains(undisturbed: Outcome, head: Head, folder: Path) -> None:
    command = ["--", "elastic", "train", "job.yaml"]
    done = head.ray("job", "submit", "--working-dir", folder, *command)
    assert done.returncode == 0, done.stdout
    run = run_of(head, "submitted")
    check_result(run, undisturbed)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert f"run folder     {run.path}" in lines
    assert f"params_sha256  {undisturbed.params_sha256}" in lines
    assert sum(line.startswith(f"submitted{TAG}: step ") for line in lines) >= 2
    assert any(re.search(r"worker-\d+ joined .* of 2$", line) for line in lines)
    assert "\x1b" not in "\n".join(line for line in lines if TAG in line), "no colours in a log"


def test_a_refused_job_fails(head: Head, folder: Path) -> None:
    command = ["--", "elastic", "train", "job.yaml", "--run-dir", "runs/mine"]
    done = head.ray("job", "submit", "--working-dir", folder, *command)
    assert done.returncode == 1, done.stdout
    assert "lies in the copy of the working directory" in done.stdout
    assert "--run-dir" in done.stdout
    assert "Traceback" not in done.stdout


@contextmanager
def training(
    head: Head, folder: Path, name: str, *overrides: str, sleep_s: float, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A submitted job whose identity is its name, behind its first checkpoint, and its log."""
    write_job(folder, name, sleep_s=sleep_s)
    log = folder.parent / "log"
    arguments = ["--submission-id", name + TAG]
    arguments += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    command = ["--", "elastic", "train", "job.yaml", "--faults", "faults.yaml", *overrides]
    submit = ["job", "submit", *arguments, "--working-dir", folder, *command]
    with head.started(*submit, log=log) as submitted:

        def is_behind_a_checkpoint() -> bool:
            assert submitted.poll() is None, log.read_text()
            return "checkpoint written" in log.read_text()

        wait_until(is_behind_a_checkpoint, "the log says so", timeout_s=150)
        yield submitted, log


def stopped_at(run: RunFolder) -> int:
    """The step of the result and of the newest checkpoint."""
    result = run.read_json(run.result_json)
    assert result["outcome"] == "stopped"
    newest = checkpoint.latest_checkpoint(run.checkpoints)
    assert newest is not None
    assert checkpoint.step_of(newest) == result["steps"] < NUM_STEPS
    return int(result["steps"])


def go_on(head: Head, folder: Path, run: str | Path, *overrides: str) -> None:
    """Resume it by a job of its own."""
    command = ["--", "elastic", "resume", run, *overrides]
    resumed = head.ray("job", "submit", "--working-dir", folder, *command)
    assert resumed.returncode == 0, resumed.stdout


def go_on_elsewhere(run: RunFolder, cluster: str) -> None:
    """Resume it from this process, on the cluster of the tests."""
    run_job(load_job(run.job_json), run_dir=run.path, task=Tiny(), resume=True)


def test_a_stopped_job_goes_on(
    undisturbed: Outcome, head: Head, folder: Path, cluster: str
) -> None:
    patient = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}  # else Ray kills the driver after three seconds
    with training(head, folder, "stopped", sleep_s=0.7, **patient) as (submitted, log):
        asked = head.ray("job", "submit", "--", "elastic", "status", f"stopped{TAG}")
        assert asked.returncode == 0, asked.stdout  # from elsewhere, by way of Ray
        stop = head.ray("job", "stop", f"stopped{TAG}")
        assert stop.returncode == 0, stop.stdout
        submitted.wait(timeout=60)
    assert head.status(f"stopped{TAG}") == "STOPPED"
    run = run_of(head, "stopped")
    assert f"go on by       elastic resume {run.path}" in log.read_text()
    assert not run.ray_json.exists()
    stopped_at(run)
    go_on_elsewhere(run, cluster)
    check_result(run, undisturbed)


def test_a_stopped_job_that_ray_kills_goes_on(
    undisturbed: Outcome, head: Head, folder: Path
) -> None:
    """Ray waits a second for the driver after SIGTERM, and then kills it; what it told the others
    is done all the same."""
    brief = {"RAY_JOB_STOP_WAIT_TIME_S": "1"}
    with training(head, folder, "killed", sleep_s=4.0, **brief) as (submitted, _):
        run = run_of(head, "killed")
        num_done = len(run.read_metrics())
        wait_until(lambda: len(run.read_metrics()) > num_done, "another step begins")
        head.stop(f"killed{TAG}")
        submitted.wait(timeout=60)
    assert head.status(f"killed{TAG}") == "STOPPED"
    assert run.ray_json.exists(), "it was killed"
    wait_until(run.result_json.exists, "the others finish the step and write a checkpoint")
    stopped_at(run)
    go_on(head, folder, f"killed{TAG}")
    check_result(run, undisturbed)


@pytest.fixture(scope="module")
def metadata() -> Iterator[Metadata]:
    with metadata_server() as service:
        yield service


@pytest.fixture(scope="module")
def guarded(metadata: Metadata, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster that wants a token, on a spot machine of AWS."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text("5e" * 32)
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    with started_head(folder / "home", **variables, **metadata.variables) as head:
        yield head


def test_a_node_that_aws_takes_away(
    undisturbed: Outcome, guarded: Head, folder: Path, metadata: Metadata
) -> None:
    """The job ends with an error and a checkpoint, and goes on; nobody gets in without the token,
    and nobody is asked for notices unless the job says so."""
    stranger = replace(guarded, environment={**guarded.environment, "RAY_AUTH_TOKEN": "a0" * 32})
    refused = stranger.ray("job", "submit", "--working-dir", folder, "--", "elastic", "--help")
    assert refused.returncode != 0, refused.stdout
    assert "token" in refused.stdout.lower()
    source = "preemption.source=aws"
    with training(guarded, folder, "spot", source, sleep_s=0.7) as (submitted, log):
        ends = datetime.now(UTC) + timedelta(seconds=120)
        metadata.answers[SPOT] = json.dumps(
            {"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
        ).encode()
        assert submitted.wait(timeout=90) == 1, log.read_text()
    run = run_of(guarded, "spot")
    check_taken(run, log, "AWS will terminate this node in ")
    metadata.asked.clear()
    go_on(guarded, folder, run.path, "preemption.source=none")
    check_result(run, undisturbed)
    assert metadata.asked == []


def test_a_node_that_ray_drains(
    undisturbed: Outcome, guarded: Head, folder: Path, cluster: str
) -> None:
    """This comes last: nothing begins on that node any more."""
    with training(guarded, folder, "drained", sleep_s=0.7) as (submitted, log):
        guarded.python(DRAIN)
        assert submitted.wait(timeout=90) == 1, log.read_text()
    run = run_of(guarded, "drained")
    check_taken(run, log, "Ray drains this node")
    go_on_elsewhere(run, cluster)
    check_result(run, undisturbed)


def check_taken(run: RunFolder, log: Path, said: str) -> None:
    assert f"error: {said}" in log.read_text()
    assert f"elastic resume {run.path}" in log.read_text()
    assert [one["reason"] for one in run.read_events() if one["kind"] == "preempted"]
    stopped_at(run)
