"""Tries many schedules, on all cores, and shrinks the first that breaks an invariant.

Only runs jobs and counts: what is right is said by `invariants` and `truth`. Never random beyond
the seeds it is given: the same seeds find the same violation.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

from elastic.core.simulator.build import Build
from elastic.core.simulator.faults import Schedule, random_schedule
from elastic.core.simulator.invariants import Violation
from elastic.core.simulator.job import Job

CHUNK = 25  # seeds that a process tries before it reports
SHRINK_S = 20.0  # a schedule is made simpler for at most so long
TRACE_LENGTH = 40  # lines of the trace that are shown

Found = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """A schedule that breaks an invariant. `violation` says which, `trace` what came before."""

    schedule: Schedule
    violation: str
    trace: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The violation without its numbers: what shrinking must preserve."""
        return "".join(one for one in self.violation.split("(")[0] if not one.isdigit())

    def __str__(self) -> str:
        lines = [str(self.schedule), f"last {len(self.trace)} things that happened:"]
        lines += [f"  {line}" for line in self.trace]
        return "\n".join([*lines, f"violated: {self.violation}"])


@dataclass(slots=True)
class Tried:
    """What came of many schedules. `seen` counts transitions, refusals and fault points."""

    num_schedules: int = 0
    num_faults: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None

    def add(self, other: Tried) -> None:
        self.num_schedules += other.num_schedules
        self.num_faults += other.num_faults
        self.seen += other.seen
        self.failure = self.failure or other.failure


def check(schedule: Schedule, build: Build | None = None, *, tried: Tried | None = None) -> bool:
    """Run one schedule. False if it breaks an invariant: `tried.failure` then says how."""
    tried = tried if tried is not None else Tried()
    job = Job(schedule, build or Build(), trace_length=TRACE_LENGTH)
    try:
        job.run()
    except Exception as error:  # an assertion of the protocol that fails is a violation too
        kind = "" if isinstance(error, Violation) else f"{type(error).__name__}: "
        tried.failure = Failure(schedule, f"{kind}{error}", tuple(_lines(job)))
    tried.num_schedules += 1
    tried.num_faults += job.num_fired
    tried.seen += job.clock.seen
    return tried.failure is None


def check_seeds(seeds: Iterable[int], build: Build | None = None) -> Tried:
    """Try the random schedules of these seeds, up to the first violation."""
    tried = Tried()
    for seed in seeds:
        if not check(random_schedule(seed), build, tried=tried):
            break
    return tried


def search(
    seeds: Iterable[int],
    build: Build | None = None,
    *,
    processes: int = 1,
    deadline_s: float | None = None,
    found: Found = lambda num: None,
) -> Tried:
    """Try the schedules of `seeds` up to the first violation, which is shrunk.

    Args:
        processes: how many share the work; a caller with more than one must be importable, since
            they are spawned. The result is the same for any number.
        deadline_s: seconds after which no more are begun; `seeds` may then be endless.
        found: called with the number of schedules tried so far.
    """
    tried = Tried()
    for part in _parts(_chunks(seeds, deadline_s), build, processes):
        tried.add(part)
        found(tried.num_schedules)
        if tried.failure is not None:
            tried.failure = shrink(tried.failure, build)
            break
    return tried


def shrink(failure: Failure, build: Build | None = None) -> Failure:
    """A simpler schedule that breaks the same invariant: fewer faults, steps, workers."""
    end_s = time.monotonic() + SHRINK_S
    while time.monotonic() < end_s:
        for simpler in _simpler(failure.schedule):
            tried = Tried()
            check(simpler, build, tried=tried)
            if tried.failure is not None and tried.failure.kind == failure.kind:
                failure = tried.failure
                break
            if time.monotonic() > end_s:
                return failure
        else:
            return failure
    return failure


def _simpler(schedule: Schedule) -> Iterator[Schedule]:
    """Schedules that are a little simpler, the boldest first."""
    faults = schedule.faults
    size = 2 * len(faults)
    while size := size // 2:
        for start in range(0, len(faults), size):
            yield replace(schedule, faults=faults[:start] + faults[start + size :])
    for index, fault in enumerate(faults):
        rest = faults[:index], faults[index + 1 :]
        if fault.point is not None and fault.offset_s:
            yield replace(schedule, faults=(*rest[0], replace(fault, offset_s=0.0), *rest[1]))
    last = max((fault.step for fault in faults), default=0)
    for num_steps in {last + 1, schedule.num_steps - 1}:
        if 0 < num_steps < schedule.num_steps:
            yield replace(schedule, num_steps=num_steps)
    if schedule.num_workers > 1:
        yield replace(schedule, num_workers=schedule.num_workers - 1)
    if schedule.num_micro_batches > 1:
        yield replace(schedule, num_micro_batches=schedule.num_micro_batches - 1)
    if schedule.num_nodes > 1:
        yield replace(schedule, num_nodes=schedule.num_nodes - 1)
    if schedule.copies > 1:
        yield replace(schedule, copies=1)
    if schedule.standby:
        yield replace(schedule, standby=False)
    if schedule.evaluate_every:
        yield replace(schedule, evaluate_every=0)


def _lines(job: Job) -> Iterator[str]:
    for time_s, who, what, thing in job.clock.trace:
        yield f"{time_s:9.4f} {who:14} {what} {'' if thing is None else str(thing):.160}".rstrip()


def _chunks(seeds: Iterable[int], deadline_s: float | None) -> Iterator[list[int]]:
    end_s = time.monotonic() + deadline_s if deadline_s is not None else float("inf")
    rest = iter(seeds)
    while time.monotonic() < end_s and (chunk := list(islice(rest, CHUNK))):
        yield chunk


def _parts(chunks: Iterator[list[int]], build: Build | None, processes: int) -> Iterator[Tried]:
    """The results of the chunks, in order, worked out ahead by several processes."""
    if processes == 1:
        yield from (check_seeds(chunk, build) for chunk in chunks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        running: deque[Future[Tried]] = deque()
        try:
            while True:
                for chunk in islice(chunks, 2 * processes - len(running)):
                    running.append(pool.submit(check_seeds, chunk, build))
                if not running:
                    return
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
