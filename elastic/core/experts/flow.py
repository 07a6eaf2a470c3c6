"""Flow matching: the straight path between data and noise, its velocity, and sampling along it.

Time t is 1 at pure noise and 0 at data. A velocity is any callable of (x, t); this module never
looks at how it comes about, and never draws a random number. Letters: B samples of a batch, N
samples of a data set, D numbers of one sample, K subsets.

Source: Lipman et al., Flow Matching (arXiv 2210.02747); Decentralized Diffusion Models
(arXiv 2501.05450), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x of shape (B, *shape), t of shape (B,)) -> velocity of shape (B, *shape)."""


def along(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`t` of shape (B,), to be multiplied with `x` of shape (B, *shape)."""
    return t.view(-1, *(1,) * (x.ndim - 1))


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x0 + t noise, the sample at time t of the path."""
    s = along(t, x0)
    return (1 - s) * x0 + s * noise


def target_velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What a velocity is trained to give on that path, at any t."""
    return noise - x0


def sampling_times(num_steps: int) -> torch.Tensor:
    """The times from 1 to 0 between which a sample is moved, float32, shape (num_steps + 1,).

    Raises:
        ValueError: num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, must be at least 1")
    return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64).float()


@torch.no_grad()
def sample(velocity: Velocity, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Move `noise`, shape (B, *shape), to data in `num_steps` Euler steps of equal length."""
    x, times = noise, sampling_times(num_steps).to(noise)
    for t, following in pairwise(times):
        x = x - (t - following) * velocity(x, t.expand(len(x)))
    return x


class ClosedForm:
    """The best velocity and router for a finite data set, by formula: nothing is learned.

    The velocity reproduces the data set, so it is an oracle for tests and the ceiling of a router's
    accuracy, not a model to use.

    Args:
        data: shape (N, *shape); its dtype is computed in.
        subset_N: the subset of each sample, from 0; for `logits` only.
    """

    def __init__(self, data: torch.Tensor, subset_N: torch.Tensor | None = None) -> None:
        self._data_ND = data.flatten(1)
        self._subset_N = subset_N

    def _log_posterior(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Log of P(sample | x_t = x), shape (B, N), up to a constant."""
        x_BD, t_B1 = x.flatten(1), t[:, None]
        rest_BND = x_BD[:, None] - (1 - t_B1[:, None]) * self._data_ND
        return -rest_BND.square().sum(2) / (2 * t_B1.square())

    def velocity(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """u_t(x) = (x - E[x0 | x_t = x]) / t, since noise = (x - (1 - t) x0) / t. Needs t > 0."""
        mean_BD = self._log_posterior(x, t).softmax(1) @ self._data_ND
        return (x - mean_BD.view_as(x)) / along(t, x)

    def logits(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Log of P(subset | x_t = x) up to a constant, shape (B, K): the best possible router."""
        if self._subset_N is None:
            raise ValueError("subset_N is None; the router needs the subset of every sample")
        posterior_BN = self._log_posterior(x, t)
        columns = [
            posterior_BN[:, self._subset_N == k].logsumexp(1)
            for k in range(int(self._subset_N.max()) + 1)
        ]
        return torch.stack(columns, 1)
