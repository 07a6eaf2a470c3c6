"""Random schedules of faults on real processes: every run must end with the undisturbed bits.

    python -m benchmarks.chaos --runs 20 --steps 200 [--seed S] [--minutes M] [--job JOB.yaml]

Prints a line per run and a summary, writes one JSON, and exits with 1 on any difference. A run's
schedule is a function of its seed alone: `--seed S --runs 1` repeats the run that was printed as S.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from benchmarks import record
from benchmarks.ddp import JOB
from benchmarks.jobs import RUNS, Run, make_job, run_elastic
from benchmarks.record import figure
from elastic.cluster import local_cluster
from elastic.core.config import JobConfig
from elastic.core.errors import ElasticError
from elastic.core.faults import AGGREGATOR_POINTS, WORKER_POINTS

MIN_FAULTS, MAX_FAULTS = 3, 7
NUM_WORKERS = 4
"""Each worker of the start is struck at most once: who comes later has no number yet."""

FIRST_STEP = 3
LAST_SHARE = 0.6
"""Faults begin in this share of the steps, so that each still finds the job running."""

COORDINATOR_SHARE = 0.7
"""The coordinator is killed after all that needs it, at this share of the steps."""

MAX_STOP_S, MAX_SLOW_S = 4.0, 2.0
_RESUME_STEPS = 5

Fault = dict[str, Any]

SMALL = ("batch.micro_batches=8", "batch.micro_batch_size=1")
"""A step of 8 sequences: 200 steps in some ten seconds."""


def schedule(seed: int, num_steps: int) -> list[Fault]:
    """A random list of faults, in the form of a fault file. The same for the same seed.

    Raises:
        ValueError: the job is too short to hold the faults.
    """
    last = int(num_steps * LAST_SHARE)
    if last - FIRST_STEP < 2 * _RESUME_STEPS:
        raise ValueError(f"{num_steps} steps are too few for a schedule")
    dice = random.Random(seed)
    makers = [_kill, _stop, _stop_and_resume, _leave, _slow, _nan_gradient]
    workers = dice.sample(range(NUM_WORKERS), dice.randint(1, NUM_WORKERS - 1))
    faults = [
        fault
        for worker in workers
        for fault in dice.choice(makers)(dice, f"worker-{worker}", dice.randint(FIRST_STEP, last))
    ]
    others = [_join, _kill_aggregator, _stop_aggregator]
    for _ in range(dice.randint(1, MAX_FAULTS - NUM_WORKERS)):
        faults += dice.choice(others)(dice, dice.randint(FIRST_STEP, last))
    if dice.random() < 0.4:
        faults.append(_at(int(num_steps * COORDINATOR_SHARE), "kill_coordinator"))
    while len(faults) < MIN_FAULTS:
        faults += _kill_aggregator(dice, dice.randint(FIRST_STEP, last))
    return sorted(faults, key=lambda fault: int(fault["at"]["step"]))


def _at(step: int, do: str, *, point: str | None = None, **settings: Any) -> Fault:
    where = {"step": step} if point is None else {"step": step, "point": point}
    return {"at": where, "do": do, **settings}


def _kill(dice: random.Random, target: str, step: int) -> list[Fault]:
    point = dice.choice((*AGGREGATOR_POINTS, *WORKER_POINTS))
    return [_at(step, "kill", point=point, target=target)]


def _stop(dice: random.Random, target: str, step: int) -> list[Fault]:
    point = dice.choice((*AGGREGATOR_POINTS, *WORKER_POINTS))
    seconds = round(dice.uniform(0.2, MAX_STOP_S), 2)
    return [_at(step, "stop", point=point, target=target, for_s=seconds)]


def _stop_and_resume(dice: random.Random, target: str, step: int) -> list[Fault]:
    later = step + dice.randint(1, _RESUME_STEPS)
    point = dice.choice(AGGREGATOR_POINTS)
    return [_at(step, "stop", point=point, target=target), _at(later, "resume", target=target)]


def _leave(dice: random.Random, target: str, step: int) -> list[Fault]:
    return [_at(step, "remove_worker", point=dice.choice(AGGREGATOR_POINTS), target=target)]


def _slow(dice: random.Random, target: str, step: int) -> list[Fault]:
    seconds = round(dice.uniform(0.5, MAX_SLOW_S), 2)
    if dice.random() < 0.5:
        return [_at(step, "slow", target=target, factor=dice.choice((2.0, 4.0)), for_s=seconds)]
    sleep_s = round(dice.uniform(0.02, 0.2), 3)
    return [_at(step, "slow", target=target, sleep_s=sleep_s, for_s=seconds)]


def _nan_gradient(dice: random.Random, target: str, step: int) -> list[Fault]:
    """Failing hardware: another worker gets the right answer."""
    return [_at(step, "nan_gradient", target=target)]


def _join(dice: random.Random, step: int) -> list[Fault]:
    return [_at(step, "add_worker", point=dice.choice(AGGREGATOR_POINTS))]


def _kill_aggregator(dice: random.Random, step: int) -> list[Fault]:
    return [_at(step, "kill_aggregator", point=dice.choice(AGGREGATOR_POINTS))]


def _stop_aggregator(dice: random.Random, step: int) -> list[Fault]:
    return [_at(step, "stop_aggregator", point=dice.choice(AGGREGATOR_POINTS))]


def shown(faults: Sequence[Mapping[str, Any]]) -> str:
    """A schedule in one line: 'kill worker-1 @12 after_grant, ...'."""
    words = []
    for fault in faults:
        where = fault["at"]
        parts = [fault["do"], fault.get("target", ""), f"@{where['step']}", where.get("point", "")]
        parts += [f"{key}={fault[key]}" for key in ("for_s", "factor", "sleep_s") if key in fault]
        words.append(" ".join(part for part in parts if part))
    return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended. `difference` is empty if it ended with the reference's bits."""

    seed: int
    faults: list[Fault]
    difference: str
    wall_s: float
    path: str


