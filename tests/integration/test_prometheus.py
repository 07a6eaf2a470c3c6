"""A real job, scraped by a real Prometheus: each metric arrives, and the rules read them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from elastic.core.runs import RunFolder
from elastic.core.status import Status
from elastic.handle import connect
from elastic.result import Result
from monitoring.account import PARTS
from monitoring.dashboards.catalogue import all_dashboards
from monitoring.metrics import KINDS, OF_A_JOB, OF_A_NODE
from tests.integration.support import kinds, make_job, run_job, wait_until, write_faults
from tests.prometheus import Prometheus, needs_prometheus, prometheus

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("cluster"),
    needs_prometheus,
]

UIDS = [one["uid"] for one in all_dashboards()]
MANY_STEPS = 100_000
NUM_SCRAPES = 12
SLOW_FROM = 40  # by then the job is scraped, so that the verdict is seen to be added


@dataclass(frozen=True)
class Watched:
    """A job that has ended, and the Prometheus that scraped it until `time_s`."""

    server: Prometheus
    begin_s: float
    time_s: float
    metadata: dict[str, list[dict[str, str]]]
    target: dict[str, Any]
    of_node: dict[str, Any]
    result: Result
    status: Status

    def value(self, expression: str) -> float:
        return self.server.value(expression, self.time_s)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Scraped as `monitoring/prometheus.yml` says, only more often: a job that loses a worker, and
    has a slow one."""
    folder = tmp_path_factory.mktemp("monitored")
    job = make_job(
        "monitored",
        workers=3,
        steps=MANY_STEPS,
        checkpoint={"every": 10, "keep_last": 2},
        task_args={"width": 768},
        batch={"micro_batches": 12, "micro_batch_size": 64},
        evaluate={"every": 0},
        monitoring={"node_port": 0},
    )
    faults = write_faults(
        folder / "faults.yaml",
        [
            {"do": "kill", "at": {"step": 6, "point": "after_grant"}, "target": "worker-1"},
            {"do": "nan_gradient", "at": {"step": 8}, "target": "worker-0"},
            {"do": "slow", "at": {"step": SLOW_FROM}, "target": "worker-2", "factor": 4.0},
        ],
    )
    run_dir = folder / "runs" / "monitored"
    ended: list[Result] = []
    running = threading.Thread(
        target=lambda: ended.append(run_job(job, run_dir=run_dir, faults=faults)), daemon=True
    )
    with prometheus(folder) as server:
        running.start()
        begun_s = time.time()
        counted = f'count_over_time(elastic_steps_total{{run="monitored"}}[1m]) >= {NUM_SCRAPES}'
        wait_until(lambda: server.query(counted), "Prometheus has scraped the job")
        wait_until(lambda: server.query("elastic_checkpoint_seconds_count > 1"), "checkpoints")
        wait_until(lambda: server.query("elastic_node_step > 0"), "the node's exporter")
        slow = 'elastic_verdicts_open{kind="slow computation"} == 1'
        wait_until(lambda: server.query(slow), "the detector has found the slow worker")
        wait_until(lambda: server.query("job:elastic_goodput:ratio_rate5m > 0"), "rules")
        handle = connect(str(run_dir))
        targets = server.ask("targets")["activeTargets"]
        (target,) = (one for one in targets if "node" not in one["labels"])
        (of_node,) = (one for one in targets if "node" in one["labels"])
        watched_until_s, metadata = time.time(), server.ask("metadata")
        status = handle.status()
        handle.stop()
        running.join(60)
        yield Watched(server, begun_s, watched_until_s, metadata, target, of_node, ended[0], status)


def test_prometheus_finds_the_job_by_itself(watched: Watched) -> None:
    assert watched.target["health"] == "up", watched.target["lastError"]
    assert watched.target["labels"]["job"].startswith("monitored-")
    assert watched.target["labels"]["run"] == "monitored"
    for node in ("", "0"):
        took = f'quantile_over_time(0.25, scrape_duration_seconds{{node="{node}"}}[1m])'
        assert watched.value(took) < 0.2
    run = RunFolder(watched.result.path or "")
    assert not run.prometheus_json.exists()


OF_ONE_HOST = [one for one in OF_A_JOB if "sender" not in one.labels]
"""It has no links; `test_drained_hosts` looks at those."""


@pytest.mark.parametrize("metric", OF_ONE_HOST, ids=lambda one: one.name)
def test_each_metric_has_arrived_with_its_type(metric: Any, watched: Watched) -> None:
    suffix = "_count" if metric.kind == "histogram" else ""
    samples = watched.server.query(metric.full_name + suffix, watched.time_s)
    assert samples
    for sample in samples:
        assert set(sample["metric"]) == {"__name__", "job", "run", "instance", *metric.labels}
    family = metric.full_name.removesuffix("_total").removesuffix("_info")  # as OpenMetrics says
    (told,) = watched.metadata[family]
    assert (told["type"], told["help"]) == (metric.kind, metric.meaning)


ALONE = [one for one in OF_A_NODE if not {"peer", "gpu"} & {*one.labels}]
"""A host that is alone has no peers; `test_drained_hosts` looks at those. Nor has it cards."""


