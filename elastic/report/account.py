"""Where the time of a run went: the goodput account. Its parts add up to the wall time.

Every second is shared out over the workers that belong to the job in it. Pure: arrays in, seconds
out. A pause between a run's end and its resuming is no time of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from elastic.report.marks import AGGREGATOR, COORDINATOR, JOB, KILL, LOST, NAN, STOP, Mark
from elastic.report.story import Story, Work
from elastic.report.trace import COMMUNICATE, COMPUTE, OPERATIONS, Trace

Floats = npt.NDArray[np.float64]

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

_FAULTS = (KILL, STOP, LOST, AGGREGATOR, COORDINATOR, NAN)
_USUAL = 1.5
"""A gap up to that many times the median one belongs to the step."""


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
    first_s, last_s = _usual_gaps(story, work_of)
    resumed_s = [mark.time_s for mark in story.events if mark.kind == "job_resumed"]
    begin_s = 0.0
    every = int((story.job.get("checkpoint") or {}).get("every") or 0)
    events = _Events(story.events)
    for row, end_s in enumerate(ends_s.tolist()):
        step, work = int(story.step[row]), work_of[row]
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
        span = _Span(begin_s, end_s)
        cause = _cause(events, span, step, int(story.attempt[row]), every)
        _share_out(seconds, span, work, story.lives, (first_s, last_s), cause)
        begin_s = end_s
    seconds["checkpoint"] += max(0.0, story.end_s - begin_s)  # the last one, before the end
    return Account(seconds, story.end_s)


@dataclass(frozen=True, slots=True)
class _Span:
    begin_s: float
    end_s: float


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


def _usual_gaps(story: Story, work_of: Sequence[Work]) -> tuple[float, float]:
    """Medians: from the last commit to the first micro-batch, from the last one to the commit."""
    first_s, last_s = [], []
    for row in range(1, len(work_of)):
        work = work_of[row]
        if len(work.step):
            first_s.append(max(0.0, float(work.start_s.min() - story.time_s[row - 1])))
            last_s.append(max(0.0, float(story.time_s[row] - work.end_s.max())))
    return (
        float(np.median(first_s)) if first_s else 0.0,
        float(np.median(last_s)) if last_s else 0.0,
    )


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


def _cause(events: _Events, span: _Span, step: int, attempt: int, every: int) -> str:
    """What an unusual pause of a step is put down to."""
    if attempt > 0:
        return "recomputed"
    inside = events.between(span.begin_s, span.end_s)
    if any(is_trouble(mark) for mark in inside):
        return "recovery"
    if every and step and step % every == 0:
        return "checkpoint"
    if any(mark.category == JOB for mark in inside):
        return "start-up"
    return "other"


def is_trouble(mark: Mark) -> bool:
    """Whether the event is a fault, or what came of one."""
    return mark.is_fault or mark.category in _FAULTS


def _share_out(
    seconds: dict[str, float],
    span: _Span,
    work: Work,
    lives: Sequence[tuple[int, float, float]],
    usual_s: tuple[float, float],
    cause: str,
) -> None:
    """One step: the pause before, what each worker did, the update."""
    if not len(work.step):
        seconds[cause] += span.end_s - span.begin_s
        return
    first_s = float(np.clip(work.start_s.min(), span.begin_s, span.end_s))
    last_s = float(np.clip(work.end_s.max(), first_s, span.end_s))
    for gap_s, limit_s, part in (
        (first_s - span.begin_s, _USUAL * usual_s[0], "coordination"),
        (span.end_s - last_s, _USUAL * usual_s[1], "productive"),
    ):
        seconds[part] += min(gap_s, limit_s)
        seconds[cause] += max(0.0, gap_s - limit_s)
    members = {
        worker: (max(first_s, since_s), min(last_s, until_s))
        for worker, since_s, until_s in lives
        if since_s < last_s and until_s > first_s
    }
    alive_s = sum(until_s - since_s for since_s, until_s in members.values())
    if alive_s <= 0:
        seconds["productive"] += last_s - first_s
        return
    scale = (last_s - first_s) / alive_s
    for worker, (since_s, until_s) in members.items():
        for part, part_s in _of_worker(work, worker, since_s, until_s).items():
            seconds[part] += scale * part_s


def _of_worker(work: Work, worker: int, since_s: float, until_s: float) -> dict[str, float]:
    """What a worker did between two times; the parts add up."""
    own = work.worker == worker
    if not own.any():  # it held nothing, or hung with it
        return {"recovery": until_s - since_s}
    parts = dict.fromkeys(("productive", "recomputed", "coordination", "waiting"), 0.0)
    at_s = since_s
    rows = zip(work.start_s[own], work.end_s[own], work.granted[own], strict=True)
    for start_s, end_s, granted in sorted(rows):
        start_s, end_s = np.clip([start_s, end_s], at_s, until_s).tolist()
        parts["coordination"] += start_s - at_s
        parts["productive" if granted else "recomputed"] += end_s - start_s
        at_s = end_s
    parts["waiting"] += until_s - at_s
    return parts


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
