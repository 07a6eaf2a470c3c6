"""What several tests need: a tiny task, job files, and a job on one node without processes.

Only fixtures and hooks; nothing imports this file.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from xdist.scheduler import LoadScopeScheduling

from elastic.core import fixed_point
from elastic.core.compute import MicroBatches, deterministic, make_sizes
from elastic.core.config import JobConfig, load_job
from elastic.core.data.memory import ArrayRows
from elastic.core.device import Device, Host
from elastic.core.mapped import EMA, Control, MappedFile, Sizes, Slot, Version
from elastic.core.model import ModelSpec, Prepared, prepare, raw_bytes
from elastic.core.protocol.messages import Combine, Key, Lease, Outcome, State
from elastic.core.store import Store
from elastic.core.update import Plan, Updater

NUM_SAMPLES, NUM_INPUTS = 60, 6


class TinyTask:
    """Regression with BatchNorm and dropout: buffers, counters and random numbers in 1 ms."""

    def __init__(self, build: Callable[[], nn.Module] | None = None) -> None:
        self._build = build

    def model(self) -> nn.Module:
        if self._build is not None:
            return self._build()
        return nn.Sequential(
            nn.Linear(NUM_INPUTS, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(12, 1),
        )

    def dataset(self) -> ArrayRows:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(NUM_SAMPLES, NUM_INPUTS, generator=generator)
        return ArrayRows(inputs=inputs, targets=inputs.sum(1, keepdim=True))

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        errors = model(batch["inputs"]) - batch["targets"]
        return errors.square().sum(), float(len(errors))

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for _, parameter in named], lr=0.01)


@dataclass
class Node:
    """A job's store and what acts on it, in this process: what actors do, one call at a time."""

    store: Store
    task: Any
    job: JobConfig
    prepared: Prepared
    sizes: Sizes
    versions: tuple[Version, Version]
    control: Control
    state: State = State(step=0, attempt=0, exponents=None)
    slots: dict[int, Slot] = field(default_factory=dict)
    live: dict[int, int] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        return self.prepared.spec

    def worker(self, device: Device | None = None) -> MicroBatches:
        host = Host(self.spec.layout)
        return MicroBatches(self.job, self.task, self.spec, self.store, device or host)

    def begin(self, state: State) -> None:
        """Flip the commit record."""
        self.state = state
        self.control.state.write(state.to_bytes())
        self.control.key[0] = state.key.word
        self.live.clear()

    def lease(self, micro_batch: int, *, step: int | None = None) -> Lease:
        key = self.state.key if step is None else Key(0, step, 0)
        combine = Combine.MAXIMA if self.state.exponents is None else Combine.SUM
        return Lease(key, (micro_batch,), combine)

    def measure(self, computer: MicroBatches) -> None:
        """The first pass over a step, which only takes the maxima."""
        num = self.job.batch.micro_batches
        maxima = np.stack([computer.compute(self.lease(one)).maxima_C for one in range(num)])
        old = np.zeros(maxima.shape[1], np.int64)
        exponents = tuple(fixed_point.exponents_for(maxima, old).tolist())
        self.begin(replace(self.state, attempt=self.state.attempt + 1, exponents=exponents))

    def accumulate(self, computer: MicroBatches, worker: int, micro_batch: int) -> Outcome:
        """Compute one micro-batch and add it to a worker's slot."""
        if worker not in self.slots:
            self.slots[worker] = Slot(self.store.path, worker, self.sizes, writable=True)
        lease = self.lease(micro_batch)
        outcome = computer.compute(lease)
        base = self.live.get(worker)
        half = 0 if base is None else 1 - base
        computer.encode(lease, self.slots[worker], half=half, base=base)
        self.live[worker] = half
        return outcome

    def updater(self, *, num_threads: int = 1) -> Updater:
        return Updater(
            self.spec,
            self.versions,
            num_micro_batches=self.job.batch.micro_batches,
            clip_norm=self.job.clip_norm,
            ema_decay=self.job.ema.decay if self.job.ema else None,
            num_threads=num_threads,
        )

    def plan(self, *, weight: float, factor: float = 1.0) -> Plan:
        assert self.state.exponents is not None
        return Plan(
            source=self.state.step % 2,
            slots=[(self.slots[worker], half) for worker, half in sorted(self.live.items())],
            exponents=self.state.exponents,
            weight=weight,
            factor=factor,
            fresh=self.state.num_updates == 0,
        )

    def commit(self) -> None:
        """The next version counts now."""
        self.begin(
            replace(
                self.state,
                step=self.state.step + 1,
                attempt=0,
                num_updates=self.state.num_updates + 1,
            )
        )

    def parameters(self, version: int) -> dict[str, torch.Tensor]:
        values = self.versions[version].values
        return {
            one.name: values[one.start : one.stop].view(one.shape).clone()
            for one in self.spec.layout.fields
        }


