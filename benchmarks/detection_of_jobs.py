"""How well, and how soon, faults of real jobs are named: each kind several times; a healthy job.

    python -m benchmarks.detection_of_jobs [--quick] [--seed N] [--times N]

Workers, aggregators and a coordinator as a user has them, on this machine. Where a fault strikes is
drawn from the seed, which is printed: begun again with the same one it goes on where it was. The
full form takes an hour and a half, and wants an idle machine; after each kind the matrix of what
was called what is printed, as far as it is known.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.jobs import Run, make_job, run_elastic, say, timed
from benchmarks.naming import (
    FAILED,
    GONE,
    HANG_STEPS,
    NOTHING,
    SLOW_STEPS,
    Asked,
    Injection,
    kept_of,
    matrix,
    parse,
    report,
)
from elastic.core.config import JobConfig
from elastic.core.errors import ElasticError

NAME = "detection_of_jobs"
NUM_WORKERS, QUICK_WORKERS = 8, 3
NUM_CALM, NUM_AFTER = 40, 40
"""Steps before the first that may be struck, and after the last one."""
NUM_DRAWN = 20
SOON_S = 0.05
"""Limit of issue 6."""

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Asked):
    """How a kind of fault is made, and which event tells of it."""

    make: Callable[[random.Random, int, int], Entry]
    event: str = "verdict"
    overrides: Mapping[str, str] = field(default_factory=dict)


def _at(step: int, worker: int, do: str, **more: Any) -> Entry:
    return {"do": do, "at": {"step": step}, "target": f"worker-{worker}", **more}


def _stop(dice: random.Random, step: int, worker: int) -> Entry:
    entry = _at(step, worker, "stop", for_s=dice.uniform(20, 40))
    entry["at"]["point"] = dice.choice(("before_compute", "after_compute"))
    return entry


KINDS = (
    Kind(
        name="dead process",
        make=lambda _, step, one: _at(step, one, "kill"),
        event="worker_lost",
        says=GONE,
        limit=SOON_S,
        unit="s",
    ),
    Kind(name="hang", make=_stop, says="hang outside communication", limit=HANG_STEPS),
    Kind(
        name="slow computation",
        make=lambda _, step, one: _at(step, one, "slow", factor=1.5),
        says="slow computation",
        limit=SLOW_STEPS,
    ),
    Kind(
        name="corruption",
        make=lambda _, step, one: _at(step, one, "flip_bit", probability=0.02),
        says="silent corruption",
        overrides={"audit": "all"},
    ),
)


def judge(kind: Kind, run: Run, worker: int) -> Injection:
    """Compare what was told with what was done."""
    struck_s = [float(one["time_s"]) for one in run.events if one["kind"] == "fault"]
    if not struck_s:
        raise RuntimeError(f"{run.path}: the fault never struck")
    begun_s = struck_s[0]
    told = [one for one in run.events if one["kind"] == "verdict"]
    others = tuple(str(one["verdict"]["kind"]) for one in told if one.get("worker") != worker)
    seen = [
        one
        for one in run.events
        if one["kind"] == kind.event and one["time_s"] >= begun_s and one.get("worker") == worker
    ]
    if not seen:
        return Injection(kind.name, NOTHING, None, others)
    first = seen[0]
    called = str(first["verdict"]["kind"]) if kind.event == "verdict" else kind.says
    took_s = float(first["time_s"]) - begun_s
    if kind.unit == "s":
        return Injection(kind.name, called, took_s, others)
    before = [one for one in run.metrics if one["time_s"] < begun_s]
    calm = [one for one in before if one in run.settled] or before  # a busy machine settles late
    usual_s = statistics.median(one["step_s"] for one in calm)
    return Injection(kind.name, called, took_s / usual_s, others)


def measure(options: argparse.Namespace) -> None:
    """Every kind so many times, then the healthy job."""
    kept = kept_of(NAME, options, KINDS)
    for kind in (one for one in KINDS if one.name in options.only):
        for number in (one for one in range(options.times) if (one, kind.name) not in kept):
            dice = random.Random(f"{options.seed} {number} {kind.name}")
            with timed(f"{kind.name} {number + 1} of {options.times}"):
                kept.add(number, _inject(kind, dice, options))
        say(matrix([one for _, one in kept.injections()]))
    false = None
    if options.healthy_minutes:
        with timed("a healthy job"):
            false = _healthy(options)
    report(NAME, options, kept, false, workers=_num_workers(options))


def _num_workers(options: argparse.Namespace) -> int:
    return QUICK_WORKERS if options.quick else NUM_WORKERS


def _job(name: str, options: argparse.Namespace, **overrides: str) -> JobConfig:
    num = _num_workers(options)
    given = {
        "workers.start": str(num),
        "workers.max": str(num + 1),
        "batch.micro_batches": str(4 * num),
        "evaluate.every": "0",
        **overrides,
    }
    return make_job(name, *(f"{key}={value}" for key, value in given.items()))


def _inject(kind: Kind, dice: random.Random, options: argparse.Namespace) -> Injection:
    step = NUM_CALM + dice.randrange(NUM_DRAWN)
    worker = dice.randrange(_num_workers(options))
    entry = kind.make(dice, step, worker)
    last = NUM_CALM + NUM_DRAWN + NUM_AFTER
    job = _job("detect", options, steps=str(last), **kind.overrides)
    try:
        return judge(kind, run_elastic(job, faults=[entry]), worker)
    except (ElasticError, RuntimeError) as error:
        say(f"{kind.name} at step {step}, worker {worker}: {error}")
        return Injection(kind.name, FAILED, None, ())


def _healthy(options: argparse.Namespace) -> list[str]:
    """The verdicts in a job that nothing happens to."""
    minutes = 0.5 if options.quick else options.healthy_minutes
    job = _job("healthy", options, steps="100000")
    calm = run_elastic(_job("calm", options, steps=str(NUM_CALM)))
    run = run_elastic(job, stop_after=int(60 * minutes / calm.median_s))
    return [str(one["reason"]) for one in run.events if one["kind"] == "verdict"]


def main() -> int:
    """Measure the matrix."""
    measure(parse(__doc__, KINDS, healthy_minutes=30.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
