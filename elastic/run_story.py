"""A run folder as arrays on one time axis: what `elastic report` draws.

Only reads. Never imports matplotlib, Ray or torch.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_ZOOM_S = 12.0
ZOOM_STEPS = 40
ZOOM_MICRO_BATCHES = 260
"""The zoomed window is at most so many wide: few enough to tell micro-batches apart."""
RESUME_GAP_S = 1.0
"""A pause between a run's end and its resuming is drawn this long."""

KILL, STOP, SLOW, NAN, AGGREGATOR, COORDINATOR, JOIN, LEAVE, LOST, CHECKPOINT, JOB = (
    "worker killed",
    "worker stopped or hung",
    "worker slowed",
    "NaN or overflow",
    "aggregator fault, takeover",
    "coordinator fault, restart",
    "worker joins",
    "worker leaves",
    "worker lost",
    "checkpoint",
    "job starts, resumes, ends",
)

_OF_FAULT = {
    "kill": KILL,
    "stop": STOP,
    "resume": STOP,
    "slow": SLOW,
    "delays": SLOW,
    "add": JOIN,
    "remove": LEAVE,
    "nan": NAN,
}
_OF_KIND = {
    "job_resumed": JOB,
    "job_stopped": JOB,
    "job_failed": JOB,
    "worker_joined": JOIN,
    "worker_left": LEAVE,
    "worker_lost": LOST,
    "worker_hung": STOP,
    "worker_given_up": LOST,
    "aggregator_lost": AGGREGATOR,
    "aggregator_hung": AGGREGATOR,
    "aggregator_took_over": AGGREGATOR,
    "coordinator_restarted": COORDINATOR,
    "no_workers": LOST,
    "nonfinite": NAN,
    "step_skipped": NAN,
    "overflow": NAN,
    "checkpoint_written": CHECKPOINT,
    "checkpoint_failed": CHECKPOINT,
}
_WEIGHTS = {CHECKPOINT: 0.0, JOB: 0.5, JOIN: 2.0, LEAVE: 2.0, SLOW: 2.0}
"""How much an event draws the zoomed window to itself; 3 for the rest."""


@dataclass(frozen=True)
class Mark:
    """An event worth a mark."""

    time_s: float
    step: int
    category: str
    worker: int | None
    is_fault: bool
    """Injected, not merely noticed."""
    text: str


@dataclass(frozen=True)
class Work:
    """Micro-batches computed, one row each, in the order of their start."""

    worker: Ints
    step: Ints
    start_s: Floats
    end_s: Floats
    granted: Bools

    def between(self, start_s: float, end_s: float) -> Work:
        """Those that touch a window."""
        keep = (self.end_s >= start_s) & (self.start_s <= end_s)
        return Work(
            self.worker[keep],
            self.step[keep],
            self.start_s[keep],
            self.end_s[keep],
            self.granted[keep],
        )


