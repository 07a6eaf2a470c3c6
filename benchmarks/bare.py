"""What each phase of a step takes by itself, and how fast memory is: what a job is held against.

As many processes as the job would have do one phase at a time, all at once, and meet before and
after it. Forward and backward are plain PyTorch; the rest are the engine's own kernels on files of
a store. Starts no Ray, decides nothing about limits.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import torch

from benchmarks.ddp import JOB, WARM_UP
from elastic.core.compute import deterministic, make_sizes
from elastic.core.config import JobConfig, load_job
from elastic.core.fixed_point import Encoder
from elastic.core.mapped import Sizes, Slot, Version
from elastic.core.model import ModelSpec, prepare, sample_stream
from elastic.core.store import ROOT
from elastic.core.task import Task, load_task
from elastic.core.update import Plan, Updater

PHASES = ("compute", "maxima", "encode", "sum", "update")
"""compute: forward and backward; sum: of the slots, with the norm; update: of all parameters."""

BARRIER_S = 300.0
"""A process that does not come for so long has failed."""

_EXPONENT = 10  # of every chunk: what these models' gradients are is far from int32's ends
_STREAM_ELEMENTS = 1 << 25
_STREAM_TIMES = 9

Seconds = dict[str, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """What is measured. `batch` samples a step are shared by `num_workers` processes."""

    size: str
    num_workers: int
    batch: int
    steps: int
    as_in_job: bool
    """Whether parameters lie in shared memory that may only be read, and what could round
    differently between two processes is settled."""

    def job(self) -> JobConfig:
        parts = self.num_workers
        return load_job(
            JOB,
            [
                f"task_args.size={self.size}",
                f"batch.micro_batches={parts}",
                f"batch.micro_batch_size={self.batch // parts}",
            ],
        )


def measure(what: Bare, environment: Mapping[str, str]) -> tuple[Seconds, int]:
    """Seconds of each phase in each step, and the number of parameters.

    Args:
        environment: of the processes, which is there before they load torch.

    An error of a process is raised here.
    """
    root = Path(tempfile.mkdtemp(prefix="elastic-floor-", dir=ROOT))
    try:
        with _environment(environment):
            works = [(_work, number, what, root) for number in range(what.num_workers)]
            (slow, num_parameters), seconds, *_ = _run((_aggregate, what, root), *works)
    finally:
        shutil.rmtree(root)
    return {**seconds, **slow}, num_parameters


def bandwidth(num: int) -> float:
    """Bytes read and written a second by `num` processes at once, at best; nothing is left over.

    Adds one large tensor to another in place: two numbers are read for each that is written.
    """
    seconds, *_ = _run(*((_stream,) for _ in range(num)))
    fastest_s: float = min(seconds)
    return num * 3 * 4 * _STREAM_ELEMENTS / fastest_s


def _run(*works: tuple[Any, ...]) -> list[Any]:
    """Run functions, each with its arguments, in processes of their own, which meet each other."""
    context = mp.get_context("spawn")
    barrier = context.Barrier(len(works))
    with ProcessPoolExecutor(len(works), context, _know, (barrier,)) as pool:
        futures = [pool.submit(_tried, *work) for work in works]
    errors = [error for one in futures if (error := one.exception()) is not None]
    for error in sorted(errors, key=lambda one: isinstance(one, BrokenBarrierError)):
        raise error
    return [one.result() for one in futures]


_barrier: Barrier
"""Of a process of the measurement: processes inherit it, or not at all."""


def _know(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _tried(work: Callable[..., Any], *arguments: Any) -> Any:
    """An error lets nobody wait."""
    try:
        return work(*arguments)
    except BaseException:
        _barrier.abort()
        raise


def _meet() -> float:
    """The moment at which all processes are at the same place."""
    _barrier.wait(BARRIER_S)
    return time.monotonic()


@contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """Of the processes started in the block."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _load(what: Bare) -> tuple[JobConfig, Task]:
    torch.set_num_threads(1)
    if what.as_in_job:
        deterministic(1)
    job = what.job()
    return job, load_task(job.task, job.task_args)


def _open(root: Path, job: JobConfig) -> tuple[ModelSpec, Sizes, tuple[Version, Version]]:
    spec: ModelSpec = pickle.loads((root / "spec").read_bytes())
    sizes = make_sizes(spec, job)
    first, second = (
        Version(root, index, sizes, writable=False, optimizer=False) for index in range(2)
    )
    return spec, sizes, (first, second)


