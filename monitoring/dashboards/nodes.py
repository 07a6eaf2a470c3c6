"""The dashboard of nodes. Only data."""

from __future__ import annotations

from monitoring.dashboards.panels import Json, Query, curves, dashboard
from monitoring.dashboards.queries import more, of, rate

_NODE = "node {{node}}"
_LINK = "{{node}} to {{peer}}"
_CARD = "node {{node}}, card {{gpu}}"


def nodes() -> Json:
    """What each host says of itself, where `monitoring.node_port` is set."""
    busy, sent = (
        rate(f"node_link_{one}_total", "node, peer") for one in ("busy_seconds", "sent_bytes")
    )
    rows = [
        [
            curves(
                "Step of each node",
                "They differ by one at most.",
                "short",
                Query(f"max by (node) ({of('node_step')})", _NODE),
            ),
            curves(
                "Workers",
                "That have a slot on the node.",
                "short",
                Query(f"max by (node) ({of('node_workers')})", _NODE),
                custom={"lineInterpolation": "stepAfter"},
            ),
            curves(
                "Micro-batches of workers",
                "A second, of each, the one at hand in part; 0: it hangs or waits.",
                "ops",
                Query(rate("node_worker_progress_total", "node, worker"), "{{node}}: {{worker}}"),
            ),
        ],
        [
            curves(
                "Processor time given to others",
                "Share of the time, mean of all processors (steal).",
                "percentunit",
                Query(rate("node_steal_seconds_total", "node"), _NODE),
            ),
            curves(
                "Waiting for memory",
                "Share of the time in which some task of the host did.",
                "percentunit",
                Query(rate("node_memory_stall_seconds_total", "node"), _NODE),
            ),
            curves(
                "Waiting for a disk",
                "Share of the time in which some task of the host did.",
                "percentunit",
                Query(rate("node_disk_stall_seconds_total", "node"), _NODE),
            ),
        ],
        [
            curves(
                "Sent",
                "To each peer, as the sender counts it.",
                "Bps",
                Query(sent, _LINK),
            ),
            curves(
                "Time for a megabyte",
                "In which bytes were on their way to a peer.",
                "s",
                Query(f"1e6 * {busy} / {sent}", _LINK),
            ),
            curves(
                "Waiting for a peer's message",
                "Share of the time in which the rest of one was waited for.",
                "percentunit",
                Query(rate("node_link_receive_wait_seconds_total", "node, peer"), _LINK),
            ),
        ],
        [
            curves(
                "Processes killed for lack of memory",
                "By the kernel of the host.",
                "short",
                Query(more("node_memory_kills_total", "node"), _NODE),
                custom={"drawStyle": "bars"},
            ),
            curves(
                "Links given up",
                "Nothing came over them.",
                "short",
                Query(more("node_link_cuts_total", "node, peer"), _LINK),
                custom={"drawStyle": "bars"},
            ),
            curves(
                "Waiting to send",
                "Share of the time in which the kernel took no more for a peer.",
                "percentunit",
                Query(rate("node_link_send_wait_seconds_total", "node, peer"), _LINK),
            ),
        ],
        [
            curves(
                "Cards compute",
                "Share of the time; jobs on cards only.",
                "percentunit",
                Query(f"max by (node, gpu) ({of('node_gpu_utilisation_ratio')})", _CARD),
            ),
            curves(
                "Memory of cards",
                "Share that is taken.",
                "percentunit",
                Query(
                    f"max by (node, gpu) ({of('node_gpu_memory_used_bytes')}"
                    f" / {of('node_gpu_memory_bytes')})",
                    _CARD,
                ),
            ),
            curves(
                "Cards held back",
                "Share of the time in which heat or the power supply did.",
                "percentunit",
                Query(rate("node_gpu_throttled_seconds_total", "node, gpu"), _CARD),
            ),
        ],
        [
            curves(
                "Temperature of cards",
                "Degrees Celsius.",
                "short",
                Query(f"max by (node, gpu) ({of('node_gpu_temperature_celsius')})", _CARD),
            ),
            curves(
                "Power of cards",
                "Watts.",
                "short",
                Query(f"max by (node, gpu) ({of('node_gpu_power_watts')})", _CARD),
            ),
            curves(
                "Faults of cards",
                "Errors in memory that were not corrected, and errors (XID) of the card's own.",
                "short",
                Query(more("node_gpu_ecc_errors_total", "node, gpu"), _CARD + " memory"),
                Query(more("node_gpu_faults_total", "node, gpu"), _CARD + " XID"),
                custom={"drawStyle": "bars"},
            ),
        ],
    ]
    return dashboard(
        "elastic-nodes",
        "Elastic: nodes",
        "What each host says of itself; needs monitoring.node_port in the job file.",
        rows,
        of_one_job=True,
    )
