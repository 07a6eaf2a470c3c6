"""What the exporter of one node tells: its host, cards, links and workers, as it counts them.

Made of a pulse that lies in memory; asks nobody. Names begin with `elastic_node_`, so that nothing
that the job's exporter tells is told twice; which node it is says the label of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry

from elastic.core.protocol.advance import num_done
from elastic.core.protocol.messages import GpuCount, LinkCount, Pulse
from monitoring.exporter import Labels, Values, registry_of
from monitoring.metrics import LABELS, OF_A_NODE


def values_of_node(pulse: Pulse) -> dict[str, Values]:
    """What each metric of a node reads, by its name in the table."""
    host, links = pulse.host, _slowest(pulse.links)
    progress = sorted(pulse.progress)[: LABELS["worker"]]
    cuts = sorted(pulse.cuts, key=lambda one: -one.num)[: LABELS["peer"]]
    of_host: Mapping[str, float] = {} if host is None else host._asdict()

    def one(name: str) -> Values:
        return {(): float(of_host[name])} if of_host else None

    def of_links(read: Callable[[LinkCount], float]) -> dict[Labels, float]:
        return {(str(link.peer),): float(read(link)) for link in links}

    return {
        "node_step": {(): float(pulse.step)},
        "node_workers": {(): float(len(pulse.progress))},
        "node_worker_progress_total": {(str(one),): num_done(word) for one, word in progress},
        "node_steal_seconds_total": one("steal_s"),
        "node_memory_stall_seconds_total": one("memory_s"),
        "node_disk_stall_seconds_total": one("disk_s"),
        "node_memory_kills_total": one("kills"),
        "node_link_sent_bytes_total": of_links(lambda link: link.sent),
        "node_link_busy_seconds_total": of_links(lambda link: link.busy_s),
        "node_link_send_wait_seconds_total": of_links(lambda link: link.send_wait_s),
        "node_link_receive_wait_seconds_total": of_links(lambda link: link.receive_wait_s),
        "node_link_cuts_total": {(str(one.peer),): float(one.num) for one in cuts},
        **{name: _of_cards(pulse.gpus, field) for name, field in _OF_CARDS.items()},
    }


_OF_CARDS = {
    "node_gpu_utilisation_ratio": "utilisation",
    "node_gpu_memory_used_bytes": "memory_used",
    "node_gpu_memory_bytes": "memory",
    "node_gpu_temperature_celsius": "celsius",
    "node_gpu_power_watts": "watts",
    "node_gpu_throttled_seconds_total": "throttled_s",
    "node_gpu_ecc_errors_total": "ecc_errors",
    "node_gpu_xid": "xid",
    "node_gpu_faults_total": "faults",
}
"""Metrics, and fields of `GpuCount`."""


def _of_cards(gpus: Sequence[GpuCount], field: str) -> Values:
    """What no card tells is no series."""
    told = {(str(one.number),): getattr(one, field) for one in gpus[: LABELS["gpu"]]}
    return {labels: float(value) for labels, value in told.items() if value is not None} or None


def _slowest(links: Sequence[LinkCount]) -> list[LinkCount]:
    """Those that take longest for a byte have series of their own."""
    slow = sorted(links, key=lambda one: one.busy_s / max(one.sent, 1), reverse=True)
    return slow[: LABELS["peer"]]


def node_registry(read: Callable[[], Pulse]) -> CollectorRegistry:
    """A registry of its own, with the metrics of one node."""
    return registry_of(lambda: values_of_node(read()), OF_A_NODE)
