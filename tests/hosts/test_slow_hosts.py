"""A host whose network is slow is named while the job runs."""

from __future__ import annotations

import re

import pytest

from benchmarks.hosts import Happening, HostJob
from scripts.testbed import Testbed
from tests.hosts.testbeds import hosts_up, on_hosts
from tests.integration.support import make_job

pytestmark = [*on_hosts(300), pytest.mark.chaos]

SLOW_S = 20.0
NETWORK = ("slow sender", "slow receiver", "slow link")


bed = hosts_up("slow", 3)


def test_the_host_of_a_slow_link_is_named(bed: Testbed) -> None:
    """Both its directions are slow: it is a slow sender and a slow receiver, at first its links.

    Nobody else is named. The hosts share this machine's cores: it must be idle.
    """
    job = make_job(
        "slow",
        workers=3,
        steps=100_000,
        task_args={"width": 512},
        nodes={"min": 3, "max": 3},
        evaluate={"every": 0},
    )
    host_job = HostJob(bed, job)
    host_job.settle(3)
    host_job.happen(Happening(60, "slow", "h3", for_s=SLOW_S))
    run = host_job.stop()
    told = [one for one in run.events if one["kind"] == "verdict"]
    told = [one for one in told if one["verdict"]["kind"] in NETWORK]
    reasons = [one["reason"] for one in told]
    assert all(one["time_s"] > run.at_s[0] for one in told), reasons
    nodes = {one["verdict"]["culprit"] for one in told if "node" in one["verdict"]["culprit"]}
    assert nodes in ({"node 1"}, {"node 2"}), reasons
    number = nodes.pop().removeprefix("node ")
    links = [one["verdict"]["culprit"] for one in told if "link" in one["verdict"]["culprit"]]
    assert all(number in re.findall(r"\d+", link) for link in links), reasons
