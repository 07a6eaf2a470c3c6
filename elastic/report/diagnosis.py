"""What slowed a run or stopped it: when, who, and how much time each cause cost.

The same detector as while a job runs (`policies.fault_detection`) reads the records step by step;
faults that the run itself noted come from its events. Only reads; never imports matplotlib or Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elastic.report.account import Account, account_of, account_of_trace, is_trouble
from elastic.report.marks import Mark
from elastic.report.story import Story
from elastic.report.trace import COMPUTE, Bools, Floats, Ints, Trace
from policies.fault_detection import Peers
from policies.signals import Computed, Fleet, StepView
from policies.verdicts import Verdict, Worker

SLOW = 1.5
"""A step that took so many times as long as usual, and has no cause, is told of as such."""

MOST_TOLD = 20
"""Causes that are printed."""


@dataclass(frozen=True, eq=False)
class Records:
    """What is looked at, of a run of ours or of a foreign trace. Times in seconds from its start.

    Letters: B micro-batches (or other work) computed, S steps. `lives`: (worker, from, until).
    """

    worker_B: Ints
    role_B: Ints
    step_B: Ints
    start_s_B: Floats
    end_s_B: Floats
    counted_B: Bools
    step_S: Ints
    begin_s_S: Floats
    end_s_S: Floats
    is_exempt_S: Bools
    lives: tuple[tuple[int, float, float], ...]
    events: tuple[Mark, ...]
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """`cost_s`: by how much the steps between took longer than usual, shared among their causes."""

    begin_s: float
    end_s: float
    step: int
    what: str
    who: str
    cost_s: float
    reason: str
    worker: int | None = None


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Causes, the most expensive first."""

    records: Records
    account: Account
    causes: tuple[Cause, ...]
    usual_step_s: float


def records_of(story: Story) -> Records:
    """Of a run of ours."""
    work, end_s = story.work, story.time_s
    begin_s = np.r_[story.first_step_s, end_s[:-1]]
    first_s = np.full(len(end_s), np.inf)
    place = np.searchsorted(story.step, work.step)
    np.minimum.at(first_s, place, work.start_s)
    resumed_s = [mark.time_s for mark in story.events if mark.kind == "job_resumed"]
    is_exempt = story.attempt > 0
    is_exempt[0] = True
    is_exempt[np.minimum(np.searchsorted(end_s, resumed_s), len(end_s) - 1)] = True
    is_exempt |= np.isin(story.step, [one.step for one in story.evaluations])
    starts = np.where(is_exempt & np.isfinite(first_s), np.maximum(begin_s, first_s), begin_s)
    return Records(
        worker_B=work.worker,
        role_B=np.zeros(len(work.worker), np.int64),
        step_B=work.step,
        start_s_B=work.start_s,
        end_s_B=work.end_s,
        counted_B=work.granted,
        step_S=story.step,
        begin_s_S=starts,
        end_s_S=end_s,
        is_exempt_S=is_exempt,
        lives=story.lives,
        events=story.events,
        end_s=story.end_s,
    )


def records_of_trace(trace: Trace) -> Records:
    """Of a foreign trace; its steps are from their first row to their last, over all workers."""
    computes = trace.are(*COMPUTE)
    step_S, place = np.unique(trace.step, return_inverse=True)
    begin_s, end_s = np.full(len(step_S), np.inf), np.zeros(len(step_S))
    np.minimum.at(begin_s, place, trace.start_s)
    np.maximum.at(end_s, place, trace.end_s)
    is_exempt = np.isin(step_S, np.unique(trace.step[trace.are("evaluate", "checkpoint", "start")]))
    is_exempt[0] = True
    lives = [
        (worker, float(trace.start_s[own].min()), float(trace.end_s[own].max()))
        for worker in np.unique(trace.worker).tolist()
        for own in [trace.worker == worker]
    ]
    return Records(
        worker_B=trace.worker[computes],
        role_B=trace.role[computes],
        step_B=trace.step[computes],
        start_s_B=trace.start_s[computes],
        end_s_B=trace.end_s[computes],
        counted_B=np.ones(int(computes.sum()), np.bool_),
        step_S=step_S,
        begin_s_S=begin_s,
        end_s_S=end_s,
        is_exempt_S=is_exempt,
        lives=tuple(lives),
        events=(),
        end_s=float(trace.end_s.max()),
    )


