"""A task whose computing and state are next to nothing: what is left of a step is control."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from elastic.core.data.memory import ArrayRows


class Tiny:
    """A linear map of four numbers."""

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def dataset(self) -> ArrayRows:
        x = torch.arange(4096.0).view(1024, 4) / 4096
        return ArrayRows(x=x, y=x.sum(1, keepdim=True))

    def loss(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        return (model(rows["x"]) - rows["y"]).square().sum(), float(len(rows["x"]))

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for _, parameter in named], 0.01)
