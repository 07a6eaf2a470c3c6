"""A job on several hosts: whatever happens to them, it ends with the bits of a calm run on one."""

from __future__ import annotations

import pytest

from benchmarks.hosts import HEAD, Happening, HostJob, HostRun, heal
from elastic.core.config import JobConfig
from scripts.testbed import Testbed
from tests.hosts.testbeds import bits, hosts_up, on_hosts
from tests.integration.support import make_job

pytestmark = on_hosts(300)

NUM_STEPS = 240
LONGEST_S = 20.0
"""Between two commits, whatever happens; the machine may be busy."""


bed = hosts_up("many", 3)


def job_on(num_nodes: int, name: str) -> JobConfig:
    return make_job(
        name,
        workers=3,
        steps=NUM_STEPS,
        nodes={"min": num_nodes, "max": num_nodes},
        checkpoint={"every": 0},
    )


@pytest.fixture(scope="module")
def calm(bed: Testbed) -> tuple[str, str]:
    """What the job gives on one host that nothing happens to."""
    return bits(HostJob(bed, job_on(1, "calm")).end())


def kinds(run: HostRun) -> set[str]:
    return {one["kind"] for one in run.events}


def leftovers(bed: Testbed, name: str) -> list[str]:
    """Stores of the job in the shared memory of any host."""
    return [str(one) for host in bed.hosts for one in host.root.glob(f"dev/shm/*/{name}.*")]


def test_a_host_that_dies_costs_no_step_and_comes_back_as_another(
    bed: Testbed, calm: tuple[str, str]
) -> None:
    job = HostJob(bed, job_on(3, "killed"))
    job.settle(1)
    job.happen(Happening(10, "kill", "h3", for_s=0.1))
    job.happen(Happening(150, "kill_coordinator", HEAD))
    run = job.end()
    assert bits(run) == calm
    assert {"node_lost", "coordinator_restarted"} <= kinds(run)
    assert run.gap_s(0) < LONGEST_S
    assert leftovers(bed, "killed") == []


@pytest.mark.parametrize("do", ["cut", "freeze"])
def test_a_host_that_falls_silent_is_left_behind(
    bed: Testbed, calm: tuple[str, str], do: str
) -> None:
    """When it is back it is told so; nothing that it says changes anything."""
    job = HostJob(bed, job_on(3, do))
    job.settle(1)
    job.happen(Happening(10, do, "h2", for_s=5.0))  # type: ignore[arg-type]
    run = job.end()
    assert bits(run) == calm
    assert "node_lost" in kinds(run)
    assert run.gap_s() < LONGEST_S
    heal(bed)
    assert leftovers(bed, do) == []


def test_the_lead_may_lose_its_aggregator(bed: Testbed, calm: tuple[str, str]) -> None:
    job = HostJob(bed, job_on(2, "headless"))
    job.settle(1)
    job.happen(Happening(10, "kill_aggregator", HEAD))
    assert bits(job.end()) == calm
