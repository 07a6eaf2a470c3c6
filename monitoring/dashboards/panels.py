"""Panels of Grafana, from code: what every one of ours has in common. Only data.

The JSON is that of Grafana's dashboards, schema version 39: Grafana 10 and later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 24
"""Columns of a dashboard."""

SCHEMA_VERSION = 39
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
CHOSEN = 'job=~"$job", run=~"$run"'
"""What every query is narrowed down to."""

RED, YELLOW, GREEN, BLUE = "#e24d42", "#eab839", "#56a64b", "#3274d9"
GREY, VIOLET, TEAL, ORANGE, PINK = "#8e8e8e", "#8f3bb8", "#1f9e89", "#ef843c", "#d683ce"

CELLS = {
    "fillOpacity": 90,
    "lineWidth": 1,
    "hideFrom": {"legend": False, "tooltip": False, "viz": False},
}
"""How a state over time is drawn."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """An expression of PromQL, and what its series are called. `table`: only as of now, as rows."""

    expression: str
    legend: str
    table: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`kind` as Grafana names it. `unit` as in its list: s, percentunit, ops, short ..."""

    title: str
    description: str
    kind: str
    queries: Sequence[Query]
    unit: str
    width: int = 8
    height: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    custom: Mapping[str, Any] = field(default_factory=dict)
    """Of how a field is drawn."""
    colours: Mapping[str, str] = field(default_factory=dict)
    """By the name of a series."""
    thresholds: Sequence[tuple[float | None, str]] = ((None, BLUE),)
    more: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else this kind has, such as transformations."""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, number: int, x: int, y: int) -> Json:
        """As it lies in a dashboard."""
        fixed = [
            {
                "matcher": {"id": "byName", "options": name},
                "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
            }
            for name, colour in self.colours.items()
        ]
        steps = [{"value": value, "color": colour} for value, colour in self.thresholds]
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [_target(chr(65 + k), one) for k, one in enumerate(self.queries)],
            "fieldConfig": {
                "defaults": {
                    "unit": self.unit,
                    "custom": dict(self.custom),
                    "thresholds": {"mode": "absolute", "steps": steps},
                    **self.defaults,
                },
                "overrides": fixed,
            },
            "options": dict(self.options),
            **self.more,
        }


def _target(letter: str, query: Query) -> Json:
    of_table = {"instant": True, "range": False, "format": "table"}
    return {
        "refId": letter,
        "datasource": SOURCE,
        "expr": query.expression,
        "legendFormat": query.legend,
        **(of_table if query.table else {"range": True, "instant": False}),
    }


def curves(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Panel:
    """Lines over time."""
    custom = {
        "drawStyle": "line",
        "lineWidth": 2,
        "fillOpacity": 8,
        "showPoints": "never",
        "spanNulls": True,
        "lineInterpolation": "linear",
        **more.pop("custom", {}),
    }
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": len(queries) > 0}
    return Panel(
        title=title,
        description=description,
        kind="timeseries",
        queries=queries,
        unit=unit,
        custom=custom,
        options={"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
        defaults={"color": {"mode": "palette-classic"}, **more.pop("defaults", {})},
        **more,
    )


def figure(title: str, description: str, unit: str, query: Query, **more: Any) -> Panel:
    """One large number, with its past behind it."""
    return Panel(
        title=title,
        description=description,
        kind="stat",
        queries=[query],
        unit=unit,
        width=more.pop("width", 4),
        height=more.pop("height", 4),
        options={
            "graphMode": "area",
            "colorMode": "value",
            "textMode": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
        defaults={"color": {"mode": "thresholds"}, **more.pop("defaults", {})},
        **more,
    )


def dashboard(
    uid: str,
    title: str,
    description: str,
    rows: Sequence[Sequence[Panel]],
    *,
    of_one_job: bool,
    found_by: str = "elastic_info",
    annotations: Sequence[Json] | None = None,
) -> Json:
    """A whole dashboard; the panels of a row lie side by side.

    Args:
        found_by: a metric that everything has that can be chosen.
        annotations: None: of jobs.
    """
    panels, number, y = [], 1, 0
    for row in rows:
        x = 0
        for panel in row:
            panels.append(panel.to_json(number, x, y))
            number, x = number + 1, x + panel.width
        assert x <= WIDTH, f"{title}: a row is {x} columns wide"
        y += max(panel.height for panel in row)
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["elastic"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables(found_by, of_one_job=of_one_job)},
        "annotations": {"list": list(ANNOTATIONS if annotations is None else annotations)},
        "links": [
            {
                "type": "dashboards",
                "tags": ["elastic"],
                "title": "Elastic",
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
                "icon": "dashboard",
            }
        ],
        "panels": panels,
    }


def _variables(found_by: str, *, of_one_job: bool) -> list[Json]:
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
    }
    return [
        source,
        _variable("job", "Job", f"label_values({found_by}, job)", is_several=not of_one_job),
        _variable("run", "Run", f'label_values({found_by}{{job=~"$job"}}, run)', is_several=True),
    ]


def _variable(name: str, label: str, query: str, *, is_several: bool) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "hide": 0,
        "multi": is_several,
        "includeAll": is_several,
        **({"allValue": ".*", "current": _ALL} if is_several else {}),
    }


_ALL = {"selected": True, "text": ["All"], "value": ["$__all"]}


def annotation(name: str, colour: str, expression: str, text: str) -> Json:
    return {
        "name": name,
        "enable": True,
        "hide": False,
        "iconColor": colour,
        "datasource": SOURCE,
        "expr": expression,
        "step": "10s",
        "titleFormat": name,
        "textFormat": text,
    }


ANNOTATIONS = (
    annotation(
        "Generation", BLUE, f"changes(elastic_generation{{{CHOSEN}}}[10s]) > 0", "{{job}}: {{run}}"
    ),
    annotation(
        "Worker lost",
        ORANGE,
        f"sum by (job, run) (increase(elastic_departures_total{{{CHOSEN}}}[10s])) > 0",
        "{{job}}: {{run}}",
    ),
    annotation(
        "Verdict",
        RED,
        f"sum by (job, run, kind) (increase(elastic_verdicts_total{{{CHOSEN}}}[10s])) > 0",
        "{{job}}: {{kind}}",
    ),
)
"""Drawn over every panel with time: changes of the membership, and faults."""
