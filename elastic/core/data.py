"""Which samples a micro-batch holds, and reading them from Parquet, Arrow IPC or memory.

The order is a pure function of the seed: `SampleStream` names the samples of any micro-batch of
any step at once, for whoever asks, and keeps nothing. The data sets read samples by number.
It must never keep an index array, never hold more decoded rows than the bound of its cache, and
never let a damaged file be found by a step: everything is read once when a data set is opened.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from elastic.core.errors import DataError
from elastic.core.permutation import derive_key, permute

Int64Array = npt.NDArray[np.int64]
Block = dict[str, npt.NDArray[Any]]  # one decoded row group: column -> values

DEFAULT_CACHE_BYTES = 64 * 2**20
SUFFIXES = (".parquet", ".arrow")


# --- order -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStream:
    """The endless stream of training samples: epochs one after the other, each shuffled anew.

    Sample i of the stream is position i mod N of epoch i div N, with N = num_samples - held_out,
    so a batch may span epochs and every epoch holds each training sample exactly once. The split
    depends on `split_seed` only: jobs with other seeds hold out the same samples.

    Raises:
        DataError: `held_out` leaves nothing to train on.
    """

    num_samples: int
    held_out: int
    seed: int
    split_seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < self.num_samples:
            raise DataError(
                f"held_out is {self.held_out}, must be at least 0 and less than the"
                f" {self.num_samples} samples of the data set"
            )

    @property
    def num_training(self) -> int:
        """Samples in one epoch."""
        return self.num_samples - self.held_out

    def training(self, stream_positions: Int64Array) -> Int64Array:
        """Sample indices at `stream_positions` (any shape, each >= 0) of the stream."""
        positions = np.asarray(stream_positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_training)
        shuffled = np.empty_like(positions)
        for epoch in sorted(set(epochs.reshape(-1).tolist())):
            in_epoch = epochs == epoch
            key = derive_key("epoch", self.seed, epoch)
            shuffled[in_epoch] = permute(within[in_epoch], self.num_training, key)
        return self._split(shuffled + self.held_out)

    def held_out_samples(self) -> Int64Array:
        """Indices of the samples that training never sees, shape (held_out,)."""
        return self._split(np.arange(self.held_out, dtype=np.int64))

    def micro_batch(
        self, step: int, micro_batch: int, micro_batches: int, micro_batch_size: int
    ) -> Int64Array:
        """Sample indices of one of the `micro_batches` of a step, shape (micro_batch_size,)."""
        start = (step * micro_batches + micro_batch) * micro_batch_size
        return self.training(np.arange(start, start + micro_batch_size, dtype=np.int64))

    def _split(self, positions: Int64Array) -> Int64Array:
        """The split permutation of all samples; positions below `held_out` are held out."""
        if not self.held_out:
            return positions
        return permute(positions, self.num_samples, derive_key("split", self.split_seed))


def digest(indices: Int64Array) -> bytes:
    """16 bytes that name a sequence of sample indices, on a machine of any byte order."""
    return blake2b(np.ascontiguousarray(indices, dtype="<i8").tobytes(), digest_size=16).digest()


# --- files -----------------------------------------------------------------------------------


class _File(Protocol):
    """One memory-mapped file, read one row group at a time."""

    path: Path
    schema: pa.Schema
    num_groups: int

    def read(self, group: int, columns: Sequence[str]) -> pa.Table: ...


class _ParquetFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        # Checksums are verified where the writer left them (write_page_checksum=True).
        self._reader = pq.ParquetFile(pa.memory_map(str(path)), page_checksum_verification=True)
        self.schema = self._reader.schema_arrow
        self.num_groups = self._reader.num_row_groups

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        return self._reader.read_row_group(group, columns=list(columns), use_threads=False)


class _ArrowFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.schema = self._reader.schema
        self.num_groups = self._reader.num_record_batches

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        batch = self._reader.get_batch(group)  # points into the map unless it is compressed
        return pa.Table.from_batches([batch]).select(list(columns))


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Turn an error of the reader into a `DataError` that begins with `place`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read: {error}") from error


def _find_files(path: str | Path) -> list[Path]:
    root = Path(path)
    found = (
        sorted(at for at in root.glob("*") if at.suffix in SUFFIXES) if root.is_dir() else [root]
    )
    if not found:
        raise DataError(f"{root}: the folder holds no file named *{' or *'.join(SUFFIXES)}")
    for file in found:
        if not file.is_file():
            raise DataError(f"{file}: there is no such file (working folder {Path.cwd()})")
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file}: the name ends in none of {', '.join(SUFFIXES)}")
    return found


def _open_file(path: Path) -> _File:
    with _naming(str(path)):
        return _ParquetFile(path) if path.suffix == ".parquet" else _ArrowFile(path)


class _RowGroups:
    """The row groups of all files in order, decoded when asked for; the last used are kept.

    `cache_bytes` bounds the decoded bytes kept, but for one row group larger than that. What lies
    in the map itself is counted like a copy. For one thread at a time.
    """

    def __init__(
        self,
        files: Sequence[_File],
        columns: Sequence[str],
        *,
        decode: Callable[[pa.ChunkedArray], npt.NDArray[Any]],
        cache_bytes: int,
    ) -> None:
        self._places = [(file, group) for file in files for group in range(file.num_groups)]
        self._columns = columns
        self._decode = decode
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[int, Block] = OrderedDict()
        self.cached_bytes = 0

    def check_all(self) -> Iterator[Block]:
        """Read every row group once, in order, and check its values too."""
        for index in range(len(self._places)):
            yield self._keep(index, self._load(index, full_check=True))

    def __getitem__(self, index: int) -> Block:
        """Row group `index`, decoded. Raises `DataError` naming file, row group and column."""
        block = self._cached.get(index)
        if block is None:
            return self._keep(index, self._load(index, full_check=False))
        self._cached.move_to_end(index)
        return block

    def _keep(self, index: int, block: Block) -> Block:
        self._cached[index] = block
        self.cached_bytes += _size_bytes(block)
        while self.cached_bytes > self._cache_bytes and len(self._cached) > 1:
            self.cached_bytes -= _size_bytes(self._cached.popitem(last=False)[1])
        return block

    def _load(self, index: int, *, full_check: bool) -> Block:
        file, group = self._places[index]
        place = f"{file.path}: row group {group}"
        with _naming(place):
            table = file.read(group, self._columns)
            table.validate(full=full_check)
        block = {}
        for name in self._columns:
            with _naming(f"{place}: column {name!r}"):
                block[name] = self._decode(table.column(name))
        return block


def _size_bytes(block: Block) -> int:
    return sum(values.nbytes for values in block.values())


def _check_columns(files: Sequence[_File], columns: Sequence[str]) -> None:
    """Refuse a file that lacks a column or gives it another type than the first file."""
    first = files[0]
    for file in files:
        for name in columns:
            if file.schema.names.count(name) != 1:
                listed = ", ".join(file.schema.names) or "none"
                raise DataError(f"{file.path}: there is no one column {name!r}; columns: {listed}")
            here, there = file.schema.field(name).type, first.schema.field(name).type
            if here != there:
                raise DataError(
                    f"{file.path}: column {name!r} is {here}, but {there} in {first.path}"
                )


def _check_indices(indices: Int64Array, num_samples: int) -> None:
    if len(indices) and not (indices.min() >= 0 and indices.max() < num_samples):
        raise IndexError(
            f"samples {indices.min()}..{indices.max()} are not all in range({num_samples})"
        )


# --- data sets -------------------------------------------------------------------------------


class TextWindows:
    """Windows of bytes over all documents of a string or binary column.

    The documents are joined in order, with nothing between them: so a window lies in the map of
    an Arrow file as it is, and a writer that wants a separator puts it into the text. Sample i is
    bytes [i * context, i * context + context + 1): windows overlap by one byte, since the last
    target of one is the first input of the next. A null counts as an empty document.

    Raises:
        DataError: a file is missing, damaged, of another type, or all text is under one window.
    """

    def __init__(
        self,
        path: str | Path,
        column: str = "text",
        context: int = 128,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        if context < 1:
            raise DataError(f"context is {context}, must be at least 1")
        files = [_open_file(file) for file in _find_files(path)]
        _check_columns(files, [column])
        self._column = column
        self._context = context
        self._groups = _RowGroups(files, [column], decode=_text_bytes, cache_bytes=cache_bytes)
        lengths = [len(block[column]) for block in self._groups.check_all()]
        self._ends: list[int] = np.cumsum(lengths, dtype=np.int64).tolist()
        self.num_bytes = sum(lengths)
        if not len(self):
            raise DataError(
                f"{path}: column {column!r} holds {self.num_bytes} bytes, one window needs"
                f" {context + 1}; shorten context ({context})"
            )

    def __len__(self) -> int:
        return max(0, self.num_bytes - 1) // self._context

    def fetch(self, indices: Int64Array) -> torch.Tensor:
        """Windows as int64 byte values, shape (len(indices), context + 1)."""
        _check_indices(indices, len(self))
        windows = np.empty((len(indices), self._context + 1), dtype=np.int64)
        for window, index in zip(windows, indices.tolist(), strict=True):
            self._copy(index * self._context, window)
        return torch.from_numpy(windows)

    def _copy(self, start: int, window: Int64Array) -> None:
        """Fill `window` with the bytes from `start`, which may lie in several row groups."""
        group = bisect_right(self._ends, start)
        filled = 0
        while filled < len(window):
            text = self._groups[group][self._column]
            offset = start + filled - (self._ends[group] - len(text))
            part = text[offset : offset + len(window) - filled]
            window[filled : filled + len(part)] = part
            filled += len(part)
            group += 1


def _text_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """All bytes of a string or binary column, without a copy where it is one chunk."""
    chunks = [_chunk_bytes(chunk) for chunk in column.chunks if len(chunk)]
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate([np.empty(0, dtype=np.uint8), *chunks])


def _chunk_bytes(chunk: pa.Array) -> npt.NDArray[np.uint8]:
    if chunk.type in (pa.string(), pa.binary()):
        offset_type: npt.DTypeLike = np.int32
    elif chunk.type in (pa.large_string(), pa.large_binary()):
        offset_type = np.int64
    else:
        raise ValueError(f"text must be string or binary, not {chunk.type}")
    if chunk.null_count:
        chunk = chunk.drop_null()  # a null slot may cover bytes that mean nothing
    if not len(chunk):
        return np.empty(0, dtype=np.uint8)
    _, offset_buffer, data_buffer = chunk.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=offset_type)
    first, last = int(offsets[chunk.offset]), int(offsets[chunk.offset + len(chunk)])
    if first == last:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(data_buffer, dtype=np.uint8)[first:last]


class Rows:
    """Rows of numeric columns; fixed-size lists of numbers become 2-D. `columns=None` takes all.

    Raises:
        DataError: a file is missing or damaged, a column is missing, not numeric, or has nulls.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str] | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        files = [_open_file(file) for file in _find_files(path)]
        self._columns = list(files[0].schema.names if columns is None else columns)
        if not self._columns:
            raise DataError(f"{path}: no columns to read")
        _check_columns(files, self._columns)
        self._groups = _RowGroups(
            files, self._columns, decode=_numeric_values, cache_bytes=cache_bytes
        )
        lengths = [len(block[self._columns[0]]) for block in self._groups.check_all()]
        self._ends: Int64Array = np.cumsum(lengths, dtype=np.int64)
        if not sum(lengths):
            raise DataError(f"{path}: there are no rows")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fetch(self, indices: Int64Array) -> dict[str, torch.Tensor]:
        """Column -> values, shape (len(indices),) or (len(indices), list size)."""
        _check_indices(indices, len(self))
        groups = np.searchsorted(self._ends, indices, side="right")
        rows: Block = {}
        for group in sorted(set(groups.tolist())):
            block = self._groups[group]
            here = groups == group
            within = indices[here] - (self._ends[group] - len(block[self._columns[0]]))
            for name, values in block.items():
                if name not in rows:
                    rows[name] = np.empty((len(indices), *values.shape[1:]), dtype=values.dtype)
                rows[name][here] = values[within]
        return {name: torch.from_numpy(values) for name, values in rows.items()}


def _numeric_values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A numeric column as an array of shape (rows,) or (rows, list size)."""
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} rows are null; fill or drop them")
    is_list = pa.types.is_fixed_size_list(column.type)
    one = column.num_chunks == 1  # combine_chunks would copy it
    values = column.chunk(0) if one else column.combine_chunks()
    if is_list:
        values = values.flatten()
        if values.null_count:
            raise ValueError(f"{values.null_count} list elements are null; fill or drop them")
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"must be numbers or fixed-size lists of numbers, not {column.type}")
    array: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(column), column.type.list_size) if is_list else array


class ArrayRows:
    """A small data set in memory: equally long tensors, one row of each is a sample."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(f"tensors must be equally long and not empty, got {lengths}")
        self._tensors = tensors
        self._num_samples = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._num_samples

    def fetch(self, indices: Int64Array) -> dict[str, torch.Tensor]:
        """Name -> rows of that tensor, as new tensors in the order of `indices`."""
        _check_indices(indices, len(self))
        chosen = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return {name: tensor[chosen] for name, tensor in self._tensors.items()}
