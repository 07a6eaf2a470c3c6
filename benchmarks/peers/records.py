"""One form for what all systems log: a line a committed step. Reads and merges; measures nothing.

Peers log a line for each worker that took the step, with its own samples; ours one for the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.core.runs import Lines

Line = Mapping[str, Any]
Names = Callable[[int, int], Sequence[int]]
"""(step, micro-batch) -> the indices of its samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One committed step. A step that is done again is another one with the same number."""

    step: int
    time_s: float
    """Unix time at which the first worker had it."""
    loss: float
    """Mean over its samples."""
    samples: tuple[int, ...]
    """Indices of the samples that count in it, sorted."""
    num_workers: int


class Tail:
    """The lines of a file that grows; each is read once."""

    def __init__(self, file: Path) -> None:
        self._file = Lines(file)
        self._lines: list[Line] = []

    def lines(self) -> list[Line]:
        """All whole lines so far; none if there is no file yet."""
        self._lines += self._file.read()
        return self._lines


def merge(lines: Iterable[Line]) -> list[Step]:
    """The steps of a peer in the order of their commits, from the lines of its workers.

    The same step of another incarnation of the group, begun from a checkpoint, is another one.
    """
    groups: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        if line["kind"] == "step":
            groups.setdefault((line["incarnation"], line["step"]), []).append(line)
    return sorted(map(_merged, groups.values()), key=lambda one: one.time_s)


def _merged(lines: Sequence[Line]) -> Step:
    samples = sorted(one for line in lines for one in line["samples"])
    losses = sorted((line["worker"], line["loss"] * len(line["samples"])) for line in lines)
    return Step(
        step=lines[0]["step"],
        time_s=min(line["time_s"] for line in lines),
        loss=sum(loss for _, loss in losses) / max(1, len(samples)),
        samples=tuple(samples),
        num_workers=len(lines),
    )


def of_ours(metrics: Iterable[Line], names: Names) -> list[Step]:
    """Our steps. The samples are those of the micro-batches that were granted, each time they
    were: one that counted twice would show.

    What an aggregator had granted in the step in which it died stays in shared memory, not in the
    list of the one that ends the step; it is what the step's number of samples tells beyond it.
    """
    steps = []
    for line in metrics:
        granted = [number for _, number, _, _, outcome in line["work"] if outcome == "granted"]
        samples = [int(one) for number in granted for one in names(line["step"], number)]
        others = (number for number in itertools.count() if number not in granted)
        while len(samples) < line["samples"]:
            samples += names(line["step"], next(others))
        steps.append(
            Step(
                step=line["step"],
                time_s=line["time_s"],
                loss=line["loss"],
                samples=tuple(sorted(samples)),
                num_workers=line["num_workers"],
            )
        )
    return sorted(steps, key=lambda one: one.time_s)


def newest_workers(lines: Iterable[Line]) -> dict[int, int]:
    """Worker -> pid, of its newest process."""
    return {line["worker"]: line["pid"] for line in lines if line["kind"] == "worker"}
