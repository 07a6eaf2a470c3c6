"""Colours, markers and fonts of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from elastic.report.marks import (
    AGGREGATOR,
    CHECKPOINT,
    COORDINATOR,
    JOB,
    JOIN,
    KILL,
    LEAVE,
    LOST,
    NAN,
    SLOW,
    STOP,
    VERDICT,
    Mark,
)

WIDTH_IN = 15.0
LINE_IN = 0.19
"""Height of a line in the list of events."""

INK, MUTED, FAINT, PAPER = "#1d2733", "#6b7785", "#e6e9ee", "#ffffff"
BLUE, PALE_BLUE, ALIVE, REFUSED = "#2463a8", "#86b6e8", "#eef1f5", "#b9bfc9"

STYLES: dict[str, tuple[str, str]] = {
    KILL: ("X", "#d62839"),
    LOST: ("x", "#d62839"),
    STOP: ("s", "#f08c00"),
    SLOW: ("d", "#c9a400"),
    NAN: ("P", "#d6336c"),
    AGGREGATOR: ("D", "#7b2cbf"),
    COORDINATOR: ("p", "#0b8a8f"),
    JOIN: ("^", "#2b9348"),
    LEAVE: ("v", "#52616f"),
    CHECKPOINT: ("|", "#9aa5b1"),
    JOB: ("*", "#1d2733"),
    VERDICT: ("h", "#b3001b"),
}
"""Marker and colour of each category of event, in the order of the legend."""

FONTS_AND_LINES: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": "#b8c0ca",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.5,
}


def by_category(marks: Sequence[Mark]) -> Iterator[tuple[str, list[Mark]]]:
    """The marks of each category that occurs, in the order of the legend."""
    for category in STYLES:
        same = [mark for mark in marks if mark.category == category]
        if same:
            yield category, same
