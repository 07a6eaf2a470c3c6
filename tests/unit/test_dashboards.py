"""Dashboards: whole JSON, lint rules, and what they ask for exists in the metric table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from jsonschema import Draft202012Validator

from monitoring.account import PARTS
from monitoring.dashboards.catalogue import all_dashboards
from monitoring.dashboards.goodput import PART_COLOURS
from monitoring.dashboards.panels import WIDTH
from monitoring.metrics import TABLE

DASHBOARDS = {one["uid"]: one for one in all_dashboards()}
PANELS = {
    f"{uid}: {panel['title']}": panel for uid, one in DASHBOARDS.items() for panel in one["panels"]
}

TARGET = {
    "type": "object",
    "required": ["refId", "expr", "datasource", "legendFormat", "range", "instant"],
    "properties": {
        "refId": {"pattern": "^[A-Z]$"},
        "expr": {"type": "string", "minLength": 1},
        "legendFormat": {"type": "string", "minLength": 1},
        "datasource": {"const": {"type": "prometheus", "uid": "${datasource}"}},
    },
}
PANEL = {
    "type": "object",
    "required": ["id", "type", "title", "description", "gridPos", "targets", "fieldConfig"],
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "type": {
            "enum": [
                *("timeseries", "stat", "table", "heatmap", "piechart"),
                *("status-history", "state-timeline"),
            ]
        },
        "gridPos": {
            "type": "object",
            "required": ["x", "y", "w", "h"],
            "properties": {
                "x": {"type": "integer", "minimum": 0, "maximum": WIDTH - 1},
                "w": {"type": "integer", "minimum": 1, "maximum": WIDTH},
            },
        },
        "targets": {"type": "array", "minItems": 1, "items": TARGET},
        "fieldConfig": {
            "type": "object",
            "required": ["defaults", "overrides"],
            "properties": {
                "defaults": {
                    "type": "object",
                    "required": ["unit", "thresholds"],
                    "properties": {
                        "unit": {"enum": ["short", "s", "percentunit", "ops", "Bps"]},
                        "thresholds": {
                            "properties": {"steps": {"type": "array", "minItems": 1}},
                            "required": ["mode", "steps"],
                        },
                    },
                },
                "overrides": {
                    "type": "array",
                    "items": {"required": ["matcher", "properties"], "type": "object"},
                },
            },
        },
    },
}
VARIABLE = {
    "type": "object",
    "required": ["name", "label", "type", "query"],
    "properties": {"type": {"enum": ["datasource", "query"]}},
}
ANNOTATION = {
    "type": "object",
    "required": ["name", "enable", "iconColor", "datasource", "expr", "titleFormat"],
}
SCHEMA = {
    "type": "object",
    "required": [
        *("uid", "title", "description", "tags", "schemaVersion", "time", "refresh"),
        *("templating", "annotations", "panels"),
    ],
    "properties": {
        "uid": {"pattern": "^[a-zA-Z0-9_-]{1,40}$"},
        "title": {"pattern": "^Elastic: "},
        "schemaVersion": {"const": 39},
        "tags": {"contains": {"const": "elastic"}},
        "templating": {"properties": {"list": {"items": VARIABLE, "minItems": 3}}},
        "annotations": {"properties": {"list": {"items": ANNOTATION, "minItems": 1}}},
        "panels": {"type": "array", "minItems": 1, "items": PANEL},
    },
    "not": {"required": ["id"]},
}


def expressions() -> Iterator[tuple[str, str]]:
    for name, panel in PANELS.items():
        yield from ((name, target["expr"]) for target in panel["targets"])
    for uid, one in DASHBOARDS.items():
        yield from ((uid, note["expr"]) for note in one["annotations"]["list"])


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_a_dashboard_fits_the_schema(uid: str) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    errors = Draft202012Validator(SCHEMA).iter_errors(json.loads(json.dumps(DASHBOARDS[uid])))
    assert [f"{list(one.path)}: {one.message}" for one in errors] == []


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(uid: str) -> None:
    panels = DASHBOARDS[uid]["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    assert len({one["title"] for one in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < WIDTH
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_one_chooses_the_data_source_the_job_and_the_run(uid: str) -> None:
    names = [one["name"] for one in DASHBOARDS[uid]["templating"]["list"]]
    assert names == ["datasource", "job", "run"]


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_says_what_it_shows(name: str) -> None:
    panel = PANELS[name]
    assert panel["description"].endswith(".")
    assert panel["title"][0].isupper()
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == sorted(set(letters))
    if panel["type"] == "stat":
        assert len(letters) == 1


def test_queries_are_narrowed_to_the_choice_and_rates_fit_the_scrapes() -> None:
    for name, expression in expressions():
        assert 'job=~"$job"' in expression, name
        metrics = re.findall(r"elastic_\w+(?=\{)", expression)
        assert expression.count('run=~"$run"') == len(metrics) or "ALERTS" in expression, name
        ranges = re.findall(r"(?:rate|increase|changes)\(.*?\[(.*?)\]", expression)
        assert set(ranges) <= {"$__rate_interval", "10s"}, name


NOT_SHOWN = {"elastic_info", "elastic_node_gpu_xid"}
"""One is chosen by; the other is the number of an error, no measure."""


def test_every_metric_is_shown_and_none_that_there_is_not() -> None:
    names = {one.full_name for one in TABLE if one.kind != "histogram"}
    for one in TABLE:
        if one.kind == "histogram":
            names |= {f"{one.full_name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    used = {
        name for _, expression in expressions() for name in re.findall(r"elastic_\w+", expression)
    }
    assert used <= names
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    assert {one.full_name for one in TABLE} - shown == NOT_SHOWN


def test_every_part_of_the_account_has_a_colour_of_its_own() -> None:
    assert set(PART_COLOURS) == set(PARTS)
    assert len(set(PART_COLOURS.values())) == len(PARTS)
