"""Flow matching: what holds by formula, and experts that add up to the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from elastic.core.experts.ensemble import mix_velocities
from elastic.core.experts.flow import (
    ClosedForm,
    interpolate,
    sample,
    sampling_times,
    target_velocity,
)


def test_the_path_leads_from_data_to_noise_with_the_velocity_that_is_trained() -> None:
    x0, noise = torch.randn(2, 5, 1, 3, 3)
    t = torch.rand(5)
    assert torch.equal(interpolate(x0, noise, torch.zeros(5)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(5)), noise)
    slope = (interpolate(x0, noise, t + 0.25) - interpolate(x0, noise, t)) / 0.25
    torch.testing.assert_close(slope, target_velocity(x0, noise), atol=1e-5, rtol=0)


def test_the_times_run_from_noise_to_data() -> None:
    times = sampling_times(50)
    assert (len(times), times[0], times[-1]) == (51, 1, 0)
    torch.testing.assert_close(times[:-1] - times[1:], torch.full((50,), 0.02))
    with pytest.raises(ValueError, match="num_steps is 0"):
        sampling_times(0)


def test_the_data_of_one_point_is_reached_exactly() -> None:
    point = torch.randn(1, 4, dtype=torch.float64)
    noise = torch.randn(6, 4, dtype=torch.float64)
    reached = sample(ClosedForm(point).velocity, noise, 7)
    torch.testing.assert_close(reached, point.expand(6, 4))


def test_samples_of_the_closed_form_are_the_data() -> None:
    data = torch.tensor([[-2.0], [2.0], [5.0]], dtype=torch.float64)
    noise = torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reached = sample(ClosedForm(data).velocity, noise, 200)
    assert (reached - data.T).abs().min(1).values.max() < 1e-6
    assert {round(one) for one in reached[:, 0].tolist()} == {-2, 2, 5}


def test_experts_by_formula_and_their_router_give_the_velocity_of_the_whole() -> None:
    """Decentralized Diffusion Models, equation 5, on the digits: the oracle of the combination."""
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    pixels = load_digits().data / 8 - 1
    subset_N = torch.from_numpy(KMeans(8, n_init=1, random_state=0).fit_predict(pixels)).long()
    data = torch.from_numpy(pixels).view(-1, 1, 8, 8)
    whole = ClosedForm(data, subset_N)
    experts = [ClosedForm(data[subset_N == k]).velocity for k in range(8)]
    worst = 0.0
    for time in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        chosen = torch.randint(len(data), (16,), generator=generator)
        noise = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=generator)
        t = torch.full((16,), time, dtype=torch.float64)
        x = interpolate(data[chosen], noise, t)
        weights_BK = whole.logits(x, t).softmax(1)
        error = mix_velocities(experts, weights_BK, x, t) - whole.velocity(x, t)
        worst = max(worst, float(error.abs().max()))
    assert worst <= 1e-10


def test_a_router_by_formula_needs_the_subsets() -> None:
    with pytest.raises(ValueError, match="subset_N is None"):
        ClosedForm(torch.zeros(2, 1)).logits(torch.zeros(1, 1), torch.ones(1))
