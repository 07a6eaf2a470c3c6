"""Reading what will probably be needed next, on a thread beside the one that trains.

Only a hint: what is computed never depends on it, and an error of it is told again, by `fetch`, if
the data is really needed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

MAX_WAITING = 64
"""Micro-batches; of more the oldest are forgotten, since they are probably computed already."""

_NICE = 5  # gives way to what a step waits for; with more it would hold the interpreter too long


class ReadAhead:
    """Calls `prefetch(step, micro_batch)` on one thread, which starts when it is first asked.

    Where that returns False there was no room: it is tried again after `has_read`.
    """

    def __init__(self, prefetch: Callable[[int, int], bool | None]) -> None:
        self._prefetch = prefetch
        self._is_full = False
        self._wanted: deque[tuple[int, int]] = deque(maxlen=MAX_WAITING)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Want these (step, micro-batch) next, after what is wanted already. Returns at once."""
        with self._changed:
            self._wanted.extend(wanted)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
            self._thread.start()

    def has_read(self, step: int, micro_batch: int) -> None:
        """It was read by who needed it: there may be room again, and it is wanted no more."""
        with self._changed:
            if (step, micro_batch) in self._wanted:
                self._wanted.remove((step, micro_batch))
            self._is_full = False
            self._changed.notify()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _nice_above(_NICE))
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted and not self._is_full)
                step, micro_batch = self._wanted.popleft()
            try:
                if self._prefetch(step, micro_batch) is False:
                    self._try_later(step, micro_batch)
            except Exception as error:  # of the user's code, too; `fetch` raises it if it matters
                log.warning(
                    "reading ahead for step %d micro-batch %d failed: %s", step, micro_batch, error
                )

    def _try_later(self, step: int, micro_batch: int) -> None:
        with self._changed:
            self._is_full = True
            if len(self._wanted) < MAX_WAITING:
                self._wanted.appendleft((step, micro_batch))


def _nice_above(value: int) -> int:
    """Not below what this thread has: to lower it may not be allowed."""
    return max(value, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
