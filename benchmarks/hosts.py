"""Jobs on a testbed for the benchmarks: what happens to hosts while they train, and what it costs.

    job = HostJob(bed, config)
    job.settle()
    job.happen(Happening(20, "kill", "h3"))
    job.go_on(40)
    job.stop().gap_s()

A job counts as settled once all its workers are members. Brings every host back after each job.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.jobs import RUNS, make_job
from benchmarks.processes import mapped_files
from elastic.core.config import JobConfig
from elastic.core.runs import Lines, RunFolder, new_run_dir
from scripts.hosts import Host
from scripts.testbed import Testbed, has_raylet

NUM_HOSTS = 3
NUM_WORKERS = 6
SILENT_LIMIT_S = 2.0
"""A host that is cut off or frozen, beyond the median: that, or 5 median steps if they are more."""

HEAD = "h1"
"""Where the driver and the coordinator run; it lives as long as the job."""

Do = Literal[
    "kill",
    "cut",
    "freeze",
    "slow",
    "drain",
    "kill_coordinator",
    "kill_aggregator",
    "kill_worker",
    "kill_gcs",
]
"""kill_gcs needs a testbed that was made with RAY_gcs_storage=rocksdb. A drained host comes back
as a killed one does."""

_SLOW = "50mbit"
_DRAIN = """
import sys
from ray._raylet import GcsClient

gcs = GcsClient(sys.argv[1])
for node in gcs.get_all_node_info(timeout=10).values():
    if node.state == 0 and node.node_manager_address == sys.argv[2]:
        accepted, why = gcs.drain_node(node.node_id.hex(), 2, "chaos", 0)
        assert accepted, why
