"""What a start costs: imports, `elastic train` to the first committed step, `elastic status`.

    python -m benchmarks.startup [--only import,train,second,status] [--rounds N] [--quick]

    import    what a script imports, and each public name, over torch alone
    train     from `elastic train` to the first committed step, and where the time and the
              processor time go; each time with a Ray of its own
    second    the same on a cluster that has run a job already
    status    `elastic status` of a running job

The example's job with 4 workers, after a run for nothing that warms the disk. Only looks from
outside, at the run folder, the store and /proc, so that other versions can be measured alike.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import elastic
from benchmarks import jobs, processes
from benchmarks.ddp import JOB
from benchmarks.jobs import RUNS, hand_over, run_parts, timed
from benchmarks.record import figure, ratio
from elastic.cluster import local_cluster
from elastic.core.errors import FatalError
from elastic.core.runs import RunFolder, new_run_dir

NUM_WORKERS = 4

IMPORT_LIMIT = 1.2
"""Import time over torch's."""

TRAIN_LIMIT_S = 12.0
"""From `elastic train` to the first committed step, on 2 idle cores."""

STATUS_LIMIT_S = 1.0

SCRIPT = "from elastic import ElasticTrainer, Task"
"""What the README's script imports."""

PHASES = {
    "ray": "Python, imports and checks, until Ray starts",
    "job": "Ray starts or is reached",
    "coordinator": "the coordinator's process starts",
    "aggregator": "the aggregator's process starts, imports torch and the task",
    "spec": "it builds and tries the model",
    "socket": "it maps the store and listens",
    "worker": "until the first worker has loaded and tried a micro-batch",
    "maxima": "the first pass, over the maxima only",
    "commit": "the first step",
}
"""What passes until each mark, in their order."""

_COMMAND = (sys.executable, "-c", "from elastic.cli import main; main()")
_RAY_PROCESSES = ("gcs_server", "raylet", "dashboard.py", "log_monitor.py", "monitor.py")
_NAME = "bench-startup"
_POLL_S = 0.02
_DEADLINE_S = 120.0
_PAUSE_S = 3.0
"""Between two jobs: what ends must not take processor time from what starts."""


# --- imports ---------------------------------------------------------------------------------


def measure_import(options: argparse.Namespace) -> None:
    """Each statement in a process of its own, in turn with torch."""
    limited = ["import elastic", SCRIPT, f"import torch; {SCRIPT}"]
    statements = ["import torch", *limited]
    statements += [f"from elastic import {name}" for name in elastic.__all__]
    times_s: dict[str, list[float]] = {one: [] for one in statements}
    with timed("imports"):
        for number in range(2 if options.quick else 10 * options.rounds):
            for one in statements:
                took_s = _import_s(one)
                if number:  # the first round warms the disk
                    times_s[one].append(took_s)
    torch_s = times_s.pop("import torch")
    figures = [figure("import torch", torch_s, unit="s")]
    figures += [
        ratio(
            f"{one} / import torch",
            took_s,
            torch_s,
            limit=IMPORT_LIMIT if one in limited else None,
        )
        for one, took_s in times_s.items()
    ]
    hand_over("startup-import", options, {}, figures)


def _import_s(statement: str) -> float:
    """Seconds that a statement takes in a fresh interpreter, less the interpreter's own start."""
    code = (
        "import time; begin_s = time.perf_counter();"
        f"{statement}; print(time.perf_counter() - begin_s)"
    )
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# --- the first step --------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """One start of a job: seconds from the command to each mark, processor seconds by process."""

    marks_s: dict[str, float]
    all_joined_s: float
    """Until the last of the workers had joined."""
    cpu_s: dict[str, float]
    """What each kind of process had used at the first commit, and how many there were."""

    def phases_s(self) -> dict[str, float]:
        """How long each of `PHASES` took; none is negative, and together they are the whole."""
        phases_s, before_s = {}, 0.0
        for mark in PHASES:
            at_s = max(before_s, self.marks_s.get(mark, before_s))
            phases_s[mark], before_s = at_s - before_s, at_s
        return phases_s


def measure_train(options: argparse.Namespace) -> None:
    """Each job starts its own Ray and ends it."""
    rounds = 1 if options.quick else options.rounds
    with timed("train, to warm the disk"):
        start_job()
    with timed(f"train, {rounds} times"):
        starts = [start_job() for _ in range(rounds)]
    _report("startup-train", options, starts, TRAIN_LIMIT_S)


def measure_second(options: argparse.Namespace) -> None:
    """Jobs one after the other on one cluster; the first does not count."""
    rounds = 1 if options.quick else options.rounds
    with local_cluster() as address, timed(f"second job, {rounds} times"):
        starts = [start_job(address) for _ in range(1 + rounds)][1:]
    _report("startup-second", options, starts, None)


def _report(
    what: str, options: argparse.Namespace, starts: Sequence[Start], limit_s: float | None
) -> None:
    whole_s = [one.marks_s["commit"] for one in starts]
    figures = [
        figure("elastic train to the first committed step", whole_s, unit="s", limit=limit_s),
        figure(
            f"elastic train until all {NUM_WORKERS} workers have joined",
            [one.all_joined_s for one in starts],
            unit="s",
        ),
    ]
    phases_s = [one.phases_s() for one in starts]
    figures += [
        figure(f"of it: {words}", [one[mark] for one in phases_s], unit="s")
        for mark, words in PHASES.items()
    ]
    kinds = dict.fromkeys(kind for one in starts for kind in one.cpu_s)
    figures += [
        figure(f"processor: {kind}", [one.cpu_s.get(kind, 0.0) for one in starts], unit="s")
        for kind in kinds
    ]
    figures.append(figure("processor: all", [sum(one.cpu_s.values()) for one in starts], unit="s"))
    hand_over(what, options, {"workers": NUM_WORKERS, "size": "small"}, figures)


