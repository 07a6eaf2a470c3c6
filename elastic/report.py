"""The picture of a run: loss, step time, workers, and what each worker did when.

Reads only the run folder, draws without a screen. Never judges a run: `result.json` says whether it
was exact, the picture only repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from elastic.run_story import (
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
    Floats,
    Mark,
    Story,
    Work,
    busy_share,
    read_story,
)

DPI = 130
WIDTH_IN = 15.0
MAX_POINTS = 1200
"""More steps than this are drawn as bands: median, and from least to greatest."""
LEFT, RIGHT = 0.068, 0.975
LINE_IN = 0.19
MIN_BAR = 0.0025
"""Where micro-batches are a smaller part of the width, shares of time are drawn instead."""
MAX_LISTED = 18
"""Events spelled out beside the zoomed timeline, more where it is high enough."""
MAX_LABEL_CHARS = 38
NUM_BINS = 1500
"""Columns of the timeline of a long run."""

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
}
"""Marker and colour of each category of event, in the order of the legend."""

_STYLE: Any = {
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


def report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Draw the run in `run_dir` as a PNG, by default `run_dir`/report.png, and return its path.

    Raises:
        ConfigError: it is no run folder, or no step has been committed yet.
    """
    story = read_story(run_dir)
    path = Path(output) if output is not None else Path(run_dir) / "report.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        figure = _draw(story)
        figure.savefig(path, dpi=DPI, facecolor=PAPER)
    return path


def _draw(story: Story) -> Figure:
    """Lay the panels out from top to bottom; heights and gaps are in inches."""
    zoom = story.zoom()
    window = zoom or (story.first_step_s, story.end_s)
    lines = _listed(story, window)
    figure = Figure(figsize=(WIDTH_IN, 1.0))
    FigureCanvasAgg(figure)
    heights_in = {
        "header": 1.25,
        "loss": 2.1,
        "step time": 2.1,
        "workers": 0.55,
        "timeline": _rows_in(len(story.workers)),
        "legend": 0.5,
        "detail": max(
            _rows_in(len(_workers_in(story, window))),
            LINE_IN * min(len(lines), MAX_LISTED) - 0.2,
        ),
    }
    if zoom is None:
        del heights_in["timeline"]
    panels = _stack(figure, heights_in, right=0.725 if lines else RIGHT)
    _header(panels["header"], story)
    _loss_panel(panels["loss"], story)
    _step_time_panel(panels["step time"], story)
    _workers_panel(panels["workers"], story)
    for upper in (panels["loss"], panels["step time"]):
        upper.sharex(panels["workers"])
        upper.tick_params(labelbottom=False)
    if zoom is not None:
        _whole_timeline(panels["timeline"], story, zoom)
        panels["detail"].set_title(f"The {zoom[1] - zoom[0]:.2g} s framed above", pad=16)
    else:
        panels["detail"].set_title("What each worker did", pad=16)
    _timeline(panels["detail"], story, window)
    _legend(panels["legend"], story)
    _number_marks(panels["detail"], lines)
    _list_events(panels["detail"], lines)
    return figure


def _rows_in(num_workers: int) -> float:
    """Height of a timeline, in inches."""
    return min(6.0, max(1.0, 0.3 * num_workers))


def _stack(figure: Figure, heights_in: dict[str, float], right: float) -> dict[str, Axes]:
    """Make axes below one another, and the figure as high as they need.

    `right` is the right edge of the last one, which has a list beside it.
    """
    gaps_in = {"header": 0.4, "legend": 0.5, "workers": 0.85, "timeline": 0.6, "detail": 0.6}
    tops_in, height_in = {}, 0.2
    for name, own_in in heights_in.items():
        tops_in[name] = height_in
        height_in += own_in + gaps_in.get(name, 0.5)
    figure.set_figheight(height_in)
    axes = {}
    for name, own_in in heights_in.items():
        width = (right if name == "detail" else RIGHT) - LEFT
        bottom = 1 - (tops_in[name] + own_in) / height_in
        axes[name] = figure.add_axes((LEFT, bottom, width, own_in / height_in))
    return axes