"""

_POLL_S = 0.02
_SETTLE_S = 240.0
_HEAL_S = 90.0
_PID_AT = 16  # of the acting aggregator, in bytes from the beginning of `control`
_CLI = ("python", "-c", "from elastic.cli import main; main()")


@dataclass(frozen=True, slots=True)
class Happening:
    """Something happens to a host once so many steps are committed after the job has settled.

    With `for_s` a host that was cut off, frozen, slowed, drained or killed is back after that time;
    Ray's GCS comes back after it in any case.
    """

    after: int
    do: Do
    host: str
    for_s: float | None = None


@dataclass(frozen=True, slots=True)
class HostRun:
    """A job that has ended. `at_s`: the unix times at which something happened."""

    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    result: dict[str, Any]
    settled: int
    at_s: list[float]

    @property
    def steps_s(self) -> list[float]:
        """Of the settled steps before anything happened."""
        end_s = self.at_s[0] if self.at_s else float("inf")
        rows = self.metrics[self.settled :]
        return [float(one["step_s"]) for one in rows if one["time_s"] < end_s]

    @property
    def median_s(self) -> float:
        return statistics.median(self.steps_s)

    def gap_s(self, number: int = 0) -> float:
        """From the last commit before a happening to the first one after it."""
        at_s = self.at_s[number]
        times_s = [float(one["time_s"]) for one in self.metrics]
        before = max(one for one in times_s if one <= at_s)
        return min(one for one in times_s if one > at_s) - before

    def recomputing_s(self, number: int = 0) -> float:
        """How long, within that gap, micro-batches were computed that began after the happening."""
        at_s = self.at_s[number]
        row = min((one for one in self.metrics if one["time_s"] > at_s), key=_time_s)
        begun = [work for work in row["work"] if work[2] > at_s and work[4] == "granted"]
        if not begun:
            return 0.0
        return float(max(one[3] for one in begun) - min(one[2] for one in begun))

    def lost_steps(self) -> list[int]:
        """Steps that are missing from the metrics."""
        seen = {int(one["step"]) for one in self.metrics}
        return sorted(set(range(int(self.result["steps"]))) - seen)


def silent_limit_s(runs: Sequence[HostRun]) -> float:
    """How long a gap may be, beyond the median, where a host falls silent (issue 4)."""
    return max(SILENT_LIMIT_S, 5 * max(run.median_s for run in runs))


def host_job(name: str, size: str, nodes: int, *overrides: str) -> JobConfig:
    """The job that is measured on hosts; all its workers begin it, unless `overrides` differ."""
    return make_job(
        name,
        f"task_args.size={size}",
        f"nodes.min={nodes}",
        f"nodes.max={nodes}",
        f"workers.start={NUM_WORKERS}",
        f"workers.max={NUM_WORKERS}",
        "batch.micro_batches=12",
        *overrides,
    )


class HostJob:
    """One job on a testbed, driven from its head."""

    def __init__(self, bed: Testbed, job: JobConfig, runs: Path = RUNS) -> None:
        self._bed, self._job = bed, job
        path = new_run_dir(job.name, runs)
        self.run = RunFolder(path.resolve())
        file = self.run.path / "job.yaml"
        file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
        with (self.run.path / "driver.log").open("w") as log:
            self._driver = subprocess.Popen(
                bed.host(HEAD).command(*_CLI, "train", str(file), "--run-dir", str(self.run.path)),
                env=bed.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._lines, self._rows = Lines(self.run.metrics_jsonl), list[dict[str, Any]]()
        self._events, self._told = Lines(self.run.events_jsonl), list[dict[str, Any]]()
        self._settled: int | None = None
        self._at_s: list[float] = []

    def await_event(self, kind: str, since_s: float) -> float:
        """Wait until it is told; when it was, in unix time."""

        def told_s() -> list[float]:
            self._told += self._events.read()
            return [
                float(one["time_s"])
                for one in self._told
                if one["kind"] == kind and one["time_s"] > since_s
            ]

        self.await_rows(lambda _: bool(told_s()))
        return told_s()[0]

    def await_worker(self, since_s: float) -> float:
        """Wait until a worker contributes that had not before; when it began to, in unix time."""

        def begun_s() -> list[float]:
            known = contributions(row for row in self._rows if row["time_s"] <= since_s)
            new = contributions(row for row in self._rows if row["time_s"] > since_s)
            return sorted(new[one] for one in new if one not in known)

        self.await_rows(lambda _: bool(begun_s()))
        return begun_s()[0]

    def settle(self, num_workers: int | None = None) -> None:
        """Wait until so many workers compute; all of them if none are named."""
        wanted = num_workers or self._job.workers.start
        self.await_rows(lambda rows: bool(rows) and rows[-1]["num_workers"] >= wanted)
        self._settled = len(self._rows)

    def go_on(self, num_steps: int) -> None:
        """Wait until so many more steps are committed since the job settled, or it ends."""
        assert self._settled is not None
        wanted = min(self._settled + num_steps, self._job.steps)
        self.await_rows(lambda rows: len(rows) >= wanted)

    def await_rows(self, condition: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Wait until the rows of the metrics fulfil a condition.

        Raises:
            RuntimeError: the job has ended, or it takes too long.
        """
        deadline_s = time.monotonic() + _SETTLE_S
        while not condition(self._rows):
            self._rows += self._lines.read()
            if self._driver.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{self.run.path}: {self._log()}")
            time.sleep(_POLL_S)

    def _log(self) -> str:
        return (self.run.path / "driver.log").read_text()[-2000:]

    def happen(self, what: Happening) -> None:
        """Let it happen when it is time."""
        self.go_on(what.after)
        self._at_s.append(time.time())
        host = self._bed.host(what.host)
        match what.do:
            case "kill":
                host.kill()
            case "cut":
                host.cut()
            case "freeze":
                host.freeze()
            case "slow":
                host.slow(_SLOW)
            case "drain":
                self._drain(host)
            case "kill_coordinator":
                _kill(host, "CoordinatorActor")
            case "kill_aggregator":
                self._kill_aggregator(host)
            case "kill_worker":
                self.kill_worker(host)
            case "kill_gcs":
                self._bed.kill_gcs()
        if what.for_s is not None:
            time.sleep(what.for_s)
            self._bring_back(what.do, host)

    def _bring_back(self, do: Do, host: Host) -> None:
        match do:
            case "cut":
                host.join()
            case "freeze":
                host.thaw()
            case "slow":
                host.fast()
            case "kill" | "drain":
                host.kill()
                self._bed.start(host)
            case "kill_gcs":
                self._bed.start_gcs()

    def _drain(self, host: Host) -> None:
        """Ray's notice that the host will be taken away."""
        words = ("python", "-W", "ignore", "-c", _DRAIN, self._bed.address, host.address)
        done = self._bed.run(HEAD, *words)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)

    def _stores(self, host: Host) -> list[Path]:
        """Of the job in the memory of a host, as this machine sees them."""
        return list(host.root.glob(f"dev/shm/elastic-*/{self._job.name}.*"))

    def kill_worker(self, host: Host) -> bool:
        """One of the job on a host, if it has any that computes."""
        for store in self._stores(host):
            own = Path("/") / store.relative_to(host.root)
            workers = [one.pid for one in host.processes() if _computes(one.pid, own)]
            if workers:
                os.kill(min(workers), signal.SIGKILL)
                return True
        return False

    def _kill_aggregator(self, host: Host) -> None:
        """The acting one of the job on a host, found as its standby finds it."""
        for store in self._stores(host):
            control = store / "control"
            own_pid = int.from_bytes(control.read_bytes()[_PID_AT : _PID_AT + 8], "little")
            for process in host.processes():
                if process.own_pid == own_pid:
                    os.kill(process.pid, signal.SIGKILL)

    def outlive(self) -> None:
        """Wait until its driver has died with its host."""
        self._driver.wait(_SETTLE_S)

    def stop(self) -> HostRun:
        """End the job in good order."""
        done = self._bed.run(HEAD, *_CLI, "stop", self._job.name)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return self.end()

    def abandon(self) -> None:
        """Kill its driver, and with it the job, whatever has become of it; bring all hosts back."""
        self._driver.kill()
        self._driver.wait()
        heal(self._bed)

    def end(self) -> HostRun:
        """Wait until it has ended by itself; bring all hosts back."""
        try:
            code = self._driver.wait(_SETTLE_S)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            raise
        finally:
            heal(self._bed)
        if code != 0:
            raise RuntimeError(f"{self.run.path}: {self._log()}")
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        return HostRun(
            self.run.read_metrics(),
            self.run.read_events(),
            self.run.read_json(self.run.result_json),
            self._settled or 0,
            self._at_s,
        )


