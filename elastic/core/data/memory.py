"""Data sets that are in memory as they are."""

from __future__ import annotations

import numpy as np
import torch

from elastic.core.data.order import Int64Array, check_indices
from elastic.core.errors import DataError


class ArrayRows:
    """A small data set in memory: equally long tensors, one row of each is a sample.

    Args:
        tensors: by name, each of shape (num_samples, ...).

    Raises:
        DataError: they are empty, or not equally long.
    """

    def __init__(self, **tensors: torch.Tensor) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(f"tensors must be equally long and not empty, got {lengths}")
        self._tensors = tensors
        self._num_samples = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._num_samples

    def fetch(self, indices: Int64Array) -> dict[str, torch.Tensor]:
        """Name -> rows of that tensor, shape (len(indices), ...), in the order of `indices`."""
        check_indices(indices, len(self))
        chosen = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return {name: tensor[chosen] for name, tensor in self._tensors.items()}
