"""What faults, stragglers and joins cost a step, beside plain DDP where it survives them.

    python -m benchmarks.recovery [--only kill,stop,slow,pinned,join,aggregator] [--size small|10m]

    kill         workers SIGKILLed within a step: the delay of that step
    stop         a worker SIGSTOPped for 30 s: the longest step
    slow         one worker, then a random one, sleeping one step time; the same for DDP
    pinned       one of two workers, each bound to a core, sleeping one step time
    join         a worker joins and a new one starts: the longest step of the others
    aggregator   the acting aggregator SIGKILLed: the gap to the next committed step

Every fault goes through the product's own fault files. Never measures while both sides run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import jobs, processes
from benchmarks.ddp import RANDOM_SHARE
from benchmarks.jobs import Run, hand_over, make_job, run_ddp, run_elastic, say, timed
from benchmarks.processes import JobProcesses
from benchmarks.record import Figure, figure, ratio
from elastic.core.config import JobConfig
from elastic.core.status import Status

PARTS = ("kill", "stop", "slow", "pinned", "join", "aggregator")

KILL_LIMIT_MICRO_BATCHES, KILL_LIMIT_S = 2.0, 0.05
STOP_LIMIT_MICRO_BATCHES = 2.5
ONE_LIMIT, PINNED_LIMIT, RANDOM_LIMIT = 1.15, 1.65, 1.08
JOIN_LIMIT = 1.6
AGGREGATOR_LIMIT_S = 0.2
"""The issue's limits; the aggregator's is beside one step."""

STOP_S = 30.0
KILL_POINTS = ("after_grant", "before_compute", "after_compute", "after_encode")
AGGREGATOR_POINTS = ("after_grant", "before_update", "mid_update", "after_flip")

Fault = dict[str, Any]


class Bench:
    """One size: its calm run, which says how long a step and a start take here."""

    def __init__(self, size: str, options: argparse.Namespace) -> None:
        self.size, self.options = size, options
        self._calm: Run | None = None
        self._num_runs = 0

    @property
    def calm(self) -> Run:
        """An undisturbed run, made at first need."""
        if self._calm is None:
            self._calm = self.run("calm", self.job(), stop_after=10 if self.options.quick else 50)
        return self._calm

    def job(self, *overrides: str, steps: int = jobs.ENDLESS) -> JobConfig:
        self._num_runs += 1
        name = f"bench-{self._num_runs}-{self.size}"
        return make_job(name, f"task_args.size={self.size}", f"steps={steps}", *overrides)

    def run(self, what: str, job: JobConfig, **settings: Any) -> Run:
        with timed(f"{self.size}: {what}"):
            return run_elastic(job, **settings)

    def steps_in(self, seconds: float) -> int:
        """How many calm steps fit into that time."""
        return max(3, math.ceil(seconds / self.calm.median_s))

    @property
    def start_s(self) -> float:
        """How long a process takes from its start until it is of use, beside a running job."""
        joined = [one["time_s"] for one in self.calm.events if one["kind"] == "worker_joined"]
        return 5.0 if self.options.quick else max(8.0, self.calm.settled_s - max(joined) + 3.0)

    @property
    def first_step(self) -> int:
        """A step at which everything has started, with some calm steps before it."""
        return self.calm.settled_step + (5 if self.options.quick else self.steps_in(5.0) + 20)

    def hand_over(self, part: str, figures: Sequence[Figure], **config: Any) -> None:
        common = {
            "size": self.size,
            "step_s": self.calm.median_s,
            "micro_batch_s": self.calm.micro_batch_s,
        }
        hand_over(f"recovery-{part}-{self.size}", self.options, common | config, figures)


def at(step: int, do: str, *, point: str | None = None, **settings: Any) -> Fault:
    """One entry of a fault file."""
    where: dict[str, Any] = {"step": step} if point is None else {"step": step, "point": point}
    return {"at": where, "do": do, **settings}


def before(run: Run, step: int) -> list[float]:
    """The times of the settled steps before a fault."""
    calm = [float(one["step_s"]) for one in run.settled if one["step"] < step]
    return calm or run.steps_s


def step_s(run: Run, step: int) -> float:
    """How long one step took."""
    return next(float(one["step_s"]) for one in run.metrics if one["step"] == step)


def lost_figure(name: str, runs: Sequence[Run]) -> Figure:
    """Steps lost over several runs; none may be."""
    lost = [float(len(run.lost_steps())) for run in runs]
    return figure(f"{name}: steps lost", lost, unit="steps", limit=0, statistic="largest")


# --- faults of workers -------------------------------------------------------------------------


def measure_kill(bench: Bench) -> None:
    """One worker after the other dies, each at another point of its step."""
    rounds = 1 if bench.options.quick else 2
    points = KILL_POINTS[:2] if bench.options.quick else KILL_POINTS
    delays_s, runs, marks = [], [], []
    for number in range(rounds):
        spacing = bench.steps_in(bench.start_s)
        steps = [bench.first_step + index * spacing for index in range(len(points))]
        faults = [
            at(step, "kill", point=point, target=f"worker-{worker}")
            for worker, (step, point) in enumerate(zip(steps, points, strict=True))
        ]
        job = bench.job(steps=steps[-1] + 20)
        run = bench.run(f"kill, round {number + 1} of {rounds}", job, faults=faults)
        runs.append(run)
        calm_s = statistics.median(before(run, steps[0]))
        delays_s += [step_s(run, step) - calm_s for step in steps]
        marks += [
            [point, step, step_s(run, step)] for step, point in zip(steps, points, strict=True)
        ]
    micro_batch_s = statistics.median(run.micro_batch_s for run in runs)
    limit_s = KILL_LIMIT_MICRO_BATCHES * micro_batch_s + KILL_LIMIT_S
    name = f"worker killed within a step, {bench.size}"
    note = f"limit: 2 micro-batches of {micro_batch_s * 1e3:.0f} ms + 50 ms"
    figures = [
        figure(f"{name}: delay of that step", delays_s, unit="s", limit=limit_s, note=note),
        figure(f"{name}: the largest such delay", delays_s, unit="s", statistic="largest"),
        lost_figure(name, runs),
    ]
    bench.hand_over("kill", figures, struck=marks)


def measure_stop(bench: Bench) -> None:
    """A worker freezes in the middle of a step; it is replaced before it comes back."""
    seconds = 4.0 if bench.options.quick else STOP_S
    step = bench.first_step
    fault = at(step, "stop", point="after_grant", target="worker-1", for_s=seconds)
    job = bench.job(steps=step + bench.steps_in(seconds + 5.0))
    run = bench.run(f"stop for {seconds:.0f} s", job, faults=[fault])
    calm_s, micro_batch_s = statistics.median(before(run, step)), run.micro_batch_s
    (fired_s,) = (one["time_s"] for one in run.events if one["kind"] == "fault")
    during = [one for one in run.metrics if fired_s <= one["time_s"] <= fired_s + seconds + 5.0]
    beyond = [(float(one["step_s"]) - calm_s) / micro_batch_s for one in during]
    name = f"worker stopped for {seconds:.0f} s, {bench.size}"
    figures = [
        figure(
            f"{name}: longest step beyond the median",
            beyond,
            unit="micro-batches",
            limit=STOP_LIMIT_MICRO_BATCHES,
            statistic="largest",
            note=f"of {micro_batch_s * 1e3:.0f} ms; median step {calm_s * 1e3:.0f} ms",
        ),
        lost_figure(name, [run]),
    ]
    bench.hand_over("stop", figures, kinds=kinds(run))


def kinds(run: Run) -> dict[str, int]:
    """How often each kind of event happened."""
    names = [one["kind"] for one in run.events]
    return {name: names.count(name) for name in sorted(set(names))}


# --- stragglers ----------------------------------------------------------------------------------


def measure_slow(bench: Bench) -> None:
    """Calm, one, random, in turn; then the same for the peer. 4 workers share the cores."""
    ours = _slow_segments(bench, ("calm", "one", "random"), num_workers=4)
    quick = bench.options.quick
    steps, rounds = (8, 1) if quick else (35 if bench.size == "10m" else 60, 2)
    words = ("--size", bench.size, "--steps", str(steps), "--rounds", str(rounds))
    with timed(f"{bench.size}: slow, DDP"):
        peer = run_ddp(
            *words, "--pattern=calm,one,random", environment=bench.options.peer_environment
        )
    theirs = {label: peer.steps_s(label) for label in ("calm", "one", "random")}
    share = f"{RANDOM_SHARE:.0%} of steps"
    one, random = "one worker sleeping one step time in every step", f"a random one in {share}"
    figures = [
        ratio(f"{one} / all well, {bench.size}", ours["one"], ours["calm"], limit=ONE_LIMIT),
        ratio(f"the same, DDP, {bench.size}", theirs["one"], theirs["calm"]),
        ratio(
            f"{random} / all well, {bench.size}",
            ours["random"],
            ours["calm"],
            limit=RANDOM_LIMIT,
            statistic="mean",
            note="means: the median does not see a fifth of the steps",
        ),
        ratio(f"the same, DDP, {bench.size}", theirs["random"], theirs["calm"], statistic="mean"),
    ]
    bench.hand_over("slow", figures, medians_s=_medians(ours), ddp_medians_s=_medians(theirs))


def measure_pinned(bench: Bench) -> None:
    """Two workers, one a core: nobody else can use the sleeper's core."""
    ours = _slow_segments(bench, ("calm", "one"), num_workers=2, pinned=True)
    name = f"one of 2 pinned workers sleeping one step time / all well, {bench.size}"
    figures = [ratio(name, ours["one"], ours["calm"], limit=PINNED_LIMIT)]
    bench.hand_over("pinned", figures, medians_s=_medians(ours))


