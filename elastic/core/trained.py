"""`load_model`: what a run has trained, as an ordinary module of PyTorch."""

from __future__ import annotations

from os import PathLike
from typing import Any, Protocol

import torch
from torch import nn

from elastic.core.checkpoint import Checkpoint, find_checkpoint, read_entry
from elastic.core.errors import ConfigError, TaskError
from elastic.core.layout import COMPILED
from elastic.core.storage import RemoteStorage
from elastic.core.task import Task, load_task
from elastic.core.weights import place_weights


class HasPath(Protocol):
    """Such as `ray.train.Checkpoint`, and so `result.checkpoint`."""

    path: str
    filesystem: Any


def load_model(
    source: str | PathLike[str] | HasPath,
    task: Task | nn.Module | None = None,
    *,
    averaged: bool = False,
) -> nn.Module:
    """The trained model, on the CPU and in eval mode.

    Args:
        source: a run folder, a checkpoint, a folder of checkpoints (the newest good one counts), a
            URI of one of these, or `result.checkpoint`.
        task: what builds the model, or a model to fill; by default the task that the job file
            named, which must be importable here.
        averaged: take the average of the weights over the steps, which a job with `ema` keeps.

    Raises:
        CheckpointError: there is no good checkpoint.
        ConfigError: the task cannot be imported, or its model has other names or shapes; or there
            is no average.
    """
    found = _find(source)
    weights = found.averaged if averaged else found.weights
    if weights is None:
        raise ConfigError(
            f"{found.path}: its job averaged no weights; set ema.decay, or averaged=False"
        )
    if isinstance(task, nn.Module):
        model = task
    else:
        with torch.random.fork_rng(devices=()):  # its first weights are of no interest
            model = (task or _task_of(found)).model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"model() returned {type(model).__name__}, must be a torch.nn.Module")
    entries = model.state_dict(keep_vars=True)
    targets = {name.removeprefix(COMPILED): tensor for name, tensor in entries.items()}
    place_weights(weights, targets, refusal=f"{found.path} does not fit the model of this task:")
    return model.eval()


def _find(source: str | PathLike[str] | HasPath) -> Checkpoint:
    filesystem = getattr(source, "filesystem", None)
    if filesystem is None:
        return find_checkpoint(str(source))
    path: str = source.path  # type: ignore[union-attr] # what has one has the other
    if filesystem.type_name == "local":
        return find_checkpoint(path)
    folder, _, name = path.rstrip("/").rpartition("/")
    return read_entry(RemoteStorage(f"{filesystem.type_name}://{folder}", filesystem, folder), name)


def _task_of(found: Checkpoint) -> Task:
    job = found.meta["job"]
    if not job["task"]:
        raise ConfigError(
            f"{found.path}: its job was given a task object, not a name: pass it, as"
            " load_model(path, task=...)"
        )
    return load_task(job["task"], job["task_args"])