def start_job(address: str | None = None) -> Start:
    """Start a job, look at it until its workers have joined, stop it."""
    begin_s = time.time()
    marks_s: dict[str, float] = {}
    cpu_s: dict[str, float] = {}
    with _training(address) as (process, run):
        _await(process, lambda: processes.find_store(_NAME) is not None)
        store = processes.find_store(_NAME)
        assert store is not None

        def has_started() -> bool:
            marks_s.update(_store_marks(store) | marks_s)  # a slot is written again
            if not cpu_s and run.newest_metrics() is not None:
                cpu_s.update(_cpu_by_kind())
            return bool(cpu_s) and len(_joined_s(run)) >= NUM_WORKERS

        _await(process, has_started)
        if address is None:
            marks_s["ray"] = _ray_start_s(process.pid)
    first, joined_s = run.read_metrics()[0], _joined_s(run)[NUM_WORKERS - 1]
    marks_s |= {
        "job": float(run.read_events()[0]["time_s"]),
        "maxima": min(float(start_s) for _, _, start_s, _, _ in first["work"]),
        "commit": float(first["time_s"]),
    }
    time.sleep(_PAUSE_S)
    since_s = {mark: at_s - begin_s for mark, at_s in marks_s.items()}
    return Start(since_s, joined_s - begin_s, cpu_s)


def _store_marks(store: Path) -> dict[str, float]:
    """When the files of a store were made, as far as they have been."""
    files = {
        "coordinator": [store / "alive"],
        "aggregator": [store / "active"],
        "spec": [store / "spec"],
        "socket": [store / "socket"],
        "worker": list(store.glob("slot-*")),
    }
    marks_s = {}
    for mark, paths in files.items():
        with contextlib.suppress(FileNotFoundError, ValueError):  # there is none yet
            marks_s[mark] = min(_made_s(path) for path in paths)
    return marks_s


def _made_s(path: Path) -> float:
    """The unix time at which a file was made, or last written: slots are written at once."""
    return path.stat().st_mtime


def _joined_s(run: RunFolder) -> list[float]:
    """When workers joined, in order."""
    return [float(one["time_s"]) for one in run.read_events() if one["kind"] == "worker_joined"]


def _ray_start_s(pid: int) -> float:
    """The unix time at which the Ray of a driver was started."""
    (gcs,) = (one for one in processes.below(pid) if "gcs_server" in processes.command(one))
    return processes.start_s(gcs)


def _cpu_by_kind() -> dict[str, float]:
    """Processor seconds of everything below this process, by the kind of process."""
    sums: dict[str, list[float]] = {}
    for pid in processes.below(os.getpid()):
        with contextlib.suppress(OSError):  # it ended meanwhile
            sums.setdefault(_kind(processes.command(pid)), []).append(processes.cpu_s(pid))
    return {f"{len(used_s)} x {kind}": sum(used_s) for kind, used_s in sorted(sums.items())}


def _kind(command: str) -> str:
    """What a process is, in a word."""
    if command.startswith("ray::"):
        return command.removeprefix("ray::").partition(".")[0].partition(" ")[0]
    if command.startswith(" ".join(_COMMAND[:2])):
        return "elastic train"
    return next((name for name in _RAY_PROCESSES if name in command), "other")


@contextlib.contextmanager
def _training(address: str | None) -> Iterator[tuple[subprocess.Popen[bytes], RunFolder]]:
    """`elastic train` in a process of its own, and its run folder. Stops it at the end."""
    path = new_run_dir(_NAME, RUNS)
    words = [
        f"name={_NAME}",
        f"workers.start={NUM_WORKERS}",
        f"steps={jobs.ENDLESS}",
        "checkpoint.every=0",
    ]
    command = [*_COMMAND, "train", str(JOB), *words, "--run-dir", str(path)]
    environment = os.environ | ({} if address is None else {"RAY_ADDRESS": address})
    with (path / "train.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process, RunFolder(path)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(_DEADLINE_S)
        shutil.rmtree(path / "checkpoints", ignore_errors=True)


def _await(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Ask until it is so."""
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s or process.poll() not in (None, 0):
            raise FatalError(f"the job got nowhere in {_DEADLINE_S:.0f} s: {process.args!r}")
        time.sleep(_POLL_S)


# --- status ----------------------------------------------------------------------------------


def measure_status(options: argparse.Namespace) -> None:
    """A person asks a job that trains."""
    rounds = 2 if options.quick else 4 * options.rounds
    with timed("status"), _training(None) as (process, run):
        _await(process, lambda: len(_joined_s(run)) > NUM_WORKERS - 1)
        took_s = [_status_s(run) for _ in range(1 + rounds)][1:]
    figures = [figure("elastic status of a running job", took_s, unit="s", limit=STATUS_LIMIT_S)]
    hand_over("startup-status", options, {"workers": NUM_WORKERS, "size": "small"}, figures)


def _status_s(run: RunFolder) -> float:
    begin_s = time.monotonic()
    subprocess.run([*_COMMAND, "status", str(run.path)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin_s


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each kind")
    measure = {
        "import": measure_import,
        "train": measure_train,
        "second": measure_second,
        "status": measure_status,
    }
    return run_parts(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
