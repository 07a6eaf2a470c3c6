"""How much longer than its peers each worker computed, by step: the cells of a heatmap. Pure."""

from __future__ import annotations

import numpy as np

from elastic.report.diagnosis import Records
from elastic.report.trace import Floats, Ints

MOST_COLUMNS, MOST_ROWS = 600, 400
"""Of more steps or workers several share a cell, which shows their mean."""
RANGE = 1.0
"""The colours end where a worker takes twice as long as its peers."""


def cells_of(records: Records, workers: Ints) -> tuple[Floats, Floats, Floats]:
    """Edges of columns in seconds, edges of rows, and the mean excess of each cell; NaN: none."""
    num_steps, num_workers = len(records.step_S), len(workers)
    step_B = np.searchsorted(records.step_S, records.step_B)
    worker_B = np.searchsorted(workers, records.worker_B)
    key, place_B = np.unique(worker_B * num_steps + step_B, return_inverse=True)
    took_s_B = records.end_s_B - records.start_s_B
    pace = np.bincount(place_B, took_s_B) / np.bincount(place_B)
    role = np.zeros(len(key), np.int64)
    role[place_B] = records.role_B
    excess = _over_median(pace, role * num_steps + key % num_steps)
    columns, lines = min(num_steps, MOST_COLUMNS), min(num_workers, MOST_ROWS)
    column = key % num_steps * columns // num_steps
    line = key // num_steps * lines // max(num_workers, 1)
    cell, size = line * columns + column, lines * columns
    num = np.bincount(cell, minlength=size)
    total = np.bincount(cell, np.clip(excess, -RANGE, 2 * RANGE), minlength=size)
    cells = np.where(num > 0, total / np.maximum(num, 1), np.nan).reshape(lines, columns)
    firsts = np.array([-(-one * num_steps // columns) for one in range(columns)])
    edges_s = np.r_[records.begin_s_S[firsts], records.end_s_S[-1]]
    rows = np.linspace(-0.5, num_workers - 0.5, lines + 1)
    return np.maximum.accumulate(edges_s), rows, cells


def _over_median(values: Floats, groups: Ints) -> Floats:
    """Each value over the median of its group, less one."""
    order = np.lexsort((values, groups))
    sorted_groups, sorted_values = groups[order], values[order]
    firsts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]])
    sizes = np.diff(np.r_[firsts, len(values)])
    median = (sorted_values[firsts + (sizes - 1) // 2] + sorted_values[firsts + sizes // 2]) / 2
    excess = np.empty(len(values))
    excess[order] = sorted_values / np.repeat(np.maximum(median, 1e-12), sizes) - 1
    return excess
