"""What many nodes cost, and what losing some of them costs.

    python -m benchmarks.cluster [--only exchange,step,faults,join,frozen,chaos]
                                 [--size small|10m] [--quick] [--runs 20] [--seed 0]

    exchange    totals of 40 MB of int32 over the links of two nodes / gloo all-reduce of float32
    step        step time with 3 nodes / with 1 node and the same 6 workers, jobs in turn
    faults      a host killed, cut off, frozen for 20 s; the coordinator killed: the gaps
    join        a third host comes: the longest step around it, and when it is of use
    frozen      a host frozen for 120 s, which comes back as another
    chaos       runs of 200 steps on 3 nodes with random happenings: do all end with the same bits?
                Stops at the first that does not; --seed S --runs 1 repeats the run printed as S

The first in two processes over loopback, one thread each, in turn; the others, as root, on a
testbed of three hosts that share this machine's cores.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import secrets
import selectors
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from actors.exchanging import Arrays, Round
from actors.links import Link
from actors.listener import Listener, Unreachable
from benchmarks import changes, chaos_of_hosts, jobs
from benchmarks.hosts import (
    HEAD,
    NUM_HOSTS,
    NUM_WORKERS,
    Happening,
    HostJob,
    HostRun,
    host_job,
    silent_limit_s,
)
from benchmarks.jobs import hand_over, timed
from benchmarks.record import Figure, figure, ratio
from elastic.core.layout import make_layout
from elastic.core.mapped import Sizes
from elastic.core.protocol.exchange import BLOCK_BYTES, Arrived, Exchange, SumReady
from elastic.core.protocol.frames import Block
from elastic.core.protocol.handshake import SECRET_BYTES, Credentials
from scripts.testbed import Testbed

PARTS = ("exchange", "step", "faults", "join", "frozen", "chaos")
STEP_LIMITS = {"10m": 1.3}
GAP_LIMIT_S = 0.1
"""A killed host, beyond the median step and the recomputing of its micro-batches."""
FROZEN_S = 20.0
LIMIT = 1.0
BYTES_LIMIT = 1.001
"""Headers included."""

NUM_ELEMENTS = 10_000_000
CHUNK_ELEMENTS = 262_144  # the default of a job
NUM_NODES = 2
WARM_UP = 5
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Seen:
    """What one node saw, by repetition."""

    ours_s: list[float]
    theirs_s: list[float]
    sent_bytes: list[int]


class Node:
    """One of two nodes: its numbers, its link to the other, and its rank in the peer's group."""

    def __init__(self, me: int, secret: bytes, folder: Path) -> None:
        self._me, self._other = me, 1 - me
        layout = make_layout([[("x", (NUM_ELEMENTS,))]], chunk_elements=CHUNK_ELEMENTS)
        self._sizes, num = Sizes(layout, num_micro_batches=1), layout.num_elements
        dice = np.random.default_rng(0)
        sums = [dice.integers(-(2**20), 2**20, num, np.int32) for _ in range(NUM_NODES)]
        self._expected_N = sums[0] + sums[1]
        self._arrays = Arrays(sums[me], np.zeros(num, np.int32), [])
        self._floats = torch.from_numpy(sums[me].astype(np.float32))
        self._reduced = self._floats.clone()
        self._keepers = [(one.index % 2, 1 - one.index % 2) for one in layout.chunks]
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'gloo'}", rank=me, world_size=NUM_NODES
        )
        self._selector = selectors.DefaultSelector()
        self._link = self._connect(Credentials(me, secret))
        self._link.attach(self._selector, None)

    def _connect(self, credentials: Credentials) -> Link:
        """Node 1 calls node 0."""
        listener = Listener(HOST, credentials)
        port = torch.tensor([listener.address[1]])
        dist.broadcast(port, 0)
        if self._me:
            listener.call(self._other, (HOST, int(port)))
        self._selector.register(listener, selectors.EVENT_READ)
        made: list[Link | Unreachable] = []
        while not made:
            self._selector.select(1)
            made = listener.turn()
        self._selector.unregister(listener)
        listener.close()
        (link,) = made
        assert isinstance(link, Link), link
        return link

    def compare(self, repetitions: int) -> Seen:
        """Do both in turn, with a check of the numbers at the end of each."""
        seen = Seen([], [], [])
        for number in range(WARM_UP + repetitions):
            sent_bytes = self._link.traffic.bytes_out
            ours_s = self._time(functools.partial(self._exchange, number))
            sent_bytes = self._link.traffic.bytes_out - sent_bytes
            assert (self._arrays.totals_N == self._expected_N).all()
            self._arrays.totals_N.fill(0)
            theirs_s = self._time(lambda: dist.all_reduce(self._reduced))
            assert (self._reduced.numpy() == self._expected_N).all()
            self._reduced.copy_(self._floats)
            if number >= WARM_UP:
                seen.ours_s.append(ours_s)
                seen.theirs_s.append(theirs_s)
                seen.sent_bytes.append(sent_bytes)
        return seen

    def _time(self, work: Callable[[], object]) -> float:
        dist.barrier()
        begin_s = time.perf_counter()
        work()
        return time.perf_counter() - begin_s

    def _exchange(self, number: int) -> None:
        """One round, until the totals are here and this node's part has left."""
        exchange = Exchange(
            number,
            me=self._me,
            nodes=(0, 1),
            keepers=self._keepers,
            lengths=[self._sizes.lengths(chunk) for chunk in self._sizes.layout.chunks],
        )
        link = self._link
        links = {self._other: link}
        round = Round(exchange, sizes=self._sizes, links=links, arrays=self._arrays)
        place = functools.partial(round.place, self._other)
        for chunk in exchange.order():
            round.handle(SumReady(chunk))
        while not exchange.has_totals or link.has_unsent:
            for _, events in self._selector.select():
                if events & selectors.EVENT_WRITE:
                    link.flush()
                if events & selectors.EVENT_READ:
                    while (frame := link.receive(place)) is not None:
                        assert isinstance(frame, Block)
                        round.handle(Arrived(self._other, frame))


