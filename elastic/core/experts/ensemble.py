"""Answers of several experts as one, weighted by a router; a callable by formula does as well.

Who is chosen is decided elsewhere (`policies.routing`): here weights arrive and are used. An expert
is called once, on those samples only that give it weight. Letters: B samples, K experts, V values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

Expert = Callable[..., torch.Tensor]
"""An `nn.Module`, or a function: arguments and result have the batch as their first axis."""


def mix_velocities(
    experts: Sequence[Expert], weights_BK: torch.Tensor, x: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """sum_k w_k v_k(x, t), shape of `x`: the velocity of the whole from those of its parts.

    Exact where the weights are P(k | x_t) over all experts (Decentralized Diffusion Models,
    arXiv 2501.05450, equation 5); see `mix` for the arguments and errors.
    """
    return mix(experts, weights_BK, x, t)


def mix_log_probabilities(
    experts: Sequence[Expert], weights_BK: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """log sum_k w_k softmax(logits_k(x)), shape (B, ..., V), of language models or classifiers."""
    log_weights_BK = weights_BK.log()
    total: torch.Tensor | None = None
    for k, rows, logits in answers(experts, weights_BK, x):
        part = logits.log_softmax(-1) + _column(log_weights_BK, rows, k, logits)
        if total is None:
            total = part.new_full((len(weights_BK), *part.shape[1:]), -torch.inf)
        total[rows] = torch.logaddexp(total[rows], part)
    assert total is not None
    return total


def mix(experts: Sequence[Expert], weights_BK: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """sum_k w_k f_k(*inputs), in the order of the experts.

    Args:
        experts: K of them.
        weights_BK: not negative; rows sum to 1 for a mean. An expert whose column is 0 is not
            called.
        inputs: each with B rows.

    Raises:
        ValueError: the shapes do not fit, or a sample gives weight to nobody.
    """
    total: torch.Tensor | None = None
    for k, rows, answer in answers(experts, weights_BK, *inputs):
        part = answer * _column(weights_BK, rows, k, answer)
        if total is None:
            total = part.new_zeros((len(weights_BK), *part.shape[1:]))
        total[rows] += part
    assert total is not None
    return total


def answers(
    experts: Sequence[Expert], weights_BK: torch.Tensor, *inputs: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(number of the expert, the rows that give it weight, its answer for them), where any do."""
    _check(experts, weights_BK, inputs)
    for k, expert in enumerate(experts):
        rows = weights_BK[:, k].nonzero()[:, 0]
        if len(rows) == len(weights_BK):
            yield k, rows, expert(*inputs)
        elif len(rows):
            yield k, rows, expert(*(one[rows] for one in inputs))


def _column(
    weights_BK: torch.Tensor, rows: torch.Tensor, k: int, like: torch.Tensor
) -> torch.Tensor:
    """The weights of expert k, to be broadcast over its answers."""
    return weights_BK[rows, k].to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def _check(
    experts: Sequence[Expert], weights_BK: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> None:
    num_rows = {len(one) for one in (weights_BK, *inputs)}
    if weights_BK.ndim != 2 or weights_BK.shape[1] != len(experts) or len(num_rows) != 1:
        raise ValueError(
            f"weights have shape {tuple(weights_BK.shape)}, inputs have"
            f" {[len(one) for one in inputs]} rows; each row needs {len(experts)} weights"
        )
    idle = (~(weights_BK > 0).any(1)).nonzero()[:, 0].tolist()
    if idle:
        raise ValueError(f"samples {idle[:8]} give weight to no expert; each needs one at least")
