"""The goodput account kept live: its parts add up, and it says what the report says later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.report.account import account_of, is_trouble
from elastic.report.clock import Clock
from elastic.report.marks import mark_of
from elastic.report.story import read_story
from monitoring.account import PARTS, TROUBLE, Ledger
from monitoring.tally import Tally
from tests.fake_run import FAULTS, START_S, FakeRun


def line(step: int, end_s: float, work: list[list[Any]], **more: Any) -> dict[str, Any]:
    return {"step": step, "time_s": end_s, "step_s": 1.0, "attempt": 0, "work": work, **more}


def event(kind: str, time_s: float, worker: int | None = None) -> dict[str, Any]:
    return {"time_s": time_s, "kind": kind, "worker": worker, "reason": ""}


def told(ledger: Ledger) -> dict[str, float]:
    """The parts that are not zero."""
    return {part: round(one, 6) for part, one in ledger.seconds.items() if abs(one) > 1e-9}


@pytest.fixture
def ledger() -> Ledger:
    """Two workers joined at 1 s; a first step from 2 s to 4 s."""
    ledger = Ledger(every=0)
    for one in (
        event("job_started", 0),
        event("worker_joined", 1, 0),
        event("worker_joined", 1, 1),
    ):
        ledger.add_event(one)
    ledger.add_step(line(0, 4.0, [[0, 0, 2.0, 4.0, "granted"], [1, 1, 2.0, 4.0, "granted"]]))
    return ledger


def test_the_first_step_ends_the_start(ledger: Ledger) -> None:
    assert told(ledger) == {"start-up": 2.0, "productive": 2.0}


def test_a_worker_that_is_done_waits_and_a_duplicate_is_computed_for_nothing(
    ledger: Ledger,
) -> None:
    ledger.add_step(line(1, 6.0, [[0, 0, 4.0, 6.0, "granted"], [1, 1, 4.0, 5.0, "refused"]]))
    assert told(ledger) == {"start-up": 2, "productive": 3, "recomputed": 0.5, "waiting": 0.5}


def test_a_pause_after_a_fault_is_recovery(ledger: Ledger) -> None:
    ledger.add_event(event("worker_lost", 5.0, 1))
    ledger.add_step(line(1, 9.0, [[0, 0, 7.0, 9.0, "granted"]]))
    # of a pause of 3 s, by half as much as usual (1.5 s) belongs to the step
    seconds = told(ledger)
    assert seconds["recovery"] == 0.75
    assert seconds["coordination"] == 2.25
    assert sum(seconds.values()) == pytest.approx(9.0)


def test_what_is_lost_by_resuming_is_recomputed_and_the_pause_is_no_time(ledger: Ledger) -> None:
    ledger.add_event(event("job_stopped", 5.0))
    ledger.add_event(event("job_resumed", 1000.0))
    ledger.add_event(event("worker_joined", 1001.0, 0))
    ledger.add_step(line(1, 1004.0, [[0, 0, 1003.0, 1004.0, "granted"]]))
    assert told(ledger) == {"start-up": 5.0, "productive": 3.0, "recomputed": 1.0}


def test_an_evaluation_has_its_own_part(ledger: Ledger) -> None:
    ledger.add_evaluation(line(1, 5.5, [[0, 0, 4.0, 5.5, "granted"]]))
    ledger.add_step(line(1, 6.5, [[0, 0, 5.5, 6.5, "granted"], [1, 1, 5.5, 6.5, "granted"]]))
    assert told(ledger) == {"start-up": 2.0, "productive": 3.0, "evaluation": 1.5}


def test_it_says_what_the_report_says_later(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=120)
    fake.run(FAULTS)
    folder = fake.folder
    tally = Tally(folder.read_json(folder.job_json))
    tally.take(
        steps=folder.read_metrics(),
        events=folder.read_events(),
        evaluations=folder.read_evaluations(),
    )
    live, later = tally.ledger.seconds, account_of(read_story(tmp_path))
    newest_s = folder.read_metrics()[-1]["time_s"]
    assert sum(live.values()) == pytest.approx(newest_s - START_S, rel=0.01)
    for part in set(PARTS) - {"checkpoint"}:  # the last one is after the newest commit
        assert live[part] == pytest.approx(later.seconds[part], abs=0.01 * later.wall_s), part
    assert live["other"] < 0.02 * later.wall_s


def test_trouble_is_what_the_report_marks_as_such() -> None:
    clock = Clock([{"time_s": 1.0, "step_s": 1.0}], [])
    for kind in TROUBLE:
        assert is_trouble(mark_of({"time_s": 1.0, "kind": kind, "reason": "kill"}, clock)), kind
    for kind in ("worker_joined", "worker_left", "checkpoint_written", "job_resumed", "evaluated"):
        assert not is_trouble(mark_of({"time_s": 1.0, "kind": kind, "reason": ""}, clock))
