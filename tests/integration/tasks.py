"""The tasks of the tests on real processes.

Every worker and aggregator imports this: so it must load nothing that they do not need anyway.
What the tests themselves need is in `support`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from elastic.core.data.memory import ArrayRows
from elastic.core.task import LossSums

NUM_ROWS = 4096
NUM_FEATURES = 16
NUM_CLASSES = 4


class Layers(nn.Module):
    """A few wide layers with dropout: milliseconds per micro-batch, several chunks."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        sizes = [NUM_FEATURES, width, width, width]
        self.layers = nn.ModuleList(
            nn.Linear(size, following)
            for size, following in zip(sizes, [*sizes[1:], NUM_CLASSES], strict=True)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        hidden = features_BF
        for layer in self.layers:
            hidden = self.dropout(F.relu(layer(hidden)))
        return hidden


@dataclass(frozen=True)
class Tiny:
    """Classifies points. Rows `loud` have a million times the loss; rows `broken` a loss of NaN."""

    width: int = 256
    dropout: float = 0.1
    loud: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    lr: float = 1e-3

    def model(self) -> nn.Module:
        return Layers(self.width, self.dropout)

    def dataset(self) -> ArrayRows:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(NUM_ROWS, NUM_FEATURES, generator=generator)
        labels = features[:, :NUM_CLASSES].argmax(dim=1)
        factors = torch.ones(NUM_ROWS)
        factors[list(self.loud)] = 1e6
        factors[list(self.broken)] = torch.nan
        return ArrayRows(features=features, labels=labels, factors=factors)

    def loss(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> LossSums:
        logits, labels = model(rows["features"]), rows["labels"]
        losses = F.cross_entropy(logits, labels, reduction="none")
        correct = (logits.argmax(dim=1) == labels).sum()
        return (losses * rows["factors"]).sum(), float(len(losses)), {"accuracy": correct}

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([one for _, one in named], self.lr)


@dataclass(frozen=True)
class OnS3(Tiny):
    """`Tiny` on its rows in a bucket."""

    uri: str = ""

    def dataset(self) -> Any:
        from elastic.core.data.rows import Rows

        return Rows(self.uri, cache_bytes=20_000)  # a part of the data


@dataclass(frozen=True)
class Flaky(Tiny):
    """Raises in every worker for as long as a file exists."""

    path: str = ""

    def loss(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> LossSums:
        if Path(self.path).exists():
            raise OSError("the network is away")
        return super().loss(model, rows)


class WithLBFGS(Tiny):
    """Its optimizer is not elementwise."""

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS([one for _, one in named])


class Counting(Layers):
    """Writes to one of its parameters in forward."""

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.layers[1].bias += 1
        return super().forward(features_BF)


class Unhurried(Layers):
    """Each layer takes a while, and no processor."""

    layer_s = 0.0

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        time.sleep(self.layer_s)
        hidden = features_BF
        for layer in self.layers:
            hidden = self.dropout(F.relu(layer(hidden)))
            time.sleep(self.layer_s)
        return hidden


@dataclass(frozen=True)
class TakesTime(Tiny):
    """Its model is `Unhurried`: a step takes as long as it would with a large model."""

    layer_s: float = 0.02

    def model(self) -> nn.Module:
        model = Unhurried(self.width, self.dropout)
        model.layer_s = self.layer_s
        return model


class WithCounting(Tiny):
    """Its model is `Counting`."""

    def model(self) -> nn.Module:
        return Counting(self.width, self.dropout)


class Weightless(Tiny):
    """Its rows weigh nothing."""

    def loss(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> LossSums:
        return super().loss(model, rows)[0], 0.0


@dataclass(frozen=True)
class OnText(Tiny):
    """Reads a text, which its model does not understand."""

    path: str = ""

    def dataset(self) -> Any:
        from elastic.core.data.text import TextWindows

        return TextWindows(self.path, context=16)
