"""A byte-level GPT trained on the source of the Python standard library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from elastic.core.data.text import TextWindows
from elastic.core.errors import ConfigError
from examples.stdlib_lm.texts import stdlib_texts, write_texts

# layers, width, heads
SIZES = {"small": (4, 128, 4), "10m": (6, 384, 6), "100m": (8, 1024, 16)}


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.mix(y.transpose(1, 2).flatten(2)))
        return torch.add(x, self.drop(self.down(F.gelu(self.up(self.norm_2(x))))))


class GPT(nn.Module):
    def __init__(self, size: str, context: int, dropout: float) -> None:
        super().__init__()
        layers, width, heads = SIZES[size]
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # matrices that add to the residual stream start smaller, as in GPT-2
                adds = name.endswith(("mix.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.bytes(inputs) + self.places.weight[: inputs.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.bytes.weight)  # the output layer is tied


@dataclass(frozen=True)
class StdlibLM:
    size: str = "small"  # a key of SIZES
    data: str = "data/stdlib.parquet"  # written at first use
    context: int = 128
    dropout: float = 0.0
    lr: float = 1e-3
    warmup_steps: int = 20

    def model(self) -> nn.Module:
        if self.size not in SIZES:
            raise ConfigError(f"task_args.size is {self.size!r}, allowed: {', '.join(SIZES)}")
        return GPT(self.size, self.context, self.dropout)

    def dataset(self) -> TextWindows:
        if not Path(self.data).exists():
            write_texts(stdlib_texts(), Path(self.data))
        return TextWindows(self.data, context=self.context)

    def loss(self, model: nn.Module, windows: torch.Tensor) -> tuple[torch.Tensor, float]:
        logits, targets = model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="sum"), float(targets.numel())

    def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        matrices = {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.1}
        vectors = {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}
        return torch.optim.AdamW([matrices, vectors], self.lr, betas=(0.9, 0.95), fused=True)

    def schedule(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup_steps))
