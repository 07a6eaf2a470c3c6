"""Hosts are added to a running job, leave it, and are waited for; the result is the same."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import HEAD, HostJob, heal
from elastic.core.config import JobConfig
from scripts.testbed import Testbed
from tests.hosts.testbeds import ELASTIC, hosts_up, on_hosts
from tests.integration.support import make_job, wait_until

pytestmark = on_hosts(300)

NUM_STEPS = 400


bed = hosts_up("grow", 3)


def job_on(least: int, most: int, name: str, storage: Path | None = None) -> JobConfig:
    nodes = {"min": least, "max": most}
    checkpoint = {"every": 0, "storage": storage and str(storage)}
    return make_job(name, workers=3, steps=NUM_STEPS, nodes=nodes, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def calm(bed: Testbed) -> str:
    """What the job gives on one host that nothing happens to."""
    return str(HostJob(bed, job_on(1, 1, "calm")).end().result["params_sha256"])


def seen(job: HostJob, kind: str) -> list[dict[str, Any]]:
    return [one for one in job.run.read_events() if one["kind"] == kind]


def scale(bed: Testbed, job: HostJob, nodes: int) -> subprocess.CompletedProcess[str]:
    return bed.run(HEAD, *ELASTIC, "scale", str(job.run.path), "--nodes", str(nodes))


def test_nodes_are_scaled_while_a_job_runs(bed: Testbed, calm: str) -> None:
    job = HostJob(bed, job_on(1, 3, "scaled"))
    job.settle()
    job.go_on(5)
    done = scale(bed, job, 1)
    assert "3 → 1 nodes" in done.stdout, done.stderr
    wait_until(lambda: len(seen(job, "node_left")) == 2, "two hosts leave", timeout_s=60)
    refused = scale(bed, job, 4)
    assert refused.returncode == 1
    assert "4 nodes asked for; nodes.min is 1, nodes.max is 3" in refused.stderr
    assert scale(bed, job, 2).returncode == 0
    wait_until(lambda: seen(job, "node_joined"), "one comes back", timeout_s=60)
    run = job.end()
    assert run.result["params_sha256"] == calm
    assert run.lost_steps() == []
    assert not {"node_lost", "worker_lost"} & {one["kind"] for one in run.events}


def test_a_resumed_job_waits_for_the_hosts_that_it_needs(
    bed: Testbed, calm: str, tmp_path: Path
) -> None:
    job = HostJob(bed, job_on(2, 3, "resumed", storage=tmp_path / "checkpoints"))
    job.settle()
    stopped = job.stop().result
    assert stopped["outcome"] == "stopped"
    others = [host for host in bed.hosts if host.name != HEAD]
    for host in others:
        host.kill()
    wait_until(lambda: bed.alive() == {HEAD}, "Ray says so", timeout_s=60)
    log = job.run.path / "resumed.log"
    with log.open("w") as file, _resumed(bed, job.run.path, file) as driver:
        waits = wait_until(lambda: seen(job, "waiting_for_nodes"), "it waits", timeout_s=60)
        assert waits[0]["reason"].startswith("1 of 2 nodes (nodes.min) are there")
        assert len(job.run.read_metrics()) == stopped["steps"]
        bed.start(others[0])
        assert driver.wait(timeout=200) == 0, log.read_text()
    heal(bed)
    result = job.run.read_json(job.run.result_json)
    assert (result["outcome"], result["params_sha256"]) == ("finished", calm)
    told = [one["kind"] for one in job.run.read_events()]
    since = told[told.index("job_resumed") :]
    came = [one for one in since if one in {"node_joining", "node_joined"}]
    assert came[0] == "node_joined", "both have read the checkpoint"


def _resumed(bed: Testbed, path: Path, log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        bed.host(HEAD).command(*ELASTIC, "resume", str(path)),
        env=bed.environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