def compare(run: Run, reference: Run) -> str:
    """What differs from the undisturbed run, or nothing."""
    keys = ("params_sha256", "samples_sha256", "steps", "exact")
    return "; ".join(
        f"{key}: {run.result[key]} instead of {reference.result[key]}"
        for key in keys
        if run.result[key] != reference.result[key]
    )


def disturb(job: JobConfig, seed: int, reference: Run) -> Outcome:
    """One run with the schedule of `seed`."""
    faults = schedule(seed, job.steps)
    begin_s = time.monotonic()
    path = ""
    try:
        run = run_elastic(job, faults=faults)
        difference, path = compare(run, reference), str(run.path)
    except (ElasticError, RayError) as error:
        difference = f"{type(error).__name__}: {error}"
    return Outcome(seed, faults, difference, time.monotonic() - begin_s, path)


def run_all(options: argparse.Namespace) -> list[Outcome]:
    """The reference, then as many runs as asked for and as the time allows, on one cluster."""
    begin_s = time.monotonic()
    outcomes: list[Outcome] = []
    with local_cluster():
        reference = run_elastic(_job(options, "reference"))
        print(f"undisturbed: {reference.result['params_sha256'][:16]}", flush=True)
        for number in range(options.runs):
            if options.minutes and time.monotonic() - begin_s > 60 * options.minutes:
                print(f"stopped after {options.minutes:g} minutes", flush=True)
                break
            seed = options.seed + number
            one = disturb(_job(options, str(seed)), seed, reference)
            outcomes.append(one)
            verdict = "equal" if not one.difference else f"DIFFERENT ({one.difference})"
            print(f"seed {seed}: {verdict}, {one.wall_s:.0f} s: {shown(one.faults)}", flush=True)
            if one.difference and one.path:
                print(f"  run folder: {one.path}", flush=True)
    return outcomes


def _job(options: argparse.Namespace, name: str) -> JobConfig:
    more = SMALL if options.job == JOB else ()
    size = (f"task_args.size={options.size}",) if options.size else ()
    words = (f"steps={options.steps}", f"workers.start={NUM_WORKERS}", *more, *size)
    return make_job(f"chaos-{name}", *words, base=options.job)


def summarize(outcomes: Sequence[Outcome], options: argparse.Namespace) -> dict[str, Any]:
    """The record of all runs."""
    kinds = [fault["do"] for one in outcomes for fault in one.faults]
    figures = [
        figure(
            f"chaos runs of {options.steps} steps that differ from the undisturbed run",
            [float(sum(bool(one.difference) for one in outcomes))],
            unit=f"of {len(outcomes)}",
            limit=0,
            note=f"{len(kinds)} faults in {len(outcomes)} runs",
        ),
        figure("wall time of a chaos run", [one.wall_s for one in outcomes], unit="s"),
    ]
    config = {
        "runs": len(outcomes),
        "steps": options.steps,
        "seed": options.seed,
        "job": options.job.name,
        "faults": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "schedules": {str(one.seed): shown(one.faults) for one in outcomes},
        "differences": {str(one.seed): one.difference for one in outcomes if one.difference},
    }
    return record.make_record("chaos", config, figures)


def main() -> int:
    """Run, compare, write. 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; default: random")
    parser.add_argument("--minutes", type=float, default=None, help="begin no run after so long")
    parser.add_argument("--size", choices=("small", "10m"), default=None)
    parser.add_argument("--job", type=Path, default=JOB, help="another job file, taken as it is")
    parser.add_argument("--quick", action="store_true", help="2 runs of 60 steps, no result file")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {record.RESULTS}")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.steps = 2, 60
    if options.seed is None:
        options.seed = secrets.randbelow(10**6)
    print(f"seeds from {options.seed}", flush=True)
    outcomes = run_all(options)
    if not outcomes:
        parser.error("no run was made")
    made = summarize(outcomes, options)
    path = record.write(made, options.out or (RUNS / "quick" if options.quick else record.RESULTS))
    num_equal = sum(not one.difference for one in outcomes)
    print(json.dumps(made["config"]["faults"]))
    print(f"{num_equal} of {len(outcomes)} runs equal the undisturbed one; written: {path}")
    return 0 if num_equal == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
