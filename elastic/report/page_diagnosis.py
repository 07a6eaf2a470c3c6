"""What the page of a run shows of its diagnosis: where the time went, who was slow, its cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.report.diagnosis import MOST_TOLD, Diagnosis
from elastic.report.excess import RANGE, cells_of
from elastic.report.packed import pack
from monitoring.account import PARTS

_NONE, _AS_PEERS, _MOST = 0, 128, 255
"""Values of a cell: nothing was computed; as its peers; at least `RANGE` longer."""


def diagnosis_data(diagnosis: Diagnosis, workers: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The goodput account, the causes, the most expensive first, and the heatmap, for the page."""
    account = diagnosis.account
    edges_s, _, cells = cells_of(diagnosis.records, workers)
    return {
        "account": {
            "wall_s": account.wall_s,
            "parts": [[part, account.seconds[part], meaning] for part, meaning in PARTS.items()],
        },
        "causes": [
            {
                "begin_s": round(one.begin_s, 6),
                "end_s": round(one.end_s, 6),
                "step": one.step,
                "what": one.what,
                "who": one.who,
                "cost_s": one.cost_s,
                "reason": one.reason,
            }
            for one in diagnosis.causes[:MOST_TOLD]
        ],
        "num_causes": len(diagnosis.causes),
        "heat": {
            "edges_s": pack(edges_s),
            "rows": len(cells),
            "cells": pack(_levels(cells), "<u1"),
        },
    }


def _levels(cells: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    known = np.clip(np.nan_to_num(cells) / RANGE, -1.0, 1.0)
    levels = np.round(_AS_PEERS + known * (_MOST - _AS_PEERS))
    return np.where(np.isnan(cells), _NONE, np.maximum(levels, 1)).ravel()
