"""The computing half of a worker: one micro-batch at a time, on parameters it may only read.

Every result is a function of (job, step, micro-batch) alone. Never decides what to compute.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import proxy

import numpy as np
import numpy.typing as npt
import torch

from elastic.core.config import JobConfig
from elastic.core.data.map_style import as_dataset
from elastic.core.data.order import Int64Array, digest
from elastic.core.data.read_ahead import ReadAhead
from elastic.core.device import Device
from elastic.core.errors import TaskError
from elastic.core.fixed_point import Exponents
from elastic.core.mapped import EMA, Control, MappedFile, Sizes, Slot, Version
from elastic.core.meter import Meter
from elastic.core.model import (
    ModelSpec,
    Sums,
    evaluate,
    evaluation_samples,
    forward,
    polled,
    raw_bytes,
    sample_stream,
    seed_generators,
)
from elastic.core.permutation import derive_key
from elastic.core.protocol.messages import (
    NO_DIGEST,
    Combine,
    Key,
    Lease,
    Membership,
    Outcome,
    State,
)
from elastic.core.store import Store
from elastic.core.task import Dataset, Task
from elastic.core.update import Snapshot
from policies.auditing import Audits

_BLOCK = 1 << 18  # elements: fits the cache


class AbandonedError(BaseException):
    """What is being computed is not wanted any more. Not an Exception: models must not catch it."""


def make_sizes(spec: ModelSpec, job: JobConfig) -> Sizes:
    """What the files of a job's store hold."""
    return Sizes(
        layout=spec.layout,
        num_micro_batches=max(
            job.batch.micro_batches, job.evaluate.micro_batches if job.evaluate.every else 0
        ),
        num_metrics=max(len(spec.metrics), len(spec.evaluated_metrics)),
        optimizer_keys=(*spec.optimizer.tensor_keys, *((EMA,) if job.ema else ())),
        scalar_keys=spec.optimizer.scalar_keys,
        constants_bytes=spec.constants_bytes,
    )


def audits_of(job: JobConfig) -> Audits | None:
    """The rule of `audit`; None: nothing is audited, or nobody ever could."""
    probability = 1.0 if job.audit == "all" else job.audit
    if not probability or job.workers.max < 2:
        return None
    return Audits(seed=job.seed, probability=probability)


