"""The tasks that are shipped: flows over images, language models over bytes, classifiers, routers.

The same class trains an expert on its subset and the monolith on all of them: only `data` differs.
A router reads the subsets in the proportions that they have, since the prior belongs into it. Never
looks at Ray: each is a task like a user's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from elastic.core.data.order import Int64Array, check_indices
from elastic.core.data.rows import Rows
from elastic.core.data.text import TextWindows
from elastic.core.experts.classifier import Classifier
from elastic.core.experts.dit import DiT, DiTRouter
from elastic.core.experts.flow import interpolate, target_velocity
from elastic.core.experts.language import ByteLM, ByteRouter
from elastic.core.experts.manifest import ModelSpec
from elastic.core.task import Dataset, LossSums

Named = Sequence[tuple[str, nn.Parameter]]
_BYTE = 127.5


class Subsets:
    """Data sets one after the other; `fetch` says of each sample which one it is from.

    Args:
        parts: at least one, each with a `fetch` that returns a tensor or a dict of tensors.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fetch(self, indices: Int64Array) -> tuple[Any, torch.Tensor]:
        """The rows in the order of `indices`, and the number of each one's part, int64."""
        check_indices(indices, len(self))
        part_N = np.searchsorted(self._ends, indices, side="right")
        order, pieces = [], []
        for k in np.unique(part_N).tolist():
            places = np.flatnonzero(part_N == k)
            start = int(self._ends[k - 1]) if k else 0
            pieces.append(self._parts[k].fetch(indices[places] - start))
            order.append(places)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return _joined(pieces, back), torch.from_numpy(part_N.astype(np.int64))

    def check(self) -> None:
        """Check every part that can be checked."""
        for part in self._parts:
            if hasattr(part, "check"):
                part.check()


class Drawn:
    """The k-th of `num` even parts of a data set, drawn by lot from a seed."""

    def __init__(self, dataset: Dataset, k: int, num: int, seed: int) -> None:
        self._dataset = dataset
        self._rows = np.random.default_rng(seed).permutation(len(dataset))[k::num]

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, indices: Int64Array) -> Any:
        """The rows `indices` of this part."""
        return self._dataset.fetch(self._rows[indices])


def _joined(pieces: Sequence[Any], order: torch.Tensor) -> Any:
    if isinstance(pieces[0], torch.Tensor):
        return torch.cat(list(pieces))[order]
    return {name: torch.cat([piece[name] for piece in pieces])[order] for name in pieces[0]}


