"""What a change of hosts costs a job on a testbed: one that comes, one that is away for long.

Parts `join` and `frozen` of `benchmarks.cluster`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import jobs
from benchmarks.hosts import (
    NUM_HOSTS,
    Happening,
    HostJob,
    HostRun,
    host_job,
    silent_limit_s,
    start_again,
)
from benchmarks.jobs import timed
from benchmarks.record import Figure, figure
from scripts.testbed import Testbed

JOIN_LIMIT = 1.5
"""The longest step of the others around a join, over the median before."""
USEFUL_LIMIT_S = 10.0
"""Till a host that came contributes, beyond the start of one actor at that load."""
FROZEN_S = 120.0
QUICK_FROZEN_S = 15.0
"""Long enough for Ray to give the host up."""
_LAST = f"h{NUM_HOSTS}"


def measure_join(bed: Testbed, size: str, *, quick: bool) -> list[Figure]:
    """The last host comes to a job of the others, which give it some of their workers."""
    rounds = 1 if quick else 5
    runs: list[HostRun] = []
    raylet_s, actor_s, member_s, useful_s, start_s = [], [], [], [], []
    longest, moved = [], []
    for number in range(rounds):
        with timed(f"join {size}, round {number + 1} of {rounds}"):
            bed.host(_LAST).kill()
            nodes = (f"nodes.min={NUM_HOSTS - 1}", f"nodes.max={NUM_HOSTS}")
            job = HostJob(bed, host_job("join", size, 1, f"steps={jobs.ENDLESS}", *nodes))
            job.settle()
            job.go_on(30)
            begin_s, up_s = start_again(bed, bed.host(_LAST))
            raylet_s.append(up_s - begin_s)
            actor_s.append(job.await_event("node_joining", begin_s) - up_s)
            member_s.append(job.await_event("node_joined", begin_s) - up_s)
            useful_s.append(job.await_worker(up_s) - up_s)
            end_s = job.await_event("worker_joined", up_s + useful_s[-1])
            runs.append(job.stop())
            start_s.append(longest_start(runs[-1], up_s + member_s[-1]))
            longest.append(longest_over_median(runs[-1], begin_s, up_s, end_s))
            moved += copies_moved(runs[-1])
    figures = [
        figure(
            f"host joins: longest step of the others / median, {size}",
            longest,
            unit="x",
            limit=JOIN_LIMIT,
        ),
        figure(f"host joins: its raylet starts, {size}", raylet_s, unit="s"),
        figure(f"host joins: from its raylet till its aggregator runs, {size}", actor_s, unit="s"),
        figure(f"host joins: from its raylet to membership, {size}", member_s, unit="s"),
        figure(
            f"host joins: from its raylet to its first micro-batch, {size}",
            useful_s,
            unit="s",
            limit=USEFUL_LIMIT_S + statistics.median(start_s),
        ),
        figure(f"host joins: a worker's start at that load, {size}", start_s, unit="s"),
        _lost(f"host joins: steps lost, {size}", runs),
    ]
    if moved:
        figures.append(figure(f"host joins: copies of state sent, {size}", moved, unit="chunks"))
    return figures


def longest_over_median(run: HostRun, begin_s: float, up_s: float, end_s: float) -> float:
    """The longest step from `up_s`, when the raylet was there, to `end_s`, over the median of those
    before `begin_s`, when it began to start."""
    rows = run.metrics[run.settled :]
    before = [float(one["step_s"]) for one in rows if one["time_s"] < begin_s]
    around = [float(one["step_s"]) for one in rows if up_s < one["time_s"] < end_s]
    return max(around) / statistics.median(before)


def longest_start(run: HostRun, since_s: float) -> float:
    """How long the slowest worker took from its start, after that time, to its membership."""
    told = [one for one in run.events if one["time_s"] > since_s]
    begun = {one["worker"]: one["time_s"] for one in told if one["kind"] == "worker_started"}
    joined = {one["worker"]: one["time_s"] for one in told if one["kind"] == "worker_joined"}
    return float(max(joined[worker] - begun[worker] for worker in begun.keys() & joined.keys()))


def copies_moved(run: HostRun) -> list[float]:
    """How many chunks' state nodes sent each other because a node came or went, of each change."""
    moved = [one["reason"] for one in run.events if one["kind"] == "state_moved"]
    return [float(reason.split()[0]) for reason in moved]


def measure_frozen(bed: Testbed, size: str, *, quick: bool) -> list[Figure]:
    """Ray gives the host up meanwhile: it needs a new raylet, and joins as another node."""
    rounds, frozen_s = (1, QUICK_FROZEN_S) if quick else (3, FROZEN_S)
    runs: list[HostRun] = []
    member_s = []
    for number in range(rounds):
        with timed(f"frozen {size}, round {number + 1} of {rounds}"):
            job = HostJob(bed, host_job("frozen", size, NUM_HOSTS, f"steps={jobs.ENDLESS}"))
            job.settle()
            job.happen(Happening(30, "freeze", _LAST, frozen_s))
            begin_s, up_s = start_again(bed, bed.host(_LAST))
            member_s.append(job.await_event("node_joined", begin_s) - up_s)
            job.go_on(len(job.run.read_metrics()) + 30)
            runs.append(job.stop())
    beyond_s = [run.gap_s() - run.median_s for run in runs]
    what = f"host frozen for {frozen_s:.0f} s"
    return [
        figure(
            f"{what}: gap beyond the median, {size}",
            beyond_s,
            unit="s",
            limit=silent_limit_s(runs),
        ),
        figure(f"{what}: from its new raylet to membership, {size}", member_s, unit="s"),
        _lost(f"{what}: steps lost, {size}", runs),
    ]


def _lost(name: str, runs: Sequence[HostRun]) -> Figure:
    lost = [float(len(run.lost_steps())) for run in runs]
    return figure(name, lost, unit="steps", limit=0.0, statistic="largest")
