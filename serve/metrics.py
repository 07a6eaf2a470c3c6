"""Metrics of one replica, in a registry of its own: per expert, per route, per version.

Only counts; knows no request.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PREFIX = "elastic_serve_"


class Metrics:
    """All of them; names begin with elastic_serve_. `replica` is a label of each sample: several
    replicas answer at one address, and a counter that jumped between them would seem to restart."""

    def __init__(self, replica: str) -> None:
        self.registry, self._replica = CollectorRegistry(), replica
        self._of: dict[tuple[str, str], tuple[Counter, Histogram, Counter]] = {}
        self.requests = self._counter("requests", "Requests by route and status", "route", "status")
        self.request_s = self._histogram("request_seconds", "From request to answer", "route")
        self.degraded = self._counter("degraded", "Answers for which an expert was lost")
        self.calls = self._counter("expert_calls", "Calls by outcome", "expert", "outcome")
        self.rows = self._counter("expert_rows", "Rows that an expert answered for", "expert")
        self.call_s = self._histogram("expert_seconds", "Calls of an expert", "expert")
        self.expert_state = Gauge(
            _PREFIX + "expert_state",
            "0: asked, 1: tried again, 2: left out",
            ["expert"],
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            _PREFIX + "batch_rows", "Rows of a call", buckets=_ROWS, registry=self.registry
        )
        self.queue_rows = Gauge(
            _PREFIX + "queue_rows", "Rows that wait or are in work", registry=self.registry
        )
        self.swaps = self._counter("swaps", "New versions by what became of them", "outcome")
        self.version = Gauge(
            _PREFIX + "version_share", "Share of requests", ["version"], registry=self.registry
        )

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

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """All samples, with their replica."""
        for metric in self.registry.collect():
            metric.samples = [
                one._replace(labels={**one.labels, "replica": self._replica})
                for one in metric.samples
            ]
            yield metric

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, *labels: str) -> Histogram:
        return Histogram(_PREFIX + name, meaning, labels, buckets=_SECONDS, registry=self.registry)
