"""The picture of a run: loss, step time, workers, and what each worker did when.

Reads only the run folder, draws without a screen. Never judges a run: `result.json` says whether it
was exact, the picture only repeats it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from elastic.report.marks import CHECKPOINT, Mark
from elastic.report.picture_style import (
    BLUE,
    FAINT,
    FONTS_AND_LINES,
    LINE_IN,
    MUTED,
    PALE_BLUE,
    PAPER,
    STYLES,
    WIDTH_IN,
    by_category,
)
from elastic.report.picture_timeline import (
    MAX_LISTED,
    draw_legend,
    draw_timeline,
    draw_whole_timeline,
    list_events,
    listed,
    number_marks,
    workers_in,
)
from elastic.report.story import Floats, Story, read_story

DPI = 130
MAX_POINTS = 1200
"""More steps than this are drawn as bands: median, and from least to greatest."""
MAX_NAMED = 8
"""Models in the legend; the curves of others have no name."""
LEFT, RIGHT = 0.068, 0.975


def draw_picture(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Draw the run in `run_dir` as a PNG, by default `run_dir`/report.png, and return its path.

    Raises:
        ConfigError: it is no run folder, or no step has been committed yet.
    """
    story = read_story(run_dir)
    path = Path(output) if output is not None else Path(run_dir) / "report.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(FONTS_AND_LINES):
        figure = _draw(story)
        figure.savefig(path, dpi=DPI, facecolor=PAPER)
    return path


def _draw(story: Story) -> Figure:
    """Lay the panels out from top to bottom; heights and gaps are in inches."""
    zoom = story.zoom()
    window = zoom or (story.first_step_s, story.end_s)
    lines = listed(story, window)
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
            _rows_in(len(workers_in(story, window))),
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
        draw_whole_timeline(panels["timeline"], story, zoom)
        panels["detail"].set_title(f"The {zoom[1] - zoom[0]:.2g} s framed above", pad=16)
    else:
        panels["detail"].set_title("What each worker did", pad=16)
    draw_timeline(panels["detail"], story, window)
    draw_legend(panels["legend"], story)
    number_marks(panels["detail"], lines)
    list_events(panels["detail"], lines)
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
        f"{len(story.step):,} of {story.num_steps or '?'} steps in "
        f"{story.end_s - story.first_step_s:,.1f} s",
        *_losses(story),
        f"median step {np.median(story.step_s) * 1000:,.1f} ms",
        f"{num_faults} fault{'' if num_faults == 1 else 's'} injected",
        f"{story.num_duplicates:,} duplicate leases",
    ]
    return "  ·  ".join(parts)


def _losses(story: Story) -> list[str]:
    if len(story.losses) > 1:
        return [f"{len(story.losses)} models"]
    return [f"loss {story.loss[0]:.4f} → {story.loss[-1]:.4f}"]


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
    if len(story.losses) > 1:
        for model, loss in story.losses.items():
            label = f"model {model}" if model < MAX_NAMED else None
            axes.plot(story.step, loss, linewidth=1.2, label=label)
    else:
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
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        ncols=MAX_NAMED,
        handlelength=1.6,
        borderpad=0.2,
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
    for category, marks in by_category(_one_a_step(story)):
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
