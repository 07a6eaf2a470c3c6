"""How well the fault detector does on made-up fleets of thousands of workers, and what it costs.

    python -m benchmarks.detection [--quick]

No processes, no Ray: `elastic.core.simulator.fleet` makes the steps, all seeded.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.jobs import hand_over, timed
from benchmarks.record import RESULTS, Figure, figure
from elastic.core.simulator.fleet import FleetPlan, random_faults
from elastic.core.simulator.judging import Judgement, judge

FLEETS = {1000: (1500, 20.0, (0, 1, 2, 3)), 10_000: (1500, 5.0, (0,))}
"""Workers: steps, seconds between faults on average, seeds."""

WRONG, MISSED, COST_MS, LARGE_STEPS = 0.01, 0.03, 20.0, 10
LARGE = 0.5


def measure(options: argparse.Namespace) -> None:
    """Every fleet with every seed."""
    figures, config = [], {}
    for num_workers, (num_steps, every_s, seeds) in FLEETS.items():
        num_steps = 150 if options.quick else num_steps
        results = []
        for seed in seeds[:1] if options.quick else seeds:
            with timed(f"{num_workers} workers, {num_steps} steps, seed {seed}"):
                plan = FleetPlan(num_workers=num_workers, seed=seed)
                faults = random_faults(plan, num_steps=num_steps, every_s=every_s)
                results.append(judge(replace(plan, faults=faults), num_steps))
        figures += figures_of(num_workers, results)
        config[str(num_workers)] = {
            "steps": num_steps,
            "seconds_between_faults": every_s,
            "seeds": list(seeds),
            "confusion": confusion(results),
        }
    hand_over("detection", options, config, figures)


def figures_of(num_workers: int, results: Sequence[Judgement]) -> list[Figure]:
    """Shares of all seeds together."""
    num_right, num_wrong = (
        sum(one.num_right for one in results),
        sum(len(one.wrong) for one in results),
    )
    num_faults, num_found = (
        sum(one.num_faults for one in results),
        sum(one.num_found for one in results),
    )
    verdicts, faults = [1.0] * num_wrong + [0.0] * num_right, [1.0] * (num_faults - num_found)
    faults += [0.0] * num_found
    large = [
        float(steps)
        for result in results
        for fault, steps in result.steps_to_verdict.items()
        if fault.excess >= LARGE
    ]
    cost_ms = [1000 * cost_s for result in results for cost_s in result.cost_s]
    name = f"{num_workers:,} workers"
    return [
        figure(f"false among verdicts, {name}", verdicts, unit="", limit=WRONG, statistic="mean"),
        figure(
            f"missed among faults of 20 % and more, {name}",
            faults,
            unit="",
            limit=MISSED,
            statistic="mean",
        ),
        figure(f"steps to the verdict, faults of 50 %, {name}", large, unit="", limit=LARGE_STEPS),
        figure(f"the detector's cost of a step, {name}", cost_ms, unit="ms", limit=COST_MS),
    ]


def confusion(results: Sequence[Judgement]) -> dict[str, int]:
    """How often which fault was called what."""
    counts: Counter[str] = Counter()
    for result in results:
        for (fault, verdict), num in result.confusion.items():
            was = fault.value if fault else "no fault"
            counts[f"{was} -> {verdict.value if verdict else 'no verdict'}"] += num
    return dict(counts)


def main() -> int:
    """Measure all fleets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few steps: only shows that it works")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULTS}")
    measure(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
