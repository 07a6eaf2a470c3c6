"""A small transformer over bytes, as a language model and as its router.

Letters: B samples, T bytes, W width, K experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from elastic.core.errors import ConfigError
from elastic.core.experts.transformer import Block

NUM_BYTES = 256


class _Trunk(nn.Module):
    """Bytes as T vectors, each of which knows those before it."""

    def __init__(self, context: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(NUM_BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        num, context = tokens.shape[1], self.places.num_embeddings
        if not 1 <= num <= context:
            raise ConfigError(f"{num} bytes; the model needs 1 to {context} (context)")
        x_BTW = self.bytes(tokens) + self.places.weight[:num]
        normed: torch.Tensor = self.norm(self.blocks(x_BTW))
        return normed


class ByteLM(nn.Module):
    """A language model over bytes; the output layer is tied to the input's.

    Args:
        context: bytes that the model sees at most.
        width: numbers per byte inside; a multiple of `heads`.
    """

    def __init__(self, context: int, *, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.trunk = _Trunk(context, width=width, depth=depth, heads=heads)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Bytes (B, T), int64 -> logits of each next byte, shape (B, T, 256)."""
        return F.linear(self.trunk(tokens), self.trunk.bytes.weight)


class ByteRouter(nn.Module):
    """Which subset a text comes from, by what is known of it so far; arguments as of `ByteLM`."""

    def __init__(
        self, context: int, num_experts: int, *, width: int = 64, depth: int = 1, heads: int = 2
    ) -> None:
        super().__init__()
        self.trunk = _Trunk(context, width=width, depth=depth, heads=heads)
        self.out = nn.Linear(width, num_experts)

    def prefixes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after each byte, shape (B, T, K): what all prefixes give, in one pass."""
        x_BTW = self.trunk(tokens)
        num_T1 = torch.arange(1, x_BTW.shape[1] + 1, device=x_BTW.device)[:, None]
        logits_BTK: torch.Tensor = self.out(x_BTW.cumsum(1) / num_T1)
        return logits_BTK

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Bytes (B, T), int64 -> logits, shape (B, num_experts)."""
        return self.prefixes(tokens)[:, -1]
