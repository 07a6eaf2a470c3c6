"""How far a step is above its floor, phase by phase: where time is lost, and how much.

    python -m benchmarks.floor [--sizes small,10m,100m] [--workers 1,2,4,8] [--quick] [--out DIR]

The floor of a step is the sum of forward and backward, measured bare in as many processes at once,
and of the memory traffic that nothing can avoid at the bandwidth of this machine:

    encode   each worker reads a gradient once and writes its sum once
    sum      the sums of all workers are read once; clipping needs the norm first, so that the
             gradient is written, and read again by the update
    update   parameters and two tensors of the optimizer are read once and written once

Coordination has a floor of 0, and so has publishing the parameters: workers map them. Beside the
floor stands what the engine's kernels take with nothing around them (`bare`), and a real job. One
micro-batch a worker. Of a small model the tensors fit the cache, whose traffic is faster than that.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.setup import compute_environment
from benchmarks import bare, jobs, processes, record
from benchmarks.bare import Bare, Seconds
from benchmarks.jobs import chosen, hand_over, make_job, run_elastic, say, timed
from benchmarks.peers.settings import BATCH, SIZES, WORKERS
from benchmarks.processes import JobProcesses
from benchmarks.record import Figure, figure
from elastic.core.status import Status

STEPS: Mapping[str, int] = {"small": 60, "10m": 20, "100m": 6}
QUICK_STEPS: Mapping[str, int] = {"small": 20, "10m": 8, "100m": 3}

LIMIT = 1.25
"""A step over its floor."""

PHASES = ("wake-up", "compute", "encode", "update")
"""Of a job's step, as its records tell them apart; they add up to the step. wake-up: from the
commit to the first micro-batch; compute: to the end of the last one, the maxima of its gradient
too; encode: to the update, with the question and the grant; update: the sum too."""

_WINDOW_S = 2.0


def floor(
    num_parameters: int, num_workers: int, compute_s: float, bytes_per_s: float
) -> dict[str, float]:
    """Seconds of each phase of a job's step that nothing can avoid."""
    tensor_s = 4 * num_parameters / bytes_per_s  # once through float32 or int32 of all parameters
    return {
        "wake-up": 0.0,
        "compute": compute_s,
        "encode": 2 * num_workers * tensor_s,
        "update": (num_workers + 1 + 1 + 6) * tensor_s,
    }


