"""A run folder as arrays on one time axis: what `elastic report` draws.

Only reads. Never imports matplotlib, Ray or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder, num_models
from elastic.report.clock import Clock
from elastic.report.marks import (
    CHECKPOINT,
    JOB,
    JOIN,
    LEAVE,
    LOST,
    SLOW,
    UNMARKED,
    Mark,
    mark_of,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_ZOOM_S = 12.0
ZOOM_STEPS = 40
ZOOM_MICRO_BATCHES = 260
"""The zoomed window is at most so many wide: few enough to tell micro-batches apart."""
_WEIGHTS = {CHECKPOINT: 0.0, JOB: 0.5, JOIN: 2.0, LEAVE: 2.0, SLOW: 2.0}
"""How much an event draws the zoomed window to itself; 3 for the rest."""


@dataclass(frozen=True)
class Work:
    """Micro-batches computed, one row each, in the order of their start."""

    worker: Ints
    step: Ints
    micro_batch: Ints
    start_s: Floats
    end_s: Floats
    granted: Bools
    duplicate: Bools
    """Began after another worker had begun the same micro-batch; granted if it was done first."""

    def where(self, keep: Bools) -> Work:
        """The rows chosen by `keep`."""
        return Work(
            self.worker[keep],
            self.step[keep],
            self.micro_batch[keep],
            self.start_s[keep],
            self.end_s[keep],
            self.granted[keep],
            self.duplicate[keep],
        )

    def between(self, start_s: float, end_s: float) -> Work:
        """Those that touch a window."""
        return self.where((self.end_s >= start_s) & (self.start_s <= end_s))


@dataclass(frozen=True)
class Evaluation:
    """The model measured on held-out data; NaN stands for what was not finite."""

    time_s: float
    step: int
    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Story:
    """Everything that the report shows; times in seconds since the first event."""

    job: Mapping[str, Any]
    result: Mapping[str, Any] | None
    start_unix_s: float
    step: Ints
    time_s: Floats
    step_s: Floats
    loss: Floats
    samples: Ints
    attempt: Ints
    duplicates: Ints
    num_workers: Ints
    numbers: Mapping[str, Floats]
    """`grad_norm` and `lr` of each step, and whatever its `metrics` hold; NaN where absent."""
    evaluations: tuple[Evaluation, ...]
    work: Work
    evaluation_work: Work
    """Micro-batches of evaluations; their step is the one that came after."""
    events: tuple[Mark, ...]
    workers: Ints
    """Ids of all workers that computed or joined, sorted."""
    lives: tuple[tuple[int, float, float], ...]
    """(worker, joined, gone)."""
    end_s: float
    model: Ints
    """Whose step each is; all 0 where there is but one model."""

    @property
    def num_steps(self) -> Any:
        """What the job asks for, of all models together, as far as that is known."""
        steps = self.job.get("steps")
        return None if steps is None else int(steps) * num_models(self.job)

    @cached_property
    def losses(self) -> dict[int, Floats]:
        """The newest loss of each model after each step; NaN before its first one."""
        place = np.arange(len(self.step))
        newest = {
            int(one): np.maximum.accumulate(np.where(self.model == one, place, -1))
            for one in np.unique(self.model)
        }
        return {
            one: np.where(at >= 0, self.loss[np.maximum(at, 0)], np.nan)
            for one, at in newest.items()
        }

    @cached_property
    def marks(self) -> tuple[Mark, ...]:
        """The events that are worth a mark."""
        return tuple(event for event in self.events if event.category not in UNMARKED)

    @property
    def num_duplicates(self) -> int:
        """Duplicate leases of the whole run."""
        return int(self.duplicates.sum())

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
        marks = [
            mark
            for mark in self.marks
            if mark.time_s > self.first_step_s and mark.category != CHECKPOINT
        ]
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
    metrics, lines = folder.read_metrics(), folder.read_events()
    if not metrics:
        raise ConfigError(f"{folder.path}: no step has been committed yet, nothing to draw")
    clock = Clock(metrics, lines)
    events = tuple(mark_of(line, clock) for line in lines)
    work = _work(metrics, clock)
    evaluations = folder.read_evaluations()
    time_s = clock.seconds([float(line["time_s"]) for line in metrics])
    marks = [event for event in events if event.category not in UNMARKED]
    joined = {mark.worker for mark in marks if mark.category == JOIN and mark.worker is not None}
    evaluation_work = _work(evaluations, clock)
    computed = {*work.worker.tolist(), *evaluation_work.worker.tolist()}
    workers = np.array(sorted({*computed, *joined}), dtype=np.int64)
    end_s = max([float(time_s.max()), *(mark.time_s for mark in marks), *work.end_s[-1:].tolist()])
    return Story(
        job=job,
        result=result,
        start_unix_s=clock.start_s,
        step=_ints(metrics, "step"),
        time_s=time_s,
        step_s=np.array([float(line["step_s"]) for line in metrics]),
        loss=np.array([_float(line["loss"]) for line in metrics]),
        samples=_ints(metrics, "samples"),
        attempt=_ints(metrics, "attempt"),
        duplicates=_ints(metrics, "num_duplicates"),
        num_workers=_ints(metrics, "num_workers"),
        numbers=_numbers(metrics),
        evaluations=_evaluations(evaluations, clock),
        work=work,
        evaluation_work=evaluation_work,
        events=events,
        workers=workers,
        lives=tuple(_lives(marks, work, workers, end_s)),
        end_s=end_s,
        model=np.array([int(line.get("model", 0)) for line in metrics], dtype=np.int64),
    )


def _numbers(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    own = {name: None for line in metrics for name in line.get("metrics") or ()}
    numbers = {
        name: np.array([_float((line.get("metrics") or {}).get(name)) for line in metrics])
        for name in own
    }
    for name in ("grad_norm", "lr"):
        if any(line.get(name) is not None for line in metrics):
            numbers.setdefault(name, np.array([_float(line.get(name)) for line in metrics]))
    return numbers


def _evaluations(lines: Sequence[Mapping[str, Any]], clock: Clock) -> tuple[Evaluation, ...]:
    return tuple(
        Evaluation(
            time_s=clock(float(line["time_s"])),
            step=int(line["step"]),
            loss=_float(line.get("loss")),
            metrics={name: _float(value) for name, value in (line.get("metrics") or {}).items()},
        )
        for line in lines
    )


def _work(lines: Sequence[Mapping[str, Any]], clock: Clock) -> Work:
    rows = [
        (int(worker), int(line["step"]), int(one), float(start), float(end), outcome == "granted")
        for line in lines
        for worker, one, start, end, outcome in line.get("work", ())
    ]
    rows.sort(key=lambda row: row[3])
    worker, step, micro_batch, start, end, granted = zip(*rows, strict=True) if rows else [()] * 6
    return Work(
        worker=np.array(worker, dtype=np.int64),
        step=np.array(step, dtype=np.int64),
        micro_batch=np.array(micro_batch, dtype=np.int64),
        start_s=clock.seconds(start),
        end_s=clock.seconds(end),
        granted=np.array(granted, dtype=np.bool_),
        duplicate=_began_later(step, micro_batch),
    )


def _began_later(step: Sequence[int], micro_batch: Sequence[int]) -> Bools:
    """Of rows in the order of their start: whether an earlier one is of the same micro-batch."""
    seen: set[tuple[int, int]] = set()
    later = np.zeros(len(step), dtype=np.bool_)
    for row, key in enumerate(zip(step, micro_batch, strict=True)):
        later[row] = key in seen
        seen.add(key)
    return later


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


def _ints(metrics: Sequence[Mapping[str, Any]], name: str) -> Ints:
    return np.array([int(line.get(name, 0)) for line in metrics], dtype=np.int64)


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)
