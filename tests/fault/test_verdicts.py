"""What is wrong with a running job is named in time, whatever is done about it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from elastic.core.config import load_job
from elastic.core.runs import RunFolder
from elastic.result import Result
from tests.integration.support import (
    Outcome,
    check_faults_fired,
    make_job,
    outcome,
    run_job,
    write_faults,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]

TAKES_TIME = "tests.integration.tasks:TakesTime"


def told(result: Result, kind: str) -> list[Mapping[str, Any]]:
    return [event for event in result.events if event["kind"] == kind]


def test_a_worker_that_stops_in_the_middle_is_named_within_three_steps(tmp_path: Path) -> None:
    stop = {"do": "stop", "at": {"step": 12, "point": "before_compute"}, "target": "worker-1"}
    faults = write_faults(tmp_path / "faults.yaml", [{**stop, "for_s": 5.0}])
    job = make_job("hangs", workers=2, steps=24, task=TAKES_TIME, evaluate={"every": 0})
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    (fault,), verdicts = told(result, "fault"), told(result, "verdict")
    verdicts = [one for one in verdicts if one["time_s"] > fault["time_s"] and one["worker"] == 1]
    assert [(one["verdict"]["kind"], one["worker"]) for one in verdicts] == [
        ("hang outside communication", 1)
    ]
    steps = RunFolder(tmp_path / "run").read_metrics()
    usual_s = statistics.median(one["step_s"] for one in steps if one["step"] < 12)
    took_s = verdicts[0]["time_s"] - fault["time_s"]
    assert took_s <= 3 * usual_s, f"the verdict took {took_s:.2f} s, a step {usual_s:.2f} s"
    assert "hang outside communication" in [
        one["verdict"]["kind"] for one in told(result, "verdict_ended")
    ]


def test_a_worker_that_is_not_fit_is_named_and_left_out(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """The limit is wide and the worker far slower: the tests run on busy machines."""
    slow = {"do": "slow", "at": {"step": 0}, "target": "worker-1", "factor": 1000.0}
    faults = write_faults(tmp_path / "faults.yaml", [slow])
    workers = {"start": 3, "max": 4, "spare": 0, "preflight": 30.0}
    job = make_job("unfit", steps=40).model_dump(mode="json") | {"workers": workers}
    result = run_job(load_job(job), run_dir=tmp_path / "run", faults=faults)
    check_faults_fired(result, faults)
    assert outcome(result) == undisturbed
    (unfit,) = told(result, "worker_unfit")
    assert unfit["worker"] == 1
    assert "times the fleet's median (workers.preflight 30)" in unfit["reason"]
    steps = RunFolder(tmp_path / "run").read_metrics()
    assert {worker for one in steps for worker, *_ in one["work"]} == {0, 2}


def test_a_worker_that_is_not_fit_computes_where_there_are_too_few(tmp_path: Path) -> None:
    slow = {"do": "slow", "at": {"step": 0}, "target": "worker-1", "factor": 1000.0}
    faults = write_faults(tmp_path / "faults.yaml", [slow])
    workers = {"start": 2, "min": 2, "max": 2, "spare": 0, "preflight": 30.0}
    job = make_job("needed", steps=4).model_dump(mode="json") | {"workers": workers}
    result = run_job(load_job(job), run_dir=tmp_path / "run", faults=faults)
    assert [one["worker"] for one in told(result, "worker_unfit")] == [1]
    assert {one["worker"] for one in told(result, "worker_joined")} == {0, 1}


def test_a_worker_that_flips_bits_is_named_and_nothing_of_it_counts(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """Now and then: what it computes otherwise is right. Two that differ need a third: steps take
    long enough for all three workers to be there when it begins."""
    flip = {"do": "flip_bit", "at": {"step": 20}, "target": "worker-1", "probability": 0.2}
    sleepy = [
        {"do": "slow", "at": {"step": 0}, "target": f"worker-{one}", "sleep_s": 0.3}
        for one in range(3)
    ]
    faults = write_faults(tmp_path / "faults.yaml", [flip, *sleepy])
    job = make_job("lies", workers=3, steps=40, audit="all")
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    check_faults_fired(result, faults)
    assert outcome(result) == undisturbed
    (lie,) = told(result, "worker_lied")
    assert lie["worker"] == 1
    verdicts = [one for one in told(result, "verdict") if one["worker"] == 1]
    assert "silent corruption" in [one["verdict"]["kind"] for one in verdicts]
    assert [one["worker"] for one in told(result, "worker_lost")] == [1]


def test_without_audits_a_flipped_bit_changes_the_result(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """So the fault above is one."""
    flip = {"do": "flip_bit", "at": {"step": 3}, "target": "worker-0", "probability": 0.05}
    faults = write_faults(tmp_path / "faults.yaml", [flip])
    result = run_job(
        make_job("believed", steps=40, audit=0), run_dir=tmp_path / "run", faults=faults
    )
    check_faults_fired(result, faults)
    assert outcome(result) != undisturbed
