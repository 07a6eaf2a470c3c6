"""The run report: the story read from a run folder, and a picture of runs of every size."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder
from elastic.report.marks import AGGREGATOR, JOIN, KILL, LOST, STOP
from elastic.report.picture import draw_picture
from elastic.report.story import busy_share, read_story

START_S = 1_700_000_000.0
MICRO_BATCHES = 16


class FakeRun:
    """Writes the folder of a made-up run: workers with speeds, and faults at chosen steps."""

    def __init__(self, path: Path, *, num_steps: int, micro_batch_s: float = 0.02) -> None:
        self.folder = RunFolder(path)
        self.folder.create()
        self.now_s = START_S + 3.0
        self.num_steps, self.micro_batch_s = num_steps, micro_batch_s
        self.workers = {0: 1.0, 1: 1.15, 2: 1.0, 3: 1.4}
        self.frozen: dict[int, int] = {}
        self.generation = 4
        self.random = random.Random(0)
        job = {
            "name": "stdlib-lm",
            "task": "examples.stdlib_lm.task:StdlibLM",
            "seed": 0,
            "steps": num_steps,
            "batch": {"micro_batches": MICRO_BATCHES, "micro_batch_size": 2},
            "workers": {"start": 4, "min": 1, "max": 8, "threads": 1},
            "precision": "float32",
            "clip_norm": 1.0,
        }
        self.folder.write_json(self.folder.job_json, job)
        self.event("job_started", 0, reason="4 workers", time_s=START_S)
        for worker in self.workers:
            self.event("worker_joined", 0, worker=worker, time_s=START_S + 2.5 + worker * 0.1)

    def event(self, kind: str, step: int, **more: Any) -> None:
        """Append one event, now unless told otherwise."""
        base = {"time_s": self.now_s, "kind": kind, "step": step, "generation": self.generation}
        self.folder.append_event({**base, "worker": None, "reason": "", **more})

    def run(self, faults: dict[int, str]) -> None:
        """Compute all steps; `faults` maps a step to what happens in it."""
        for step in range(self.num_steps):
            self._step(step, faults.get(step))
            if step % 50 == 49:
                self.event("checkpoint_written", step)
        self.event("job_finished", self.num_steps)
        self.folder.close()

    def finish(self) -> None:
        """Write the result."""
        hashes = {"params_sha256": "5e8f" * 16, "samples_sha256": "a01c" * 16}
        self.folder.write_json(self.folder.result_json, {**hashes, "exact": True, "loss": 1.0})

    def _step(self, step: int, fault: str | None) -> None:
        start_s, dead = self.now_s, set()
        free = {worker: start_s for worker in self.workers if self.frozen.get(worker, 0) <= step}
        if fault:
            self.now_s = start_s + 0.6 * self.micro_batch_s
            dead = set(self._fault(step, fault))
        work: list[list[Any]] = []
        for micro_batch in range(MICRO_BATCHES):
            worker = min(free, key=lambda worker: free[worker])
            took_s = self.micro_batch_s * self.workers.get(worker, 1.0)
            took_s *= self.random.uniform(0.9, 1.15)
            work.append([worker, micro_batch, free[worker], free[worker] + took_s, "granted"])
            free[worker] += took_s
            if worker in dead:
                work[-1][3] = self.now_s
                work[-1][4] = "refused"
                del free[worker]
        end_s = max(free.values())
        num_duplicates = 0
        if self.random.random() < 0.3:
            idle = min(free, key=lambda worker: free[worker])
            work.append([idle, 15, free[idle], end_s - 0.001, "refused"])
            num_duplicates = 1
        stall_s = 0.15 if fault == "aggregator" else 0.0
        self.now_s = end_s + 0.004 + stall_s
        if fault == "aggregator":
            self.event("aggregator_took_over", step, reason="standby held the lock after 71 ms")
        loss = 5.5 * 0.5 ** (6 * step / self.num_steps) + 1.6 + self.random.gauss(0, 0.06)
        line = {"step": step, "time_s": self.now_s, "step_s": self.now_s - start_s, "loss": loss}
        rest = {"grad_norm": 1.0, "lr": 1e-3, "samples": 32, "attempt": 0, "update_s": 0.003}
        count = {"num_workers": len(self.workers), "num_duplicates": num_duplicates, "work": work}
        self.folder.append_metrics({**line, **rest, **count})

    def _fault(self, step: int, fault: str) -> Iterator[int]:
        if fault == "kill":
            victim = max(self.workers)
            self.event("fault", step, reason=f"kill worker-{victim} at after_grant", worker=victim)
            self.event("worker_lost", step, worker=victim, reason="end of file on its socket")
            self.workers[victim + 1] = self.workers.pop(victim)
            joined_s = self.now_s + 0.05
            self.event("worker_joined", step, worker=victim + 1, reason="spare", time_s=joined_s)
            self.frozen[victim + 1] = step + 1
            if len(self.workers) > 1:
                yield victim
        elif fault == "stop":
            self.event("fault", step, reason="stop worker-1 at before_compute for 0.5 s", worker=1)
            self.event("worker_hung", step, worker=1, time_s=self.now_s + 0.03)
            self.frozen[1] = step + 8
        elif fault == "aggregator":
            self.event("fault", step, reason="kill_aggregator at mid_update")
            self.event("aggregator_lost", step, reason="lock released")
        elif fault == "join":
            newcomer = max(self.workers) + 1
            self.event("fault", step, reason="add_worker")
            self.event("worker_joined", step, worker=newcomer)
            self.workers[newcomer] = 1.0
        elif fault == "slow":
            self.event("fault", step, reason="slow worker-2 3 times", worker=2)
            self.workers[2] = 3.0


FAULTS = {30: "kill", 34: "stop", 38: "aggregator", 48: "join", 60: "slow", 90: "kill"}


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    """A finished run of 120 steps with faults."""
    fake = FakeRun(tmp_path / "run", num_steps=120)
    fake.run(FAULTS)
    fake.finish()
    return fake


def test_the_story_holds_every_step_and_every_fault(run: FakeRun) -> None:
    story = read_story(run.folder.path)
    assert story.step.tolist() == list(range(120))
    assert len(story.work.worker) >= 120 * MICRO_BATCHES
    categories = [mark.category for mark in story.marks if mark.is_fault]
    assert categories[:4] == [KILL, STOP, AGGREGATOR, JOIN]
    assert story.workers.tolist() == [0, 1, 2, 3, 4, 5, 6]
    lost = [mark for mark in story.marks if mark.category == LOST]
    assert [life[2] for life in story.lives if life[0] == 3] == [lost[0].time_s]


def test_the_zoom_shows_the_faults(run: FakeRun) -> None:
    story = read_story(run.folder.path)
    zoom = story.zoom()
    assert zoom is not None
    inside = {mark.category for mark in story.marks if zoom[0] <= mark.time_s <= zoom[1]}
    assert {KILL, STOP, AGGREGATOR, JOIN} <= inside


def test_a_quiet_run_is_zoomed_at_its_slowest_step(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=200)
    fake.run({})
    zoom = read_story(tmp_path).zoom()
    assert zoom is not None
    story = read_story(tmp_path)
    assert zoom[0] <= story.time_s[np.argmax(story.step_s)] <= zoom[1]


def test_the_pause_before_a_resume_is_cut_out(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=5)
    fake.run({})
    fake.now_s += 5000
    fake.event("job_resumed", 5)
    fake.now_s += 0.1
    fake.num_steps = 6
    fake._step(5, None)
    story = read_story(tmp_path)
    assert story.time_s[-1] - story.time_s[-2] < 3


def test_busy_share_counts_no_second_twice(run: FakeRun) -> None:
    story = read_story(run.folder.path)
    share = busy_share(story.work, 0, np.linspace(story.first_step_s, story.end_s, 50))
    assert share.shape == (49,)
    assert 0.6 < share.mean() <= 1.0
    assert (busy_share(story.work, 999, np.linspace(0, 1, 5)) == 0).all()


@pytest.mark.parametrize("num_steps", [1, 20, 3000])
def test_runs_of_every_size_are_drawn(tmp_path: Path, num_steps: int) -> None:
    fake = FakeRun(tmp_path, num_steps=num_steps)
    fake.run({} if num_steps == 1 else {5: "kill", 9: "aggregator"})
    path = draw_picture(tmp_path)
    assert path == tmp_path / "report.png"
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_torn_or_empty_run_is_drawn_or_refused_in_words(tmp_path: Path, run: FakeRun) -> None:
    with run.folder.metrics_jsonl.open("a") as file:
        file.write('{"step": 120, "time')
    assert draw_picture(run.folder.path, tmp_path / "deep" / "x.png").exists()
    with pytest.raises(ConfigError, match=r"is .* a run folder"):
        draw_picture(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "job.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(ConfigError, match="no step has been committed"):
        draw_picture(tmp_path / "empty")
