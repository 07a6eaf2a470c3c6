"""Ctrl-C: the first one asks a job to end in good order, the second one ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from enum import Enum, auto
from types import FrameType


class _Phase(Enum):
    """What a signal means."""

    NOTHING_RUNS = auto()  # quit
    RUNS = auto()  # end in good order
    ENDS = auto()  # quit
    TIDIES_UP = auto()  # nothing: it takes no time, and half of it would stay undone


class Interrupts:
    """SIGINT, and SIGTERM as `ray job stop` sends it, around one job."""

    def __init__(self) -> None:
        self._phase = _Phase.NOTHING_RUNS
        self.asked = False
        """Whether the job should end in good order."""

    def job_runs(self) -> None:
        """There is something to end in good order now."""
        self._phase = _Phase.RUNS

    def tidy_up(self) -> None:
        """The job is over."""
        self._phase = _Phase.TIDIES_UP

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._phase is _Phase.RUNS:
            self.asked, self._phase = True, _Phase.ENDS
        elif self._phase is not _Phase.TIDIES_UP:
            self._phase = _Phase.TIDIES_UP
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take signals until the end of the block; as before afterwards.

        Only the main thread gets any: a job that another one runs is ended by `elastic stop`.
        """
        self._phase = _Phase.NOTHING_RUNS
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.take) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
