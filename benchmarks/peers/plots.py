"""Pictures of the comparison, made to be looked at. Draws what `report` tells; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.peers import measures
from benchmarks.peers.driver import Run, Seen
from benchmarks.peers.report import OURS, TITLES, Runs
from benchmarks.peers.scenarios import STORM_PAUSE_S

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
BEFORE_S, AFTER_S = 4.0, 45.0
FLOOR_S = 0.01
"""Gaps below are drawn as this, since the axis is logarithmic."""


def draw(runs: Runs, folder: Path) -> list[Path]:
    """Write all pictures for which there are runs; returns their files."""
    made = []
    for name, draw_one, scenario in (
        ("after-faults", _after_faults, "faults"),
        ("gaps", _gaps, "faults"),
        ("storm", _storm, "storm"),
    ):
        if any(one.scenario == scenario for one in runs.runs):
            figure = draw_one(runs, scenario)
            file = folder / f"{name}.png"
            figure.savefig(file, dpi=150, bbox_inches="tight")
            plt.close(figure)
            made.append(file)
    return made


def _after_faults(runs: Runs, scenario: str) -> Any:
    """A panel a fault: samples that count from shortly before it on, each repeat a line."""
    figure, panels = plt.subplots(1, len(FAULTS), figsize=(12, 4), sharey=True)
    for axes, (fault, title) in zip(panels, FAULTS.items(), strict=True):
        for run in runs.runs:
            for seen in run.phases:
                if run.scenario == scenario and seen.name == fault:
                    times_s, samples = progress(run, seen)
                    num = sum(one <= AFTER_S for one in times_s)
                    axes.plot(times_s[:num], samples[:num], **_style(run))
        axes.axvline(0, color="black", lw=0.8, ls=":")
        axes.set_xlim(-BEFORE_S, AFTER_S)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("seconds since the fault")
        _tidy(axes)
    panels[0].set_ylabel("samples since then, each counted once")
    _legend(figure, panels[0])
    return figure


def _storm(runs: Runs, scenario: str) -> Any:
    """Samples that count, over the whole of it; where the faults strike is dotted."""
    figure, axes = plt.subplots(figsize=(9, 5))
    longest_s = 0.0
    for run in runs.runs:
        for seen in run.phases:
            if run.scenario == scenario and seen.name == "storm":
                axes.plot(*progress(run, seen), **_style(run))
                longest_s = max(longest_s, seen.ended_s - seen.begun_s)
    for number in range(int(longest_s // STORM_PAUSE_S) + 1):
        axes.axvline(number * STORM_PAUSE_S, color="black", lw=0.8, ls=":")
    axes.set_xlabel("seconds; a worker is killed at each dotted line")
    axes.set_ylabel("samples trained, each counted once")
    _tidy(axes)
    _legend(figure, axes)
    return figure


def _style(run: Run) -> dict[str, Any]:
    ours = run.system in OURS
    return {
        "color": COLORS[run.system],
        "drawstyle": "steps-post",
        "lw": 2.2 if ours else 1.3,
        "zorder": 3 if ours else 2,
        "label": TITLES[run.system],
    }


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, axes: Any) -> None:
    """One entry a system, below the picture."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=4,
        frameon=False,
    )


def progress(run: Run, seen: Seen) -> tuple[list[float], list[float]]:
    """Seconds since a fault, and samples that count since then, negative before it.

    A step that is done again after a rollback counts no second time, so the line is flat there.
    """
    times_s, samples, total, newest = [], [], 0.0, -1
    before = 0.0
    for one in run.launches[seen.launch]:
        if one.step > newest and one.time_s <= seen.ended_s:
            newest = one.step
            total += min(run.config["batch"], len(one.samples))
            before = total if one.time_s <= seen.begun_s else before
            if one.time_s >= seen.begun_s - BEFORE_S:
                times_s.append(one.time_s - seen.begun_s)
                samples.append(total)
    lasted_s = seen.ended_s - seen.begun_s
    return [*times_s, lasted_s], [one - before for one in [*samples, total]]


def _gaps(runs: Runs, scenario: str) -> Any:
    """A group of bars a fault, on a logarithmic axis, with a dot for each repeat."""
    figure, axes = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(runs.systems)
    for place, system in enumerate(runs.systems):
        for group, fault in enumerate(FAULTS):
            costs = runs.costs(system, fault, scenario)
            x = group + (place - (len(runs.systems) - 1) / 2) * width
            _bar(axes, x, width, costs, COLORS[system])
        axes.bar(0, FLOOR_S, width=0, color=COLORS[system], label=TITLES[system])
    axes.set_yscale("log")
    axes.set_ylim(bottom=FLOOR_S)
    axes.set_xticks(range(len(FAULTS)), list(FAULTS.values()))
    axes.set_ylabel("gap beyond the median step, s")
    axes.set_title("How long nothing is committed after a fault (x: it ended)", fontsize=10)
    _tidy(axes)
    _legend(figure, axes)
    return figure


def _bar(axes: Any, x: float, width: float, costs: list[measures.Cost], color: str) -> None:
    gaps_s = [max(FLOOR_S, one.gap_s) for one in costs if one.gap_s is not None]
    if gaps_s:
        middle = statistics.median(gaps_s)
        axes.bar(x, middle, width * 0.9, color=color)
        axes.scatter([x] * len(gaps_s), gaps_s, s=8, color="black", zorder=3)
        axes.annotate(f"{middle:.2g}", (x, max(gaps_s)), ha="center", va="bottom", fontsize=7)
    elif costs:
        axes.text(x, FLOOR_S * 1.2, "x", ha="center", color=color, weight="bold")
