"""The file system of the run folder stalls for seconds, as shared ones do: training goes on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import HostJob, HostRun
from scripts.testbed import Testbed
from tests.hosts.testbeds import on_hosts
from tests.integration.support import make_job

pytestmark = on_hosts(240)
NUM_STEPS = 300
STALL_S = 4.0
"""Longer than an aggregator may hang, and than a link may be silent."""


def call(*words: str | Path) -> None:
    subprocess.run(words, check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which can be stopped."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(2**26)
    call("mkfs.ext4", "-q", image)
    try:
        call("mount", "-o", "loop", image, folder)
    except subprocess.CalledProcessError:
        pytest.skip("this machine forbids loop devices")
    yield folder
    call("umount", "--lazy", folder)


@pytest.fixture
def bed(disk: Path) -> Iterator[Testbed]:
    with Testbed(f"disk{os.getpid()}") as made:
        made.up(2)
        yield made


def job_on(bed: Testbed, num_nodes: int, runs: Path) -> HostJob:
    nodes = {"min": num_nodes, "max": num_nodes}
    job = make_job("stalled", workers=2, steps=NUM_STEPS, nodes=nodes, checkpoint={"every": 0})
    return HostJob(bed, job, runs)


def bits(run: HostRun) -> tuple[str, str]:
    assert run.lost_steps() == []
    assert run.result["outcome"] == "finished"
    return run.result["params_sha256"], run.result["samples_sha256"]


def test_steps_go_on_and_are_written_down_later(bed: Testbed, disk: Path, tmp_path: Path) -> None:
    calm = job_on(bed, 1, tmp_path).end()
    job = job_on(bed, 2, disk)
    job.settle()
    job.go_on(20)
    begin_s = time.time()
    call("fsfreeze", "--freeze", disk)
    try:
        time.sleep(STALL_S)
    finally:
        end_s = time.time()
        call("fsfreeze", "--unfreeze", disk)
    run = job.end()
    assert bits(run) == bits(calm)
    assert sum(begin_s < one["time_s"] < end_s for one in run.metrics) >= 10
    lost = {"node_lost", "node_leads", "aggregator_lost", "aggregator_hung", "metrics_missing"}
    assert [one["kind"] for one in run.events if one["kind"] in lost] == ["node_leads"]
