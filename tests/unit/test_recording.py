"""What a run leaves behind to read, also where the lead changes between two steps."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.recording import EventLog, Recorder, Scribe, by_name
from actors.setup import JobSetup
from elastic.core.journal import Journal
from elastic.core.protocol import events
from elastic.core.protocol.messages import Membership, State
from elastic.core.runs import Lines, RunFolder

DEADLINE_S = 20.0


@dataclass
class World:
    """A lead's recorder, and where it writes."""

    node: Any
    run: RunFolder
    memory: Path
    where: list[int] = field(default_factory=lambda: [0, 0])
    journals: list[Journal] = field(default_factory=list)

    def begin(self, run: RunFolder | None = None) -> Recorder:
        """The recorder of whoever leads from now on, on the same host.

        Args:
            run: the folder as this process finds it.
        """
        run = run or self.run
        setup = JobSetup(self.node.job, run, "12ab", bytes(32))
        log = EventLog(Scribe(run), lambda: (self.where[0], self.where[1]))
        log.journal = Journal(self.memory / "journal", Scribe(run), beat=lambda: None)
        self.journals.append(log.journal)
        return Recorder(setup, self.node.spec, self.node.task, log, log.journal)

    def written(self) -> RunFolder:
        """The folder, once all that was told is in it."""
        self.journals[-1].drain()
        return self.run


@pytest.fixture
def world(make_node: Callable[..., Any], tmp_path: Path) -> Iterator[World]:
    run = RunFolder(tmp_path / "run")
    run.create()
    world = World(make_node(), run, tmp_path)
    yield world
    for journal in world.journals:
        journal.close()


