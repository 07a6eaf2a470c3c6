"""Workers by time: how much longer than its peers each one computed, as a picture.

Reads a diagnosis, draws without a screen. Never judges anything.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from elastic.report.diagnosis import Cause, Diagnosis
from elastic.report.excess import RANGE, cells_of
from elastic.report.picture_style import ALIVE, BLUE, FONTS_AND_LINES, INK, MUTED, PAPER, WIDTH_IN
from elastic.report.trace import Ints

DPI = 130
MOST_LISTED = 9
TOP_IN = 2.8
"""Where the map begins, in inches from above."""

COLOURS = LinearSegmentedColormap.from_list(
    "excess", ["#1b4f8f", "#8fb8de", "#f4f4f1", "#f0a35e", "#b3001b"]
)
_PARTS = {
    "productive": BLUE,
    "recomputed": "#86b6e8",
    "waiting": "#c9cfd6",
    "coordination": "#9aa5b1",
    "recovery": "#d62839",
    "checkpoint": "#7b2cbf",
    "evaluation": "#0b8a8f",
    "start-up": "#f08c00",
    "other": "#1d2733",
}


def draw_heatmap(diagnosis: Diagnosis, title: str, path: Path) -> Path:
    """Draw the picture as a PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(FONTS_AND_LINES):
        figure = _draw(diagnosis, title)
        figure.savefig(path, dpi=DPI, facecolor=PAPER)
    return path


def _draw(diagnosis: Diagnosis, title: str) -> Figure:
    workers = np.unique(diagnosis.records.worker_B)
    listed = [one for one in diagnosis.causes if one.reason][:MOST_LISTED]
    map_in = float(np.clip(0.32 * len(workers), 2.2, 6.5))
    list_in = 0.3 + 0.21 * max(len(listed), 1)
    height_in = TOP_IN + map_in + 0.9 + list_in
    figure = Figure(figsize=(WIDTH_IN, height_in))
    FigureCanvasAgg(figure)
    figure.text(0.05, 1 - 0.32 / height_in, title, fontsize=15, fontweight="bold", color=INK)
    goodput = f"goodput {diagnosis.account.goodput:.1%} of {diagnosis.account.wall_s:.1f} s"
    figure.text(0.95, 1 - 0.32 / height_in, goodput, fontsize=12, ha="right", color=MUTED)

    def panel(top_in: float, tall_in: float, right: float = 0.95) -> Axes:
        low = 1 - (top_in + tall_in) / height_in
        return figure.add_axes((0.07, low, right - 0.07, tall_in / height_in))

    _bar(panel(0.62, 0.26), diagnosis)
    steps, heat = panel(1.55, 0.85, 0.9), panel(TOP_IN, map_in, 0.9)
    _steps(steps, diagnosis)
    image = _heat(heat, diagnosis, workers)
    scale = figure.add_axes(
        (0.915, 1 - (TOP_IN + map_in) / height_in, 0.012, min(map_in, 2.4) / height_in)
    )
    bar = figure.colorbar(image, cax=scale, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.ax.set_yticklabels(["-100 %", "-50 %", "as its peers", "+50 %", "twice as long"])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    steps.sharex(heat)
    steps.tick_params(labelbottom=False)
    _list(panel(TOP_IN + map_in + 0.75, list_in), listed)
    return figure


def _bar(axes: Axes, diagnosis: Diagnosis) -> None:
    """The account: one bar, as long as the wall time."""
    left, handles = 0.0, []
    for part, colour in _PARTS.items():
        share = diagnosis.account.share(part)
        if share > 0:
            axes.barh([0], [share], left=left, color=colour, height=1.0, linewidth=0)
            left += share
        if share >= 0.0005:
            handles.append(Patch(facecolor=colour, label=f"{part} {share:.1%}"))
    axes.set_xlim(0, max(left, 1e-9))
    axes.set_ylim(-0.5, 0.5)
    axes.set_axis_off()
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(-0.005, -0.1), ncols=9, columnspacing=1.4
    )


def _steps(axes: Axes, diagnosis: Diagnosis) -> None:
    records = diagnosis.records
    took_s = records.end_s_S - records.begin_s_S
    axes.plot(records.end_s_S, took_s, color=BLUE, linewidth=0.9)
    axes.axhline(diagnosis.usual_step_s, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    highest = float(np.percentile(took_s, 99.5))
    axes.set_ylim(0, 1.15 * max(highest, diagnosis.usual_step_s))
    axes.set_title("Step time, seconds; dashed: usual")


def _heat(axes: Axes, diagnosis: Diagnosis, workers: Ints) -> mpl.cm.ScalarMappable:
    """Cells are as wide as the steps in them took."""
    records = diagnosis.records
    edges_s, rows, cells = cells_of(records, workers)
    axes.set_facecolor(ALIVE)
    image = axes.pcolormesh(
        edges_s, rows, np.ma.masked_invalid(cells), cmap=COLOURS, vmin=-RANGE, vmax=RANGE
    )
    axes.set_ylim(len(workers) - 0.5, -0.5)
    axes.set_xlim(0, records.end_s)
    every = max(1, round(len(workers) / 20))
    axes.set_yticks(
        range(0, len(workers), every), [f"worker-{one}" for one in workers[::every].tolist()]
    )
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(
        "How much longer than its peers each worker computed a micro-batch (blank: none)"
    )
    axes.set_xlabel("seconds since the start", labelpad=1)
    for cause in diagnosis.causes:
        _frame(axes, cause, workers)
    return image


def _frame(axes: Axes, cause: Cause, workers: Ints) -> None:
    """A frame around an episode of a worker; a cross where something happened to it."""
    if cause.worker is None or cause.worker not in workers:
        if cause.worker is None and cause.begin_s == cause.end_s and cause.what != "slow steps":
            axes.axvline(cause.begin_s, color=INK, linewidth=0.8, alpha=0.6)
        return
    row = int(np.searchsorted(workers, cause.worker))
    if cause.end_s > cause.begin_s:
        place = (cause.begin_s, row - 0.5)
        wide_s = cause.end_s - cause.begin_s
        axes.add_patch(Rectangle(place, wide_s, 1, fill=False, edgecolor=INK, linewidth=1.3))
    else:
        axes.plot(
            [cause.begin_s], [row], "X", color=INK, markersize=7, markeredgecolor=PAPER, zorder=5
        )


def _list(axes: Axes, causes: list[Cause]) -> None:
    axes.set_axis_off()
    axes.set_title("What it cost, the most expensive first" if causes else "Nothing slowed it down")
    for row, cause in enumerate(causes):
        high = 1 - (row + 0.5) / max(len(causes), 1)
        when = f"{cause.begin_s:.1f} s"
        axes.text(0.0, high, f"{cause.cost_s:.2f} s", fontsize=9, fontweight="bold", va="center")
        axes.text(0.06, high, when, fontsize=9, color=MUTED, va="center")
        axes.text(0.13, high, cause.what, fontsize=9, va="center")
        reason = cause.reason if len(cause.reason) <= 125 else cause.reason[:124] + "…"
        axes.text(0.29, high, reason, fontsize=9, color=MUTED, va="center")
