"""What the processes of a job use, read from /proc: who they are, memory, processor time.

Only reads, but for `pin`. Finds a job's processes by the lock that each holds in its store.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic.core.store import ROOT

PROC = Path("/proc")
STATE_FILES = ("parameters-", "optimizer-")
"""Files of a store that hold the parameters and the optimizer's state."""

_ACTIVE_PID_OFFSET = 16  # the third word of the store's file `control`
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Proportional set size in bytes: a page shared by n processes counts 1/n in each."""

    total: int
    anonymous: int
    files: int
    shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProcesses:
    """Who belongs to a job now. Only aggregators may write to the parameters."""

    workers: dict[int, int]
    """Worker -> pid, of those that hold a slot."""
    aggregators: tuple[int, ...]
    acting: int
    """The pid of the acting aggregator, 0 if there is none."""
    others: tuple[int, ...]
    """The coordinator, and workers that are still loading."""

    @property
    def pids(self) -> tuple[int, ...]:
        return (*self.workers.values(), *self.aggregators, *self.others)


def find_store(job_name: str, root: Path = ROOT) -> Path | None:
    """The store of the job that runs under this name."""
    found = [path for path in root.glob(f"{job_name}.*.*") if (path / "alive").exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def find_processes(store: Path) -> JobProcesses:
    """Every process that holds the store's lock `alive`."""
    workers: dict[int, int] = {}
    aggregators, others = [], []
    for pid in _holders(store / "alive"):
        files = mapped_files(pid, store)
        slots = [int(name.removeprefix("slot-")) for name in files if name.startswith("slot-")]
        if any(name.startswith("parameters-") and files[name] for name in files):
            aggregators.append(pid)
        elif len(slots) == 1:
            workers[slots[0]] = pid
        else:
            others.append(pid)
    return JobProcesses(
        workers=workers,
        aggregators=tuple(aggregators),
        acting=acting_pid(store),
        others=tuple(others),
    )


def _holders(file: Path) -> Iterator[int]:
    """The processes, this one aside, that have `file` open."""
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(_is_link_to(one, file) for one in (entry / "fd").iterdir()):
                yield int(entry.name)


def _is_link_to(link: Path, file: Path) -> bool:
    try:
        return os.readlink(link) == str(file)
    except OSError:
        return False


def acting_pid(store: Path) -> int:
    """Who acts as aggregator, as the store says; 0 before anybody did."""
    try:
        with (store / "control").open("rb") as file:
            file.seek(_ACTIVE_PID_OFFSET)
            return int(struct.unpack("Q", file.read(8))[0])
    except (OSError, struct.error):
        return 0


def mapped_files(pid: int, store: Path) -> dict[str, bool]:
    """The store's files that a process maps, and whether it may write; not those unlinked."""
    try:
        lines = (PROC / str(pid) / "maps").read_text().splitlines()
    except OSError:
        return {}
    prefix = f"{store}/"
    files: dict[str, bool] = {}
    for words in (line.split(maxsplit=5) for line in lines if prefix in line):
        name = words[-1].removeprefix(prefix)
        if not name.endswith("(deleted)"):
            files[name] = files.get(name, False) or "w" in words[1]
    return files


def parse_smaps(text: str, prefix: str) -> dict[str, int]:
    """Proportional set size in bytes by the name of the mapped file below `prefix`."""
    sizes: dict[str, int] = {}
    name = ""
    for line in text.splitlines():
        words = line.split(maxsplit=5)
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = words[5] if len(words) == 6 else ""
            name = path.removeprefix(prefix) if path.startswith(prefix) else ""
        elif name and words[0] == "Pss:":
            sizes[name] = sizes.get(name, 0) + int(words[1]) * 1024
    return sizes


def store_memory(pids: Iterable[int], store: Path) -> dict[str, int]:
    """Proportional set size in bytes of each file of the store, over all processes."""
    total: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            text = (PROC / str(pid) / "smaps").read_text()
            for name, size in parse_smaps(text, f"{store}/").items():
                total[name] = total.get(name, 0) + size
    return total


def memory(pids: Iterable[int]) -> Memory:
    """Proportional set size of several processes together; one that is gone counts nothing."""
    sums = {"Pss": 0, "Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in sums:
                    sums[key] += int(value.split()[0]) * 1024
    return Memory(
        total=sums["Pss"],
        anonymous=sums["Pss_Anon"],
        files=sums["Pss_File"],
        shared=sums["Pss_Shmem"],
    )


def cpu_s(pid: int) -> float:
    """Seconds of processor that a process has used, user and system."""
    text = (PROC / str(pid) / "stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def start_s(pid: int) -> float:
    """The unix time at which a process was made, to a hundredth of a second."""
    text = (PROC / str(pid) / "stat").read_text()
    since_boot_s = int(text.rpartition(")")[2].split()[19]) / _TICKS_PER_S
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s


def command(pid: int) -> str:
    """The command line of a process, or the title that it gave itself; empty once it is gone."""
    with contextlib.suppress(OSError):
        data = (PROC / str(pid) / "cmdline").read_bytes()
        return data.replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def below(ancestor: int) -> list[int]:
    """The living descendants of a process."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    new = [ancestor]
    while new:
        new = [child for pid in new for child in children.get(pid, ())]
        found += new
    return found


def available_cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0)


def pin(pid: int, core: int) -> None:
    """Bind every thread of a process to one core; threads that it starts later follow."""
    for thread in (PROC / str(pid) / "task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})


def empty_memory(num: int, modules: Sequence[str] = ("torch",)) -> Memory:
    """What `num` processes use together that have imported `modules` and do nothing."""
    code = f"import {', '.join(modules)}; print(flush=True); input()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(num)
    ]
    try:
        for one in started:
            assert one.stdout is not None
            one.stdout.readline()
        return memory(one.pid for one in started)
    finally:
        for one in started:
            one.communicate(b"\n")
