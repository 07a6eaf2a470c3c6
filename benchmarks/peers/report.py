"""The table of the comparison, in Markdown, from the runs. Pure: measures and runs nothing.

A cell is the median over the repeats, with the lowest and the highest. Where a peer is better than
ours, its cell is bold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks import record
from benchmarks.peers import measures
from benchmarks.peers.driver import WARM_STEPS, Run
from benchmarks.peers.measures import Cost
from benchmarks.table import number

OURS = ("ours", "ours-fine")
DDP = "ddp"
TITLES: Mapping[str, str] = {
    "ddp": "DDP",
    "torchrun": "torchrun, checkpoints",
    "torchft": "TorchFT, as its example",
    "torchft-tuned": "TorchFT, tuned",
    "ray": "Ray Train",
    "ray-elastic": "Ray Train, elastic",
    "ours": "ours",
    "ours-fine": "ours, finer leases",
}
ENDED, NONE, NOTHING = "ended", "none", "-"

Values = list[float] | str
"""What was measured in each repeat, or a word in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    title: str
    unit: str
    values: Callable[[Runs, str], Values]
    better: Literal["low", "high", "neither"] = "low"


class Runs:
    """All runs, and what each cost."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = sorted(runs, key=lambda one: (one.scenario, one.repeat, one.system))
        self.systems = [name for name in TITLES if any(one.system == name for one in self.runs)]
        self._references = measures.references(self.runs)
        self._costs = {id(one): measures.costs(one) for one in self.runs}

    def of(self, system: str, scenario: str | None = None) -> list[Run]:
        """The runs of a system, in the order of their repeats."""
        return [
            one for one in self.runs if one.system == system and scenario in (None, one.scenario)
        ]

    def costs(self, system: str, phase: str, scenario: str | None = None) -> list[Cost]:
        """A phase of a system, once a repeat."""
        return [
            cost
            for run in self.of(system, scenario)
            for cost in self._costs[id(run)]
            if cost.phase == phase
        ]

    def deviations(self, system: str) -> list[float]:
        """Of the runs with faults: largest relative difference of the loss to a calm run."""
        reference = self._references.get(system, ())
        found = (
            measures.deviation(run.launches[0], reference) for run in self.of(system, "faults")
        )
        return [one for one in found if one is not None]


def of_phase(
    phase: str, get: Callable[[Cost], float | None], scenario: str | None = None
) -> Callable[[Runs, str], Values]:
    """A figure of one phase."""

    def values(runs: Runs, system: str) -> Values:
        found = runs.costs(system, phase, scenario)
        if not found:
            return NOTHING
        if not any(one.possible for one in found):
            return NONE
        measured = [value for value in map(get, found) if value is not None]
        if len(measured) == len(found):
            return measured
        ended = f"{ENDED} {len(found) - len(measured)} of {len(found)}"
        return f"{ended}, else {cell(measured)}" if measured else ended

    return values


def to_ddp(
    phase: str, get: Callable[[Cost], float | None], of: str, scenario: str
) -> Callable[[Runs, str], Values]:
    """A figure over that of DDP in the phase `of`, repeat by repeat."""

    def values(runs: Runs, system: str) -> Values:
        mine = of_phase(phase, get, scenario)(runs, system)
        theirs = of_phase(of, get, "steady")(runs, DDP)  # DDP's batch is whole in any case
        if isinstance(mine, str) or isinstance(theirs, str):
            return mine if isinstance(mine, str) else NOTHING
        if len(mine) == len(theirs):
            return [one / other for one, other in zip(mine, theirs, strict=True)]
        return [one / statistics.median(theirs) for one in mine]

    return values


def _deviations(runs: Runs, system: str) -> Values:
    return runs.deviations(system) or NOTHING


def _memory(runs: Runs, system: str) -> Values:
    return [one.memory["total"] / 2**20 for one in runs.of(system) if one.memory] or NOTHING


def _start(runs: Runs, system: str) -> Values:
    return [one.start_s[0] for one in runs.of(system) if one.start_s] or NOTHING


def _gap(title: str, phase: str) -> Row:
    return Row(
        title=f"{title}: gap beyond the median step",
        unit="s",
        values=of_phase(phase, lambda one: one.gap_s),
    )


def _step_time(title: str, phase: str, get: Callable[[Cost], float | None]) -> list[Row]:
    """How long a step takes, and how much longer than DDP's."""
    return [
        Row(title=title, unit="s", values=of_phase(phase, get, "steady")),
        Row(title="… / DDP's", unit="x", values=to_ddp(phase, get, phase, "steady")),
    ]


