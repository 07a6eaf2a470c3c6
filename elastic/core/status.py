"""What a job says of itself while it runs: one snapshot, shown by the command line.

Only data, and its file in the run folder, which answers faster than the job; never reaches into a
job.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder

MAX_AGE_S = 5.0
"""A file that is older says nothing: its writer is busy, or gone."""

PhaseName = Literal["starting", "training", "finishing", "done", "failed"]


class ModelStatus(NamedTuple):
    """Where one of several models is: its committed steps, and the loss of the newest."""

    step: int = 0
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Status:
    """One snapshot of a job."""

    phase: PhaseName
    num_steps: int
    """Steps in all; of several models, of all together."""
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
    num_unfit: int = 0
    """Workers that are left out: see `workers.preflight`."""
    target_workers: int = 0
    num_nodes: int = 1
    """Hosts that take part."""
    target_nodes: int = 1
    """As many are wanted, at most."""
    generation: int = 0
    aggregator: str = ""
    """In words, such as 'pid 4242 + standby'."""
    models: tuple[ModelStatus, ...] = ()
    """Of each of several models; nothing if there is but one."""
    events: tuple[Mapping[str, Any], ...] = ()
    """The newest ones, oldest first, as in events.jsonl."""


def write_status(run: RunFolder, status: Status) -> None:
    """Write a snapshot into the run folder, in place of the last one."""
    run.write_json(run.status_json, asdict(status))


def read_status(run: RunFolder) -> Status | None:
    """The snapshot in the run folder; None if there is no fresh one."""
    with contextlib.suppress(FileNotFoundError, ConfigError):  # the job ends just now
        if time.time() - run.status_json.stat().st_mtime < MAX_AGE_S:
            fields = run.read_json(run.status_json)
            models = tuple(ModelStatus(*one) for one in fields["models"])
            return Status(**fields | {"events": tuple(fields["events"]), "models": models})
    return None