def deterministic(threads: int) -> None:
    """Settle what could make two processes round differently."""
    torch.set_num_threads(threads)
    # use_deterministic_algorithms(True) imports the compiler besides: 70 MiB and a second
    torch.set_deterministic_debug_mode("error")
    # filling every empty tensor would make allocation 200 times slower
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class MicroBatches:
    """Computes micro-batches of one job in one process.

    `meter` tells how far it is; `between`, if set, is called between layers.
    """

    def __init__(
        self,
        job: JobConfig,
        task: Task,
        spec: ModelSpec,
        store: Store,
        device: Device,
        dataset: Dataset | None = None,
    ) -> None:
        self.sizes = make_sizes(spec, job)
        self.device = device
        self._job = job
        self._task = task
        self._spec = spec
        self._dataset = as_dataset(task.dataset()) if dataset is None else dataset
        self._stream = sample_stream(job, self._dataset)
        self._ahead = ReadAhead(self._prefetch) if hasattr(self._dataset, "prefetch") else None
        if job.evaluate.every:
            self._evaluated = evaluation_samples(task, job, self._dataset)
        self._control = Control(store.path, self.sizes, writable=False)
        self._versions = tuple(
            Version(store.path, index, self.sizes, writable=False, optimizer=bool(job.ema))
            for index in range(2)
        )
        self._views: dict[int, list[torch.Tensor]] = {}
        self._model = spec.build(self._first_tensors(store))
        self._parameters = dict(self._model.named_parameters())
        self._trained = [self._parameters[field.name] for field in spec.layout.parameters]
        self._constant_buffers = {
            constant.name: self._tensor(constant.name)
            for constant in spec.constants
            if constant.name not in self._parameters
        }
        this = proxy(self)  # the garbage collector does not see into hooks of gradients
        polled(self._model, lambda: this._poll())
        self.meter = Meter()
        self.between: Callable[[], None] | None = None
        self._wanted: tuple[int, int | None, int] | None = None
        self._audits = audits_of(job)
        self._audited: tuple[int, npt.NDArray[np.bool_]] = (-1, np.empty(0, np.bool_))

    def _parameter_views(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The parameters in a flat space; made once for each, since that takes longer than use."""
        views = self._views.get(values.data_ptr())
        if views is None:
            fields = self._spec.layout.parameters
            views = [values[field.start : field.stop].view(field.shape) for field in fields]
            self._views[values.data_ptr()] = views
        return views

    def _first_tensors(self, store: Store) -> dict[str, torch.Tensor]:
        layout, kind = self._spec.layout, self.device.kind
        views = self._parameter_views(self.device.bring(self._versions[0].values, "the first"))
        tensors = {field.name: view for field, view in zip(layout.parameters, views, strict=True)}
        for field in layout.buffers:
            tensors[field.name] = torch.zeros(field.shape, device=kind)
        for counter in layout.counters:
            dtype = getattr(torch, counter.dtype)
            tensors[counter.name] = torch.zeros(counter.shape, dtype=dtype, device=kind)
        if self._spec.constants:
            size = self._spec.constants_bytes
            file = MappedFile(store.path / "constants", size, writable=False)
            for one in self._spec.constants:
                num = one.size_bytes // one.dtype.itemsize
                view = file.tensor(one.dtype, one.start_byte, num).view(one.shape)
                # a buffer is copied: a forward that writes to it later is then told so by name
                tensors[one.name] = view.to(kind) if one.is_parameter else view.to(kind, copy=True)
        return tensors

    def _tensor(self, name: str) -> torch.Tensor:
        """A buffer as it is now: forward may have put another tensor in its place."""
        return self._model.get_buffer(name)

    def key_word(self) -> int:
        """The word of the step and attempt that run now."""
        return self._control.key[0]

    def round_word(self) -> int:
        """The round of the job that runs now."""
        return self._control.round[0]

    def runs(self, lease: Lease) -> bool:
        """Whether anything of the pass that a lease belongs to is still to be done."""
        word, batch, evaluate = lease.key.word, self._job.batch, self._job.evaluate
        is_evaluation = lease.combine is Combine.EVALUATE
        num = evaluate.micro_batches if is_evaluation else batch.micro_batches
        if lease.round not in (0, self.round_word()):
            return False
        return self.key_word() == word and any(one != word for one in self._control.done[:num])

    def _poll(self) -> None:
        self.meter.move()
        if self.between is not None:
            self.between()
        if self._wanted is None:
            return
        word, micro_batch, number = self._wanted
        if self._control.key[0] != word or number not in (0, self._control.round[0]):
            raise AbandonedError
        if micro_batch is not None and self._control.done[micro_batch] == word:
            raise AbandonedError

    def warm_up(self) -> None:
        """Compute a micro-batch for nothing: the first one of a process takes many times as long.

        The version may be written meanwhile; nobody looks at what comes out.
        """
        state = self._control.state.read()
        data = self._dataset.fetch(self._indices(0, 0))
        version = State.from_bytes(state).step % 2 if state else 0
        self._differentiate(data, version, "warm-up")
        self.device.maxima(self._values())
        if self._job.evaluate.every:
            self._evaluate(version, "warm-up", 0, time.monotonic())

    def read_ahead(self, leases: Sequence[Lease]) -> None:
        """Read for leases that have come, but for the first, which is computed now; and for the
        same micro-batches one step on, which will probably come again. Returns at once."""
        leases = [lease for lease in leases if lease.combine is not Combine.EVALUATE]
        if self._ahead is None or not leases:
            return
        now = [(lease.key.step, one) for lease in leases for one in lease.micro_batches]
        self._ahead.ask([*now[1:], *((step + 1, one) for step, one in now)])

    def _prefetch(self, step: int, micro_batch: int) -> bool | None:
        indices = self._indices(step, micro_batch)
        has_room: bool | None = self._dataset.prefetch(indices)  # type: ignore[attr-defined]
        return has_room

    def compute(self, lease: Lease) -> Outcome:
        """Forward and backward; the gradients stay in the parameters until `encode`.

        Raises:
            AbandonedError: the step moved on, or another worker was first.
        """
        with self.meter.micro_batch(lease.combine is Combine.EVALUATE):
            return self._compute(lease)

    def _compute(self, lease: Lease) -> Outcome:
        (micro_batch,) = lease.micro_batches
        start_s = time.monotonic()
        step = lease.key.step
        self._wanted = (lease.key.word, None if lease.audits else micro_batch, lease.round)
        self._poll()
        if lease.combine is Combine.EVALUATE:
            return self._evaluate(step % 2, step, micro_batch, start_s)
        indices = self._indices(step, micro_batch)
        seed_generators(derive_key("micro-batch", self._job.seed, step, micro_batch))
        data = self._dataset.fetch(indices)  # it may augment: the seed is this micro-batch's own
        if self._ahead is not None:
            self._ahead.has_read(step, micro_batch)
        sums = self._differentiate(data, step % 2, step)
        self._poll()
        self._check_constants()
        return Outcome(
            micro_batch=micro_batch,
            loss_sum=float(sums.loss.detach()),
            weight=sums.weight,
            samples=digest(indices),
            counters=self._counters_digest(),
            maxima_C=self.device.maxima(self._values()),
            metrics=sums.in_order(self._spec.metrics),
            start_s=start_s,
            end_s=time.monotonic(),
        )

    def _evaluate(self, version: int, key: object, micro_batch: int, start_s: float) -> Outcome:
        """Forward only. Every evaluation draws the same samples and random numbers."""
        dataset, samples = self._evaluated
        indices = samples[micro_batch]
        seed_generators(derive_key("evaluation", self._job.seed, micro_batch))
        data = self.device.send(dataset.fetch(indices))
        self._load(version, key, averaged=self._job.ema is not None)
        sums = evaluate(self._task, self._model, data, self._job.precision)
        self._poll()
        return Outcome(
            micro_batch=micro_batch,
            loss_sum=float(sums.loss),
            weight=sums.weight,
            samples=digest(indices),
            counters=bytes(8),
            maxima_C=np.empty(0, np.float32),
            metrics=sums.in_order(self._spec.evaluated_metrics),
            start_s=start_s,
            end_s=time.monotonic(),
        )

    def _indices(self, step: int, micro_batch: int) -> Int64Array:
        """The samples of a micro-batch."""
        batch = self._job.batch
        return self._stream.micro_batch(
            step, micro_batch, batch.micro_batches, batch.micro_batch_size
        )

    def _differentiate(self, data: Any, version: int, key: object) -> Sums:
        """Forward and backward on one version; `key` names what it holds now."""
        self._load(version, key)
        sums = forward(self._task, self._model, self.device.send(data), self._job.precision)
        sums.loss.backward()  # type: ignore[no-untyped-call]
        return sums

    def encode(self, lease: Lease, slot: Slot, *, half: int, base: int | None) -> bytes:
        """Add what `compute` left in the gradients to `base`, into `half` of the slot.

        What is coded is added to what is coded there, unless `base` is None.

        Returns the digest of what was added, as it lies there, if the micro-batch is audited.
        """
        exponents = self._exponents(lease.key)
        is_coded = lease.combine is Combine.CODED
        coefficient = lease.coefficient if is_coded else None
        values = self._values()
        self.device.add(values, exponents, slot, half=half, base=base, coefficient=coefficient)
        counters = slot.coded_counters if is_coded else slot.counters[half]
        for counter in self._spec.layout.counters:
            (data,) = raw_bytes([self._tensor(counter.name)])
            stop = counter.start_byte + counter.size_bytes
            counters[counter.start_byte : stop] = torch.frombuffer(
                bytearray(data), dtype=torch.uint8
            )
        if is_coded or not self._is_audited(lease):
            return NO_DIGEST
        self.device.wait()
        return digest_of(slot.halves[half], None if base is None else slot.halves[base])

    def _is_audited(self, lease: Lease) -> bool:
        if self._audits is None:
            return False
        step, num = lease.key.step, self._job.batch.micro_batches
        if self._audited[0] != step:
            self._audited = step, self._audits.audited(step, num)
        return bool(self._audited[1][lease.micro_batches[0]])

    def forget(self) -> None:
        """Give the memory of the gradients back: another model is computed next."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def flipped(self, outcome: Outcome) -> Outcome:
        """The outcome after failing hardware flipped a bit of the gradient. For fault schedules."""
        gradient = next(one.grad for one in self._trained if one.grad is not None)
        bits_N = gradient.view(-1).view(torch.int32)
        bits_N[gradient.abs().argmax()] ^= 1 << 22  # the greatest bit of its fraction
        return replace(outcome, maxima_C=self.device.maxima(self._values()))

    def poisoned(self, outcome: Outcome) -> Outcome:
        """The outcome after failing hardware made the gradient NaN. For fault schedules."""
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
        return replace(outcome, maxima_C=self.device.maxima(self._values()))

    def members(self) -> tuple[int, ...]:
        """Who is a member now."""
        data = self._control.membership.read()
        return Membership.from_bytes(data).members if data else ()

    def _exponents(self, key: Key) -> Exponents:
        data = self._control.state.read()
        state = State.from_bytes(data) if data else None
        if state is None or state.key != key or state.exponents is None:
            raise AbandonedError
        return np.array(state.exponents, np.int64)

    def _load(self, version: int, key: object, *, averaged: bool = False) -> None:
        """Point the parameters at a version, copy the buffers in, forget old gradients."""
        source = self._versions[version]
        wanted = source.states[EMA] if averaged else source.values
        values = self.device.bring(wanted, (key, averaged))
        for parameter, view in zip(self._trained, self._parameter_views(values), strict=True):
            parameter.data = view
        self.forget()
        buffers = source.values if averaged else values
        with torch.no_grad():
            for field in self._spec.layout.buffers:
                self._tensor(field.name).copy_(buffers[field.start : field.stop].view(field.shape))
            for counter in self._spec.layout.counters:
                stop = counter.start_byte + counter.size_bytes
                data = source.counters[counter.start_byte : stop].clone()
                buffer = self._tensor(counter.name)
                buffer.copy_(data.view(buffer.dtype).view(counter.shape))

    def _values(self) -> list[torch.Tensor | None]:
        gradients = [parameter.grad for parameter in self._trained]
        buffers = [self._tensor(field.name) for field in self._spec.layout.buffers]
        return [None if one is None else one.contiguous() for one in (*gradients, *buffers)]

    def _counters_digest(self) -> bytes:
        counters = self._spec.layout.counters
        data = raw_bytes([self._tensor(counter.name) for counter in counters])
        return hashlib.blake2b(b"".join(data), digest_size=8).digest()

    def _check_constants(self) -> None:
        """A buffer that the first try left alone must stay alone: nobody would share its change."""
        for name, tensor in self._constant_buffers.items():
            now = self._tensor(name)
            if now is not tensor or now._version:
                raise TaskError(
                    f"forward changed the buffer {name}, which it left alone in the first try:"
                    " change it in every forward, or never"
                )


def digest_of(half_N: torch.Tensor, base_N: torch.Tensor | None) -> bytes:
    """Of what was added to `base_N`, shape (N,), to get `half_N`. 16 bytes."""
    total, hashed = half_N.numpy(), hashlib.blake2b(digest_size=len(NO_DIGEST))
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        if base_N is not None:
            part = part - base_N.numpy()[start : start + _BLOCK]
        hashed.update(part.data)
    return hashed.digest()


def model_tensors(
    spec: ModelSpec,
    version: Version | Snapshot,
    constants: MappedFile | None,
    *,
    averaged: bool = False,
) -> dict[str, torch.Tensor]:
    """Every tensor of the model's state_dict, by its key, as views of a version.

    With `averaged`, parameters are averages over the steps; buffers are those of the version.
    """
    named: dict[str, torch.Tensor] = {}
    for field in spec.layout.fields:
        named[field.name] = version.values[field.start : field.stop].view(field.shape)
    for field in spec.layout.parameters if averaged else ():
        named[field.name] = version.states[EMA][field.start : field.stop].view(field.shape)
    for counter in spec.layout.counters:
        stop = counter.start_byte + counter.size_bytes
        data = version.counters[counter.start_byte : stop]
        named[counter.name] = data.view(getattr(torch, counter.dtype)).view(counter.shape)
    for one in spec.constants:
        assert constants is not None
        num = one.size_bytes // one.dtype.itemsize
        named[one.name] = constants.tensor(one.dtype, one.start_byte, num).view(one.shape)
    return {key: named[name] for key, name in spec.state_dict.items()}
