"""What a run gave, as Ray Train's users know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray.train
from ray.train import Checkpoint

from elastic.core import checkpoint
from elastic.core.errors import FatalError
from elastic.core.runs import RunFolder


@dataclass
class Result(ray.train.Result):
    """What a run gave: Ray Train's result, and what makes runs comparable.

    `metrics` holds what result.json holds; `events` what happened, in order.
    """

    metrics: dict[str, Any]
    params_sha256: str = ""
    samples_sha256: str = ""
    exact: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)


def read_result(run: RunFolder) -> Result:
    """The result of an ended run.

    Raises:
        FatalError: it failed.
    """
    metrics = run.read_json(run.result_json)
    if metrics["failure"]:
        raise FatalError(f"{metrics['failure']} (run folder: {run.path})")
    newest = checkpoint.latest_checkpoint(run.checkpoints)
    return Result(
        metrics=metrics,
        checkpoint=Checkpoint(newest) if newest is not None else None,
        error=None,
        path=str(run.path),
        metrics_dataframe=None,
        best_checkpoints=[],
        params_sha256=metrics["params_sha256"],
        samples_sha256=metrics["samples_sha256"],
        exact=metrics["exact"],
        events=run.read_events(),
    )
