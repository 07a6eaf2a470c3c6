"""TorchFT: one replica group of one worker, beside others and a lighthouse.

    TORCHFT_LIGHTHOUSE=http://127.0.0.1:29510 REPLICA_GROUP_ID=0 torchrun --nproc_per_node=1 \\
        -m benchmarks.peers.train_torchft settings.json [--tuned]

As in TorchFT's train_ddp.py, time limits too; --tuned shortens them. The samples of a step are
named by the manager's step, so that a step that was dropped is done again with the same ones,
which the example's loader would skip. Runs until it is ended.
"""

import os
import sys
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.checkpointing.pg_transport import PGTransport

from benchmarks.ddp import Rank
from benchmarks.peers.settings import Settings, read_settings
from benchmarks.peers.training import Log, make_rank

GROUP_TIMEOUT_S = {False: 5.0, True: 2.5}
"""Of the process group: as in the example; tuned."""
MANAGER_TIMEOUT_S = {False: 30.0, True: 10.0}
TRANSPORT_TIMEOUT_S = 10.0


class Ddp(DistributedDataParallel):  # type: ignore[misc]
    """TorchFT's, mended: in version 0.2.0 its hook asserts that the all-reduce has a future, which
    one that failed on Gloo has not, so every survivor of a fault died of that assertion.
    """

    @staticmethod
    def _comm_hook(
        state: Manager,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """Average a bucket. An error is told to the manager, which drops the step."""
        state.allreduce(bucket.buffer()).wait()
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


class Replica:
    """A rank whose all-reduces may fail."""

    def __init__(self, settings: Settings, group: int, *, tuned: bool) -> None:
        pg = ProcessGroupGloo(timeout=timedelta(seconds=GROUP_TIMEOUT_S[tuned]))
        self.lineage = uuid.uuid4().hex
        """Names the state: who begins with nobody else's has another one."""
        transport = PGTransport(
            pg, timeout=timedelta(seconds=TRANSPORT_TIMEOUT_S), device=torch.device("cpu")
        )
        self.manager = Manager(
            pg=pg,
            min_replica_size=1,
            load_state_dict=self.load_state_dict,
            state_dict=self.state_dict,
            replica_id=f"group_{group}",
            timeout=timedelta(seconds=MANAGER_TIMEOUT_S[tuned]),
            checkpoint_transport=transport,
            hostname="127.0.0.1",
        )
        self.rank: Rank = make_rank(
            settings,
            rank=group,
            num_ranks=settings.num_workers,
            wrap=lambda model: Ddp(self.manager, model),
            wrap_optimizer=lambda optimizer: Optimizer(self.manager, optimizer),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a replica that comes back receives from another one."""
        return {
            "lineage": self.lineage,
            "model": self.rank.model.state_dict(),
            "optim": self.rank.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lineage = state["lineage"]
        self.rank.model.load_state_dict(state["model"])
        self.rank.optimizer.load_state_dict(state["optim"])

    def step(self, log: Log) -> None:
        """Try one step; log it only if it was committed with samples of this group."""
        step = self.manager.current_step()
        loss = self.rank.step(step)
        if self.manager.current_step() == step + 1 and self.manager.is_participating():
            samples = self.rank.samples(step).tolist()
            log.step(step, loss, samples, incarnation=self.lineage)


def main() -> None:
    """Join the others and train for ever."""
    settings = read_settings(sys.argv[1])
    group = int(os.environ["REPLICA_GROUP_ID"])
    replica = Replica(settings, group, tuned="--tuned" in sys.argv)
    log = Log(settings, group, replica.lineage)
    while True:
        replica.step(log)


if __name__ == "__main__":
    main()
