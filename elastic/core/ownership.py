"""Who writes checkpoints into a storage: one job at a time, by a record that says who.

The record of a dead process on this machine is taken over. Two jobs that begin at the same moment
in a bucket may both believe to own it, since a bucket knows no put-if-absent: each looks again
before it writes, so that only the later one does. Never touches a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from elastic.core.errors import ConfigError, StorageError
from elastic.core.runs import identity
from elastic.core.storage import Storage

OWNER_FILE = "owner.json"
_running: set[str] = set()  # runs of this process, which outlives them in a notebook


@dataclass(frozen=True, slots=True)
class Owner:
    """A job, and the process that runs it. `started`: when, in ticks since the machine's boot."""

    run_id: str
    run: str
    host: str
    pid: int
    started: int

    @classmethod
    def here(cls, run_id: str, run: str) -> Owner:
        """This process."""
        return cls(run_id, run, **identity(os.getpid()))

    def is_dead(self) -> bool:
        """Whether it is over for sure: a process of another machine cannot be seen."""
        found = identity(self.pid)
        if self.host != found["host"]:
            return False
        if self.started != found["started"]:
            return True
        return self.pid == os.getpid() and self.run_id not in _running

    def __str__(self) -> str:
        return f"the run {self.run} (process {self.pid} on {self.host})"


@contextlib.contextmanager
def owned(storage: Storage, owner: Owner) -> Iterator[None]:
    """Own the storage for the length of the block.

    Raises:
        ConfigError: a living job does, or the storage cannot be written.
    """
    try:
        _take(storage, owner)
    except StorageError as error:
        raise ConfigError(
            f"checkpoint.storage: {storage.location} cannot be written: {error}; make the bucket"
            " or folder writable, or choose another"
        ) from error
    _running.add(owner.run_id)
    try:
        yield
    finally:
        _running.discard(owner.run_id)
        with contextlib.suppress(StorageError):  # the record of a run that is over is taken over
            if _read(storage) == owner:
                storage.delete(OWNER_FILE)


def _take(storage: Storage, owner: Owner) -> None:
    data = json.dumps(asdict(owner)).encode()
    if storage.write(OWNER_FILE, data, replace=False):
        return
    there = _read(storage)
    if there is None or there.is_dead():
        storage.write(OWNER_FILE, data, replace=True)
        there = _read(storage)
    if there != owner:
        raise ConfigError(
            f"checkpoint.storage: {storage.location} belongs to {there}; end that job or choose"
            f" another storage; if it is dead for sure, delete {OWNER_FILE} there"
        )


def check_owner(storage: Storage, run_id: str) -> None:
    """Refuse to write where another job has taken over.

    Raises:
        StorageError: another job owns the storage, or nobody can tell.
    """
    there = _read(storage)
    if there is not None and there.run_id != run_id:
        raise StorageError(f"{storage.location}: belongs to {there} now")


def _read(storage: Storage) -> Owner | None:
    """Who owns the storage; None if nobody does, or the record is unreadable."""
    data = storage.read(OWNER_FILE)
    if data is None:
        return None
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None
