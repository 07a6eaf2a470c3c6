"""The dashboard of workers. Only data."""

from __future__ import annotations

from monitoring.dashboards.panels import (
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
)


def workers() -> Json:
    """Who is slow, and which verdicts hold: times as colours."""
    heat = {
        "fillOpacity": 90,
        "lineWidth": 1,
        "hideFrom": {"legend": False, "tooltip": False, "viz": False},
    }
    pace = Panel(
        title="Pace of the slowest workers",
        description="Time for a micro-batch over the median of all workers; 1 is as the others."
        " Shares of work adapt: a slow worker gets fewer.",
        kind="status-history",
        unit="percentunit",
        width=24,
        height=10,
        queries=[Query(f"topk(32, {of('pace_ratio')})", "worker {{worker}}")],
        custom=heat,
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
        custom=heat,
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
    return dashboard(
        "elastic-workers",
        "Elastic: workers",
        "Who is slow, and what is wrong.",
        rows,
        of_one_job=True,
    )
