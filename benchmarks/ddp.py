"""The peer: plain DistributedDataParallel over gloo on the same model, data, batch and optimizer.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node 4 \\
        -m benchmarks.ddp --size small --steps 60 --out ddp.jsonl

Each rank computes its share of the global batch in one piece, as anybody would. Writes JSON lines:
one per rank with its pid, `warm` after the first steps, and at the end one per step with rank 0's
time and one with the losses.
It imports nothing of Elastic that runs a step; only the example's task and its order of samples.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elastic.core.config import JobConfig, load_job
from elastic.core.model import sample_stream, seed_generators
from elastic.core.permutation import derive_key
from elastic.core.task import Task, load_task

JOB = Path(__file__).parent.parent / "examples" / "stdlib_lm" / "job.yaml"
WARM_UP = 5
"""Steps at the beginning of each segment that are not counted."""

RANDOM_SHARE = 0.2
SLEEPER = 1
LABELS = ("calm", "one", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`pattern` names the segments of `steps` steps each: calm; one: rank 1 sleeps in every step;
    random: a random rank sleeps in a fifth of the steps. `sleep_s` None: the calm median.
    """

    size: str
    steps: int
    rounds: int
    pattern: tuple[str, ...]
    sleep_rank: int
    sleep_s: float | None
    report_memory: bool
    out: Path


def sleeps(label: str, rank: int, num_ranks: int, step: int, sleep_rank: int = SLEEPER) -> bool:
    """Whether this rank sleeps in this step; the same answer on every rank."""
    if label == "one":
        return rank == sleep_rank
    dice = random.Random(derive_key("slow", step))
    return label == "random" and dice.random() < RANDOM_SHARE and dice.randrange(num_ranks) == rank


class Rank:
    """One rank: the model in its wrapper, the optimizer, and its share of every batch."""

    def __init__(
        self,
        job: JobConfig,
        task: Task,
        *,
        rank: int,
        num_ranks: int,
        wrap: Callable[[nn.Module], Any] = DistributedDataParallel,
        wrap_optimizer: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: optimizer,
    ) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._job, self._task = job, task
        seed_generators(derive_key("model", job.seed))
        self.model = task.model()
        self._wrapped = wrap(self.model)
        self.optimizer = wrap_optimizer(task.optimizer(list(self.model.named_parameters())))
        self._lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._schedule: Callable[[int], float] = getattr(task, "schedule", lambda step: 1.0)
        self._dataset = task.dataset()
        self._stream = sample_stream(job, self._dataset)
        self._batch = job.batch.micro_batches * job.batch.micro_batch_size
        self._share = self._batch // self.num_ranks

    def samples(self, step: int) -> npt.NDArray[np.int64]:
        """The indices of this rank's share of a step's batch, shape (share,)."""
        begin = step * self._batch + self.rank * self._share
        return self._stream.training(np.arange(begin, begin + self._share, dtype=np.int64))

    def step(self, step: int) -> float:
        """One optimizer step. Returns the mean loss of this rank's samples."""
        windows = self._dataset.fetch(self.samples(step))
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * self._schedule(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, weight, *_ = self._task.loss(self._wrapped, windows)
        loss = loss_sum / weight  # every rank has the same weight: the mean of means is the mean
        loss.backward()  # type: ignore[no-untyped-call]
        if self._job.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._job.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def state_bytes(self) -> dict[str, int]:
        """What this rank keeps, by kind."""
        parameters = sum(one.numel() * one.element_size() for one in self.model.parameters())
        state = sum(
            value.numel() * value.element_size()
            for slots in self.optimizer.state.values()
            for value in slots.values()
            if isinstance(value, torch.Tensor)
        )
        return {"parameters": parameters, "optimizer": state, "gradient_buckets": parameters}


def train(rank: Rank, options: Options, emit: Callable[[dict[str, Any]], None]) -> None:
    """Run all segments and emit what was seen."""
    labels = options.pattern * options.rounds
    sleep_s = options.sleep_s
    lines: list[dict[str, Any]] = []
    losses: list[float] = []
    for segment, label in enumerate(labels):
        if label != "calm" and sleep_s is None:
            sleep_s = _agreed_median([one["step_s"] for one in lines if one["label"] == "calm"])
        begin_s = time.monotonic()
        for within in range(options.steps):
            step = segment * options.steps + within
            if sleeps(label, rank.rank, rank.num_ranks, step, options.sleep_rank):
                time.sleep(sleep_s or 0.0)
            losses.append(rank.step(step))
            now_s = time.monotonic()
            lines.append({"kind": "step", "step": step, "label": label, "segment": segment})
            lines[-1] |= {"within": within, "step_s": now_s - begin_s}
            begin_s = now_s
            if len(lines) == WARM_UP:
                emit({"kind": "warm"})
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    end: dict[str, Any] = {"kind": "end", "losses": (mean / rank.num_ranks).tolist()}
    if options.report_memory:
        end["state_bytes"] = rank.state_bytes()
    for line in (*lines, {**end, "sleep_s": sleep_s}):
        emit(line)


def _agreed_median(steps_s: list[float]) -> float:
    """Rank 0's median, known to all."""
    shared = torch.tensor([statistics.median(steps_s[WARM_UP:] or steps_s)], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def parse(words: list[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=("small", "10m"), default="small")
    parser.add_argument("--steps", type=int, default=60, help="steps of one segment")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of the pattern")
    parser.add_argument("--pattern", default="calm", help="segments, such as calm,one,random")
    parser.add_argument("--sleep-rank", type=int, default=SLEEPER, help="who sleeps in 'one'")
    parser.add_argument("--sleep-s", type=float, default=None, help="default: one calm step time")
    parser.add_argument("--report-memory", action="store_true", help="bytes of state of a rank")
    parser.add_argument("--out", type=Path, default=Path("/dev/stdout"), help="JSON lines")
    values = vars(parser.parse_args(words))
    pattern = tuple(values.pop("pattern").split(","))
    if not set(pattern) <= set(LABELS):
        parser.error(f"--pattern: allowed are {', '.join(LABELS)}")
    if values["sleep_s"] is None and pattern[0] != "calm" and pattern != ("calm",):
        parser.error("--pattern: begins with calm unless --sleep-s is given")
    return Options(pattern=pattern, **values)


def main() -> None:
    """Join the group and train."""
    options = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo")
    job = load_job(JOB, [f"task_args.size={options.size}"])
    task = load_task(job.task, job.task_args)
    rank = Rank(job, task, rank=dist.get_rank(), num_ranks=dist.get_world_size())

    def emit(line: dict[str, Any]) -> None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    emit({"kind": "rank", "rank": rank.rank, "pid": os.getpid()})
    train(rank, options, emit if rank.rank == 0 else lambda line: None)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
