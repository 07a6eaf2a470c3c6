"""A small classifier whose inner features images are judged by: it knows what matters in them.

Trained on training data only, in this process, from a seed; its accuracy on other data says what it
is worth. Never sees a generated image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_WIDTHS = (64, 32)
_STEPS = 1500
_BATCH = 200
_LR = 1e-3


class Judge(nn.Module):
    """An MLP over pixels in [-1, 1]; its features are those before the last layer."""

    def __init__(self, num_inputs: int, num_classes: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Flatten(),
            nn.Linear(num_inputs, _WIDTHS[0]),
            nn.ReLU(),
            nn.Linear(_WIDTHS[0], _WIDTHS[1]),
            nn.ReLU(),
        )
        self.out = nn.Linear(_WIDTHS[1], num_classes)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.inner((x + 1) / 2)
        return inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the classes."""
        logits: torch.Tensor = self.out(self._inner(x))
        return logits

    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (N, 32), float64."""
        inner: torch.Tensor = self._inner(x).double()
        return inner

    @torch.no_grad()
    def accuracy(self, x: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of right answers."""
        return float((self(x).argmax(1) == labels).float().mean())


def train_judge(x: torch.Tensor, labels: torch.Tensor, *, seed: int = 0) -> Judge:
    """Train on x, shape (N, ...), and labels from 0, shape (N,)."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        judge = Judge(x[0].numel(), int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(judge.parameters(), _LR, weight_decay=0)
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _LR * (1 - step / _STEPS)
            chosen = torch.randint(len(x), (min(_BATCH, len(x)),))
            loss = F.cross_entropy(judge(x[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return judge.eval()
