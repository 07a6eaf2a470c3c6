"""Where every tensor lives in the flat spaces: parameters, buffers, slots, optimizer state.

Pure arithmetic on names and shapes; it never touches a tensor's values. Element offsets count
float32 in the parameter space and int32 in a slot: the two spaces have the same offsets.

Parameters of one optimizer group are contiguous, each aligned to 64 bytes, because kernels may
round differently with the alignment of their operands. Chunks cut a group at fixed places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 64
ALIGNMENT = ALIGNMENT_BYTES // 4  # elements of four bytes
COMPILED = "_orig_mod."  # how torch.compile begins the name of every tensor of a model
BUFFERS = -1  # the "group" of chunks that hold float buffers


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor in a flat space. `start` and `size` count elements."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Counter:
    """A buffer that is not float32 and that forward changes: kept as raw bytes, must agree."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start_byte: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A fixed range of the flat space: the unit of update, exponent and checksum."""

    index: int
    group: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one tensor that lies in one block of one chunk."""

    field: int
    field_start: int
    start: int
    size: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The flat space: trained parameters first, then the float buffers that forward changes."""

    parameters: tuple[Field, ...]
    buffers: tuple[Field, ...]
    counters: tuple[Counter, ...]
    chunks: tuple[Chunk, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.parameters + self.buffers

    @property
    def num_elements(self) -> int:
        """Elements of the whole space, padding included."""
        return self.chunks[-1].stop if self.chunks else 0

    @property
    def num_parameter_elements(self) -> int:
        """Elements of the parameter part, padding included: the length of an optimizer tensor."""
        trained = [chunk.stop for chunk in self.chunks if chunk.group != BUFFERS]
        return trained[-1] if trained else 0

    @property
    def counters_bytes(self) -> int:
        last = self.counters[-1] if self.counters else None
        return aligned(last.start_byte + last.size_bytes, ALIGNMENT_BYTES) if last else 0

    def pieces(self, block: int) -> Iterator[Piece]:
        """Cut every tensor at chunk borders and into at most `block` elements, in order."""
        chunks = iter(self.chunks)
        chunk = next(chunks, None)
        for index, field in enumerate(self.fields):
            at = field.start
            while at < field.stop:
                while chunk is not None and chunk.stop <= at:
                    chunk = next(chunks, None)
                assert chunk is not None, f"{field.name} lies outside every chunk"
                size = min(block, field.stop - at, chunk.stop - at)
                yield Piece(index, at - field.start, at, size, chunk.index)
                at += size


def aligned(value: int, to: int) -> int:
    """`value` rounded up to a multiple of `to`."""
    return -(-value // to) * to


def make_layout(
    groups: Sequence[Sequence[tuple[str, tuple[int, ...]]]],
    *,
    buffers: Sequence[tuple[str, tuple[int, ...]]] = (),
    counters: Sequence[tuple[str, tuple[int, ...], str, int]] = (),
    chunk_elements: int,
) -> Layout:
    """Lay out parameter `groups` of (name, shape), then `buffers`, then raw `counters`.

    Args:
        counters: (name, shape, dtype name, bytes) of each buffer that is kept as raw bytes.
        chunk_elements: the largest chunk, a multiple of 16.
    """
    at = 0
    fields: list[Field] = []
    chunks: list[Chunk] = []

    def place(name: str, shape: tuple[int, ...], into: list[Field]) -> None:
        nonlocal at
        into.append(Field(name, shape, at))
        at = aligned(into[-1].stop, ALIGNMENT)

    def cut(group: int, start: int) -> None:
        for begin in range(start, at, chunk_elements):
            size = min(chunk_elements, at - begin)
            chunks.append(Chunk(len(chunks), group, begin, size))

    for index, group in enumerate(groups):
        start = at
        for name, shape in group:
            place(name, shape, fields)
        cut(index, start)
    buffer_fields: list[Field] = []
    for name, shape in buffers:  # a chunk each: their magnitudes have nothing in common
        start = at
        place(name, shape, buffer_fields)
        cut(BUFFERS, start)
    raw: list[Counter] = []
    at_byte = 0
    for name, shape, dtype, size_bytes in counters:
        raw.append(Counter(name, shape, dtype, at_byte, size_bytes))
        at_byte = aligned(at_byte + size_bytes, ALIGNMENT_BYTES)
    return Layout(tuple(fields), tuple(buffer_fields), tuple(raw), tuple(chunks))