class _ByFolder(LoadScopeScheduling):
    """Of several test processes: all jobs on this machine's own Ray cluster are one's, one after
    the other, and so are all on hosts. What needs no Ray goes to whoever is free."""

    _ROOMS: ClassVar = {"fault": "jobs", "integration": "jobs", "hosts": "hosts"}

    def _split_scope(self, nodeid: str) -> str:
        return self._ROOMS.get(nodeid.split("/")[1], nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFolder(config, log)


@pytest.fixture
def tiny_task() -> type[TinyTask]:
    return TinyTask


@pytest.fixture
def make_job() -> Callable[..., JobConfig]:
    """A small job; keyword arguments are further keys of the job file."""

    def make(**keys: Any) -> JobConfig:
        batch = {"micro_batches": 4, "micro_batch_size": 5}
        return load_job({"name": "t", "steps": 10, "batch": batch, "chunk_elements": 1024, **keys})

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Rounding as in the processes of a job; this process is as before afterwards."""
    threads = torch.get_num_threads()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    random_state = torch.get_rng_state()
    deterministic(1)
    yield
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_num_threads(threads)
    torch.set_rng_state(random_state)


@pytest.fixture
def make_node(
    tmp_path: Path, make_job: Callable[..., JobConfig], one_thread: None
) -> Iterator[Callable[..., Node]]:
    """A prepared node of a task; keyword arguments are keys of the job file."""
    nodes: list[Node] = []

    def make(task: Any = None, **keys: Any) -> Node:
        task = TinyTask() if task is None else task
        job = make_job(**keys)
        store = Store(tmp_path / f"job{len(nodes)}.run.node")
        store.create()
        prepared = prepare(task, job, task.dataset())
        sizes = make_sizes(prepared.spec, job)
        first, second = (
            Version(store.path, index, sizes, writable=True, optimizer=True) for index in range(2)
        )
        control = Control(store.path, sizes, writable=True)
        node = Node(store, task, job, prepared, sizes, (first, second), control)
        nodes.append(node)
        _fill(node)
        node.begin(node.state)
        return node

    yield make
    for node in nodes:
        node.store.close()


def _fill(node: Node) -> None:
    """The starting values, in version 0 only, so that nothing can read version 1 by mistake."""
    spec, values, version = node.spec, node.prepared.values, node.versions[0]
    node.versions[1].values.fill_(torch.nan)
    version.kept.fill_(1)
    for one in spec.layout.fields:
        version.values[one.start : one.stop].view(one.shape).copy_(values[one.name])
    if node.job.ema:
        version.states[EMA].copy_(version.values[: len(version.states[EMA])])
    for counter in spec.layout.counters:
        stop = counter.start_byte + counter.size_bytes
        (data,) = raw_bytes([values[counter.name]])
        version.counters[counter.start_byte : stop] = torch.frombuffer(
            bytearray(data), dtype=torch.uint8
        )
    if spec.constants:
        path = node.store.path / "constants"
        file = MappedFile(path, spec.constants_bytes, writable=True)
        for one in spec.constants:
            num = one.size_bytes // one.dtype.itemsize
            target = file.tensor(one.dtype, one.start_byte, num).view(one.shape)
            target.copy_(values[one.name])


class Child:
    """A forked process that runs `work`, says so, and waits to be ended."""

    def __init__(self, work: Callable[[], None]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work()
                os.write(writer, b"1")
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        self.is_ready = os.read(reader, 1) == b"1"  # end of file if it died in `work`
        os.close(reader)
        self._status: int | None = None

    def kill(self) -> int:
        """SIGKILL it; return the signal that ended it, whoever sent it."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._status = os.waitpid(self.pid, 0)[1]
        return os.WTERMSIG(self._status) if os.WIFSIGNALED(self._status) else 0


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], None]], Child]]:
    """Run a function in another process that lives until the test ends, or is killed."""
    children: list[Child] = []

    def start(work: Callable[[], None]) -> Child:
        children.append(Child(work))
        return children[-1]

    yield start
    for child in children:
        child.kill()