def _slow_segments(
    bench: Bench, labels: Sequence[str], *, num_workers: int, pinned: bool = False
) -> dict[str, list[float]]:
    """Step times by label, from runs in turn. The first calm one says how long to sleep."""
    quick = bench.options.quick
    steps, rounds = (10, 1) if quick else (30 if bench.size == "10m" else 60, 2)
    seen: dict[str, list[float]] = {label: [] for label in labels}
    for number in range(rounds):
        for label in labels:
            faults = [] if label == "calm" else [slow(label, statistics.median(seen["calm"]))]
            probe = Pinner() if pinned else None
            run = bench.run(
                f"slow: {label}, {num_workers} workers, round {number + 1} of {rounds}",
                bench.job(f"workers.start={num_workers}"),
                faults=faults,
                stop_after=steps,
                probe=probe,
            )
            settled = run.settled[2:] if pinned else run.settled  # bound in the first of them
            seen[label] += [float(one["step_s"]) for one in settled]
    return seen


def slow(label: str, sleep_s: float) -> Fault:
    """The fault of a segment: one worker in every step, or a random one in some."""
    if label == "one":
        return at(0, "slow", target="worker-1", sleep_s=sleep_s)
    return at(0, "slow", target="any", sleep_s=sleep_s, probability=RANDOM_SHARE)


