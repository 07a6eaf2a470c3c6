"""A node whose state goes wrong is outvoted by those that keep the same, and comes back with it."""

from __future__ import annotations

import pickle
import struct
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.hosts import HostJob
from elastic.core.compute import make_sizes
from elastic.core.config import JobConfig
from elastic.core.mapped import EMA
from scripts.testbed import Testbed
from tests.hosts.testbeds import bits, hosts_up, on_hosts
from tests.integration.support import make_job, wait_until

pytestmark = on_hosts(300)

NUM_STEPS = 600

bed = hosts_up("odd", 3)


def job_on(num_nodes: int, name: str) -> JobConfig:
    return make_job(
        name,
        workers=3,
        steps=NUM_STEPS,
        nodes={"min": num_nodes, "max": num_nodes},
        replicas=3,
        monitoring={"compare_every": 10},
    )


class Memory:
    """Of a node on a host: what it averages, which no gradient depends on."""

    def __init__(self, store: Path, job: JobConfig) -> None:
        sizes = make_sizes(pickle.loads((store / "spec").read_bytes()), job)
        position = sizes.optimizer_keys.index(EMA)
        self._at = 4 * sizes.layout.num_parameter_elements * position
        self._files = [(store / f"optimizer-{one}").open("r+b") for one in (0, 1)]

    def spoil(self) -> None:
        """Its first element. An update that runs may write over it."""
        for file in self._files:
            file.seek(self._at)
            file.write(struct.pack("<f", 1e6))
            file.flush()

    def close(self) -> None:
        for file in self._files:
            file.close()


def corruptions(events: list[dict[str, Any]]) -> list[str]:
    reasons = [one["reason"] for one in events if one["kind"] == "verdict"]
    return [one for one in reasons if one.startswith("silent corruption: ")]


def test_a_node_whose_state_went_wrong_comes_back_with_that_of_the_others(bed: Testbed) -> None:
    calm = bits(HostJob(bed, job_on(1, "calm")).end())
    config = job_on(3, "odd")
    job = HostJob(bed, config)
    job.settle()
    begin_s = time.time()
    (store,) = bed.host("h3").root.glob(f"dev/shm/elastic-*/{config.name}.*")
    with closing(Memory(store, config)) as memory:

        def told() -> list[str]:
            memory.spoil()
            return corruptions(job.run.read_events())

        (reason,) = wait_until(told, "the node is named", timeout_s=60)
    assert reason.endswith(": 2 others agree")
    job.await_event("node_joined", job.await_event("node_lost", begin_s))
    run = job.end()
    assert bits(run) == calm
    assert corruptions(run.events) == [reason], "what it came back with is right"
