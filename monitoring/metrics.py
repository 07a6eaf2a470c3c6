"""The metric table: everything that a job exports, its type, unit, labels and meaning.

Base units, names of Prometheus, a bounded number of series: no label is a step or a sample, and of
workers and links only the slowest have series of their own. Only data; exports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from monitoring.account import PARTS
from policies.verdicts import Kind

PREFIX = "elastic_"
NUM_SLOWEST = 32
"""So many workers have series of their own: the slowest ones."""
NUM_LINKS = 32
"""So many links have: those that take longest for a byte. Up to six hosts have no more."""

SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 300.0, 600.0),
)
"""Upper bounds of the buckets of each histogram; what is longer is in the last one."""

KINDS = tuple(kind.value for kind in Kind)

LABELS: Mapping[str, int] = {
    "part": len(PARTS),
    "kind": len(KINDS),
    "state": 4,
    "outcome": 4,
    "worker": NUM_SLOWEST,
    "node": 64,
    "expert": 64,
    "version": 4,
    "route": 32,
    "status": 16,
    "sender": NUM_LINKS,
    "receiver": 1,  # for each of these senders
    "peer": NUM_LINKS,
    "gpu": 16,
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
        num = len(SECONDS) + 3 if self.kind == "histogram" else 1
        for label in self.labels:
            num *= LABELS[label]
        return num


OF_A_JOB = (
    Metric("info", "info", "Version of elastic that runs the job", ("version",)),
    Metric("steps_total", "counter", "Committed steps"),
    Metric("samples_total", "counter", "Samples in committed steps"),
    Metric("step_seconds", "histogram", "Time from commit to commit"),
    Metric("training", "gauge", "1 while the job trains, 0 while it starts or ends"),
    Metric(
        "seconds_total", "counter", "Wall time by where it went: the goodput account", ("part",)
    ),
    Metric("workers", "gauge", "Workers: computing, spare, unfit, wanted", ("state",)),
    Metric("nodes", "gauge", "Nodes that take part in the step"),
    Metric("generation", "gauge", "Version of the membership"),
    Metric("departures_total", "counter", "Workers lost without being asked to go", ("node",)),
    Metric("loss", "gauge", "Loss of the newest committed step"),
    Metric("grad_norm", "gauge", "Norm of the gradient of the newest committed step"),
    Metric("overflows_total", "counter", "Attempts redone because a sum left int32"),
    Metric("nonfinite_total", "counter", "Results with NaN or Inf; each is computed once more"),
    Metric("skipped_steps_total", "counter", "Steps skipped for NaN or Inf"),
    Metric("duplicates_total", "counter", "Duplicate leases"),
    Metric(
        "unaudited_total", "counter", "Micro-batches to be audited that nobody else could compute"
    ),
    Metric(
        "dropped_total", "counter", "Micro-batches that steps of an inexact policy ended without"
    ),
    Metric("verdicts_open", "gauge", "Verdicts of the fault detector that hold", ("kind",)),
    Metric("verdicts_total", "counter", "Verdicts that began", ("kind",)),
    Metric(
        "pace_ratio", "gauge", "Pace of the slowest workers over their role's median", ("worker",)
    ),
    Metric(
        "link_sent_bytes_total",
        "counter",
        "Bytes that a link's receiver has acknowledged",
        ("sender", "receiver"),
    ),
    Metric(
        "link_busy_seconds_total",
        "counter",
        "Time in which bytes were on their way over a link",
        ("sender", "receiver"),
    ),
    Metric(
        "link_wait_seconds_total",
        "counter",
        "Time in which a link's receiver waited for the rest of a message",
        ("sender", "receiver"),
    ),
    Metric("replicas", "gauge", "Copies of the chunk that has fewest"),
    Metric("replicas_wanted", "gauge", "Copies that every chunk should have"),
    Metric("checkpoint_timestamp_seconds", "gauge", "When the newest checkpoint was written"),
    Metric(
        "checkpoint_seconds", "histogram", "From the commit of a step to its checkpoint in storage"
    ),
)
"""What the exporter of a job tells."""

_GPU = ("gpu",)
OF_A_NODE = (
    Metric("node_step", "gauge", "Step that the node is at"),
    Metric("node_workers", "gauge", "Workers that have a slot on the node"),
    Metric(
        "node_worker_progress_total",
        "counter",
        "Micro-batches of a worker that are over, and how much of the one at hand is done",
        ("worker",),
    ),
    Metric(
        "node_steal_seconds_total",
        "counter",
        "Time in which a processor was given to others, mean of all of the host",
    ),
    Metric(
        "node_memory_stall_seconds_total",
        "counter",
        "Time in which some task of the host waited for memory",
    ),
    Metric(
        "node_disk_stall_seconds_total",
        "counter",
        "Time in which some task of the host waited for a disk",
    ),
    Metric("node_memory_kills_total", "counter", "Processes of the host killed for lack of memory"),
    Metric(
        "node_link_sent_bytes_total", "counter", "Bytes that a peer has acknowledged", ("peer",)
    ),
    Metric(
        "node_link_busy_seconds_total",
        "counter",
        "Time in which bytes were on their way to a peer",
        ("peer",),
    ),
    Metric(
        "node_link_send_wait_seconds_total",
        "counter",
        "Time in which the kernel took no more for a peer",
        ("peer",),
    ),
    Metric(
        "node_link_receive_wait_seconds_total",
        "counter",
        "Time in which the node waited for the rest of a peer's message",
        ("peer",),
    ),
    Metric(
        "node_link_cuts_total",
        "counter",
        "Links to a peer that were given up since nothing came over them",
        ("peer",),
    ),
    Metric("node_gpu_utilisation_ratio", "gauge", "Share of time in which a card computes", _GPU),
    Metric("node_gpu_memory_used_bytes", "gauge", "Memory of a card that is taken", _GPU),
    Metric("node_gpu_memory_bytes", "gauge", "Memory that a card has", _GPU),
    Metric("node_gpu_temperature_celsius", "gauge", "Temperature of a card", _GPU),
    Metric("node_gpu_power_watts", "gauge", "Power that a card draws", _GPU),
    Metric(
        "node_gpu_throttled_seconds_total",
        "counter",
        "Time in which heat or its power supply held a card back",
        _GPU,
    ),
    Metric(
        "node_gpu_ecc_errors_total",
        "counter",
        "Errors in the memory of a card that were not corrected",
        _GPU,
    ),
    Metric("node_gpu_xid", "gauge", "Newest error (XID) that the driver told of, 0: none", _GPU),
    Metric(
        "node_gpu_faults_total",
        "counter",
        "Errors (XID) that are the card's own, not a program's",
        _GPU,
    ),
)
"""What the exporter of one node tells, where it is wanted. Targets have the label `node`."""

OF_SERVING = (
    Metric("serve_requests_total", "counter", "Requests by route and status", ("route", "status")),
    Metric("serve_request_seconds", "histogram", "From request to answer", ("route",)),
    Metric("serve_degraded_total", "counter", "Answers for which an expert was lost"),
    Metric("serve_expert_calls_total", "counter", "Calls by outcome", ("expert", "outcome")),
    Metric("serve_expert_rows_total", "counter", "Rows that an expert answered for", ("expert",)),
    Metric("serve_expert_seconds", "histogram", "Calls of an expert", ("expert",)),
    Metric(
        "serve_expert_state",
        "gauge",
        "0: asked, 1: tried again, 2: left out, 3: unloaded",
        ("expert",),
    ),
    Metric("serve_batch_rows", "histogram", "Rows of a call"),
    Metric("serve_queue_rows", "gauge", "Rows that wait or are in work"),
    Metric("serve_swaps_total", "counter", "New versions by what became of them", ("outcome",)),
    Metric("serve_version_share", "gauge", "Share of requests", ("version",)),
)
"""What a replica that serves tells. All have the label `replica`, too."""

TABLE = OF_A_JOB + OF_A_NODE + OF_SERVING


def num_series(table: Sequence[Metric] = OF_A_JOB) -> int:
    """The most series that one job can have; or whoever tells of `table`."""
    return sum(metric.num_series for metric in table)
