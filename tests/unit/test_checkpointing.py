"""The acting aggregator's checkpoints: due, refused, tried again, taken up by another, pruned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.checkpointing import Checkpointer
from actors.setup import JobSetup
from elastic.core.checkpoint import find_checkpoint
from elastic.core.config import load_job
from elastic.core.errors import StorageError
from elastic.core.layout import make_layout
from elastic.core.ownership import OWNER_FILE, Owner
from elastic.core.protocol.messages import State
from elastic.core.runs import RunFolder

LAYOUT = make_layout([[("weight", (8,))]], buffers=[], chunk_elements=1024)


@dataclass
class FakeSnapshot:
    """A version that is copied at once. `problem`: why other nodes' share of it does not come."""

    step: int
    values: torch.Tensor = field(default_factory=lambda: torch.ones(LAYOUT.num_elements))
    counters: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, torch.Tensor] = field(default_factory=dict)
    problem: str = ""

    def copy(self) -> None:
        self.values.fill_(self.step)

    def wait_until_whole(self, timeout_s: float) -> None:
        if self.problem:
            raise StorageError(self.problem)


class Job:
    """One job on one storage, and its aggregators one after the other."""

    def __init__(self, folder: Path, **checkpoint: Any) -> None:
        settings = {"every": 10, "keep_last": 2, "storage": str(folder / "c"), **checkpoint}
        self.run = RunFolder(folder / "run")
        self.run.create()
        self.storage = folder / "c"
        job = load_job(
            {
                "name": "x",
                "steps": 100,
                "batch": {"micro_batches": 1, "micro_batch_size": 1},
                "checkpoint": settings,
            }
        )
        self.setup = JobSetup(job, self.run, "mine", bytes(32))
        self.events: list[tuple[str, str]] = []
        self.problem = ""
        self.background = ThreadPoolExecutor(1)
        self.checkpoints = self.act(0)

    def act(self, step: int) -> Checkpointer:
        """A new acting aggregator that goes on after so many steps."""
        self.checkpoints = Checkpointer(
            self.setup,
            self.run.path / "durable",
            self.background,
            first=State(step, 0, None),
            chunks=LAYOUT.chunks,
            take=lambda state: FakeSnapshot(  # type: ignore[arg-type,return-value]
                state.step, problem=self.problem
            ),
            release=lambda snapshot: None,
            weights=lambda snapshot, averaged: {"weight": snapshot.values},
            trained=lambda state: {"loss": state.loss},
            event=lambda kind, reason: self.events.append((kind, reason)),
        )
        return self.checkpoints

    def turn(self, step: int, *, attempt: int = 0) -> list[str]:
        """One turn of the aggregator, and whatever it starts; the events since."""
        begin = len(self.events)
        self.checkpoints.turn(State(step, attempt, None, loss=1.0 / (1 + step)))
        self.background.submit(lambda: None).result()
        return [kind for kind, _ in self.events[begin:]]

    def finish(self, step: int) -> str:
        self.checkpoints.stop()
        return self.background.submit(self.checkpoints.finish, State(step, 0, None)).result()

    def refuse(self) -> None:
        self.storage.rename(self.storage.with_suffix(".away"))
        self.storage.write_text("in the way")

    def recover(self) -> None:
        self.storage.unlink()
        self.storage.with_suffix(".away").rename(self.storage)

    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.storage.glob("step-*"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, patience_s=0.0)
    yield job
    job.background.shutdown()


def test_one_is_written_when_due_and_at_the_end(job: Job) -> None:
    assert job.turn(9) == []
    assert job.turn(10, attempt=1) == []
    assert job.turn(10) == ["checkpoint_written"]
    assert job.turn(10) == job.turn(11) == []
    assert job.finish(15) == ""
    assert job.turn(20) == []
    assert job.steps() == [10, 15]
    found = find_checkpoint(job.storage)
    assert torch.equal(found.weights["weight"], torch.full((LAYOUT.num_elements,), 15.0))
    assert found.meta["job"]["name"] == "x"


def test_the_end_writes_nothing_twice_and_nothing_of_step_0(job: Job) -> None:
    assert job.finish(0) == ""
    assert job.events == []
    assert job.finish(10) == job.finish(10) == ""
    assert [reason.partition(":")[0] for _, reason in job.events] == ["the last one, step 10"]


def test_a_successor_knows_what_is_durable(job: Job) -> None:
    job.turn(10)
    job.act(12)
    assert job.turn(12) == []
    (job.run.path / "durable").write_text("0")  # the predecessor died while it wrote
    job.act(13)
    assert job.turn(13) == ["checkpoint_written"]


def test_a_resumed_job_writes_none_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path)
    (job.run.path / "durable").unlink()
    job.act(15)
    assert job.turn(15) == []
    assert job.turn(20) == ["checkpoint_written"]
    job.background.shutdown()


def test_a_refusal_is_told_and_the_next_due_one_is_written(job: Job) -> None:
    job.turn(10)
    job.refuse()
    assert job.turn(20) == ["checkpoint_failed"]
    assert job.turn(21) == []  # backs off
    assert str(job.storage) in job.events[-1][1]
    job.recover()
    assert job.turn(30) == ["checkpoint_written"]
    assert job.steps() == [10, 30]


def test_a_last_one_that_is_refused_is_given_up_with_the_reason(job: Job) -> None:
    job.turn(10)
    job.refuse()
    problem = job.finish(15)
    assert problem.startswith("tried for 0 s after the end: ")
    assert str(job.storage) in problem
    job.recover()
    assert job.finish(15) == ""


def test_one_whose_state_does_not_come_from_other_nodes_is_not_written(job: Job) -> None:
    job.problem = "node 3 was lost"
    assert job.turn(10) == ["checkpoint_failed"]
    assert "node 3 was lost" in job.events[-1][1]
    assert job.steps() == []
    job.problem = ""
    assert job.finish(10) == ""
    assert job.steps() == [10]


def test_where_another_job_took_over_nothing_is_written(job: Job) -> None:
    job.turn(10)
    other = Owner.here("theirs", "/runs/other")
    (job.storage / OWNER_FILE).write_text(json.dumps(asdict(other)))
    assert job.turn(20) == ["checkpoint_failed"]
    assert "belongs to the run /runs/other" in job.events[-1][1]
    assert job.steps() == [10]


def test_the_best_stay_by_an_evaluation_that_came_later(tmp_path: Path) -> None:
    job = Job(tmp_path, keep_last=1, keep_best=1, metric="eval.accuracy", mode="max")
    for step, accuracy in ((10, 0.3), (20, 0.9), (30, 0.5), (40, 0.4)):
        job.turn(step)
        line = {"step": step, "loss": 1.0, "metrics": {"accuracy": accuracy}}
        job.run.append_evaluation(line)
    assert job.steps() == [20, 40]
    job.act(40)
    job.turn(50)
    assert job.steps() == [20, 50]
    job.background.shutdown()
