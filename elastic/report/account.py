"""Where the time of a run went: the goodput account. Its parts add up to the wall time.

Every second is shared out over the workers that belong to the job in it. Pure: arrays in, seconds
out. A pause between a run's end and its resuming is no time of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from elastic.core.runs import num_models
from elastic.report.marks import AGGREGATOR, COORDINATOR, JOB, KILL, LOST, NAN, STOP, Mark
from elastic.report.story import Story, Work
from elastic.report.trace import COMMUNICATE, COMPUTE, OPERATIONS, Trace
from monitoring.account import PARTS, Done, Life, Usual, cause_of, share_out

Floats = npt.NDArray[np.float64]

_FAULTS = (KILL, STOP, LOST, AGGREGATOR, COORDINATOR, NAN)


@dataclass(frozen=True, slots=True)
class Account:
    """Seconds of each part of PARTS."""

    seconds: Mapping[str, float]
    wall_s: float

    def share(self, part: str) -> float:
        """Of the wall time, 0 to 1."""
        return self.seconds[part] / self.wall_s if self.wall_s else 0.0

    @property
    def goodput(self) -> float:
        return self.share("productive")


def account_of(story: Story) -> Account:
    """The account of a run of ours, from its first event to its last."""
    seconds = dict.fromkeys(PARTS, 0.0)
    ends_s, evaluations = story.time_s, _evaluations(story)
    work_of = _by_step(story.work, story.step)
    usual = _usual_gaps(story, work_of)
    lives = [Life(*one) for one in story.lives]
    resumed_s = [mark.time_s for mark in story.events if mark.kind == "job_resumed"]
    begin_s = 0.0
    every = int((story.job.get("checkpoint") or {}).get("every") or 0)
    num = num_models(story.job)
    events = _Events(story.events)
    for row, end_s in enumerate(ends_s.tolist()):
        work = work_of[row]
        while resumed_s and resumed_s[0] < end_s:
            # What was done between the newest kept step and the end was lost, and done again.
            resume_s = resumed_s.pop(0)
            if row and resume_s > begin_s:
                seconds["recomputed"] += resume_s - begin_s
                begin_s = resume_s
            seconds["start-up"] += _until_work(begin_s, work, end_s)
            begin_s += _until_work(begin_s, work, end_s)
        if row == 0:
            seconds["start-up"] += _until_work(begin_s, work, end_s)
            begin_s += _until_work(begin_s, work, end_s)
        for from_s, to_s in evaluations:
            inside_s = max(0.0, min(to_s, end_s) - max(from_s, begin_s))
            if inside_s and from_s >= begin_s - 1e-6:
                seconds["evaluation"] += to_s - begin_s if to_s <= end_s else inside_s
                begin_s = min(to_s, end_s)
        inside = events.between(begin_s, end_s)
        share_out(
            seconds,
            (begin_s, end_s),
            _done(work),
            lives=lives,
            usual=usual,
            cause=cause_of(
                step=int(story.step[row]) // num,
                attempt=int(story.attempt[row]),
                every=every,
                is_trouble=any(map(is_trouble, inside)),
                is_of_job=any(mark.category == JOB for mark in inside),
            ),
        )
        begin_s = end_s
    seconds["checkpoint"] += max(0.0, story.end_s - begin_s)  # the last one, before the end
    return Account(seconds, story.end_s)


class _Events:
    """Events by their time."""

    def __init__(self, events: Sequence[Mark]) -> None:
        self._events = sorted(events, key=lambda one: one.time_s)
        self._times_s = np.array([one.time_s for one in self._events])

    def between(self, begin_s: float, end_s: float) -> Sequence[Mark]:
        low = int(np.searchsorted(self._times_s, begin_s, side="left"))
        return self._events[low : int(np.searchsorted(self._times_s, end_s, side="right"))]


def _by_step(work: Work, step: npt.NDArray[np.int64]) -> list[Work]:
    order = np.argsort(work.step, kind="stable")
    arrays = {one.name: getattr(work, one.name)[order] for one in fields(Work)}
    edges = np.searchsorted(arrays["step"], step), np.searchsorted(arrays["step"], step + 1)
    return [
        Work(**{name: array[low:high] for name, array in arrays.items()})
        for low, high in zip(*edges, strict=True)
    ]


def _usual_gaps(story: Story, work_of: Sequence[Work]) -> Usual:
    """Medians: from the last commit to the first micro-batch, from the last one to the commit."""
    first_s, last_s = [], []
    for row in range(1, len(work_of)):
        work = work_of[row]
        if len(work.step):
            first_s.append(max(0.0, float(work.start_s.min() - story.time_s[row - 1])))
            last_s.append(max(0.0, float(story.time_s[row] - work.end_s.max())))
    return Usual(
        float(np.median(first_s)) if first_s else 0.0,
        float(np.median(last_s)) if last_s else 0.0,
    )


def _done(work: Work) -> list[Done]:
    columns = (work.worker, work.start_s, work.end_s, work.granted)
    return [Done(*row) for row in zip(*(one.tolist() for one in columns), strict=True)]


def _until_work(begin_s: float, work: Work, end_s: float) -> float:
    later_s = work.start_s[work.start_s >= begin_s]
    return (float(later_s.min()) if len(later_s) else end_s) - begin_s


def _evaluations(story: Story) -> list[tuple[float, float]]:
    """When each one was computed and written."""
    work = story.evaluation_work
    spans = []
    for one in story.evaluations:
        own_s = work.start_s[work.step == one.step]
        own_s = own_s[own_s <= one.time_s]
        if len(own_s):
            spans.append((float(own_s.min()), one.time_s))
    return sorted(spans)


def is_trouble(mark: Mark) -> bool:
    """Whether the event is a fault, or what came of one."""
    return mark.is_fault or mark.category in _FAULTS


def account_of_trace(trace: Trace) -> Account:
    """The account of a foreign trace: what workers say they did, and the gaps between."""
    seconds = dict.fromkeys(PARTS, 0.0)
    part_of = {
        **dict.fromkeys(COMPUTE, "productive"),
        **dict.fromkeys(COMMUNICATE, "waiting"),
        "recompute": "recomputed",
        "wait": "waiting",
        "evaluate": "evaluation",
        "checkpoint": "checkpoint",
        "recover": "recovery",
        "start": "start-up",
    }
    wall_s = float(trace.end_s.max())
    step_ends_s = _step_ends(trace)
    workers = np.unique(trace.worker).tolist()
    for worker in workers:
        own = np.flatnonzero(trace.worker == worker)
        at_s = 0.0
        for row in own.tolist():
            start_s = max(float(trace.start_s[row]), at_s)
            end_s = max(float(trace.end_s[row]), start_s)
            within = start_s <= step_ends_s.get(int(trace.step[row]), 0.0)
            first = "start-up" if row == own[0] else "waiting" if within else "other"
            seconds[first] += start_s - at_s
            seconds[part_of[OPERATIONS[int(trace.operation[row])]]] += end_s - start_s
            at_s = end_s
        seconds["waiting"] += wall_s - at_s
    return Account({part: one / len(workers) for part, one in seconds.items()}, wall_s)


def _step_ends(trace: Trace) -> dict[int, float]:
    steps, place = np.unique(trace.step, return_inverse=True)
    ends_s = np.zeros(len(steps))
    np.maximum.at(ends_s, place, trace.end_s)
    return dict(zip(steps.tolist(), ends_s.tolist(), strict=True))