def _work(number: int, what: Bare, root: Path) -> Seconds:
    """What a worker does in each step."""
    job, task = _load(what)
    _meet()  # the files are there
    spec, sizes, versions = _open(root, job)
    slot, encoder = Slot(root, number, sizes, writable=True), Encoder(spec.layout)
    model, dataset = task.model(), task.dataset()
    stream = sample_stream(job, dataset)
    by_name = dict(model.named_parameters())
    parameters = [by_name[field.name] for field in spec.layout.parameters]
    views = [
        [one.values[field.start : field.stop].view(field.shape) for field in spec.layout.parameters]
        for one in versions
    ]
    scales = torch.full((len(spec.layout.chunks),), _EXPONENT).numpy()
    seconds: Seconds = {name: [] for name in PHASES[:3]}
    _meet()  # so are the slots
    for step in range(WARM_UP + what.steps):
        if what.as_in_job:
            for parameter, view in zip(parameters, views[step % 2], strict=True):
                parameter.data = view
        model.zero_grad(set_to_none=True)
        times_s = [_meet()]
        batch = job.batch
        indices = stream.micro_batch(step, number, batch.micro_batches, batch.micro_batch_size)
        loss, *_ = task.loss(model, dataset.fetch(indices))
        loss.backward()  # type: ignore[no-untyped-call]
        values = [parameter.grad for parameter in parameters]
        times_s.append(_meet())
        encoder.maxima(values)
        times_s.append(_meet())
        encoder.add(values, scales, base=None, out=slot.halves[0])
        times_s.append(_meet())
        _meet()  # all are added up
        if step >= WARM_UP:
            for name, begin_s, end_s in zip(seconds, times_s, times_s[1:], strict=False):
                seconds[name].append(end_s - begin_s)
    return seconds


class _Beats:
    """When each chunk was done: first all sums, then all updates."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, chunk: int) -> None:
        self.times_s.append(time.monotonic())


def _aggregate(what: Bare, root: Path) -> tuple[Seconds, int]:
    """What the aggregator does, while nobody computes."""
    job, task = _load(what)
    prepared = prepare(task, job, task.dataset())
    spec = prepared.spec
    sizes = make_sizes(spec, job)
    versions = (
        Version(root, 0, sizes, writable=True, optimizer=True),
        Version(root, 1, sizes, writable=True, optimizer=True),
    )
    for field in spec.layout.fields:
        view = versions[0].values[field.start : field.stop].view(field.shape)
        view.copy_(prepared.values[field.name])
    versions[0].kept.fill_(1)
    (root / "spec").write_bytes(pickle.dumps(spec))
    updater = Updater(
        spec,
        versions,
        num_micro_batches=what.num_workers,
        clip_norm=job.clip_norm,
        ema_decay=None,
        num_threads=len(os.sched_getaffinity(0)),
    )
    _meet()
    _meet()
    slots = [Slot(root, number, sizes, writable=True) for number in range(what.num_workers)]
    seconds: Seconds = {name: [] for name in PHASES[3:]}
    num_chunks = len(spec.layout.chunks)
    for step in range(WARM_UP + what.steps):
        plan = Plan(
            source=step % 2,
            slots=[(slot, 0) for slot in slots],
            exponents=[_EXPONENT] * num_chunks,
            weight=float(what.batch),
            factor=1e-3,
            fresh=step == 0,
        )
        for _ in range(4):
            _meet()
        beats = _Beats()
        begin_s = time.monotonic()
        updater.run(plan, beats)
        end_s = time.monotonic()
        _meet()
        if step >= WARM_UP:
            middle_s = max(beats.times_s[:num_chunks])
            seconds["sum"].append(middle_s - begin_s)
            seconds["update"].append(end_s - middle_s)
    updater.close()
    return seconds, sum(field.size for field in spec.layout.parameters)


def _stream() -> list[float]:
    torch.set_num_threads(1)
    numbers, others = torch.zeros(_STREAM_ELEMENTS), torch.ones(_STREAM_ELEMENTS)
    seconds = []
    for _ in range(_STREAM_TIMES):
        begin_s = _meet()
        numbers += others
        seconds.append(_meet() - begin_s)
    return seconds
