"""The timeline of the picture: a row for each worker, what it computed, and what befell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from elastic.report.marks import CHECKPOINT, Mark
from elastic.report.picture_style import (
    ALIVE,
    BLUE,
    INK,
    LINE_IN,
    MUTED,
    PALE_BLUE,
    PAPER,
    REFUSED,
    STYLES,
    by_category,
)
from elastic.report.story import Story, Work, busy_share

MIN_BAR = 0.0025
"""Where micro-batches are a smaller part of the width, shares of time are drawn instead."""
MAX_LISTED = 18
"""Events spelled out beside the zoomed timeline, more where it is high enough."""
MAX_LABEL_CHARS = 38
NUM_BINS = 1500
"""Columns of the timeline of a long run."""


def workers_in(story: Story, window: tuple[float, float]) -> list[int]:
    """Workers that belong to the job at some time of the window, sorted."""
    start_s, end_s = window
    return sorted({life[0] for life in story.lives if life[1] <= end_s and life[2] >= start_s})


def draw_whole_timeline(axes: Axes, story: Story, zoom: tuple[float, float]) -> None:
    """The timeline of the whole run, with a frame around the part shown larger."""
    in_shares = draw_timeline(axes, story, (story.first_step_s, story.end_s))
    axes.set_title(
        "What each worker did, whole run"
        + (" (the darker, the larger the share of its time at work)" if in_shares else "")
    )
    axes.add_patch(_frame(zoom, axes.get_ylim()))


def draw_timeline(axes: Axes, story: Story, window: tuple[float, float]) -> bool:
    """One row a worker, from the top: when it lived, what it computed, what befell it.

    Returns whether bars would have been too thin, so that shares of time are drawn instead.
    """
    start_s, end_s = window
    rows = {worker: row for row, worker in enumerate(workers_in(story, window))}
    for worker, joined_s, gone_s in story.lives:
        if worker in rows:
            place = (joined_s, rows[worker] - 0.42)
            axes.add_patch(Rectangle(place, gone_s - joined_s, 0.84, color=ALIVE, linewidth=0))
    work = story.work.between(start_s, end_s)
    least_s = MIN_BAR * (end_s - start_s)
    in_shares = len(work.worker) > 0 and bool(np.median(work.end_s - work.start_s) < least_s)
    if in_shares:
        _shares(axes, story, rows, window)
    else:
        _bars(axes, work, rows)
    _event_marks(axes, story.marks, rows, window)
    axes.set_xlim(start_s, end_s)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    every = max(1, round(len(rows) / 20))
    axes.set_yticks(
        list(rows.values())[::every], [f"worker-{worker}" for worker in list(rows)[::every]]
    )
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds since the start", labelpad=1)
    return in_shares


def _bars(axes: Axes, work: Work, rows: dict[int, int]) -> None:
    """One bar a micro-batch; neighbouring steps differ in shade."""
    for granted, odd, face, hatch in (
        (True, 0, BLUE, None),
        (True, 1, PALE_BLUE, None),
        (False, None, REFUSED, "//////"),
    ):
        chosen = work.granted == granted
        if odd is not None:
            chosen &= work.step % 2 == odd
        corners = [
            [(start, row - 0.3), (end, row - 0.3), (end, row + 0.3), (start, row + 0.3)]
            for start, end, row in zip(
                work.start_s[chosen],
                work.end_s[chosen],
                [rows[worker] for worker in work.worker[chosen].tolist()],
                strict=True,
            )
        ]
        axes.add_collection(
            PolyCollection(
                corners,
                facecolors=face,
                edgecolors=PAPER if hatch is None else "#8b95a2",
                linewidths=0.4,
                hatch=hatch,
                zorder=2,
            ),
            autolim=False,
        )


_SHARE_COLOURS = LinearSegmentedColormap.from_list("share", [ALIVE, PALE_BLUE, BLUE])


def _shares(axes: Axes, story: Story, rows: dict[int, int], window: tuple[float, float]) -> None:
    """For a long run: the darker, the larger the share of time at work."""
    edges_s = np.linspace(*window, NUM_BINS + 1)
    for worker, row in rows.items():
        share = busy_share(story.work, worker, edges_s)
        own = [life for life in story.lives if life[0] == worker]
        middle_s = (edges_s[1:] + edges_s[:-1]) / 2
        alive = np.any([(middle_s >= life[1]) & (middle_s <= life[2]) for life in own], axis=0)
        axes.imshow(
            np.ma.masked_array(share, ~alive & (share == 0))[None, :],
            extent=(window[0], window[1], row + 0.36, row - 0.36),
            cmap=_SHARE_COLOURS,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            zorder=2,
        )


def _event_marks(
    axes: Axes, marks: Sequence[Mark], rows: dict[int, int], window: tuple[float, float]
) -> None:
    """Marks on the rows of their workers; those of no worker as lines through all rows."""
    inside = [mark for mark in marks if window[0] <= mark.time_s <= window[1]]
    for category, same in by_category(inside):
        marker, colour = STYLES[category]
        whole = [mark.time_s for mark in same if mark.worker not in rows]
        if category == CHECKPOINT:
            axes.vlines(
                whole, 0, 0.025, colour, transform=axes.get_xaxis_transform(), linewidth=1.6
            )
            continue
        axes.vlines(
            whole,
            0,
            1,
            colour,
            transform=axes.get_xaxis_transform(),
            linewidth=1.1,
            alpha=0.75,
            zorder=3,
        )
        own = _apart([mark for mark in same if mark.worker in rows], 0.01 * (window[1] - window[0]))
        axes.plot(
            [mark.time_s for mark in own],
            [rows[mark.worker] for mark in own if mark.worker is not None],
            marker,
            color=colour,
            markersize=8,
            markeredgecolor=colour if marker == "x" else PAPER,
            markeredgewidth=2.0 if marker == "x" else 0.8,
            zorder=5,
            clip_on=False,
        )


def _apart(marks: Sequence[Mark], apart_s: float) -> list[Mark]:
    """Leave out marks that would hide behind an earlier one of their kind and worker."""
    kept: dict[int | None, list[Mark]] = {}
    for mark in marks:
        own = kept.setdefault(mark.worker, [])
        if not own or mark.time_s - own[-1].time_s >= apart_s:
            own.append(mark)
    return [mark for own in kept.values() for mark in own]


def _frame(zoom: tuple[float, float], limits: tuple[float, float]) -> Rectangle:
    low, high = limits
    return Rectangle(
        (zoom[0], low),
        zoom[1] - zoom[0],
        high - low,
        facecolor="none",
        edgecolor=INK,
        linewidth=1.2,
        zorder=6,
        clip_on=False,
    )


def draw_legend(axes: Axes, story: Story) -> None:
    """What bars and marks mean; only what occurs."""
    axes.set_axis_off()
    handles: list[Any] = [
        Patch(facecolor=BLUE, label="micro-batch, even step"),
        Patch(facecolor=PALE_BLUE, label="odd step"),
    ]
    if not story.work.granted.all():
        handles.append(
            Patch(
                facecolor=REFUSED,
                edgecolor="#8b95a2",
                hatch="//////",
                label="refused: another was first",
            )
        )
    handles.append(Patch(facecolor=ALIVE, edgecolor="#c9d0d9", label="waiting"))
    for category, _ in by_category(story.marks):
        marker, colour = STYLES[category]
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker=marker,
                color=colour,
                markersize=8,
                markeredgewidth=2.0 if marker in "x|" else 0.5,
                label=category,
            )
        )
    axes.legend(
        handles=handles, loc="center left", bbox_to_anchor=(-0.008, 0.5), ncols=7, columnspacing=1.6
    )


_Line = tuple[int, Mark]
"""A number that neighbouring marks share, and one of them."""


def listed(story: Story, window: tuple[float, float]) -> list[_Line]:
    """The marks of a window, numbered from 1; those too close for two numbers share one."""
    lines: list[_Line] = []
    apart_s, first_s = 0.022 * (window[1] - window[0]), -np.inf
    for mark in sorted(story.marks, key=lambda mark: mark.time_s):
        if mark.category == CHECKPOINT or not window[0] <= mark.time_s <= window[1]:
            continue
        number = lines[-1][0] if lines else 0
        if mark.time_s - first_s >= apart_s:
            number, first_s = number + 1, mark.time_s
        lines.append((number, mark))
    return lines


def number_marks(axes: Axes, lines: Sequence[_Line]) -> None:
    """Write each number above the first of its marks."""
    first = dict(reversed(lines))
    for number, mark in first.items():
        axes.text(
            mark.time_s,
            1.015,
            str(number),
            transform=axes.get_xaxis_transform(),
            fontsize=8,
            fontweight="bold",
            color=STYLES[mark.category][1],
            ha="center",
            va="bottom",
        )


def list_events(axes: Axes, lines: Sequence[_Line]) -> None:
    """Spell the numbered marks out to the right of the timeline."""
    height_in = axes.bbox.height / axes.figure.dpi
    most = max(MAX_LISTED, int(height_in / LINE_IN))
    shown = lines if len(lines) <= most else lines[: most - 1]
    for row, (number, mark) in enumerate(shown):
        colour, weight = STYLES[mark.category][1], "bold" if mark.is_fault else "normal"
        if row == 0 or shown[row - 1][0] != number:
            _write(axes, row, 0.30, str(number), color=colour, fontweight="bold", ha="right")
        _write(axes, row, 0.88, f"{mark.time_s:.2f} s", color=MUTED, ha="right")
        cut = len(mark.text) > MAX_LABEL_CHARS
        text = mark.text[: MAX_LABEL_CHARS - 1] + "…" if cut else mark.text
        _write(axes, row, 0.98, text, fontweight=weight)
    if len(shown) < len(lines):
        _write(axes, len(shown), 0.98, f"and {len(lines) - len(shown)} more", color=MUTED)


def _write(axes: Axes, row: int, right_in: float, text: str, **style: Any) -> None:
    """Write in line `row` of the list, `right_in` inches to the right of `axes`."""
    axes.annotate(
        text,
        xy=(1.0, 1.0),
        xycoords="axes fraction",
        xytext=(72 * right_in, 72 * (0.12 - LINE_IN * row)),
        textcoords="offset points",
        fontsize=8.5,
        va="top",
        annotation_clip=False,
        **style,
    )
