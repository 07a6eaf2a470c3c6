"""`elastic serve`, scraped by a real Prometheus: each metric arrives, the panels have data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from monitoring.dashboards.serving import serving as dashboard
from monitoring.metrics import OF_SERVING
from tests.integration.serving import elastic_serve
from tests.integration.support import wait_until
from tests.prometheus import Prometheus, needs_prometheus, prometheus
from tests.served import make_repository, trained

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    needs_prometheus,
]

NUM_REQUESTS = 30
INFER = '{route="/v2/models/{model}/infer"}'


@dataclass(frozen=True)
class Watched:
    """Experts that were served, and the Prometheus that scraped them until `time_s`."""

    server: Prometheus
    begin_s: float
    time_s: float
    metadata: dict[str, list[dict[str, str]]]
    labels: dict[str, str]

    def value(self, expression: str) -> float:
        return self.server.value(expression, self.time_s)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two replicas that share requests; of the experts one gives garbage from the beginning, one is
    unloaded, one gets a new version."""
    folder = tmp_path_factory.mktemp("served")
    repository = make_repository(folder / "tiny")
    garbage = {name: one * 1e38 for name, one in trained("flow", 1).weights.items()}
    repository = repository.replace_expert("expert-2", garbage)
    overrides = ("placement.replicas=2", "placement.mode=colocated")
    found = folder / "runs" / "serving-tiny.prometheus.json"
    with (
        prometheus(folder) as server,
        elastic_serve(folder / "tiny", folder / "log", *overrides) as serving,
    ):
        begin_s = time.time()
        seen = "count(count by (replica) (last_over_time(elastic_serve_queue_rows[1m]))) == 2"
        wait_until(lambda: server.query(seen), "both replicas are scraped")
        assert {serving.infer().status_code for _ in range(NUM_REQUESTS)} == {200}
        unload = serving.url + "/v2/repository/models/expert-1/unload"
        assert httpx.post(unload, timeout=30).status_code == 200
        repository.replace_expert("expert-0", trained("flow", 50).weights)
        for expression in (
            f"sum(last_over_time(elastic_serve_requests_total{INFER}[2m])) == {NUM_REQUESTS}",
            'max(last_over_time(elastic_serve_expert_state{expert="expert-0"}[10s])) == 0',
            'min(last_over_time(elastic_serve_expert_state{expert="expert-1"}[10s])) == 3',
            'max(max_over_time(elastic_serve_expert_state{expert="expert-2"}[10s])) == 2',
            'min(last_over_time(elastic_serve_swaps_total{outcome="promoted"}[2m])) == 1',
            "job:elastic_request_seconds:p99_rate5m > 0",
            "job:elastic_requests_failed:ratio_rate5m == 0 or vector(0)",
        ):
            wait_until(lambda asked=expression: server.query(asked), expression, timeout_s=60)
        (target,) = server.ask("targets")["activeTargets"]
        assert target["health"] == "up", target["lastError"]
        rules = [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}
        firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
        assert firing <= {"ElasticExpertDown"}  # which is right
        until_s, metadata = time.time(), server.ask("metadata")
        yield Watched(server, begin_s, until_s, metadata, target["labels"])
        assert found.exists()
    assert not found.exists(), "nobody answers there any more"


def test_it_is_found_as_jobs_are(watched: Watched) -> None:
    assert (watched.labels["job"], watched.labels["run"]) == ("tiny", "serving-tiny")


@pytest.mark.parametrize("metric", OF_SERVING, ids=lambda one: one.name)
def test_each_metric_has_arrived_with_its_type(metric: Any, watched: Watched) -> None:
    suffix = "_count" if metric.kind == "histogram" else ""
    asked = f"last_over_time({metric.full_name}{suffix}[1m])"
    samples = watched.server.query(asked, watched.time_s)
    assert samples
    own = {"job", "run", "instance", "replica"}
    for sample in samples:
        assert set(sample["metric"]) - {"__name__"} == {*own, *metric.labels}
    (told,) = watched.metadata[metric.full_name.removesuffix("_total")]
    assert (told["type"], told["help"]) == (metric.kind, metric.meaning)


def test_what_replicas_count_adds_up(watched: Watched) -> None:
    assert watched.value(
        f"sum(last_over_time(elastic_serve_request_seconds_count{INFER}[2m]))"
    ) == (NUM_REQUESTS)
    rows = "sum by (replica) (last_over_time(elastic_serve_expert_rows_total[2m]))"
    answered = [float(one["value"][1]) for one in watched.server.query(rows, watched.time_s)]
    assert len(answered) == 2
    assert sum(answered) >= NUM_REQUESTS
    degraded = watched.value("sum(last_over_time(elastic_serve_degraded_total[2m]))")
    assert degraded == NUM_REQUESTS, "expert-2 would have been asked"
    shares = "last_over_time(elastic_serve_version_share[10s])"
    assert {float(one["value"][1]) for one in watched.server.query(shares, watched.time_s)} == {1.0}


def test_every_query_of_the_dashboard_returns_data(watched: Watched) -> None:
    empty = watched.server.empty_queries(dashboard(), "tiny", watched.begin_s, watched.time_s)
    assert empty == []
