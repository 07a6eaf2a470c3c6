"""A host whose link is slow is named and left out before it takes part, as one that joins is."""

from __future__ import annotations

import time

from benchmarks.hosts import HostJob
from elastic.core.config import JobConfig
from scripts.testbed import Testbed
from tests.hosts.testbeds import hosts_up, on_hosts
from tests.integration.support import make_job, wait_until

pytestmark = on_hosts(300)

RATE = "20mbit"
LIMIT = 10.0
"""Hosts share the cores of this machine, so equal links differ; this one is a hundred times slower
than any."""
STEPS_AFTER = 20


bed = hosts_up("unfit", 3)


def job(name: str, *, least: int) -> JobConfig:
    nodes = {"min": least, "max": 3}
    made = make_job(name, workers=3, steps=100_000, nodes=nodes)
    workers = made.workers.model_copy(update={"preflight": LIMIT})
    return made.model_copy(update={"workers": workers})


def unfit(host_job: HostJob) -> list[str]:
    return [one["reason"] for one in host_job.run.read_events() if one["kind"] == "node_unfit"]


def nodes_joined(host_job: HostJob) -> list[str]:
    return [one["reason"] for one in host_job.run.read_events() if one["kind"] == "node_joined"]


def test_a_job_begins_without_the_host_of_a_slow_link(bed: Testbed) -> None:
    bed.host("h3").slow(RATE)
    slow = HostJob(bed, job("unfit", least=2))
    slow.settle(2)
    slow.go_on(STEPS_AFTER)
    (why,) = unfit(slow)
    bed.host("h3").fast()
    assert why.startswith(("node 1 left out: link", "node 2 left out: link"))
    assert "the fleet's median is" in why
    assert "(workers.preflight 10)" in why
    run = slow.stop()
    assert run.lost_steps() == []
    assert len(nodes_joined(slow)) == 1


def test_it_takes_part_where_there_are_too_few_without_it(bed: Testbed) -> None:
    bed.host("h3").slow(RATE)
    slow = HostJob(bed, job("needed", least=3))
    slow.settle(3)
    slow.go_on(3)
    bed.host("h3").fast()
    (why,) = unfit(slow)
    assert "takes part, since there are too few (nodes.min 3)" in why
    assert slow.stop().lost_steps() == []


def test_a_host_that_comes_is_judged_while_others_train(bed: Testbed) -> None:
    """It is fit the first time, so it joins; it is unfit when it comes back, and does not."""
    bed.host("h3").kill()
    training = HostJob(bed, job("joins", least=2))
    training.settle()
    bed.start(bed.host("h3"))
    fit_s = training.await_event("node_joined", time.time() - 1)
    assert unfit(training) == []
    bed.host("h3").kill()
    training.await_event("node_lost", fit_s)
    bed.start(bed.host("h3"))
    bed.host("h3").slow(RATE)
    wait_until(lambda: bool(unfit(training)), "it is named", timeout_s=120)
    (why,) = unfit(training)
    bed.host("h3").fast()
    assert "left out: link" in why
    run = training.stop()
    assert run.lost_steps() == []
    assert "node_leaving" not in [one["kind"] for one in run.events]
    joined_s = [one["time_s"] for one in run.events if one["kind"] == "node_joined"]
    assert max(joined_s) == fit_s