class Pinner:
    """Binds each worker to a core of its own, once."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, status: Status, store: Path, who: JobProcesses) -> None:
        cores = sorted(processes.available_cores())
        if not self._done:
            for worker, pid in who.workers.items():
                processes.pin(pid, cores[worker % len(cores)])
        self._done = True


def _medians(seen: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {label: statistics.median(samples) for label, samples in seen.items()}


# --- membership and the aggregator ---------------------------------------------------------------


def measure_join(bench: Bench) -> None:
    """The spare joins at once, and a new process starts beside those that compute."""
    step = bench.first_step
    window_s = 2 * bench.start_s
    job = bench.job(steps=step + bench.steps_in(window_s))
    run = bench.run("join", job, faults=[at(step, "add_worker")])
    (fired_s,) = (one["time_s"] for one in run.events if one["kind"] == "fault")
    calm_s = statistics.median(before(run, step))
    during = [one for one in run.metrics if fired_s <= one["time_s"] <= fired_s + window_s]
    name = f"worker joins, {bench.size}"
    figures = [
        figure(
            f"{name}: longest step during its start / median",
            [float(one["step_s"]) / calm_s for one in during],
            unit="x",
            limit=JOIN_LIMIT,
            statistic="largest",
            note=f"of {len(during)} steps in {window_s:.0f} s; median step {calm_s * 1e3:.0f} ms",
        ),
        lost_figure(name, [run]),
    ]
    bench.hand_over("join", figures, kinds=kinds(run))


def measure_aggregator(bench: Bench) -> None:
    """The acting aggregator dies at several points; the standby goes on."""
    points = AGGREGATOR_POINTS[:2] if bench.options.quick else AGGREGATOR_POINTS
    spacing = bench.steps_in(1.5 * bench.start_s)  # a new standby starts in between
    steps = [bench.first_step + index * spacing for index in range(len(points))]
    faults = [
        at(step, "kill_aggregator", point=point) for step, point in zip(steps, points, strict=True)
    ]
    run = bench.run("aggregator", bench.job(steps=steps[-1] + 20), faults=faults)
    calm_s = statistics.median(before(run, steps[0]))
    gaps_s = gaps(run)
    name = f"aggregator killed, with standby, {bench.size}"
    limit_s = AGGREGATOR_LIMIT_S + calm_s
    note = f"limit: 200 ms + a step of {calm_s * 1e3:.0f} ms"
    figures = [
        figure(
            f"{name}: gap to the next committed step", gaps_s, unit="s", limit=limit_s, note=note
        ),
        figure(f"{name}: the largest such gap", gaps_s, unit="s", statistic="largest"),
        lost_figure(name, [run]),
    ]
    bench.hand_over("aggregator", figures, points=list(points), gaps_s=gaps_s)


def gaps(run: Run) -> list[float]:
    """From each fault to the next committed step, in seconds."""
    fired_s = [float(one["time_s"]) for one in run.events if one["kind"] == "fault"]
    commits_s = sorted(float(one["time_s"]) for one in run.metrics)
    return [
        next(commit_s for commit_s in commits_s if commit_s > fault_s) - fault_s
        for fault_s in fired_s
    ]


MEASURES = {
    "kill": measure_kill,
    "stop": measure_stop,
    "slow": measure_slow,
    "pinned": measure_pinned,
    "join": measure_join,
    "aggregator": measure_aggregator,
}


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    jobs.add_options(parser, PARTS)
    options = parser.parse_args()
    bench = Bench(options.size or "small", options)
    for part in jobs.chosen(parser, options, PARTS):
        say(f"--- {part}")
        MEASURES[part](bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
