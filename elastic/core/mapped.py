"""The state of a job on one node: files in the folder of its store, mapped as tensors.

    control                 words, records, one row per micro-batch
    parameters-0, -1        two versions: parameters, float buffers, raw counters
    optimizer-0, -1         two versions: optimizer tensors and scalars
    constants               tensors that never change
    slot-N                  worker N's sums: progress word, two halves
    manifest-N              what counts in slot N; written by the aggregator only

One write of 8 bytes changes what counts: that of a `Record`'s selector. This module never decides
anything; the protocols do.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic.core.errors import StoreError
from elastic.core.layout import ALIGNMENT_BYTES, BUFFERS, Chunk, Layout, aligned
from elastic.core.store import ROOT

PAGE = 4096
EMA = "ema"  # the key of the averaged parameters beside the tensors of the optimizer
_ENLARGE = (
    "Lower workers.max, train fewer or smaller models, or enlarge it: mount -o remount,size=..."
    " /dev/shm"
)
_SLOT_HEADER = PAGE
_MEMBERSHIP_BYTES = 16 * PAGE  # 1024 workers
_RECORD_HEADER = struct.Struct("<II")  # length, crc32


class Record:
    """A small value that is either the old or the new one, never a mixture.

    Two cells and a selector. `write` fills the cell not selected, checksum included, then selects
    it by one aligned store of 8 bytes. One writer; any number of readers.
    """

    def __init__(self, memory: memoryview) -> None:
        self._selector = memory[:8].cast("Q")
        self._cell_bytes = (len(memory) - ALIGNMENT_BYTES) // 2
        self._memory = memory[ALIGNMENT_BYTES:]

    @staticmethod
    def size_for(payload_bytes: int) -> int:
        """Memory needed for payloads of at most that many bytes."""
        return ALIGNMENT_BYTES + 2 * aligned(payload_bytes + _RECORD_HEADER.size, ALIGNMENT_BYTES)

    def write(self, payload: bytes) -> None:
        if len(payload) + _RECORD_HEADER.size > self._cell_bytes:
            raise StoreError(f"record of {len(payload)} bytes exceeds {self._cell_bytes}")
        selector = self._selector[0] + 1
        start = (selector & 1) * self._cell_bytes
        body = start + _RECORD_HEADER.size
        self._memory[body : body + len(payload)] = payload
        _RECORD_HEADER.pack_into(self._memory, start, len(payload), zlib.crc32(payload))
        self._selector[0] = selector

    def read(self) -> bytes | None:
        """The value, or None before the first write. Reads again while the writer moves on."""
        while (selector := self._selector[0]) != 0:
            start = (selector & 1) * self._cell_bytes
            length, checksum = _RECORD_HEADER.unpack_from(self._memory, start)
            body = start + _RECORD_HEADER.size
            payload = bytes(self._memory[body : body + min(length, self._cell_bytes)])
            if zlib.crc32(payload) == checksum:
                return payload
            if selector == self._selector[0]:
                raise StoreError(f"record {selector} is damaged")
        return None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the files of a store must hold. Elements are of four bytes unless said.

    `optimizer_keys` name the tensors of the optimizer, and `EMA` where the parameters are averaged.
    `num_micro_batches` counts those of a step or of an evaluation, whichever has more.
    """

    layout: Layout
    num_micro_batches: int
    num_metrics: int = 0
    optimizer_keys: tuple[str, ...] = ()
    scalar_keys: tuple[str, ...] = ()
    constants_bytes: int = 0

    @property
    def parameters_bytes(self) -> int:
        return max(PAGE, 4 * self.layout.num_elements + self.layout.counters_bytes)

    @property
    def optimizer_bytes(self) -> int:
        tensors = 4 * self.layout.num_parameter_elements * len(self.optimizer_keys)
        num_chunks = len(self.layout.chunks)
        return max(PAGE, tensors + 8 * len(self.scalar_keys) * num_chunks + num_chunks)

    @property
    def half_bytes(self) -> int:
        return aligned(4 * self.layout.num_elements + self.layout.counters_bytes, PAGE)

    @property
    def slot_bytes(self) -> int:
        return _SLOT_HEADER + 2 * self.half_bytes

    @property
    def row_bytes(self) -> int:
        return aligned(96 + 8 * self.num_metrics + 4 * len(self.layout.chunks), ALIGNMENT_BYTES)

    @property
    def state_bytes(self) -> int:
        return Record.size_for(8192 + 32 * (self.num_metrics + len(self.layout.chunks)))

    @property
    def control_bytes(self) -> int:
        words = PAGE + aligned(8 * self.num_micro_batches, PAGE)
        return words + self.state_bytes + Record.size_for(_MEMBERSHIP_BYTES) + self.rows_bytes

    @property
    def rows_bytes(self) -> int:
        return self.num_micro_batches * self.row_bytes

    @property
    def manifest_bytes(self) -> int:
        return Record.size_for(128 + 8 * self.num_micro_batches)

    def lengths(self, chunk: Chunk) -> list[int]:
        """The bytes of a chunk's parameters, then of each tensor of its state; see `tensors_of`."""
        if chunk.group == BUFFERS:
            return [4 * chunk.size]
        return [4 * chunk.size] * (1 + len(self.optimizer_keys)) + [8] * len(self.scalar_keys)

    def start_byte(self, tensor: int, chunk: Chunk) -> int:
        """Where a chunk begins in one of the tensors of `tensors_of`."""
        return 4 * chunk.start if tensor <= len(self.optimizer_keys) else 8 * chunk.index

    def total_bytes(self, *, max_workers: int) -> int:
        """Shared memory that a job may come to use, one snapshot included."""
        snapshot = self.parameters_bytes + self.optimizer_bytes
        slots = max_workers * (self.slot_bytes + self.manifest_bytes)
        return self.fixed_bytes + snapshot + slots

    @property
    def fixed_bytes(self) -> int:
        """What of that is there from the beginning."""
        versions = 2 * (self.parameters_bytes + self.optimizer_bytes)
        return versions + self.constants_bytes + self.control_bytes


