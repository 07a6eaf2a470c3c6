"""Reading ahead is a hint: on its own thread, for what will probably come, and never an error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from elastic.core.data.memory import ArrayRows
from elastic.core.data.read_ahead import MAX_WAITING, ReadAhead
from elastic.core.errors import DataError
from elastic.core.protocol.messages import Lease

WAIT_S = 10


class Recorder:
    """Keeps what was asked for; the first call waits for `gate`."""

    def __init__(self, num_wanted: int) -> None:
        self.seen: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.began, self.gate, self.done = (threading.Event() for _ in range(3))
        self._num_wanted = num_wanted

    def __call__(self, step: int, micro_batch: int) -> None:
        self.began.set()
        assert self.gate.wait(WAIT_S)
        self.threads.add(threading.get_ident())
        self.seen.append((step, micro_batch))
        if len(self.seen) == self._num_wanted:
            self.done.set()


def test_it_reads_in_order_on_one_other_thread() -> None:
    recorder = Recorder(3)
    recorder.gate.set()
    ahead = ReadAhead(recorder)
    ahead.ask([(0, 1), (0, 2)])
    ahead.ask([(1, 1)])
    assert recorder.done.wait(WAIT_S)
    assert recorder.seen == [(0, 1), (0, 2), (1, 1)]
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads


def test_what_has_waited_longest_is_forgotten() -> None:
    recorder = Recorder(1 + MAX_WAITING)
    ahead = ReadAhead(recorder)
    ahead.ask([(0, 0)])
    assert recorder.began.wait(WAIT_S)
    ahead.ask((1, number) for number in range(MAX_WAITING + 5))
    recorder.gate.set()
    assert recorder.done.wait(WAIT_S)
    assert recorder.seen == [(0, 0), *((1, number) for number in range(5, MAX_WAITING + 5))]


def test_what_found_no_room_is_tried_again_once_something_was_read() -> None:
    seen: list[tuple[int, int]] = []
    tried, done = threading.Semaphore(0), threading.Event()
    room = {(0, 0)}

    def prefetch(step: int, micro_batch: int) -> bool:
        seen.append((step, micro_batch))
        tried.release()
        if (step, micro_batch) == (1, 1):
            done.set()
        return (step, micro_batch) in room

    ahead = ReadAhead(prefetch)
    ahead.ask([(0, 0), (0, 1), (0, 2), (1, 1)])
    assert tried.acquire(timeout=WAIT_S)
    assert tried.acquire(timeout=WAIT_S)
    room |= {(0, 2), (1, 1)}
    while not done.is_set():  # it may still be about to find out that there was no room
        ahead.has_read(0, 1)
        tried.acquire(timeout=0.05)
    assert seen[:2] == [(0, 0), (0, 1)]
    assert seen[-2:] == [(0, 2), (1, 1)]


def test_an_error_is_told_and_reading_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()

    def prefetch(step: int, micro_batch: int) -> None:
        if micro_batch == 0:
            raise OSError("no such bucket")
        done.set()

    with caplog.at_level(logging.WARNING):
        ReadAhead(prefetch).ask([(7, 0), (7, 1)])
        assert done.wait(WAIT_S)
    assert "reading ahead for step 7 micro-batch 0 failed: no such bucket" in caplog.text


class Ahead(ArrayRows):
    """Counts the prefetches of its samples; `done` is set after `num_wanted`."""

    def __init__(self, num_wanted: int = 0, **tensors: torch.Tensor) -> None:
        super().__init__(**tensors)
        self.wanted: list[list[int]] = []
        self.fetched_by: set[int] = set()
        self.done = threading.Event()
        self._num_wanted = num_wanted

    def prefetch(self, indices: npt.NDArray[np.int64]) -> None:
        self.wanted.append(indices.tolist())
        if len(self.wanted) == self._num_wanted:
            self.done.set()

    def fetch(self, indices: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        self.fetched_by.add(threading.get_ident())
        return super().fetch(indices)


def test_a_worker_reads_ahead_for_its_leases_and_one_step_on(
    make_node: Callable[..., Any], tiny_task: Any
) -> None:
    task = tiny_task()
    data = Ahead(num_wanted=5, **task.dataset()._tensors)
    task.dataset = lambda: data
    node = make_node(task)
    computer = node.worker()
    leases = [node.lease(2), Lease(node.state.key, (0,)), node.lease(3)]
    computer.read_ahead(leases)
    assert data.done.wait(WAIT_S)
    expected = [(0, 0), (0, 3), (1, 2), (1, 0), (1, 3)]
    stream = computer._stream
    assert data.wanted == [stream.micro_batch(step, one, 4, 5).tolist() for step, one in expected]
    computer.compute(leases[0])
    assert data.fetched_by == {threading.get_ident()}


def test_without_prefetch_nothing_is_started(make_node: Callable[..., Any]) -> None:
    node = make_node()
    computer = node.worker()
    num_threads = threading.active_count()
    computer.read_ahead([node.lease(0), node.lease(1)])
    assert threading.active_count() == num_threads


# --- checking --------------------------------------------------------------------------------


class Checked(ArrayRows):
    """Counts its checks, which may find damage."""

    num_checks = 0

    def __init__(self, damaged: bool, **tensors: torch.Tensor) -> None:
        super().__init__(**tensors)
        self._damaged = damaged

    def check(self) -> None:
        self.num_checks += 1
        if self._damaged:
            raise DataError("a.parquet: row group 3: damaged")


def test_data_is_checked_once_and_not_by_workers(
    make_node: Callable[..., Any], tiny_task: Any
) -> None:
    task = tiny_task()
    data = Checked(False, **task.dataset()._tensors)
    held = Checked(False, **task.dataset()._tensors)
    task.dataset, task.evaluation_dataset = lambda: data, lambda: held
    node = make_node(task, evaluate={"every": 2, "micro_batches": 2})
    assert (data.num_checks, held.num_checks) == (1, 1)
    node.worker().compute(node.lease(0))
    assert (data.num_checks, held.num_checks) == (1, 1)


@pytest.mark.parametrize("name", ["dataset", "evaluation_dataset"])
def test_damage_is_found_before_anything_starts(
    name: str, make_node: Callable[..., Any], tiny_task: Any
) -> None:
    task = tiny_task()
    damaged = Checked(True, **task.dataset()._tensors)
    setattr(task, name, lambda: damaged)
    with pytest.raises(DataError, match=r"a\.parquet: row group 3: damaged"):
        make_node(task, evaluate={"every": 2, "micro_batches": 2}, held_out=10)