@dataclass(frozen=True)
class Story:
    """Everything that the report shows; times in seconds since the first event."""

    job: Mapping[str, Any]
    result: Mapping[str, Any] | None
    step: Ints
    time_s: Floats
    step_s: Floats
    loss: Floats
    num_workers: Ints
    work: Work
    marks: tuple[Mark, ...]
    workers: Ints
    """Ids of all workers that computed or joined, sorted."""
    lives: tuple[tuple[int, float, float], ...]
    """(worker, joined, gone)."""
    num_duplicates: int
    end_s: float

    @property
    def first_step_s(self) -> float:
        """When the first step began: before it there is only starting up."""
        return float(self.time_s[0] - self.step_s[0])

    def zoom(self) -> tuple[float, float] | None:
        """The most eventful window of at most MAX_ZOOM_S; None if the run is hardly longer."""
        width_s = min(MAX_ZOOM_S, ZOOM_STEPS * float(np.median(self.step_s)))
        if len(self.work.worker):
            work_s = float(np.median(self.work.end_s - self.work.start_s))
            width_s = max(min(width_s, ZOOM_MICRO_BATCHES * work_s), 0.01)
        if self.end_s - self.first_step_s < 1.5 * width_s:
            return None
        start_s = self._most_eventful(width_s, 0.12 * width_s)
        start_s = min(max(start_s, self.first_step_s), self.end_s - width_s)
        return start_s, start_s + width_s

    def _most_eventful(self, width_s: float, lead_s: float) -> float:
        """Start of the window whose marks weigh most; a second mark of a kind weighs less."""
        marks = [mark for mark in self.marks if mark.time_s > self.first_step_s]
        best, best_start_s = 0.0, 0.0
        for first in marks:
            start_s = first.time_s - lead_s
            seen: dict[str, int] = {}
            for mark in marks:
                if start_s <= mark.time_s <= start_s + 0.9 * width_s:
                    seen[mark.category] = seen.get(mark.category, 0) + 1
            weight = sum(_WEIGHTS.get(kind, 3.0) * n**0.3 for kind, n in seen.items())
            if weight > best:
                best, best_start_s = weight, start_s
        if best == 0:
            slowest = int(np.argmax(self.step_s))
            return float(self.time_s[slowest] - self.step_s[slowest]) - lead_s
        return best_start_s


def read_story(path: str | Path) -> Story:
    """Read the run in the folder `path`, finished or not.

    Raises:
        ConfigError: it is no run folder, or no step has been committed yet.
    """
    folder = RunFolder(path)
    job = folder.read_json(folder.job_json)
    result = folder.read_json(folder.result_json) if folder.result_json.exists() else None
    metrics, events = folder.read_metrics(), folder.read_events()
    if not metrics:
        raise ConfigError(f"{folder.path}: no step has been committed yet, nothing to draw")
    clock = _Clock(metrics, events)
    work = _work(metrics, clock)
    time_s = np.array([clock(float(line["time_s"])) for line in metrics])
    marks = tuple(mark for event in events if (mark := _mark(event, clock)) is not None)
    joined = {mark.worker for mark in marks if mark.category == JOIN and mark.worker is not None}
    workers = np.array(sorted({*work.worker.tolist(), *joined}), dtype=np.int64)
    end_s = max([float(time_s.max()), *(mark.time_s for mark in marks), *work.end_s[-1:].tolist()])
    return Story(
        job=job,
        result=result,
        step=np.array([int(line["step"]) for line in metrics], dtype=np.int64),
        time_s=time_s,
        step_s=np.array([float(line["step_s"]) for line in metrics]),
        loss=np.array([_float(line["loss"]) for line in metrics]),
        num_workers=np.array([int(line["num_workers"]) for line in metrics], dtype=np.int64),
        work=work,
        marks=marks,
        workers=workers,
        lives=tuple(_lives(marks, work, workers, end_s)),
        num_duplicates=sum(int(line.get("num_duplicates", 0)) for line in metrics),
        end_s=end_s,
    )


class _Clock:
    """From unix time to seconds since the start, with the pauses before resumes cut out."""

    def __init__(
        self, metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
    ) -> None:
        times = sorted(
            [float(line["time_s"]) for line in metrics]
            + [float(event["time_s"]) for event in events]
        )
        first_s = float(metrics[0]["time_s"]) - float(metrics[0]["step_s"])
        self._from: list[float] = [min(times[0], first_s)]
        self._offset: list[float] = [self._from[0]]
        for event in events:
            if event["kind"] != "job_resumed":
                continue
            resumed_s = float(event["time_s"])
            earlier = [time for time in times if time < resumed_s]
            pause_s = resumed_s - earlier[-1] - RESUME_GAP_S if earlier else 0.0
            self._from.append(resumed_s)
            self._offset.append(self._offset[-1] + max(0.0, pause_s))

    def __call__(self, time_s: float) -> float:
        return time_s - self._offset[max(0, bisect_right(self._from, time_s) - 1)]


