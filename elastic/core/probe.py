"""Measures how fast a device multiplies matrices and copies memory, in about a tenth of a second.

Draws no random number, and leaves nothing behind. Judges nothing: `policies.preflight`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from policies.preflight import Probe

BUDGET_S = 0.05
"""Of each of the two: as many tries as fit, and no fewer than `LEAST`."""
LEAST = 3
_SIZES = {"cpu": (512, 1 << 23), "cuda": (4096, 1 << 26)}
"""Rows of a matrix, elements that are copied: milliseconds of work."""


def measure(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Probe:
    """The best of a few tries, by `clock`. The first try warms up and counts like the others."""
    probe = _probe(device, clock)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # torch keeps what was freed, and others share the card
    return probe


def _probe(device: torch.device, clock: Callable[[], float]) -> Probe:
    rows, elements = _SIZES[device.type]
    ones = torch.ones(rows, rows, device=device)
    product = torch.empty_like(ones)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)

    def multiply() -> object:
        return torch.mm(ones, ones, out=product)

    def copy() -> object:
        return target.copy_(source)

    multiply_s, copy_s = (_best_s(work, device, clock) for work in (multiply, copy))
    low, high = torch.aminmax(product)
    return Probe(multiply_s, copy_s, is_right=low.item() == high.item() == rows)


def _best_s(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    best_s, num, begin_s = float("inf"), 0, clock()
    while num < LEAST or clock() - begin_s < BUDGET_S:
        _finish(device)
        from_s = clock()
        work()
        _finish(device)
        best_s, num = min(best_s, clock() - from_s), num + 1
    return best_s


def _finish(device: torch.device) -> None:
    """Wait for what a device does by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
