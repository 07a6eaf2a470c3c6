"""Map-style data sets of other libraries. What is refused: test_data_mistakes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from elastic.core.data.map_style import MapDataset, as_dataset
from elastic.core.task import Dataset


class Points(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Augments: noise of torch, numpy and random."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.randn(()).item() + np.random.rand() + random.random()
        return torch.arange(6.0) + index + self.noise * noise, index


def test_samples_are_collated_in_order() -> None:
    data = MapDataset(Points())
    assert isinstance(data, Dataset)
    assert len(data) == 60
    inputs, numbers = data.fetch(np.array([5, 2, 5]))
    assert inputs.shape == (3, 6)
    assert numbers.tolist() == [5, 2, 5]


def test_a_collate_fn_of_ones_own() -> None:
    data = MapDataset(Points(), collate_fn=lambda samples: {"n": [n for _, n in samples]})
    assert data.fetch(np.array([1, 0])) == {"n": [1, 0]}


def test_many_samples_at_once_where_the_data_set_can() -> None:
    class Many(Points):
        asked: list[list[int]] = []  # noqa: RUF012

        def __getitems__(self, numbers: list[int]) -> list[int]:
            self.asked.append(numbers)
            return [10 * number for number in numbers]

    data = MapDataset(Many())
    assert data.fetch(np.array([3, 1])).tolist() == [30, 10]
    assert Many.asked == [[3, 1]]


def test_what_is_map_style_is_wrapped_and_our_own_is_left() -> None:
    tensors = TensorDataset(torch.arange(4))
    wrapped = as_dataset(ConcatDataset([Subset(tensors, [3, 2]), tensors]))
    assert wrapped.fetch(np.arange(6))[0].tolist() == [3, 2, 0, 1, 2, 3]
    assert as_dataset(wrapped) is wrapped


def test_a_task_may_return_a_torch_data_set_that_augments(
    make_node: Callable[..., Any], tiny_task: Any
) -> None:
    """A micro-batch is the same whoever computes it, whatever was computed before."""

    class Augmenting(tiny_task):  # type: ignore[misc]
        noise = 1.0

        def dataset(self) -> Any:
            return Points(self.noise)

        def loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, float]:
            inputs, numbers = batch
            return super().loss(  # type: ignore[no-any-return]
                model, {"inputs": inputs / 60, "targets": numbers[:, None] / 60}
            )

    node = make_node(Augmenting())
    one, other = node.worker(), node.worker()
    first = one.compute(node.lease(2))
    other.compute(node.lease(0))
    again = other.compute(node.lease(2))
    assert first.loss_sum == again.loss_sum
    assert first.maxima_C.tolist() == again.maxima_C.tolist()
    plain = Augmenting()
    plain.noise = 0.0
    assert make_node(plain).worker().compute(node.lease(2)).loss_sum != first.loss_sum
