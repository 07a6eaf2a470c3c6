"""Runs one scenario on one system, and keeps what happened in one JSON.

Starts the system again where a fault has ended it, so that the next phase has one to strike.
Computes no figure; `measures` does that from the JSON.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.jobs import say
from benchmarks.peers.faults import Injection, send
from benchmarks.peers.records import Step
from benchmarks.peers.scenarios import Phase, Scenario
from benchmarks.peers.systems import System

WARM_STEPS = 5
START_LIMIT_S = 300.0
COMPLETE_LIMIT_S = 30.0
"""After so long with all workers the run begins, though something is not there that was started."""

POLL_S = 0.5
AGAIN_STEPS = 3
"""New steps with all workers after a fault that count as having recovered."""

RECENT_LINES = 200
"""Lines of a log that hold the newest step for sure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One phase that has ended, as it was seen."""

    name: str
    begun_s: float
    """Unix time of the fault."""
    ended_s: float
    launch: int
    """Which start of the system it struck; steps of another have nothing to do with it."""
    survived: bool
    """Whether the system still ran at the end; where a phase waits for that, with all workers."""
    possible: bool = True
    """False: the system has no such thing, or no way to do it."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A scenario on a system, over all starts of the system that it took."""

    system: str
    scenario: str
    repeat: int
    config: dict[str, Any]
    phases: list[Seen] = field(default_factory=list)
    launches: list[list[Step]] = field(default_factory=list)
    """The steps of each start of the system."""
    start_s: list[float] = field(default_factory=list)
    """How long each start took until all workers took steps, some of them."""
    memory: dict[str, int] = field(default_factory=dict)
    """Proportional set size in bytes of all its processes, after the calm phase."""

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_run(file: Path) -> Run:
    """What `Run.write` wrote."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["phases"] = [Seen(**one) for one in fields["phases"]]
    fields["launches"] = [
        [Step(**{**one, "samples": tuple(one["samples"])}) for one in steps]
        for steps in fields["launches"]
    ]
    return Run(**fields)


class NotStartedError(RuntimeError):
    """A system did not come to train."""


class Driver:
    """One scenario on one system."""

    def __init__(self, run: Run, scenario: Scenario, make: Callable[[int], System]) -> None:
        self.run, self._scenario, self._make = run, scenario, make
        self._system: System | None = None
        self._wanted = 0
        """Workers that it has when it is whole."""

    def drive(self) -> Run:
        """Do all phases. The system is ended whatever happens."""
        try:
            for phase in self._scenario.phases:
                self._do(phase, self._running())
        finally:
            self._end()
        return self.run

    def _running(self) -> System:
        """The system, settled; started where none runs."""
        if self._system is None:
            begun_s = time.monotonic()
            self._system = self._make(len(self.run.launches))
            self._wanted = self._system.settings.num_workers
            self.run.launches.append([])
            self._system.start()
            self.run.start_s.append(self._settle(self._system) - begun_s)
        return self._system

    def _settle(self, system: System) -> float:
        """Wait until all its workers take steps, which is the time returned, and all else that it
        starts is there."""
        deadline_s, seen, full_s = time.monotonic() + START_LIMIT_S, 0, 0.0
        while time.monotonic() < deadline_s and system.is_alive:
            time.sleep(POLL_S)
            seen = _num_full(system)
            if seen >= WARM_STEPS:
                full_s = full_s or time.monotonic()
                if system.is_complete or time.monotonic() > full_s + COMPLETE_LIMIT_S:
                    return full_s
        raise NotStartedError(
            f"{self.run.system}: not settled after {START_LIMIT_S:.0f} s, {seen} steps with all"
            f" workers; its output is in {system.settings.path}"
        )

    def _do(self, phase: Phase, system: System) -> None:
        begun_s = time.time()
        possible, injection = True, None
        if phase.fault == "join":
            possible = system.join()
            self._wanted += possible
        elif phase.fault in ("controller", "aggregator"):
            possible = _kill(getattr(system, phase.fault)())
        elif not isinstance(phase.fault, str | None):
            injection = Injection(phase.fault, system.workers)
            begun_s = injection.begun_s
        survived = not possible or self._wait(phase, system, begun_s)
        if injection is not None:
            injection.finish()
        if phase.fault is None:
            self.run.memory = asdict(processes.memory(system.pids()))
        seen = Seen(
            name=phase.name,
            begun_s=begun_s,
            ended_s=time.time(),
            launch=len(self.run.launches) - 1,
            survived=survived,
            possible=possible,
        )
        self.run.phases.append(seen)
        say(f"  {phase.name}: {seen.ended_s - begun_s:.1f} s{'' if survived else ', it ended'}")
        if not survived:
            self._end()

    def _wait(self, phase: Phase, system: System, begun_s: float) -> bool:
        """Until the phase is over. Whether the system has survived it."""
        limit_s = phase.limit_s or phase.lasts_s
        before = [one.step for one in system.steps(last=RECENT_LINES) if one.time_s <= begun_s]
        newest = max(before, default=-1)
        while system.is_alive:
            past_s = time.time() - begun_s
            if past_s >= phase.lasts_s and (
                phase.limit_s is None or _is_whole(system, newest, self._wanted)
            ):
                return True
            if past_s >= limit_s:
                return False
            time.sleep(min(POLL_S, max(0.01, phase.lasts_s - past_s)))
        return False

    def _end(self) -> None:
        if self._system is not None:
            system, self._system = self._system, None
            system.end()
            self.run.launches[-1] = system.steps()


def _num_full(system: System) -> int:
    """How many of the last steps were taken by all workers."""
    wanted = system.settings.num_workers
    last = system.steps(last=4 * WARM_STEPS * wanted)
    return sum(one.num_workers >= wanted for one in last)


def _is_whole(system: System, newest: int, wanted: int) -> bool:
    """Whether it has taken steps with all workers again, and is beyond where it was before."""
    last = system.steps(last=4 * AGAIN_STEPS * wanted)
    full = [one for one in last if one.step > newest and one.num_workers >= wanted]
    return len(full) > AGAIN_STEPS and len(system.workers()) >= wanted


def _kill(pid: int | None) -> bool:
    return pid is not None and send(pid, signal.SIGKILL)