def start_again(bed: Testbed, host: Host) -> tuple[float, float]:
    """Start Ray on a host once its last raylet has ended: when it began to, and when it was up."""
    deadline_s = time.monotonic() + _HEAL_S
    while host.is_up and has_raylet(host):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{host.name}: its raylet lives on")
        time.sleep(_POLL_S)
    begin_s = time.time()
    bed.start(host)
    return begin_s, time.time()


def heal(bed: Testbed) -> None:
    """Join, thaw and start hosts until Ray takes all of them to be alive."""
    wanted = {host.name for host in bed.hosts}
    deadline_s = time.monotonic() + _HEAL_S
    while True:
        for host in bed.hosts:
            if host.is_cut:
                host.join()
            if host.is_up and host.is_frozen:
                host.thaw()
            if not host.is_up or not has_raylet(host):
                bed.start(host)
        if bed.alive() == wanted:
            return
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"only {sorted(bed.alive())} of {sorted(wanted)} are alive")
        time.sleep(0.2)


def contributions(rows: Iterable[dict[str, Any]]) -> dict[int, float]:
    """When each worker began its first micro-batch that counted."""
    begun: dict[int, float] = {}
    for row in rows:
        for worker, _, start_s, _, outcome in row["work"]:
            if outcome == "granted":
                begun[worker] = min(start_s, begun.get(worker, start_s))
    return begun


def _computes(pid: int, store: Path) -> bool:
    """Whether it is a worker: these only read the parameters."""
    files = mapped_files(pid, store)
    return any(name.startswith("parameters-") and not files[name] for name in files)


def _kill(host: Host, actor: str) -> None:
    for process in host.processes():
        if actor in Path(f"/proc/{process.pid}/cmdline").read_text():
            os.kill(process.pid, signal.SIGKILL)


def _time_s(row: dict[str, Any]) -> float:
    return float(row["time_s"])
