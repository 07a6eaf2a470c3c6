"""However many hosts a job has, and however many it loses at once: the same bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.hosts import HostJob, heal
from scripts.hosts import Host
from scripts.testbed import Testbed
from tests.hosts.testbeds import bits, hosts_up, on_hosts
from tests.integration.support import make_job

pytestmark = [*on_hosts(600), pytest.mark.chaos]
NUM_STEPS = 240
NUM_HOSTS = 5


bed = hosts_up("five", NUM_HOSTS)


def job_on(bed: Testbed, num_nodes: int, *, workers: int, replicas: int = 2) -> HostJob:
    job = make_job(
        f"on-{num_nodes}",
        workers=workers,
        steps=NUM_STEPS,
        nodes={"min": num_nodes, "max": num_nodes},
        replicas=replicas,
        chunk_elements=1024,
        checkpoint={"every": 0},
    )
    return HostJob(bed, job)


@pytest.fixture(scope="module")
def alone(bed: Testbed) -> tuple[str, str]:
    return bits(job_on(bed, 1, workers=1).end())


@pytest.mark.parametrize(
    ("num_nodes", "workers", "replicas"), [(1, 3, 2), (2, 2, 2), (3, 4, 1), (5, 5, 2)]
)
def test_one_two_three_and_five_hosts_end_alike(
    num_nodes: int, workers: int, replicas: int, bed: Testbed, alone: tuple[str, str]
) -> None:
    assert bits(job_on(bed, num_nodes, workers=workers, replicas=replicas).end()) == alone


def test_two_of_five_hosts_may_die_at_once(bed: Testbed, alone: tuple[str, str]) -> None:
    job = job_on(bed, NUM_HOSTS, workers=NUM_HOSTS, replicas=3)
    job.settle(1)
    job.go_on(10)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(Host.kill, bed.hosts[-2:]))
    run = job.end()
    assert bits(run) == alone
    assert len([one for one in run.events if one["kind"] == "node_lost"]) == 2
    heal(bed)
