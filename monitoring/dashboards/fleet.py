"""The dashboard of the fleet. Only data."""

from __future__ import annotations

from monitoring.dashboards.panels import (
    Json,
    Panel,
    Query,
    curves,
    dashboard,
    figure,
)
from monitoring.dashboards.queries import (
    GOOD_SHARE,
    NONE_IS_GOOD,
    goodput_of,
    more,
    of,
    rate,
)


def fleet() -> Json:
    """All jobs side by side."""
    table = Panel(
        title="Jobs",
        description="What each job does now. A link leads to its own dashboard.",
        kind="table",
        unit="short",
        width=24,
        height=8,
        queries=[
            Query(f"sum by (job, run) ({of('training')})", "training", table=True),
            Query(f"sum by (job, run) ({of('steps_total')})", "steps", table=True),
            Query(rate("samples_total", "job, run"), "samples/s", table=True),
            Query(goodput_of("job, run"), "goodput", table=True),
            Query(f"sum by (job, run) ({of('workers', state='computing')})", "w", table=True),
            Query(f"sum by (job, run) ({of('verdicts_open')})", "verdicts", table=True),
        ],
        options={"showHeader": True, "cellHeight": "sm"},
        defaults={
            "links": [
                {
                    "title": "Job",
                    "url": "/d/elastic-job?var-job=${__data.fields.job}"
                    "&var-run=${__data.fields.run}",
                }
            ]
        },
        more={
            "transformations": [
                {"id": "merge", "options": {}},
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": {"Time": True},
                        "renameByName": {
                            "Value #A": "trains",
                            "Value #B": "steps",
                            "Value #C": "samples/s",
                            "Value #D": "goodput",
                            "Value #E": "workers",
                            "Value #F": "verdicts",
                        },
                    },
                },
            ]
        },
    )
    rows = [
        [
            figure(
                "Jobs that train",
                "Jobs between their first step and their end.",
                "short",
                Query(f"sum({of('training')})", "jobs"),
                width=6,
            ),
            figure(
                "Workers",
                "Workers that compute now, of all jobs.",
                "short",
                Query(f"sum({of('workers', state='computing')})", "workers"),
                width=6,
            ),
            figure(
                "Goodput",
                "Share of the time that all jobs spend on computing what counts.",
                "percentunit",
                Query(
                    f"sum({rate('seconds_total', part='productive')})"
                    f" / sum({rate('seconds_total')})",
                    "goodput",
                ),
                thresholds=GOOD_SHARE,
                width=6,
            ),
            figure(
                "Verdicts",
                "Faults that the detector sees now; docs/faults.md says what to do.",
                "short",
                Query(f"sum({of('verdicts_open')})", "verdicts"),
                thresholds=NONE_IS_GOOD,
                width=6,
            ),
        ],
        [table],
        [
            curves(
                "Steps per second",
                "Committed steps of each job.",
                "ops",
                Query(rate("steps_total", "job, run"), "{{job}} {{run}}"),
            ),
            curves(
                "Goodput of each",
                "Share of the time spent on computing what counts.",
                "percentunit",
                Query(goodput_of("job, run"), "{{job}} {{run}}"),
                defaults={"min": 0, "max": 1},
            ),
            curves(
                "Workers missing",
                "Workers that are wanted and do not compute.",
                "short",
                Query(
                    f"sum by (job, run) ({of('workers', state='wanted')})"
                    f" - sum by (job, run) ({of('workers', state='computing')})",
                    "{{job}} {{run}}",
                ),
            ),
        ],
        [
            curves(
                "Alerts",
                "Alerts of the rules in monitoring/rules that fire or are about to.",
                "short",
                Query(
                    'count by (job, alertname) (ALERTS{alertname=~"Elastic.+", job=~"$job"})',
                    "{{job}} {{alertname}}",
                ),
                width=12,
                custom={"drawStyle": "bars"},
            ),
            curves(
                "Workers lost",
                "Workers that were lost without being asked to go.",
                "short",
                Query(more("departures_total", "job, run"), "{{job}} {{run}}"),
                width=12,
                custom={"drawStyle": "bars"},
            ),
        ],
    ]
    return dashboard(
        "elastic-fleet", "Elastic: fleet", "All jobs side by side.", rows, of_one_job=False
    )