def diagnose(story: Story) -> Diagnosis:
    """What slowed or stopped a run of ours. Where the detector watched it, its verdicts count."""
    records, watched = records_of(story), (story.job.get("monitoring") or {}).get("detect")
    slow = _told(records) if watched else _slow(records)
    return _diagnose(records, account_of(story), slow)


def diagnose_trace(trace: Trace) -> Diagnosis:
    """The same of a foreign trace; it also tells of workers whose rows end before the others'."""
    records = records_of_trace(trace)
    return _diagnose(records, account_of_trace(trace), _slow(records))


def _diagnose(records: Records, account: Account, slow: Sequence[Cause]) -> Diagnosis:
    took_s = records.end_s_S - records.begin_s_S
    causes = [*slow, *_events(records), *_vanished(records)]
    has_cause = np.zeros(len(took_s), np.bool_)
    for one in causes:
        has_cause |= _touched(records, one)
    quiet = ~has_cause & ~records.is_exempt_S
    usual_s = float(np.median(took_s[quiet] if quiet.any() else took_s))
    causes += _unexplained(records, took_s, usual_s, quiet)
    priced = _priced(records, causes, np.maximum(took_s - usual_s, 0.0))
    ordered = sorted(priced, key=lambda one: (-one.cost_s, one.begin_s))
    return Diagnosis(records, account, tuple(ordered), usual_s)


def views(records: Records) -> Iterable[StepView]:
    """The steps as the detector would have seen them."""
    order = np.argsort(records.step_B, kind="stable")
    step_B = records.step_B[order]
    low, high = np.searchsorted(step_B, records.step_S), np.searchsorted(step_B, records.step_S + 1)
    role_of = dict(zip(records.worker_B.tolist(), records.role_B.tolist(), strict=True))
    lives = sorted(records.lives)
    worker_L = np.array([one[0] for one in lives], np.int64)
    since_L, until_L = np.array([one[1:] for one in lives], np.float64).reshape(-1, 2).T
    for row, step in enumerate(records.step_S.tolist()):
        rows = order[low[row] : high[row]]
        alive_L = (since_L <= records.end_s_S[row]) & (until_L >= records.end_s_S[row])
        worker_W = np.unique(worker_L[alive_L])
        num = len(rows)
        yield StepView(
            step=step,
            fleet=Fleet(
                worker_W=worker_W,
                role_W=np.array([role_of.get(one, 0) for one in worker_W.tolist()], np.int64),
                node_W=np.zeros(len(worker_W), np.int64),
            ),
            computed=Computed(
                worker_B=records.worker_B[rows],
                start_s_B=records.start_s_B[rows],
                end_s_B=records.end_s_B[rows],
                load_B=np.ones(num),
                done_B=np.ones(num, np.bool_),
            ),
            is_exempt=bool(records.is_exempt_S[row]),
        )


def _slow(records: Records) -> list[Cause]:
    """Episodes of verdicts, from the step in which each began to that in which it ended."""
    detector, open_ones, causes = Peers(), dict[object, tuple[Verdict, int]](), []
    memory = detector.begin()
    place_of = {step: row for row, step in enumerate(records.step_S.tolist())}
    for row, view in enumerate(views(records)):
        diagnosis = detector.decide_step(view, memory)
        memory = diagnosis.memory
        for one in diagnosis.verdicts:
            begin = open_ones.get(one.name, (one, place_of.get(one.since_step, row)))[1]
            open_ones[one.name] = (one, begin)
        for one in diagnosis.ended:
            causes.append(_episode(records, *open_ones.pop(one.name), row))
    last = len(records.step_S) - 1
    return causes + [_episode(records, *one, last) for one in open_ones.values()]


def _told(records: Records) -> list[Cause]:
    """Episodes of verdicts that the run's events tell of."""
    open_ones, causes = dict[object, Cause](), []
    for mark in records.events:
        if mark.kind == "job_resumed":
            causes += _ended(open_ones, mark.time_s)
        if mark.verdict is None:
            continue
        name = mark.verdict["kind"], mark.verdict["culprit"]
        if mark.kind == "verdict":
            since = int(mark.verdict["since_step"])
            row = min(int(np.searchsorted(records.step_S, since)), len(records.step_S) - 1)
            open_ones[name] = Cause(
                begin_s=min(float(records.begin_s_S[row]), mark.time_s),
                end_s=records.end_s,
                step=int(records.step_S[row]),
                what=str(name[0]),
                who=str(name[1]),
                cost_s=0.0,
                reason=mark.reason.partition(": ")[2],
                worker=mark.worker,
            )
        elif name in open_ones:
            causes.append(replace(open_ones.pop(name), end_s=mark.time_s))
    return causes + list(open_ones.values())


