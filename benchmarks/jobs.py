"""Runs jobs of Elastic and of the peer for the benchmarks, and keeps what their steps took.

A job counts as settled once all its workers, its spare and its standby have started: only later
steps are measured. Never measures while both sides run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from actors.setup import compute_environment
from benchmarks import record
from benchmarks.ddp import JOB, WARM_UP
from benchmarks.processes import JobProcesses, find_processes, find_store
from benchmarks.record import Figure
from elastic.cluster import local_cluster
from elastic.core.config import JobConfig, load_job
from elastic.core.errors import FatalError
from elastic.core.faults import load_faults
from elastic.core.runs import RunFolder, new_run_dir
from elastic.core.status import Status
from elastic.driver import run_job
from elastic.handle import connect

RUNS = Path("runs/benchmarks")
ENDLESS = 100_000
"""Steps of a job that the benchmark stops."""

PEER_ENVIRONMENTS = ("plain", "same")
SETTLE_S = 60.0
"""After so long in training a job is measured though its spare or standby is not there yet: on a
busy machine they start slowly, being of low priority."""

PATIENCE_S = 180.0
"""A job that commits no step for so long has failed."""

_PEER_TIMEOUT_S = 3600.0
_PEER_POLL_S = 0.2

Probe = Callable[[Status, Path, JobProcesses], None]
PeerProbe = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Run:
    """A job that has ended. `settled_s`: the unix time from which on steps count."""

    job: JobConfig
    path: Path
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    result: dict[str, Any]
    settled_s: float

    @property
    def settled(self) -> list[dict[str, Any]]:
        """The steps that began when everything had started."""
        steps = [one for one in self.metrics if one["time_s"] - one["step_s"] >= self.settled_s]
        return steps or self.metrics[WARM_UP:]

    @property
    def steps_s(self) -> list[float]:
        return [float(one["step_s"]) for one in self.settled]

    @property
    def median_s(self) -> float:
        return statistics.median(self.steps_s)

    @property
    def micro_batch_s(self) -> float:
        """The median time of one micro-batch, beside the others on the same cores."""
        return statistics.median(work_s(self.settled))

    @property
    def settled_step(self) -> int:
        return int(self.settled[0]["step"])

    def lost_steps(self) -> list[int]:
        """Steps that are missing, or that had to be done more than once (but for step 0)."""
        seen = {int(one["step"]) for one in self.metrics}
        missing = set(range(int(self.result["steps"]))) - seen
        again = {int(one["step"]) for one in self.metrics[1:] if one["attempt"]}
        return sorted(missing | again)


def work_s(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """How long each granted micro-batch took, without its encoding."""
    return [
        end_s - start_s
        for one in metrics
        for _, _, start_s, end_s, outcome in one["work"]
        if outcome == "granted"
    ]


class Watch:
    """Follows a job: sees when it has settled, probes it, and stops it after enough steps."""

    def __init__(
        self, job: JobConfig, run_dir: Path, *, stop_after: int | None, probe: Probe | None
    ) -> None:
        self._job, self._run_dir = job, run_dir
        self._stop_after, self._probe = stop_after, probe
        self._stopped = False
        self._training_s: float | None = None
        self._step, self._step_s = -1, time.monotonic()
        self.settled_s = 0.0
        self._settled_step = 0

    def __call__(self, status: Status) -> None:
        self._lose_patience(status)
        if status.phase != "training":
            return
        store = find_store(self._job.name)
        if store is None:
            return
        if not self.settled_s:
            self._look(status, store)
            return
        if self._probe is not None:
            self._probe(status, store, find_processes(store))
        if self._stop_after is not None and not self._stopped:
            self._stopped = status.step >= self._settled_step + self._stop_after
            if self._stopped:
                connect(str(self._run_dir)).stop()

    def _lose_patience(self, status: Status) -> None:
        if status.step != self._step:
            self._step, self._step_s = status.step, time.monotonic()
        elif time.monotonic() - self._step_s > PATIENCE_S:
            raise FatalError(
                f"no step was committed for {PATIENCE_S:.0f} s: it stands at step {status.step},"
                f" {status.phase}, {status.num_workers} workers, aggregator {status.aggregator}"
            )

    def _look(self, status: Status, store: Path) -> None:
        self._training_s = self._training_s or time.monotonic()
        if not self._is_complete(status, store):
            if time.monotonic() - self._training_s < SETTLE_S:
                return
            say(f"{self._job.name}: spare or standby is not there after {SETTLE_S:.0f} s; go on")
        self.settled_s, self._settled_step = time.time(), status.step

    def _is_complete(self, status: Status, store: Path) -> bool:
        workers = self._job.workers
        if status.num_workers < workers.start or status.num_spare < workers.spare:
            return False
        return len(find_processes(store).aggregators) >= 1 + self._job.standby


def make_job(name: str, *overrides: str, base: Path = JOB) -> JobConfig:
    """The example's job, without checkpoints on the way."""
    return load_job(base, [f"name={name}", "checkpoint.every=0", *overrides])


