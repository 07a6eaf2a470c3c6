"""The row groups of many files, decoded when asked for, or read ahead by another thread.

Must never hold more decoded rows than the bound of its cache, and nobody who asks for a row group
ever waits for the thread that reads ahead: that one may have a low priority.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from elastic.core.data.files import File, naming
from elastic.core.data.order import Int64Array

DEFAULT_CACHE_BYTES = 64 * 2**20
AHEAD_SHARE = 0.5
"""Of the cache: how much may be held of what was read ahead and not asked for since."""


class Values(Protocol):
    """The decoded values of one column of a row group."""

    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Values)


class RowGroups(Generic[V]):
    """The row groups of all files in order, decoded by column; the last used are kept.

    `cache_bytes` bounds the decoded bytes kept, but for one row group larger than that. What lies
    in the map of a file is counted like a copy. Any number of threads may ask.
    """

    def __init__(
        self,
        files: Sequence[File],
        columns: Sequence[str],
        *,
        decode: Callable[[pa.ChunkedArray], V],
        cache_bytes: int,
    ) -> None:
        self._places = [(file, group) for file in files for group in range(len(file.rows_G))]
        rows = [num_rows for file in files for num_rows in file.rows_G]
        self.ends: Int64Array = np.cumsum(rows, dtype=np.int64)
        """The number of rows up to the end of each row group."""
        self._columns = columns
        self._decode = decode
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()  # guards what follows; never held while something is read
        self._cached: OrderedDict[int, Mapping[str, V]] = OrderedDict()
        self._ahead: set[int] = set()
        self.cached_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Mapping[str, V]:
        """Row group `index`, decoded. Raises `DataError` naming file, row group and column."""
        with self._lock:
            self._ahead.discard(index)
            if (block := self._cached.get(index)) is not None:
                self._cached.move_to_end(index)
                return block
        return self._keep(index, self._load(index, full_check=False), is_ahead=False)

    def read_ahead(self, indices: Iterable[int]) -> bool:
        """Bring row groups into the cache, in order, until `AHEAD_SHARE` of it waits to be used.

        False if there was no room for all of them.
        """
        for index in indices:
            with self._lock:
                if index in self._cached:
                    continue
                ahead_bytes = sum(_size_bytes(self._cached[one]) for one in self._ahead)
            if ahead_bytes >= AHEAD_SHARE * self._cache_bytes:
                return False
            self._keep(index, self._load(index, full_check=False), is_ahead=True)
        return True

    def check(self) -> None:
        """Read every row group of the local files once, and check its values too."""
        for index, (file, _) in enumerate(self._places):
            if file.is_local:
                self._load(index, full_check=True)

    def _keep(self, index: int, block: Mapping[str, V], *, is_ahead: bool) -> Mapping[str, V]:
        with self._lock:
            if index in self._cached:  # another thread was faster
                return self._cached[index]
            self._cached[index] = block
            self.cached_bytes += _size_bytes(block)
            if is_ahead:
                self._ahead.add(index)
            while self.cached_bytes > self._cache_bytes and len(self._cached) > 1:
                oldest, dropped = self._cached.popitem(last=False)
                self._ahead.discard(oldest)
                self.cached_bytes -= _size_bytes(dropped)
        return block

    def _load(self, index: int, *, full_check: bool) -> Mapping[str, V]:
        file, group = self._places[index]
        place = f"{file.name}: row group {group}"
        with naming(place):
            table = file.read(group, self._columns)
            table.validate(full=full_check)
        block = {}
        for name in self._columns:
            with naming(f"{place}: column {name!r}"):
                block[name] = self._decode(table.column(name))
        return block


def _size_bytes(block: Mapping[str, Values]) -> int:
    return sum(values.nbytes for values in block.values())
