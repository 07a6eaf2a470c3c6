"""What a scrape of a node reads: its host, links and workers; few series, none of the job's."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed

from actors.mesh import Address, find_address
from actors.node_exporter import LOOK_S, NodeExporter
from actors.setup import JobSetup
from elastic.core.config import JobConfig
from elastic.core.protocol.messages import CutCount, GpuCount, HostCount, LinkCount, Pulse
from elastic.core.runs import RunFolder
from monitoring.exporter import discovery
from monitoring.metrics import LABELS, OF_A_NODE, num_series
from monitoring.node_exporter import node_registry

HOST = HostCount(at_s=9.0, steal_s=1.5, memory_s=0.25, disk_s=2.0, kills=1)
LINKS = (LinkCount(0, 5000, 2.0, 0.5, 0.125), LinkCount(2, 7000, 3.0, 0.0, 0.0))
CARDS = (
    GpuCount(0, 9.0, 0.5, 100, 400, 61.0, 350.0, 1.5, 2, 79, 1),
    GpuCount(1, 9.0, celsius=40.0),
)
PULSE = Pulse(
    1,
    step=42,
    progress=((3, 90 << 32), (4, 80 << 32 | 1 << 30)),
    links=LINKS,
    host=HOST,
    cuts=(CutCount(0, 1, 1), CutCount(2, 0)),
    gpus=CARDS,
)


def families(pulse: Pulse) -> dict[str, Any]:
    text = generate_latest(node_registry(lambda: pulse)).decode()
    return {one.name: one for one in parsed(text)}


def values(pulse: Pulse) -> dict[tuple[str, ...], float]:
    """By the name in the table, and by the label."""
    return {
        (sample.name.removeprefix("elastic_node_"), *sample.labels.values()): sample.value
        for family in families(pulse).values()
        for sample in family.samples
    }


def test_each_metric_of_the_table_has_its_type_labels_and_value() -> None:
    found = families(PULSE)
    for one in OF_A_NODE:
        family = found[one.full_name.removesuffix("_total")]
        assert (family.type, family.documentation) == (one.kind, one.meaning)
        assert family.samples
        assert all(set(sample.labels) == {*one.labels} for sample in family.samples)
    assert len(found) == len(OF_A_NODE)
    assert values(PULSE) == {
        ("step",): 42,
        ("workers",): 2,
        ("worker_progress_total", "3"): 90,
        ("worker_progress_total", "4"): 80.5,
        ("steal_seconds_total",): 1.5,
        ("memory_stall_seconds_total",): 0.25,
        ("disk_stall_seconds_total",): 2.0,
        ("memory_kills_total",): 1,
        ("link_sent_bytes_total", "0"): 5000,
        ("link_sent_bytes_total", "2"): 7000,
        ("link_busy_seconds_total", "0"): 2.0,
        ("link_busy_seconds_total", "2"): 3.0,
        ("link_send_wait_seconds_total", "0"): 0.5,
        ("link_send_wait_seconds_total", "2"): 0.0,
        ("link_receive_wait_seconds_total", "0"): 0.125,
        ("link_receive_wait_seconds_total", "2"): 0.0,
        ("link_cuts_total", "0"): 1,
        ("link_cuts_total", "2"): 0,
        ("gpu_utilisation_ratio", "0"): 0.5,
        ("gpu_memory_used_bytes", "0"): 100,
        ("gpu_memory_bytes", "0"): 400,
        ("gpu_temperature_celsius", "0"): 61,
        ("gpu_temperature_celsius", "1"): 40,
        ("gpu_power_watts", "0"): 350,
        ("gpu_throttled_seconds_total", "0"): 1.5,
        ("gpu_ecc_errors_total", "0"): 2,
        ("gpu_xid", "0"): 79,
        ("gpu_faults_total", "0"): 1,
        ("gpu_faults_total", "1"): 0,
    }


def test_a_host_that_is_alone_has_no_links_and_what_is_not_known_is_not_told() -> None:
    told = values(Pulse(0, 0))
    assert told == {("step",): 0, ("workers",): 0}


def test_series_stay_few_whatever_the_number_of_hosts_and_workers() -> None:
    links = tuple(LinkCount(peer, 1000, 1.0 + peer) for peer in range(1000))
    progress = tuple((worker, worker) for worker in range(1000))
    cuts = tuple(CutCount(peer, 1) for peer in range(1000))
    gpus = tuple(CARDS[0]._replace(number=number) for number in range(100))
    told = values(Pulse(1, 9, progress, links=links, host=HOST, cuts=cuts, gpus=gpus))
    assert len(told) <= num_series(OF_A_NODE)
    busy = [one[1] for one in told if one[0] == "link_busy_seconds_total"]
    assert sorted(map(int, busy)) == list(range(1000 - LABELS["peer"], 1000)), "the slowest"


# ----------------------------------------------------------------------------- the server


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def setup_of(make_job: Callable[..., JobConfig], path: Path, **keys: Any) -> JobSetup:
    job = make_job(monitoring={"node_port": 0, **keys})
    return JobSetup(job=job, run=RunFolder(path), run_id="x", secret=b"", node=1)


def read(where: Address) -> str:
    with urllib.request.urlopen(f"http://{where[0]}:{where[1]}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_it_tells_what_its_aggregator_saw_last_and_where_it_listens(
    make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    clock, looked = Clock(), list[int]()
    exporter = NodeExporter(setup_of(make_job, tmp_path), tmp_path, lambda *_: None, clock)

    def look() -> Pulse:
        looked.append(1)
        return Pulse(1, len(looked))

    try:
        where = find_address(tmp_path, "127.0.0.1", "exporter")
        assert where is not None
        for seen in (1, 1, 2):
            clock.now_s += LOOK_S / 2
            exporter.turn(look)
            assert f"elastic_node_step {seen}.0" in read(where)
    finally:
        exporter.close()
    with pytest.raises(OSError, match="refused"):
        read(where)


def test_a_port_that_is_taken_is_told_and_the_node_goes_on(
    make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    told: list[tuple[str, str]] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        setup = setup_of(make_job, tmp_path, node_port=port)
        exporter = NodeExporter(setup, tmp_path, lambda *both: told.append(both))
        exporter.turn(lambda: PULSE)
        exporter.close()
    ((kind, reason),) = told
    assert kind == "monitoring_failed"
    assert f"monitoring.node_port {port} at 127.0.0.1" in reason
    assert find_address(tmp_path, "127.0.0.1", "exporter") is None


def test_the_discovery_file_lists_the_job_and_its_nodes() -> None:
    assert discovery(("::1", 5), {2: ("10.0.0.3", 7)}, job="j", run="r") == [
        {"targets": ["[::1]:5"], "labels": {"job": "j", "run": "r"}},
        {"targets": ["10.0.0.3:7"], "labels": {"job": "j", "run": "r", "node": "2"}},
    ]
    assert discovery(None, {}, job="j", run="r") == []
