"""The checkpoints that a run keeps, and what is known of each: which is best, and what stays.

Only reads. The removing follows `policies.retention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from elastic.core import checkpoint
from elastic.core.config import CheckpointConfig
from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder
from elastic.core.storage import below, open_storage
from policies.retention import Kept, LastAndBest

Metrics = dict[str, float]


def retention(config: CheckpointConfig) -> LastAndBest:
    """The policy that a job asks for."""
    return LastAndBest(keep_last=config.keep_last, keep_best=config.keep_best, mode=config.mode)


def check_metric(
    config: CheckpointConfig, trained: Sequence[str], evaluated: Sequence[str] | None
) -> None:
    """Refuse to choose the best by what will never be known.

    Args:
        trained: metrics of training besides the loss.
        evaluated: those of evaluations; None if the job has none.

    Raises:
        ConfigError: the job has no such metric.
    """
    known = ["loss", *trained]
    if evaluated is not None:
        known += [f"eval.{name}" for name in ("loss", *evaluated)]
    if config.keep_best and config.metric not in known:
        raise ConfigError(
            f"checkpoint.metric: got {config.metric!r}; this job knows {', '.join(known)}"
            + ("; set evaluate.every for eval.loss" if evaluated is None else "")
        )


def metrics_at(run: RunFolder, step: int, trained: Mapping[str, float | None]) -> Metrics:
    """What is known of the state after `step` steps: what its last step `trained`, and what
    evaluations of that very state gave, as eval.loss, eval.NAME. Nothing that is not finite."""
    known = dict(trained)
    for line in run.read_evaluations():
        if line["step"] == step:
            values = {"loss": line["loss"], **line["metrics"]}
            known |= {f"eval.{name}": value for name, value in values.items()}
    return {
        name: value for name, value in known.items() if value is not None and math.isfinite(value)
    }


def kept_checkpoints(
    location: str, run: RunFolder, config: CheckpointConfig
) -> list[tuple[str, Metrics]]:
    """Path or URI and metrics of each checkpoint: best first by the configured metric, where
    `keep_best` asks for it, and behind them, or else, the newest first."""
    storage = open_storage(location)
    found: dict[int, tuple[str, Metrics]] = {}
    for step, name in checkpoint.checkpoint_steps(storage).items():
        meta = checkpoint.read_meta(storage, step)
        if meta is not None:  # not damaged
            metrics = meta.get("metrics", {}) | metrics_at(run, step, {})
            found[step] = below(location, name), metrics
    ranked: list[int] = []
    if config.keep_best:
        values = [Kept(step, metrics.get(config.metric)) for step, (_, metrics) in found.items()]
        ranked = [one.step for one in retention(config).ranked(values)]
    rest = sorted(found.keys() - set(ranked), reverse=True)
    return [found[step] for step in (*ranked, *rest)]
