"""The dashboard of serving. Only data."""

from __future__ import annotations

from monitoring.dashboards.panels import (
    BLUE,
    CELLS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    YELLOW,
    Json,
    Panel,
    Query,
    annotation,
    curves,
    dashboard,
    figure,
)
from monitoring.dashboards.queries import more, of, rate, times

FAILED_SHARE = ((None, GREEN), (0.001, YELLOW), (0.01, RED))
_FOUND_BY = "elastic_serve_version_share"
_ANSWERS = ".*(infer|generations|completions)"
_HELD = "[$__rate_interval]"
"""Replicas answer scrapes in turn, so what one of them told last counts as its present state."""


def serving() -> Json:
    """Experts behind their router: how many requests, how fast, who is lost."""
    failed = rate("serve_requests_total", "job", 'status=~"5.."')
    state = Panel(
        title="Experts",
        description="Green: asked. Yellow: tried again. Red: left out. Grey: unloaded by hand.",
        kind="state-timeline",
        unit="short",
        width=24,
        height=7,
        queries=[
            Query(
                f"max by (expert) (last_over_time({of('serve_expert_state')}{_HELD}))", "{{expert}}"
            )
        ],
        custom=CELLS,
        thresholds=((None, GREEN), (1, YELLOW), (2, RED), (3, GREY)),
        options={"showValue": "never", "rowHeight": 0.8, "mergeValues": True},
        defaults={"color": {"mode": "thresholds"}},
    )
    rows = [
        [
            figure(
                "Requests per second",
                "All of them, also those that were refused.",
                "ops",
                Query(rate("serve_requests_total"), "requests"),
                width=6,
            ),
            figure(
                "Failed",
                "Share of requests with a status of 500 or more.",
                "percentunit",
                Query(
                    f"(sum({failed}) or vector(0)) / sum({rate('serve_requests_total')})", "failed"
                ),
                thresholds=FAILED_SHARE,
                width=6,
            ),
            figure(
                "Degraded per second",
                "Answers for which an expert was lost.",
                "ops",
                Query(rate("serve_degraded_total"), "degraded"),
                width=6,
            ),
            figure(
                "Rows that wait or are in work",
                "Of all replicas.",
                "short",
                Query(f"sum(last_over_time({of('serve_queue_rows')}{_HELD}))", "rows"),
                width=6,
            ),
        ],
        [state],
        [
            curves(
                "Requests by route",
                "Requests per second.",
                "ops",
                Query(rate("serve_requests_total", "route"), "{{route}}"),
            ),
            curves(
                "Requests by status",
                "429: the queue is full, or a key asks too often. 503: no expert is left.",
                "ops",
                Query(rate("serve_requests_total", "status"), "{{status}}"),
            ),
            times(
                "Time to answer",
                "Of inference: the median, and one request in a hundred.",
                "serve_request_seconds",
                f'route=~"{_ANSWERS}"',
            ),
        ],
        [
            curves(
                "Rows by expert",
                "Rows per second that each answered for: what the router chooses.",
                "ops",
                Query(rate("serve_expert_rows_total", "expert"), "{{expert}}"),
            ),
            curves(
                "Time of a call",
                "Mean of each expert.",
                "s",
                Query(
                    f"{rate('serve_expert_seconds_sum', 'expert')}"
                    f" / {rate('serve_expert_seconds_count', 'expert')}",
                    "{{expert}}",
                ),
            ),
            curves(
                "Calls by outcome",
                "Slow: longer than failing.expert_timeout_s. Garbage: not finite, a wrong shape.",
                "ops",
                Query(rate("serve_expert_calls_total", "outcome"), "{{outcome}}"),
                colours={"ok": GREEN, "slow": YELLOW, "garbage": ORANGE, "error": RED},
            ),
        ],
        [
            curves(
                "Rows of a call",
                "Mean: how well requests share calls.",
                "short",
                Query(f"{rate('serve_batch_rows_sum')} / {rate('serve_batch_rows_count')}", "rows"),
            ),
            curves(
                "Share of each version",
                "Of requests; two where a canary is on trial.",
                "percentunit",
                Query(
                    f"max by (version) (last_over_time({of('serve_version_share')}{_HELD}))",
                    "{{version}}",
                ),
                defaults={"min": 0, "max": 1},
            ),
            curves(
                "New versions",
                "Taken over, refused, or taken back.",
                "short",
                Query(more("serve_swaps_total", "outcome"), "{{outcome}}"),
                colours={"promoted": GREEN, "refused": ORANGE, "rolled_back": RED},
                custom={"drawStyle": "bars"},
            ),
        ],
    ]
    return dashboard(
        "elastic-serving",
        "Elastic: serving",
        "Experts behind their router.",
        rows,
        of_one_job=True,
        found_by=_FOUND_BY,
        annotations=[
            annotation(
                "New version",
                BLUE,
                f"sum by (job, outcome) (increase({of('serve_swaps_total')}[10s])) > 0",
                "{{job}}: {{outcome}}",
            ),
            annotation(
                "Expert left out",
                RED,
                f"max by (job, expert) ({of('serve_expert_state')}) == 2",
                "{{job}}: {{expert}}",
            ),
        ],
    )
