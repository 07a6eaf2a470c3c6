"""Whether experts live in one process or in one each: by what a step would take either way.

Pure: what was measured arrives in the view. Never starts anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class PlacingView:
    """One step of sampling, for one request."""

    call_s: float
    """A call of an expert."""
    num_asked: int
    """Experts that a step asks, at most."""
    hop_s: float
    """A call of another process, without computing anything there."""
    experts_bytes: int
    """Weights of all experts."""
    memory_bytes: int
    """What one process may use for them."""
    num_cpus: int


@dataclass(frozen=True, slots=True)
class Placed:
    mode: Literal["colocated", "distributed"]
    reason: str


def decide(view: PlacingView) -> Placed:
    """Together where they fit, unless calls at the same time save more than the hops cost."""
    if view.experts_bytes > view.memory_bytes:
        needed, there = view.experts_bytes >> 20, view.memory_bytes >> 20
        return Placed("distributed", f"the weights need {needed} MiB; {there} MiB are there")
    rounds = -(-view.num_asked // max(view.num_cpus, 1))
    together_s, apart_s = view.num_asked * view.call_s, view.hop_s + rounds * view.call_s
    told = f"a step takes {1e3 * together_s:.1f} ms together, {1e3 * apart_s:.1f} ms apart"
    return Placed("distributed" if apart_s < together_s else "colocated", told)
