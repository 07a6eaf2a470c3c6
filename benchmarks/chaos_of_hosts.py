"""Random happenings to the hosts of a job: it must end with the bits of a calm run on one.

Part `chaos` of `benchmarks.cluster`. What happens in a run is a function of its seed alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.hosts import HEAD, NUM_HOSTS, Do, Happening, HostJob, HostRun, host_job
from benchmarks.jobs import say, timed
from benchmarks.record import Figure, figure
from scripts.testbed import Testbed

NUM_RUNS = 20
NUM_STEPS = 200
QUICK_STEPS = 80
MAX_HAPPENINGS = 3
LAST = 60
"""Steps after the start of the job until which something begins: it still finds it running."""

KINDS: tuple[Do, ...] = (
    "kill",
    "cut",
    "freeze",
    "slow",
    "drain",
    "kill_aggregator",
    "kill_worker",
    "kill_coordinator",
    "kill_gcs",
)
AT_HEAD = ("kill_coordinator", "kill_gcs")
ENDS_A_PROCESS = ("kill_aggregator", "kill_worker", "kill_coordinator")
TIMES_S = (0.2, 0.8, 3.0, 10.0)


def schedule(seed: int) -> list[Happening]:
    """One to three happenings, each to a host that may still be away."""
    dice = random.Random(seed)
    afters = sorted(dice.sample(range(1, LAST), dice.randint(1, MAX_HAPPENINGS)))
    return [_happening(dice, after) for after in afters]


def _happening(dice: random.Random, after: int) -> Happening:
    do = dice.choice(KINDS)
    host = HEAD if do in AT_HEAD else dice.choice([f"h{one}" for one in range(2, NUM_HOSTS + 1)])
    return Happening(after, do, host, None if do in ENDS_A_PROCESS else dice.choice(TIMES_S))


@contextlib.contextmanager
def lasting_gcs() -> Iterator[None]:
    """Testbeds that are made in this block have a GCS that may be killed and started again."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(Path(folder, "gcs"))}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in variables:
                del os.environ[name]


def measure(
    bed: Testbed, size: str, *, num_runs: int, seed: int, num_steps: int = NUM_STEPS
) -> list[Figure]:
    """Stops at the first run that ends with other bits, and says which."""
    steps = f"steps={num_steps}"
    with timed("chaos, the calm run"):
        expected = bits(HostJob(bed, host_job("chaos-calm", size, 1, steps)).end())
    others, num_done = 0, 0
    for number in range(seed, seed + num_runs):
        with timed(f"chaos, seed {number}, run {num_done + 1} of {num_runs}"):
            job = HostJob(bed, host_job("chaos", size, NUM_HOSTS, steps, f"replicas={NUM_HOSTS}"))
            job.settle(1)
            for what in schedule(number):
                say(f"  {what}")
                job.happen(what)
            got = bits(job.end())
        num_done += 1
        if got != expected:
            others += 1
            say(f"seed {number}: {got} instead of {expected}, see {job.run.path}")
            break
    return [
        figure(
            f"runs of {num_done} that end with other bits, {size}",
            [float(others)],
            unit="runs",
            limit=0.0,
        )
    ]


def bits(run: HostRun) -> dict[str, object]:
    """What must be equal."""
    names = ("outcome", "steps", "params_sha256", "samples_sha256")
    return {name: run.result[name] for name in names} | {"lost": run.lost_steps()}