def run_elastic(
    job: JobConfig,
    *,
    faults: Sequence[Mapping[str, Any]] = (),
    stop_after: int | None = None,
    probe: Probe | None = None,
) -> Run:
    """Run a job to its end, or until `stop_after` steps after it settled.

    Args:
        faults: entries of a fault file.
        probe: called about five times a second once the job has settled.

    Raises:
        FatalError: the job failed, stands still, or a fault never happened.
    """
    run_dir = new_run_dir(job.name, RUNS)
    path = run_dir / "faults.yaml"
    path.write_text(yaml.safe_dump(list(faults)), encoding="utf-8")
    watch = Watch(job, run_dir, stop_after=stop_after, probe=probe)
    run = RunFolder(run_dir)
    try:
        with local_cluster():
            result = run_job(
                job,
                run_dir=run_dir,
                faults=load_faults(path, num_steps=job.steps),
                on_status=watch,
            )
    finally:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    assert result.metrics is not None
    return Run(
        job, run_dir, run.read_metrics(), run.read_events(), dict(result.metrics), watch.settled_s
    )


@dataclass(frozen=True)
class Peer:
    """A run of the peer that has ended. `steps` without each segment's warm-up."""

    steps: list[dict[str, Any]]
    losses: list[float]
    state_bytes: dict[str, int]

    def steps_s(self, label: str = "calm") -> list[float]:
        return [float(one["step_s"]) for one in self.steps if one["label"] == label]


def run_ddp(
    *words: str, num_ranks: int = 4, environment: str = "plain", probe: PeerProbe | None = None
) -> Peer:
    """Run the peer with these options of `benchmarks.ddp`.

    Args:
        environment: 'plain', as anybody would start it, or 'same': the variables of our workers.
        probe: called about five times a second with the ranks' pids, once they are warm.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    out = RUNS / f"ddp-{time.time_ns()}.jsonl"
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [sys.executable, "-m", *launcher, "-m", "benchmarks.ddp", *words, "--out", str(out)]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if environment == "same":
        settings |= compute_environment(1)
    process = subprocess.Popen(command, env=os.environ | settings)
    try:
        _follow(process, out, probe)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    lines = _read(out)
    out.unlink()
    (end,) = [one for one in lines if one["kind"] == "end"]
    steps = [one for one in lines if one["kind"] == "step" and one["within"] >= WARM_UP]
    return Peer(steps, end["losses"], end.get("state_bytes", {}))


def _follow(process: subprocess.Popen[bytes], out: Path, probe: PeerProbe | None) -> None:
    deadline_s = time.monotonic() + _PEER_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(_PEER_POLL_S) != 0:
                raise RuntimeError(f"the peer failed with exit code {process.returncode}")
            return
        lines = _read(out) if probe is not None else []
        kinds = {one["kind"] for one in lines}
        if probe is not None and "warm" in kinds and "end" not in kinds:
            probe([one["pid"] for one in lines if one["kind"] == "rank"])
    raise TimeoutError(f"the peer has not ended within {_PEER_TIMEOUT_S:.0f} s")


def _read(out: Path) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if line]


def add_options(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """Options that `step` and `recovery` share."""
    parser.add_argument("--only", default=",".join(parts), help="parts, separated by commas")
    parser.add_argument("--size", choices=("small", "10m"), default=None, help="default: see parts")
    parser.add_argument("--quick", action="store_true", help="few steps: only shows that it works")
    parser.add_argument("--peer-environment", choices=PEER_ENVIRONMENTS, default="plain")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {record.RESULTS}")


def chosen(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    known: Collection[str],
    name: str = "only",
) -> list[str]:
    """What an option names, separated by commas: one at least."""
    given = [one for one in getattr(options, name).split(",") if one]
    if not given or not set(given) <= set(known):
        parser.error(f"--{name}: got {','.join(given)}; allowed are {', '.join(known)}")
    return given


def run_parts(
    parser: argparse.ArgumentParser, measure: Mapping[str, Callable[[argparse.Namespace], None]]
) -> int:
    """Add the options of a benchmark that has parts, and run those that --only names."""
    parser.add_argument("--only", default=",".join(measure), help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="only shows that it works")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {record.RESULTS}")
    options = parser.parse_args()
    for part in chosen(parser, options, measure):
        say(f"--- {part}")
        measure[part](options)
    return 0


def hand_over(
    what: str, options: argparse.Namespace, config: Mapping[str, Any], figures: Sequence[Figure]
) -> None:
    """Print a record and write it; that of a quick run not among the results."""
    made = record.make_record(what, {"quick": options.quick, **config}, figures)
    folder = options.out or (RUNS / "quick" if options.quick else record.RESULTS)
    path = record.write(made, folder)
    print(json.dumps(made, indent=2))
    print(f"written: {path}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Tell whoever waits what goes on."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    begin_s = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - begin_s:.0f} s")
