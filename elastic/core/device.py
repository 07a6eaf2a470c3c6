"""Where micro-batches are computed: one small interface between shared memory and the model.

`Host` computes on shared memory itself. `Accelerator` holds a copy of one version and of the sums
on a device: one copy of the parameters in, one copy of int32 sums out, which goes on while the next
micro-batch is computed. Both round alike: scaling by a power of two is exact, halves go to even.

Legend: N elements of the flat space, C chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from elastic.core.errors import ConfigError
from elastic.core.fixed_point import Encoder, Exponents, Maxima, add_coded
from elastic.core.layout import Layout
from elastic.core.mapped import Slot

log = logging.getLogger(__name__)

_READ_ONLY = 0x08  # cudaHostRegisterReadOnly: a worker may only read the parameters
Values = Sequence[torch.Tensor | None]
"""Contiguous float32 gradient or buffer of each field of the layout; None counts as zeros."""


class Device(Protocol):
    """What a worker computes on. For one thread."""

    kind: torch.device

    def bring(self, values_N: torch.Tensor, key: object) -> torch.Tensor:
        """What `values_N` of shared memory holds while `key` does not change, on the device."""
        ...

    def send(self, data: Any) -> Any:
        """A micro-batch with its tensors on the device."""
        ...

    def maxima(self, values: Values) -> Maxima:
        """max|value| of each chunk, float32 of shape (C,). NaN if any value of the chunk is NaN."""
        ...

    def add(
        self,
        values: Values,
        exponents_C: Exponents,
        slot: Slot,
        *,
        half: int,
        base: int | None,
        coefficient: int | None = None,
    ) -> None:
        """Write `base` half + round(value * 2**k) into `half`; it need not have `arrived` yet.

        With a coefficient what is coded in the slot grows by that many times the same, or begins
        with it if there is no `base`.
        """
        ...

    def arrived(self) -> bool:
        """Whether the last sum is in the slot, so that it may be asked for."""
        ...

    def wait(self) -> None:
        """Return once it is."""
        ...


class Host:
    """The processor, on shared memory itself: nothing is copied."""

    kind = torch.device("cpu")

    def __init__(self, layout: Layout) -> None:
        self._encoder = Encoder(layout)
        self._is_coded = False

    def bring(self, values_N: torch.Tensor, key: object) -> torch.Tensor:
        return values_N

    def send(self, data: Any) -> Any:
        return data

    def maxima(self, values: Values) -> Maxima:
        return self._encoder.maxima(values)

    def add(
        self,
        values: Values,
        exponents_C: Exponents,
        slot: Slot,
        *,
        half: int,
        base: int | None,
        coefficient: int | None = None,
    ) -> None:
        if base is None and (coefficient is not None) != self._is_coded:
            slot.whole.zero_()  # other numbers will be padding
            self._is_coded = coefficient is not None
        if coefficient is None:
            live = None if base is None else slot.halves[base]
            self._encoder.add(values, exponents_C, base=live, out=slot.halves[half])
            return
        is_first = base is None
        self._encoder.add_coded(values, exponents_C, coefficient, is_first=is_first, out=slot.coded)

    def arrived(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing is ever on its way."""


