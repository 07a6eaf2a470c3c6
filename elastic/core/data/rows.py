"""Rows of columns, by number, and how to pad lists of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from elastic.core.data.columns import Column, check_type, decode
from elastic.core.data.files import File, Source, check_columns, find_files, open_file
from elastic.core.data.order import Int64Array, check_indices
from elastic.core.data.row_groups import DEFAULT_CACHE_BYTES, RowGroups
from elastic.core.errors import DataError


class Rows:
    """Rows of Parquet and Arrow files, or of a folder that Hugging Face's `save_to_disk` wrote.

    Opening reads footers only. Before training starts local files are read and checked once;
    damage to others shows when a row group is read. A row costs its whole row group where that is
    not cached: write small ones (`row_group_size`), or Arrow files, which are mapped and need none
    of that. Arrow files that are not local are read as a whole by column: there Parquet is better.

    Args:
        path: a file, a folder or a URI, or several; folders in the order of their file names.
        columns: those to read; all by default.
        cache_bytes: bound of the decoded row groups that each worker keeps.

    Raises:
        DataError: a file is missing or damaged, or a column is missing or of a type not allowed.
    """

    def __init__(
        self,
        path: Source,
        columns: Sequence[str] | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        files = [open_file(place) for place in find_files(path)]
        if isinstance(columns, str):
            raise DataError(f"columns is {columns!r}, must be a list: [{columns!r}]")
        self._columns = list(files[0].schema.names if columns is None else columns)
        if not self._columns:
            raise DataError(
                f"{files[0].name}: no columns to read; `columns` must name at least one"
            )
        check_columns(files, self._columns)
        _check_types(files[0], self._columns)
        self._groups: RowGroups[Column] = RowGroups(
            files, self._columns, decode=decode, cache_bytes=cache_bytes
        )
        if not len(self):
            raise DataError(f"{files[0].name}: there are no rows")

    def __len__(self) -> int:
        ends = self._groups.ends
        return int(ends[-1]) if len(ends) else 0

    def fetch(self, indices: Int64Array) -> dict[str, Any]:
        """Column -> its values in the order of `indices`.

        Numbers become a tensor of shape (len(indices),), lists of a fixed size one of shape
        (len(indices), *sizes). Lists of any length become a list of tensors of one dimension,
        which `pad` makes one tensor; strings a list of `str`, binary and images one of `bytes`.
        """
        check_indices(indices, len(self))
        groups = self._groups_of(indices)
        rows: dict[str, Any] = {}
        for group in sorted(set(groups.tolist())):
            places = np.flatnonzero(groups == group)
            block = self._groups[group]
            within = indices[places] - (self._groups.ends[group - 1] if group else 0)
            for name in self._columns:
                if name not in rows:
                    rows[name] = _empty(block[name], len(indices))
                _place(block[name], within, rows[name], places)
        return {
            name: torch.from_numpy(values) if isinstance(values, np.ndarray) else values
            for name, values in rows.items()
        }

    def prefetch(self, indices: Int64Array) -> bool:
        """Bring the row groups of `indices` into the cache. For another thread than `fetch`'s.

        False if there was no room for all of them.
        """
        return self._groups.read_ahead(sorted(set(self._groups_of(indices).tolist())))

    def check(self) -> None:
        """Read everything that is local once. Raises `DataError` for damage and nulls."""
        self._groups.check()

    def _groups_of(self, indices: Int64Array) -> Int64Array:
        return np.searchsorted(self._groups.ends, indices, side="right")


def _empty(column: Column, num_rows: int) -> Any:
    """Where that many rows of a column go."""
    if isinstance(column, np.ndarray):
        return np.empty((num_rows, *column.shape[1:]), dtype=column.dtype)
    return [None] * num_rows


def _place(column: Column, within: Int64Array, target: Any, places: Int64Array) -> None:
    """Put the rows `within` a row group to their `places` in the micro-batch."""
    if isinstance(column, np.ndarray):
        target[places] = column[within]
        return
    for place, row in zip(places.tolist(), within.tolist(), strict=True):
        target[place] = column[row]


def _check_types(file: File, columns: Sequence[str]) -> None:
    for name in columns:
        try:
            check_type(file.schema.field(name).type)
        except ValueError as error:
            raise DataError(f"{file.name}: column {name!r} {error}") from None


def pad(rows: Sequence[torch.Tensor], value: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make lists of different lengths one tensor, as long as the longest.

    The longest depends on the micro-batch alone, so padding keeps a run exact. A loss over real
    elements only is `(losses * weights).sum(), weights.sum()`.

    Args:
        rows: N tensors of one dimension and one dtype.
        value: what fills up a row.

    Returns:
        Values of shape (N, longest), and weights of the same shape, float32: 1 for what was in the
        row, 0 for what fills it up. The lengths are `weights.sum(1)`.
    """
    lengths = torch.tensor([len(row) for row in rows])
    values = pad_sequence(list(rows), batch_first=True, padding_value=value)
    weights = torch.arange(values.shape[1]) < lengths.unsqueeze(1)
    return values, weights.float()
