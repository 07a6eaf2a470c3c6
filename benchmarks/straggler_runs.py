"""Policies against stragglers on real workers, with recorded delays, beside what is simulated.

    python -m benchmarks.straggler_runs --trace FILE.npz [--only frc/1 ...] [--scale 0.4]

Eight workers sleep in each step as long as the trace says; computing takes next to nothing. What
is simulated is driven by the same policies on the same delays, without messages. Each policy is a
job of its own: the steps count in which all workers took part.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import jobs
from benchmarks.record import Figure, figure
from elastic.core.config import JobConfig, load_job
from elastic.core.faults import read_trace
from elastic.core.simulator.stragglers import parse_policy
from policies.coding.codes import Floats
from policies.coding.delays import additive
from policies.coding.field import holders_of
from policies.coding.leases import Step
from policies.coding.m_sgc import MSgc
from policies.coding.simulation import Coded, Frc, Uncoded, simulate
from policies.coding.sr_sgc import SrSgc
from policies.scheduling import Shares

NUM_WORKERS = 8
NUM_MICRO_BATCHES = 16
SEQUENTIAL = ("sr_sgc/1/2/2", "m_sgc/1/2/8")
"""Of two models, trained in rounds."""
POLICIES = ("uncoded", "speculation", "frc/1", "frc/3", "c_code/1", "crc/1", *SEQUENTIAL, "auto")
OF_AUTO = [one for one in POLICIES if one not in (*SEQUENTIAL, "auto")]
NEAR = 1.15
"""Steps on real workers may take so many times what is simulated."""
PROBE = 12
"""First steps of `auto` that are not counted: it has not chosen yet."""


def make_job(policy: str, num_steps: int) -> JobConfig:
    """A job whose steps are nothing but control and delays."""
    kind, *numbers = policy.split("/")
    names = ("burst", "window", "distinct") if policy in SEQUENTIAL else ("stragglers",)
    models = 2 if policy in SEQUENTIAL else 1
    given = dict(zip(names, map(int, numbers), strict=False))
    return load_job(
        {
            "name": f"stragglers-{policy.replace('/', '-')}",
            "task": "benchmarks.tiny:Tiny",
            "steps": num_steps // models,
            "models": models,
            "batch": {"micro_batches": NUM_MICRO_BATCHES, "micro_batch_size": 4},
            "workers": {"start": NUM_WORKERS, "max": NUM_WORKERS, "spare": 0},
            "standby": False,
            "checkpoint": {"every": 0},
            "chunk_elements": 1024,
            "monitoring": {"detect": False, "port": None},
            "stragglers": {"kind": kind, **given},
        }
    )


def fixed(policy: str) -> Shares | Coded | SrSgc | MSgc:
    """What a fixed policy runs."""
    match parse_policy(policy):
        case Coded() | SrSgc() | MSgc() as scheme:
            return scheme
        case Frc(stragglers=stragglers):
            return Shares(copies=1 + stragglers)
        case Uncoded():
            return Shares(helps=False)
        case _:
            return Shares()


def simulated_s(
    policy: Shares | Coded | SrSgc | MSgc, delays_RN: Floats, steps: list[int], cost_s: float
) -> float:
    """Mean seconds of these steps, answers alone."""
    if isinstance(policy, SrSgc | MSgc):  # rounds, each of which begins a step
        delays = additive(delays_RN, 0.0, NUM_MICRO_BATCHES * cost_s)
        return float(simulate(policy, delays, len(steps)).rounds_R.mean())
    if isinstance(policy, Coded):
        return coded_s(
            policy.stragglers, delays_RN[[step % len(delays_RN) for step in steps]], cost_s
        )
    costs_N = np.full(NUM_WORKERS, cost_s)
    pace_s = NUM_WORKERS / NUM_MICRO_BATCHES * float(np.median(delays_RN)) + cost_s
    took_s = [
        Step(policy, NUM_MICRO_BATCHES, delays_RN[step % len(delays_RN)], costs_N, pace_s).run()
        for step in steps
    ]
    return statistics.fmean(took_s)


def coded_s(stragglers: int, delays_RN: Floats, cost_s: float) -> float:
    """Mean seconds until all but `stragglers` workers have computed all of their shares."""
    rows = holders_of([1.0] * NUM_WORKERS, NUM_MICRO_BATCHES, stragglers)
    load_N = np.bincount(np.array(rows).ravel(), minlength=NUM_WORKERS)
    ends_RN = np.sort(delays_RN + cost_s * load_N, axis=1)
    return float(ends_RN[:, NUM_WORKERS - 1 - stragglers].mean())


def measure(policy: str, trace: Path, scale: float, num_steps: int) -> Iterator[Figure]:
    """One job, its mean step and what is simulated for the same steps."""
    delays_RN = read_trace(trace)[:, :NUM_WORKERS] * scale
    faults = [{"do": "delays", "trace": str(trace.resolve()), "scale": scale}]
    run = jobs.run_elastic(make_job(policy, num_steps), faults=faults)
    first = PROBE if policy == "auto" else 1
    whole = [one for one in run.metrics if one["num_workers"] == NUM_WORKERS][first:]
    took_s = [float(one["step_s"]) for one in whole]
    steps = [int(one["step"]) for one in whole]
    chosen = [one["reason"] for one in run.events if one["kind"] == "scheduling"]
    yield figure(
        f"{policy}: step with delays of {trace.stem} x {scale:g}",
        took_s,
        unit="s",
        statistic="mean",
        note="; ".join([run.result["params_sha256"][:12], *chosen]),
    )
    cost_s = statistics.median(jobs.work_s(whole))
    candidates = [policy] if policy != "auto" else OF_AUTO
    for one in candidates:
        wanted_s = simulated_s(fixed(one), delays_RN, steps, cost_s)
        yield figure(
            f"{policy}: step / simulated {one}",
            [statistics.fmean(took_s) / wanted_s],
            unit="x",
            limit=NEAR if one == policy else None,
        )


def main() -> int:
    """Measure, print, write. 1 if a figure misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--trace", type=Path, required=True, help="an .npz file with an array 'dur'"
    )
    parser.add_argument("--only", choices=POLICIES, action="append")
    parser.add_argument(
        "--scale", type=float, default=0.4, help="factor on the seconds of the trace"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--quick", action="store_true", help="no result file")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    figures = [
        one
        for policy in options.only or POLICIES
        for one in measure(policy, options.trace, options.scale, options.steps)
    ]
    config = {"workers": NUM_WORKERS, "micro_batches": NUM_MICRO_BATCHES, "steps": options.steps}
    jobs.hand_over("stragglers-real", options, config, figures)
    return 1 if any(one.ok is False for one in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