def _ended(open_ones: dict[object, Cause], time_s: float) -> list[Cause]:
    """All that hold end there."""
    ended = [replace(one, end_s=max(one.begin_s, time_s)) for one in open_ones.values()]
    open_ones.clear()
    return ended


def _episode(records: Records, verdict: Verdict, begin: int, end: int) -> Cause:
    culprit = verdict.culprit
    return Cause(
        begin_s=float(records.begin_s_S[begin]),
        end_s=float(records.end_s_S[end]),
        step=int(records.step_S[begin]),
        what=verdict.kind.value,
        who=str(culprit),
        cost_s=0.0,
        reason=verdict.reason,
        worker=culprit.number if isinstance(culprit, Worker) else None,
    )


def _events(records: Records) -> list[Cause]:
    """Faults that the run noted; of an injected one and what came of it, both are told."""
    return [
        Cause(
            begin_s=mark.time_s,
            end_s=mark.time_s,
            step=int(records.step_S[_row_at(records, mark.time_s)]),
            what=mark.category,
            who="" if mark.worker is None else f"worker {mark.worker}",
            cost_s=0.0,
            reason=mark.text if not mark.reason or mark.is_fault else f"{mark.text}: {mark.reason}",
            worker=mark.worker,
        )
        for mark in records.events
        if is_trouble(mark)
    ]


def _row_at(records: Records, time_s: float) -> int:
    return min(int(np.searchsorted(records.end_s_S, time_s)), len(records.step_S) - 1)


def _vanished(records: Records) -> list[Cause]:
    """Workers whose rows end before the last step, where nothing says that they left."""
    if records.events:
        return []
    last_s = float(records.begin_s_S[-1])
    return [
        Cause(
            begin_s=until_s,
            end_s=until_s,
            step=int(records.step_S[_row_at(records, until_s)]),
            what="worker stopped or hung",
            who=f"worker {worker}",
            cost_s=0.0,
            reason=f"worker {worker} has no row after {until_s:.2f} s; others go on",
            worker=worker,
        )
        for worker, _, until_s in records.lives
        if until_s < last_s
    ]


def _unexplained(records: Records, took_s: Floats, usual_s: float, quiet: Bools) -> list[Cause]:
    """Slow steps for which there is no cause, all in one."""
    rows = np.flatnonzero(quiet & (took_s > SLOW * usual_s))
    if not len(rows):
        return []
    worst = rows[np.argmax(took_s[rows])]
    return [
        Cause(
            begin_s=float(records.begin_s_S[row]),
            end_s=float(records.end_s_S[row]),
            step=int(records.step_S[row]),
            what="slow steps",
            who="",
            cost_s=float(np.maximum(took_s[rows] - usual_s, 0).sum()) if row == worst else 0.0,
            reason=(
                f"{len(rows)} steps took over {SLOW:g} times as long as usual and nothing says why;"
                f" the longest, step {records.step_S[row]}, {took_s[row]:.2f} s"
            ),
        )
        for row in [worst]
    ]


def _touched(records: Records, cause: Cause) -> Bools:
    """The steps between a cause's begin and end, at least the one that it is in."""
    touched: Bools = (records.begin_s_S <= cause.end_s) & (records.end_s_S >= cause.begin_s)
    return touched


def _priced(records: Records, causes: Sequence[Cause], excess_s_S: Floats) -> list[Cause]:
    explained = [one for one in causes if one.what != "slow steps"]
    touched = [_touched(records, one) & ~records.is_exempt_S for one in explained]
    num_S = np.maximum(np.sum(touched, axis=0) if touched else 0, 1)
    return [
        replace(one, cost_s=float((excess_s_S / num_S)[own].sum()))
        for one, own in zip(explained, touched, strict=True)
    ] + [one for one in causes if one.what == "slow steps"]
