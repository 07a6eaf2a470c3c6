"""The metric table and the rules: names that hold, few series, alerts that fire on faults alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import monitoring
from monitoring.account import PARTS
from monitoring.metrics import KINDS, LABELS, OF_A_JOB, OF_A_NODE, OF_SERVING, TABLE, num_series

RULES = Path(monitoring.__file__).parent / "rules" / "elastic.rules.yml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDS = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
MOST_SERIES = 1000
MOST_OF_SERVING = 3000
"""Of a replica that serves 64 experts."""
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is missing: apt install prometheus"
)


# --- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", TABLE, ids=lambda one: one.name)
def test_a_name_says_its_type_and_unit(metric: Any) -> None:
    assert re.fullmatch(r"elastic_[a-z]+(_[a-z]+)*", metric.full_name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert (metric.kind == "histogram") <= metric.name.endswith(("_seconds", "_rows"))
    assert metric.meaning
    assert set(metric.labels) <= set(LABELS)
    assert not {"step", "sample", "micro_batch"} & set(metric.labels)


def test_names_are_told_apart_and_series_stay_few_whatever_the_number_of_workers() -> None:
    families = {metric.name.removesuffix("_total") for metric in TABLE}
    assert len(families) == len(TABLE)  # OpenMetrics names a counter without its suffix
    assert num_series() < MOST_SERIES
    assert num_series(OF_A_NODE) < MOST_SERIES
    assert num_series(OF_SERVING) < MOST_OF_SERVING


def test_the_table_knows_every_part_and_every_verdict() -> None:
    assert LABELS["part"] == len(PARTS)
    assert LABELS["kind"] == len(KINDS)
    assert "slow link" in KINDS


# --- the rules --------------------------------------------------------------------------------


def test_rules_use_metrics_of_the_table_and_recordings_only() -> None:
    series = {metric.full_name for metric in TABLE if metric.kind != "histogram"}
    series |= {f"{metric.full_name}_bucket" for metric in TABLE if metric.kind == "histogram"}
    for group in GROUPS:
        for rule in group["rules"]:
            without_text = re.sub(r'"[^"]*"', "", rule["expr"])
            used = set(re.findall(r"(?:job:)?elastic_[a-z0-9_]+(?::[a-z0-9_]+)?", without_text))
            assert used <= series | RECORDS, rule
    kinds = re.findall(r'kind=~?"([^"]+)"', RULES.read_text())
    for pattern in kinds:
        assert any(re.fullmatch(pattern, kind) for kind in KINDS), pattern
        assert all(any(re.fullmatch(one, kind) for kind in KINDS) for one in pattern.split("|")), (
            pattern
        )


def test_nothing_that_a_job_tells_is_told_by_its_nodes_too() -> None:
    """Sums of the rules and dashboards would count it twice."""
    assert all(one.name.startswith("node_") for one in OF_A_NODE)
    assert not any(one.name.startswith("node_") for one in OF_A_JOB)
    assert "elastic_node_" not in RULES.read_text()


def test_every_alert_says_what_to_do() -> None:
    for name, rule in ALERTS.items():
        assert re.fullmatch(r"Elastic([A-Z][a-z]+)+", name)
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels.job }}" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")


class Case(NamedTuple):
    """Series by the minute, as promtool writes them, with the fault and without."""

    fault: Mapping[str, str]
    healthy: Mapping[str, str]
    labels: str = ""


INFER = "/v2/models/{model}/infer"


def buckets(name: str, *, slow: str, fast: str, route: str = INFER) -> dict[str, str]:
    """A histogram of two buckets: half a second, and two."""
    labels = f'job="j",route="{route}"'
    return {
        f'{name}_bucket{{{labels},le="0.5"}}': fast,
        f'{name}_bucket{{{labels},le="2"}}': slow,
        f'{name}_bucket{{{labels},le="+Inf"}}': slow,
    }


TRAINS = {'elastic_training{job="j"}': "1x200"}


def one(series: str, fault: str, healthy: str, **more: Any) -> Case:
    """One series that tells, while the job trains."""
    return Case({series: fault, **TRAINS}, {series: healthy, **TRAINS}, **more)


ASKED = "elastic_serve_request_seconds"
GOOD = 'elastic_seconds_total{job="j",part="productive"}'
BAD = 'elastic_seconds_total{job="j",part="waiting"}'
STEPS = 'elastic_steps_total{job="j"}'
CASES = {
    "ElasticGoodputLow": Case(
        {GOOD: "0+30x200", BAD: "0+30x200", **TRAINS}, {GOOD: "0+57x200", BAD: "0+3x200", **TRAINS}
    ),
    "ElasticStepTimeRegression": Case(
        buckets("elastic_step_seconds", fast="0+60x100 6000x100", slow="0+60x200"),
        buckets("elastic_step_seconds", fast="0+60x200", slow="0+60x200"),
    ),
    "ElasticJobStalled": one(STEPS, "0+60x100 6000x100", "0+60x200"),
    "ElasticFleetShrinking": Case(
        {
            'elastic_workers{job="j",state="computing"}': "8x100 5x100",
            'elastic_workers{job="j",state="wanted"}': "8x200",
        },
        {
            'elastic_workers{job="j",state="computing"}': "8x100 7x100",
            'elastic_workers{job="j",state="wanted"}': "8x200",
        },
    ),
    "ElasticReplicasMissing": Case(
        {'elastic_replicas{job="j"}': "1x200", 'elastic_replicas_wanted{job="j"}': "2x200"},
        {'elastic_replicas{job="j"}': "2x200", 'elastic_replicas_wanted{job="j"}': "2x200"},
    ),
    "ElasticCheckpointOld": one(
        'elastic_checkpoint_timestamp_seconds{job="j"}', "0x200", "0+60x200"
    ),
    "ElasticOverflows": Case(
        {'elastic_overflows_total{job="j"}': "0+6x200", STEPS: "0+60x200"},
        {'elastic_overflows_total{job="j"}': "0x90 1x110", STEPS: "0+60x200"},
    ),
    "ElasticNotFinite": one('elastic_nonfinite_total{job="j"}', "0x100 1+1x100", "0x200"),
    "ElasticSilentCorruption": one(
        'elastic_verdicts_total{job="j",kind="silent corruption"}', "0x100 1x100", "0x200"
    ),
    "ElasticFlapping": one('elastic_verdicts_open{job="j",kind="flapping"}', "1x200", "0x200"),
    "ElasticSlowLink": one(
        'elastic_verdicts_open{job="j",kind="slow sender"}', "0x90 1x110", "0x90 1x3 0x107"
    ),
    "ElasticHang": one(
        'elastic_verdicts_open{job="j",kind="hang in communication"}', "1x200", "0x90 1x0 0x110"
    ),
    "ElasticExpertDown": Case(  # of two replicas one is scraped at a time
        {
            'elastic_serve_expert_state{job="j",expert="3",replica="a"}': "0x100" + " _ 2" * 10,
            'elastic_serve_expert_state{job="j",expert="3",replica="b"}': "0x80"
            + " 0 _" * 10
            + " 2 _" * 10,
        },
        {
            'elastic_serve_expert_state{job="j",expert="3",replica="a"}': "0x102 2 1 0x100",
            'elastic_serve_expert_state{job="j",expert="4",replica="a"}': "3x200",
        },
        labels=', expert="3"',
    ),
    "ElasticVersionRefused": one(
        'elastic_serve_swaps_total{job="j",outcome="refused",replica="a"}', "0x100 1x100", "0x200"
    ),
    "ElasticLatencyHigh": Case(
        buckets(ASKED, fast="0+50x200", slow="0+60x200"),
        buckets(ASKED, fast="0+60x200", slow="0+60x200")
        | buckets(ASKED, fast="0x200", slow="0+60x200", route="/status"),
    ),
    "ElasticErrorsHigh": Case(
        {
            'elastic_serve_requests_total{job="j",status="503"}': "0+3x200",
            'elastic_serve_requests_total{job="j",status="200"}': "0+97x200",
        },
        {
            'elastic_serve_requests_total{job="j",status="429"}': "0+3x200",
            'elastic_serve_requests_total{job="j",status="200"}': "0+97x200",
        },
    ),
}
AT = {"ElasticStepTimeRegression": "120m", "ElasticCheckpointOld": "170m"}
"""When each fault has lasted long enough; else after 108 minutes."""


def a_test(alert: str, series: Mapping[str, str], *, fires: bool, labels: str) -> dict[str, Any]:
    """What promtool is to check: whether the alert is firing then."""
    severity = ALERTS[alert]["labels"]["severity"]
    state = f'alertname="{alert}", alertstate="firing"'
    name = f'ALERTS{{{state}, job="j", severity="{severity}"{labels}}}'
    return {
        "interval": "1m",
        "name": f"{alert} {'fires' if fires else 'is silent'}",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"ALERTS{{{state}}}",
                "eval_time": AT.get(alert, "108m"),
                "exp_samples": [{"labels": name, "value": 1}] if fires else [],
            }
        ],
    }


def test_every_alert_has_a_case() -> None:
    assert CASES.keys() == ALERTS.keys()


@needs_promtool
def test_promtool_finds_no_fault_with_the_rules() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert done.returncode == 0, done.stderr


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_on_its_fault_and_is_silent_on_a_healthy_run(
    alert: str, tmp_path: Path
) -> None:
    case = CASES[alert]
    tests = [
        a_test(alert, case.fault, fires=True, labels=case.labels),
        a_test(alert, case.healthy, fires=False, labels=case.labels),
    ]
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests})
    )
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_a_healthy_run_fires_no_alert_at_all(tmp_path: Path) -> None:
    """All healthy series together."""
    series: dict[str, str] = {}
    for case in CASES.values():
        series |= case.healthy
    series['elastic_verdicts_open{job="j",kind="hang in communication"}'] = "0x200"
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": key, "values": values} for key, values in series.items()],
            "promql_expr_test": [
                {"expr": 'ALERTS{alertstate="firing"}', "eval_time": f"{at}m", "exp_samples": []}
                for at in range(5, 180, 5)
            ],
        }
    ]
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests})
    )
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *words], capture_output=True, text=True, timeout=50)


def test_the_document_lists_every_metric() -> None:
    """It is what this prints, so that nobody has to type it."""
    document = (RULES.parents[2] / "docs" / "monitoring.md").read_text()
    _, *tables = document.split("| metric | type | labels | meaning |\n|---|---|---|---|\n")
    for metrics, table in zip((OF_A_JOB, OF_A_NODE, OF_SERVING), tables, strict=True):
        rows = [
            f"| `{one.full_name}` | {one.kind} | {', '.join(one.labels)} | {one.meaning} |"
            for one in metrics
        ]
        assert table.split("\n\n")[0].splitlines() == rows, "\n".join(rows)
