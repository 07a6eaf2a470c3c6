"""Windows of bytes over the documents of a text column."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from elastic.core.data.files import Source, check_columns, find_files, open_file
from elastic.core.data.order import Int64Array, check_indices
from elastic.core.data.row_groups import DEFAULT_CACHE_BYTES, RowGroups
from elastic.core.errors import DataError

Bytes = npt.NDArray[np.uint8]

OFFSETS: dict[pa.DataType, npt.DTypeLike] = {
    pa.string(): np.int32,
    pa.binary(): np.int32,
    pa.large_string(): np.int64,
    pa.large_binary(): np.int64,
}
"""The types of column that hold text, and how they say where each document begins."""


class TextWindows:
    """Windows of bytes over all documents of a string or binary column.

    The documents are joined in order, with nothing between them: so a window lies in the map of
    an Arrow file as it is, and a writer that wants a separator puts it into the text. Sample i is
    bytes [i * context, i * context + context + 1): windows overlap by one byte, since the last
    target of one is the first input of the next. A null counts as an empty document.

    No footer says how many bytes a row group holds, so every process reads the column once when it
    opens the data set.

    Args:
        path: a file, a folder or a URI, or several; folders in the order of their file names.
        column: the one that holds the text.
        context: bytes that the model sees; a window is one longer.
        cache_bytes: bound of the row groups that each worker keeps.

    Raises:
        DataError: a file is missing, damaged, of another type, or all text is under one window.
    """

    def __init__(
        self,
        path: Source,
        column: str = "text",
        context: int = 128,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        if context < 1:
            raise DataError(f"context is {context}, must be at least 1")
        files = [open_file(place) for place in find_files(path)]
        check_columns(files, [column])
        kind = files[0].schema.field(column).type
        if kind not in OFFSETS:
            raise DataError(
                f"{files[0].name}: column {column!r} is {kind}, allowed: string, binary; other"
                " types are for Rows"
            )
        self._column = column
        self._context = context
        self._groups: RowGroups[Bytes] = RowGroups(
            files, [column], decode=_text_bytes, cache_bytes=cache_bytes
        )
        lengths = [len(self._groups[index][column]) for index in range(len(self._groups))]
        self._ends: list[int] = np.cumsum(lengths, dtype=np.int64).tolist()
        self.num_bytes = sum(lengths)
        if not len(self):
            raise DataError(
                f"{files[0].name}: column {column!r} holds {self.num_bytes} bytes, one window needs"
                f" {context + 1}; shorten context ({context})"
            )

    def __len__(self) -> int:
        return max(0, self.num_bytes - 1) // self._context

    def fetch(self, indices: Int64Array) -> torch.Tensor:
        """Windows as int64 byte values, shape (len(indices), context + 1)."""
        check_indices(indices, len(self))
        windows = np.empty((len(indices), self._context + 1), dtype=np.int64)
        for window, index in zip(windows, indices.tolist(), strict=True):
            self._copy(index * self._context, window)
        return torch.from_numpy(windows)

    def prefetch(self, indices: Int64Array) -> bool:
        """Bring the row groups of `indices` into the cache. For another thread than `fetch`'s.

        False if there was no room for all of them.
        """
        wanted: dict[int, None] = {}  # in the order in which `fetch` reads them
        for start in (indices * self._context).tolist():
            first = bisect_right(self._ends, start)
            wanted |= dict.fromkeys(
                range(first, bisect_right(self._ends, start + self._context) + 1)
            )
        return self._groups.read_ahead(wanted)

    def check(self) -> None:
        """Read everything that is local once more, and look at each character."""
        self._groups.check()

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


def _text_bytes(column: pa.ChunkedArray) -> Bytes:
    """All bytes of a string or binary column, without a copy where it is one chunk."""
    chunks = [_chunk_bytes(chunk) for chunk in column.chunks if len(chunk)]
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate([np.empty(0, dtype=np.uint8), *chunks])


def _chunk_bytes(chunk: pa.Array) -> Bytes:
    if chunk.null_count:
        chunk = chunk.drop_null()  # a null slot may cover bytes that mean nothing
    if not len(chunk):
        return np.empty(0, dtype=np.uint8)
    _, offset_buffer, data_buffer = chunk.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=OFFSETS[chunk.type])
    first, last = int(offsets[chunk.offset]), int(offsets[chunk.offset + len(chunk)])
    if first == last:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(data_buffer, dtype=np.uint8)[first:last]
