"""The dashboard of workers. Only data."""

from __future__ import annotations

from monitoring.dashboards.panels import (
    CELLS,
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    Json,
    Panel,
    Query,
    curves,
    dashboard,
)
from monitoring.dashboards.queries import (
    more,
    of,
    rate,
)


def workers() -> Json:
    """Who is slow, and which verdicts hold: times as colours."""
    pace = Panel(
        title="Pace of the slowest workers",
        description="Time for a micro-batch over the median of all workers; 1 is as the others."
        " Shares of work adapt: a slow worker gets fewer.",
        kind="status-history",
        unit="percentunit",
        width=24,
        height=10,
        queries=[Query(f"topk(32, {of('pace_ratio')})", "worker {{worker}}")],
        custom=CELLS,
        thresholds=((None, GREEN), (1.15, YELLOW), (1.5, ORANGE), (2.0, RED)),
        options={"showValue": "never", "rowHeight": 0.9, "legend": {"showLegend": True}},
        defaults={"color": {"mode": "thresholds"}},
    )
    spread = Panel(
        title="Step times",
        description="How many steps took how long: the darker, the more.",
        kind="heatmap",
        unit="short",
        width=12,
        queries=[
            Query(
                f"sum by (le) (increase({of('step_seconds_bucket')}[$__rate_interval]))", "{{le}}"
            )
        ],
        options={
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "yAxis": {"unit": "s", "axisPlacement": "left"},
            "cellGap": 1,
            "legend": {"show": True},
        },
        more={"maxDataPoints": 120},
    )
    held = Panel(
        title="Verdicts that hold",
        description="What the detector sees, by kind; docs/faults.md says what to do about each.",
        kind="state-timeline",
        unit="short",
        width=12,
        queries=[Query(f"sum by (kind) ({of('verdicts_open')})", "{{kind}}")],
        custom=CELLS,
        thresholds=((None, GREEN), (1, YELLOW), (2, ORANGE), (4, RED)),
        options={"showValue": "never", "rowHeight": 0.8, "mergeValues": True},
        defaults={"color": {"mode": "thresholds"}},
    )
    rows = [
        [pace],
        [spread, held],
        [
            curves(
                "Verdicts that began",
                "By kind.",
                "short",
                Query(more("verdicts_total", "kind"), "{{kind}}"),
                width=12,
                custom={"drawStyle": "bars"},
            ),
            curves(
                "Workers lost by node",
                "Without being asked to go.",
                "short",
                Query(more("departures_total", "node"), "node {{node}}"),
                width=12,
                custom={"drawStyle": "bars"},
            ),
        ],
    ]
    ends = "sender, receiver"
    of_bytes = rate("link_sent_bytes_total", ends)
    busy, wait = (rate(f"link_{one}_seconds_total", ends) for one in ("busy", "wait"))
    arrow = "{{sender}} to {{receiver}}"
    rows.append(
        [
            curves(
                "Sent over links",
                "By nodes; a job on one host has no links.",
                "Bps",
                Query(of_bytes, arrow),
                width=8,
            ),
            curves(
                "Time for a megabyte",
                "In which bytes of a link were on their way: what verdicts on links compare.",
                "s",
                Query(f"1e6 * {busy} / {of_bytes}", arrow),
                width=8,
            ),
            curves(
                "Waiting for the rest of a message",
                "Share of the time in which a link's receiver did.",
                "percentunit",
                Query(wait, arrow),
                width=8,
            ),
        ]
    )
    return dashboard(
        "elastic-workers",
        "Elastic: workers",
        "Who is slow, and what is wrong.",
        rows,
        of_one_job=True,
    )
