"""A served repository in one process: the engine on a thread, versions from the folder, health.

The HTTP layer above knows no tensor of an expert, the engine below no request. Reads the clock
that it is given. Never answers without a deadline.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic.core.errors import ConfigError, ElasticError
from elastic.core.experts.repository import MANIFEST_FILE, locked
from policies.routing import Selection
from serve.engine import Engine, Job
from serve.metrics import Metrics
from serve.pool import Pool
from serve.refusals import Refusal, too_late, unavailable
from serve.rollout import Rollout
from serve.settings import Serving
from serve.version import Version, read_version
from serve.work import Work

log = logging.getLogger(__name__)

UNLOADED_FILE = "unloaded.json"
"""In the repository's folder: names of experts that an operator took out."""
_IDLE_S = 0.05
_STUCK_S = 30.0


@dataclass(frozen=True)
class Ask:
    """What a request says besides its inputs."""

    request_id: str
    timeout_s: float
    policy: Selection | None = None
    version: str | None = None
    keeps_trace: bool = False


class Service:
    """`start` it, then `run` requests, from an event loop."""

    def __init__(
        self, settings: Serving, pool: Pool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Loads the repository. Raises ElasticError where it cannot, or where no expert works."""
        self.settings, self._pool, self._clock = settings, pool, clock
        self.metrics = Metrics(f"{socket.gethostname()}-{os.getpid()}")
        self.engine = Engine(pool, settings, clock, self.metrics)
        self._polling = threading.Lock()
        self._seen = self._stamp()
        self.fault = ""
        """Why the newest manifest is not served; empty where it is."""
        first = read_version(settings.repository, settings.selection)
        self._condemn(first, pool.prepare(first))
        self.rollout = Rollout(first, settings.canary, self.metrics)
        self._read_unloaded()
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._beat_s = clock()
        self._threads = [
            threading.Thread(target=self._serve, name="engine", daemon=True),
            threading.Thread(target=self._follow, name="repository", daemon=True),
        ]
        self._probes = ThreadPoolExecutor(
            2, "probe", torch.set_num_threads, (settings.placement.threads,)
        )

    def metrics_text(self, accept: str) -> tuple[bytes, str]:
        """What a scrape reads, and its content type."""
        return self.metrics.text(accept, self.engine.patients.states(self.rollout.current))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads; what is in work is not finished."""
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=10)
        self._probes.shutdown(wait=False, cancel_futures=True)

    async def run(self, works: Sequence[Work], version: Version, ask: Ask) -> Job:
        """Answer rows. Raises Refusal; cancelling it takes the rows out of the engine."""
        begin_s = self._clock()
        job = Job(
            works, version, ask.policy or version.policy, begin_s + ask.timeout_s, ask.keeps_trace
        )
        is_good, has_ended = False, True
        self.engine.submit(job)
        self._wake.set()
        try:
            await asyncio.wait_for(asyncio.wrap_future(job.done), ask.timeout_s)
            is_good = not job.lost
        except TimeoutError:
            raise too_late(f"no answer within {ask.timeout_s:g} s") from None
        except asyncio.CancelledError:
            has_ended = False  # who left tells nothing of the version, neither good nor bad
            raise
        finally:
            self.engine.cancel(job)
            if has_ended:
                took_s = self._clock() - begin_s
                if refused := self.rollout.record(version, took_s, is_good=is_good):
                    self._later(self._put_back, refused)
        return job

    def version_for(self, ask: Ask) -> Version:
        """The version that a request pins, or its share of the canary."""
        if ask.version is not None:
            return self.rollout.find(ask.version)
        return self.rollout.choose(ask.request_id)

    def is_live(self) -> bool:
        """Whether the engine moves."""
        return self._clock() - self._beat_s < _STUCK_S and self._threads[0].is_alive()

    def is_ready(self) -> bool:
        """Whether a request would be answered now: the engine moves and an expert is alive."""
        return self.is_live() and bool(self.engine.patients.alive(self.rollout.current).any())

    def unload(self, name: str) -> None:
        """Take an expert out, in all replicas that read the folder."""
        self._change_unloaded(lambda names: names | {name})

    def load(self, name: str) -> None:
        """Let an expert answer again, and look at the folder at once."""
        self._change_unloaded(lambda names: names - {name})
        self.poll()

    def poll(self) -> None:
        """Look at the folder once; a version that does not work is refused, and the old one stays.

        A manifest is tried once, until it changes. Calls from several threads take turns, so that
        an older manifest never comes after a newer one.
        """
        with self._polling:
            self._poll()

    def try_again(self) -> None:
        """Look at the folder, also at a manifest that was refused: a file may be there now."""
        with self._polling:
            if self.fault:
                self._seen = (0, 0, 0)
            self._poll()

    def _poll(self) -> None:
        self._read_unloaded()
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            version = read_version(self.settings.repository, self.settings.selection)
            self._check(version)
        except ElasticError as error:
            self.fault = str(error)
            self.metrics.swaps.labels("refused").inc()
            log.error("a new version is refused: %s", error)
        else:
            self.fault = ""
            self.rollout.offer(version)
        versions = [*self.rollout.versions(), *self.engine.versions()]
        self._pool.keep(versions)
        self.engine.patients.keep({key for one in versions for key in one.keys})

    def _check(self, version: Version) -> None:
        wrong = self._pool.prepare(version)
        known = {key for one in self.rollout.versions() for key in one.keys}
        fresh = [
            f"{name}: {wrong[name]}"
            for name, key in zip(version.names, version.keys, strict=True)
            if name in wrong and key not in known
        ]
        if fresh:
            raise ConfigError("; ".join(fresh))

    def _condemn(self, version: Version, wrong: dict[str, str]) -> None:
        for name, fault in wrong.items():
            log.error("expert %s does not work: %s", name, fault)
        if len(wrong) == len(version.names):
            raise ConfigError("no expert works: " + "; ".join(map(": ".join, wrong.items())))
        self.engine.patients.condemn(version, wrong)

    def _serve(self) -> None:
        torch.set_num_threads(self.settings.placement.threads)  # holds for one thread
        while not self._stopping.is_set():
            self._beat_s = self._clock()
            if not self.engine.tick():
                self._wake.wait(_IDLE_S)
                self._wake.clear()
            self._probe()

    def _probe(self) -> None:
        for version in self.rollout.versions():
            for k in self.engine.patients.to_probe(version):
                self._later(self._try_again, version, k)

    def _later(self, task: Callable[..., None], *given: Any) -> None:
        """Do it on a thread. Once we stop there is none: a request that ends then is answered
        all the same."""
        try:
            self._probes.submit(task, *given)
        except RuntimeError:
            if not self._stopping.is_set():
                raise
            log.info("%s is left undone: the service stops", task.__name__)

    def _try_again(self, version: Version, k: int) -> None:
        begin_s = self._clock()
        limit_s = self.settings.failing.expert_timeout_s
        try:
            answer = self._pool.ask(version, {k: version.example()}, limit_s)[k]
        except Exception as error:  # it must not stay half open for ever
            answer = error
        self.engine.patients.examine(version, k, answer, 1, self._clock() - begin_s)

    def _put_back(self, refused: Version) -> None:
        """Have the folder name the version before, too: it is what other replicas go by, and those
        that start later begin with."""
        before = self.rollout.current
        try:
            if before.repository.put_back(refused.manifest):
                log.warning("the folder names version %s again", before.identity)
        except (OSError, ElasticError) as error:
            log.error(
                "the folder still names %s, which was taken back: %s", refused.identity, error
            )

    def _follow(self) -> None:
        while not self._stopping.wait(self.settings.poll_s):
            try:
                self.poll()
            except Exception:
                log.exception("cannot look at %s", self.settings.repository)

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = (self.settings.repository / MANIFEST_FILE).stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    def _read_unloaded(self) -> None:
        path = self.settings.repository / UNLOADED_FILE
        try:
            names = json.loads(path.read_text())
            if not isinstance(names, list):
                raise ValueError("needs a list of names")
        except FileNotFoundError:
            names = []
        except (OSError, ValueError) as error:
            log.error("%s: cannot be read: %s", path, error)
            return
        self.engine.patients.unloaded = frozenset(map(str, names))

    def _change_unloaded(self, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """Change what the folder holds now: another replica may have changed it, too."""
        path: Path = self.settings.repository / UNLOADED_FILE
        try:
            with locked(self.settings.repository):
                self._read_unloaded()
                names = change(self.engine.patients.unloaded)
                draft = path.with_suffix(f".{os.getpid()}.tmp")
                draft.write_text(json.dumps(sorted(names)))
                draft.replace(path)
        except OSError as error:
            raise unavailable(f"{path}: cannot be written: {error.strerror}") from error
        self.engine.patients.unloaded = names


__all__ = ["UNLOADED_FILE", "Ask", "Refusal", "Service"]
