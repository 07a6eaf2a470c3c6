"""Faults as data: what shall happen to a run, at which step and at which point of the step.

Only describes and checks; never injects anything.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from elastic.core.errors import ConfigError
from elastic.core.yaml_file import Key, complain, read_yaml, validate

Action = Literal[
    "kill",
    "stop",
    "resume",
    "slow",
    "add_worker",
    "remove_worker",
    "kill_aggregator",
    "stop_aggregator",
    "kill_coordinator",
    "nan_gradient",
    "flip_bit",
    "delays",
]
AggregatorPoint = Literal[
    "step_start",
    "before_grant",
    "after_row",
    "after_grant",
    "before_update",
    "mid_update",
    "before_flip",
    "after_flip",
]
WorkerPoint = Literal["before_compute", "after_compute", "after_encode"]
Point = Literal[AggregatorPoint, WorkerPoint]

AGGREGATOR_POINTS: tuple[str, ...] = get_args(AggregatorPoint)
"""Points of a step in the aggregator. after_grant: the manifest is valid. Coded
sums have none, and no rows."""

WORKER_POINTS: tuple[str, ...] = get_args(WorkerPoint)
"""Points of a micro-batch in the worker."""

DEFAULT_POINT: Literal["step_start"] = "step_start"
ANY_WORKER = "any"
TRACE_KEY = "dur"
"""Array of a trace: seconds, shape (rounds, columns)."""

NEEDS_TARGET = ("kill", "stop", "resume", "slow", "nan_gradient", "flip_bit")
MAY_TARGET = (*NEEDS_TARGET, "remove_worker")
IN_WORKER = ("slow", "nan_gradient", "flip_bit", "delays")
"""Happen inside a worker, while it computes: they have no point."""

_SETTINGS: dict[str, tuple[str, ...]] = {
    "for_s": ("stop", "slow", "stop_aggregator"),
    "factor": ("slow",),
    "sleep_s": ("slow",),
    "probability": ("slow", "flip_bit"),
    "trace": ("delays",),
    "scale": ("delays",),
}
"""Which actions a setting belongs to."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a schedule."""

    index: int
    """Its position in the list, from 0: its identity."""
    do: Action
    step: int = 0
    """At this step, or at the first later one that reaches the point."""
    point: Point = "step_start"
    target: int | Literal["any"] | None = None
    """Worker id; 'any': a random worker each time, or, of kill and stop, the first that gets there;
    None: no worker, or whichever."""
    for_s: float | None = None
    """How long, in seconds; None: for ever."""
    factor: float | None = None
    """slow: micro-batches take this many times as long."""
    sleep_s: float | None = None
    """slow: seconds of sleep, once in a step."""
    probability: float = 1.0
    """slow: the share of steps in which it sleeps; flip_bit: of its micro-batches."""
    trace: Path | None = None
    """delays: an .npz file with the key 'dur'."""
    scale: float = 1.0
    """delays: factor on the seconds of the trace."""

    @property
    def happens_in_worker(self) -> bool:
        """Whether the worker itself has to reach the point (or to compute) for it to happen."""
        return self.do in IN_WORKER or self.point in WORKER_POINTS

    def __str__(self) -> str:
        """In words, as in the events of a run: 'kill worker-1 at after_grant'."""
        words = [self.do.replace("_", " ")]
        if self.target is not None:
            any_worker = "a random worker" if self.do == "slow" else "any worker"
            words.append(any_worker if self.target == ANY_WORKER else f"worker-{self.target}")
        if self.do not in IN_WORKER:
            words.append(f"at {self.point}")
        if self.factor is not None:
            words.append(f"{self.factor:g} times")
        if self.sleep_s is not None:
            words.append(f"by {self.sleep_s:g} s a step")
        if self.probability < 1:
            what = "micro-batches" if self.do == "flip_bit" else "steps"
            words.append(f"in {self.probability:.0%} of {what}")
        if self.for_s is not None:
            words.append(f"for {self.for_s:g} s")
        if self.trace is not None:
            words.append(f"from {self.trace.name} x {self.scale:g}")
        return " ".join(words)


