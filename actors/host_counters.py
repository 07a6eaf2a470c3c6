"""What the operating system of this host counts: processors taken away, tasks that stand still.

Linux only counts up; shares of time are for whoever compares. What a kernel does not count is 0.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from elastic.core.protocol.messages import HostCount

READ_S = 0.5
_TOTAL = re.compile(r"^some .*\btotal=(\d+)", re.MULTILINE)
_KILLS = re.compile(r"^oom_kill (\d+)", re.MULTILINE)
_STEAL = 8  # its column in the first line of /proc/stat, the name being column 0


class HostCounters:
    """Of one host, read no more often than every `READ_S`.

    Args:
        proc: where the kernel tells of them.
    """

    def __init__(
        self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._proc, self._clock = proc, clock
        self._ticks_per_s = os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        self._newest: HostCount | None = None

    def read(self) -> HostCount:
        """As of now, or of a moment ago."""
        now_s = self._clock()
        if self._newest is None or now_s - self._newest.at_s >= READ_S:
            self._newest = HostCount(
                at_s=now_s,
                steal_s=self._steal_s(),
                memory_s=self._stalled_s("memory"),
                disk_s=self._stalled_s("io"),
                kills=int(self._number(_KILLS, "vmstat")),
            )
        return self._newest

    def _steal_s(self) -> float:
        """Seconds, of all processors together."""
        columns = self._text("stat").partition("\n")[0].split()
        return float(columns[_STEAL]) / self._ticks_per_s if len(columns) > _STEAL else 0.0

    def _stalled_s(self, what: str) -> float:
        """Seconds in which some task stood still; see Documentation/accounting/psi.rst of Linux."""
        return self._number(_TOTAL, f"pressure/{what}") / 1e6

    def _number(self, pattern: re.Pattern[str], name: str) -> float:
        found = pattern.search(self._text(name))
        return float(found[1]) if found else 0.0

    def _text(self, name: str) -> str:
        try:
            return (self._proc / name).read_text()
        except OSError:  # this kernel, or this container, does not tell
            return ""
