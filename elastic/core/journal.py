"""Records on their way to a disk that may stall: kept in shared memory, written by a thread.

Whoever tells something waits for memory alone. A process that is killed leaves behind what it had
not written, and its successor, which opens the same file, writes that first: each record at least
once, in order. Never knows what the records mean.

    0    where the first record begins that is not written yet    int64
    8    where the last one ends                                  int64
    16   records, a line of JSON each
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SIZE_BYTES = 4 * 2**20
"""Of the file. About a thousand steps of a job with 64 micro-batches."""

_BEGIN, _END = 0, 1
_FIRST = 16
_BEAT_S = 0.1


class Journal:
    """One process at a time has it open; its threads may all tell it something.

    Args:
        path: in shared memory; the file may be removed while it is open.
        write: writes a record down for good; called on the journal's own thread.
        beat: called again and again while `put` waits for room.
    """

    def __init__(
        self,
        path: Path,
        write: Callable[[dict[str, Any]], None],
        *,
        beat: Callable[[], None],
        size_bytes: int = SIZE_BYTES,
    ) -> None:
        self._write, self._beat, self._size = write, beat, size_bytes
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            self._map = mmap.mmap(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        self._places = memoryview(self._map)[:_FIRST].cast("q")
        if self._is_empty:
            self._begin_anew()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def _is_empty(self) -> bool:
        return self._places[_BEGIN] >= self._places[_END]  # beyond: killed while it began anew

    def put(self, record: Mapping[str, Any]) -> None:
        """Keep a record; waits only where there is no room.

        Raises:
            Whatever `write` raised, now or before.
        """
        data = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if len(data) > self._size - _FIRST:
            self.drain()
            self._write(json.loads(data))
            return
        with self._changed:
            while self._places[_END] + len(data) > self._size and self._error is None:
                self._beat()
                self._changed.wait(_BEAT_S)
            self._check()
            end = self._places[_END]
            self._map[end : end + len(data)] = data
            self._places[_END] = end + len(data)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all that was told is written.

        Raises:
            Whatever `write` raised.
        """
        with self._changed:
            while not self._is_empty and self._error is None:
                self._changed.wait()
            self._check()

    def check(self) -> None:
        """Raise what `write` raised, if it did."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write what is left, as far as it can be written, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._places.release()
        self._map.close()

    def _run(self) -> None:
        try:
            while data := self._next():
                self._write(json.loads(data))
                self._advance(len(data))
        except BaseException as error:  # kept: whoever tells or waits raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> bytes:
        """The first record that is not written. Empty: there will be none any more."""
        with self._changed:
            while self._is_empty and not self._is_closed:
                self._changed.wait()
            if self._is_empty:
                return b""
            begin = self._places[_BEGIN]
            return self._map[begin : self._map.find(b"\n", begin) + 1]

    def _advance(self, num_bytes: int) -> None:
        with self._changed:
            self._places[_BEGIN] += num_bytes
            if self._is_empty:
                self._begin_anew()
            self._changed.notify_all()

    def _begin_anew(self) -> None:
        self._places[_END] = _FIRST  # first: who is killed here leaves no record
        self._places[_BEGIN] = _FIRST
