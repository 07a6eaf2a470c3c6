"""An image classifier with BatchNorm on PNG files that lie as bytes in a Parquet column."""

import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from elastic import Rows
from elastic.core.task import LossSums


class Pictures(Rows):
    """Rows with the column `png` decoded. Row groups are read ahead; decoding is done here."""

    def fetch(self, indices: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, torch.Tensor]:
        rows = super().fetch(indices)
        pixels = [np.asarray(Image.open(io.BytesIO(png))) for png in rows["png"]]
        images = torch.from_numpy(np.stack(pixels)).unsqueeze(1) / 255  # (N, 1, height, width)
        return {"images": images, "labels": rows["label"]}


@dataclass(frozen=True)
class Images:
    data: str = "data/digits.parquet"  # written at first use
    width: int = 16
    shift: int = 1  # pixels by which an image is moved at random
    lr: float = 0.05

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, self.width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
            nn.Conv2d(self.width, 2 * self.width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * self.width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * self.width * 4 * 4, 10),
        )

    def dataset(self) -> Pictures:
        if not Path(self.data).exists():
            write_digits(Path(self.data))
        return Pictures(self.data)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        down, right = torch.randint(-self.shift, self.shift + 1, (2,)).tolist()
        moved = torch.roll(batch["images"], (down, right), dims=(2, 3))
        losses = F.cross_entropy(model(moved), batch["labels"], reduction="sum")
        return losses, float(len(batch["labels"]))

    def evaluate(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossSums:
        logits, labels = model(batch["images"]), batch["labels"]
        correct = (logits.argmax(dim=1) == labels).sum()
        losses = F.cross_entropy(logits, labels, reduction="sum")
        return losses, float(len(labels)), {"accuracy": correct}

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], lr=self.lr, momentum=0.9)


def write_digits(path: Path) -> None:
    """Write scikit-learn's digits as PNG; safe for several processes at once."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    table = pa.table({"png": [png(image) for image in digits.images], "label": digits.target})
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    pq.write_table(table, draft, row_group_size=64, write_page_checksum=True)
    draft.replace(path)


def png(image: np.ndarray[Any, Any]) -> bytes:
    """An image of shades 0 to 16, encoded."""
    out = io.BytesIO()
    Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(out, format="PNG")
    return out.getvalue()