class StalledRun(RunFolder):
    """A shared file system that does not answer for a while."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.answers, self.asked = threading.Event(), threading.Event()
        self.is_gone = False

    def _write(self, descriptor: int, line: bytes) -> int:
        self.asked.set()
        assert self.answers.wait(DEADLINE_S)
        if self.is_gone:
            raise OSError("whoever wanted to write was killed")
        return super()._write(descriptor, line)


@pytest.fixture
def stalled(world: World) -> Iterator[StalledRun]:
    run = StalledRun(world.run.path)
    yield run
    run.is_gone = True
    run.answers.set()


def committed(step: int, *, loss: float = 0.5, skipped: bool = False) -> events.Committed:
    return events.Committed(step, 0, loss, 1.0, skipped, 2, 0, 0, (), ())


def test_an_event_says_where_the_run_was(world: World) -> None:
    world.where[:] = [7, 3]
    recorder = world.begin()
    recorder.later(events.Note("worker_lost", "its process is gone", 5))
    assert world.written().read_events() == []  # nobody waits for it
    recorder.flush()
    recorder.flush()
    (event,) = world.written().read_events()
    assert event.pop("time_s") > 0
    assert event == {
        "kind": "worker_lost",
        "step": 7,
        "generation": 3,
        "worker": 5,
        "reason": "its process is gone",
    }


def test_who_has_no_journal_writes_an_event_at_once(world: World) -> None:
    """Such as a standby, which ends an aggregator that hangs."""
    EventLog(Scribe(world.run), lambda: (7, 3))("aggregator_hung", "killed")
    (event,) = world.run.read_events()
    assert (event["kind"], event["step"], event["generation"]) == ("aggregator_hung", 7, 3)


def test_each_step_is_one_line_and_a_number_that_is_none_is_null(world: World) -> None:
    recorder = world.begin()
    recorder.later(committed(0))
    recorder.later(committed(1, loss=math.nan, skipped=True))
    recorder.flush()
    first, second = world.written().read_metrics()
    assert (first["step"], first["loss"], first["samples"]) == (0, 0.5, 20)
    assert (second["step"], second["loss"]) == (1, None)
    assert first["lr"] == 0.01


@pytest.mark.parametrize("written", [1, 2], ids=["one is missing", "all are there"])
def test_a_successor_adds_the_step_that_was_committed_but_not_written(
    written: int, world: World
) -> None:
    first = world.begin()
    for step in range(written):
        first.later(committed(step))
    first.flush()
    world.journals[-1].drain()
    second = world.begin()
    second.take_over(State(step=2, attempt=0, exponents=None, loss=0.25))
    second.flush()
    lines = world.written().read_metrics()
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[1]["loss"] == (0.25 if written == 1 else 0.5)


def test_a_successor_that_finds_nothing_begins_with_step_0(world: World) -> None:
    recorder = world.begin()
    recorder.take_over(State(step=0, attempt=0, exponents=None))
    recorder.flush()
    assert world.written().read_metrics() == []


def told(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.later(committed(step))
        recorder.later(events.Note("noted", str(step)))
        recorder.flush()


def steps(run: RunFolder) -> list[int]:
    """As they are in the file."""
    return [line["step"] for line in Lines(run.metrics_jsonl).read()]


def test_a_file_system_that_stalls_holds_nobody_up(world: World, stalled: StalledRun) -> None:
    recorder = world.begin(stalled)
    told(recorder, range(50))
    assert stalled.asked.wait(DEADLINE_S)
    assert steps(world.run) == []
    stalled.answers.set()
    assert steps(world.written()) == list(range(50))
    assert [one["reason"] for one in world.run.read_events()] == [str(one) for one in range(50)]


def test_the_result_waits_for_what_was_told_before(world: World, stalled: StalledRun) -> None:
    recorder = world.begin(stalled)
    told(recorder, range(10))
    with ThreadPoolExecutor(1) as threads:
        state = State(step=10, attempt=0, exponents=None)
        result = threads.submit(finish, recorder, world, state)
        assert stalled.asked.wait(DEADLINE_S)
        assert not world.run.result_json.exists()
        stalled.answers.set()
        result.result(DEADLINE_S)
    assert world.run.read_json(world.run.result_json)["step_s_median"] is not None
    assert world.run.read_events()[-1]["kind"] == "job_finished"


@pytest.mark.parametrize("num_told", [7, 8], ids=["one was not told", "all were told"])
def test_a_lead_that_dies_while_its_file_system_stalls_loses_nothing(
    num_told: int, world: World, stalled: StalledRun
) -> None:
    killed = world.begin(stalled)
    told(killed, range(num_told))
    killed.evaluated(events.Evaluated(num_told, 0.5, (), ()))
    assert stalled.asked.wait(DEADLINE_S)
    successor = world.begin()
    successor.take_over(State(step=8, attempt=0, exponents=None, loss=0.25))
    told(successor, range(8, 11))
    assert steps(world.written()) == list(range(11))
    (evaluation,) = world.run.read_evaluations()
    assert evaluation["step"] == num_told
    assert world.run.read_metrics()[7]["loss"] == (0.25 if num_told == 7 else 0.5)
    assert "metrics_missing" not in [one["kind"] for one in world.run.read_events()]


def test_lines_that_died_with_their_host_are_named(world: World) -> None:
    """The new lead, on another host, makes the last one; it knows no others."""
    told(world.begin(), range(4))
    world.journals[-1].drain()
    (world.memory / "journal").unlink()
    world.begin().take_over(State(step=8, attempt=0, exponents=None, loss=0.25))
    assert steps(world.written()) == [0, 1, 2, 3, 7]
    missing = world.run.read_events()[-1]
    assert (missing["kind"], missing["reason"][:12]) == ("metrics_missing", "steps 4 to 6")


def test_the_first_step_of_a_successor_lasts_since_the_last_of_its_predecessor(
    world: World,
) -> None:
    world.run.append_metrics({"step": 4, "time_s": time.time() - 100.0})
    recorder = world.begin()
    recorder.take_over(State(step=5, attempt=0, exponents=None))
    told(recorder, range(5, 7))
    _, first, second = world.written().read_metrics()
    assert 100.0 <= first["step_s"] < 100.0 + DEADLINE_S
    assert 0.0 <= second["step_s"] < DEADLINE_S


def finish(recorder: Recorder, world: World, state: State, failure: str = "") -> None:
    recorder.result(
        state,
        world.node.versions[0],
        Membership(generation=6),
        failure=failure,
        unwritten="",
        faults_fired=(3, 1),
    )


@pytest.mark.parametrize(
    ("step", "failure", "outcome"),
    [(10, "", "finished"), (4, "", "stopped"), (4, "no chunk is left", "failed")],
    ids=["all steps", "stopped", "failed"],
)
def test_the_result_says_how_it_ended(step: int, failure: str, outcome: str, world: World) -> None:
    recorder = world.begin()
    state = State(step=step, attempt=0, exponents=None, samples="ab")
    for _ in range(2):  # a successor may write it again
        finish(recorder, world, state, failure)
    result = world.run.read_json(world.run.result_json)
    assert (result["outcome"], result["failure"], result["steps"]) == (outcome, failure, step)
    assert (result["samples_sha256"], result["num_generations"]) == ("ab", 6)
    assert (result["faults_fired"], result["step_s_median"]) == ([1, 3], None)
    assert world.run.read_events()[-1]["kind"] == f"job_{outcome}"


def test_a_step_that_was_skipped_has_no_metrics() -> None:
    assert by_name(("loss", "accuracy"), ()) == {"loss": None, "accuracy": None}
    assert by_name(("loss",), (math.inf,)) == {"loss": None}
    assert by_name(("loss",), (0.5,)) == {"loss": 0.5}
