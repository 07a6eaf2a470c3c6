"""A family of jobs: all run as there is room, a lost one begins again and delays nobody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from elastic.core.config import load_job
from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder
from elastic.experts.jobs import Planned
from elastic.experts.training import Family, is_finished, places

STEPS = 3


@dataclass
class FakeIsland:
    """Ends when it is told to, as it is told to."""

    job: Planned
    how: str | None = None
    was_ended: bool = False

    def poll(self) -> str | None:
        return self.how

    def end(self) -> None:
        self.was_ended = True

    def finish(self) -> None:
        write_result(self.job)
        self.how = ""

    def lose(self) -> None:
        self.how = "its process died"


@dataclass
class Fakes:
    """Every island that was started, by job, newest last."""

    started: dict[str, list[FakeIsland]] = field(default_factory=dict)

    def start(self, one: Planned) -> FakeIsland:
        island = FakeIsland(one)
        self.started.setdefault(one.role, []).append(island)
        return island

    def newest(self, role: str) -> FakeIsland:
        return self.started[role][-1]


def write_result(one: Planned, **changes: object) -> None:
    run = RunFolder(one.run)
    run.create()
    run.write_json(run.job_json, one.job.model_dump(mode="json"))
    result = {"outcome": "finished", "steps": STEPS, "loss": 0.5, **changes}
    run.write_json(run.result_json, result)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Planned]:
    batch = {"micro_batches": 1, "micro_batch_size": 1}
    return [
        Planned(role, 0, load_job({"name": role, "steps": STEPS, "batch": batch}), tmp_path / role)
        for role in ("one", "two", "three")
    ]


@pytest.fixture
def make(jobs: list[Planned]) -> Callable[..., tuple[Family, Fakes, list[str]]]:
    def build(max_failures: int = 1) -> tuple[Family, Fakes, list[str]]:
        fakes, told = Fakes(), list[str]()
        return Family(jobs, fakes.start, max_failures, told.append), fakes, told

    return build


Make = Callable[..., tuple[Family, Fakes, list[str]]]


def test_all_run_at_once_and_it_ends_with_the_last(make: Make) -> None:
    family, fakes, told = make()
    assert not family.step()
    assert list(fakes.started) == ["one", "two", "three"]
    fakes.newest("two").finish()
    assert not family.step()
    assert told == ["two: finished, loss 0.5000"]
    fakes.newest("one").finish()
    fakes.newest("three").finish()
    assert family.step()
    assert [len(islands) for islands in fakes.started.values()] == [1, 1, 1]
    assert all(island.was_ended for islands in fakes.started.values() for island in islands)


def test_a_lost_island_begins_again_and_the_others_go_on(make: Make) -> None:
    family, fakes, told = make()
    family.step()
    fakes.newest("one").lose()
    family.step()
    family.step()
    assert [len(islands) for islands in fakes.started.values()] == [2, 1, 1]
    assert "one: lost (its process died), begins again" in told[0]
    assert not fakes.newest("two").was_ended
    for role in fakes.started:
        fakes.newest(role).finish()
    assert family.step()
    assert family.lost == {}


def test_one_that_is_lost_too_often_is_given_up_and_the_others_finish(make: Make) -> None:
    family, fakes, told = make(max_failures=1)
    for _ in range(2):
        family.step()
        fakes.newest("one").lose()
        family.step()
    assert "given up after 2 failures" in told[-1]
    assert len(fakes.started["one"]) == 2
    fakes.newest("two").finish()
    fakes.newest("three").finish()
    assert family.step()
    assert list(family.lost) == ["one"]
    assert "driver.log" in family.lost["one"]


def test_an_end_without_all_steps_is_a_loss(make: Make, jobs: list[Planned]) -> None:
    family, fakes, told = make()
    family.step()
    write_result(jobs[0], outcome="stopped", steps=1)
    fakes.newest("one").how = ""
    family.step()
    assert "one: lost (it ended before its last step)" in told[0]


def test_what_is_finished_is_not_started(make: Make, jobs: list[Planned]) -> None:
    write_result(jobs[1])
    family, fakes, _ = make()
    family.step()
    assert list(fakes.started) == ["one", "three"]


def test_the_end_of_all_ends_the_islands(make: Make) -> None:
    family, fakes, _ = make()
    family.step()
    family.end()
    assert all(fakes.newest(role).was_ended for role in fakes.started)


def test_a_run_of_other_settings_is_refused(jobs: list[Planned]) -> None:
    write_result(jobs[0])
    other = jobs[0].job.model_copy(update={"seed": 5})
    with pytest.raises(ConfigError, match="seed: the run was begun with 0"):
        is_finished(Planned("one", 0, other, jobs[0].run))
    more = jobs[0].job.model_copy(update={"steps": STEPS + 1})
    assert not is_finished(Planned("one", 0, more, jobs[0].run))


def test_what_finished_without_its_driver_is_begun_again_to_be_cleared_away(
    make: Make, jobs: list[Planned]
) -> None:
    """Workers and memory of it live on, and its run says so."""
    write_result(jobs[0])
    run = RunFolder(jobs[0].run)
    run.write_json(run.ray_json, {"pid": 1})
    family, fakes, _ = make()
    family.step()
    assert jobs[0].role in fakes.started
    run.ray_json.unlink()
    fakes.newest(jobs[0].role).finish()
    family.step()
    assert is_finished(jobs[0])


def test_what_trains_is_told_from_what_waits(
    make: Callable[..., tuple[Family, Fakes, list[str]]], jobs: list[Planned]
) -> None:
    family, _, _ = make()
    family.step()
    run = RunFolder(jobs[1].run)
    run.create()
    run.metrics_jsonl.write_text('{"step": 1}\n')
    assert list(places(family)) == ["two 2/3", "2 wait for resources, or start"]
