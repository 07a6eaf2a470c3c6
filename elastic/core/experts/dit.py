"""A small diffusion transformer, as the velocity of a flow and as its router.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers (arXiv 2212.09748), with
adaLN-Zero conditioning, here on the time alone. Letters: B samples, T patches, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from elastic.core.errors import ConfigError
from elastic.core.experts.transformer import Attention, widening

_NUM_FREQUENCIES = 32
_LONGEST = 1e4
_TICKS = 1000.0  # a time in [0, 1] in the steps of diffusion models, for which the waves are made


class _TimedBlock(nn.Module):
    """Shift, scale and gate of both halves come from the time; at first both add nothing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, causal=False)
        self.widening = widening(width)
        self.timing = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.timing.weight)
        nn.init.zeros_(self.timing.bias)

    def forward(self, x_BTW: torch.Tensor, time_BW: torch.Tensor) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.timing(time_BW)[:, None].chunk(
            6, dim=2
        )
        x_BTW = x_BTW + gate_1 * self.attention(self.norm(x_BTW) * (1 + scale_1) + shift_1)
        return torch.add(x_BTW, gate_2 * self.widening(self.norm(x_BTW) * (1 + scale_2) + shift_2))


class _Trunk(nn.Module):
    """Patches of an image and a time, as T vectors that know of each other."""

    def __init__(
        self, shape: Sequence[int], patch: int, *, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        channels, height, breadth = _checked(shape, patch)
        self.patch, self.grid = patch, (height // patch, breadth // patch)
        num_places = self.grid[0] * self.grid[1]
        self.embed = nn.Linear(channels * patch * patch, width)
        self.places = nn.Parameter(0.02 * torch.randn(num_places, width))
        self.time = nn.Sequential(
            nn.Linear(2 * _NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.blocks = nn.ModuleList(_TimedBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time_BW = self.time(_waves(t))
        x_BTW = self.embed(_to_patches(x, self.patch)) + self.places + time_BW[:, None]
        for block in self.blocks:
            x_BTW = block(x_BTW, time_BW)
        normed: torch.Tensor = self.norm(x_BTW)
        return normed


class DiT(nn.Module):
    """The velocity of a flow over images.

    Args:
        shape: (channels, height, width) of an image.
        patch: side of the squares that an image is cut into.
        width: numbers per square inside; a multiple of `heads`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch: int = 2,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.trunk = _Trunk(shape, patch, width=width, depth=depth, heads=heads)
        self.out = nn.Linear(width, shape[0] * patch * patch)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(x of shape (B, *shape), t of shape (B,)) -> velocity of the shape of x."""
        return _from_patches(self.out(self.trunk(x, t)), self.trunk.patch, x.shape)


class DiTRouter(nn.Module):
    """Which subset a noisy image comes from; arguments as of `DiT`."""

    def __init__(
        self,
        shape: Sequence[int],
        num_experts: int,
        *,
        patch: int = 2,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.trunk = _Trunk(shape, patch, width=width, depth=depth, heads=heads)
        self.out = nn.Linear(width * self.trunk.places.shape[0], num_experts)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(x of shape (B, *shape), t of shape (B,)) -> logits, shape (B, num_experts)."""
        logits_BK: torch.Tensor = self.out(self.trunk(x, t).flatten(1))
        return logits_BK


def _checked(shape: Sequence[int], patch: int) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[1] % patch or shape[2] % patch:
        raise ConfigError(
            f"shape is {tuple(shape)}, patch is {patch}: needs (channels, height, width), the last"
            " two multiples of patch"
        )
    return shape[0], shape[1], shape[2]


def _waves(t: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the time, shape (B, 2 * _NUM_FREQUENCIES)."""
    steps = torch.arange(_NUM_FREQUENCIES, dtype=t.dtype, device=t.device) / _NUM_FREQUENCIES
    angles = _TICKS * t[:, None] * torch.exp(-math.log(_LONGEST) * steps)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _to_patches(x: torch.Tensor, patch: int) -> torch.Tensor:
    batch, channels, height, width = x.shape
    cut = x.view(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _from_patches(patches: torch.Tensor, patch: int, shape: torch.Size) -> torch.Tensor:
    batch, channels, height, width = shape
    cut = patches.view(batch, height // patch, width // patch, channels, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(shape)
