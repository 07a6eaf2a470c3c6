"""Hands the metrics of a job to Ray, for those who let Prometheus scrape Ray's own agents.

Ray gives them the prefix `ray_`, and counters the suffix `_total`. Of a histogram it gets sum and
count as counters: Ray would guess the sum from its buckets. The slowest workers are left out: Ray
forgets no value as long as the process lives that told it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from monitoring.metrics import OF_A_JOB, Metric
from monitoring.tally import Histogram

_JOB = "elastic_job"
"""The label that names the job; `job` is Prometheus' own."""


class Instruments(Protocol):
    """`ray.util.metrics`."""

    Counter: Any
    Gauge: Any


class RayMetrics:
    """Of one job, from a process of Ray."""

    def __init__(self, job: str, instruments: Instruments) -> None:
        self._job, self._instruments = job, instruments
        self._made: dict[str, Any] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}

    def tell(self, values: Mapping[str, Any]) -> None:
        """Hand over what a scrape would read now; `values` as `monitoring.exporter` has them."""
        for metric in OF_A_JOB:
            value = values[metric.name]
            if value is None or metric.kind == "info" or {"worker", "sender"} & set(metric.labels):
                continue
            if isinstance(value, Histogram):
                self._count(metric, f"{metric.full_name}_sum", {(): value.sum_s})
                self._count(metric, f"{metric.full_name}_count", {(): float(sum(value.counts))})
            elif metric.kind == "counter":
                self._count(metric, metric.full_name.removesuffix("_total"), value)
            else:
                gauge = self._make(self._instruments.Gauge, metric, metric.full_name)
                for labels, one in value.items():
                    gauge.set(one, tags=self._tags(metric, labels))

    def _count(self, metric: Metric, name: str, values: Mapping[tuple[str, ...], float]) -> None:
        """Counters of Ray only go up by what one adds."""
        counter = self._make(self._instruments.Counter, metric, name)
        for labels, value in values.items():
            more = value - self._told.get((name, labels), 0.0)
            if more > 0:
                counter.inc(more, tags=self._tags(metric, labels))
                self._told[name, labels] = value

    def _make(self, kind: Any, metric: Metric, name: str) -> Any:
        if name not in self._made:
            self._made[name] = kind(name, metric.meaning, (_JOB, *metric.labels))
        return self._made[name]

    def _tags(self, metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
        return {_JOB: self._job, **dict(zip(metric.labels, labels, strict=True))}
