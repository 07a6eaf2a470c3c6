"""What a scrape of a job reads: each metric's type and value, few series, soon."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed

from actors.contacts import OneContact
from actors.monitor import Monitor
from actors.pulses import Pulses
from actors.setup import JobSetup
from elastic.core.config import JobConfig
from elastic.core.protocol.messages import LinkCount, Pulse
from elastic.core.runs import RunFolder
from elastic.core.status import Status
from monitoring.counters import Counters, LinkTotal
from monitoring.exporter import registry_of, values_of
from monitoring.metrics import NUM_LINKS, NUM_SLOWEST, OF_A_JOB, num_series
from monitoring.tally import Now, Tally
from tests.fake_run import FAULTS, FakeRun
from tests.fake_steps import event, healthy, step_line
from tests.integration.support import wait_until

DEADLINE_S = 20.0


def now(**more: Any) -> Now:
    given = {"phase": "training", "num_steps": 200, "run_dir": "r", "num_workers": 4}
    status = Status(**{**given, "target_workers": 5, "generation": 6, **more})
    return Now(status=status, node_of={0: 0, 3: 1}, replicas=2, replicas_wanted=2)


LINKS = [LinkTotal(0, 1, 5000, 2.0, 0.5), LinkTotal(1, 0, 7000, 3.0, 0.25)]


def scraped(tally: Tally, at: Now) -> dict[str, Any]:
    """Families by name, through the text that Prometheus reads."""
    text = generate_latest(registry_of(lambda: values_of(tally, at, LINKS))).decode()
    return {one.name: one for one in parsed(text)}


def taken(folder: RunFolder) -> Tally:
    tally = Tally(folder.read_json(folder.job_json))
    tally.take(
        steps=folder.read_metrics(),
        events=folder.read_events(),
        evaluations=folder.read_evaluations(),
    )
    return tally


def value(families: dict[str, Any], family: str, suffix: str = "", **labels: str) -> float:
    """Of the one sample that has these labels."""
    (found,) = (
        sample.value
        for sample in families[f"elastic_{family}"].samples
        if sample.name == f"elastic_{family}{suffix}" and labels.items() <= sample.labels.items()
    )
    return float(found)


@pytest.fixture
def fake(tmp_path: Path) -> FakeRun:
    fake = FakeRun(tmp_path, num_steps=120)
    fake.run(FAULTS)
    return fake


def test_each_metric_of_the_table_has_its_type_labels_and_value(fake: FakeRun) -> None:
    families = scraped(taken(fake.folder), now())
    metrics = fake.folder.read_metrics()
    for one in OF_A_JOB:
        suffix = {"counter": "_total", "info": "_info"}.get(one.kind, "")
        family = families[one.full_name.removesuffix(suffix)]
        assert family.type == one.kind, one.name
        assert family.documentation == one.meaning
        for sample in family.samples:
            assert set(sample.labels) == {*one.labels, *(["le"] if "le" in sample.labels else [])}
    assert len(families) == len(OF_A_JOB)
    assert value(families, "steps", "_total") == 120
    assert value(families, "samples", "_total") == 120 * 32
    assert value(families, "link_sent_bytes", "_total", sender="0", receiver="1") == 5000
    assert value(families, "link_busy_seconds", "_total", sender="1") == 3
    assert value(families, "link_wait_seconds", "_total", sender="1") == 0.25
    assert value(families, "step_seconds", "_count") == 120
    assert value(families, "step_seconds", "_sum") == pytest.approx(
        sum(one["step_s"] for one in metrics)
    )
    shorter = sum(one["step_s"] <= 0.1 for one in metrics)
    assert value(families, "step_seconds", "_bucket", le="0.1") == shorter
    assert 0 < shorter < 120
    assert value(families, "training") == 1
    assert value(families, "workers", state="computing") == 4
    assert value(families, "workers", state="wanted") == 5
    assert value(families, "generation") == 6
    assert value(families, "loss") == metrics[-1]["loss"]
    assert value(families, "departures", "_total", node="1") == 1  # worker 3; 4 was on none known
    assert value(families, "departures", "_total", node="0") == 1
    duplicates = sum(one["num_duplicates"] for one in metrics)
    assert value(families, "duplicates", "_total") == duplicates
    slow = value(families, "pace_ratio", worker="2")  # since step 60 at 3, others at 1 to 1.15
    assert 2.4 < slow < 3.2
    written = [one for one in fake.folder.read_events() if one["kind"] == "checkpoint_written"]
    assert value(families, "checkpoint_timestamp_seconds") == written[-1]["time_s"]


def test_a_checkpoint_takes_from_the_commit_of_its_step_until_it_is_written() -> None:
    tally = Tally({})
    step = {"step": 9, "time_s": 100.0, "step_s": 1.0, "samples": 1, "num_duplicates": 0}
    event = {"kind": "checkpoint_written", "time_s": 102.5, "reason": "step 10: /x/step-10"}
    tally.take(steps=[step], events=[event], evaluations=[])
    assert (tally.checkpoint_s.sum_s, sum(tally.checkpoint_s.counts)) == (2.5, 1)


def test_a_worker_that_died_in_a_step_does_not_come_back_with_what_it_had_done() -> None:
    tally = Tally({})
    joined = [event("worker_joined", 0.0, worker) for worker in healthy()]
    tally.take(steps=[], events=[*joined, event("worker_lost", 1.5, 3)], evaluations=[])
    tally.take(steps=[step_line(1, healthy())], events=[], evaluations=[])
    assert set(tally.paces) == tally.members == {0, 1, 2}
    tally.take(steps=[], events=[event("worker_joined", 2.0, 3)], evaluations=[])
    tally.take(steps=[step_line(2, healthy())], events=[], evaluations=[])
    assert set(tally.paces) == {0, 1, 2, 3}


def test_audits_that_nobody_could_take_and_what_was_dropped_are_counted() -> None:
    tally = Tally({})
    tally.take(
        steps=[
            {**step_line(step, healthy()), "num_unaudited": 2, "num_dropped": 3}
            for step in range(3)
        ],
        events=[],
        evaluations=[],
    )
    assert value(scraped(tally, now()), "unaudited", "_total") == 6
    assert value(scraped(tally, now()), "dropped", "_total") == 9


def test_what_is_not_known_yet_is_not_told() -> None:
    families = scraped(Tally({}), now(phase="starting"))
    assert families["elastic_training"].samples[0].value == 0
    assert {"elastic_loss", "elastic_grad_norm", "elastic_checkpoint_timestamp_seconds"}.isdisjoint(
        families
    )


def test_verdicts_that_hold_and_that_began_are_told() -> None:
    tally = Tally({})
    name = {"kind": "slow computation", "culprit": "worker 3"}
    begun = {"kind": "verdict", "time_s": 1.0, "verdict": name, "reason": ""}
    ended = {"kind": "verdict_ended", "time_s": 2.0, "verdict": name, "reason": ""}
    tally.take(steps=[], events=[begun], evaluations=[])
    families = scraped(tally, now())
    assert value(families, "verdicts_open", kind="slow computation") == 1
    assert value(families, "verdicts", "_total", kind="slow link") == 0
    tally.take(steps=[], events=[ended], evaluations=[])
    tally.take(steps=[], events=[{**begun, "time_s": 3.0}], evaluations=[])
    assert tally.num_verdicts["slow computation"] == 2


STEP = {"step_s": 1.0, "samples": 8000, "num_duplicates": 0, "loss": 1.0, "grad_norm": 1.0}


def large(num_workers: int, num_steps: int) -> list[dict[str, Any]]:
    """Steps of many workers, two micro-batches each."""
    return [
        {
            **STEP,
            "step": step,
            "time_s": step + 1.0,
            "work": [
                [one // 2, one, step + one % 2 * 0.5, step + one % 2 * 0.5 + 0.4, "granted"]
                for one in range(2 * num_workers)
            ],
        }
        for step in range(num_steps)
    ]


def test_a_scrape_of_1000_workers_is_quick_and_has_few_series() -> None:
    tally = Tally({})
    tally.take(steps=large(1000, 20), events=[], evaluations=[])
    counters = Counters()
    for node in range(20):
        links = [LinkCount(peer, 10_000, node + 1.0) for peer in range(20) if peer != node]
        counters.take(Pulse(node, 0, links=tuple(links)))
    registry = registry_of(lambda: values_of(tally, now(), counters.links(NUM_LINKS)))
    begun_s = time.thread_time()  # whatever else runs here
    text = generate_latest(registry).decode()
    took_s = time.thread_time() - begun_s
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) <= num_series()
    assert sum("elastic_pace_ratio" in one for one in samples) == NUM_SLOWEST
    busy = [one for one in samples if "elastic_link_busy" in one]
    assert len(busy) == NUM_LINKS
    assert all('sender="19"' in one or 'sender="18"' in one for one in busy), "the slowest"
    assert took_s < 0.2


# --- the thread of the coordinator ------------------------------------------------------------


def monitor_of(make_job: Callable[..., JobConfig], folder: RunFolder, **keys: Any) -> Monitor:
    setup = JobSetup(job=make_job(monitoring=keys), run=folder, run_id="x", secret=b"")

    def event(kind: str, reason: str) -> None:
        folder.append_event(
            {"time_s": 1.0, "kind": kind, "step": 0, "generation": 0, "reason": reason}
        )

    pulses = Pulses(OneContact(folder.path), wanted=False)
    return Monitor(setup, now, event, lambda worker: None, pulses)


def test_it_listens_where_the_run_folder_says_until_it_is_stopped(
    make_job: Callable[..., JobConfig], fake: FakeRun
) -> None:
    folder = fake.folder
    monitor = monitor_of(make_job, folder)
    monitor.start()
    wait_until(folder.prometheus_json.exists, "it listens", timeout_s=DEADLINE_S)
    (found,) = json.loads(folder.prometheus_json.read_text())
    assert found["labels"] == {"job": "t", "run": folder.path.name}
    (target,) = found["targets"]
    assert target.startswith("127.0.0.1:")
    ask = urllib.request.Request(
        f"http://{target}/metrics", headers={"Accept": "application/openmetrics-text"}
    )
    with urllib.request.urlopen(ask, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        families = {one.name: one for one in parsed(answer.read().decode())}
    assert value(families, "steps", "_total") == 120
    monitor.stop()
    wait_until(lambda: not folder.prometheus_json.exists(), "it ends", timeout_s=DEADLINE_S)


def test_a_port_that_is_taken_is_told_and_the_job_goes_on(
    make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monitor = monitor_of(make_job, folder, port=port)
        monitor.start()
        wait_until(folder.read_events, "it tells", timeout_s=DEADLINE_S)
    monitor.stop()
    (event,) = folder.read_events()
    assert event["kind"] == "monitoring_failed"
    assert f"monitoring.port {port} at 127.0.0.1" in event["reason"]
    assert not folder.prometheus_json.exists()