class Accelerator:
    """A device with memory of its own. Several workers may share one.

    It keeps a copy of both halves of the slot, so that sums grow on the device: nobody else ever
    writes to the slot of a worker.
    """

    def __init__(self, layout: Layout, kind: torch.device) -> None:
        num = layout.num_elements
        self.kind = kind
        self._chunks = [slice(chunk.start, chunk.stop) for chunk in layout.chunks]
        self._values_N = torch.zeros(num, device=kind)
        self._key: object = None
        self._gradient_N = torch.zeros(num, device=kind)  # padding stays zero
        self._fields = [self._gradient_N[one.start : one.stop] for one in layout.fields]
        self._coded_N = torch.zeros(num, dtype=torch.int64, device=kind)
        self._is_coded = False
        self._halves = self._coded_N.view(torch.int32).view(2, num).unbind()
        self._stream = (
            torch.cuda.Stream(kind) if kind.type == "cuda" else None  # type: ignore[no-untyped-call]
        )
        self._copied: torch.cuda.Event | None = None
        self._pinned: set[int] = set()

    def bring(self, values_N: torch.Tensor, key: object) -> torch.Tensor:
        if key != self._key:
            self._pin(values_N, _READ_ONLY)
            self._values_N[: len(values_N)].copy_(values_N, non_blocking=True)
            self._key = key
        return self._values_N[: len(values_N)]

    def send(self, data: Any) -> Any:
        return to_device(data, self.kind)

    def maxima(self, values: Values) -> Maxima:
        self._gather(values)
        extrema = [torch.stack(torch.aminmax(self._gradient_N[chunk])) for chunk in self._chunks]
        low_C, high_C = torch.stack(extrema).cpu().numpy().T
        maxima: Maxima = np.maximum(high_C, -low_C)
        return maxima

    def add(
        self,
        values: Values,
        exponents_C: Exponents,
        slot: Slot,
        *,
        half: int,
        base: int | None,
        coefficient: int | None = None,
    ) -> None:
        self._gather(values)
        if base is None and (coefficient is not None or self._is_coded):
            self._coded_N.zero_()  # that is both halves
            self._is_coded = coefficient is not None
        if coefficient is not None:
            self._add_coded(exponents_C, coefficient)
            self._copy_out(self._coded_N, slot.coded, slot)
            return
        total_N = self._halves[half]
        for chunk, scale in zip(self._chunks, np.ldexp(1.0, exponents_C).tolist(), strict=True):
            total_N[chunk] = torch.mul(self._gradient_N[chunk], scale).round_()
        if base is not None:
            total_N += self._halves[base]
        self._copy_out(total_N, slot.halves[half], slot)

    def _add_coded(self, exponents_C: Exponents, coefficient: int) -> None:
        for chunk, scale in zip(self._chunks, np.ldexp(1.0, exponents_C).tolist(), strict=True):
            rounded = torch.mul(self._gradient_N[chunk], scale).round_()
            add_coded(rounded.to(torch.int64), coefficient, out=self._coded_N[chunk])

    def arrived(self) -> bool:
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def _gather(self, values: Values) -> None:
        """Bring all fields together, in a few kernels for all of them."""
        given = [(field, value) for field, value in zip(self._fields, values, strict=True)]
        present = [(field, value.reshape(-1)) for field, value in given if value is not None]
        if present:
            fields, parts = zip(*present, strict=True)
            torch._foreach_copy_(list(fields), list(parts))
        for field, value in given:
            if value is None:
                field.zero_()

    def _copy_out(self, total_N: torch.Tensor, target_N: torch.Tensor, slot: Slot) -> None:
        """Behind everything computed so far, beside everything computed from now on."""
        if self._stream is None:
            target_N.copy_(total_N)
            return
        self._pin(slot.whole, 0)
        self._stream.wait_stream(torch.cuda.current_stream(self.kind))
        with torch.cuda.stream(self._stream):
            target_N.copy_(total_N, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)

    def _pin(self, memory: torch.Tensor, flags: int) -> None:
        """Let the device reach shared memory directly, once; without, copies are slower."""
        if self.kind.type != "cuda" or memory.data_ptr() in self._pinned:
            return
        self._pinned.add(memory.data_ptr())
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, flags))
        if code != 0:
            log.warning("shared memory cannot be pinned (CUDA error %d): copies are slower", code)


def to_device(data: Any, kind: torch.device) -> Any:
    """`data` with its tensors on `kind`: a tensor, or mappings, tuples and lists of them."""
    if isinstance(data, torch.Tensor):
        return data.to(kind, non_blocking=True)
    if isinstance(data, Mapping):
        return {name: to_device(value, kind) for name, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(value, kind) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(value, kind) for value in data)
    return data


def make_device(name: str, layout: Layout, worker: int) -> Device:
    """The device of a worker; several share the accelerators of a machine in turn.

    Raises:
        ConfigError: there is none.
    """
    if name == "cpu":
        return Host(layout)
    check_device(name)
    return Accelerator(layout, torch.device("cuda", worker % torch.cuda.device_count()))


def check_device(name: str) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        ConfigError: with what torch sees.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is cuda, and torch {torch.__version__} sees no CUDA device on this machine:"
            " install a CUDA build of torch and a driver, or set device: cpu"
        )
