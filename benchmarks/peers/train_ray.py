"""Ray Train: a TorchTrainer that begins again at its last checkpoint when a worker fails.

    python -m benchmarks.peers.train_ray settings.json [--elastic]

As in Ray's "Get Started with Distributed Training using PyTorch" and "Handling Failures and Node
Preemption". Runs until it is ended.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig

from benchmarks.peers.settings import Settings, read_settings
from benchmarks.peers.training import Log, load, make_rank, save

STATE = "state.pt"
_OBJECT_STORE_BYTES = 100 * 2**20
_CPUS = 16
"""Logical ones: more than workers and controller ask for, whatever the machine has."""


def train_func(config: dict[str, str]) -> None:
    """What every worker runs."""
    settings = read_settings(config["settings"])
    context = ray.train.get_context()
    number, every = context.get_world_rank(), settings.checkpoint_every
    rank = make_rank(
        settings,
        rank=number,
        num_ranks=context.get_world_size(),
        wrap=ray.train.torch.prepare_model,
    )
    first, checkpoint = 0, ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            first = load(Path(folder) / STATE, rank)
    log = Log(settings, number, f"{_incarnation(rank.num_ranks)}")
    for step in itertools.count(first):
        loss = rank.step(step)
        log.step(step, loss, rank.samples(step).tolist())
        if (step + 1) % every == 0:
            with tempfile.TemporaryDirectory() as folder:
                made = None
                if number == 0:
                    save(Path(folder) / STATE, step + 1, rank)
                    made = Checkpoint.from_directory(folder)
                ray.train.report({"loss": loss}, checkpoint=made)


def _incarnation(num_ranks: int) -> float:
    """A name of this start of the group that all its workers agree on."""
    shared = torch.tensor([time.time()], dtype=torch.float64)
    if num_ranks > 1:
        dist.broadcast(shared, 0)
    return float(shared)


def scaling(settings: Settings, *, elastic: bool) -> ScalingConfig:
    """A fixed number of workers, or as many as there is room for."""
    num = settings.num_workers
    return ScalingConfig(num_workers=(1, num) if elastic else num)  # type: ignore[arg-type]


def main() -> None:
    """Train until ended."""
    settings = read_settings(sys.argv[1])
    ray.init(
        address="local",
        num_cpus=_CPUS,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
    )
    trainer = ray.train.torch.TorchTrainer(
        train_func,
        train_loop_config={"settings": str(settings.file)},
        scaling_config=scaling(settings, elastic="--elastic" in sys.argv),
        run_config=RunConfig(
            name="peer",
            storage_path=str(settings.path / "ray"),
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
