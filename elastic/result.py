"""What a run gave, as Ray Train's users know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray.train
from ray.train import Checkpoint

from elastic.core.checkpoint import checkpoints_of, latest_checkpoint
from elastic.core.config import load_job
from elastic.core.errors import FatalError
from elastic.core.retained import kept_checkpoints
from elastic.core.runs import RunFolder


@dataclass
class Result(ray.train.Result):
    """What a run gave: Ray Train's result, and what makes runs comparable.

    `path` is the run folder; metrics.jsonl in it has a line for every step. `error` and
    `metrics_dataframe` are None: a job that failed raises.

    Attributes:
        metrics: what result.json holds: loss and metrics of the last step, the last evaluation,
            seconds, counts.
        checkpoint: the newest.
        best_checkpoints: all that were kept, each with its metrics: with `checkpoint.keep_best` the
            best first, else the newest.
        params_sha256: of all parameters; equal in runs of one job on one kind of hardware.
        samples_sha256: of the samples of every step; equal likewise.
        exact: False if a part of the run was computed elsewhere, so that bits may differ, or if
            slow workers could change the result: docs/stragglers.md, inexact kinds.
        events: what happened, in order: each with time_s, kind, step, generation, worker, reason.
        models: of a job of several models, the result of each; then the sums here are of all of
            them, and there are no checkpoints but theirs.
    """

    metrics: dict[str, Any]
    params_sha256: str = ""
    samples_sha256: str = ""
    exact: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)
    models: list[Result] = field(default_factory=list)


def read_result(run: RunFolder) -> Result:
    """The result of an ended run.

    Raises:
        FatalError: it failed.
    """
    metrics = run.read_json(run.result_json)
    if metrics["failure"]:
        raise FatalError(f"{metrics['failure']} (run folder: {run.path})")
    job = load_job(run.job_json)
    models = [read_result(run.of_model(one)) for one in range(len(metrics.get("models", ())))]
    location = checkpoints_of(run.path)
    newest = latest_checkpoint(location)
    return Result(
        metrics=metrics,
        checkpoint=Checkpoint(newest) if newest is not None else None,
        error=None,
        path=str(run.path),
        metrics_dataframe=None,
        best_checkpoints=[
            (Checkpoint(path), dict(known))
            for path, known in kept_checkpoints(location, run, job.checkpoint)
        ],
        params_sha256=metrics["params_sha256"],
        samples_sha256=metrics["samples_sha256"],
        exact=metrics["exact"],
        events=run.read_events(),
        models=models,
    )
