"""A byte-level language model on texts of different lengths, padded; only real bytes count."""

import ast
import sysconfig
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn

from elastic import Rows, pad


class RNN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes, self.cells = nn.Embedding(256, width), nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, 256)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.cells(self.bytes(inputs))[0])
        return logits


@dataclass(frozen=True)
class PaddedText:
    data: str = "data/docstrings.parquet"  # written at first use
    width: int = 128
    longest: int = 160  # bytes of a text; what is longer is cut
    lr: float = 3e-3

    def model(self) -> nn.Module:
        return RNN(self.width)

    def dataset(self) -> Rows:
        if not Path(self.data).exists():
            write_docstrings(Path(self.data))
        return Rows(self.data, ["text"])

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [torch.tensor(list(text.encode()[: self.longest])) for text in batch["text"]]
        values, weights = pad(texts)  # (N, longest of them)
        logits, targets, real = model(values[:, :-1]), values[:, 1:], weights[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * real.flatten()).sum(), real.sum()

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in named], lr=self.lr)


def write_docstrings(path: Path) -> None:
    """Write those of the standard library's modules; safe for several processes at once."""
    texts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    texts = [text for text in texts if len(text) > 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    pq.write_table(pa.table({"text": texts}), draft, row_group_size=64, write_page_checksum=True)
    draft.replace(path)
