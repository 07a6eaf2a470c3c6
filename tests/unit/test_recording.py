"""What a run leaves behind to read, also where the lead changes between two steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.recording import EventLog, Recorder, by_name
from actors.setup import JobSetup
from elastic.core.protocol import events
from elastic.core.protocol.messages import Membership, State
from elastic.core.runs import RunFolder


@dataclass
class World:
    """A lead's recorder, and where it writes."""

    node: Any
    run: RunFolder
    where: list[int] = field(default_factory=lambda: [0, 0])

    def begin(self) -> Recorder:
        """The recorder of whoever leads from now on."""
        setup = JobSetup(self.node.job, self.run, "12ab", bytes(32))
        log = EventLog(self.run, lambda: (self.where[0], self.where[1]))
        return Recorder(setup, self.node.spec, self.node.task, log)


@pytest.fixture
def world(make_node: Callable[..., Any], tmp_path: Path) -> World:
    run = RunFolder(tmp_path / "run")
    run.create()
    return World(make_node(), run)


def committed(step: int, *, loss: float = 0.5, skipped: bool = False) -> events.Committed:
    return events.Committed(step, 0, loss, 1.0, skipped, 2, 0, (), ())


def test_an_event_says_where_the_run_was(world: World) -> None:
    world.where[:] = [7, 3]
    recorder = world.begin()
    recorder.later(events.Note("worker_lost", "its process is gone", 5))
    assert world.run.read_events() == []  # nobody waits for the disk
    recorder.flush()
    recorder.flush()
    (event,) = world.run.read_events()
    assert event.pop("time_s") > 0
    assert event == {
        "kind": "worker_lost",
        "step": 7,
        "generation": 3,
        "worker": 5,
        "reason": "its process is gone",
    }


def test_each_step_is_one_line_and_a_number_that_is_none_is_null(world: World) -> None:
    recorder = world.begin()
    recorder.later(committed(0))
    recorder.later(committed(1, loss=math.nan, skipped=True))
    recorder.flush()
    first, second = world.run.read_metrics()
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
    second = world.begin()
    second.take_over(State(step=2, attempt=0, exponents=None, loss=0.25))
    second.flush()
    lines = world.run.read_metrics()
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[1]["loss"] == (0.25 if written == 1 else 0.5)


def test_a_successor_that_finds_nothing_begins_with_step_0(world: World) -> None:
    recorder = world.begin()
    recorder.take_over(State(step=0, attempt=0, exponents=None))
    recorder.flush()
    assert world.run.read_metrics() == []


@pytest.mark.parametrize(
    ("step", "failure", "outcome"),
    [(10, "", "finished"), (4, "", "stopped"), (4, "no chunk is left", "failed")],
    ids=["all steps", "stopped", "failed"],
)
def test_the_result_says_how_it_ended(step: int, failure: str, outcome: str, world: World) -> None:
    recorder = world.begin()
    state = State(step=step, attempt=0, exponents=None, samples="ab")
    for _ in range(2):  # a successor may write it again
        recorder.result(
            state,
            world.node.versions[0],
            Membership(generation=6),
            failure=failure,
            unwritten="",
            faults_fired=(3, 1),
        )
    result = world.run.read_json(world.run.result_json)
    assert (result["outcome"], result["failure"], result["steps"]) == (outcome, failure, step)
    assert (result["samples_sha256"], result["num_generations"]) == ("ab", 6)
    assert (result["faults_fired"], result["step_s_median"]) == ([1, 3], None)
    assert world.run.read_events()[-1]["kind"] == f"job_{outcome}"


def test_a_step_that_was_skipped_has_no_metrics() -> None:
    assert by_name(("loss", "accuracy"), ()) == {"loss": None, "accuracy": None}
    assert by_name(("loss",), (math.inf,)) == {"loss": None}
    assert by_name(("loss",), (0.5,)) == {"loss": 0.5}
