"""What the trainers of the peers share: the model on its share of a batch, and the log.

Imports nothing of a peer, and of ours only the example's task and its order of samples.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ddp import JOB, Rank
from benchmarks.peers.settings import THREADS, Settings
from elastic.core.config import JobConfig, load_job
from elastic.core.model import sample_stream
from elastic.core.task import load_task


def make_job(settings: Settings, *more: str) -> JobConfig:
    """The example's job in the size and with the batch of the settings."""
    parts = settings.micro_batches or settings.num_workers
    return load_job(
        JOB,
        [
            f"task_args.size={settings.size}",
            f"batch.micro_batches={parts}",
            f"batch.micro_batch_size={settings.batch // parts}",
            f"workers.start={settings.num_workers}",
            f"checkpoint.every={settings.checkpoint_every}",
            *more,
        ],
    )


def make_rank(
    settings: Settings, *, rank: int, num_ranks: int, **wraps: Callable[..., Any]
) -> Rank:
    """One rank of a peer: plain PyTorch with the wrappers that the peer asks for."""
    torch.set_num_threads(THREADS)
    job = make_job(settings)
    task = load_task(job.task, job.task_args)
    return Rank(job, task, rank=rank, num_ranks=num_ranks, **wraps)


class Log:
    """One line an event of one worker; each is one write, so lines of several never mix."""

    def __init__(self, settings: Settings, worker: int, incarnation: str) -> None:
        self._file = os.open(settings.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._common = {"worker": worker, "incarnation": incarnation}
        self.tell("worker", pid=os.getpid())

    def tell(self, kind: str, **fields: Any) -> None:
        line = {"kind": kind, "time_s": time.time(), **self._common, **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def step(self, step: int, loss: float, samples: list[int], **more: str) -> None:
        """A step that this worker has taken, with its own samples and their mean loss."""
        self.tell("step", step=step, loss=loss, samples=samples, **more)


def save(path: Path, step: int, rank: Rank) -> None:
    """Write a snapshot that is whole or not there: `step` is the next one to do."""
    state = {"step": step, "model": rank.model.state_dict(), "optim": rank.optimizer.state_dict()}
    draft = path.with_suffix(".draft")
    torch.save(state, draft)
    draft.replace(path)


def load(path: Path, rank: Rank) -> int:
    """Read a snapshot. Returns the next step to do: 0 if there is none."""
    if not path.exists():
        return 0
    state = torch.load(path)
    rank.model.load_state_dict(state["model"])
    rank.optimizer.load_state_dict(state["optim"])
    return int(state["step"])


def names_of(settings: Settings) -> Callable[[int, int], Sequence[int]]:
    """(step, micro-batch) -> the indices of its samples, of a job of ours."""
    job = make_job(settings)
    stream = sample_stream(job, load_task(job.task, job.task_args).dataset())
    batch = job.batch

    def names(step: int, number: int) -> list[int]:
        size = batch.micro_batch_size
        return [int(one) for one in stream.micro_batch(step, number, batch.micro_batches, size)]

    return names
