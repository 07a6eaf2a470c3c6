"""A small network with BatchNorm and dropout on scikit-learn's 8 x 8 handwritten digits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from elastic.core.data.memory import ArrayRows
from elastic.core.task import LossSums


class Digits:
    def __init__(self, width: int = 16, dropout: float = 0.2, lr: float = 0.05) -> None:
        self.width, self.dropout, self.lr = width, dropout, lr

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, self.width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
            nn.Conv2d(self.width, 2 * self.width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * self.width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(2 * self.width * 4 * 4, 10),
        )

    def dataset(self) -> ArrayRows:
        from sklearn.datasets import load_digits  # slow to import, and only workers need it

        digits = load_digits()
        images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)  # (1797, 1, 8, 8)
        return ArrayRows(images=images, labels=torch.from_numpy(digits.target).long())

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossSums:
        logits, labels = model(batch["images"]), batch["labels"]
        correct = (logits.argmax(dim=1) == labels).sum()  # reported over the sum of the weights
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels), {"accuracy": correct}

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], lr=self.lr, momentum=0.9)
