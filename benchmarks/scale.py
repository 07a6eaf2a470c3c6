"""Goodput on paper, from 8 to 100,000 workers, by published failure rates and measured costs.

    python -m benchmarks.scale [--days 30] [--seeds 5] [--picture FILE] [--out DIR]

Virtual time: hosts of 8 workers fail independently, at exponential intervals. Three ways to go on:

    finish the step    ours: the survivors compute what the lost host had in hand, in the same step
    drop the step      in the manner of TorchFT: the step is lost, a replica group is out until its
                       host is replaced, batches are smaller meanwhile
    restart            in the manner of torchrun and Ray Train: all begin again at a checkpoint,
                       taken as often as is best (Young's rule)

Goodput is the computing that counts over the computing that all workers could have done. Every cost
is an argument with its source beside it; the second panel of the picture shows which ones matter.
Slow hosts, failures that come together and silent corruption are not in it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from numpy.typing import NDArray

from benchmarks.jobs import hand_over
from benchmarks.record import figure
from elastic.report.picture_style import BLUE, FONTS_AND_LINES, MUTED, PAPER

RATE_OF = "RSC-1"
RATES = {"Llama-3": 3.79, "RSC-1": 6.5}
"""Unplanned failures in 1,000 days of a host: arXiv 2407.21783 (419 in 54 days of 2,048 hosts) and
arXiv 2410.21680."""
SIZES = (8, 64, 512, 4096, 16_384, 100_000)
PER_HOST = 8
DAY_S = 86_400.0
EXAMPLE = 16_384

Times = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Hosts that fail at `failures_s`, in order; each is replaced after `replace_s`."""

    num_hosts: int
    failures_s: Times
    horizon_s: float
    replace_s: float

    @staticmethod
    def drawn(
        workers: int, per_1000_days: float, days: float, replace_s: float, seed: int
    ) -> Fleet:
        """Failures of a whole fleet are exponential, too; a host that is out hardly matters."""
        num_hosts, horizon_s = math.ceil(workers / PER_HOST), days * DAY_S
        mean = num_hosts * per_1000_days / 1000 * days
        dice = np.random.default_rng(seed)
        failures_s = np.sort(dice.uniform(0, horizon_s, dice.poisson(mean)))
        return Fleet(
            num_hosts=num_hosts, failures_s=failures_s, horizon_s=horizon_s, replace_s=replace_s
        )

    @property
    def mean_between_s(self) -> float:
        """Between two failures anywhere."""
        return self.horizon_s / max(1, len(self.failures_s))

    def missing(self) -> tuple[Times, NDArray[np.int64]]:
        """How long so many hosts were out, from the first second to the last."""
        ends_s = self.failures_s + self.replace_s
        at_s = np.concatenate([[0.0], self.failures_s, ends_s])
        change = np.concatenate([[0], np.ones(len(ends_s)), -np.ones(len(ends_s))])
        order = np.argsort(at_s, kind="stable")
        until_s = np.append(at_s[order][1:], self.horizon_s)
        lasts_s = np.clip(until_s, None, self.horizon_s) - np.clip(
            at_s[order], None, self.horizon_s
        )
        return lasts_s, np.cumsum(change[order]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Restart:
    """All processes begin again at the newest checkpoint."""

    name: str = "restart"
    restart_s: float = 300.0
    """Until all compute again. 5 to 20 minutes on RSC; 34 to 42 s of Ray Train on one machine."""
    checkpoint_s: float = 5.0
    """What a checkpoint keeps training waiting."""

    def cost_s(self, mean_between_s: float) -> tuple[float, float]:
        """Of one failure, and of a second without any; by Young's rule the sum is least."""
        every_s = math.sqrt(2 * self.checkpoint_s * mean_between_s)
        return self.restart_s + every_s / 2, self.checkpoint_s / every_s

    def goodput(self, fleet: Fleet, step_s: float) -> float:
        """The part of the horizon that counts."""
        lost_s, share = self.cost_s(fleet.mean_between_s)
        counts_s, free_s = 0.0, 0.0  # free: to compute what is new
        for failure_s in fleet.failures_s:
            counts_s += max(0.0, failure_s - free_s)
            free_s = failure_s + lost_s
        counts_s += max(0.0, fleet.horizon_s - free_s)
        return counts_s * (1 - share) / fleet.horizon_s


@dataclass(frozen=True, kw_only=True)
class DropTheStep:
    """Survivors go on with a smaller batch, without the step in which it happened."""

    name: str = "drop the step"
    gap_s: float = 2.0
    """Until the next quorum. 1.0 to 3.1 s of TorchFT with tuned timeouts on one machine."""
    hosts_per_group: int = 4
    """Hosts of a replica group, which holds one copy of the model and is out as a whole."""

    def goodput(self, fleet: Fleet, step_s: float) -> float:
        """The samples that count, over those that all could have computed."""
        lasts_s, out = fleet.missing()
        there = np.clip(1 - out * self.hosts_per_group / fleet.num_hosts, 0, 1)
        lost_s = len(fleet.failures_s) * (self.gap_s + step_s / 2)
        return max(0.0, float(lasts_s @ there) - lost_s) / fleet.horizon_s


@dataclass(frozen=True, kw_only=True)
class FinishTheStep:
    """Survivors compute what was in the lost host's hands; every batch is whole."""

    name: str = "finish the step"
    overhead: float = 1.005
    """Step time over DDP that computes the same micro-batches, 10M parameters: benchmarks.step. It
    is 1.16 over a DDP that computes in one piece what is leased here in 4."""
    micro_batches: int = 4
    """Of each worker, in every step."""
    gap_s: float = 0.9
    """Until a silent host is given up: benchmarks.cluster (.69 to .88 s; a dead one less)."""
    join_steps: float = 0.9
    """What all lose, in steps, when a host comes: benchmarks.cluster."""
    spares: float = 0.001
    """Hosts more than are needed, as a share, rounded down; they compute what is late. Without one
    a step of M micro-batches a worker takes M + 1 of them while a host is missing."""
    recopy_s: float = 60.0
    """Until what a lost host kept has its second copy again; a loss meanwhile is a restart."""
    restart: Restart = field(default_factory=Restart)

    def goodput(self, fleet: Fleet, step_s: float) -> float:
        """The part of the horizon that counts."""
        lasts_s, out = fleet.missing()
        wanted, num_spare = self.micro_batches * fleet.num_hosts, int(self.spares * fleet.num_hosts)
        there = np.clip(fleet.num_hosts + num_spare - out, 1, fleet.num_hosts)
        waves = np.ceil(wanted / there)  # of micro-batches, in a step
        rate = np.where(out < fleet.num_hosts, self.micro_batches / waves, 0.0) / self.overhead
        each_s = self.gap_s + self.overhead * step_s * (1 / self.micro_batches + self.join_steps)
        soon = np.diff(fleet.failures_s) < self.recopy_s
        num_restarts = int(soon.sum()) if fleet.num_hosts > 1 else len(fleet.failures_s)
        restart_s, checkpoints = self.restart.cost_s(
            fleet.horizon_s / max(1, num_restarts)  # as often as is best for what is left to fear
        )
        lost_s = len(fleet.failures_s) * each_s + num_restarts * restart_s
        counts_s = float(lasts_s @ rate) - lost_s / self.overhead
        paid_s = fleet.horizon_s * (1 + num_spare / fleet.num_hosts)
        return max(0.0, counts_s) * (1 - checkpoints) / paid_s


Way = FinishTheStep | DropTheStep | Restart
WAYS: tuple[Way, ...] = (FinishTheStep(), DropTheStep(), Restart())
REPLACE_S, STEP_S = 600.0, 10.0
"""Until a spare host computes in the place of one that is lost; a usual step of a large model."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one goodput is of."""

    way: Way
    workers: int
    per_1000_days: float = RATES[RATE_OF]
    replace_s: float = REPLACE_S
    step_s: float = STEP_S

    def goodputs(self, days: float, seeds: int) -> list[float]:
        """One for each seed."""
        return [
            self.way.goodput(
                Fleet.drawn(self.workers, self.per_1000_days, days, self.replace_s, seed),
                self.step_s,
            )
            for seed in range(seeds)
        ]


def other_batch(workers: int, days: float, seed: int) -> float:
    """The share of time in which a host is missing: dropping then trains on another batch."""
    lasts_s, out = Fleet.drawn(workers, RATES[RATE_OF], days, REPLACE_S, seed).missing()
    return float(lasts_s[out > 0].sum() / lasts_s.sum())


def sensitivity(way: Way) -> Iterator[tuple[str, list[Case]]]:
    """Each assumption at its kindest and at its worst, all others as they are."""
    base = Case(way=way, workers=EXAMPLE)
    yield (
        "failures: Llama-3, twice RSC-1",
        _pair(base, "per_1000_days", RATES["Llama-3"], 2 * RATES[RATE_OF]),
    )
    yield "replaced after 1 min, 1 h", _pair(base, "replace_s", 60.0, 3600.0)
    yield "step of 1 s, 30 s", _pair(base, "step_s", 1.0, 30.0)
    ranges: dict[str, tuple[str, float, float]] = {
        "overhead": ("overhead 1, 1.16", 1.0, 1.16),
        "spares": ("spares .5 %, none", 0.005, 0.0),
        "micro_batches": ("16, 2 micro-batches a worker", 16, 2),
        "recopy_s": ("copied again in 10 s, 10 min", 10.0, 600.0),
        "hosts_per_group": ("replica group of 1, 16 hosts", 1, 16),
        "gap_s": ("gap of .1 s, 30 s", 0.1, 30.0),
        "restart_s": ("restart in 40 s, 20 min", 40.0, 1200.0),
        "checkpoint_s": ("checkpoint of .5 s, 30 s", 0.5, 30.0),
    }
    for name, (label, kind, bad) in ranges.items():
        if name in asdict(way):
            changed: list[dict[str, Any]] = [{name: kind}, {name: bad}]
            yield label, [replace(base, way=replace(way, **one)) for one in changed]


def _pair(base: Case, name: str, *ends: float) -> list[Case]:
    changed: list[dict[str, Any]] = [{name: value} for value in ends]
    return [replace(base, **one) for one in changed]


def table(days: float, seeds: int) -> str:
    """Goodput by size in Markdown, the best of each row in bold."""
    head = " | ".join(way.name for way in WAYS)
    lines = [f"| workers | failures a day | {head} | another batch, if the step is dropped |"]
    lines.append("|---" * (len(WAYS) + 3) + "|")
    for workers in SIZES:
        goodputs = [
            float(np.mean(Case(way=way, workers=workers).goodputs(days, seeds))) for way in WAYS
        ]
        cells = [f"**{one:.3f}**" if one == max(goodputs) else f"{one:.3f}" for one in goodputs]
        a_day = math.ceil(workers / PER_HOST) * RATES[RATE_OF] / 1000
        differs = np.mean([other_batch(workers, days, seed) for seed in range(seeds)])
        lines.append(f"| {workers:,} | {a_day:.3g} | {' | '.join(cells)} | {differs:.1%} |")
    return "\n".join(lines) + "\n"


def draw(days: float, seeds: int, path: Path) -> None:
    """Goodput against size; how far each assumption moves it."""
    colours = (BLUE, "#f08c00", "#52616f")
    with mpl.rc_context(FONTS_AND_LINES):
        picture = Picture(figsize=(13, 5.6), facecolor=PAPER)
        left = picture.add_axes((0.06, 0.12, 0.4, 0.78))
        right = picture.add_axes((0.68, 0.12, 0.3, 0.78))
        sizes = np.unique(np.geomspace(SIZES[0], SIZES[-1], 40).astype(int)).tolist()
        for way, colour in zip(WAYS, colours, strict=True):
            runs = np.array([Case(way=way, workers=n).goodputs(days, seeds) for n in sizes])
            left.plot(sizes, runs.mean(1), color=colour, label=way.name, linewidth=2)
            left.fill_between(sizes, runs.min(1), runs.max(1), color=colour, alpha=0.15, lw=0)
        left.set_xscale("log")
        left.set_ylim(0.6, 1.01)
        left.set_xlabel("workers")
        left.set_title(f"Goodput, failures as on {RATE_OF}")
        left.legend(frameon=False, loc="lower left")
        row, labels = 0, []
        for way, colour in zip(WAYS, colours, strict=True):
            middle = float(np.mean(Case(way=way, workers=EXAMPLE).goodputs(days, seeds)))
            for label, cases in sensitivity(way):
                ends = sorted(float(np.mean(one.goodputs(days, seeds))) for one in cases)
                if ends[1] - ends[0] < 0.0005:
                    continue  # does not matter
                right.barh(row, ends[1] - ends[0], left=ends[0], color=colour, height=0.62)
                right.plot([middle, middle], [row - 0.4, row + 0.4], color=PAPER, lw=1.5)
                labels.append(label)
                row += 1
        right.set_yticks(range(row), labels)
        right.invert_yaxis()
        right.tick_params(axis="y", length=0, labelcolor=MUTED)
        right.set_title(f"{EXAMPLE:,} workers, one assumption at a time")
        right.set_xlabel("goodput")
        FigureCanvasAgg(picture)
        picture.savefig(path, dpi=120)


def main() -> int:
    """Print the table, draw the picture, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="only shows that it works")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    options = parser.parse_args()
    days, seeds = (2.0, 2) if options.quick else (options.days, options.seeds)
    if options.picture is not None:
        draw(days, seeds, options.picture)
    figures = [
        figure(
            f"goodput on paper, {workers:,} workers: {way.name}",
            Case(way=way, workers=workers).goodputs(days, seeds),
            unit="",
            statistic="mean",
        )
        for workers in SIZES
        for way in WAYS
    ]
    config = {"ways": [{"name": one.name, **asdict(one)} for one in WAYS], "days": days}
    hand_over("scale", options, config, figures)
    print(table(days, seeds), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
