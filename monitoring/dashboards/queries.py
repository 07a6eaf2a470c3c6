"""What the panels ask Prometheus."""

from __future__ import annotations

from monitoring.dashboards.panels import (
    CHOSEN,
    GREEN,
    RED,
    YELLOW,
)

GOOD_SHARE = ((None, RED), (0.7, YELLOW), (0.9, GREEN))
NONE_IS_GOOD = ((None, GREEN), (1, RED))


def of(name: str, **labels: str) -> str:
    """A metric of what was chosen."""
    also = "".join(f', {label}="{value}"' for label, value in labels.items())
    return f"elastic_{name}{{{CHOSEN}{also}}}"


def rate(name: str, by: str = "job", **labels: str) -> str:
    return f"sum by ({by}) (rate({of(name, **labels)}[$__rate_interval]))"


def more(name: str, by: str) -> str:
    """By how much a counter grew."""
    return f"sum by ({by}) (increase({of(name)}[$__rate_interval]))"


def goodput_of(by: str) -> str:
    return f"{rate('seconds_total', by, part='productive')} / {rate('seconds_total', by)}"


def quantile(share: float) -> str:
    return f"histogram_quantile({share}, {rate('step_seconds_bucket', 'le')})"
