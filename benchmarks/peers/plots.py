"""Pictures of the comparison, made to be looked at. Draws what `report` tells; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.peers import measures
from benchmarks.peers.driver import Run
from benchmarks.peers.report import OURS, TITLES, Runs

COLORS: Mapping[str, str] = {
    "ddp": "#7f7f7f",
    "torchrun": "#bc80bd",
    "torchft": "#fdb462",
    "torchft-tuned": "#e6772e",
    "ray": "#80b1d3",
    "ray-elastic": "#4a82ab",
    "ours": "#1b7837",
    "ours-fine": "#7fbf7b",
}
FAULTS: Mapping[str, str] = {
    "kill": "SIGKILL to 1 of 4",
    "kill-2": "SIGKILL to 2 of 4",
    "stop": "SIGSTOP for 30 s",
}
FLOOR_S = 0.01
"""Gaps below are drawn as this, since the axis is logarithmic."""


def draw(runs: Runs, folder: Path) -> list[Path]:
    """Write all pictures for which there are runs; returns their files."""
    made = []
    for name, draw_one, scenario in (
        ("progress", _progress, "faults"),
        ("gaps", _gaps, "faults"),
        ("storm", _progress, "storm"),
    ):
        if any(one.scenario == scenario for one in runs.runs):
            figure = draw_one(runs, scenario)
            file = folder / f"{name}.png"
            figure.savefig(file, dpi=150, bbox_inches="tight")
            plt.close(figure)
            made.append(file)
    return made


def _progress(runs: Runs, scenario: str) -> Any:
    """Samples that count, over time, of the first repeat: a line that is flat stands still."""
    figure, axes = plt.subplots(figsize=(9, 5))
    shown = [run for run in runs.runs if run.scenario == scenario and run.repeat == 0]
    for run in shown:
        times_s, samples = progress(run)
        width = 2.4 if run.system in OURS else 1.4
        label = TITLES[run.system]
        axes.plot(times_s, samples, color=COLORS[run.system], lw=width, label=label)
    longest = max(shown, key=lambda run: run.phases[-1].ended_s - run.phases[0].begun_s)
    axes.set_xlabel("seconds since the system had settled, faults as they came to each")
    axes.set_ylabel("samples trained, each counted once")
    axes.set_title(f"Progress under faults: {', '.join(one.name for one in longest.phases)}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def progress(run: Run) -> tuple[list[float], list[float]]:
    """Seconds, and samples that count: what is rolled back does not rise again until it is new.

    Another start of the system goes on from where the former one ended, as if it had been given a
    checkpoint of its last step; the time in between is left out.
    """
    times_s, samples, offset_s, total = [0.0], [0.0], 0.0, 0.0
    for launch, steps in enumerate(run.launches):
        phases = [one for one in run.phases if one.launch == launch]
        if not phases:
            continue
        begun_s, ended_s, newest = phases[0].begun_s, phases[-1].ended_s, -1
        for one in steps:
            if one.step > newest and one.time_s <= ended_s:
                newest = one.step
                if one.time_s >= begun_s:
                    total += min(run.config["batch"], len(one.samples))
                    times_s.append(offset_s + one.time_s - begun_s)
                    samples.append(total)
        offset_s += ended_s - begun_s
        times_s.append(offset_s)
        samples.append(total)
    return times_s, samples


def _gaps(runs: Runs, scenario: str) -> Any:
    """A group of bars a fault, on a logarithmic axis, with a dot for each repeat."""
    figure, axes = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(runs.systems)
    for place, system in enumerate(runs.systems):
        for group, fault in enumerate(FAULTS):
            costs = runs.costs(system, fault, scenario)
            x = group + (place - (len(runs.systems) - 1) / 2) * width
            _bar(axes, x, width, costs, COLORS[system])
        axes.bar(0, 0, color=COLORS[system], label=TITLES[system])
    axes.set_yscale("log")
    axes.set_ylim(bottom=FLOOR_S)
    axes.set_xticks(range(len(FAULTS)), list(FAULTS.values()))
    axes.set_ylabel("gap beyond the median step, s")
    axes.set_title("How long nothing is committed after a fault (x: it ended)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def _bar(axes: Any, x: float, width: float, costs: list[measures.Cost], color: str) -> None:
    gaps_s = sorted(max(FLOOR_S, one.gap_s) for one in costs if one.gap_s is not None)
    if gaps_s:
        middle = gaps_s[len(gaps_s) // 2]
        axes.bar(x, middle, width * 0.9, color=color)
        axes.scatter([x] * len(gaps_s), gaps_s, s=8, color="black", zorder=3)
        axes.annotate(f"{middle:.2g}", (x, max(gaps_s)), ha="center", va="bottom", fontsize=7)
    elif costs:
        axes.text(x, FLOOR_S * 1.2, "x", ha="center", color=color, weight="bold")
