"""The exporter of a node, in the process of its aggregator: a thread that answers scrapes.

What it tells was looked at by the aggregator's own loop, now and then: a scrape touches no socket
of the job, and no step waits for one. Where it cannot listen the job goes on; its events say why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from actors.links import Clock
from actors.mesh import Address, find_address
from actors.setup import JobSetup
from elastic.core.protocol.messages import Pulse
from monitoring.exporter import EVERYWHERE, Exporter, reached_at
from monitoring.node_exporter import node_registry

LOOK_S = 1.0
"""Between two looks; whoever scrapes more often reads the same."""
_FILE = "exporter"


class Tells(Protocol):
    """Appends to the events of the run."""

    def __call__(self, kind: str, reason: str) -> None: ...


class NodeExporter:
    """Of the node of `setup`. `folder`: of its store, where others find the port."""

    def __init__(
        self, setup: JobSetup, folder: Path, event: Tells, clock: Clock = time.monotonic
    ) -> None:
        self._clock, self._newest = clock, Pulse(setup.node, 0)
        self._looked_s = float("-inf")
        self._exporter: Exporter | None = None
        host, port = _listens_at(setup), setup.job.monitoring.node_port
        assert port is not None, "there is to be one"
        try:
            self._exporter = Exporter(node_registry(lambda: self._newest), host, port)
        except OSError as error:
            event("monitoring_failed", f"monitoring.node_port {port} at {host}: {error}")
            return
        partial_path = folder / f"{_FILE}.partial"
        partial_path.write_text(str(self._exporter.port))
        partial_path.rename(folder / _FILE)

    def turn(self, look: Callable[[], Pulse]) -> None:
        """Look, if it is time."""
        if self._exporter is not None and self._clock() - self._looked_s >= LOOK_S:
            self._looked_s, self._newest = self._clock(), look()

    def close(self) -> None:
        if self._exporter is not None:
            self._exporter.close()


def _listens_at(setup: JobSetup) -> str:
    """Of several hosts, where others reach this one, unless all of its addresses are wanted."""
    host = setup.job.monitoring.host
    return setup.address if setup.has_nodes and host not in EVERYWHERE else host


def exporter_address(setup: JobSetup) -> Address | None:
    """Where the exporter of the node of `setup` is scraped, once it listens."""
    host = reached_at(_listens_at(setup), setup.address)
    return find_address(setup.open_store().path, host, _FILE)
