"""`ray job submit` of a job on several hosts: its folder reaches all, it stops, it goes on. And
the loss of the head, after which another cluster goes on with the checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.hosts import HEAD, HostJob
from elastic.core import checkpoint
from elastic.core.config import JobConfig
from elastic.core.runs import RunFolder
from scripts.testbed import Settings, Testbed
from tests.hosts.testbeds import ELASTIC, on_hosts
from tests.integration.support import TAG, make_job, wait_until

pytestmark = [*on_hosts(400), pytest.mark.chaos]
NUM_STEPS = 600
ADDRESS = "--address=http://10.77.0.1:8265"
PATIENT = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})


def job_on(num_nodes: int, name: str, storage: Path | None = None) -> JobConfig:
    return make_job(
        name,
        workers=2,
        steps=NUM_STEPS,
        nodes={"min": num_nodes, "max": num_nodes},
        checkpoint={"every": 50, "storage": None if storage is None else str(storage)},
    )


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    """Two hosts that take jobs."""
    with Testbed(f"jobs{os.getpid()}") as made:
        made.up(2, Settings(dashboard=True))
        yield made


def bits(run: RunFolder) -> tuple[str, str]:
    result = run.read_json(run.result_json)
    assert (result["outcome"], result["steps"]) == ("finished", NUM_STEPS)
    return result["params_sha256"], result["samples_sha256"]


@pytest.fixture(scope="module")
def calm(bed: Testbed) -> tuple[str, str]:
    """What the job gives on one host that nothing happens to."""
    job = HostJob(bed, job_on(1, "calm"))
    job.end()
    return bits(job.run)


def ray_job(bed: Testbed, action: str, *words: str) -> subprocess.CompletedProcess[str]:
    done = bed.run(HEAD, "ray", "job", action, ADDRESS, *words, timeout_s=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def newest_step(folder: Path) -> int:
    newest = checkpoint.latest_checkpoint(folder)
    return 0 if newest is None else checkpoint.step_of(newest)


def test_a_submitted_job_trains_on_all_hosts_stops_and_goes_on(
    bed: Testbed, calm: tuple[str, str], tmp_path: Path
) -> None:
    """The first step waits for both hosts, and no aggregator begins without the user's module."""
    folder, run = tmp_path / "mine", RunFolder(tmp_path / "run")
    folder.mkdir()
    (folder / "points.py").write_text("from tests.integration.tasks import Tiny as Points\n")
    job = job_on(2, "submitted").model_copy(update={"task": "points:Points"})
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    name = f"submitted{TAG}"
    given = ("--working-dir", str(folder), "--runtime-env-json", PATIENT)
    train = ("elastic", "train", "job.yaml", "--run-dir", str(run.path))
    ray_job(bed, "submit", "--no-wait", "--submission-id", name, *given, "--", *train)
    (folder / "points.py").unlink()  # Ray has copied it
    wait_until(lambda: newest_step(run.checkpoints) > 0, "a checkpoint is written", timeout_s=120)
    ray_job(bed, "stop", name)
    result = run.read_json(run.result_json)
    assert result["outcome"] == "stopped"
    assert newest_step(run.checkpoints) == result["steps"] < NUM_STEPS
    assert f"Job '{name}' was stopped" in ray_job(bed, "status", name).stdout
    (folder / "points.py").write_text("from tests.integration.tasks import Tiny as Points\n")
    done = ray_job(bed, "submit", *given, "--", "elastic", "resume", str(run.path))
    assert bits(run) == calm, done.stdout
    assert {one["kind"] for one in run.read_events()} >= {"job_stopped", "job_resumed"}


def test_another_cluster_goes_on_where_the_head_was_lost(
    bed: Testbed, calm: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This comes last: the first cluster has no head any more.

    Nobody can see that a process of another machine is dead: the user has to say so.
    """
    storage = tmp_path / "checkpoints"
    job = HostJob(bed, job_on(2, "headless", storage))
    wait_until(lambda: newest_step(storage) >= 100, "two checkpoints are written", timeout_s=120)
    bed.host(HEAD).kill()
    job.outlive()
    lost_at = newest_step(storage)
    assert lost_at < NUM_STEPS
    assert not job.run.result_json.exists()
    monkeypatch.chdir(tmp_path)
    resume = (*ELASTIC, "resume", str(storage))
    with Testbed(f"next{os.getpid()}") as other:
        other.up(2)
        refused = other.run("h2", *resume)
        assert refused.returncode == 1
        assert "if it is dead for sure, delete owner.json there" in refused.stderr
        (storage / "owner.json").unlink()
        done = other.run("h2", *resume, timeout_s=150)
        assert done.returncode == 0, done.stdout + done.stderr
    bed.host("h2").kill()  # what is left there would end with Ray, a minute after the head
    (result,) = (tmp_path / "runs").glob("*/result.json")
    run = RunFolder(result.parent)
    assert bits(run) == calm
    assert run.read_metrics()[0]["step"] == lost_at
