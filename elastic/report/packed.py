"""Numbers as little-endian arrays in base64, which a browser reads without parsing."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

Packed = dict[str, str]


def pack(values: npt.NDArray[Any], kind: str = "<f8") -> Packed:
    """An array as {type, data}: i4, u4, u2, u1, f4 or f8, and its bytes in base64."""
    data = np.ascontiguousarray(values).astype(kind)
    return {"type": kind[-2:], "data": base64.b64encode(data.tobytes()).decode()}
