"""Workers that die, hang, or never start: the job waits or goes on, and says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from benchmarks.processes import find_processes, find_store
from elastic.core.runs import RunFolder
from elastic.core.status import Status
from elastic.handle import connect
from tests.integration.support import (
    Once,
    Outcome,
    check_faults_fired,
    kinds,
    make_job,
    outcome,
    run_job,
    write_faults,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]


def test_a_job_without_any_worker_waits_for_one(undisturbed: Outcome, tmp_path: Path) -> None:
    """The only worker dies; the one after it hangs for ever."""
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "kill", "at": {"step": 5, "point": "after_row"}, "target": "worker-0"},
            {"do": "stop", "at": {"step": 10}, "target": "worker-1"},
        ],
    )
    result = run_job(make_job("lonely", steps=40), run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)
    assert kinds(result).count("no_workers") == 2
    lost = [event for event in result.events if event["kind"] == "worker_lost"]
    assert [event["worker"] for event in lost] == [0, 1]
    assert "no progress for" in lost[1]["reason"]


def test_a_worker_that_is_told_to_end_finishes_what_it_holds(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """By SIGTERM, which a machine that is taken away sends to its processes."""
    slow = {"do": "slow", "at": {"step": 0}, "target": "any", "sleep_s": 0.2, "probability": 1.0}
    faults = write_faults(tmp_path / "faults.yaml", [slow])
    job = make_job("told", workers=2, spare=1, steps=40)

    def tell(status: Status) -> None:
        store = find_store(job.name)
        assert store is not None
        os.kill(find_processes(store).workers[0], signal.SIGTERM)

    result = run_job(job, run_dir=tmp_path / "run", faults=faults, on_status=Once(5, tell))
    assert outcome(result) == undisturbed
    assert [one["kind"] for one in result.events if one["worker"] == 0][-2:] == [
        "worker_leaving",
        "worker_left",
    ]
    assert result.path is not None
    work = [work for one in RunFolder(result.path).read_metrics() for work in one["work"]]
    assert {one[4] for one in work if one[0] == 0} == {"granted"}


def test_an_aggregator_that_hangs_while_the_coordinator_is_away_is_replaced(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """No other one is there: it has just taken over."""
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "kill_coordinator", "at": {"step": 5}},
            {"do": "kill_aggregator", "at": {"step": 6}},
            {"do": "stop_aggregator", "at": {"step": 7}},
        ],
    )
    job = make_job("headless", standby=True, steps=40)
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)


def test_a_coordinator_that_dies_in_the_last_step_ends_the_job_all_the_same(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """It comes back to a job that has finished."""
    faults = write_faults(
        tmp_path / "faults.yaml", [{"do": "kill_coordinator", "at": {"step": 39}}]
    )
    result = run_job(make_job("last", steps=40), run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)
    assert kinds(result).count("job_finished") == 1
    assert "coordinator_restarted" in kinds(result)


def test_workers_that_die_at_each_start_are_given_up(tmp_path: Path) -> None:
    """One worker can start; the second one never, and is not tried for ever."""
    (tmp_path / "opened").mkdir()
    job = make_job(
        "flapping",
        workers=2,
        task="tests.fault.tasks:OpensTwice",
        task_args={"folder": str(tmp_path / "opened")},
        steps=10**6,
        checkpoint={"every": 0},
    )

    stop = Once(0, lambda status: connect(status.run_dir).stop(), event="worker_given_up")
    result = run_job(job, run_dir=tmp_path / "run", on_status=stop)
    (event,) = [one for one in result.events if one["kind"] == "worker_given_up"]
    assert "elastic scale" in event["reason"]
    assert result.metrics["outcome"] == "stopped"
    assert result.metrics["steps"] > 10
    assert any("disk is gone" in one["reason"] for one in result.events)
