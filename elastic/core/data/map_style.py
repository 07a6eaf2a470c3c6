"""Data sets of other libraries as ours, where they can be read exactly once an epoch.

Refuses what cannot be read by number, and says what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from elastic.core.data.order import Int64Array, check_indices
from elastic.core.errors import DataError
from elastic.core.task import Dataset

Collate = Callable[[list[Any]], Any]


class MapDataset:
    """Any map-style data set: `torch.utils.data.Dataset`, Hugging Face `datasets`, a list.

    A micro-batch is `collate_fn([dataset[i] for i in indices])`, where `dataset[i]` may augment
    with torch, numpy or random: they are seeded for each micro-batch. All of it runs on the thread
    that trains, so what is slow to read belongs into `Rows`, which reads ahead.

    Args:
        dataset: has `__len__` and `__getitem__`; `__getitems__` is used where there is one.
        collate_fn: makes a list of samples one micro-batch; by default torch's `default_collate`.

    Raises:
        DataError: `dataset` is iterable, a loader, a mapping, empty, or does not know its length.
    """

    def __init__(self, dataset: Any, collate_fn: Collate | None = None) -> None:
        _refuse_unnumbered(dataset)
        if collate_fn is not None and not callable(collate_fn):
            raise DataError(
                f"collate_fn is {collate_fn!r}, must be a function of a list of samples"
            )
        self._dataset = dataset
        self._num_samples = len(dataset)
        self._collate = default_collate if collate_fn is None else collate_fn
        if not self._num_samples:
            raise DataError(f"{_kind(dataset)} holds no samples, must hold at least one")

    def __len__(self) -> int:
        return self._num_samples

    def fetch(self, indices: Int64Array) -> Any:
        """What `collate_fn` makes of the samples, in the order of `indices`."""
        check_indices(indices, self._num_samples)
        numbers = indices.tolist()
        if hasattr(self._dataset, "__getitems__"):
            return self._collate(self._dataset.__getitems__(numbers))
        return self._collate([self._dataset[number] for number in numbers])


def as_dataset(found: Any) -> Dataset:
    """What a task's `dataset()` returned as a `Dataset`; a map-style one is wrapped.

    Raises:
        DataError: it cannot be read by number.
    """
    return found if isinstance(found, Dataset) else MapDataset(found)


def _refuse_unnumbered(dataset: Any) -> None:
    """Raise for what is read in its own order: then nobody could name the samples of a step."""
    kind = _kind(dataset)
    if kind.startswith("ray.data."):
        raise DataError(
            f"{kind} hands out blocks in the order in which they are made, which differs from run"
            " to run, so a sample cannot be named: write it once with"
            " `ds.write_parquet(path)` and return elastic.Rows(path)"
        )
    if isinstance(dataset, DataLoader):
        raise DataError(
            f"{kind} cannot be read by number: return MapDataset(loader.dataset,"
            " loader.collate_fn); batch and seed of the job file say how large a micro-batch is"
            " and how samples are shuffled"
        )
    is_sized = hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{kind} cannot be read by number, so a micro-batch could not be computed again"
            " elsewhere: allowed are data sets with __len__ and __getitem__, or with __len__ and"
            " fetch(indices); write what it yields to Parquet and use elastic.Rows"
        )
    if not is_sized:
        raise DataError(
            f"{kind} has no __len__, and an epoch must hold each sample once: add the number of"
            " samples"
        )
    if isinstance(dataset, Mapping | str | bytes | torch.Tensor):
        raise DataError(
            f"{kind} is no data set: allowed are those with one sample a number; equally long"
            " tensors are for elastic.ArrayRows(name=tensor, ...)"
        )


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
