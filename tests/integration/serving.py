"""`elastic serve` as a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.documents import ROOT
from tests.integration.support import session, wait_until

BODY = {"inputs": [{"name": "seed", "datatype": "INT64", "shape": [1], "data": [5]}]}


@dataclass(frozen=True)
class Command:
    """A running `elastic serve`, with a Ray cluster of its own."""

    url: str
    leader: int

    def infer(self, **parameters: int) -> httpx.Response:
        body = {**BODY, "parameters": parameters}
        return httpx.post(self.url + "/v2/models/tiny/infer", json=body, timeout=60)

    def status(self) -> dict[str, object]:
        answer = httpx.get(self.url + "/status", timeout=30)
        assert answer.status_code == 200, answer.text
        found: dict[str, object] = answer.json()
        return found

    def replicas(self, application: str) -> list[int]:
        """Processes of an application's replicas."""
        name = f"ray::ServeReplica:{application}:".encode()
        found = []
        for pid in session(self.leader):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(name):
                    found.append(pid)
        return found


@contextlib.contextmanager
def elastic_serve(path: Path, log: Path, *overrides: str) -> Iterator[Command]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: one for name, one in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "elastic", "serve", str(path), f"port={port}", *overrides]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=path.parent,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    running = Command(f"http://127.0.0.1:{port}", process.pid)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            ready = httpx.get(running.url + "/v2/health/ready", timeout=10)
            return ready.status_code == 200 and "answers at" in log.read_text()
        return False

    try:
        wait_until(answers, "it answers", timeout_s=150)
        yield running
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()
        wait_until(lambda: not session(process.pid), "its processes have ended", timeout_s=30)
    finally:
        for pid in (process.pid, *session(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
