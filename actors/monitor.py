"""Reads what a job records, beside it, and tells Prometheus: a thread of the coordinator.

Nothing that a step waits for happens here. Where it fails, the job goes on and its events say why.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.setup import JobSetup
from elastic.core.runs import Lines
from monitoring.tally import Now, Tally

if TYPE_CHECKING:
    from collections.abc import Mapping

    from monitoring.exporter import Exporter, Values

log = logging.getLogger(__name__)

_TURN_S = 0.25
_EVERYWHERE = ("0.0.0.0", "::")


class Monitor:
    """Of one job.

    Args:
        now: says how the job stands; called from the threads of this and of scrapes.
        event: appends to the events of the run.
    """

    def __init__(
        self, setup: JobSetup, now: Callable[[], Now], event: Callable[[str, str], None]
    ) -> None:
        self._setup, self._now, self._event = setup, now, event
        run = setup.run
        self._steps = Lines(run.metrics_jsonl)
        self._events = Lines(run.events_jsonl)
        self._evaluations = Lines(run.evaluations_jsonl)
        self._tally = Tally(setup.job.model_dump(mode="json"))
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Listen no more; whoever asks this does not wait for it."""
        self._ended.set()

    def _loop(self) -> None:
        try:
            exporter = self._listen()
            try:
                while not self._ended.wait(_TURN_S):
                    self._read()
            finally:
                self._setup.run.prometheus_json.unlink(missing_ok=True)
                if exporter is not None:
                    exporter.close()
        except Exception as error:  # told; the job has no need of it
            log.exception("the monitor failed")
            self._event("monitoring_failed", f"{type(error).__name__}: {error}")

    def _listen(self) -> Exporter | None:
        """Answer scrapes from now on, and write down where."""
        from monitoring.exporter import Exporter, discovery, registry_of  # behind the job's start

        job, run = self._setup.job, self._setup.run
        if job.monitoring.port is None:
            return None
        host, port = job.monitoring.host, job.monitoring.port
        try:
            exporter = Exporter(registry_of(self._values), host, port)
        except OSError as error:
            self._event("monitoring_failed", f"monitoring.port {port} at {host}: {error}")
            return None
        reached = host
        if host in _EVERYWHERE:
            reached = self._setup.address or socket.gethostname()
        target = f"[{reached}]:{exporter.port}" if ":" in reached else f"{reached}:{exporter.port}"
        run.write_json(run.prometheus_json, discovery(target, job=job.name, run=run.path.name))
        return exporter

    def _values(self) -> Mapping[str, Values]:
        """What a scrape reads, as of now."""
        from monitoring.exporter import values_of

        now = self._now()
        with self._lock:
            return values_of(self._read_more(), now)

    def _read(self) -> None:
        with self._lock:
            self._read_more()

    def _read_more(self) -> Tally:
        """Take in what was written since. What a line tells of was written before it: so files are
        read in the opposite order."""
        evaluations, events = self._evaluations.read(), self._events.read()
        self._tally.take(steps=self._steps.read(), events=events, evaluations=evaluations)
        return self._tally