def _work(metrics: Sequence[Mapping[str, Any]], clock: _Clock) -> Work:
    rows = [
        (int(worker), int(line["step"]), clock(float(start)), clock(float(end)), outcome)
        for line in metrics
        for worker, _, start, end, outcome in line.get("work", ())
    ]
    rows.sort(key=lambda row: row[2])
    return Work(
        worker=np.array([row[0] for row in rows], dtype=np.int64),
        step=np.array([row[1] for row in rows], dtype=np.int64),
        start_s=np.array([row[2] for row in rows], dtype=np.float64),
        end_s=np.array([row[3] for row in rows], dtype=np.float64),
        granted=np.array([row[4] == "granted" for row in rows], dtype=np.bool_),
    )


def _mark(event: Mapping[str, Any], clock: _Clock) -> Mark | None:
    kind, reason = str(event["kind"]), " ".join(str(event.get("reason") or "").split())
    is_fault = kind == "fault"
    category = _fault_category(reason) if is_fault else _OF_KIND.get(kind)
    if category is None:
        return None
    worker = event.get("worker")
    if worker is None and is_fault and (named := re.search(r"worker-(\d+)", reason)):
        worker = int(named[1])
    who = "" if worker is None else f"worker-{worker}"
    text = reason if is_fault else _words(kind, who)
    return Mark(
        time_s=clock(float(event["time_s"])),
        step=int(event.get("step", 0)),
        category=category,
        worker=None if worker is None else int(worker),
        is_fault=is_fault,
        text=text or kind,
    )


def _words(kind: str, who: str) -> str:
    """`worker_joined`, `worker-3` as 'worker-3 joined'."""
    words = kind.replace("_", " ")
    if who and words.startswith("worker "):
        return words.replace("worker", who, 1)
    return f"{words} {who}".strip()


def _fault_category(reason: str) -> str:
    if "aggregator" in reason:
        return AGGREGATOR
    if "coordinator" in reason:
        return COORDINATOR
    first = re.split(r"[ _]", reason, maxsplit=1)[0]
    return _OF_FAULT.get(first, KILL)


def _lives(
    marks: Sequence[Mark], work: Work, workers: Ints, end_s: float
) -> list[tuple[int, float, float]]:
    """Spans in which each worker belonged to the job; one that never said so, from its work."""
    lives: list[tuple[int, float, float]] = []
    since: dict[int, float] = {}
    for mark in marks:
        if mark.worker is None or mark.is_fault:
            continue
        if mark.category == JOIN:
            since.setdefault(mark.worker, mark.time_s)
        elif mark.category in (LEAVE, LOST) and mark.worker in since:
            lives.append((mark.worker, since.pop(mark.worker), mark.time_s))
    lives += [(worker, start_s, end_s) for worker, start_s in since.items()]
    known = {worker for worker, _, _ in lives}
    for worker in workers.tolist():
        if worker not in known:
            own = work.worker == worker
            lives.append((worker, float(work.start_s[own].min()), float(work.end_s[own].max())))
    return lives


def busy_share(work: Work, worker: int, edges_s: Floats) -> Floats:
    """The share of each bin between `edges_s` (equally wide) that `worker` computed, 0 to 1."""
    own = work.worker == worker
    starts, ends = work.start_s[own], np.maximum.accumulate(work.end_s[own])
    if not len(starts):
        return np.zeros(len(edges_s) - 1)
    starts[1:] = np.maximum(starts[1:], ends[:-1])  # no second counts twice
    # Busy seconds up to time t are piecewise linear in t, so bins are differences of them.
    times = np.stack([starts, np.maximum(starts, ends)], axis=1).ravel()
    steps = np.diff(times)
    steps[1::2] = 0.0
    busy = np.concatenate([[0.0], np.cumsum(steps)])
    share: Floats = np.diff(np.interp(edges_s, times, busy)) / np.diff(edges_s)
    return np.clip(share, 0.0, 1.0)


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)
