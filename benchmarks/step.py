"""Step time, memory, cost of control and convergence, beside plain DDP in the same run.

    python -m benchmarks.step [--only ratio,memory,control,convergence] [--size small|10m] [--quick]

    ratio         step time over DDP's at 4, 8, 16 and 32 micro-batches, segments interleaved
    memory        proportional set size over DDP's, 4 and 8 workers, 10m
    control       a job without payload: the aggregator's processor time, and how fast workers wake
    convergence   the loss after 300 steps beside float32 DDP's, small

Both sides run one after the other on the same machine, never at once.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from benchmarks import jobs, processes
from benchmarks.ddp import WARM_UP
from benchmarks.jobs import Peer, hand_over, make_job, run_ddp, run_elastic, say, timed
from benchmarks.processes import JobProcesses, Memory
from benchmarks.record import Figure, figure, ratio
from elastic.cluster import local_cluster
from elastic.core.status import Status

PARTS = ("ratio", "memory", "control", "convergence")
SIZES = ("small", "10m")
GLOBAL_BATCH = 32
NUM_WORKERS = 4

RATIO_LIMITS: Mapping[tuple[str, int], float] = {
    ("small", 4): 1.0,
    ("10m", 4): 1.0,
    ("small", 16): 1.1,
    ("10m", 16): 1.2,
}
"""Step time over DDP's by size and number of micro-batches; others are only reported."""

ORDER: tuple[int | None, ...] = (None, 4, 16, None, 8, 32)
"""One round of segments: number of micro-batches, None for the peer."""

STATE_LIMITS: Mapping[int, float] = {4: 0.52, 8: 0.27}
WHOLE_LIMIT = 0.85
CONTROL_LIMIT_MS = 3.0
LOSS_LIMIT = 0.01
_WINDOW_S = 2.0
_LAST_LOSSES = 20


# --- step time -------------------------------------------------------------------------------


def measure_ratio(size: str, options: argparse.Namespace) -> None:
    """Segments of both sides in turn; all steps of a side count together."""
    steps = 8 if options.quick else 30 if size == "10m" else 60
    rounds = 1 if options.quick else 2
    theirs: list[float] = []
    ours: dict[int, list[float]] = {num: [] for num in ORDER if num is not None}
    details: dict[str, list[float]] = {}
    for number in range(rounds):
        for num in ORDER:
            with timed(f"ratio {size}, round {number + 1} of {rounds}, {_side(num)}"):
                segment = _segment(size, num, number, steps, options.peer_environment)
            (theirs if num is None else ours[num]).extend(segment)
            details.setdefault(_side(num), []).append(statistics.median(segment))
    figures = [
        ratio(
            f"step time / DDP, {size}, M={num}",
            ours[num],
            theirs,
            limit=RATIO_LIMITS.get((size, num)),
        )
        for num in sorted(ours)
    ]
    figures.append(figure(f"step time, DDP, {size}", theirs, unit="s"))
    figures += [figure(f"step time, {size}, M={num}", ours[num], unit="s") for num in sorted(ours)]
    config = {
        "size": size,
        "workers": NUM_WORKERS,
        "steps_of_a_segment": steps,
        "rounds": rounds,
        "order": [_side(num) for num in ORDER],
        "medians_of_segments_s": details,
        "peer_environment": options.peer_environment,
    }
    hand_over(f"step-ratio-{size}", options, config, figures)


def _side(num: int | None) -> str:
    return "DDP" if num is None else f"M={num}"


def _segment(size: str, num: int | None, number: int, steps: int, environment: str) -> list[float]:
    """The step times of one segment, warm-up left out."""
    if num is None:
        words = ("--size", size, "--steps", str(steps + WARM_UP))
        return run_ddp(*words, environment=environment).steps_s()
    job = make_job(f"bench-{size}-{num}-{number}", *_batch(num), f"task_args.size={size}")
    job = job.model_copy(update={"steps": jobs.ENDLESS})
    return run_elastic(job, stop_after=steps).steps_s


def _batch(num: int) -> tuple[str, ...]:
    return (f"batch.micro_batches={num}", f"batch.micro_batch_size={GLOBAL_BATCH // num}")


# --- memory ----------------------------------------------------------------------------------


class _JobMemory:
    """Samples a job's memory while it trains."""

    def __init__(self) -> None:
        self.state: list[float] = []
        self.slots: list[float] = []
        self.whole: list[Memory] = []
        self.num_processes = 0

    def __call__(self, status: Status, store: Path, who: JobProcesses) -> None:
        sizes = processes.store_memory(who.pids, store)
        state = sum(size for name, size in sizes.items() if name.startswith(processes.STATE_FILES))
        self.state.append(state)
        self.slots.append(sum(size for name, size in sizes.items() if name.startswith("slot-")))
        self.whole.append(processes.memory(who.pids))
        self.num_processes = len(who.pids)


