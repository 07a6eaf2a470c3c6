"""Answers of several experts as one: sums, samples that choose differently, mistakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.experts.ensemble import mix, mix_log_probabilities


class Scale:
    """x -> factor * x; counts the samples that it was asked for."""

    def __init__(self, factor: float) -> None:
        self.factor, self.num_asked = factor, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.num_asked += len(x)
        return self.factor * x


def test_an_expert_is_asked_for_the_samples_that_weigh_it_and_no_other() -> None:
    experts = [Scale(1), Scale(10), Scale(100)]
    weights_BK = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0, 1, 0]])
    mixed = mix(experts, weights_BK, torch.ones(3, 2))
    assert mixed.tolist() == [[1, 1], [7.75, 7.75], [10, 10]]
    assert [one.num_asked for one in experts] == [2, 2, 0]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_log_probabilities_are_those_of_the_mixture(num_experts: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_KBTV = torch.randn(num_experts, rows, 4, 7, generator=generator, dtype=torch.float64)
    weights_BK = torch.rand(rows, num_experts, generator=generator, dtype=torch.float64)
    weights_BK[:, 1:] *= (weights_BK[:, 1:] > 0.5).double()
    weights_BK /= weights_BK.sum(1, keepdim=True)
    experts = [lambda rows, k=k: logits_KBTV[k, rows] for k in range(num_experts)]
    mixed = mix_log_probabilities(experts, weights_BK, torch.arange(rows))
    wanted = torch.einsum("bk,kbtv->btv", weights_BK, logits_KBTV.softmax(-1)).log()
    torch.testing.assert_close(mixed, wanted)


@pytest.mark.parametrize(
    ("weights_BK", "message"),
    [
        (torch.ones(2, 3), r"shape \(2, 3\).*each row needs 2 weights"),
        (torch.ones(3, 2), r"shape \(3, 2\)"),
        (torch.tensor([[1.0, 0], [0, 0]]), r"samples \[1\] give weight to no expert"),
        (torch.full((2, 2), torch.nan), r"samples \[0, 1\] give weight"),
    ],
    ids=["columns", "rows", "nobody", "nan"],
)
def test_weights_that_do_not_fit_are_refused(weights_BK: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix([Scale(1), Scale(2)], weights_BK, torch.ones(2, 2))
