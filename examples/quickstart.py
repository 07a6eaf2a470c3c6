"""Trains the text example twice: with a worker killed on the way, and undisturbed.

Both must end with the same parameters, bit for bit. `scripts/quickstart` runs this.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from elastic import Result
from elastic.cluster import local_cluster
from elastic.core.config import JobConfig, load_job
from elastic.core.faults import Fault, load_faults
from elastic.core.runs import new_run_dir
from elastic.driver import run_job
from elastic.progress import make_progress

EXAMPLE = Path(__file__).parent / "stdlib_lm"


def train(console: Console, job: JobConfig, faults: tuple[Fault, ...] = ()) -> Result:
    """Run one job behind a progress bar."""
    with make_progress(console, job.name) as progress:
        return run_job(job, run_dir=new_run_dir(job.name), faults=faults, on_status=progress.show)


def main() -> int:
    """Run both, compare, and say so. 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps of each run")
    steps = parser.parse_args().steps
    console = Console(highlight=False, markup=False)
    job = load_job(EXAMPLE / "job.yaml", [f"steps={steps}"])
    console.rule("1. with faults: one worker is killed, one is stopped for 5 s")
    faults = load_faults(EXAMPLE / "faults.yaml", num_steps=steps)
    with local_cluster():
        disturbed = train(console, job, faults)
        console.rule("2. the same job, undisturbed, with 2 workers instead of 4")
        calm = train(console, load_job(EXAMPLE / "job.yaml", [f"steps={steps}", "workers.start=2"]))
    equal = disturbed.params_sha256 == calm.params_sha256
    console.rule()
    for name, result in (("with faults", disturbed), ("undisturbed", calm)):
        assert result.metrics is not None
        first, last = result.metrics["first_loss"], result.metrics["loss"]
        console.print(f"{name}: loss {first:.4f} -> {last:.4f}, in {result.path}", soft_wrap=True)
        console.print(f"params_sha256 {result.params_sha256}", soft_wrap=True)
    verdict = "equal, bit for bit" if equal else "DIFFERENT: please report this"
    style = "bold green" if equal else "bold red"
    console.print(f"The parameters are {verdict}.", style=style)
    console.print(f"See it: .venv/bin/elastic report {disturbed.path}", soft_wrap=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
