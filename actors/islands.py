"""A process that stands alone on what it was given: the driver of one job among several.

Ends with whoever started it, in good order: a job's driver finishes its step and writes a
checkpoint. Never looks at the job itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class Island:
    """Runs one command on this node."""

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], folder: str, log: str
    ) -> int:
        """Run `command` to its end; its exit status, negative for the signal that ended it.

        Args:
            folder: the working folder, where this node has it.
            log: a file that gets what it says.
        """
        where = folder if os.path.isdir(folder) else None
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with Path(log).open("ab") as output:
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment},
                cwd=where,
                stdout=output,
                stderr=output,
                preexec_fn=_end_with_parent,
            )
            return process.wait()


def _end_with_parent() -> None:
    """In the new process: get SIGTERM where the one that started it dies."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        os._exit(1)