def _header(axes: Axes, story: Story) -> None:
    """Name, settings, outcome and hashes."""
    axes.set_axis_off()
    job, result = story.job, story.result or {}
    axes.text(0, 1.0, str(job.get("name", "?")), fontsize=19, fontweight="bold", va="top")
    axes.text(0, 0.62, _settings(job), color=MUTED, va="top")
    axes.text(0, 0.42, _outcome(story), va="top")
    hashes = [
        f"{key} {result[key]}" for key in ("params_sha256", "samples_sha256") if key in result
    ]
    axes.text(
        0, 0.21, "   ".join(hashes), fontsize=8, color=MUTED, family="DejaVu Sans Mono", va="top"
    )
    exact = result.get("exact")
    words, colour = {
        True: ("EXACT", "#2b9348"),
        False: ("NOT EXACT", "#d62839"),
        None: ("NOT FINISHED", "#f08c00"),
    }[exact if isinstance(exact, bool) else None]
    axes.text(
        1.0,
        0.95,
        words,
        fontsize=10,
        fontweight="bold",
        color=PAPER,
        ha="right",
        va="top",
        bbox={"boxstyle": "round,pad=0.45", "facecolor": colour, "edgecolor": "none"},
    )


def _settings(job: Any) -> str:
    batch, workers = job.get("batch", {}), job.get("workers", {})
    threads = workers.get("threads", "?")
    parts = [
        f"{batch.get('micro_batches', '?')} micro-batches of {batch.get('micro_batch_size', '?')}",
        f"{workers.get('start', '?')} workers ({workers.get('min', '?')} to "
        f"{workers.get('max', '?')}) with {threads} thread{'' if threads == 1 else 's'}",
        str(job.get("precision", "")),
        f"seed {job.get('seed', '?')}",
    ]
    if job.get("clip_norm") is not None:
        parts.append(f"clip {job['clip_norm']:g}")
    if job.get("task"):
        parts.append(str(job["task"]))
    return "  ·  ".join(part for part in parts if part)


def _outcome(story: Story) -> str:
    num_faults = sum(mark.is_fault for mark in story.marks)
    parts = [
        f"{len(story.step):,} of {story.job.get('steps', '?')} steps in "
        f"{story.end_s - story.first_step_s:,.1f} s",
        f"loss {story.loss[0]:.4f} → {story.loss[-1]:.4f}",
        f"median step {np.median(story.step_s) * 1000:,.1f} ms",
        f"{num_faults} fault{'' if num_faults == 1 else 's'} injected",
        f"{story.num_duplicates:,} duplicate leases",
    ]
    return "  ·  ".join(parts)


def _bands(x: Any, y: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """(x, median, least, greatest) of at most MAX_POINTS bins of equally many points."""
    parts = np.array_split(np.arange(len(x)), min(MAX_POINTS, len(x)))
    return (
        np.array([np.mean(x[part]) for part in parts]),
        np.array([np.median(y[part]) for part in parts]),
        np.array([np.min(y[part]) for part in parts]),
        np.array([np.max(y[part]) for part in parts]),
    )


def _smoothed(values: Floats) -> Floats:
    """A centred mean over 5 % of the run, narrower towards its ends; NaN counts as absent."""
    total = np.cumsum(np.r_[0.0, np.nan_to_num(values, posinf=0.0, neginf=0.0)])
    count = np.cumsum(np.r_[0, np.isfinite(values)])
    places = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 40), np.minimum(places, places[::-1]))
    low, high = places - half, places + half + 1
    mean: Floats = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
    return mean


def _loss_panel(axes: Axes, story: Story) -> None:
    x, middle, least, greatest = _bands(story.step, story.loss)
    axes.fill_between(x, least, greatest, color=PALE_BLUE, alpha=0.45, linewidth=0)
    axes.plot(x, middle, color=PALE_BLUE, linewidth=1, label="each step")
    axes.plot(story.step, _smoothed(story.loss), color=BLUE, linewidth=2, label="smoothed")
    finite = story.loss[np.isfinite(story.loss)]
    if len(finite) and finite.min() > 0 and finite.max() > 5 * finite.min():
        _log_scale(axes)
    axes.set_title("Loss")
    axes.grid(axis="y", color=FAINT)
    _legend_above(axes)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=3, handlelength=1.6, borderpad=0.2
    )


