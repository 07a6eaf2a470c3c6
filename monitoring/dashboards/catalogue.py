"""All dashboards that there are."""

from __future__ import annotations

from monitoring.dashboards.fleet import fleet
from monitoring.dashboards.goodput import goodput
from monitoring.dashboards.job import job
from monitoring.dashboards.nodes import nodes
from monitoring.dashboards.panels import Json
from monitoring.dashboards.serving import serving
from monitoring.dashboards.workers import workers


def all_dashboards() -> list[Json]:
    """In the order in which they are listed."""
    return [fleet(), job(), workers(), nodes(), goodput(), serving()]
