"""What checkpoints cost: a job that writes one every 10 steps, beside one that writes none.

    python -m benchmarks.checkpoint [--size small|10m] [--quick]

Segments of both in turn, on the same machine, never at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import jobs
from benchmarks.jobs import Run, hand_over, make_job, run_elastic, timed
from benchmarks.record import RESULTS, Figure, figure, ratio

EVERY = 10
LIMIT = 1.05
ORDER = (EVERY, 0)
"""One round of segments: steps between checkpoints, 0: none."""


def measure(size: str, options: argparse.Namespace) -> None:
    """All steps of a side count together: those that wait for a copy, and those beside a write."""
    steps, rounds = (2 * EVERY, 1) if options.quick else (3 * EVERY, 2)
    with_s: list[float] = []
    without_s: list[float] = []
    write_s: list[float] = []
    medians: dict[str, list[float]] = {}
    for number in range(rounds):
        for every in ORDER:
            name = f"every {every}" if every else "none"
            with timed(f"checkpoints, {size}, round {number + 1} of {rounds}, {name}"):
                run = _segment(size, every, number, steps)
            (with_s if every else without_s).extend(run.steps_s)
            write_s += written_s(run) if every else []
            medians.setdefault(name, []).append(statistics.median(run.steps_s))
    config = {
        "size": size,
        "every": EVERY,
        "micro_batches": 4,
        "steps_of_a_segment": steps,
        "rounds": rounds,
        "medians_of_segments_s": medians,
    }
    hand_over(f"checkpoint-{size}", options, config, figures(size, with_s, without_s, write_s))


def figures(
    size: str, with_s: Sequence[float], without_s: Sequence[float], write_s: Sequence[float]
) -> list[Figure]:
    """The ratio of the means, since a checkpoint may cost one step much and the others little."""
    name = f"step time with a checkpoint every {EVERY} steps / none, {size}"
    made = [
        ratio(name, with_s, without_s, limit=LIMIT, statistic="mean"),
        ratio(f"the same, medians, {size}", with_s, without_s),
        figure(f"step time with checkpoints, {size}", with_s, unit="s"),
        figure(f"step time without, {size}", without_s, unit="s"),
    ]
    if write_s:
        made.append(figure(f"from the step to its checkpoint on disk, {size}", write_s, unit="s"))
    return made


def written_s(run: Run) -> list[float]:
    """How long after the last step that it holds each checkpoint was on disk."""
    committed_s = {int(one["step"]) + 1: float(one["time_s"]) for one in run.metrics}
    took_s = []
    for event in run.events:
        words = str(event["reason"]).split()
        if event["kind"] == "checkpoint_written" and words[0] == "step":
            took_s.append(float(event["time_s"]) - committed_s[int(words[1].rstrip(":"))])
    return took_s


def _segment(size: str, every: int, number: int, steps: int) -> Run:
    job = make_job(
        f"bench-checkpoint-{size}-{every}-{number}",
        f"task_args.size={size}",
        "batch.micro_batches=4",
        "batch.micro_batch_size=8",
        f"checkpoint.every={every}",
        f"steps={jobs.ENDLESS}",
    )
    return run_elastic(job, stop_after=steps)


def main() -> int:
    """Measure one size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=("small", "10m"), default="10m")
    parser.add_argument("--quick", action="store_true", help="few steps: only shows that it works")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULTS}")
    options = parser.parse_args()
    measure(options.size, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
