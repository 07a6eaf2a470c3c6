"""Carries out the faults of a schedule, each exactly once, in the process that reaches its point.

A file per fault in the store says that it was fired, so that a successor does not fire it again.
Does nothing, at the cost of an empty loop, in a job without faults.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from elastic.core.faults import ANY_WORKER, Fault, read_trace
from elastic.core.permutation import derive_key

_NAP_S = 0.02
_LOOK_S = 0.002  # a sleeping worker looks so often whether its step runs


def sleep_while(runs: Callable[[], bool], seconds: float) -> None:
    """Sleep so long, or until something has ended."""
    end_s = time.monotonic() + seconds
    while (rest_s := end_s - time.monotonic()) > 0 and runs():
        time.sleep(min(rest_s, _LOOK_S))


class Injector:
    """The faults of one job, seen from one process."""

    def __init__(self, faults: Sequence[Fault], folder: Path) -> None:
        self._faults = faults
        self._folder = folder / "faults"
        if faults:
            self._folder.mkdir(exist_ok=True)

    def fired(self) -> set[int]:
        """Which faults have happened."""
        return {int(path.name) for path in self._folder.glob("*")} if self._faults else set()

    def _claim(self, fault: Fault, *, pid: int = 0) -> bool:
        """True for the one process that may fire it."""
        stops = fault.do in ("stop", "stop_aggregator")
        resume_s = time.time() + fault.for_s if stops and fault.for_s else None
        try:
            with (self._folder / str(fault.index)).open("x") as file:
                json.dump({"pid": pid, "resume_s": resume_s}, file)
        except FileExistsError:
            return False
        return True


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it died or was replaced meanwhile
        os.kill(pid, number)


class AggregatorInjector(Injector):
    """Faults at points of the step; also wakes stopped workers when their time is over."""

    def at(
        self,
        point: str,
        step: int,
        pids: Mapping[int, int],
        *,
        coordinator_pid: int | None,
        scale: Callable[[int, int | None], bool],
        note: Callable[[Fault], None],
    ) -> None:
        """Fire what is due at `point`. A fault whose target is not there yet stays due."""
        for fault in self._faults:
            if fault.happens_in_worker or fault.point != point or step < fault.step:
                continue
            if fault.index not in self.fired():
                self._fire(fault, pids, coordinator_pid, scale, note)

    def _fire(
        self,
        fault: Fault,
        pids: Mapping[int, int],
        coordinator_pid: int | None,
        scale: Callable[[int, int | None], bool],
        note: Callable[[Fault], None],
    ) -> None:
        worker = fault.target if isinstance(fault.target, int) else None
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "resume": signal.SIGCONT}
        if fault.do in signals:
            if fault.target == ANY_WORKER:
                worker = min(pids, default=None)
            pid = pids.get(worker) if worker is not None else None
            if pid is not None and self._claim(fault, pid=pid):
                note(fault)
                _send(pid, signals[fault.do])
        elif fault.do in ("kill_aggregator", "stop_aggregator"):
            if self._claim(fault, pid=os.getpid()):
                note(fault)
                name = signal.SIGKILL if fault.do == "kill_aggregator" else signal.SIGSTOP
                os.kill(os.getpid(), name)
        elif fault.do == "kill_coordinator":
            if coordinator_pid is not None and self._claim(fault, pid=coordinator_pid):
                note(fault)
                _send(coordinator_pid, signal.SIGKILL)
        elif fault.do in ("add_worker", "remove_worker"):
            delta = 1 if fault.do == "add_worker" else -1
            if coordinator_pid is not None and scale(delta, worker) and self._claim(fault):
                note(fault)

    def wake(self) -> None:
        """Resume the processes whose stop is over."""
        for path in self._folder.glob("*") if self._faults else ():
            try:
                entry = json.loads(path.read_text())
            except ValueError:
                continue  # being written by another process
            if entry["resume_s"] is not None and time.time() >= entry["resume_s"]:
                _send(entry["pid"], signal.SIGCONT)
                path.write_text(json.dumps({**entry, "resume_s": None}))


class WorkerInjector(Injector):
    """Faults that a worker does to itself: death at a point, slowness, a NaN."""

    def __init__(
        self,
        faults: Sequence[Fault],
        folder: Path,
        worker: int,
        seed: int,
        note: Callable[[Fault, int], None] = lambda fault, step: None,
    ) -> None:
        super().__init__(faults, folder)
        self._note = note
        self._worker = worker
        self._seed = seed
        self._mine = [
            fault
            for fault in faults
            if fault.happens_in_worker and fault.target in (None, "any", worker)
        ]
        self._traces = {
            fault.index: read_trace(fault.trace) for fault in self._mine if fault.trace is not None
        }
        self._dice = {
            fault.index: random.Random(derive_key("flip", seed, fault.index, worker))
            for fault in self._mine
        }
        self._slept: tuple[int, int] = (0, -1)
        self._slow_since_s: dict[int, float] = {}

    def at(self, point: str, step: int) -> None:
        """Die or stop here, if that is due."""
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
        for fault in self._mine:
            due = fault.do in signals and fault.point == point and step >= fault.step
            if due and self._happens(fault, step, pid=os.getpid()):
                os.kill(os.getpid(), signals[fault.do])

    def sleep(
        self,
        step: int,
        members: Callable[[], Sequence[int]],
        runs: Callable[[], bool] = lambda: True,
        *,
        round_: int = 0,
    ) -> None:
        """Sleep once in a step, as the schedule wants; no longer than the pass `runs`.

        Where models are trained in rounds, once in a round, which works on several steps. Slow work
        is given up in the middle, too, once nobody waits for it.
        """
        now = (round_, 0) if round_ else (0, step)
        if now == self._slept:
            return
        self._slept = now
        seconds = sum(self._sleep_s(fault, step, members) for fault in self._mine)
        if seconds > 0:
            sleep_while(runs, seconds)

    def _sleep_s(self, fault: Fault, step: int, members: Callable[[], Sequence[int]]) -> float:
        if fault.index in self._traces and step >= fault.step:
            trace = self._traces[fault.index]
            self._happens(fault, step)
            row, column = step % trace.shape[0], self._worker % trace.shape[1]
            return float(trace[row, column]) * fault.scale
        if fault.sleep_s is None or not self._slow_now(fault, step):
            return 0.0
        dice = random.Random(derive_key("slow", self._seed, fault.index, step))
        if dice.random() >= fault.probability:
            return 0.0
        if fault.target == "any" and dice.choice(list(members()) or [-1]) != self._worker:
            return 0.0
        self._happens(fault, step)
        return fault.sleep_s

    def slowness(self, step: int) -> float:
        """How many times as long this worker takes now for what it computes."""
        slow = [one for one in self._mine if one.factor is not None and self._slow_now(one, step)]
        for fault in slow:
            self._happens(fault, step)
        return math.prod(one.factor or 1.0 for one in slow)

    def stretch(self, step: int, elapsed_s: float, progress: memoryview) -> float:
        """Make a computation that took `elapsed_s` take `factor` times as long; by how much.

        It is slow, and does not hang: its counter moves.
        """
        late_s = 0.0
        for fault in self._mine:
            if fault.factor is not None and self._slow_now(fault, step):
                self._happens(fault, step)
                late_s += elapsed_s * (fault.factor - 1)
        for _ in range(math.ceil(late_s / _NAP_S)):
            time.sleep(late_s / math.ceil(late_s / _NAP_S))
            progress[0] += 1
        return late_s

    def flips(self, step: int) -> bool:
        """Whether a bit of this gradient shall be another, in a share of all micro-batches."""
        due = [fault for fault in self._mine if fault.do == "flip_bit" and step >= fault.step]
        flipping = [one for one in due if self._dice[one.index].random() < one.probability]
        for fault in flipping:
            self._happens(fault, step)
        return bool(flipping)

    def poisons(self, step: int) -> bool:
        """Whether this gradient shall be NaN."""
        return any(
            fault.do == "nan_gradient" and step >= fault.step and self._happens(fault, step)
            for fault in self._mine
        )

    def _happens(self, fault: Fault, step: int, *, pid: int = 0) -> bool:
        """Claim it, and say so once."""
        claimed = self._claim(fault, pid=pid)
        if claimed:
            self._note(fault, step)
        return claimed

    def _slow_now(self, fault: Fault, step: int) -> bool:
        if fault.do != "slow" or step < fault.step:
            return False
        since_s = self._slow_since_s.setdefault(fault.index, time.monotonic())
        return fault.for_s is None or time.monotonic() - since_s < fault.for_s
