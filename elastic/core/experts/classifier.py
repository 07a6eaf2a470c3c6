"""A small residual network over numbers, as a classifier and as its router."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class Classifier(nn.Module):
    """Logits of classes; with `num_classes` experts it is a router.

    Args:
        shape: of one input; it is flattened.
        width: numbers between the layers.
        depth: residual layers.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int, *, width: int = 64, depth: int = 2
    ) -> None:
        super().__init__()
        self.into = nn.Linear(math.prod(shape), width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(depth)
        )
        self.out = nn.Linear(width, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the last layer decides by, shape (B, width)."""
        hidden: torch.Tensor = self.into(x.flatten(1)).relu()
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *shape) -> logits, shape (B, num_classes)."""
        logits: torch.Tensor = self.out(self.features(x))
        return logits
