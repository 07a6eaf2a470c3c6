"""Less goes over a slow link that steering knows of, until a person undoes it; no bit changes."""

from __future__ import annotations

import statistics
import time

import pytest

from benchmarks.hosts import HEAD, HostJob
from elastic.core.config import JobConfig
from scripts.testbed import Testbed
from tests.hosts.testbeds import ELASTIC, bits, hosts_up, on_hosts, scraped
from tests.integration.support import make_job

pytestmark = [*on_hosts(300), pytest.mark.chaos]

NUM_STEPS, NUM_AFTER = 260, 12
RATE = "8mbit"
"""Hosts that share two cores send and receive up to some 60 % more slowly by chance: it is to be
far slower than that, or an end of the link seems slow, too."""


bed = hosts_up("around", 3)


def job_of(num_nodes: int) -> JobConfig:
    return make_job(
        "around",
        workers=3,
        steps=NUM_STEPS,
        task_args={"width": 512},
        nodes={"min": num_nodes, "max": num_nodes},
        replicas=3,
        monitoring={"steering": "act"},
        evaluate={"every": 0},
    )


def sent(bed: Testbed, job: HostJob) -> tuple[float, int]:
    """Bytes over the link that becomes slow, and steps until now."""
    told = scraped(bed, job)
    names = [f'elastic_link_sent_bytes_total{{receiver="{a}",sender="{b}"}}' for a, b in ENDS]
    return sum(told[name] for name in names), int(told["elastic_steps_total"])


ENDS = ((1, 2), (2, 1))


def test_less_goes_over_a_slow_link_until_a_person_undoes_it(bed: Testbed) -> None:
    """The hosts share this machine's cores: it must be idle."""
    calm = bits(HostJob(bed, job_of(1)).end())
    job = HostJob(bed, job_of(3))
    job.settle(3)
    job.go_on(40)
    (bytes_0, step_0), slow_s = sent(bed, job), time.time()
    bed.host("h2").slow_to(bed.host("h3"), RATE)
    planned_s = job.await_event("traffic_planned", slow_s)
    bytes_1, step_1 = sent(bed, job)
    job.await_rows(lambda rows: rows[-1]["step"] >= step_1 + NUM_AFTER)
    bytes_2, step_2 = sent(bed, job)
    undone_s = time.time()
    done = bed.run(HEAD, *ELASTIC, "undo", str(job.run.path), "all")
    assert done.returncode == 0, done.stderr
    job.await_event("traffic_planned", undone_s)
    bed.host("h2").fast_to(bed.host("h3"))
    run = job.end()
    assert bits(run) == calm
    told = [one["reason"] for one in run.events if one["kind"] == "traffic_planned"]
    assert "chunks go over link 1 - 2" in told[0]
    assert told[-1].startswith("no link is slow any more")
    usual, planned = (
        (bytes_1 - bytes_0) / (step_1 - step_0),
        (bytes_2 - bytes_1) / (step_2 - step_1),
    )
    assert planned < 0.6 * usual, told
    while_slow = [one["step_s"] for one in run.metrics if slow_s < one["time_s"] < planned_s]
    after = [one["step_s"] for one in run.metrics if one["step"] in range(step_1 + 2, step_2)]
    assert statistics.median(after) < statistics.median(while_slow), told
