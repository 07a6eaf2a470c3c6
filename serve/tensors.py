"""Tensors of the Open Inference Protocol: JSON or bytes in, numpy arrays out, and back.

Shape, type and number of elements are checked before anything is allocated. Never trusts a length.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.refusals import bad, too_large

Array = NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"INT{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "BYTES": np.dtype(object),
}
_MAX_RANK = 8


@dataclass(frozen=True)
class Named:
    """An input or output. Elements of BYTES are Python `bytes`."""

    name: str
    datatype: str
    array: Array


def read_shape(shape: Any, name: str, max_elements: int) -> tuple[int, ...]:
    """A shape whose elements are at most `max_elements`. Raises Refusal."""
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        raise bad(f"input {name!r}: shape needs a list of at most {_MAX_RANK} numbers", "shape")
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in shape):
        raise bad(f"input {name!r}: shape needs whole numbers from 0", "shape")
    if math.prod(max(one, 1) for one in shape) > max_elements:  # 0 times what is huge is huge
        limit = f"{max_elements} elements (limits.rows)"
        raise too_large(f"input {name!r}: shape {shape} has more than {limit}", "shape")
    return tuple(shape)


def read_datatype(datatype: Any, name: str) -> np.dtype[Any]:
    if not isinstance(datatype, str) or datatype not in DTYPES:
        known = ", ".join(DTYPES)
        raise bad(f"input {name!r}: datatype {str(datatype)[:40]!r} is none of {known}", "datatype")
    return DTYPES[datatype]


def from_json(tensor: Any, max_elements: int) -> Named:
    """A tensor with its `data`, flat or nested. Raises Refusal."""
    name, datatype, shape = _header(tensor, max_elements)
    dtype = read_datatype(datatype, name)
    values = list(_flat(tensor.get("data"), math.prod(shape), name))
    if len(values) != math.prod(shape):
        raise bad(f"input {name!r}: {len(values)} elements in data; shape {list(shape)}", "data")
    return Named(name, datatype, _array(values, dtype, datatype, name).reshape(shape))


def from_bytes(tensor: Any, raw: bytes, max_elements: int) -> Named:
    """A tensor whose elements follow the JSON, little-endian and in order. Raises Refusal."""
    name, datatype, shape = _header(tensor, max_elements)
    dtype, num = read_datatype(datatype, name), math.prod(shape)
    if datatype == "BYTES":
        array = np.empty(num, object)
        array[:] = list(_texts(raw, num, name))
        return Named(name, datatype, array.reshape(shape))
    if len(raw) != num * dtype.itemsize:
        raise bad(f"input {name!r}: {len(raw)} bytes; needs {num * dtype.itemsize}", "data")
    array = np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype).reshape(shape)
    if datatype == "BOOL":
        array = np.frombuffer(raw, np.uint8).astype(np.bool_).reshape(shape)
    return Named(name, datatype, array)


def to_json(tensor: Named) -> dict[str, Any]:
    """As a response has it; `data` is flat."""
    array = tensor.array.ravel()
    data: list[Any] = (
        [one.decode("utf-8", "replace") for one in array]
        if tensor.datatype == "BYTES"
        else array.tolist()
    )
    return {**_described(tensor), "data": data}


def to_bytes(tensor: Named) -> tuple[dict[str, Any], bytes]:
    """The header of a response and the elements that follow it."""
    if tensor.datatype == "BYTES":
        raw = b"".join(struct.pack("<I", len(one)) + one for one in tensor.array.ravel())
    else:
        raw = tensor.array.astype(DTYPES[tensor.datatype].newbyteorder("<")).tobytes()
    return {**_described(tensor), "parameters": {"binary_data_size": len(raw)}}, raw


def _described(tensor: Named) -> dict[str, Any]:
    shape = list(tensor.array.shape)
    return {"name": tensor.name, "shape": shape, "datatype": tensor.datatype}


def _header(tensor: Any, max_elements: int) -> tuple[str, Any, tuple[int, ...]]:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise bad("inputs: each needs name, shape, datatype and data", "inputs")
    name = tensor["name"][:80]
    return name, tensor.get("datatype"), read_shape(tensor.get("shape"), name, max_elements)


def _flat(data: Any, num: int, name: str) -> Iterator[Any]:
    """Elements of nested lists, and no more than one beyond `num`."""
    if not isinstance(data, list):
        raise bad(f"input {name!r}: data needs a list", "data")
    stack: list[Iterator[Any]] = [iter(data)]
    given = 0
    while stack:
        one = next(stack[-1], stack)
        if one is stack:
            stack.pop()
        elif isinstance(one, list):
            if len(stack) >= _MAX_RANK:
                raise bad(f"input {name!r}: data is nested deeper than {_MAX_RANK}", "data")
            stack.append(iter(one))
        else:
            yield one
            given += 1
            if given > num:
                raise bad(f"input {name!r}: more than {num} elements in data", "data")


def _array(values: Sequence[Any], dtype: np.dtype[Any], datatype: str, name: str) -> Array:
    check = {"b": _is_bool, "i": _is_int, "u": _is_int, "f": _is_number, "O": _is_text}[dtype.kind]
    wrong = next((one for one in values if not check(one)), None)
    if wrong is not None or any(one is None for one in values):
        raise bad(f"input {name!r}: {str(wrong)[:40]!r} is no {datatype}", "data")
    if dtype.kind == "O":
        array = np.empty(len(values), object)
        array[:] = [one.encode("utf-8", "surrogatepass") for one in values]
        return array
    if dtype.kind in "iu" and values:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if min(values) < low or max(values) > high:
            raise bad(f"input {name!r}: a value is outside of {datatype}: {low} to {high}", "data")
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, np.float64 if dtype.kind == "f" else dtype).astype(dtype)
    except OverflowError:
        raise bad(f"input {name!r}: a value is too large for {datatype}", "data") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise bad(f"input {name!r}: a value is not finite as {datatype}", "data")
    return array


def _is_bool(one: Any) -> bool:
    return isinstance(one, bool)


def _is_int(one: Any) -> bool:
    return isinstance(one, int) and not isinstance(one, bool)


def _is_number(one: Any) -> bool:
    return isinstance(one, int | float) and not isinstance(one, bool)


def _is_text(one: Any) -> bool:
    return isinstance(one, str)


def _texts(raw: bytes, num: int, name: str) -> Iterator[bytes]:
    """Elements with their lengths before them."""
    place = 0
    for _ in range(num):
        if place + 4 > len(raw):
            raise bad(f"input {name!r}: fewer elements in its bytes than its shape has", "data")
        (length,) = struct.unpack_from("<I", raw, place)
        place += 4
        if place + length > len(raw):
            raise bad(f"input {name!r}: an element is longer than the bytes that are left", "data")
        yield raw[place : place + length]
        place += length
    if place != len(raw):
        raise bad(f"input {name!r}: more elements in its bytes than its shape has", "data")
