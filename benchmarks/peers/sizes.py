"""DDP and ours against parameters and workers: step time, memory, start; a table and a picture.

    python -m benchmarks.peers.sizes [--sizes small,10m,100m] [--workers 1,2,4,8] [--quick]

Undisturbed runs. Resumable, as the rest of the comparison, of whose hour this is no part.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.jobs import chosen, say
from benchmarks.peers import measures, report
from benchmarks.peers.__main__ import one, prepare, run_missing
from benchmarks.peers.driver import Run, read_run
from benchmarks.peers.plots import COLORS
from benchmarks.peers.scenarios import CALM, Scenario
from benchmarks.peers.settings import BATCH, SIZES, THREADS, WORKERS
from benchmarks.peers.systems import SYSTEMS

OUT = Path("runs/peers/sizes")
DEFAULT_SYSTEMS = ("ddp", "ours")
CALM_S: Mapping[str, float] = {"small": 8, "10m": 15, "100m": 60}
"""How long each run is looked at."""

Cell = tuple[str, int]
"""A size and a number of workers."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(SIZES), help="separated by commas")
    parser.add_argument("--workers", default=",".join(map(str, WORKERS)), help="likewise")
    parser.add_argument("--systems", default=",".join(DEFAULT_SYSTEMS), help="likewise")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="everything once")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(words)
    options.workers = [int(one) for one in options.workers.split(",")]
    options.sizes = chosen(parser, options, SIZES, "sizes")
    options.systems = chosen(parser, options, SYSTEMS, "systems")
    wrong = [one for one in options.workers if one < 1 or min(BATCH.values()) % one]
    if wrong:
        parser.error(f"--workers: {wrong[0]} do not share {min(BATCH.values())} samples equally")
    options.repeats = 1 if options.quick else options.repeats
    options.out = options.out.absolute()
    return options


def run_all(options: argparse.Namespace) -> list[str]:
    """All runs that are not there yet, systems in turn. Returns what failed, in words."""
    return run_missing(options.out, _runs(options))


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Run]]]:
    cells = itertools.product(options.sizes, options.workers, range(options.repeats))
    for size, num, repeat in cells:
        scenario = Scenario(name="sizes", repeats=1, phases=(replace(CALM, lasts_s=CALM_S[size]),))
        given = argparse.Namespace(
            size=size, workers=num, batch=BATCH[size], checkpoint_every=10, out=options.out
        )
        for system in options.systems:
            yield f"{size}-{num}-{repeat}-{system}", partial(one, given, system, scenario, repeat)


class Grid:
    """The runs, by what they are."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs: dict[tuple[str, Cell], list[Run]] = {}
        for run in runs:
            cell = run.config["size"], run.config["workers"]
            self._runs.setdefault((run.system, cell), []).append(run)
        self.systems = [name for name in report.TITLES if any(key[0] == name for key in self._runs)]
        order = list(SIZES)
        cells = {cell for _, cell in self._runs}
        self.cells = sorted(cells, key=lambda cell: (order.index(cell[0]), cell[1]))

    def values(self, system: str, cell: Cell, get: Callable[[Run], float]) -> list[float]:
        return [get(run) for run in self._runs.get((system, cell), ())]

    def ratios(self, system: str, cell: Cell) -> list[float]:
        """Step times over the median one of DDP."""
        theirs = self.values(report.DDP, cell, step_s)
        mine = self.values(system, cell, step_s)
        return [value / statistics.median(theirs) for value in mine] if theirs else []


def step_s(run: Run) -> float:
    """The median time between two commits."""
    return measures.calm_step_s(run)


def memory_mib(run: Run) -> float:
    """The proportional set size of all processes of the system."""
    return run.memory["total"] / 2**20


def start_s(run: Run) -> float:
    return run.start_s[0]


def render(grid: Grid) -> str:
    """A table for each figure. A peer that is better than ours is bold."""
    figures: Mapping[str, tuple[str, Callable[[str, Cell], list[float]]]] = {
        "step time (s)": ("low", lambda system, cell: grid.values(system, cell, step_s)),
        "step time / DDP's": ("low", grid.ratios),
        "memory of all processes (MiB)": (
            "low",
            lambda system, cell: grid.values(system, cell, memory_mib),
        ),
        "from the start until all workers have taken 5 steps (s)": (
            "neither",
            lambda system, cell: grid.values(system, cell, start_s),
        ),
    }
    texts = []
    for title, (better, get) in figures.items():
        lines = [
            _line([title, *(report.TITLES[name] for name in grid.systems)]),
            _line("---" for _ in range(len(grid.systems) + 1)),
        ]
        for cell in grid.cells:
            values = {name: get(name, cell) or report.NOTHING for name in grid.systems}
            lines.append(_line([_title(cell), *report.cells(values, better)]))
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def _title(cell: Cell) -> str:
    size, num = cell
    return f"{_millions(size)}, {num} worker{'s' if num > 1 else ''}"


def _millions(size: str) -> str:
    return f"{SIZES[size] / 1e6:.3g}M"


def _line(words: Iterable[str]) -> str:
    return "| " + " | ".join(words) + " |"


def draw(grid: Grid, file: Path) -> Path:
    """A column for each number of workers: step time and memory against parameters."""
    columns = sorted({num for _, num in grid.cells})
    rows: Sequence[tuple[str, Callable[[Run], float]]] = (
        ("step, s", step_s),
        ("memory, MiB", memory_mib),
    )
    figure, panels = plt.subplots(
        2, len(columns), figsize=(3 * len(columns) + 1, 6), sharex=True, sharey="row", squeeze=False
    )
    for panel_row, (label, get) in zip(panels, rows, strict=True):
        for axes, num in zip(panel_row, columns, strict=True):
            for system in grid.systems:
                _draw_line(axes, grid, system, num, get)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panel_row[0].set_ylabel(label)
    for axes, num in zip(panels[0], columns, strict=True):
        axes.set_title(f"{num} worker{'s' if num > 1 else ''}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("parameters")
    panels[0][0].legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return file


def _draw_line(axes: Any, grid: Grid, system: str, num: int, get: Callable[[Run], float]) -> None:
    sizes = [size for size, workers in grid.cells if workers == num]
    points = [(SIZES[size], grid.values(system, (size, num), get)) for size in sizes]
    found = [(x, values) for x, values in points if values]
    if not found:
        return
    middle = [statistics.median(values) for _, values in found]
    ours = system in report.OURS
    axes.plot(
        [x for x, _ in found],
        middle,
        color=COLORS[system],
        lw=2.2 if ours else 1.3,
        marker="o",
        ms=4,
        label=report.TITLES[system],
        zorder=3 if ours else 2,
    )
    for x, values in found:
        axes.scatter([x] * len(values), values, s=8, color=COLORS[system])


def hand_over(options: argparse.Namespace, failed: Sequence[str]) -> str:
    """Write the table and the picture; returns the table."""
    grid = Grid(read_run(file) for file in sorted(options.out.glob("*-*-*.json")))
    batches = ", ".join(f"{BATCH[size]} at {_millions(size)}" for size in SIZES)
    what = f"{THREADS} thread a worker, batch of {batches}"
    table = report.headed(what, render(grid), failed)
    (options.out / "sizes.md").write_text(table, encoding="utf-8")
    if grid.cells:
        say(f"written: {draw(grid, options.out / 'sizes.png')}")
    return table


def main() -> int:
    """Run what is missing, then write the table. 1 if something did not run."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    prepare()
    failed = run_all(options)
    print(hand_over(options, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
