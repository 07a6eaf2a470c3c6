"""A folder in which the commands of the documents can be typed, as in the root of a checkout."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.documents import ROOT
from tests.integration.support import session

_PROGRAMS = {"elastic": "-m elastic", "python": ""}
_ACTIVATE = 'PATH="$PWD/.venv/bin:$PATH"\n'


@dataclass(frozen=True)
class Checkout:
    """Where a user would be after the quick start: the examples and `.venv` are there."""

    folder: Path
    environment: Mapping[str, str]

    def run(self, command: str, *, timeout_s: float = 100.0) -> str:
        """Type a command and wait for its end; what it printed."""
        done = subprocess.run(
            _bash(command),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    @contextlib.contextmanager
    def started(self, command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Type a command that goes on; it is ended with all it began."""
        with self.log.open("w") as file:
            process = subprocess.Popen(
                _bash(f"exec {command}"),
                cwd=self.folder,
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            for pid in session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    @property
    def log(self) -> Path:
        """What the newest command that goes on has printed."""
        return self.folder / "log"


def _bash(command: str) -> list[str]:
    return ["bash", "-ec", f"source .venv/bin/activate\n{command}"]


def make_checkout(folder: Path, **variables: str) -> Checkout:
    """A folder with links into this checkout, and commands that run this Python."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in _PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(_ACTIVATE)
    for name in ("examples", "monitoring", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return Checkout(folder, {**os.environ, "PYTHONPATH": str(ROOT), **variables})
