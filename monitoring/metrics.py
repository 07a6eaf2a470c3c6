"""The metric table: everything that a job exports, its type, unit, labels and meaning.

Base units, names of Prometheus, a bounded number of series: no label is a step or a sample, and of
workers and links only the slowest have series of their own. Only data; exports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from policies.verdicts import Kind

PREFIX = "elastic_"
NUM_SLOWEST = 32
"""So many workers, and so many links, have series of their own: the slowest ones."""

PARTS = (
    *("productive", "recomputed", "waiting", "coordination", "recovery"),
    *("checkpoint", "evaluation", "start-up", "other"),
)
"""Of the goodput account, `elastic.report.account`."""

KINDS = tuple(kind.value for kind in Kind)

LABELS: Mapping[str, int] = {
    "part": len(PARTS),
    "kind": len(KINDS),
    "state": 3,
    "direction": 2,
    "outcome": 3,
    "worker": NUM_SLOWEST,
    "link": NUM_SLOWEST,
    "node": 64,
    "expert": 64,
    "version": 1,
}
"""How many values each label has at most; `job` labels everything, one exporter has one job."""


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` without the prefix. Of a histogram, Prometheus makes `_bucket`, `_sum`, `_count`."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def num_series(self) -> int:
        """At most."""
        num = NUM_BUCKETS + 3 if self.kind == "histogram" else 1
        for label in self.labels:
            num *= LABELS[label]
        return num


NUM_BUCKETS = 16

TABLE = (
    Metric("info", "info", "Version of elastic that runs the job", ("version",)),
    Metric("steps_total", "counter", "Committed steps"),
    Metric("samples_total", "counter", "Samples in committed steps"),
    Metric("step_seconds", "histogram", "Time from commit to commit"),
    Metric("training", "gauge", "1 while the job trains, 0 while it starts or ends"),
    Metric(
        "seconds_total", "counter", "Wall time by where it went: the goodput account", ("part",)
    ),
    Metric("workers", "gauge", "Workers: computing, spare, wanted", ("state",)),
    Metric("nodes", "gauge", "Nodes that take part in the step"),
    Metric("generation", "gauge", "Version of the membership"),
    Metric("departures_total", "counter", "Workers lost without being asked to go", ("node",)),
    Metric("loss", "gauge", "Loss of the newest committed step"),
    Metric("grad_norm", "gauge", "Norm of the gradient of the newest committed step"),
    Metric("overflows_total", "counter", "Attempts redone because a sum left int32"),
    Metric(
        "nonfinite_total", "counter", "Micro-batches with NaN or Inf, that two workers agreed on"
    ),
    Metric("skipped_steps_total", "counter", "Steps skipped for NaN or Inf"),
    Metric("duplicates_total", "counter", "Duplicate leases"),
    Metric("verdicts", "gauge", "Verdicts of the fault detector that hold", ("kind",)),
    Metric("verdicts_total", "counter", "Verdicts that began", ("kind",)),
    Metric("audits_total", "counter", "Audits: agreed, lied, undecided", ("outcome",)),
    Metric(
        "pace_ratio", "gauge", "Pace of the slowest workers over their role's median", ("worker",)
    ),
    Metric("link_ratio", "gauge", "Time per byte of the slowest links over the median", ("link",)),
    Metric("link_bytes_total", "counter", "Bytes between nodes", ("node", "direction")),
    Metric(
        "link_wait_seconds_total",
        "counter",
        "Time in which links did not go on",
        ("node", "direction"),
    ),
    Metric("replicas", "gauge", "Copies of the chunk that has fewest"),
    Metric("replicas_wanted", "gauge", "Copies that every chunk should have"),
    Metric("checkpoint_timestamp_seconds", "gauge", "When the newest checkpoint was written"),
    Metric("checkpoint_seconds", "histogram", "Time to write a checkpoint"),
    Metric("expert_up", "gauge", "1 if the expert answers", ("expert",)),
    Metric("requests_total", "counter", "Requests served: answered, refused, failed", ("outcome",)),
    Metric("request_seconds", "histogram", "Time to answer a request"),
)


def num_series() -> int:
    """The most series that one job can have."""
    return sum(metric.num_series for metric in TABLE)
