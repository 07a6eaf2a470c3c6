"""The dashboard of one job. Only data."""

from __future__ import annotations

from monitoring.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    VIOLET,
    YELLOW,
    Json,
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
    times,
)


def job() -> Json:
    """One job: how far, how well, how fast, with whom."""
    rows = [
        [
            figure("Step", "Committed steps.", "short", Query(of("steps_total"), "step")),
            figure(
                "Newest loss",
                "Of the newest committed step.",
                "short",
                Query(of("loss"), "loss"),
                defaults={"decimals": 4},
            ),
            figure(
                "Goodput",
                "Share of the time spent on computing what counts.",
                "percentunit",
                Query(goodput_of("job"), "goodput"),
                thresholds=GOOD_SHARE,
            ),
            figure(
                "Computing",
                "Workers that compute now.",
                "short",
                Query(of("workers", state="computing"), "workers"),
            ),
            figure(
                "Verdicts",
                "Faults that the detector sees now.",
                "short",
                Query(f"sum({of('verdicts_open')})", "verdicts"),
                thresholds=NONE_IS_GOOD,
            ),
            figure(
                "Newest checkpoint",
                "Its age.",
                "s",
                Query(f"time() - max({of('checkpoint_timestamp_seconds')})", "age"),
                thresholds=((None, GREEN), (3600, YELLOW), (7200, RED)),
            ),
        ],
        [
            curves(
                "Loss",
                "Of each step. It is the same, to the bit, whatever happens to workers.",
                "short",
                Query(of("loss"), "loss {{run}}"),
            ),
            curves(
                "Gradient norm",
                "Before clipping.",
                "short",
                Query(of("grad_norm"), "norm {{run}}"),
                colours={},
            ),
            curves(
                "Samples per second",
                "Samples in committed steps.",
                "ops",
                Query(rate("samples_total", "run"), "samples/s {{run}}"),
            ),
        ],
        [
            times(
                "Step time",
                "From commit to commit: the median, and one step in a hundred.",
                "step_seconds",
            ),
            curves(
                "Workers",
                "Workers that compute, that wait as spares, and that are wanted.",
                "short",
                Query(f"sum by (state) ({of('workers')})", "{{state}}"),
                colours={"computing": GREEN, "spare": BLUE, "wanted": GREY},
                custom={"lineInterpolation": "stepAfter"},
            ),
            curves(
                "Nodes and copies",
                "Nodes that take part, and copies of the chunk that has fewest.",
                "short",
                Query(f"max({of('nodes')})", "nodes"),
                Query(f"min({of('replicas')})", "copies"),
                Query(f"max({of('replicas_wanted')})", "copies wanted"),
                custom={"lineInterpolation": "stepAfter"},
            ),
        ],
        [
            curves(
                "Faults",
                "Workers lost, results that were not finite, sums that overflowed.",
                "short",
                Query(more("departures_total", "run"), "lost"),
                Query(more("nonfinite_total", "run"), "not finite"),
                Query(more("skipped_steps_total", "run"), "skipped steps"),
                Query(more("overflows_total", "run"), "overflows"),
                custom={"drawStyle": "bars", "fillOpacity": 60},
                colours={
                    "lost": ORANGE,
                    "not finite": RED,
                    "skipped steps": VIOLET,
                    "overflows": YELLOW,
                },
            ),
            curves(
                "Duplicate leases",
                "Micro-batches given to a second worker, and those to be audited that nobody else"
                " could compute, per step; those that steps of an inexact policy ended without.",
                "short",
                Query(
                    f"{rate('duplicates_total', 'run')} / {rate('steps_total', 'run')}",
                    "duplicates {{run}}",
                ),
                Query(
                    f"{rate('unaudited_total', 'run')} / {rate('steps_total', 'run')}",
                    "unaudited {{run}}",
                ),
                Query(
                    f"{rate('dropped_total', 'run')} / {rate('steps_total', 'run')}",
                    "dropped {{run}}",
                ),
            ),
            curves(
                "Checkpoints",
                "From the commit of a step to its checkpoint in storage.",
                "s",
                Query(
                    f"{rate('checkpoint_seconds_sum', 'run')}"
                    f" / {rate('checkpoint_seconds_count', 'run')}",
                    "mean {{run}}",
                ),
            ),
        ],
    ]
    return dashboard(
        "elastic-job", "Elastic: job", "How far, how well, how fast.", rows, of_one_job=True
    )