def as_inputs(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A column as float32 of shape (B, *shape); bytes become numbers in [-1, 1]."""
    scaled = values.float() / _BYTE - 1 if values.dtype == torch.uint8 else values.float()
    return scaled.reshape(len(values), *shape)


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """Data and optimizer, alike for all.

    Args of every task:
        data: the folders of Parquet to train on; for a router one a subset, in order.
        model_args: arguments of the module.
        lr: the highest rate of AdamW; it rises over `warmup_steps` and falls to 0 at `steps`.
        lot: (k, K, seed): train on the k-th of K subsets drawn by lot.
    """

    data: Sequence[str]
    steps: int
    model_args: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    lot: Sequence[int] = ()

    def _drawn(self, dataset: Dataset) -> Dataset:
        return Drawn(dataset, *self.lot) if self.lot else dataset

    def spec(self) -> ModelSpec:
        """How the model is built, for a model repository."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        """The module of `spec`."""
        from elastic.core.experts.repository import construct

        return construct(self.spec())

    def optimizer(self, named_parameters: Named) -> torch.optim.Optimizer:
        """AdamW; vectors do not decay."""
        matrices: dict[str, Any] = {"params": [p for _, p in named_parameters if p.ndim >= 2]}
        vectors = [p for _, p in named_parameters if p.ndim < 2]
        return torch.optim.AdamW(
            [matrices, {"params": vectors, "weight_decay": 0.0}],
            self.lr,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.99),
        )

    def schedule(self, step: int) -> float:
        """Up in a line, down in half a cosine."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


@dataclass(frozen=True, kw_only=True)
class _OfRows(_Trained):
    column: str
    shape: Sequence[int]

    def _rows(self, data: Sequence[str], *more: str) -> Rows:
        return Rows(list(data), [self.column, *more])

    def _inputs(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return as_inputs(rows[self.column], self.shape)


@dataclass(frozen=True, kw_only=True)
class Flow(_OfRows):
    """Flow matching over images of `shape` in `column`, by a `DiT`."""

    def spec(self) -> ModelSpec:
        return _spec(DiT, shape=list(self.shape), **self.model_args)

    def dataset(self) -> Dataset:
        return self._drawn(self._rows(self.data))

    def loss(self, model: nn.Module, micro_batch: Any) -> LossSums:
        """The squared error of the velocity at one random time a sample, a mean over pixels."""
        x0 = self._inputs(micro_batch)
        noise, t = torch.randn_like(x0), torch.rand(len(x0))
        error = model(interpolate(x0, noise, t), t) - target_velocity(x0, noise)
        return error.square().mean(dim=tuple(range(1, error.ndim))).sum(), float(len(x0))


@dataclass(frozen=True, kw_only=True)
class FlowRouter(_OfRows):
    """Which subset a noisy image is from, at any time, by a `DiTRouter`."""

    def spec(self) -> ModelSpec:
        return _spec(
            DiTRouter, shape=list(self.shape), num_experts=len(self.data), **self.model_args
        )

    def dataset(self) -> Dataset:
        return Subsets([self._rows([one]) for one in self.data])

    def loss(self, model: nn.Module, micro_batch: Any) -> LossSums:
        """Cross-entropy."""
        rows, subset = micro_batch
        x0 = self._inputs(rows)
        noise, t = torch.randn_like(x0), torch.rand(len(x0))
        return _cross_entropy(model(interpolate(x0, noise, t), t), subset)


@dataclass(frozen=True, kw_only=True)
class Language(_Trained):
    """Next bytes of the texts in `column`, `context` bytes at a time, by a `ByteLM`."""

    column: str = "text"
    context: int = 128

    def spec(self) -> ModelSpec:
        return _spec(ByteLM, context=self.context, **self.model_args)

    def dataset(self) -> Dataset:
        return self._drawn(TextWindows(list(self.data), self.column, self.context))

    def loss(self, model: nn.Module, micro_batch: Any) -> LossSums:
        """Cross-entropy a byte, in nats."""
        logits, targets = model(micro_batch[:, :-1]).flatten(0, 1), micro_batch[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="sum"), float(targets.numel())


@dataclass(frozen=True, kw_only=True)
class LanguageRouter(_Trained):
    """Which subset a text is from, by each of its prefixes, by a `ByteRouter`."""

    column: str = "text"
    context: int = 128

    def spec(self) -> ModelSpec:
        return _spec(
            ByteRouter, context=self.context, num_experts=len(self.data), **self.model_args
        )

    def dataset(self) -> Dataset:
        return Subsets([TextWindows(one, self.column, self.context) for one in self.data])

    def loss(self, model: nn.Module, micro_batch: Any) -> LossSums:
        """Cross-entropy after each byte."""
        windows, subset = micro_batch
        logits_BTK = model.prefixes(windows[:, :-1])  # type: ignore[operator] # a ByteRouter
        each = subset[:, None].expand(logits_BTK.shape[:2]).flatten()
        return _cross_entropy(logits_BTK.flatten(0, 1), each)


@dataclass(frozen=True, kw_only=True)
class Classify(_OfRows):
    """The class in `label` of the numbers in `column`, by a `Classifier`."""

    label: str
    num_classes: int

    def spec(self) -> ModelSpec:
        return _spec(
            Classifier, shape=list(self.shape), num_classes=self.num_classes, **self.model_args
        )

    def dataset(self) -> Dataset:
        return self._drawn(self._rows(self.data, self.label))

    def loss(self, model: nn.Module, micro_batch: Any) -> LossSums:
        """Cross-entropy."""
        return _cross_entropy(model(self._inputs(micro_batch)), micro_batch[self.label].long())


@dataclass(frozen=True, kw_only=True)
class ClassifyRouter(_OfRows):
    """Which subset an input is from, by a `Classifier`."""

    def spec(self) -> ModelSpec:
        return _spec(
            Classifier, shape=list(self.shape), num_classes=len(self.data), **self.model_args
        )

    def dataset(self) -> Dataset:
        return Subsets([self._rows([one]) for one in self.data])

    def loss(self, model: nn.Module, micro_batch: Any) -> LossSums:
        """Cross-entropy."""
        rows, subset = micro_batch
        return _cross_entropy(model(self._inputs(rows)), subset)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> LossSums:
    """Its sum, the number of samples, and how many were right."""
    correct = (logits.argmax(1) == targets).sum()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, float(len(targets)), {"accuracy": correct}


def _spec(kind: type[nn.Module], **arguments: Any) -> ModelSpec:
    return ModelSpec(target=f"{kind.__module__}:{kind.__name__}", arguments=arguments)
