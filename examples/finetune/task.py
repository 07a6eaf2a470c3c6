"""A new head on a frozen backbone: what was learned on the digits 0 to 4 reads all ten.

`write_pretrained` trains the first model in plain PyTorch and writes its weights as safetensors, as
one would get them from elsewhere.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from elastic.core.data.memory import ArrayRows
from elastic.core.task import LossSums


class Reader(nn.Module):
    """Two convolutions, and a linear head for so many classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * 4 * 4, num_classes)

    def forward(self, images_N188: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.backbone(images_N188))
        return logits


class NewHead:
    """All ten digits. The backbone comes from `init_from` and stays as it is."""

    def __init__(self, lr: float = 0.01) -> None:
        self.lr = lr

    def model(self) -> nn.Module:
        model = Reader(num_classes=10)
        model.backbone.requires_grad_(False)
        return model

    def dataset(self) -> ArrayRows:
        return digits(10)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossSums:
        logits, labels = model(batch["images"]), batch["labels"]
        correct = (logits.argmax(dim=1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels), {"accuracy": correct}

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in named if p.requires_grad], lr=self.lr)


def digits(num_classes: int) -> ArrayRows:
    """scikit-learn's handwritten digits below `num_classes`."""
    from sklearn.datasets import load_digits  # slow to import, and only workers need it

    images, labels = load_digits(return_X_y=True)
    few = labels < num_classes
    images_N188 = torch.from_numpy(images[few] / 16.0).float().reshape(-1, 1, 8, 8)
    return ArrayRows(images=images_N188, labels=torch.from_numpy(labels[few]).long())


def write_pretrained(path: Path, num_steps: int = 60) -> None:
    """Train on the digits 0 to 4 and write the weights."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model, data = Reader(num_classes=5), digits(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        batch = data.fetch(torch.randint(len(data), (128,)).numpy())
        loss = F.cross_entropy(model(batch["images"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)


if __name__ == "__main__":
    write_pretrained(Path(sys.argv[1]))