def _run_node(me: int, secret: bytes, folder: Path, repetitions: int, results: Connection) -> None:
    torch.set_num_threads(1)
    node = Node(me, secret, folder)
    results.send(node.compare(repetitions))
    dist.barrier()
    dist.destroy_process_group()


def measure_exchange(repetitions: int) -> list[Seen]:
    """Start two nodes and return what each saw."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("spawn")
    secret = secrets.token_bytes(SECRET_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(NUM_NODES)]
        nodes = [
            context.Process(
                target=_run_node, args=(me, secret, Path(folder), repetitions, writer), daemon=True
            )
            for me, (_, writer) in enumerate(pipes)
        ]
        for node in nodes:
            node.start()
        for _, writer in pipes:
            writer.close()
        seen = [reader.recv() for reader, _ in pipes]
        for node in nodes:
            node.join()
    return seen


def figures(seen: Sequence[Seen]) -> list[Figure]:
    """A repetition takes as long as the node that takes longest."""
    ours_s = [max(both) for both in zip(*(one.ours_s for one in seen), strict=True)]
    theirs_s = [max(both) for both in zip(*(one.theirs_s for one in seen), strict=True)]
    bound_bytes = 2 * (NUM_NODES - 1) / NUM_NODES * 4 * NUM_ELEMENTS
    sent = [num / bound_bytes for one in seen for num in one.sent_bytes]
    size = f"{4 * NUM_ELEMENTS // 10**6} MB, {NUM_NODES} nodes"
    return [
        ratio(
            f"exchange of int32 / gloo all-reduce of float32, {size}", ours_s, theirs_s, limit=LIMIT
        ),
        figure(f"exchange, {size}", ours_s, unit="s"),
        figure(f"gloo all-reduce, {size}", theirs_s, unit="s"),
        figure(
            f"bytes sent per node / lower bound 2(N-1)/N, {size}",
            sent,
            unit="x",
            limit=BYTES_LIMIT,
            statistic="largest",
        ),
    ]


def measure_step(bed: Testbed, size: str, *, quick: bool) -> list[Figure]:
    """One node and three in turn."""
    rounds, steps = (1, 6) if quick else (3, 20 if size == "10m" else 100)
    steps_s: dict[int, list[float]] = {1: [], NUM_HOSTS: []}
    for number in range(rounds):
        for nodes in (1, NUM_HOSTS):
            overrides = (f"steps={jobs.ENDLESS}", "workers.spare=0", "standby=false")
            with timed(f"step {size}, round {number + 1} of {rounds}, {nodes} nodes"):
                job = HostJob(bed, host_job(f"step-{nodes}", size, nodes, *overrides))
                job.settle()
                job.go_on(steps)
                steps_s[nodes] += job.stop().steps_s
    many_s, one_s = steps_s[NUM_HOSTS], steps_s[1]
    return [
        ratio(
            f"step time, {NUM_HOSTS} nodes / 1 node, {NUM_WORKERS} workers, {size}",
            many_s,
            one_s,
            limit=STEP_LIMITS.get(size),
        ),
        figure(f"step time, {NUM_HOSTS} nodes, {size}", many_s, unit="s"),
        figure(f"step time, 1 node, {size}", one_s, unit="s"),
    ]


FAULTS: Mapping[str, Happening] = {
    "host killed": Happening(30, "kill", "h3"),
    "host cut off": Happening(30, "cut", "h3"),
    "host frozen for 20 s": Happening(30, "freeze", "h3", FROZEN_S),
    "coordinator killed": Happening(30, "kill_coordinator", HEAD),
}


def measure_faults(bed: Testbed, size: str, *, quick: bool) -> list[Figure]:
    """Each kind in turn, several times."""
    rounds = 1 if quick else 5
    runs: dict[str, list[HostRun]] = {name: [] for name in FAULTS}
    for number in range(rounds):
        for name, what in FAULTS.items():
            with timed(f"{name}, round {number + 1} of {rounds}"):
                job = HostJob(bed, host_job("faults", size, NUM_HOSTS, f"steps={jobs.ENDLESS}"))
                job.settle()
                job.happen(what)
                job.go_on(what.after + 30)
                runs[name].append(job.stop())
    figures: list[Figure] = []
    for name, seen in runs.items():
        beyond_s = [run.gap_s() - run.median_s for run in seen]
        silent_s = silent_limit_s(seen)
        limit = {"host cut off": silent_s, "host frozen for 20 s": silent_s}.get(name)
        figures.append(
            figure(f"{name}: gap beyond the median, {size}", beyond_s, unit="s", limit=limit)
        )
        figures.append(
            figure(
                f"{name}: steps lost, {size}",
                [float(len(run.lost_steps())) for run in seen],
                unit="steps",
                limit=0.0,
                statistic="largest",
            )
        )
    killed = runs["host killed"]
    rest_s = [run.gap_s() - run.median_s - run.recomputing_s() for run in killed]
    figures.append(
        figure(
            f"host killed: gap beyond the median and recomputing, {size}",
            rest_s,
            unit="s",
            limit=GAP_LIMIT_S,
        )
    )
    return figures


ON_HOSTS = {
    "step": measure_step,
    "faults": measure_faults,
    "join": changes.measure_join,
    "frozen": changes.measure_frozen,
}


def _exchange(options: argparse.Namespace) -> None:
    with timed("exchange"):
        seen = measure_exchange(10 if options.quick else 100)
    config = {
        "elements": NUM_ELEMENTS,
        "chunk_elements": CHUNK_ELEMENTS,
        "block_bytes": BLOCK_BYTES,
        "nodes": NUM_NODES,
        "warm_up": WARM_UP,
    }
    hand_over("cluster-exchange", options, config, figures(seen))


def _chaos(bed: Testbed, size: str, options: argparse.Namespace) -> list[Figure]:
    num_runs, num_steps = chaos_of_hosts.NUM_RUNS, chaos_of_hosts.NUM_STEPS
    if options.quick:
        num_runs, num_steps = 2, chaos_of_hosts.QUICK_STEPS
    return chaos_of_hosts.measure(
        bed, size, num_runs=options.runs or num_runs, seed=options.seed, num_steps=num_steps
    )


def main() -> int:
    """Run the parts asked for; one record each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    jobs.add_options(parser, PARTS)
    parser.add_argument("--runs", type=int, default=None, help="of chaos; default: 20, quick 2")
    parser.add_argument("--seed", type=int, default=0, help="of the first run of chaos")
    options = parser.parse_args()
    parts = jobs.chosen(parser, options, PARTS)
    if "exchange" in parts:
        _exchange(options)
    on_hosts = [part for part in PARTS if part in parts and part != "exchange"]
    if not on_hosts:
        return 0
    size = options.size or "small"
    with chaos_of_hosts.lasting_gcs(), Testbed(f"bench{os.getpid()}") as bed:
        bed.up(NUM_HOSTS)
        for part in on_hosts:
            config = {"size": size, "hosts": NUM_HOSTS, "workers": NUM_WORKERS}
            if part == "chaos":
                made = _chaos(bed, size, options)
                config |= {"seed": options.seed}
            else:
                made = ON_HOSTS[part](bed, size, quick=options.quick)
            hand_over(f"cluster-{part}-{size}", options, config, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