def measure_memory(size: str, options: argparse.Namespace) -> None:
    """Parameters and optimizer state for 4 and 8 workers, and the whole job beyond empty ones."""
    steps = (10 if options.quick else 20) * (1 if size == "10m" else 5)
    figures: list[Figure] = []
    config: dict[str, Any] = {"size": size, "steps": steps, "method": _METHOD}
    with timed("memory of empty Ray workers"):
        ray_bytes = _empty_ray_memory(4)
    config["empty_ray_worker_with_torch_bytes"] = ray_bytes
    for num in sorted(STATE_LIMITS):
        with timed(f"memory {size}, DDP, {num} ranks"):
            peer, whole = _peer_memory(size, num, steps)
            empty = processes.empty_memory(num)
        rank_bytes = peer.state_bytes["parameters"] + peer.state_bytes["optimizer"]
        with timed(f"memory {size}, {num} workers"):
            ours = _job_memory(size, num, steps)
            empties = processes.empty_memory(ours.num_processes)
        figures.append(
            figure(
                f"memory of parameters and optimizer state / DDP, {size}, {num} workers",
                [one / (num * rank_bytes) for one in ours.state],
                unit="x",
                limit=STATE_LIMITS[num],
                note=f"gradient slots beside them: {_mib(statistics.median(ours.slots))}",
            )
        )
        theirs = statistics.median(one.total - empty.total for one in whole)
        limit = WHOLE_LIMIT if num == NUM_WORKERS else None
        name = f"memory of the whole job beyond empty torch processes / DDP, {size}, {num} workers"
        figures.append(_whole(name, ours, empties.total, theirs, limit=limit))
        name = f"the same beyond empty Ray workers with torch, {size}, {num} workers"
        figures.append(_whole(name, ours, ray_bytes * ours.num_processes, theirs))
        config[f"{num} workers"] = {
            "ddp_state_bytes_of_a_rank": peer.state_bytes,
            "ddp": _shown(whole, empty),
            "elastic": _shown(ours.whole, empties),
            "elastic_processes": ours.num_processes,
        }
    hand_over(f"step-memory-{size}", options, config, figures)


_METHOD = (
    "parameters and optimizer state: sum over the job's processes of the proportional set size"
    " of the store's parameters-* and optimizer-* (two versions), over num_workers x bytes of"
    " DDP's parameters, exp_avg, exp_avg_sq and step; gradients, DDP's buckets and our slots are"
    " left out on both sides. Whole job: proportional set size of all its processes (workers,"
    " spare, both aggregators, coordinator; DDP: ranks) less that of as many processes that only"
    " imported torch; so Ray's own part in each process counts as ours"
)


def _whole(
    name: str, ours: _JobMemory, empty_bytes: float, theirs: float, *, limit: float | None = None
) -> Figure:
    beyond = [one.total - empty_bytes for one in ours.whole]
    return figure(
        name,
        [one / theirs for one in beyond],
        unit="x",
        limit=limit,
        note=f"{_mib(statistics.median(beyond))} in {ours.num_processes} processes,"
        f" DDP {_mib(theirs)}",
    )


def _peer_memory(size: str, num: int, steps: int) -> tuple[Peer, list[Memory]]:
    seen: list[Memory] = []
    words = ("--size", size, "--steps", str(steps), "--report-memory")
    peer = run_ddp(*words, num_ranks=num, probe=lambda pids: seen.append(processes.memory(pids)))
    return peer, seen


def _job_memory(size: str, num: int, steps: int) -> _JobMemory:
    probe = _JobMemory()
    more = (f"task_args.size={size}", f"workers.start={num}")
    job = make_job(f"bench-memory-{size}-{num}", *more, f"steps={jobs.ENDLESS}")
    run_elastic(job, stop_after=steps, probe=probe)
    return probe


def _empty_ray_memory(num: int) -> float:
    """Bytes of one Ray actor that has imported torch, of `num` at once."""

    class Empty:
        def pid(self) -> int:
            import os

            import torch  # noqa: F401

            return os.getpid()

    with local_cluster():
        actor: Any = ray.remote(num_cpus=0)(Empty)
        actors = [actor.remote() for _ in range(num)]
        pids = ray.get([one.pid.remote() for one in actors])
        return processes.memory(pids).total / num


def _shown(samples: Sequence[Memory], empty: Memory) -> dict[str, dict[str, float]]:
    """Median bytes by kind of page, of the processes and of as many empty ones."""
    kinds = ("total", "anonymous", "files", "shared")
    return {
        "bytes": {kind: statistics.median(getattr(one, kind) for one in samples) for kind in kinds},
        "empty_bytes": {kind: getattr(empty, kind) for kind in kinds},
    }


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