def _step_time_panel(axes: Axes, story: Story) -> None:
    median_ms = float(np.median(story.step_s)) * 1000
    x, middle, least, greatest = _bands(story.step, story.step_s * 1000)
    if len(story.step) > MAX_POINTS:
        axes.fill_between(x, least, greatest, color=PALE_BLUE, alpha=0.6, linewidth=0)
        axes.plot(x, greatest, color=BLUE, alpha=0.55, linewidth=0.6)  # one slow step still shows
    axes.plot(x, middle, color=BLUE, linewidth=1.1, label="each step")
    axes.axhline(
        median_ms,
        color=MUTED,
        linewidth=0.9,
        linestyle=(0, (4, 3)),
        label=f"median {median_ms:.1f} ms",
    )
    top_ms = float(story.step_s.max()) * 1000
    if top_ms > 8 * median_ms:
        _log_scale(axes)
        axes.set_ylim(top=top_ms * 2.0)
    else:
        axes.set_ylim(0, top_ms * 1.22)
    transform = axes.get_xaxis_transform()
    for category, marks in _by_category(_one_a_step(story)):
        marker, colour = STYLES[category]
        steps = [mark.step for mark in marks]
        axes.vlines(steps, 0, 0.93, colour, transform=transform, linewidth=0.7, alpha=0.35)
        axes.plot(
            steps,
            np.full(len(steps), 0.965),
            marker,
            color=colour,
            transform=transform,
            markersize=7,
            markeredgewidth=1.6 if marker == "x" else 0.4,
            clip_on=False,
        )
    axes.set_title("Step time in ms, with the events at their steps")
    axes.grid(axis="y", color=FAINT)
    _legend_above(axes)


def _one_a_step(story: Story) -> list[Mark]:
    """The weightiest mark of each step: a fault before what followed from it."""
    order = list(STYLES)
    best: dict[int, Mark] = {}
    for mark in story.marks:
        if mark.category == CHECKPOINT or mark.time_s < story.first_step_s:
            continue
        held = best.setdefault(mark.step, mark)
        if (not mark.is_fault, order.index(mark.category)) < (
            not held.is_fault,
            order.index(held.category),
        ):
            best[mark.step] = mark
    return list(best.values())


def _workers_panel(axes: Axes, story: Story) -> None:
    axes.fill_between(story.step, story.num_workers, step="post", color="#d9ead9", linewidth=0)
    axes.step(story.step, story.num_workers, where="post", color="#2b9348", linewidth=1.2)
    top = int(story.num_workers.max())
    axes.set_ylim(0, top * 1.25 + 0.2)
    axes.set_yticks([0, top])
    axes.set_title("Workers")
    axes.set_xlabel("step", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    margin = max(0.5, 0.005 * len(story.step))
    axes.set_xlim(story.step[0] - margin, story.step[-1] + margin)


def _workers_in(story: Story, window: tuple[float, float]) -> list[int]:
    """Workers that belong to the job at some time of the window, sorted."""
    start_s, end_s = window
    return sorted({life[0] for life in story.lives if life[1] <= end_s and life[2] >= start_s})


def _whole_timeline(axes: Axes, story: Story, zoom: tuple[float, float]) -> None:
    """The timeline of the whole run, with a frame around the part shown larger."""
    in_shares = _timeline(axes, story, (story.first_step_s, story.end_s))
    axes.set_title(
        "What each worker did, whole run"
        + (" (the darker, the larger the share of its time at work)" if in_shares else "")
    )
    axes.add_patch(_frame(zoom, axes.get_ylim()))


def _timeline(axes: Axes, story: Story, window: tuple[float, float]) -> bool:
    """One row a worker, from the top: when it lived, what it computed, what befell it.

    Returns whether bars would have been too thin, so that shares of time are drawn instead.
    """
    start_s, end_s = window
    rows = {worker: row for row, worker in enumerate(_workers_in(story, window))}
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
    for category, same in _by_category(inside):
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


def _by_category(marks: Sequence[Mark]) -> Iterator[tuple[str, list[Mark]]]:
    for category in STYLES:
        same = [mark for mark in marks if mark.category == category]
        if same:
            yield category, same


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


def _legend(axes: Axes, story: Story) -> None:
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
    for category, _ in _by_category(story.marks):
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


def _listed(story: Story, window: tuple[float, float]) -> list[_Line]:
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


def _number_marks(axes: Axes, lines: Sequence[_Line]) -> None:
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


def _list_events(axes: Axes, lines: Sequence[_Line]) -> None:
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
