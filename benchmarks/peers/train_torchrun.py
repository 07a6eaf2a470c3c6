"""Plain DistributedDataParallel over Gloo; with checkpoints it may be started again by torchrun.

    torchrun --nproc-per-node=4 --max-restarts=9 -m benchmarks.peers.train_torchrun FILE

As in PyTorch's "Fault-tolerant Distributed Training with torchrun": each rank loads the snapshot
at its start, rank 0 writes one every `checkpoint_every` steps. Runs until it is ended.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch.distributed as dist

from benchmarks.peers.settings import read_settings
from benchmarks.peers.training import Log, load, make_rank, save


def main() -> None:
    """Join the group and train for ever."""
    settings = read_settings(sys.argv[1])
    dist.init_process_group("gloo")
    number, every = dist.get_rank(), settings.checkpoint_every
    rank = make_rank(settings, rank=number, num_ranks=dist.get_world_size())
    snapshot = settings.path / "snapshot.pt"
    log = Log(settings, number, os.environ["TORCHELASTIC_RESTART_COUNT"])
    first = load(snapshot, rank) if every else 0
    for step in itertools.count(first):
        loss = rank.step(step)
        log.step(step, loss, rank.samples(step).tolist())
        if every and number == 0 and (step + 1) % every == 0:
            save(snapshot, step + 1, rank)


if __name__ == "__main__":
    main()