class MappedFile:
    """One file mapped into memory. The bytes outlive the process; the mapping does not.

    Raises:
        StoreError: there is no room for a new one; mapped all the same, it would end the first
            process that touches a missing page (SIGBUS).
    """

    def __init__(self, path: Path, size_bytes: int, *, writable: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            if writable and os.fstat(descriptor).st_size < size_bytes:
                _allocate(descriptor, path, size_bytes)
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._mmap = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, access)
        finally:
            os.close(descriptor)

    @property
    def memory(self) -> memoryview:
        return memoryview(self._mmap)

    def tensor(self, dtype: torch.dtype, start_byte: int, num: int) -> torch.Tensor:
        """A view; a write through a read-only one ends the process (SIGSEGV)."""
        if num == 0:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.frombuffer(self._mmap, dtype=dtype, count=num, offset=start_byte)


def _allocate(descriptor: int, path: Path, size_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StoreError(
            f"{path}: no room for {size_bytes / 2**20:.0f} MiB more of shared memory; something"
            f" else filled it since the job began. {_ENLARGE}"
        ) from error


class Version:
    """One of the two versions of the parameters, and of the optimizer state where it is mapped.

    `kept` is 1 for each chunk whose state is complete here: elsewhere nobody updates what it is.
    """

    def __init__(
        self, root: Path, index: int, sizes: Sizes, *, writable: bool, optimizer: bool
    ) -> None:
        layout = sizes.layout
        file = MappedFile(root / f"parameters-{index}", sizes.parameters_bytes, writable=writable)
        self.values = file.tensor(torch.float32, 0, layout.num_elements)
        self.counters = file.tensor(torch.uint8, 4 * layout.num_elements, layout.counters_bytes)
        self.states: dict[str, torch.Tensor] = {}
        self.scalars: dict[str, torch.Tensor] = {}
        if not optimizer:
            return
        state = MappedFile(root / f"optimizer-{index}", sizes.optimizer_bytes, writable=writable)
        num, num_chunks = layout.num_parameter_elements, len(layout.chunks)
        for position, key in enumerate(sizes.optimizer_keys):
            self.states[key] = state.tensor(torch.float32, 4 * num * position, num)
        base = 4 * num * len(sizes.optimizer_keys)
        for position, key in enumerate(sizes.scalar_keys):
            start = base + 8 * num_chunks * position
            self.scalars[key] = state.tensor(torch.float64, start, num_chunks)
        self.kept = state.tensor(
            torch.uint8, base + 8 * num_chunks * len(sizes.scalar_keys), num_chunks
        )

    @property
    def kept_chunks(self) -> frozenset[int]:
        return frozenset(self.kept.nonzero().flatten().tolist())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")


class Slot:
    """A worker's sums: two halves of int32, each with raw counters behind, and a progress word.

    `coded` is of int64 and lies where both halves do, with counters of its own: what is coded takes
    the memory of both. `progress`: see `elastic.core.protocol.advance`.
    """

    def __init__(self, root: Path, worker: int, sizes: Sizes, *, writable: bool) -> None:
        layout = sizes.layout
        self.path = root / f"slot-{worker}"
        self._file = MappedFile(self.path, sizes.slot_bytes, writable=writable)
        self.progress = self._file.memory[:8].cast("Q")
        num_bytes = 2 * sizes.half_bytes
        self.whole = self._file.tensor(torch.uint8, _SLOT_HEADER, num_bytes)
        self.coded = self._file.tensor(torch.int64, _SLOT_HEADER, layout.num_elements)
        behind = _SLOT_HEADER + 8 * layout.num_elements
        self.coded_counters = self._file.tensor(torch.uint8, behind, layout.counters_bytes)
        self.halves = tuple(
            self._file.tensor(
                torch.int32, _SLOT_HEADER + half * sizes.half_bytes, layout.num_elements
            )
            for half in range(2)
        )
        self.counters = tuple(
            self._file.tensor(
                torch.uint8,
                _SLOT_HEADER + half * sizes.half_bytes + 4 * layout.num_elements,
                layout.counters_bytes,
            )
            for half in range(2)
        )


class Control:
    """Words, records and rows. Written by the acting aggregator only, read by all.

    Words: `key` names the step and attempt that run now; `done[m]` the one in which micro-batch m
    was last granted. A worker polls both between layers to see whether its lease still matters.
    Where there are several nodes, `prepared` names the key whose next version is complete here, and
    `term` is the greatest term of a lead that this node has heard of. Where several models are
    trained in rounds, `round` is the one that runs: what was leased in another one is given up.
    """

    def __init__(self, root: Path, sizes: Sizes, *, writable: bool) -> None:
        self._sizes = sizes
        self._file = MappedFile(root / "control", sizes.control_bytes, writable=writable)
        memory = self._file.memory
        words = memory[:PAGE].cast("Q")
        self.key, self.heartbeat, self.active_pid = words[:1], words[1:2], words[2:3]
        self.prepared, self.term, self.round = words[3:4], words[4:5], words[5:6]
        at = PAGE
        self.done = memory[at : at + 8 * sizes.num_micro_batches].cast("Q")
        at += aligned(8 * sizes.num_micro_batches, PAGE)
        self.state = Record(memory[at : at + sizes.state_bytes])
        at += sizes.state_bytes
        self.membership = Record(memory[at : at + Record.size_for(_MEMBERSHIP_BYTES)])
        at += Record.size_for(_MEMBERSHIP_BYTES)
        self._rows = memory[at : at + sizes.rows_bytes]

    def write_row(self, micro_batch: int, row: bytes) -> None:
        start = micro_batch * self._sizes.row_bytes
        self._rows[start : start + len(row)] = row

    def read_row(self, micro_batch: int) -> bytes:
        start = micro_batch * self._sizes.row_bytes
        return bytes(self._rows[start : start + self._sizes.row_bytes])


def open_manifest(root: Path, worker: int, sizes: Sizes) -> Record:
    """What counts in the slot of a worker."""
    path = root / f"manifest-{worker}"
    return Record(MappedFile(path, sizes.manifest_bytes, writable=True).memory)


def check_space(need_bytes: int, *, root: Path = ROOT) -> None:
    """Refuse a job that shared memory cannot hold.

    Raises:
        StoreError: with the need, what is free, and the settings that change the need.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    free = shutil.disk_usage(root).free
    if need_bytes > free:
        raise StoreError(
            f"{root}: {need_bytes / 2**20:.0f} MiB of shared memory are needed and"
            f" {free / 2**20:.0f} MiB are free. {_ENLARGE}"
        )
