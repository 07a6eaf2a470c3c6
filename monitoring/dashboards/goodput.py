"""The dashboard of the goodput account. Only data."""

from __future__ import annotations

from monitoring.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    TEAL,
    VIOLET,
    YELLOW,
    Json,
    Panel,
    Query,
    curves,
    dashboard,
    figure,
)
from monitoring.dashboards.queries import (
    GOOD_SHARE,
    goodput_of,
    of,
    rate,
)

PART_COLOURS = {
    "productive": GREEN,
    "recomputed": ORANGE,
    "waiting": YELLOW,
    "coordination": BLUE,
    "recovery": RED,
    "checkpoint": VIOLET,
    "evaluation": TEAL,
    "start-up": GREY,
    "other": PINK,
}


def goodput() -> Json:
    """Where the time of a job goes."""
    shares = curves(
        "Where the time goes",
        "Share of the time in each part of the goodput account; docs/faults.md says what each is.",
        "percentunit",
        Query(
            f"{rate('seconds_total', 'part')} / on () group_left () sum("
            f"rate({of('seconds_total')}[$__rate_interval]))",
            "{{part}}",
        ),
        width=16,
        height=12,
        colours=PART_COLOURS,
        custom={"fillOpacity": 80, "lineWidth": 0, "stacking": {"mode": "normal", "group": "A"}},
        defaults={"min": 0, "max": 1},
    )
    total = Panel(
        title="Since the start",
        description="Seconds of the whole run by part; they add up to the wall time.",
        kind="piechart",
        unit="s",
        width=8,
        height=12,
        queries=[Query(f"sum by (part) ({of('seconds_total')})", "{{part}}")],
        options={
            "pieType": "donut",
            "displayLabels": ["percent"],
            "legend": {"displayMode": "table", "placement": "bottom", "values": ["value"]},
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
        colours=PART_COLOURS,
        defaults={"color": {"mode": "palette-classic"}},
    )
    lost = [part for part in PART_COLOURS if part != "productive"]
    rows = [
        [
            figure(
                "Goodput",
                "Share of the time spent on computing what counts, now.",
                "percentunit",
                Query(goodput_of("job"), "goodput"),
                thresholds=GOOD_SHARE,
                width=8,
            ),
            figure(
                "Goodput since the start",
                "The same of the whole run.",
                "percentunit",
                Query(
                    f"sum({of('seconds_total', part='productive')}) / sum({of('seconds_total')})",
                    "goodput",
                ),
                thresholds=GOOD_SHARE,
                width=8,
            ),
            figure(
                "Lost since the start",
                "All that was not productive.",
                "s",
                Query(
                    f"sum({of('seconds_total')}) - sum({of('seconds_total', part='productive')})",
                    "lost",
                ),
                width=8,
            ),
        ],
        [shares, total],
        [
            curves(
                "Lost by cause",
                "Seconds lost per second, by part.",
                "percentunit",
                Query(
                    rate("seconds_total", "part", f'part=~"{"|".join(lost)}"'),
                    "{{part}}",
                ),
                width=24,
                colours={part: PART_COLOURS[part] for part in lost},
            ),
        ],
    ]
    return dashboard(
        "elastic-goodput",
        "Elastic: goodput",
        "Where the time of a job goes.",
        rows,
        of_one_job=True,
    )
