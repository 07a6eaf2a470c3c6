"""Starts each system as its own documentation says, finds its processes, and ends it.

The sources of each set-up are in docs/peers.md. All traffic is on the loopback interface.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks import processes
from benchmarks.ddp import JOB
from benchmarks.peers import records
from benchmarks.peers.faults import send
from benchmarks.peers.records import Step, Tail
from benchmarks.peers.settings import THREADS, Settings
from benchmarks.peers.training import names_of
from elastic.core.runs import RunFolder
from elastic.core.status import read_status

MARK = "ELASTIC_PEERS_RUN"
"""Variable by which the processes of a run are known, whoever started them."""

TORCHFT_PYTHON = Path("runs/peers/torchft/bin/python")
RESTARTS = 1000
LOOPBACK = "127.0.0.1"
ENDLESS = 1_000_000
_END_S = 30.0
_POLL_S = 0.1


class System:
    """A system that runs. Peers log what their workers do; so far all is read from that log."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.write()
        self._children: list[subprocess.Popen[bytes]] = []
        self._log = Tail(self._log_file)

    @property
    def _log_file(self) -> Path:
        return self.settings.log

    def start(self) -> None:
        """Begin to train."""
        raise NotImplementedError

    def steps(self, last: int | None = None) -> list[Step]:
        """The committed steps so far, or those of the last lines of the log."""
        lines = self._log.lines()
        return records.merge(lines if last is None else lines[-last:])

    def workers(self) -> dict[int, int]:
        """Worker -> pid of those that live; numbered from 0 where there are as many as wanted."""
        newest = records.newest_workers(self._log.lines())
        return {worker: pid for worker, pid in sorted(newest.items()) if is_alive(pid)}

    def controller(self) -> int | None:
        """The pid of who decides on membership, if somebody does."""
        return self._children[0].pid

    def aggregator(self) -> int | None:
        """The pid of who updates the parameters for all, if it is not the workers themselves."""
        return None

    def join(self) -> bool:
        """Add a worker while it runs; False if there is no way to."""
        return False

    @property
    def is_alive(self) -> bool:
        """Whether it may still take a step: workers may go on without who started them."""
        return any(child.poll() is None for child in self._children) or bool(self.workers())

    @property
    def is_complete(self) -> bool:
        """Whether all that it starts at its beginning has come."""
        return len(self.workers()) >= self.settings.num_workers

    def pids(self) -> list[int]:
        """All of its processes: those of its session and environment, and what they started."""
        found = set(marked(str(self.settings.path)))
        for child in self._children:
            found |= {child.pid, *processes.below(child.pid)}
        return sorted(pid for pid in found if is_alive(pid))

    def end(self) -> None:
        """End it, in good order if it can, and whatever is left of it after a while."""
        self._ask()
        deadline_s = time.monotonic() + _END_S
        while self.pids() and time.monotonic() < deadline_s:
            for child in self._children:
                child.poll()
            time.sleep(_POLL_S)
        for pid in self.pids():
            send(pid, signal.SIGKILL)
        for child in self._children:
            child.wait()

    def _ask(self) -> None:
        for pid in self.pids():
            send(pid, signal.SIGTERM)

    def _launch(self, command: Sequence[str], **variables: str) -> None:
        """Start a process of the run; what it prints goes into a file."""
        more = {"OMP_NUM_THREADS": str(THREADS), "GLOO_SOCKET_IFNAME": "lo"}
        more |= {"PYTHONPATH": os.getcwd(), MARK: str(self.settings.path)}
        output = self.settings.path / f"output-{len(self._children)}.txt"
        with output.open("ab") as file:
            child = subprocess.Popen(
                command,
                env={**os.environ, **self.settings.variables, **more, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)


class Ddp(System):
    """Plain DistributedDataParallel: what is lost is lost."""

    restarts = 0
    variables: Mapping[str, str] = MappingProxyType({})

    def start(self) -> None:
        number = f"--nproc-per-node={self.settings.num_workers}"
        launcher = ["-m", "torch.distributed.run", "--standalone", number]
        launcher += [f"--max-restarts={self.restarts}", "-m", "benchmarks.peers.train_torchrun"]
        self._launch([sys.executable, *launcher, str(self.settings.file)], **self.variables)


class Torchrun(Ddp):
    """The same with checkpoints; torchrun starts all workers again when one is lost."""

    restarts = RESTARTS
    variables = MappingProxyType({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    """Without it workers that start again read the addresses of those before them, and most
    restarts fail: github.com/pytorch/pytorch/issues/135712."""


class TorchFt(System):
    """A lighthouse, and a torchrun for each replica group of one worker."""

    lighthouse: Sequence[str] = ("--quorum_tick_ms=100", "--join_timeout_ms=10000")
    """As the README of TorchFT starts it."""
    flags: Sequence[str] = ()

    def start(self) -> None:
        port = free_port()
        self._lighthouse = f"http://{LOOPBACK}:{port}"
        bind = f"--bind={LOOPBACK}:{port}"
        program = str(TORCHFT_PYTHON.with_name("torchft_lighthouse"))
        self._launch([program, "--min_replicas=1", bind, *self.lighthouse])
        for group in range(self.settings.num_workers):
            self._start_group(group)

    def _start_group(self, group: int) -> None:
        launcher = ["torch.distributed.run", f"--master_port={free_port()}", "--nnodes=1"]
        launcher += ["--nproc_per_node=1", f"--max_restarts={RESTARTS}"]
        trainer = ["-m", "benchmarks.peers.train_torchft", str(self.settings.file), *self.flags]
        self._launch(
            [str(TORCHFT_PYTHON.absolute()), "-m", *launcher, *trainer],
            TORCHFT_LIGHTHOUSE=self._lighthouse,
            REPLICA_GROUP_ID=str(group),
        )

    def join(self) -> bool:
        self._start_group(len(self._children) - 1)
        return True


class TunedTorchFt(TorchFt):
    """The same with time limits as short as steps of a second allow."""

    lighthouse = ("--quorum_tick_ms=20", "--join_timeout_ms=3000", "--heartbeat_timeout_ms=1000")
    flags = ("--tuned",)


class RayTrain(System):
    """A TorchTrainer that starts its group again from the last checkpoint."""

    flags: Sequence[str] = ()

    def start(self) -> None:
        module = ["-m", "benchmarks.peers.train_ray", str(self.settings.file), *self.flags]
        self._launch([sys.executable, *module])

    def controller(self) -> int | None:
        return self._titled("ray::TrainController")

    def _titled(self, title: str) -> int | None:
        found = [pid for pid in self.pids() if title in processes.command(pid)]
        return found[0] if found else None

    def _ask(self) -> None:
        send(self._children[0].pid, signal.SIGTERM)


class ElasticRayTrain(RayTrain):
    """The same with `num_workers=(1, n)`: it goes on with those that there is room for."""

    flags = ("--elastic",)


class Ours(System):
    """`elastic train`."""

    def start(self) -> None:
        one = self.settings
        parts = one.micro_batches or one.num_workers
        overrides = [
            f"name={one.path.name}",
            f"steps={ENDLESS}",
            f"task_args.size={one.size}",
            f"batch.micro_batches={parts}",
            f"batch.micro_batch_size={one.batch // parts}",
            f"workers.start={one.num_workers}",
            f"workers.threads={THREADS}",
            f"checkpoint.every={one.checkpoint_every}",
        ]
        command = ["-m", "elastic", "train", str(JOB), *overrides, "--run-dir", str(self._run)]
        self._launch([sys.executable, *command])

    @property
    def _run(self) -> Path:
        return self.settings.path / "run"

    @property
    def _log_file(self) -> Path:
        return self._run / "metrics.jsonl"

    def steps(self, last: int | None = None) -> list[Step]:
        lines = self._log.lines()
        return records.of_ours(lines if last is None else lines[-last:], self._names)

    @functools.cached_property
    def _names(self) -> records.Names:
        return names_of(self.settings)

    def _processes(self) -> processes.JobProcesses | None:
        store = processes.find_store(self.settings.path.name)
        return processes.find_processes(store) if store else None

    def workers(self) -> dict[int, int]:
        found = self._processes()
        return dict(enumerate(pid for _, pid in sorted(found.workers.items()))) if found else {}

    @property
    def is_complete(self) -> bool:
        """Also the standby of the aggregator and the spare worker."""
        status = read_status(RunFolder(self._run))
        if status is None or not status.num_spare or "+ standby" not in status.aggregator:
            return False
        return status.num_workers >= self.settings.num_workers

    def controller(self) -> int | None:
        found = [pid for pid in self.pids() if "Coordinator" in processes.command(pid)]
        return found[0] if found else None

    def aggregator(self) -> int | None:
        found = self._processes()
        return found.acting if found is not None and found.acting else None

    def join(self) -> bool:
        wanted = str(len(self.workers()) + 1)
        command = ["-m", "elastic", "scale", str(self._run), "--workers", wanted]
        return subprocess.run([sys.executable, *command], check=False).returncode == 0

    def _ask(self) -> None:
        send(self._children[0].pid, signal.SIGINT)


SYSTEMS: Mapping[str, type[System]] = {
    "ddp": Ddp,
    "torchrun": Torchrun,
    "torchft": TorchFt,
    "torchft-tuned": TunedTorchFt,
    "ray": RayTrain,
    "ray-elastic": ElasticRayTrain,
    "ours": Ours,
    "ours-fine": Ours,
}


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        text = (processes.PROC / str(pid) / "stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def marked(run: str) -> list[int]:
    """The living processes of a run, by the mark in their environment."""
    mark, found = f"{MARK}={run}".encode(), []
    for entry in processes.PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if mark in variables and is_alive(int(entry.name)):
                    found.append(int(entry.name))
    return sorted(found)
