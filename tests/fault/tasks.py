"""Tasks that fail, for worker processes to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from elastic.core.data.memory import ArrayRows
from tests.integration.tasks import Tiny


@dataclass(frozen=True)
class OpensTwice(Tiny):
    """Its data can be opened by the aggregator and by one worker, and by nobody after them."""

    folder: str = ""

    def dataset(self) -> ArrayRows:
        number = 0
        while True:
            try:
                (Path(self.folder) / str(number)).touch(exist_ok=False)
                break
            except FileExistsError:
                number += 1
        if number >= 2:
            raise RuntimeError(f"the disk is gone, opened {number} times before")
        return super().dataset()


@dataclass(frozen=True)
class FailsOnBroken(Tiny):
    """Its loss raises where a row is broken, on every worker."""

    def loss(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        if rows["factors"].isnan().any():
            raise LookupError("no label for this row")
        return super().loss(model, rows)
