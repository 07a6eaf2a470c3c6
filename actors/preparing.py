"""The store of a node, made once: of each model from the task, or from a checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from actors.rounds import MAX_COUNTERS_BYTES
from actors.setup import JobSetup, datasets_of
from elastic.core import checkpoint, journal
from elastic.core.compute import make_sizes
from elastic.core.errors import CheckpointError, ConfigError
from elastic.core.fingerprint import differences, fingerprint
from elastic.core.mapped import EMA, Control, MappedFile, Sizes, Version, check_space
from elastic.core.memory import check_memory
from elastic.core.model import ModelSpec, Prepared, prepare, raw_bytes
from elastic.core.protocol.messages import State
from elastic.core.retained import check_metric
from elastic.core.store import Store
from elastic.core.task import Dataset, Task
from elastic.core.weights import initialize

MAX_CHUNKS = 16_384


def prepare_store(
    setup: JobSetup, tasks: Sequence[Task], events: Sequence[Callable[[str, str], None]]
) -> None:
    """Make the store. The spec, written last, seals it.

    Args:
        events: tell the run folder of each model.

    Raises:
        ConfigError, StoreError, CheckpointError: the job cannot be begun like this.
    """
    slots_bytes, left = 0, len(setup.lanes)
    datasets = datasets_of(tasks)
    for lane, task, dataset, event in zip(setup.lanes, tasks, datasets, events, strict=True):
        slots_bytes += _prepare(lane, task, dataset, event, slots_bytes, left)
        left -= 1
    if setup.models:
        setup.open_store().spec_path.touch()


def _prepare(
    setup: JobSetup,
    task: Task,
    dataset: Dataset,
    event: Callable[[str, str], None],
    slots_bytes: int,
    left: int,
) -> int:
    """Make the part of one model. Returns what its slots and a snapshot will take.

    Args:
        slots_bytes: what those of the models before will take.
        left: models that are still to be made, and probably have the size of this one.
    """
    store = setup.open_store()
    store.path.mkdir(exist_ok=True)
    job = setup.job
    prepared = prepare(task, job, dataset)
    spec = prepared.spec
    if setup.has_nodes:
        _check_counters(spec)
        _check_chunks(job.chunk_elements, len(spec.layout.chunks))
    evaluated = spec.evaluated_metrics if job.evaluate.every else None
    check_metric(job.checkpoint, spec.metrics, evaluated)
    if setup.initial is not None and setup.resume_from is None:
        targets = {key: prepared.values[name] for key, name in spec.state_dict.items()}
        initialize(targets, setup.initial, job.init_skip)
    sizes = make_sizes(spec, job)
    check_memory(spec.layout, job.workers.start)
    slots = job.workers.max + job.workers.spare
    need_bytes = sizes.total_bytes(max_workers=slots)
    check_space(left * need_bytes + slots_bytes + journal.SIZE_BYTES)
    versions = tuple(
        Version(store.path, index, sizes, writable=True, optimizer=True) for index in range(2)
    )
    for version in versions:
        _fill(version, prepared, averages=job.ema is not None)
    _write_constants(store, prepared, sizes)
    state = State(step=0, attempt=0, exponents=None, model=setup.model or 0)
    if setup.resume_from is not None:
        state = _restore(setup, setup.resume_from, versions, event)
    Control(store.path, sizes, writable=True).state.write(state.to_bytes())
    partial = store.path / "spec.partial"
    partial.write_bytes(pickle.dumps(spec))
    partial.rename(store.spec_path)
    return need_bytes - sizes.fixed_bytes


def _check_counters(spec: ModelSpec) -> None:
    size_bytes = spec.layout.counters_bytes
    if size_bytes > MAX_COUNTERS_BYTES:
        raise ConfigError(
            f"the model has {size_bytes} bytes of integer buffers; on several hosts (nodes.max > 1)"
            f" at most {MAX_COUNTERS_BYTES} are possible"
        )


def _check_chunks(elements: int, num: int) -> None:
    """Who keeps what is decided within a fraction of a second, or a lead would seem to hang."""
    if num > MAX_CHUNKS:
        raise ConfigError(
            f"chunk_elements: {elements} makes {num} chunks; on several hosts (nodes.max > 1) at"
            f" most {MAX_CHUNKS} are possible; use {elements * -(-num // MAX_CHUNKS)} or more"
        )


def _fill(version: Version, prepared: Prepared, *, averages: bool) -> None:
    """Give a version the values of the task."""
    layout = prepared.spec.layout
    for field in layout.fields:
        view = version.values[field.start : field.stop].view(field.shape)
        view.copy_(prepared.values[field.name])
    version.kept.fill_(1)
    if averages:
        average = version.states[EMA]
        average.copy_(version.values[: len(average)])
    for counter in layout.counters:
        (data,) = raw_bytes([prepared.values[counter.name]])
        stop = counter.start_byte + counter.size_bytes
        version.counters[counter.start_byte : stop] = torch.frombuffer(
            bytearray(data), dtype=torch.uint8
        )


def _write_constants(store: Store, prepared: Prepared, sizes: Sizes) -> None:
    if not prepared.spec.constants:
        return
    file = MappedFile(store.path / "constants", sizes.constants_bytes, writable=True)
    for one in prepared.spec.constants:
        num = one.size_bytes // one.dtype.itemsize
        view = file.tensor(one.dtype, one.start_byte, num).view(one.shape)
        view.copy_(prepared.values[one.name])


def _restore(
    setup: JobSetup,
    path: str,
    versions: tuple[Version, ...],
    event: Callable[[str, str], None],
) -> State:
    """Fill the version of the checkpoint's step; return the state it was written in."""
    found = checkpoint.read_checkpoint(path)
    state = State.from_bytes(found.meta["state"].encode())
    state = replace(state, model=setup.model or 0)
    version = versions[state.step % 2]
    targets = {"values": version.values, "counters": version.counters}
    targets |= {f"state.{key}": tensor for key, tensor in version.states.items()}
    targets |= {f"scalar.{key}": tensor for key, tensor in version.scalars.items()}
    for name, target in targets.items():
        if name not in found.state or found.state[name].shape != target.shape:
            raise CheckpointError(
                f"{found.path}: {name} does not fit this job's model and optimizer; resume"
                " with the job file of the run, or start a new run"
            )
        target.copy_(found.state[name])
    here = fingerprint(setup.job.workers.threads, setup.job.device)
    changed = differences(found.meta["fingerprint"], here)
    if changed:
        event("fingerprint", "; ".join(changed))
        state = replace(state, exact=False)
    return state
