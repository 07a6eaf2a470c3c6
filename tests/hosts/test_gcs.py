"""Ray's control service (GCS) dies and comes back while a job trains on two hosts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from benchmarks.hosts import HEAD, Happening, HostJob
from scripts.testbed import Settings, Testbed
from tests.hosts.testbeds import on_hosts
from tests.integration.support import make_job

pytestmark = on_hosts(240)
NUM_STEPS = 300


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Testbed]:
    """Two hosts; the GCS keeps what it knows on disk."""
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", "/tmp/ray/gcs")
    with Testbed(f"gcs{os.getpid()}") as made:
        made.up(2, Settings(cpus=2))
        yield made


def job_on(bed: Testbed, num_nodes: int, name: str) -> HostJob:
    nodes = {"min": num_nodes, "max": num_nodes}
    job = make_job(name, workers=2, steps=NUM_STEPS, nodes=nodes, checkpoint={"every": 0})
    return HostJob(bed, job)


def test_steps_go_on_without_it_and_the_coordinator_returns_with_it(bed: Testbed) -> None:
    calm = job_on(bed, 1, "calm").end()
    job = job_on(bed, 2, "gcs")
    job.settle()
    job.go_on(10)
    bed.kill_gcs()
    killed_s = time.time()
    job.happen(Happening(20, "kill_coordinator", HEAD))
    job.go_on(80)
    back_s = time.time()
    bed.start_gcs()
    run = job.end()
    assert sum(killed_s < one["time_s"] < back_s for one in run.metrics) >= 60
    (restarted,) = (one for one in run.events if one["kind"] == "coordinator_restarted")
    assert restarted["time_s"] > back_s
    assert run.lost_steps() == []
    for name in ("outcome", "params_sha256", "samples_sha256"):
        assert run.result[name] == calm.result[name]
