"""Lines of a run's records, made up: steps of workers of which some are slow, and events."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

NUM_WORKERS = 4


def step_line(step: int, paces: Mapping[int, float], seed: int = 0) -> dict[str, Any]:
    """Each worker computes four micro-batches, with 5 % noise."""
    noise, work = random.Random(f"{seed} {step}"), []
    for worker, pace in paces.items():
        at_s = float(step)
        for one in range(4):
            took_s = 0.1 * pace * noise.uniform(0.95, 1.05)
            work.append([worker, 4 * worker + one, at_s, at_s + took_s, "granted"])
            at_s += took_s
    return {
        "step": step, "time_s": step + 0.9, "step_s": 1.0, "attempt": 0, "work": work,
        "samples": 8, "num_duplicates": 0, "loss": 1.0, "grad_norm": 1.0,
    }  # fmt: skip


def event(kind: str, time_s: float, worker: int | None = None, reason: str = "") -> dict[str, Any]:
    known = {"kind": kind, "time_s": time_s, "step": int(time_s), "generation": 0}
    return {**known, "worker": worker, "reason": reason}


def healthy() -> dict[int, float]:
    return dict.fromkeys(range(NUM_WORKERS), 1.0)
