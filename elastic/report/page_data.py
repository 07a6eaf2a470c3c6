"""What the page of a run shows, as plain JSON.

Pure: from a story to a dictionary. Numbers are packed; a value that is not finite stays NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic.report.diagnosis import diagnose
from elastic.report.marks import Mark
from elastic.report.packed import pack
from elastic.report.page_diagnosis import diagnosis_data
from elastic.report.story import Floats, Story, busy_share
from elastic.report.thinning import Limits, choose_events, choose_steps, choose_work, smoothed

MAX_CELLS = 600_000
"""Of the coarse timeline: workers times columns."""
MIN_COLUMNS = 400
LOG_RATIO = 8.0
"""A curve whose greatest value is so many times a typical one starts on a logarithmic axis."""
TITLES = {"grad_norm": "Gradient norm", "lr": "Learning rate"}

GRANTED, DUPLICATE, EVALUATION = 1, 2, 4
"""Flags of a micro-batch, as timeline.js reads them."""

LIMITS = Limits()


def page_data(story: Story, *, is_running: bool, limits: Limits = LIMITS) -> dict[str, Any]:
    """Everything that the page shows of `story`.

    Its size is bounded however long the run is, but for faults and what came of them.
    """
    curves = [story.loss, story.step_s, *story.numbers.values()]
    kept = choose_work(story, most=limits.micro_batches)
    shown = np.isin(story.step, story.work.step[kept])
    steps = choose_steps(story, curves, most=limits.steps, beside=shown)
    events = choose_events(story, most=limits.routine_events)
    result = story.result if not is_running else None
    return {
        "name": str(story.job.get("name", "?")),
        "state": _state(result, is_running),
        "exact": None if result is None else result.get("exact"),
        "start_unix_s": story.start_unix_s,
        "first_step_s": story.first_step_s,
        "first_work_s": _first_work_s(story),
        "end_s": story.end_s,
        "summary": _summary(story, result),
        "notes": _notes(story, len(steps), int(kept.sum()), len(events)),
        "steps": {
            "step": pack(story.step[steps], "<i4"),
            "begin_s": pack(begin_s(story)[steps]),
            "time_s": pack(story.time_s[steps]),
        },
        "median_step_s": float(np.median(story.step_s)),
        "charts": _charts(story, steps),
        "workers": story.workers.tolist(),
        "lives": [list(life) for life in story.lives],
        "bars": _bars(story, kept),
        "shares": _shares(story),
        "diagnosis": diagnosis_data(diagnose(story), story.workers),
        "categories": sorted({event.category for event in story.events}),
        "events": [_event(event, story) for event in events],
        "job": story.job,
        "result": result,
    }


def begin_s(story: Story) -> Floats:
    """When each step began: as the one before was committed."""
    return np.concatenate([[story.first_step_s], story.time_s[:-1]])


def _state(result: Mapping[str, Any] | None, is_running: bool) -> str:
    if is_running:
        return "running"
    return "interrupted" if result is None else str(result.get("outcome", "finished"))


def _first_work_s(story: Story) -> float:
    """When the first micro-batch began, or the first step where none is known."""
    return float(story.work.start_s[0]) if len(story.work.start_s) else story.first_step_s


def _summary(story: Story, result: Mapping[str, Any] | None) -> list[list[str]]:
    """(what, value, in detail) of the figures at the top."""
    num_faults = sum(event.is_fault for event in story.events)
    took_s = max(story.end_s - _first_work_s(story), 1e-9)
    low, high = int(story.num_workers.min()), int(story.num_workers.max())
    refused = int((~story.work.granted).sum())
    figures = [
        ["steps", f"{len(story.step):,}", f"of {story.num_steps:,}"],
        ["training time", duration(took_s), f"median step {_ms(np.median(story.step_s))}"],
        *_losses(story),
        ["samples/s", f"{story.samples.sum() / took_s:,.4g}", f"{story.samples.sum():,} samples"],
        [
            "workers",
            str(high) if low == high else f"{low} to {high}",
            f"{len(story.workers)} in all, generation {_generation(story)}",
        ],
        [
            "faults injected",
            f"{num_faults:,}",
            f"slowest step {_ms(story.step_s[1:].max(initial=0))}",
        ],
        ["duplicate leases", f"{story.num_duplicates:,}", f"{refused:,} answers refused"],
    ]
    if story.evaluations:
        last = story.evaluations[-1]
        figures.insert(3, ["evaluation loss", _number(last.loss), f"at step {last.step:,}"])
    return figures


def _losses(story: Story) -> list[list[str]]:
    if len(story.losses) > 1:
        lasts = [loss[-1] for loss in story.losses.values()]
        return [
            ["losses", f"{_number(min(lasts))} to {_number(max(lasts))}", f"{len(lasts)} models"]
        ]
    return [["loss", _number(story.loss[-1]), f"from {_number(story.loss[0])}"]]


def _generation(story: Story) -> int:
    return max([event.generation for event in story.events], default=0)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _ms(time_s: float | np.floating[Any]) -> str:
    return f"{time_s * 1000:,.4g} ms" if time_s < 10 else duration(float(time_s))


def duration(time_s: float) -> str:
    """Seconds in words: 31.1 s, 5 min 20 s, 2 h 13 min."""
    if time_s < 100:
        return f"{time_s:.1f} s"
    if time_s < 6000:
        return f"{int(time_s) // 60} min {int(time_s) % 60} s"
    return f"{int(time_s) // 3600} h {int(time_s) % 3600 // 60} min"


def _notes(story: Story, num_steps: int, num_work: int, num_events: int) -> list[str]:
    """What was left out to bound the size of the page, in words."""
    notes = []
    if num_steps < len(story.step):
        notes.append(
            f"Curves show {num_steps:,} of {len(story.step):,} steps: the least and the greatest"
            " of every stretch, and every step in which something happened."
        )
    if num_work < len(story.work.step):
        notes.append(
            f"The timeline shows {num_work:,} of {len(story.work.step):,} micro-batches one by one:"
            " around faults and other marks, in the slowest steps, and in samples spread over the"
            " run. Elsewhere it shows the share of its time that each worker computed."
        )
    if unrecorded := _unrecorded(story):
        some = ", ".join(f"{step:,}" for step in unrecorded[:10])
        notes.append(
            "What workers did in some steps has no record, for the aggregator that kept it died:"
            f" {some}{' ...' if len(unrecorded) > 10 else ''}. The steps themselves are whole."
        )
    if num_events < len(story.events):
        notes.append(
            f"{num_events:,} of {len(story.events):,} events are listed: all faults and what came"
            " of them, and a sample of checkpoints, evaluations and the like."
        )
    return notes


def _unrecorded(story: Story) -> list[int]:
    """Steps of which some micro-batches were granted, but by an aggregator that died since."""
    wanted = story.job.get("batch", {}).get("micro_batches")
    if wanted is None:
        return []
    place = np.searchsorted(story.step, story.work.step[story.work.granted])
    granted = np.bincount(place, minlength=len(story.step))
    missing: list[int] = story.step[granted < wanted].tolist()
    return missing


def _charts(story: Story, steps: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Titles and curves; a curve without `x` has one value a kept step."""
    half = max(1, round(len(story.step) ** 0.5 / 3))
    loss = [
        _curve("each step", story.loss[steps], style="thin"),
        _curve(f"mean of {2 * half + 1} steps", smoothed(story.loss, half=half)[steps]),
    ]
    if len(story.losses) > 1:
        loss = [_curve(f"model {one}", y[steps]) for one, y in story.losses.items()]
    charts = [
        _chart("Loss", "", [*loss, *_evaluated(story, "loss")], log=_is_steep(story.loss)),
        _chart(
            "Step time",
            "ms",
            [_curve("each step", story.step_s[steps] * 1000, style="spans")],
            log=_is_steep(story.step_s),
        ),
    ]
    names = [name for name in story.numbers if name not in TITLES]
    evaluated = [name for one in story.evaluations for name in one.metrics]
    for name in dict.fromkeys([*names, *evaluated]):
        own = [_curve("each step", story.numbers[name][steps])] if name in names else []
        charts.append(_chart(name, "", [*own, *_evaluated(story, name)]))
    return [*charts, *_progress_charts(story, steps)]


