"""What verdicts of real jobs are worth: which fault was called what, how soon, who else was blamed.

Shared by the benchmarks that strike jobs; injects nothing itself.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import RUNS, hand_over, say
from benchmarks.record import RESULTS, Figure, figure

WRONG, HANG_STEPS, SLOW_STEPS = 0.05, 3.0, 10.0
"""Limits of issue 6."""
NOTHING = "nothing"
GONE = "its process is gone"
FAILED = "the job failed"
"""Counts as not named right; the others are struck all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A kind of fault: what it has to be called, and within how many of its units."""

    name: str
    says: str
    limit: float | None = None
    unit: str = "steps"


@dataclass(frozen=True, slots=True)
class Injection:
    """What came of one fault. `called`: the first verdict's kind; `took` until then, in the unit of
    its kind; `others`: verdicts on somebody else."""

    kind: str
    called: str
    took: float | None
    others: tuple[str, ...]


def kept_of(what: str, options: argparse.Namespace, kinds: Sequence[Asked]) -> Kept:
    """What a benchmark has found with this seed."""
    return Kept(RUNS / f"{what}-{options.seed}{'-quick' * options.quick}.jsonl", kinds)


class Kept:
    """What came of each fault, in a file: a line for each. So a benchmark that is begun again with
    the same seed goes on where it was."""

    def __init__(self, path: Path, kinds: Sequence[Asked]) -> None:
        self._path, self._kinds = path, kinds
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._found = {(one["round"], one["kind"]): one for one in map(json.loads, lines)}

    def __contains__(self, place: tuple[int, str]) -> bool:
        return place in self._found

    def add(self, number: int, injection: Injection) -> None:
        line = {"round": number, **asdict(injection)}
        self._found[number, injection.kind] = line
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def injections(self) -> list[tuple[Asked, Injection]]:
        """All, kind by kind."""
        return [
            (kind, Injection(kind.name, one["called"], one["took"], tuple(one["others"])))
            for kind in self._kinds
            for (_, name), one in sorted(self._found.items())
            if name == kind.name
        ]


def parse(doc: str | None, kinds: Sequence[Asked], *, healthy_minutes: float) -> argparse.Namespace:
    """Read the command line. `healthy_minutes`: the default."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    names = [kind.name for kind in kinds]
    parser.add_argument("--quick", action="store_true", help="each once: only shows that it works")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--times", type=int, default=10, help="injections of each kind")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="kinds")
    parser.add_argument(
        "--healthy-minutes",
        type=float,
        default=healthy_minutes,
        help=f"of a job that nothing happens to; default: {healthy_minutes:g}",
    )
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULTS}")
    options = parser.parse_args()
    options.times = 1 if options.quick else options.times
    say(f"seed {options.seed}")
    return options


def report(
    what: str, options: argparse.Namespace, kept: Kept, false: Sequence[str] | None, **config: int
) -> None:
    """Hand over what was found. `false` as of `figures_of`; `config`: what was struck."""
    injections = kept.injections()
    config |= {"seed": options.seed, "times": options.times}
    told = {**config, **summary([one for _, one in injections])}
    told["verdicts of the healthy job"] = false
    hand_over(what, options, told, figures_of(injections, false))


def figures_of(
    injections: Sequence[tuple[Asked, Injection]], false: Sequence[str] | None
) -> list[Figure]:
    """What issue 6 asks for. `false`: verdicts of a job that nothing happened to, if one ran."""
    wrong = [float(one.called != kind.says or bool(one.others)) for kind, one in injections]
    name = "faults that were not named right"
    figures = [figure(name, wrong, unit="", limit=WRONG, statistic="mean")]
    if false is not None:
        number = [float(len(false))]
        figures.append(figure("verdicts of the healthy job", number, unit="", limit=0.0))
    for kind in {kind.name: kind for kind, _ in injections}.values():
        took = [one.took for _, one in injections if one.kind == kind.name and one.took is not None]
        if took:
            name = f"{kind.unit} to the verdict: {kind.name}"
            figures.append(figure(name, took, unit=kind.unit, limit=kind.limit))
    return figures


def summary(injections: Sequence[Injection]) -> dict[str, Any]:
    """For the record of a benchmark."""
    return {
        "confusion": confusion(injections),
        "verdicts on others": dict(Counter(name for one in injections for name in one.others)),
    }


def confusion(injections: Sequence[Injection]) -> dict[str, int]:
    """How often which fault was called what."""
    counts = Counter(f"{one.kind} -> {one.called}" for one in injections)
    return dict(sorted(counts.items()))


def matrix(injections: Sequence[Injection]) -> str:
    """The same to be read: a row for each kind of fault, a column for what it was called.

    `others`: how often somebody else was blamed besides.
    """
    counts = Counter((one.kind, one.called) for one in injections)
    kinds = list(dict.fromkeys(one.kind for one in injections))
    called = sorted({name for _, name in counts})
    others = Counter(dict.fromkeys(kinds, 0))
    others.update(one.kind for one in injections for _ in one.others)
    rows = [["fault", *called, "others"]]
    rows += [
        [kind, *(str(counts[kind, one]) for one in called), str(others[kind])] for kind in kinds
    ]
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(num) for cell, num in zip(row, wide, strict=True)) for row in rows
    ]
    return "\n".join(lines)