def _after_fault(title: str, phase: str) -> list[Row]:
    """The lines of one kind of fault."""
    return [
        _gap(title, phase),
        Row(
            title="… the longest until all are back",
            unit="s",
            values=of_phase(phase, lambda one: one.longest_s),
        ),
        Row(
            title="… steps redone",
            unit="",
            values=of_phase(phase, lambda one: float(one.redone) if one.ran else None),
        ),
        Row(
            title="… samples lost",
            unit="",
            values=of_phase(phase, lambda one: float(one.samples_lost) if one.ran else None),
        ),
        Row(
            title="… steps with the whole batch",
            unit="%",
            values=of_phase(phase, lambda one: 100 * one.full if one.full is not None else None),
            better="high",
        ),
    ]


ROWS: Sequence[Row] = (
    *_step_time("step time, no fault", "calm", lambda one: one.median_s),
    *_step_time("one worker half as fast: step time", "slow", lambda one: one.step_s),
    *_step_time(
        "a random one frozen for a step, 20 % of the time: step time",
        "random",
        lambda one: one.step_s,
    ),
    *_after_fault("SIGKILL to 1 of 4", "kill"),
    *_after_fault("SIGKILL to 2 of 4", "kill-2"),
    *_after_fault("SIGSTOP to 1 for 30 s", "stop"),
    Row(
        title="loss of a step with those faults / without: largest deviation",
        unit="",
        values=_deviations,
    ),
    Row(
        title="SIGKILL to 1 every 30 s: goodput / DDP's undisturbed",
        unit="x",
        values=to_ddp("storm", lambda one: one.goodput, "calm", "storm"),
        better="high",
    ),
    Row(
        title="… of steps with the whole batch only",
        unit="x",
        values=to_ddp("storm", lambda one: one.goodput_whole, "calm", "storm"),
        better="high",
    ),
    Row(
        title="… steps with the whole batch",
        unit="%",
        values=of_phase("storm", lambda one: None if one.full is None else 100 * one.full),
        better="high",
    ),
    _gap("SIGTERM to 1, SIGKILL later", "notice"),
    _gap("a worker joins", "join"),
    _gap("SIGKILL to the controller", "controller"),
    _gap("SIGKILL to who updates the parameters", "aggregator"),
    Row(title="memory of all processes, no fault", unit="MiB", values=_memory),
    Row(
        title=f"from the start until all workers have taken {WARM_STEPS} steps",
        unit="s",
        values=_start,
        better="neither",
    ),
)


def headed(what: str, table: str, failed: Sequence[str]) -> str:
    """Under what it was measured on, and of what, and above what did not run."""
    machine = record.hardware()
    heading = (
        f"{machine['cpu_model']}, {machine['cores']} cores, {record.commit()[:12]},"
        f" {time.strftime('%Y-%m-%d')}; {what}; median (lowest to highest) of the repeats;"
        " a peer that is better than ours is bold.\n"
    )
    missing = "".join(f"\nNot run: {one}\n" for one in failed)
    return f"{heading}\n{table}{missing}"


def render(runs: Runs) -> str:
    """The whole table."""
    lines = [_line(["", *(TITLES[name] for name in runs.systems)])]
    lines.append(_line("---" for _ in range(len(runs.systems) + 1)))
    for row in ROWS:
        values = {name: row.values(runs, name) for name in runs.systems}
        if any(not isinstance(one, str) or one != NOTHING for one in values.values()):
            title = f"{row.title} ({row.unit})" if row.unit else row.title
            lines.append(_line([title, *cells(values, row.better)]))
    return "\n".join(lines) + "\n"


def cells(values: Mapping[str, Values], better: str) -> list[str]:
    """The cells of one line; those of peers that are better than the best of ours are bold."""
    sign = {"low": 1.0, "high": -1.0, "neither": 0.0}[better]
    scores = {
        name: sign * statistics.median(one)
        for name, one in values.items()
        if not isinstance(one, str)
    }
    best = min((score for name, score in scores.items() if name in OURS), default=None)
    texts = []
    for name, one in values.items():
        text = one if isinstance(one, str) else cell(one)
        wins = best is not None and name not in OURS and scores.get(name, best) < best
        texts.append(f"**{text}**" if wins else text)
    return texts


def cell(values: Sequence[float]) -> str:
    """Median, and the lowest and highest where they differ."""
    median, low, high = (number(one) for one in (statistics.median(values), *_ends(values)))
    return median if low == high else f"{median} ({low} to {high})"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _line(words: Iterable[str]) -> str:
    return "| " + " | ".join(words) + " |"