# --- control ---------------------------------------------------------------------------------


class _Control:
    """The aggregator's processor time per step, in windows of a few seconds."""

    def __init__(self) -> None:
        self.per_step_ms: list[float] = []
        self._begun: tuple[float, int, float] | None = None

    def __call__(self, status: Status, store: Path, who: JobProcesses) -> None:
        now = (processes.cpu_s(who.acting), status.step, time.monotonic())
        if self._begun is None:
            self._begun = now
        elif now[2] - self._begun[2] >= _WINDOW_S and now[1] > self._begun[1]:
            used_s, steps = now[0] - self._begun[0], now[1] - self._begun[1]
            self.per_step_ms.append(used_s / steps * 1e3)
            self._begun = now


def measure_control(options: argparse.Namespace) -> None:
    """A model of five parameters, 8 workers, 16 micro-batches: nothing but control is left."""
    steps = 400 if options.quick else 3000
    probe = _Control()
    job = make_job(
        "bench-control",
        "task=benchmarks.tiny:Tiny",
        "task_args={}",
        f"steps={jobs.ENDLESS}",
        "workers.start=8",
        "workers.spare=0",
    )
    with timed("control"):
        run = run_elastic(job, stop_after=steps, probe=probe)
    figures = [
        figure(
            "aggregator CPU per step without payload, 8 workers, M=16",
            probe.per_step_ms,
            unit="ms",
            limit=CONTROL_LIMIT_MS,
            note="user and system time of the whole process, Ray's threads included",
        ),
        *wake_up(run.settled),
        figure("step time without payload, 8 workers, M=16", _ms(run.steps_s), unit="ms"),
    ]
    hand_over("step-control", options, {"steps": steps, "window_s": _WINDOW_S}, figures)


def wake_up(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """How long a finished step takes to set the workers going again, from their own clocks."""
    first, last = [], []
    for before, after in itertools.pairwise(metrics):
        end_s = max(one[3] for one in before["work"] if one[4] == "granted")
        starts_s: dict[int, float] = {}
        for worker, _, start_s, _, _ in after["work"]:
            starts_s[worker] = min(start_s, starts_s.get(worker, start_s))
        first.append((min(starts_s.values()) - end_s - after["update_s"]) * 1e3)
        last.append((max(starts_s.values()) - end_s - after["update_s"]) * 1e3)
    what = "from a step's last result, less the update, to the next step's"
    return [
        figure("wake-up latency, first worker", first, unit="ms", note=f"{what} first micro-batch"),
        figure(
            "wake-up latency, last worker",
            last,
            unit="ms",
            note=f"{what} latest worker's first micro-batch; 8 workers share the cores",
        ),
    ]


def _ms(samples_s: Sequence[float]) -> list[float]:
    return [one * 1e3 for one in samples_s]


# --- convergence -----------------------------------------------------------------------------


def measure_convergence(options: argparse.Namespace) -> None:
    """The same samples, weights and schedule: only the rounding of the sums differs."""
    steps = 30 if options.quick else 300
    with timed("convergence, DDP"):
        peer = run_ddp("--size", "small", "--steps", str(steps))
    with timed("convergence, Elastic"):
        run = run_elastic(make_job("bench-convergence", f"steps={steps}"))
    figures = loss_figures([float(one["loss"]) for one in run.metrics], peer.losses)
    hand_over("step-convergence", options, {"size": "small", "steps": steps}, figures)


def loss_figures(ours: Sequence[float], theirs: Sequence[float]) -> list[Figure]:
    """The difference of the losses at the end; of each step over the last ones."""
    pairs = list(zip(ours, theirs, strict=True))[-_LAST_LOSSES:]
    differences = [abs(mine - other) / other for mine, other in pairs]
    return [
        figure(
            f"loss after {len(ours)} steps, relative difference to float32 DDP's",
            [differences[-1]],
            unit="",
            limit=LOSS_LIMIT,
            note=f"{ours[-1]:.6f} and {theirs[-1]:.6f}",
        ),
        figure(
            f"the same over the last {len(pairs)} steps, largest",
            differences,
            unit="",
            limit=LOSS_LIMIT,
            statistic="largest",
        ),
    ]


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    jobs.add_options(parser, PARTS)
    options = parser.parse_args()
    for part in jobs.chosen(parser, options, PARTS):
        say(f"--- {part}")
        if part == "ratio":
            for size in SIZES if options.size is None else (options.size,):
                measure_ratio(size, options)
        elif part == "memory":
            measure_memory(options.size or "10m", options)
        elif part == "control":
            measure_control(options)
        else:
            measure_convergence(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
