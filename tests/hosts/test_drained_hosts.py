"""Steering has drained a host: it leaves, stays away, and comes back once a person undoes it.

And what the links of these hosts carry is told to Prometheus.
"""

from __future__ import annotations

import json
import time
from functools import partial
from itertools import permutations
from typing import Any

from benchmarks.hosts import HEAD, Happening, HostJob
from monitoring.actions import STEERED, action_fields
from policies.steering import Remedy, Taken
from policies.verdicts import Kind, Node
from scripts.testbed import Testbed
from tests.hosts.testbeds import ELASTIC, hosts_up, on_hosts, scraped
from tests.integration.support import make_job, wait_until

pytestmark = on_hosts(300)

STAYS_AWAY = 30


bed = hosts_up("drain", 3)


def last(job: HostJob, kind: str) -> dict[str, Any]:
    return [one for one in job.run.read_events() if one["kind"] == kind][-1]


def newest_workers(job: HostJob) -> int:
    newest = job.run.newest_metrics()
    return newest["num_workers"] if newest else 0


def targets(job: HostJob) -> list[str | None]:
    """Of Prometheus: the nodes, in their order, after the job itself."""
    told = json.loads(job.run.prometheus_json.read_text())
    return [one["labels"].get("node") for one in told]


def sent(bed: Testbed, job: HostJob, node: int, peer: int) -> float:
    """What the exporter of a node says of its link to another; 0 if it is not there yet."""
    if str(node) not in targets(job):
        return 0.0
    name = f'elastic_node_link_sent_bytes_total{{peer="{peer}"}}'
    return scraped(bed, job, node=str(node)).get(name, 0.0)


def is_told(bed: Testbed, job: HostJob, sender: int, receiver: int) -> bool:
    """Whether the job and the sending node say of a link what it carries."""
    told = scraped(bed, job)
    ends = f'{{receiver="{receiver}",sender="{sender}"}}'
    is_sent = told.get(f"elastic_link_sent_bytes_total{ends}", 0) > 0
    is_timed = f"elastic_link_busy_seconds_total{ends}" in told  # 0 where all took less than a tick
    return is_sent and is_timed and sent(bed, job, sender, receiver) > 0


def test_a_drained_host_stays_away_until_a_person_undoes_it(bed: Testbed) -> None:
    """Also where the coordinator that did it is gone: its successor finds it in the run folder."""
    nodes = {"min": 1, "max": 3}
    monitoring = {"node_port": 0}
    config = make_job("drained", workers=3, steps=100_000, nodes=nodes, monitoring=monitoring)
    job = HostJob(bed, config)
    job.settle()
    wait_until(lambda: targets(job) == [None, "0", "1", "2"], "the exporters of all nodes")
    for pair in permutations(range(3), 2):
        wait_until(partial(is_told, bed, job, *pair), f"link {pair} is told of by both")
    begin_s = time.time()
    taken = Taken(begin_s, Remedy.DRAIN, Node(2), Kind.SLOW_SENDER, num_workers=1)
    job.run.tell(STEERED, "drain node 2: it is slow", action=action_fields(taken))
    job.happen(Happening(1, "kill_coordinator", HEAD))
    left_s = job.await_event("node_left", begin_s)
    leaving = last(job, "node_leaving")["reason"]
    assert leaving.startswith("node 2: monitoring.steering: slow sender: its workers finish")
    num_rows = len(job.run.read_metrics())
    while len(job.run.read_metrics()) < num_rows + STAYS_AWAY:
        assert "node_joining" not in [
            one["kind"] for one in job.run.read_events() if one["time_s"] > left_s
        ]
        time.sleep(0.05)
    done = bed.run(HEAD, *ELASTIC, "undo", str(job.run.path), "node 2")
    assert done.returncode == 0, done.stderr
    job.await_event("node_joined", left_s)
    assert last(job, "undone")["culprit"] == "node 2"
    wait_until(lambda: newest_workers(job) == 3, "three workers compute again", timeout_s=120)
    wait_until(lambda: sent(bed, job, 3, 0) > 0, "the new node is scraped, too")
    wait_until(lambda: targets(job) == [None, "0", "1", "3"], "the one that left is not")
    assert job.stop().lost_steps() == []
