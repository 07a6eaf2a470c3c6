"""Measures of generated samples: known answers, and what they must tell apart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import t as student

from elastic.experts.quality import frechet, interval, measure, neighbourhoods


def test_the_distance_of_gaussians_is_that_of_the_formula() -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(500, 6)) @ random.normal(size=(6, 6))
    second = random.normal(size=(400, 6)) @ random.normal(size=(6, 6)) + 1
    cov_1, cov_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    apart = np.square(first.mean(0) - second.mean(0)).sum()
    wanted = apart + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)
    assert frechet(first, second) == pytest.approx(wanted)
    assert frechet(first, first) == pytest.approx(0, abs=1e-6)


def test_features_that_never_vary_are_no_trouble() -> None:
    flat = np.zeros((50, 3))
    assert frechet(flat, flat + 2) == pytest.approx(12)


@pytest.mark.parametrize(
    ("generated", "precision", "recall", "coverage"),
    [("same", (1, 1), (1, 1), (1, 1)), ("far", (0, 0), (0, 0), (0, 0)),
     ("half", (0.9, 1), (0.4, 0.6), (0.3, 0.6)), ("wide", (0.2, 0.8), (0.9, 1), (0.3, 1))],
)  # fmt: skip
def test_neighbours_tell_what_is_missing_from_what_is_wrong(
    generated: str,
    precision: tuple[float, float],
    recall: tuple[float, float],
    coverage: tuple[float, float],
) -> None:
    random = np.random.default_rng(1)
    left, right = random.normal(size=(2, 300, 2)) + np.array([[[0, 0]], [[30, 0]]])
    real = np.concatenate([left, right])
    made = {
        "same": real,
        "far": real + 500,
        "half": left + 0.01,
        "wide": np.concatenate([left, right]) + random.normal(size=(600, 2)) * 2,
    }[generated]
    found = neighbourhoods(made, real)
    for value, (low, high) in zip(found, (precision, recall, coverage), strict=True):
        assert low <= value <= high, found


def test_a_memoriser_is_found_out() -> None:
    random = np.random.default_rng(2)
    training, real = random.normal(size=(2, 200, 4))
    copied = measure(training, real, samples=training, training=training)
    fresh = measure(real, real, samples=real, training=training)
    assert copied.nearest == pytest.approx(0, abs=1e-6)
    assert fresh.nearest > 0.3


@pytest.mark.parametrize("num", [2, 3, 5, 20])
def test_an_interval_is_that_of_student(num: int) -> None:
    values = np.random.default_rng(num).normal(size=num)
    half = student.ppf(0.95, num - 1) * values.std(ddof=1) / np.sqrt(num)
    low, high = interval(values)
    assert high - low == pytest.approx(2 * half, rel=0.03)
    assert (high + low) / 2 == pytest.approx(values.mean())


def test_one_value_has_no_interval() -> None:
    assert interval(np.array([3.0])) == (3.0, 3.0)
