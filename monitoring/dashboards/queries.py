"""What the panels ask Prometheus."""

from __future__ import annotations

from monitoring.dashboards.panels import (
    CHOSEN,
    GREEN,
    RED,
    YELLOW,
    Panel,
    Query,
    curves,
)

GOOD_SHARE = ((None, RED), (0.7, YELLOW), (0.9, GREEN))
NONE_IS_GOOD = ((None, GREEN), (1, RED))


def of(name: str, *matchers: str, **labels: str) -> str:
    """A metric of what was chosen, and has these labels."""
    also = [f'{label}="{value}"' for label, value in labels.items()]
    return f"elastic_{name}{{{', '.join([CHOSEN, *matchers, *also])}}}"


def rate(name: str, by: str = "job", *matchers: str, **labels: str) -> str:
    return f"sum by ({by}) (rate({of(name, *matchers, **labels)}[$__rate_interval]))"


def more(name: str, by: str) -> str:
    """By how much a counter grew."""
    return f"sum by ({by}) (increase({of(name)}[$__rate_interval]))"


def goodput_of(by: str) -> str:
    return f"{rate('seconds_total', by, part='productive')} / {rate('seconds_total', by)}"


def times(title: str, description: str, name: str, *matchers: str) -> Panel:
    """Of a histogram of seconds: the median, and how long the longest take."""
    bucket = rate(f"{name}_bucket", "le", *matchers)
    shares = {"median": (0.5, GREEN), "90 %": (0.9, YELLOW), "99 %": (0.99, RED)}
    return curves(
        title,
        description,
        "s",
        *(
            Query(f"histogram_quantile({share}, {bucket})", legend)
            for legend, (share, _) in shares.items()
        ),
        colours={legend: colour for legend, (_, colour) in shares.items()},
    )
