"""Two hosts of three do not reach each other, or one says nothing to anybody: who is named."""

from __future__ import annotations

import time

import pytest

from benchmarks.hosts import Do, Happening, HostJob
from scripts.testbed import Testbed
from tests.hosts.testbeds import hosts_up, on_hosts
from tests.integration.support import make_job, wait_until

pytestmark = on_hosts(300)


bed = hosts_up("links", 3)


def test_a_link_on_which_nothing_comes_is_named(bed: Testbed) -> None:
    nodes = {"min": 2, "max": 3}
    job = HostJob(bed, make_job("cut", workers=3, steps=100_000, nodes=nodes))
    job.settle()
    job.go_on(20)
    begin_s = time.time()
    bed.host("h2").part(bed.host("h3"))

    def named() -> list[str]:
        return [
            one["verdict"]["culprit"]
            for one in job.run.read_events()
            if one["kind"] == "verdict" and one["time_s"] > begin_s
            if one["verdict"]["kind"] == "hang in communication"
        ]

    wait_until(lambda: bool(named()), "a verdict on the link", timeout_s=60)
    job.await_event("node_lost", begin_s)
    assert named() == ["link 1 -> 2"]
    assert job.stop().lost_steps() == []


@pytest.mark.chaos  # what a busy machine's hosts say late tells of them, too
@pytest.mark.parametrize(
    ("do", "kind"), [("freeze", "hang outside communication"), ("cut", "hang in communication")]
)
def test_a_host_that_says_nothing_froze_or_is_cut_off(bed: Testbed, do: Do, kind: str) -> None:
    nodes = {"min": 2, "max": 3}
    job = HostJob(bed, make_job("silent", workers=3, steps=100_000, nodes=nodes))
    job.settle()
    job.happen(Happening(20, do, "h3"))
    job.await_event("verdict", time.time() - 5)
    job.go_on(40)
    told = [one["verdict"] for one in job.stop().events if one["kind"] == "verdict"]
    assert kind in [one["kind"] for one in told]
    assert {one["culprit"] for one in told} <= {"node 1", "node 2"}
