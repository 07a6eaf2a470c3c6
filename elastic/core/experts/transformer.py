"""What transformers over patches, bytes or anything else have in common.

Letters: B samples, T places of a sequence, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from elastic.core.errors import ConfigError


def check_heads(width: int, heads: int) -> None:
    """Refuse a width that the heads do not share evenly."""
    if width % heads:
        raise ConfigError(f"width is {width}, heads is {heads}: needs a multiple of heads")


class Attention(nn.Module):
    """Every place looks at all others, or at those before it."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.causal = heads, causal
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTW: torch.Tensor) -> torch.Tensor:
        """Shape (B, T, W)."""
        batch, time, width = x_BTW.shape
        parts = self.qkv(x_BTW).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        mixed: torch.Tensor = self.mix(found.transpose(1, 2).reshape(batch, time, width))
        return mixed


def widening(width: int) -> nn.Sequential:
    """The network that each place goes through alone."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Attention and a widening network, each added to what came in."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.widening = widening(width)

    def forward(self, x_BTW: torch.Tensor) -> torch.Tensor:
        """Shape (B, T, W)."""
        x_BTW = x_BTW + self.attention(self.norm_1(x_BTW))
        return torch.add(x_BTW, self.widening(self.norm_2(x_BTW)))
