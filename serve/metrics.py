"""Metrics of one replica, in a registry of its own: those of the metric table that are of serving.

Only counts; knows no request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family

from monitoring.metrics import OF_SERVING, Metric

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TABLE: Mapping[str, Metric] = {one.name: one for one in OF_SERVING}
_OUTCOMES = ("promoted", "refused", "rolled_back")


class Metrics:
    """All of them. `replica` is a label of each sample: several replicas answer at one address, and
    a counter that jumped between them would seem to restart."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._registry = CollectorRegistry()
        self._of: dict[tuple[str, str], tuple[Counter, Histogram, Counter]] = {}
        self.requests = self._counter("serve_requests_total")
        self.request_s = self._histogram("serve_request_seconds")
        self.degraded = self._counter("serve_degraded_total")
        self.calls = self._counter("serve_expert_calls_total")
        self.rows = self._counter("serve_expert_rows_total")
        self.call_s = self._histogram("serve_expert_seconds")
        self.expert_state = self._gauge("serve_expert_state")
        self.batch_rows = self._histogram("serve_batch_rows", _ROWS)
        self.queue_rows = self._gauge("serve_queue_rows")
        self.swaps = self._counter("serve_swaps_total")
        self.version = self._gauge("serve_version_share")
        for outcome in _OUTCOMES:  # so that the first one is seen to be added
            self.swaps.labels(outcome)

    def called(self, expert: str, outcome: str, took_s: float, rows: int) -> None:
        """A call of an expert is over."""
        if (expert, outcome) not in self._of:  # labels() takes longer than a small expert's layer
            self._of[expert, outcome] = (
                self.calls.labels(expert, outcome),
                self.call_s.labels(expert),
                self.rows.labels(expert),
            )
        calls, seconds, answered = self._of[expert, outcome]
        calls.inc()
        seconds.observe(took_s)
        if outcome == "ok":
            answered.inc(rows)

    def text(self, accept: str, states: Mapping[str, int]) -> tuple[bytes, str]:
        """As Prometheus reads it, in the form that it accepts, and what that is called.

        Args:
            states: of the experts that are served.
        """
        self.expert_state.clear()
        for expert, state in states.items():
            self.expert_state.labels(expert).set(state)
        encode, content_type = choose_encoder(accept)
        return encode(self), content_type

    def collect(self) -> Iterator[Family]:
        """All samples, with their replica."""
        for family in self._registry.collect():
            family.samples = [
                one._replace(labels={**one.labels, "replica": self._replica})
                for one in family.samples
                if not one.name.endswith("_created")
            ]
            yield family

    def _counter(self, name: str) -> Counter:
        return Counter(*_described(name), registry=self._registry)

    def _gauge(self, name: str) -> Gauge:
        return Gauge(*_described(name), registry=self._registry)

    def _histogram(self, name: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(*_described(name), buckets=buckets, registry=self._registry)


def _described(name: str) -> tuple[str, str, tuple[str, ...]]:
    metric = _TABLE[name]
    return metric.full_name, metric.meaning, metric.labels
