"""Faults happen once, at the named point, in the process that reaches it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import injector
from actors.injector import AggregatorInjector, WorkerInjector
from elastic.core.faults import AGGREGATOR_POINTS, WORKER_POINTS, Fault

Fork = Callable[[Callable[[], None]], Any]


class Aggregator:
    """An injector with what the aggregator gives it, and what came of it."""

    def __init__(self, faults: list[Fault], folder: Path, *, coordinator: int | None = 99) -> None:
        self.injector = AggregatorInjector(faults, folder)
        self.pids: dict[int, int] = {}
        self.coordinator = coordinator
        self.scaled: list[tuple[int, int | None]] = []
        self.noted: list[str] = []

    def at(self, point: str, step: int) -> None:
        self.injector.at(
            point,
            step,
            self.pids,
            coordinator_pid=self.coordinator,
            scale=self._scale,
            note=lambda fault: self.noted.append(str(fault)),
        )

    def _scale(self, delta: int, worker: int | None) -> bool:
        self.scaled.append((delta, worker))
        return True


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Signals that would have been sent."""
    sent: list[tuple[int, str]] = []
    monkeypatch.setattr(
        injector.os, "kill", lambda pid, number: sent.append((pid, signal.Signals(number).name))
    )
    return sent


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeps that would have been slept."""
    seconds: list[float] = []
    monkeypatch.setattr(injector.time, "sleep", seconds.append)
    monkeypatch.setattr(injector, "sleep_while", lambda runs, one: seconds.append(one))
    return seconds


def in_worker(
    faults: list[Fault], folder: Path, worker: int = 1, *, seed: int = 0
) -> WorkerInjector:
    return WorkerInjector(faults, folder, worker, seed)


# --- in the aggregator -----------------------------------------------------------------------


@pytest.mark.parametrize("point", AGGREGATOR_POINTS)
def test_a_fault_fires_once_at_its_point(
    point: Any, tmp_path: Path, killed: list[tuple[int, str]]
) -> None:
    aggregator = Aggregator([Fault(index=0, do="kill", step=3, point=point, target=1)], tmp_path)
    aggregator.pids = {0: 1000, 1: 1001}
    for step in range(6):
        for other in AGGREGATOR_POINTS:
            aggregator.at(other, step)
            reached = step > 3 or (
                step == 3 and AGGREGATOR_POINTS.index(other) >= AGGREGATOR_POINTS.index(point)
            )
            assert killed == [(1001, "SIGKILL")] * reached
    assert aggregator.injector.fired() == {0}
    assert aggregator.noted == [f"kill worker-1 at {point}"]


@pytest.mark.parametrize(
    ("fault", "signals"),
    [
        (Fault(index=0, do="kill", target=1), [(1001, "SIGKILL")]),
        (Fault(index=0, do="kill", target="any"), [(1001, "SIGKILL")]),
        (Fault(index=0, do="stop", target=1, for_s=5), [(1001, "SIGSTOP")]),
        (Fault(index=0, do="resume", target=1), [(1001, "SIGCONT")]),
        (Fault(index=0, do="kill_coordinator"), [(99, "SIGKILL")]),
        (Fault(index=0, do="kill_aggregator"), [(os.getpid(), "SIGKILL")]),
        (Fault(index=0, do="stop_aggregator"), [(os.getpid(), "SIGSTOP")]),
    ],
    ids=lambda value: value.do if isinstance(value, Fault) else "",
)
def test_signals(
    fault: Fault, signals: list[tuple[int, str]], tmp_path: Path, killed: list[tuple[int, str]]
) -> None:
    aggregator = Aggregator([fault], tmp_path)
    aggregator.pids = {1: 1001}
    for _ in range(3):
        aggregator.at("step_start", 0)
    assert killed == signals
    assert len(aggregator.noted) == 1


@pytest.mark.parametrize(
    ("fault", "asked"),
    [
        (Fault(index=0, do="add_worker"), (1, None)),
        (Fault(index=0, do="remove_worker"), (-1, None)),
        (Fault(index=0, do="remove_worker", target=4), (-1, 4)),
    ],
    ids=["add", "remove", "remove one"],
)
def test_scaling(fault: Fault, asked: tuple[int, int | None], tmp_path: Path) -> None:
    aggregator = Aggregator([fault], tmp_path)
    for _ in range(3):
        aggregator.at("step_start", 0)
    assert aggregator.scaled == [asked]
    assert aggregator.injector.fired() == {0}


def test_a_fault_whose_target_is_not_there_stays_due(
    tmp_path: Path, killed: list[tuple[int, str]]
) -> None:
    faults = [
        Fault(index=0, do="kill", target=1),
        Fault(index=1, do="kill_coordinator"),
        Fault(index=2, do="add_worker"),
    ]
    aggregator = Aggregator(faults, tmp_path, coordinator=None)
    aggregator.at("step_start", 0)
    assert (killed, aggregator.scaled, aggregator.injector.fired()) == ([], [], set())
    aggregator.pids, aggregator.coordinator = {1: 1001}, 99
    aggregator.at("step_start", 7)
    assert killed == [(1001, "SIGKILL"), (99, "SIGKILL")]
    assert aggregator.scaled == [(1, None)]
    assert aggregator.injector.fired() == {0, 1, 2}


def test_a_successor_does_not_fire_again(tmp_path: Path, killed: list[tuple[int, str]]) -> None:
    fault = Fault(index=0, do="kill_aggregator", point="mid_update")
    Aggregator([fault], tmp_path).at("mid_update", 0)
    successor = Aggregator([fault], tmp_path)
    successor.at("mid_update", 0)
    assert len(killed) == 1
    assert successor.injector.fired() == {0}


def test_what_happens_in_workers_is_left_to_them(
    tmp_path: Path, killed: list[tuple[int, str]]
) -> None:
    faults = [
        Fault(index=0, do="kill", target=1, point="after_compute"),
        Fault(index=1, do="slow", target=1, factor=2.0),
        Fault(index=2, do="nan_gradient", target=1),
    ]
    aggregator = Aggregator(faults, tmp_path)
    aggregator.pids = {1: 1001}
    for point in (*AGGREGATOR_POINTS, *WORKER_POINTS):
        aggregator.at(point, 5)
    assert (killed, aggregator.injector.fired()) == ([], set())


def test_a_job_without_faults_touches_nothing(tmp_path: Path) -> None:
    aggregator = Aggregator([], tmp_path)
    aggregator.at("step_start", 0)
    aggregator.injector.wake()
    worker = in_worker([], tmp_path)
    worker.at("before_compute", 0)
    worker.sleep(0, list)
    assert worker.stretch(0, 1.0, memoryview(bytearray(8)).cast("Q")) == 0.0
    assert not worker.poisons(0)
    assert aggregator.injector.fired() == set()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_process_is_resumed_when_its_time_is_over(tmp_path: Path, fork: Fork) -> None:
    child = fork(lambda: None)
    fault = Fault(index=0, do="stop", target=1, for_s=0.05)
    aggregator = Aggregator([fault], tmp_path)
    aggregator.pids = {1: child.pid}
    begin_s = time.time()
    aggregator.at("step_start", 0)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    deadline_s = time.monotonic() + 10
    successor = Aggregator([fault], tmp_path)  # whoever acts by then
    while not os.WIFCONTINUED(os.waitpid(child.pid, os.WCONTINUED | os.WNOHANG)[1]):
        assert time.monotonic() < deadline_s
        successor.injector.wake()
    assert time.time() >= begin_s + 0.05


def test_a_stop_without_end_is_never_resumed(tmp_path: Path, killed: list[tuple[int, str]]) -> None:
    aggregator = Aggregator([Fault(index=0, do="stop", target=1)], tmp_path)
    aggregator.pids = {1: 1001}
    aggregator.at("step_start", 0)
    aggregator.injector.wake()
    assert killed == [(1001, "SIGSTOP")]


def test_waking_a_process_that_is_gone_does_no_harm(tmp_path: Path, fork: Fork) -> None:
    child = fork(lambda: None)
    child.kill()
    aggregator = Aggregator([Fault(index=0, do="stop", target=1)], tmp_path)
    path = tmp_path / "faults" / "0"
    path.write_text(json.dumps({"pid": child.pid, "resume_s": 1.0}))
    aggregator.injector.wake()
    assert json.loads(path.read_text())["resume_s"] is None


def test_an_entry_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    aggregator = Aggregator([Fault(index=0, do="stop", target=1)], tmp_path)
    (tmp_path / "faults" / "0").write_text("")
    aggregator.injector.wake()
    assert aggregator.injector.fired() == {0}


# --- in a worker -----------------------------------------------------------------------------


@pytest.mark.parametrize("point", WORKER_POINTS)
@pytest.mark.parametrize(("do", "name"), [("kill", "SIGKILL"), ("stop", "SIGSTOP")])
def test_a_worker_ends_or_stops_itself_at_its_point(
    do: Any, name: str, point: Any, tmp_path: Path, killed: list[tuple[int, str]]
) -> None:
    faults = [Fault(index=0, do=do, step=2, point=point, target=1)]
    other, mine = in_worker(faults, tmp_path, 0), in_worker(faults, tmp_path, 1)
    for step in range(4):
        for here in WORKER_POINTS:
            other.at(here, step)
            mine.at(here, step)
    assert killed == [(os.getpid(), name)]
    assert mine.fired() == {0}


def test_only_one_process_claims_a_fault(tmp_path: Path, killed: list[tuple[int, str]]) -> None:
    faults = [Fault(index=0, do="kill", point="before_compute", target="any")]
    for worker in range(5):
        in_worker(faults, tmp_path, worker).at("before_compute", 0)
    assert len(killed) == 1


def test_bits_are_flipped_in_a_share_of_the_micro_batches_of_one_worker(tmp_path: Path) -> None:
    faults = [Fault(index=0, do="flip_bit", step=2, target=1, probability=0.25)]
    mine, other = in_worker(faults, tmp_path, 1), in_worker(faults, tmp_path, 0)
    assert not any(mine.flips(step) for step in (0, 1) for _ in range(50))
    assert 150 < sum(mine.flips(2) for _ in range(800)) < 250
    assert not any(other.flips(2) for _ in range(50))
    assert mine.fired() == {0}


def test_a_gradient_is_poisoned_once(tmp_path: Path) -> None:
    faults = [Fault(index=0, do="nan_gradient", step=2, target=1)]
    mine, other = in_worker(faults, tmp_path, 1), in_worker(faults, tmp_path, 0)
    assert [mine.poisons(step) for step in range(5)] == [False, False, True, False, False]
    assert not any(other.poisons(step) for step in range(5))


def test_a_slow_worker_sleeps_once_in_every_step(tmp_path: Path, slept: list[float]) -> None:
    faults = [Fault(index=0, do="slow", step=2, target=1, sleep_s=0.3)]
    mine, other = in_worker(faults, tmp_path, 1), in_worker(faults, tmp_path, 0)
    for step in (0, 1, 2, 2, 2, 3, 5):
        mine.sleep(step, lambda: [0, 1])
        other.sleep(step, lambda: [0, 1])
    assert slept == [0.3] * 3
    assert mine.fired() == {0}


def test_a_slow_worker_takes_a_factor_as_long(tmp_path: Path, slept: list[float]) -> None:
    faults = [Fault(index=0, do="slow", step=2, target=1, factor=2.5)]
    mine = in_worker(faults, tmp_path, 1)
    late_s, progress = [], memoryview(bytearray(8)).cast("Q")
    for step in range(4):
        late_s.append(mine.stretch(step, 0.1, progress))
        mine.sleep(step, lambda: [1])
    assert late_s == [0.0, 0.0, pytest.approx(0.15), pytest.approx(0.15)]
    assert sum(slept) == pytest.approx(0.3)
    assert progress[0] == len(slept) > 10  # slow, and no hang


def test_slowness_ends_in_time(
    tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [50.0]
    monkeypatch.setattr(injector.time, "monotonic", lambda: now_s[0])
    faults = [Fault(index=0, do="slow", target=1, sleep_s=0.1, for_s=10.0)]
    mine = in_worker(faults, tmp_path, 1)
    for step in range(20):
        mine.sleep(step, lambda: [1])
        now_s[0] += 1.0
    assert len(slept) == 10


def test_a_random_worker_sleeps_in_a_share_of_steps(tmp_path: Path, slept: list[float]) -> None:
    faults = [Fault(index=0, do="slow", target="any", sleep_s=0.1, probability=0.25)]
    sleepers = []
    for seed in (0, 0, 1):
        workers = [in_worker(faults, tmp_path, one, seed=seed) for one in range(4)]
        chosen = []
        for step in range(400):
            for worker in workers:
                before = len(slept)
                worker.sleep(step, lambda: range(4))
                if len(slept) > before:
                    chosen.append((step, worker._worker))
        assert len({step for step, _ in chosen}) == len(chosen)  # one in a step
        assert 70 <= len(chosen) <= 130
        assert {worker for _, worker in chosen} == {0, 1, 2, 3}
        sleepers.append(chosen)
    assert sleepers[0] == sleepers[1] != sleepers[2]


def test_a_sleep_ends_with_its_step(tmp_path: Path) -> None:
    faults = [Fault(index=0, do="slow", target=1, sleep_s=3600.0)]
    looks = iter([True, True, False])
    in_worker(faults, tmp_path, 1).sleep(0, list, lambda: next(looks))
    assert next(looks, None) is None


def test_recorded_delays_are_replayed(tmp_path: Path, slept: list[float]) -> None:
    trace = tmp_path / "trace.npz"
    np.savez(trace, dur=np.arange(1.0, 7.0).reshape(3, 2))
    faults = [Fault(index=0, do="delays", trace=trace, scale=0.5)]
    worker = in_worker(faults, tmp_path, 3)  # column 1
    for step in range(5):
        worker.sleep(step, list)
    assert slept == [1.0, 2.0, 3.0, 1.0, 2.0]
    assert worker.fired() == {0}
