"""Where the time of a job goes: the goodput account, kept step by step while the job runs.

Its parts add up to the wall time from the first event to the newest commit. Every second is shared
out over the workers that belong to the job in it. Fed with the lines of a run folder, in the order
of their time; reads nothing itself.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

PARTS: Mapping[str, str] = {
    "productive": "computing what counted, adding it up, updating",
    "recomputed": "computing what did not count: duplicates, redone and lost steps",
    "waiting": "done with the step, while others computed",
    "coordination": "between micro-batches: asking, leases, grants",
    "recovery": "after a fault, until work went on",
    "checkpoint": "steps that waited for a checkpoint",
    "evaluation": "measuring the model",
    "start-up": "until the first micro-batch, and after each resuming",
    "other": "nothing above",
}

TROUBLE = frozenset(
    {
        *("fault", "no_workers", "overflow", "nonfinite", "step_skipped", "uncoded"),
        *("worker_lost", "worker_hung", "worker_lied", "worker_given_up", "coordinator_restarted"),
        *("aggregator_lost", "aggregator_hung", "aggregator_took_over"),
    }
)
"""Kinds of events that are faults, or come of one."""

_OF_JOB = frozenset({"job_resumed", "job_stopped", "job_failed", "preempted"})
BEGINS = frozenset({"job_started", "job_resumed"})
"""Kinds of events after which numbers of workers and nodes mean others."""
GONE = frozenset({"worker_left", "worker_lost"})
"""Kinds of events after which their worker belongs to the job no more."""

_USUAL = 1.5
"""A gap up to that many times the median one belongs to the step."""
_NUM_GAPS = 100


class Done(NamedTuple):
    """A micro-batch that a worker has computed; `granted`: it was the first, and counts."""

    worker: int
    start_s: float
    end_s: float
    granted: bool


class Life(NamedTuple):
    """When a worker belonged to the job."""

    worker: int
    since_s: float
    until_s: float


class Usual(NamedTuple):
    """Median gaps: from the last commit to the first micro-batch, from the last one to the
    commit."""

    first_s: float
    last_s: float


def done_of(line: Mapping[str, Any]) -> list[Done]:
    """The work of a line of metrics.jsonl or evaluations.jsonl."""
    return [
        Done(int(worker), float(start_s), float(end_s), outcome == "granted")
        for worker, _, start_s, end_s, outcome in line.get("work", ())
    ]


def share_out(
    seconds: dict[str, float],
    between_s: tuple[float, float],
    work: Sequence[Done],
    *,
    lives: Iterable[Life],
    usual: Usual,
    cause: str,
) -> None:
    """Add one step to the account: the pause before, what each worker did, the update.

    Args:
        cause: the part that an unusual pause is put down to.
    """
    begin_s, end_s = between_s
    if not work:
        seconds[cause] += end_s - begin_s
        return
    first_s = min(max(min(one.start_s for one in work), begin_s), end_s)
    last_s = min(max(max(one.end_s for one in work), first_s), end_s)
    for gap_s, limit_s, part in (
        (first_s - begin_s, _USUAL * usual.first_s, "coordination"),
        (end_s - last_s, _USUAL * usual.last_s, "productive"),
    ):
        seconds[part] += min(gap_s, limit_s)
        seconds[cause] += max(0.0, gap_s - limit_s)
    members = {
        one.worker: (max(first_s, one.since_s), min(last_s, one.until_s))
        for one in lives
        if one.since_s < last_s and one.until_s > first_s
    }
    alive_s = sum(until_s - since_s for since_s, until_s in members.values())
    if alive_s <= 0:
        seconds["productive"] += last_s - first_s
        return
    scale = (last_s - first_s) / alive_s
    rows = {worker: list(own) for worker, own in groupby(sorted(work), lambda one: one.worker)}
    for worker, (since_s, until_s) in members.items():
        _add_worker(seconds, rows.get(worker, ()), since_s, until_s, scale)


def _add_worker(
    seconds: dict[str, float], rows: Sequence[Done], since_s: float, until_s: float, scale: float
) -> None:
    """What a worker did between two times; the parts add up."""
    if not rows:  # it held nothing, or hung with it
        seconds["recovery"] += scale * (until_s - since_s)
        return
    at_s = since_s
    for one in rows:
        start_s = min(max(one.start_s, at_s), until_s)
        end_s = min(max(one.end_s, start_s), until_s)
        seconds["coordination"] += scale * (start_s - at_s)
        seconds["productive" if one.granted else "recomputed"] += scale * (end_s - start_s)
        at_s = end_s
    seconds["waiting"] += scale * (until_s - at_s)


def cause_of(*, step: int, attempt: int, every: int, is_trouble: bool, is_of_job: bool) -> str:
    """What an unusual pause of a step is put down to. `every`: steps between checkpoints."""
    if attempt > 0:
        return "recomputed"
    if is_trouble:
        return "recovery"
    if every and step and step % every == 0:
        return "checkpoint"
    return "start-up" if is_of_job else "other"


class Ledger:
    """The account of a job that goes on.

    Args:
        every: steps between checkpoints, 0 for none.
        num_models: of the job, which are trained in turn: so many of its steps are one of each.
    """

    def __init__(self, every: int, num_models: int = 1) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._every, self._num_models = every, num_models
        self._begin_s: float | None = None
        self._newest_s = 0.0
        self._starts = True
        self._kinds: set[str] = set()
        self._evaluations: list[tuple[float, float]] = []
        self._joined_s: dict[int, float] = {}
        self._gone: list[Life] = []
        self._first_s: deque[float] = deque(maxlen=_NUM_GAPS)
        self._last_s: deque[float] = deque(maxlen=_NUM_GAPS)

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Take in a line of events.jsonl."""
        time_s, kind, worker = float(event["time_s"]), str(event["kind"]), event.get("worker")
        if kind == "job_resumed":
            # What was done after the newest kept step was lost; the pause is no time of the job.
            if self._begin_s is not None:
                self.seconds["recomputed"] += max(0.0, self._newest_s - self._begin_s)
            self._begin_s, self._starts = time_s, True
            self._joined_s.clear()
        self._begin_s = time_s if self._begin_s is None else self._begin_s
        self._newest_s = max(self._newest_s, time_s)
        self._kinds.add(kind)
        if kind == "worker_joined" and worker is not None:
            self._joined_s.setdefault(int(worker), time_s)
        elif kind in GONE and worker in self._joined_s:
            self._gone.append(Life(int(worker), self._joined_s.pop(int(worker)), time_s))

    def add_evaluation(self, line: Mapping[str, Any]) -> None:
        """Take in a line of evaluations.jsonl."""
        work = done_of(line)
        self._newest_s = max(self._newest_s, float(line["time_s"]))
        if work:
            begun_s = min(one.start_s for one in work)
            self._evaluations.append((begun_s, float(line["time_s"])))

    def add_step(self, line: Mapping[str, Any]) -> None:
        """Take in a line of metrics.jsonl."""
        end_s, work = float(line["time_s"]), done_of(line)
        begin_s = end_s - float(line["step_s"]) if self._begin_s is None else self._begin_s
        begin_s = min(begin_s, end_s)
        if self._starts:
            later_s = (one.start_s for one in work if one.start_s >= begin_s)
            first_s = min(later_s, default=end_s)
            self.seconds["start-up"] += first_s - begin_s
            begin_s, self._starts = first_s, False
        for from_s, to_s in sorted(self._evaluations):
            if begin_s - 1e-6 <= from_s < end_s:
                self.seconds["evaluation"] += min(to_s, end_s) - begin_s
                begin_s = min(to_s, end_s)
        if work:
            self._first_s.append(max(0.0, min(one.start_s for one in work) - begin_s))
            self._last_s.append(max(0.0, end_s - max(one.end_s for one in work)))
        share_out(
            self.seconds,
            (begin_s, end_s),
            work,
            lives=self._lives(work, end_s),
            usual=Usual(_median(self._first_s), _median(self._last_s)),
            cause=cause_of(
                step=int(line["step"]) // self._num_models,
                attempt=int(line.get("attempt", 0)),
                every=self._every,
                is_trouble=bool(self._kinds & TROUBLE),
                is_of_job=bool(self._kinds & _OF_JOB),
            ),
        )
        self._begin_s, self._newest_s = end_s, max(self._newest_s, end_s)
        self._kinds.clear()
        self._evaluations.clear()
        self._gone.clear()

    def _lives(self, work: Sequence[Done], end_s: float) -> list[Life]:
        """Of those that never said so, from their work."""
        lives = [Life(worker, since_s, end_s) for worker, since_s in self._joined_s.items()]
        lives += self._gone
        known = {one.worker for one in lives}
        others = sorted(one for one in work if one.worker not in known)
        for worker, rows in groupby(others, lambda one: one.worker):
            own = list(rows)
            lives.append(Life(worker, own[0].start_s, max(one.end_s for one in own)))
        return lives


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