def _progress_charts(story: Story, steps: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    half = max(2, len(story.step) // 200)
    per_s = smoothed(story.samples.astype(np.float64), half=half) / smoothed(
        np.maximum(story.step_s, 1e-9), half=half
    )
    generations = [event for event in story.events if event.generation > 0]
    numbers = np.maximum.accumulate([event.generation for event in generations] or [0])
    charts = [
        _chart("Throughput", "samples/s", [_curve(f"mean of {2 * half + 1} steps", per_s[steps])]),
        _chart("Workers", "", [_curve("in the step", story.num_workers[steps], style="spans")]),
    ]
    if generations:
        x = np.array([event.time_s for event in generations])
        new = np.r_[True, np.diff(numbers) > 0]
        curve = _curve("number", numbers[new], x=x[new], style="stairs")
        charts.append(_chart("Generation of the membership", "", [curve]))
    charts += [
        _chart(TITLES[name], "", [_curve("each step", story.numbers[name][steps])])
        for name in TITLES
        if name in story.numbers
    ]
    return charts


def _chart(
    title: str, unit: str, curves: Sequence[Mapping[str, Any]], *, log: bool = False
) -> dict[str, Any]:
    return {"title": title, "unit": unit, "log": log, "curves": curves}


def _curve(
    name: str, y: npt.NDArray[Any], *, x: Floats | None = None, style: str = "line"
) -> dict[str, Any]:
    """`style`: line, thin, dots (joined by a line), stairs (a value holds until the next one), or
    spans (it holds since the one before: for what is true of a step as long as it lasts).
    """
    curve: dict[str, Any] = {"name": name, "style": style, "y": pack(y)}
    if x is not None:
        curve["x"] = pack(x)
    return curve


def _evaluated(story: Story, name: str) -> list[dict[str, Any]]:
    """The curve of a measure on held-out data, if there is one."""
    found = [
        (one.time_s, one.loss if name == "loss" else one.metrics[name])
        for one in story.evaluations
        if name == "loss" or name in one.metrics
    ]
    if not found:
        return []
    x, y = np.array(found).T
    return [_curve("evaluation", y, x=x, style="dots")]


def _is_steep(values: Floats) -> bool:
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0:
        return False
    return bool(finite.max() > LOG_RATIO * np.median(finite))


def _bars(story: Story, keep: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """The micro-batches shown one by one, and the spans of time in which all of them are.

    Those of an evaluation are shown where those of the step after it are.
    """
    work, evaluated = story.work.where(keep), story.evaluation_work
    steps = np.unique(work.step)
    after = np.minimum(np.searchsorted(story.step, evaluated.step), len(story.step) - 1)
    evaluated = evaluated.where(np.isin(story.step[after], steps))
    order = np.argsort(np.r_[work.start_s, evaluated.start_s], kind="stable")

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(work, name), getattr(evaluated, name)])[order]

    evaluates = np.arange(len(order))[order] >= len(work.step)
    flags = column("granted") * GRANTED + column("duplicate") * DUPLICATE + evaluates * EVALUATION
    start_s = column("start_s")
    return {
        "row": pack(np.searchsorted(story.workers, column("worker")), "<u2"),
        "step": pack(column("step"), "<i4"),
        "micro_batch": pack(column("micro_batch"), "<u2"),
        "start_s": pack(start_s),
        "took_s": pack(column("end_s") - start_s, "<f4"),
        "flags": pack(flags, "<u1"),
        "spans_s": _spans(story, steps),
    }


def _spans(story: Story, steps: npt.NDArray[np.int64]) -> list[list[float]]:
    """From when to when each run of neighbouring steps went on."""
    places = np.flatnonzero(np.isin(story.step, steps))
    if not len(places):
        return []
    groups = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    begins_s = begin_s(story)
    return [[float(begins_s[group[0]]), float(story.time_s[group[-1]])] for group in groups]


def _shares(story: Story) -> dict[str, Any]:
    """The share of its time that each worker computed, 0 to 255, in columns of equal width."""
    from_s, to_s = _first_work_s(story), story.end_s
    if not len(story.workers) or to_s <= from_s:
        return {"from_s": from_s, "to_s": to_s, "columns": 0, "cells": pack(np.zeros(0), "<u1")}
    least_s = float(np.median(story.work.end_s - story.work.start_s)) or 1.0
    most = max(MIN_COLUMNS, MAX_CELLS // len(story.workers))
    columns = int(np.clip((to_s - from_s) / least_s, MIN_COLUMNS, most))
    edges_s = np.linspace(from_s, to_s, columns + 1)
    cells = [
        busy_share(story.work, worker, edges_s) + busy_share(story.evaluation_work, worker, edges_s)
        for worker in story.workers.tolist()
    ]
    return {
        "from_s": from_s,
        "to_s": to_s,
        "columns": columns,
        "cells": pack(np.ceil(255 * np.minimum(1, np.concatenate(cells))), "<u1"),
    }


def _event(event: Mark, story: Story) -> dict[str, Any]:
    """An event; one told by a process that did not know the step gets that of its time."""
    step = event.step
    if not event.generation and event.time_s > story.first_step_s:
        place = int(np.searchsorted(story.time_s, event.time_s))
        step = int(story.step[min(place, len(story.step) - 1)])
    return {
        "time_s": round(event.time_s, 6),
        "step": step,
        "generation": event.generation,
        "kind": event.kind.replace("_", " "),
        "category": event.category,
        "worker": event.worker,
        "fault": event.is_fault,
        "text": event.text,
        "reason": "" if event.is_fault else event.reason,
    }
