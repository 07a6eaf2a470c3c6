"""Pictures of the straggler simulator: time by policy, and which policy wins in which regime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from elastic.core.simulator.stragglers import Cell, Outcome
from elastic.report.picture_style import BLUE, FONTS_AND_LINES, MUTED, PALE_BLUE, PAPER
from policies.coding.simulation import Frc, Scheme

DPI = 130
COLOURS = {
    "uncoded": "#e6e9ee",
    "speculation": "#f4d58d",
    "frc": "#86b6e8",
    "m_sgc": "#a9d6a5",
}


def draw_times(outcomes: Sequence[Outcome], path: Path, title: str) -> Path:
    """Bars: the time of each policy, the fastest in a stronger colour."""
    fastest_s = min(one.total_s for one in outcomes)
    with mpl.rc_context(FONTS_AND_LINES):
        figure = Figure(figsize=(8.5, 0.9 + 0.38 * len(outcomes)), facecolor=PAPER)
        axes = figure.add_axes((0.34, 0.9 / (1.6 + 0.38 * len(outcomes)), 0.6, 0.68))
        names = [one.policy for one in outcomes]
        colours = [BLUE if one.total_s == fastest_s else PALE_BLUE for one in outcomes]
        bars = axes.barh(names, [one.total_s for one in outcomes], color=colours, height=0.7)
        axes.bar_label(bars, fmt="%.0f s", padding=4, color=MUTED)
        axes.invert_yaxis()
        axes.set_xlabel("seconds for all gradients")
        axes.set_xlim(0, 1.12 * max(one.total_s for one in outcomes))
        axes.set_title(title)
        return _save(figure, path)


def draw_map(cells: Sequence[Cell], path: Path, title: str) -> Path:
    """A square per regime: the colour is the policy, the number its time over uncoded."""
    shares = sorted({cell.fixed for cell in cells})
    rates = sorted({cell.straggler_rate for cell in cells})
    with mpl.rc_context(FONTS_AND_LINES):
        figure = Figure(figsize=(10, 6.2), facecolor=PAPER)
        axes = figure.add_axes((0.09, 0.1, 0.72, 0.82))
        for cell in cells:
            column, row = rates.index(cell.straggler_rate), shares.index(cell.fixed)
            colour = COLOURS[cell.scheme.kind]
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=PAPER))
            text = f"{_parameters(cell.scheme)}\n{cell.ratio:.2f}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
        axes.set_xlim(0, len(rates))
        axes.set_ylim(0, len(shares))
        axes.set_xticks([one + 0.5 for one in range(len(rates))], [f"{one:.1%}" for one in rates])
        axes.set_yticks([one + 0.5 for one in range(len(shares))], [f"{one:g}" for one in shares])
        axes.set_xlabel("share of answers that straggle")
        axes.set_ylabel("share of a task's time that does not shrink with its load")
        axes.set_title(title)
        kinds = [kind for kind in COLOURS if any(cell.scheme.kind == kind for cell in cells)]
        patches = [Patch(color=COLOURS[kind], label=kind) for kind in kinds]
        axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return _save(figure, path)


def _parameters(scheme: Scheme) -> str:
    if isinstance(scheme, Frc):
        return f"s={scheme.stragglers}"
    if scheme.kind == "m_sgc" or scheme.kind == "sr_sgc":
        return f"({scheme.burst},{scheme.window},{scheme.distinct})"
    return scheme.kind


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
    return path
