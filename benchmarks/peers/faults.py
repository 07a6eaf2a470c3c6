"""Faults, the same for all systems: signals to processes, at the same times. Knows no system.

A worker is named by its number; who that is, is looked up when the fault happens.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Workers = Callable[[], Mapping[int, int]]
"""Worker -> pid of those that live now."""

PERIOD_S = 0.1
"""A slow worker runs for its share of this, then is frozen for the rest."""


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL to some workers, at once."""

    workers: tuple[int, ...]

    def __call__(self, workers: Workers, end: threading.Event) -> None:
        alive = workers()
        for one in self.workers:
            send(alive[one], signal.SIGKILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """SIGSTOP to a worker, SIGCONT later, if it is still there."""

    worker: int
    for_s: float

    def __call__(self, workers: Workers, end: threading.Event) -> None:
        with frozen(workers()[self.worker]):
            end.wait(self.for_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """A worker that runs only this share of the time."""

    worker: int
    share: float

    def __call__(self, workers: Workers, end: threading.Event) -> None:
        pid = workers()[self.worker]
        while not end.wait(self.share * PERIOD_S):
            with frozen(pid):
                end.wait((1 - self.share) * PERIOD_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowAtRandom:
    """In each slot of time, with this probability, a random worker is frozen for the slot."""

    probability: float
    slot_s: float
    seed: int = 0

    def __call__(self, workers: Workers, end: threading.Event) -> None:
        dice, number = random.Random(self.seed), 0
        alive = sorted(workers().items())  # once: looking for them costs time that others need
        begin_s = time.monotonic()
        while not end.is_set():
            number += 1
            strikes, whom = dice.random() < self.probability, dice.random()
            left_s = begin_s + number * self.slot_s - time.monotonic()
            if strikes:
                with frozen(alive[int(whom * len(alive))][1]):
                    end.wait(max(0.0, left_s))
            else:
                end.wait(max(0.0, left_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class KillEvery:
    """SIGKILL to one worker after the other, each after another pause; to the last one where the
    one whose turn it is has not come back."""

    pause_s: float

    def __call__(self, workers: Workers, end: threading.Event) -> None:
        for turn in itertools.count():
            alive = workers()
            if alive:
                send(alive.get(1 + turn % 3, alive[max(alive)]), signal.SIGKILL)
            if end.wait(self.pause_s):
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """SIGTERM to a worker, as a machine that is taken away tells; SIGKILL when the time is up."""

    worker: int
    grace_s: float

    def __call__(self, workers: Workers, end: threading.Event) -> None:
        pid = workers()[self.worker]
        send(pid, signal.SIGTERM)
        end.wait(self.grace_s)
        send(pid, signal.SIGKILL)


Fault = Kill | Stop | Slow | SlowAtRandom | KillEvery | Notice


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that stands still until the end of the block; thawed whatever happens."""
    send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        send(pid, signal.SIGCONT)


class Injection:
    """A fault that happens in a thread of its own. An error of it is raised by `finish`."""

    def __init__(self, fault: Fault, workers: Workers) -> None:
        self._fault, self._workers = fault, workers
        self._end = threading.Event()
        self._error: BaseException | None = None
        self.begun_s = time.time()
        self._thread = threading.Thread(target=self._happen, name=f"{fault}", daemon=True)
        self._thread.start()

    def _happen(self) -> None:
        try:
            self._fault(self._workers, self._end)
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        """Whether it does nothing more by itself."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """End it, and wait until it is undone."""
        self._end.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
