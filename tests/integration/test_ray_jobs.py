"""`ray job submit -- elastic train`: logs, exit codes, where runs lie, stopping, tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic.core import checkpoint
from elastic.core.runs import RunFolder, find_run
from elastic.result import read_result
from tests.integration.fixtures import NUM_STEPS
from tests.integration.heads import Head, started_head
from tests.integration.support import TAG, Outcome, make_job, outcome, wait_until
from tests.metadata import SPOT, Metadata, metadata_server

DRAIN = """
import time
import ray
from ray._raylet import GcsClient

context = ray.init(address="auto", logging_level="ERROR")
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
    (path / "points.py").write_text("from tests.integration.support import Tiny as Points\n")
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


@pytest.mark.parametrize(
    ("wait_s", "sleep_s"), [(60, 0.7), (1, 5.0)], ids=["in good order", "killed by Ray"]
)
def test_a_stopped_job_goes_on(
    undisturbed: Outcome, head: Head, folder: Path, wait_s: int, sleep_s: float
) -> None:
    """Ray waits `wait_s` for the driver after SIGTERM, and then kills it; what it told the others
    is done all the same."""
    name = f"stopped-{wait_s}"
    write_job(folder, name, sleep_s=sleep_s)
    log, identity = folder.parent / "log", f"{name}{TAG}"
    variables = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(wait_s)}}
    arguments = ["--submission-id", identity, "--runtime-env-json", json.dumps(variables)]
    command = ["--", "elastic", "train", "job.yaml", "--faults", "faults.yaml"]
    submit = ["job", "submit", *arguments, "--working-dir", folder, *command]
    with head.started(*submit, log=log) as submitted:

        def is_behind_a_checkpoint() -> bool:
            assert submitted.poll() is None, log.read_text()
            return "checkpoint written" in log.read_text()

        wait_until(is_behind_a_checkpoint, "the log says so", timeout_s=150)
        asked = head.ray("job", "submit", "--", "elastic", "status", name + TAG)
        assert asked.returncode == 0, asked.stdout  # from elsewhere, by way of Ray
        stop = head.ray("job", "stop", identity)
        assert stop.returncode == 0, stop.stdout
        submitted.wait(timeout=60)
    status = head.ray("job", "status", identity)
    assert "was stopped" in status.stdout
    run = run_of(head, name)
    if wait_s > 1:
        assert f"go on by       elastic resume {run.path}" in log.read_text()
        assert not run.ray_json.exists()
    else:
        assert run.ray_json.exists(), "it was killed"
        wait_until(run.result_json.exists, "the others finish the step and write a checkpoint")
    result = run.read_json(run.result_json)
    assert result["outcome"] == "stopped"
    newest = checkpoint.latest_checkpoint(run.checkpoints)
    assert newest is not None
    assert checkpoint.step_of(newest) == result["steps"] < NUM_STEPS

    command = f"-- elastic resume {name}{TAG}".split()
    resumed = head.ray("job", "submit", "--working-dir", folder, *command)
    assert resumed.returncode == 0, resumed.stdout
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


def test_with_a_token(
    undisturbed: Outcome, guarded: Head, folder: Path, metadata: Metadata
) -> None:
    submit = ["job", "submit", "--working-dir", folder, *["--", "elastic", "train", "job.yaml"]]
    others = {**guarded.environment, "RAY_AUTH_TOKEN": "a0" * 32}
    stranger = replace(guarded, environment=others).ray(*submit)
    assert stranger.returncode != 0, stranger.stdout
    assert "token" in stranger.stdout.lower()
    done = guarded.ray(*submit)
    assert done.returncode == 0, done.stdout
    check_result(run_of(guarded, "submitted"), undisturbed)
    assert metadata.asked == [], "the job file does not say so"


@pytest.mark.parametrize("who", ["AWS", "Ray"])
def test_a_node_that_is_taken_away(
    undisturbed: Outcome, guarded: Head, head: Head, folder: Path, metadata: Metadata, who: str
) -> None:
    """The job ends with an error and a checkpoint, and goes on elsewhere; Ray's drain comes last,
    since nothing begins on that node any more."""
    name = f"spot-{who}"
    write_job(folder, name, sleep_s=0.7)
    log = folder.parent / "log"
    command = [
        "--",
        "elastic",
        "train",
        "job.yaml",
        "--faults",
        "faults.yaml",
        "preemption.source=aws",
    ]
    submit = ["job", "submit", "--working-dir", folder, *command]
    with guarded.started(*submit, log=log) as submitted:

        def is_behind_a_checkpoint() -> bool:
            assert submitted.poll() is None, log.read_text()
            return "checkpoint written" in log.read_text()

        wait_until(is_behind_a_checkpoint, "the log says so", timeout_s=150)
        if who == "AWS":
            ends = datetime.now(UTC) + timedelta(seconds=120)
            metadata.answers[SPOT] = json.dumps(
                {"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
            ).encode()
        else:
            drain(guarded, folder)
        assert submitted.wait(timeout=90) == 1, log.read_text()
    metadata.answers.clear()
    run = run_of(guarded, name)
    said = {"AWS": "AWS will terminate this node in ", "Ray": "Ray drains this node"}[who]
    assert f"error: {said}" in log.read_text()
    assert f"elastic resume {run.path}" in log.read_text()
    result = run.read_json(run.result_json)
    assert result["outcome"] == "stopped"
    assert [one["reason"] for one in run.read_events() if one["kind"] == "preempted"]
    newest = checkpoint.latest_checkpoint(run.checkpoints)
    assert newest is not None
    assert checkpoint.step_of(newest) == result["steps"] < NUM_STEPS

    command = f"-- elastic resume {run.path}".split()
    resumed = head.ray("job", "submit", "--working-dir", folder, *command)
    assert resumed.returncode == 0, resumed.stdout
    check_result(run, undisturbed)


def drain(head: Head, folder: Path) -> None:
    """Tell Ray that the cluster's only node will be taken away in a minute."""
    (folder / "drain.py").write_text(DRAIN)
    done = head.ray("job", "submit", "--working-dir", folder, "--", "python", "drain.py")
    assert done.returncode == 0, done.stdout
