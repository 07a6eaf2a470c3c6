"""Makes the whole table: every scenario on every system, in turn, again and again.

    benchmarks/peers/run [--quick] [--size 10m] [--systems ddp,ours] [--scenarios steady,faults]

Resumable: a run whose JSON is in the output folder already is not done again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.ddp import JOB
from benchmarks.jobs import chosen, say
from benchmarks.peers import plots, report, scenarios
from benchmarks.peers.driver import Driver, Run, read_run
from benchmarks.peers.settings import BATCH, SIZES, THREADS, Settings
from benchmarks.peers.systems import SYSTEMS, System
from elastic.core.config import load_job
from elastic.core.task import load_task

OUT = Path("runs/peers")
DEFAULT_SYSTEMS = ("ddp", "torchrun", "torchft", "torchft-tuned", "ray", "ours", "ours-fine")
CHECKPOINTED = ("torchrun", "ray", "ray-elastic")
"""Begin again from a checkpoint; the others need none for the faults here."""
FINE = 2
"""Micro-batches for each worker of `ours-fine`."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--size", choices=SIZES, default="10m", help="0.85M, 10M or 100M parameters"
    )
    parser.add_argument("--systems", default=None, help=f"default: {','.join(DEFAULT_SYSTEMS)}")
    parser.add_argument("--scenarios", default="steady,faults,storm,changes")
    parser.add_argument("--repeats", type=int, default=None, help="default: by scenario")
    parser.add_argument("--quick", action="store_true", help="everything once")
    parser.add_argument("--batch", type=int, default=None, help="samples in a step")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps, of restarters")
    parser.add_argument(
        "--storm-s", type=float, default=scenarios.STORM_S, help="length of the storm"
    )
    parser.add_argument("--out", type=Path, default=None, help=f"default: {OUT}/SIZE")
    options = parser.parse_args(words)
    options.systems = options.systems and chosen(parser, options, SYSTEMS, "systems")
    options.scenarios = chosen(parser, options, _scenarios(options), "scenarios")
    options.batch = options.batch or BATCH[options.size]
    options.out = (options.out or OUT / options.size).absolute()
    return options


def settings_of(options: argparse.Namespace, system: str, folder: Path) -> Settings:
    """What a run of this system is."""
    return Settings(
        system=system,
        size=options.size,
        batch=options.batch,
        num_workers=options.workers,
        folder=str(folder),
        checkpoint_every=options.checkpoint_every if system in CHECKPOINTED else 0,
        micro_batches=options.workers * FINE if system == "ours-fine" else 0,
        variables={},
    )


def run_all(options: argparse.Namespace) -> list[str]:
    """All runs that are not there yet. Returns what failed, in words."""
    return run_missing(options.out, _runs(options))


def run_missing(out: Path, runs: Iterable[tuple[str, Callable[[], Run]]]) -> list[str]:
    """Of these, by their names, those that are not there yet. Returns what failed, in words."""
    failed = []
    for name, make in runs:
        file = out / f"{name}.json"
        if file.exists():
            continue
        say(f"{time.strftime('%H:%M:%S')} {name}")
        try:
            make().write(file)
        except Exception as error:  # one run that fails must not lose the others
            failed.append(f"{name}: {error!r}")
            say(traceback.format_exc())
    return failed


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Run]]]:
    known = _scenarios(options)
    for scenario in (known[one] for one in options.scenarios):
        repeats = options.repeats or (1 if options.quick else scenario.repeats)
        for repeat in range(repeats):
            for system in options.systems or _default(scenario):
                name = f"{scenario.name}-{repeat}-{system}"
                yield name, partial(one, options, system, scenario, repeat)


def _scenarios(options: argparse.Namespace) -> dict[str, scenarios.Scenario]:
    return scenarios.make(
        options.size,
        num_workers=options.workers,
        cores=len(os.sched_getaffinity(0)),
        storm_s=options.storm_s,
    )


def _default(scenario: scenarios.Scenario) -> list[str]:
    return [name for name in DEFAULT_SYSTEMS if name not in scenario.without]


def one(options: argparse.Namespace, system: str, scenario: scenarios.Scenario, repeat: int) -> Run:
    """One run; its logs are kept only if it fails."""

    def make(launch: int) -> System:
        folder = options.out / f"p{os.getpid()}-{scenario.name}-{repeat}-{system}-{launch}"
        shutil.rmtree(folder, ignore_errors=True)
        folders.append(folder)
        return SYSTEMS[system](settings_of(options, system, folder))

    folders: list[Path] = []
    config = {"size": options.size, "batch": options.batch, "workers": options.workers}
    config |= {"checkpoint_every": options.checkpoint_every}
    run = Run(system=system, scenario=scenario.name, repeat=repeat, config=config)
    run = Driver(run, scenario, make).drive()
    for folder in folders:
        shutil.rmtree(folder)
    return run


def main() -> int:
    """Run what is missing, then write the table. 1 if a system failed to start."""
    options = parse()
    begin_s = time.monotonic()
    prepare()
    failed = run_all(options)
    say(f"{time.monotonic() - begin_s:.0f} s")
    print(hand_over(options, failed))
    return 1 if failed else 0


def prepare() -> None:
    """Before the first run."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # ends what runs, too
    job = load_job(JOB)
    load_task(job.task, job.task_args).dataset()  # written once, before anybody needs it


def hand_over(options: argparse.Namespace, failed: Sequence[str]) -> str:
    """Write the table, the pictures and what they were measured on; returns the table."""
    runs = report.Runs(read_run(file) for file in sorted(options.out.glob("*-*-*.json")))
    what = (
        f"{options.size}, {options.workers} workers of {THREADS} thread, batch of {options.batch}"
    )
    table = report.headed(what, report.render(runs), failed)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    for file in plots.draw(runs, options.out):
        say(f"written: {file}")
    return table


if __name__ == "__main__":
    sys.exit(main())
