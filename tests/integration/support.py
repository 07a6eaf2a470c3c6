"""What the tests on real processes share: jobs around small tasks, and ways to look at a run.

The tasks themselves are in `tasks`: workers and aggregators import them, and need nothing of this.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic.core.config import JobConfig, load_job
from elastic.core.faults import Fault, load_faults
from elastic.core.runs import RunFolder
from elastic.core.status import Status
from elastic.core.store import ROOT
from elastic.driver import run_job
from elastic.result import Result

HELD_OUT = 48
BATCH = {"micro_batches": 8, "micro_batch_size": 16}
TAG = f"-{os.getpid()}"
"""Ends the names of this process's jobs, which may run beside another one's."""
_DEADLINE_S = 60.0


def make_job(name: str, *, workers: int = 1, **settings: Any) -> JobConfig:
    """A job on `Tiny`: without spare and standby, which cost seconds to start, unless asked for.

    Its name is made unique on this machine.
    """
    spare = settings.pop("spare", 0)
    given = {
        "name": name + TAG,
        "task": "tests.integration.tasks:Tiny",
        "steps": 20,
        "batch": BATCH,
        "held_out": HELD_OUT,
        "evaluate": {"every": 7, "micro_batches": 3},
        "ema": {"decay": 0.9},
        "workers": {"start": workers, "max": max(4, workers), "spare": spare},
        "standby": False,
        "checkpoint": {"every": 0},
        "chunk_elements": 16384,
    }
    return load_job(given | settings)


def write_faults(path: Path, faults: Sequence[Mapping[str, Any]]) -> tuple[Fault, ...]:
    """A schedule, through the file that a user would write."""
    path.write_text(yaml.safe_dump(list(faults)))
    return load_faults(path)


@dataclass(frozen=True)
class Outcome:
    """What two runs of one job must agree on, whatever happened to their workers."""

    params_sha256: str
    samples_sha256: str
    overflows: int
    skipped_steps: tuple[int, ...]
    series: tuple[str, ...]
    """Each step's number, loss and learning rate; as text, since a NaN equals nothing."""
    evaluations: tuple[str, ...]
    """Each evaluation's step, loss and metrics."""


def outcome(result: Result) -> Outcome:
    """What must be equal."""
    assert result.path is not None
    run = RunFolder(result.path)
    return Outcome(
        params_sha256=result.params_sha256,
        samples_sha256=result.samples_sha256,
        overflows=result.metrics["overflows"],
        skipped_steps=tuple(result.metrics["skipped_steps"]),
        series=_texts(run.read_metrics(), ("step", "loss", "lr")),
        evaluations=_texts(run.read_evaluations(), ("step", "loss", "metrics")),
    )


def _texts(lines: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(" ".join(f"{key}={line[key]!r}" for key in keys) for line in lines)


def kinds(result: Result) -> list[str]:
    """The kinds of what happened, in order."""
    return [event["kind"] for event in result.events]


def check_faults_fired(result: Result, faults: Sequence[Fault]) -> None:
    """Each fault happened exactly once: in the result and in the events."""
    assert result.metrics["faults_fired"] == [fault.index for fault in faults]
    told = sorted(event["reason"] for event in result.events if event["kind"] == "fault")
    assert told == sorted(str(fault) for fault in faults)


class Once:
    """For `on_status`: calls `act` once, as soon as `step` steps are committed and an event of the
    kind `event`, if one is named, is told."""

    def __init__(self, step: int, act: Callable[[Status], None], *, event: str = "") -> None:
        self.step = step
        self._act = act
        self._event = event
        self.done = False

    def __call__(self, status: Status) -> None:
        told = not self._event or any(one["kind"] == self._event for one in status.events)
        if told and status.step >= self.step and not self.done:
            self.done = True
            self._act(status)


def leftovers() -> list[str]:
    """What jobs of this process have left: stores, what is mapped of them, and processes."""
    stores = [path.name for path in ROOT.glob(f"*{TAG}.*")]
    mapped = re.compile(f"{re.escape(str(ROOT))}/[^/]*{re.escape(TAG)}[.]")
    mapping = [f"pid {pid} maps a store" for pid in _pids() if mapped.search(_maps(pid))]
    hosts = [f"pid {pid} is a worker or aggregator" for pid in hosts_below(os.getpid())]
    return [*stores, *mapping, *hosts]


def hosts_below(parent: int) -> list[int]:
    """Workers and aggregators among the descendants of a process."""
    parents = {pid: _parent(pid) for pid in _pids()}
    below: set[int] = {parent}
    while found := {pid for pid, above in parents.items() if above in below} - below:
        below |= found
    return [pid for pid in below if _read(f"/proc/{pid}/cmdline").startswith("ray::Host")]


def hosts_of(run: RunFolder) -> list[int]:
    """Workers and aggregators below this process that belong to a running job."""
    store = str(run.read_json(run.ray_json)["store"])
    return [pid for pid in hosts_below(os.getpid()) if store in _maps(pid)]


def session(leader: int) -> list[int]:
    """The living processes that the leader of a session began, and those they began."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[3]) == leader:
                found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = _DEADLINE_S) -> Any:
    """Ask again and again until the answer is true; return it."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := condition()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"after {timeout_s:.0f} s not yet: {what}")
        time.sleep(0.02)
    return answer


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


def _maps(pid: int) -> str:
    return _read(f"/proc/{pid}/maps")


def _parent(pid: int) -> int:
    stat = _read(f"/proc/{pid}/stat")
    return int(stat.rpartition(")")[2].split()[1]) if stat else 0


__all__ = [
    "BATCH",
    "TAG",
    "Once",
    "Outcome",
    "check_faults_fired",
    "hosts_below",
    "kinds",
    "leftovers",
    "make_job",
    "outcome",
    "run_job",
    "session",
    "wait_until",
    "write_faults",
]