@pytest.mark.parametrize("metric", ALONE, ids=lambda one: one.name)
def test_each_metric_of_the_node_has_arrived_with_its_type(metric: Any, watched: Watched) -> None:
    labels = watched.of_node["labels"]
    assert watched.of_node["health"] == "up", watched.of_node["lastError"]
    assert (labels["run"], labels["node"]) == ("monitored", "0")
    assert labels["instance"] != watched.target["labels"]["instance"]
    samples = watched.server.query(metric.full_name, watched.time_s)
    assert samples
    for sample in samples:
        own = {"__name__", "job", "run", "node", "instance"}
        assert set(sample["metric"]) == {*own, *metric.labels}
    (told,) = watched.metadata[metric.full_name.removesuffix("_total")]
    assert (told["type"], told["help"]) == (metric.kind, metric.meaning)


def test_the_node_tells_of_itself_and_nothing_is_told_twice(watched: Watched) -> None:
    assert 0 < watched.value("elastic_node_step") <= watched.value("elastic_steps_total") + 50
    assert watched.value("elastic_node_workers") >= 2
    assert watched.value("min(elastic_node_worker_progress_total)") > 0
    for metric in OF_ONE_HOST:
        suffix = "_count" if metric.kind == "histogram" else ""
        ends = watched.server.query(f"count by (instance) ({metric.full_name}{suffix})")
        assert len(ends) <= 1, metric.full_name


def test_the_values_are_those_of_the_records(watched: Watched) -> None:
    run = RunFolder(watched.result.path or "")
    metrics = run.read_metrics()
    scraped = watched.value("elastic_steps_total")
    line = metrics[int(scraped) - 1]
    assert watched.value("elastic_loss") == pytest.approx(line["loss"])
    assert watched.value("elastic_grad_norm") == pytest.approx(line["grad_norm"])
    assert watched.value("elastic_samples_total") == scraped * line["samples"]
    assert watched.value("elastic_step_seconds_count") == scraped
    took_s = sum(one["step_s"] for one in metrics[: int(scraped)])
    assert watched.value("elastic_step_seconds_sum") == pytest.approx(took_s, rel=1e-3)
    assert watched.value("elastic_training") == 1
    assert watched.value('elastic_workers{state="wanted"}') == 3
    assert watched.value('elastic_workers{state="computing"}') in (2, 3)
    assert watched.value("elastic_generation") == watched.status.generation
    assert watched.value("elastic_nodes") == watched.value("elastic_replicas") == 1
    assert watched.value('elastic_departures_total{node="0"}') == 1
    assert watched.value("elastic_nonfinite_total") == kinds(watched.result).count("nonfinite") == 1
    assert watched.value("elastic_skipped_steps_total") == 0
    assert watched.time_s - 60 < watched.value("elastic_checkpoint_timestamp_seconds")
    assert watched.value("count(elastic_pace_ratio)") in (2, 3)
    assert watched.value("count(elastic_verdicts_open)") == len(KINDS)


def test_the_slow_worker_and_nobody_else_has_a_verdict(watched: Watched) -> None:
    """Hangs are not looked at: on a busy machine a worker may get no processor for a while."""
    told = [one for one in watched.result.events if one["kind"] == "verdict"]
    told = [one for one in told if one["verdict"]["kind"] == "slow computation"]
    assert [(one["verdict"]["kind"], one["worker"]) for one in told] == [("slow computation", 2)]
    assert told[0]["step"] >= SLOW_FROM
    assert watched.value('elastic_verdicts_total{kind="slow computation"}') == 1
    assert watched.value('elastic_pace_ratio{worker="2"}') > 1.5
    advice = [one for one in watched.result.events if one["kind"] == "advice"]
    assert [one["worker"] for one in advice if "computes" in one["reason"]] == [2]


def test_the_goodput_account_adds_up_to_the_wall_time(watched: Watched) -> None:
    run = RunFolder(watched.result.path or "")
    scraped = int(watched.value("elastic_steps_total"))
    begun_s = run.read_events()[0]["time_s"]
    wall_s = run.read_metrics()[scraped - 1]["time_s"] - begun_s
    parts = {
        one["metric"]["part"]: float(one["value"][1])
        for one in watched.server.query("elastic_seconds_total", watched.time_s)
    }
    assert set(parts) == set(PARTS)
    assert sum(parts.values()) == pytest.approx(wall_s, rel=0.01)
    assert parts["other"] < 0.02 * wall_s
    assert parts["start-up"] > 0 < parts["productive"]


def test_recording_rules_have_results_and_no_rule_fails(watched: Watched) -> None:
    groups = watched.server.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
    assert {rule["health"] for rule in rules} == {"ok"}
    of_training = [
        rule["name"]
        for rule in rules
        if rule["type"] == "recording" and "request" not in rule["name"]
    ]
    for name in of_training:
        assert watched.server.query(name, watched.time_s), name
    assert 0 < watched.value("job:elastic_goodput:ratio_rate5m") <= 1
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert set(firing) <= {"ElasticNotFinite"}  # which is right: a gradient was NaN


NOT_HERE = re.compile(r"elastic_(node_)?link_|elastic_node_gpu_")
"""A job on one host has no links; `test_drained_hosts` looks at those. Nor has this one cards."""


@pytest.mark.parametrize("uid", [one for one in UIDS if one != "elastic-serving"])
def test_every_query_of_every_panel_returns_data(uid: str, watched: Watched) -> None:
    (dashboard,) = (one for one in all_dashboards() if one["uid"] == uid)
    job = watched.target["labels"]["job"]
    empty = watched.server.empty_queries(dashboard, job, watched.begin_s, watched.time_s)
    assert [one for one in empty if not NOT_HERE.search(one)] == []
