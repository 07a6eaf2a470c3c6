"""What of a long run goes into the page, so that its size stays bounded.

Nothing is averaged: the steps, micro-batches and events that are kept are real ones. Kept whatever
the length: every fault and what came of it, the extremes of every curve, the slowest steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from elastic.report.marks import CHECKPOINT, EVALUATION, OTHER, Mark
from elastic.report.story import Bools, Floats, Ints, Story

NUM_SLOWEST = 100
_ROUTINE = (CHECKPOINT, EVALUATION, OTHER)
_BLOCK = 8
"""Steps in a row that are shown as a sample of a quiet stretch."""


@dataclass(frozen=True)
class Limits:
    """How much of a run goes into the page."""

    steps: int = 20_000
    """Up to so many are all kept; of more, about so many."""
    micro_batches: int = 100_000
    """Shown one by one."""
    routine_events: int = 4_000
    """Of checkpoints, of evaluations, and of other events without a mark, each."""


def choose_steps(
    story: Story, curves: Sequence[Floats], *, most: int, beside: Bools | None = None
) -> Ints:
    """Indices of the steps to draw, sorted.

    Of each bin of neighbouring steps the first, the last, and where each curve is least and
    greatest; and beyond `most` those of marks, of redone attempts, of changes in the number of
    workers, and where a curve stops or begins to be finite. Where there is room, those `beside`.
    """
    num = len(story.step)
    if num <= most:
        return np.arange(num)
    chosen = _noteworthy(story)
    for curve in curves:
        finite = np.isfinite(curve)
        chosen[1:] |= finite[1:] != finite[:-1]
    edges = np.linspace(0, num, max(1, most // (2 + 2 * len(curves))) + 1).astype(np.int64)
    chosen[edges[:-1]] = chosen[edges[1:] - 1] = True
    for curve in curves:
        low, high = np.nan_to_num(curve, nan=np.inf), np.nan_to_num(curve, nan=-np.inf)
        for first, last in pairwise(edges.tolist()):
            chosen[first + np.argmin(low[first:last])] = True
            chosen[first + np.argmax(high[first:last])] = True
    if beside is not None:
        others = np.flatnonzero(beside & ~chosen)
        room = max(0, most - int(chosen.sum()))
        if len(others) > room:
            others = others[np.linspace(0, len(others) - 1, room).astype(np.int64)]
        chosen[others] = True
    return np.flatnonzero(chosen)


def _noteworthy(story: Story) -> Bools:
    """Whether something happened in each step: a mark other than a checkpoint, a change."""
    chosen = np.zeros(len(story.step), dtype=np.bool_)
    chosen[[0, -1]] = True
    times_s = [mark.time_s for mark in story.marks if mark.category != CHECKPOINT]
    chosen[np.minimum(np.searchsorted(story.time_s, times_s), len(chosen) - 1)] = True
    chosen |= story.attempt > 0
    chosen[1:] |= np.diff(story.num_workers) != 0
    return chosen


def choose_work(story: Story, *, most: int) -> Bools:
    """Which micro-batches to show one by one, in whole steps.

    Beyond `most`: the steps of marks and their neighbours, the slowest steps and theirs, the first
    and the last, then samples evenly spread over the run, as far as `most` goes.
    """
    work, num = story.work, len(story.step)
    if len(work.step) <= most:
        return np.ones(len(work.step), dtype=np.bool_)
    place = np.searchsorted(story.step, work.step)
    size = np.bincount(place, minlength=num)
    happened = np.flatnonzero(_noteworthy(story))
    slowest = np.argsort(-story.step_s, kind="stable")[:NUM_SLOWEST]
    num_blocks = max(1, int(most / max(1.0, size.mean()) / _BLOCK))
    blocks = np.linspace(0, num - _BLOCK, num_blocks).astype(np.int64)
    order = np.concatenate(
        [
            happened,
            slowest,
            *(happened + shift for shift in (-1, 1, -2, 2)),
            *(slowest + shift for shift in (-1, 1)),
            np.arange(_BLOCK),
            num - 1 - np.arange(_BLOCK),
            _spread(blocks)[:, None].repeat(_BLOCK, 1).ravel() + np.tile(range(_BLOCK), num_blocks),
        ]
    )
    order = order[(order >= 0) & (order < num)]
    _, first = np.unique(order, return_index=True)
    order = order[np.sort(first)]
    kept = np.zeros(num, dtype=np.bool_)
    kept[order[np.cumsum(size[order]) <= most]] = True
    keep: Bools = kept[place]
    return keep


def _spread(values: Ints) -> Ints:
    """The same values, in an order of which every beginning is spread over all of them."""
    starts = (0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15)
    return np.concatenate([values[start::16] for start in starts])


def choose_events(story: Story, *, most: int) -> list[Mark]:
    """All events but for those of a routine kind beyond `most`, of which an even sample is kept.

    A fault is never routine.
    """
    routine: dict[str, list[int]] = {category: [] for category in _ROUTINE}
    for index, event in enumerate(story.events):
        if event.kind != "checkpoint_written" and event.category == CHECKPOINT:
            continue  # it failed, or was found damaged
        if event.category in routine and not event.is_fault:
            routine[event.category].append(index)
    dropped: set[int] = set()
    for indices in routine.values():
        if len(indices) > most:
            kept = {indices[place] for place in np.linspace(0, len(indices) - 1, most).astype(int)}
            dropped |= set(indices) - kept
    return [event for index, event in enumerate(story.events) if index not in dropped]


def smoothed(values: Floats, *, half: int) -> Floats:
    """A centred mean over 2 `half` + 1 values, narrower towards the ends; NaN counts as absent."""
    total = np.cumsum(np.r_[0.0, np.where(np.isfinite(values), values, 0.0)])
    count = np.cumsum(np.r_[0, np.isfinite(values)])
    places = np.arange(len(values))
    reach = np.minimum(half, np.minimum(places, places[::-1]))
    low, high = places - reach, places + reach + 1
    num = count[high] - count[low]
    mean: Floats = np.where(num > 0, (total[high] - total[low]) / np.maximum(num, 1), np.nan)
    return mean