class _Entry(BaseModel):
    """What both kinds of entry of a fault file have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _At(_Entry):
    step: int = Field(ge=0)
    point: Point | None = None


_Target = Annotated[
    str,
    Field(
        pattern=r"^(worker-(0|[1-9]\d{0,8})|any)$",
        json_schema_extra={"allowed": "worker-0, worker-1, ... or any"},
    ),
]


class _FaultEntry(_Entry):
    do: Action
    at: _At | None = None
    target: _Target | None = None
    for_s: float | None = Field(default=None, gt=0)
    factor: float | None = Field(default=None, ge=1)
    sleep_s: float | None = Field(default=None, gt=0)
    probability: float | None = Field(default=None, gt=0, le=1)
    trace: str | None = Field(default=None, min_length=1)
    scale: float | None = Field(default=None, gt=0)


def load_faults(path: str | Path, *, num_steps: int | None = None) -> tuple[Fault, ...]:
    """Read a YAML list of faults; a trace is looked for beside the file.

    With `num_steps`, a fault at a step that the job never reaches is an error.

    Raises:
        ConfigError: one line for every mistake: file and line, key, value seen, what is allowed.
    """
    document = read_yaml(Path(path))
    if document.value is None:
        return ()
    if not isinstance(document.value, list):
        raise ConfigError(f"{document.name}: needs a list of faults, each beginning with '- '")
    folder, faults, problems = Path(path).parent, [], []
    for index in range(len(document.value)):
        try:
            entry = validate(_FaultEntry, document, at=(index,))
        except ConfigError as error:
            problems.append(str(error))
            continue
        problems += [
            complain(document, (index, *key), message)
            for key, message in _problems(entry, folder, num_steps)
        ]
        faults.append(_fault(index, entry, folder))
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(faults)


def read_trace(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Read recorded delays in seconds, shape (rounds, columns).

    Raises:
        ConfigError: the file is missing, damaged, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if TRACE_KEY not in arrays:
                raise ConfigError(f"{path} has no array {TRACE_KEY!r}, only {sorted(arrays)}")
            delays = np.asarray(arrays[TRACE_KEY], dtype=np.float64)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no readable .npz file: {error}") from error
    if delays.ndim != 2 or delays.size == 0:
        raise ConfigError(
            f"{path}: {TRACE_KEY!r} has shape {delays.shape}; needs (rounds, columns)"
        )
    if not np.isfinite(delays).all() or (delays < 0).any():
        raise ConfigError(f"{path}: {TRACE_KEY!r} holds negative or non-finite seconds")
    return delays


def _problems(entry: _FaultEntry, folder: Path, num_steps: int | None) -> Iterator[tuple[Key, str]]:
    """What does not fit together within one entry, as (key, message)."""
    yield from _time_problems(entry, num_steps)
    yield from _target_problems(entry)
    for name, actions in _SETTINGS.items():
        if getattr(entry, name) is not None and entry.do not in actions:
            yield (name,), f"only for do: {', '.join(actions)}; here do is {entry.do}"
    if entry.do == "slow":
        if (entry.factor is None) == (entry.sleep_s is None):
            yield (), "slow needs either factor or sleep_s"
        if entry.probability is not None and entry.sleep_s is None:
            yield ("probability",), "needs sleep_s"
    if entry.do == "delays":
        if entry.trace is None:
            yield (), "delays needs trace: FILE.npz"
        else:
            try:
                read_trace(folder / entry.trace)
            except ConfigError as error:
                yield ("trace",), str(error)


def _time_problems(entry: _FaultEntry, num_steps: int | None) -> Iterator[tuple[Key, str]]:
    if entry.do == "delays":
        if entry.at is not None:
            yield ("at",), "delays act in every step; leave it out"
        return
    if entry.at is None:
        yield ("at",), f"missing; {entry.do} needs at: {{step: N}}"
        return
    if num_steps is not None and entry.at.step >= num_steps:
        yield ("at", "step"), f"got {entry.at.step}; the job has steps 0 to {num_steps - 1}"
    point = entry.at.point
    if point is None or (entry.do in IN_WORKER and point == DEFAULT_POINT):
        return
    if entry.do in IN_WORKER:
        yield ("at", "point"), f"got {point}; {entry.do} happens while computing; leave it out"
    elif point in WORKER_POINTS and entry.do not in ("kill", "stop"):
        allowed = ", ".join(AGGREGATOR_POINTS)
        yield ("at", "point"), f"got {point}; {entry.do} happens in the aggregator, at {allowed}"


def _target_problems(entry: _FaultEntry) -> Iterator[tuple[Key, str]]:
    if entry.target is None:
        if entry.do in NEEDS_TARGET:
            yield ("target",), f"missing; {entry.do} needs target: worker-0, worker-1, ..."
    elif entry.do not in MAY_TARGET:
        yield ("target",), f"got {entry.target}; {entry.do} has no target; leave it out"
    elif entry.target == ANY_WORKER and not (
        entry.do in ("kill", "stop") or (entry.do == "slow" and entry.probability is not None)
    ):
        yield ("target",), "got any; only for kill, stop, and slow with sleep_s and probability"


def _fault(index: int, entry: _FaultEntry, folder: Path) -> Fault:
    target: int | Literal["any"] | None = None
    if entry.target == ANY_WORKER:
        target = "any"
    elif entry.target is not None:
        target = int(entry.target.removeprefix("worker-"))
    return Fault(
        index=index,
        do=entry.do,
        step=entry.at.step if entry.at else 0,
        point=entry.at.point or DEFAULT_POINT if entry.at else DEFAULT_POINT,
        target=target,
        for_s=entry.for_s,
        factor=entry.factor,
        sleep_s=entry.sleep_s,
        probability=1.0 if entry.probability is None else entry.probability,
        trace=None if entry.trace is None else (folder / entry.trace).resolve(),
        scale=1.0 if entry.scale is None else entry.scale,
    )


__all__ = [
    "AGGREGATOR_POINTS",
    "WORKER_POINTS",
    "Fault",
    "load_faults",
    "read_trace",
]
