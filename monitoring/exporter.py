"""Tells Prometheus how a job is doing: the metric table, filled from its records and its status.

One exporter per job, in the process of its coordinator; nodes may have their own
(`monitoring.node_exporter`). A scrape reads what is in memory; it asks
no process and costs the step nothing. Labels are those of the table; `job` and `run` come from the
discovery file that lies beside the run folder.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitoring.account import PARTS
from monitoring.counters import LinkTotal
from monitoring.metrics import KINDS, LABELS, NUM_SLOWEST, OF_A_JOB, SECONDS, Metric
from monitoring.tally import Histogram, Now, Tally

EVERYWHERE = ("0.0.0.0", "::")
"""All addresses of a host."""
_POLL_S = 0.1

Address = tuple[str, int]
"""A host and a port."""
Labels = tuple[str, ...]
Values = Mapping[Labels, float] | Histogram | None
"""By the values of the metric's labels; None: there is nothing to tell yet."""


def values_of(tally: Tally, now: Now, links: Sequence[LinkTotal] = ()) -> dict[str, Values]:
    """What each metric of a job reads, by its name in the table."""
    status, newest = now.status, tally.newest or {}
    departures = Counter(dict.fromkeys((0, *now.node_of.values()), 0))
    departures.update(now.node_of.get(one["worker"], 0) for one in tally.departures)
    held = Counter(kind for kind, _ in tally.verdicts)
    return {
        "info": {(version("elastic"),): 1.0},
        "steps_total": _one(tally.num_steps),
        "samples_total": _one(tally.num_samples),
        "step_seconds": tally.step_s,
        "training": _one(status.phase == "training"),
        "seconds_total": {(part,): tally.ledger.seconds[part] for part in PARTS},
        "workers": {
            ("computing",): status.num_workers,
            ("spare",): status.num_spare,
            ("unfit",): status.num_unfit,
            ("wanted",): status.target_workers,
        },
        "nodes": _one(status.num_nodes),
        "generation": _one(status.generation),
        "departures_total": {
            (str(node),): num for node, num in departures.most_common(LABELS["node"])
        },
        "loss": _one(newest.get("loss")),
        "grad_norm": _one(newest.get("grad_norm")),
        "overflows_total": _one(tally.num_overflows),
        "nonfinite_total": _one(tally.num_nonfinite),
        "skipped_steps_total": _one(tally.num_skipped),
        "duplicates_total": _one(tally.num_duplicates),
        "unaudited_total": _one(tally.num_unaudited),
        "dropped_total": _one(tally.num_dropped),
        "verdicts_open": {(kind,): held[kind] for kind in KINDS},
        "verdicts_total": {(kind,): tally.num_verdicts[kind] for kind in KINDS},
        "pace_ratio": {(str(one),): pace for one, pace in tally.slowest(NUM_SLOWEST)},
        "link_sent_bytes_total": _of_links({one: one.sent for one in links}),
        "link_busy_seconds_total": _of_links({one: one.busy_s for one in links}),
        "link_wait_seconds_total": _of_links({one: one.wait_s for one in links}),
        "replicas": _one(now.replicas),
        "replicas_wanted": _one(now.replicas_wanted),
        "checkpoint_timestamp_seconds": _one(tally.newest_checkpoint_s),
        "checkpoint_seconds": tally.checkpoint_s,
    }


def _one(value: float | None) -> Values:
    """Of a metric without labels."""
    return None if value is None else {(): float(value)}


def _of_links(values: Mapping[LinkTotal, float]) -> Values:
    """By both ends; a job on one host has no links."""
    return {(str(one.sender), str(one.receiver)): value for one, value in values.items()} or None


def family(metric: Metric, values: Values) -> Family | None:
    """One metric as Prometheus has it."""
    if values is None:
        return None
    if isinstance(values, Histogram):
        so_far, buckets = 0, []
        for bound, num in zip((*map(str, SECONDS), "+Inf"), values.counts, strict=True):
            so_far += num
            buckets.append((bound, so_far))
        return HistogramMetricFamily(metric.full_name, metric.meaning, buckets, values.sum_s)
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    if metric.kind == "info":
        made: Any = InfoMetricFamily(metric.full_name.removesuffix("_info"), metric.meaning)
        for labels in values:
            made.add_metric([], dict(zip(metric.labels, labels, strict=True)))
        return made  # type: ignore[no-any-return]
    made = kinds[metric.kind](metric.full_name, metric.meaning, labels=metric.labels)
    for labels, value in values.items():
        made.add_metric(labels, value)
    return made  # type: ignore[no-any-return]


class _Collector(Collector):
    def __init__(self, read: Callable[[], Mapping[str, Values]], table: Sequence[Metric]) -> None:
        self._read, self._table = read, table

    def collect(self) -> Iterator[Family]:
        values = self._read()
        for metric in self._table:
            made = family(metric, values[metric.name])
            if made is not None:
                yield made

    def describe(self) -> list[Family]:
        return []


def registry_of(
    read: Callable[[], Mapping[str, Values]], table: Sequence[Metric] = OF_A_JOB
) -> CollectorRegistry:
    """A registry of its own, with the metrics of one job, or of another table."""
    registry = CollectorRegistry()
    registry.register(_Collector(read, table))
    return registry


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A line a scrape helps nobody."""


class Exporter:
    """Answers scrapes at `host` and `port`; port 0: any that is free."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Raises OSError where it cannot listen there."""
        app = make_wsgi_app(registry)
        self._server = make_server(host, port, app, ThreadingWSGIServer, _Silent)
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="exporter", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def reached_at(host: str, address: str = "") -> str:
    """Where others reach who listens at `host`: if that is everywhere, at the address of the
    machine, or by its name where that is not known."""
    return host if host not in EVERYWHERE else address or socket.gethostname()


def discovery(
    target: Address | None, nodes: Mapping[int, Address], *, job: str, run: str
) -> list[dict[str, Any]]:
    """What a file for `file_sd_configs` of Prometheus holds; `job`, `run` and, of the exporters of
    nodes, `node` become labels."""
    labels = {"job": job, "run": run}
    told = [] if target is None else [{"targets": [_target(target)], "labels": labels}]
    return told + [
        {"targets": [_target(where)], "labels": {**labels, "node": str(node)}}
        for node, where in sorted(nodes.items())
    ]


def _target(where: Address) -> str:
    host, port = where
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
