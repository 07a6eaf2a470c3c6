"""What a job says of itself while it runs: one snapshot, shown by the command line.

Only data; never reaches into a job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PhaseName = Literal["starting", "training", "finishing", "done", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """One snapshot of a job."""

    phase: PhaseName
    num_steps: int
    """Steps in all."""
    run_dir: str
    step: int = 0
    """Committed steps."""
    loss: float | None = None
    """Of the newest committed step."""
    first_loss: float | None = None
    """Of step 0, or of the first step since a resume."""
    samples_per_s: float | None = None
    step_s_median: float | None = None
    num_workers: int = 0
    """Workers that compute now."""
    num_spare: int = 0
    """Warm workers that wait."""
    target_workers: int = 0
    generation: int = 0
    aggregator: str = ""
    """In words, such as 'pid 4242 + standby'."""
    events: tuple[Mapping[str, Any], ...] = ()
    """The newest ones, oldest first, as in events.jsonl."""
