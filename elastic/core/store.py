"""The folder of a job in shared memory: it outlives every process, and knows who lives and acts.

    ROOT/JOB.RUN.NODE/          a folder in /dev/shm
        alive                   every process of the job holds a shared lock on it
        active                  the acting aggregator holds an exclusive lock on it
        socket                  where the acting aggregator listens
        spec                    how to read the rest, written last by `prepare`
        journal                 records that are not in the run folder yet
        ...                     the state itself: see `elastic.core.mapped`
        model-0/, model-1/ ...  with several models: the spec and the state of each

Light to import: no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(f"/dev/shm/elastic-{os.getuid()}")  # users of one machine do not share it


class Store:
    """The folder of one job on one node, and the locks on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks: dict[str, int] = {}

    @classmethod
    def named(cls, job: str, run: str, node: str) -> Store:
        return cls(ROOT / f"{job}.{run}.{node}")

    def of_model(self, model: int) -> Store:
        """The part of one of several models, which lives and acts with the whole."""
        return Store(self.path / f"model-{model}")

    def create(self) -> None:
        while not self._locks:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed as a leftover meanwhile
                self.hold_alive()

    def hold_alive(self) -> None:
        """Mark the job as living for as long as this process lives."""
        self._lock("alive", fcntl.LOCK_SH)

    def try_act(self) -> bool:
        """Become the acting aggregator, unless another process is."""
        try:
            self._lock("active", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _lock(self, name: str, operation: int) -> None:
        if name in self._locks:
            return
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, operation)
            if not os.fstat(descriptor).st_nlink:
                raise FileNotFoundError(f"{self.path / name}: removed meanwhile")
        except BaseException:
            os.close(descriptor)
            raise
        self._locks[name] = descriptor

    def close(self) -> None:
        """Give the locks back. Mappings stay for as long as their tensors do."""
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks.clear()

    @property
    def spec_path(self) -> Path:
        return self.path / "spec"

    def worker_ids(self) -> list[int]:
        """Workers with a manifest, dead ones included, in order."""
        return sorted(int(path.name.split("-")[1]) for path in self.path.glob("manifest-*"))

    def drop_slot(self, worker: int) -> None:
        """Unlink a worker's slot: it is never read or reused, whoever still maps it."""
        for name in (f"manifest-{worker}", f"slot-{worker}"):
            (self.path / name).unlink(missing_ok=True)

    def await_end(self, timeout_s: float) -> bool:
        """Wait until no process of the job lives. False if one still does."""
        deadline_s = time.monotonic() + timeout_s
        while (self.path / "alive").exists():
            descriptor = os.open(self.path / "alive", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    return False
            finally:
                os.close(descriptor)
            time.sleep(0.05)
        return True

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def remove_leftovers(root: Path = ROOT) -> list[str]:
    """Remove the stores whose every process is gone. Never one that a living process holds."""
    removed = []
    for path in sorted(root.glob("*.*.*")) if root.exists() else []:
        try:
            descriptor = os.open(path / "alive", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if time.time() - path.stat().st_mtime < 60:
                continue  # its first process has made the folder and not yet the lock
            descriptor = -1
        try:
            if descriptor >= 0:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
        except BlockingIOError:
            continue
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return removed


def kill_and_wait(pid: int, timeout_s: float) -> bool:
    """SIGKILL a process through a pidfd and wait until it is gone. True if it is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return bool(wait([descriptor], timeout_s))
    except ProcessLookupError:
        return True
    finally:
        os.close(descriptor)