def phases(before: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase of one step, from its line of metrics.jsonl and that before it."""
    granted = [one for one in line["work"] if one[4] == "granted"]
    first_s, last_s = min(one[2] for one in granted), max(one[3] for one in granted)
    updates_s = line["time_s"] - line["update_s"]
    return {
        "wake-up": first_s - before["time_s"],
        "compute": last_s - first_s,
        "encode": updates_s - last_s,
        "update": line["update_s"],
    }


def all_phases(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of all steps but the first."""
    found = [phases(*pair) for pair in itertools.pairwise(lines)]
    return {name: [one[name] for one in found] for name in PHASES}


class Cpu:
    """Processor time for a step, by who used it, in windows of a few seconds."""

    def __init__(self) -> None:
        self.per_step_s: dict[str, list[float]] = {
            name: [] for name in ("workers", "aggregator", "others", "idle")
        }
        self._begun: tuple[float, int, dict[str, float]] | None = None

    def __call__(self, status: Status, store: Path, who: JobProcesses) -> None:
        now = time.monotonic(), status.step, self._used(who)
        if self._begun is None:
            self._begun = now
        elif now[0] - self._begun[0] >= _WINDOW_S and now[1] > self._begun[1]:
            steps = now[1] - self._begun[1]
            used = {name: now[2][name] - self._begun[2][name] for name in now[2]}
            cores = len(processes.available_cores())
            used["idle"] = cores * (now[0] - self._begun[0]) - sum(used.values())
            for name, seconds in used.items():
                self.per_step_s[name].append(seconds / steps)
            self._begun = now

    def _used(self, who: JobProcesses) -> dict[str, float]:
        """Of the job and of all that this benchmark has started, Ray's processes and itself too."""
        workers, rest = set(who.workers.values()), {os.getpid(), *processes.below(os.getpid())}
        return {
            "workers": _cpu_s(workers),
            "aggregator": _cpu_s([who.acting]),
            "others": _cpu_s(rest - workers - {who.acting}),
        }


def _cpu_s(pids: Iterable[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            total += processes.cpu_s(pid)
        except FileNotFoundError:
            continue  # it has ended
    return total


def measure(size: str, num: int, options: argparse.Namespace) -> None:
    """One size with one number of workers: bare, then as a job."""
    steps = (QUICK_STEPS if options.quick else STEPS)[size]
    what = Bare(size=size, num_workers=num, batch=BATCH[size], steps=steps, as_in_job=False)
    ours = Bare(size=size, num_workers=num, batch=BATCH[size], steps=steps, as_in_job=True)
    with timed(f"{size}, {num} workers: bare"):
        plain, num_parameters = bare.measure(what, {"OMP_NUM_THREADS": "1"})
        kernels, _ = bare.measure(ours, compute_environment(1))
    cores = min(num, len(processes.available_cores()))
    bytes_per_s = bare.bandwidth(cores)
    with timed(f"{size}, {num} workers: a job"):
        cpu = Cpu()
        run = run_elastic(_job(size, num), stop_after=steps, probe=cpu)
    least = floor(num_parameters, num, statistics.median(plain["compute"]), bytes_per_s)
    config = {
        "size": size,
        "workers": num,
        "batch": BATCH[size],
        "steps": steps,
        "parameters": num_parameters,
        "bytes_per_s": bytes_per_s,
        "floor_s": least,
        "bare_plain_s": _medians(plain),
        "bare_s": _medians(kernels),
    }
    figures = figures_of(f"{size}, {num} workers", least, kernels, plain, run.settled)
    figures += [
        figure(f"processor time of a step, {who}, {size}, {num} workers", seconds, unit="s")
        for who, seconds in cpu.per_step_s.items()
        if seconds
    ]
    hand_over(f"floor-{size}-{num}", options, config, figures)


def _job(size: str, num: int) -> Any:
    return make_job(
        f"bench-floor-{size}-{num}",
        f"task_args.size={size}",
        f"batch.micro_batches={num}",
        f"batch.micro_batch_size={BATCH[size] // num}",
        f"workers.start={num}",
        f"workers.max={num}",
        f"steps={jobs.ENDLESS}",
    )


def figures_of(
    name: str,
    least: Mapping[str, float],
    kernels: Seconds,
    plain: Seconds,
    lines: Sequence[Mapping[str, Any]],
) -> list[Figure]:
    """The whole step over its floor; each phase in the job, over its floor and over bare."""
    found, total_s = all_phases(lines), sum(least.values())
    steps_s = [sum(one) for one in zip(*found.values(), strict=True)]
    alone = _alone(kernels)
    figures = [
        figure(
            f"step time / its floor, {name}",
            [one / total_s for one in steps_s],
            unit="x",
            limit=LIMIT,
            note=f"floor {_ms(total_s)}, kernels alone {_ms(sum(alone.values()))}",
        ),
        figure(
            f"forward and backward as in a job / plain, {name}",
            [one / statistics.median(plain["compute"]) for one in kernels["compute"]],
            unit="x",
            note="kernels held to AVX2, parameters in shared memory, as few page faults as can be",
        ),
    ]
    twice = [float(one["num_duplicates"]) for one in lines]
    figures.append(figure(f"micro-batches computed twice in a step, {name}", twice, unit=""))
    for phase in PHASES:
        figures.append(
            figure(
                f"{phase} of a step beyond its floor, {name}",
                [one - least[phase] for one in found[phase]],
                unit="s",
                note=f"floor {_ms(least[phase])}, alone {_ms(alone[phase])},"
                f" in the job {_ms(statistics.median(found[phase]))}",
            )
        )
    return figures


def _alone(kernels: Seconds) -> dict[str, float]:
    """The engine's kernels with nothing around them, as phases of a job."""
    each = _medians(kernels)
    return {
        "wake-up": 0.0,
        "compute": each["compute"] + each["maxima"],
        "encode": each["encode"],
        "update": each["sum"] + each["update"],
    }


def _medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(one) for name, one in seconds.items()}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(SIZES), help="separated by commas")
    parser.add_argument("--workers", default=",".join(map(str, WORKERS)), help="likewise")
    parser.add_argument("--quick", action="store_true", help="few steps: only shows that it works")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {record.RESULTS}")
    options = parser.parse_args(words)
    options.sizes = chosen(parser, options, SIZES, "sizes")
    options.workers = [int(one) for one in chosen(parser, options, [*map(str, WORKERS)], "workers")]
    return options


def main() -> int:
    """Measure every size with every number of workers."""
    options = parse()
    for size, num in itertools.product(options.sizes, options.workers):
        say(f"--- {size}, {num} workers")
        measure(size, num, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
