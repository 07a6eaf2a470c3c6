"""Columns of a row group as what a micro-batch holds: arrays, lists of tensors, texts, bytes.

Decides which Arrow types a column may have, and says what to do with the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyarrow import types

ALLOWED = (
    "numbers, booleans, strings, binary, lists of numbers, or structs with a binary field 'bytes'"
)

_IMAGE_FIELD = "bytes"  # of the structs in which Hugging Face's Image and Audio features lie


class Lists:
    """Lists of numbers of any length; each row is a tensor of one dimension."""

    def __init__(self, values: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
        self._values, self._offsets = values, offsets
        self.nbytes = values.nbytes + offsets.nbytes

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self._values[self._offsets[row] : self._offsets[row + 1]].copy())


class Items:
    """Strings or bytes; each row is a `str` or `bytes`."""

    def __init__(self, items: pa.Array) -> None:
        self._items = items
        self.nbytes: int = items.nbytes

    def __getitem__(self, row: int) -> str | bytes:
        return self._items[row].as_py()  # type: ignore[no-any-return]


Column = npt.NDArray[Any] | Lists | Items


def check_type(kind: pa.DataType) -> None:
    """Raise `ValueError` for a type that `decode` refuses, with what to do."""
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if _is_text(plain) or _is_image(plain):
        return
    inner = plain
    while types.is_fixed_size_list(inner):
        inner = inner.value_type
    if inner is plain and _is_list(plain):
        inner = plain.value_type
    if not _is_number(inner):
        hint = "cast it, flatten it, or leave it out of `columns`"
        raise ValueError(f"is {kind}, allowed: {ALLOWED}; {hint}")


def decode(column: pa.ChunkedArray) -> Column:
    """The values of a column.

    Returns:
        Numbers, shape (rows, *list sizes) where lists have a fixed size; `Lists` where not;
        `Items` of strings and bytes. Points into the file's map where it can.

    Raises:
        ValueError: something is null, or the type is refused.
    """
    check_type(column.type)
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    _refuse_nulls(column.null_count, len(column), "rows")
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if _is_image(values.type):
        values = values.field(_IMAGE_FIELD)
        _refuse_nulls(values.null_count, len(values), f"{_IMAGE_FIELD!r} (only a path was saved?)")
    if _is_text(values.type):
        return Items(values)
    if _is_list(values.type):
        return _decode_lists(values)
    shape = [len(values)]
    while types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
        _refuse_nulls(values.null_count, len(values), "list elements")
    return _numbers(values).reshape(shape)


def _decode_lists(lists: pa.Array) -> Lists:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    _refuse_nulls(values.null_count, len(values), "list elements")
    return Lists(_numbers(values), offsets - offsets[0])


def _numbers(values: pa.Array) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def _refuse_nulls(num_nulls: int, num: int, what: str) -> None:
    if num_nulls:
        raise ValueError(f"{num_nulls} of {num} {what} are null; fill or drop them")


def _is_number(kind: pa.DataType) -> bool:
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind))


def _is_image(kind: pa.DataType) -> bool:
    return bool(
        types.is_struct(kind)
        and kind.get_field_index(_IMAGE_FIELD) >= 0
        and _is_text(kind.field(_IMAGE_FIELD).type)
    )
