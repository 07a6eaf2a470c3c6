"""k-means: groups that are there are found, even subsets are even, the seed decides."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from elastic.core.experts.kmeans import even_prices, kmeans, squares, two_step

CORNERS = np.array([[0.0, 0], [10, 0], [0, 10]])


def groups(*sizes: int, seed: int = 3) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    return np.concatenate(
        [corner + random.normal(size=(n, 2)) for corner, n in zip(CORNERS, sizes, strict=True)]
    )


def test_groups_are_found() -> None:
    rows_NF = groups(50, 50, 50)
    for seed in range(5):
        centres_KF = kmeans(rows_NF, 3, seed=seed)
        found = squares(CORNERS, centres_KF)
        assert sorted(found.argmin(1).tolist()) == [0, 1, 2]
        assert found.min(1).max() < 0.5


def test_a_centre_is_the_mean_of_its_rows() -> None:
    rows_NF = groups(40, 30, 20)
    centres_KF = kmeans(rows_NF, 4)
    nearest_N = squares(rows_NF, centres_KF).argmin(1)
    means = [rows_NF[nearest_N == k].mean(0) for k in range(4)]
    np.testing.assert_allclose(np.stack(means), centres_KF)


def test_two_steps_give_a_rare_group_its_own_centre() -> None:
    """One step spends its centres on what is frequent, two on what is different."""
    rows_NF = groups(1000, 1000, 6)
    centres_KF = two_step(rows_NF, 3, num_fine=64)
    assert squares(CORNERS, centres_KF).min(1).max() < 2
    assert two_step(rows_NF, 3, num_fine=5000).tolist() == kmeans(rows_NF, 3).tolist()


def test_the_seed_decides() -> None:
    rows_NF = np.random.default_rng(0).normal(size=(200, 3))
    assert np.array_equal(kmeans(rows_NF, 8, seed=1), kmeans(rows_NF, 8, seed=1))
    assert not np.array_equal(kmeans(rows_NF, 8, seed=1), kmeans(rows_NF, 8, seed=2))


@pytest.mark.parametrize("sizes", [(300, 200, 100), (500, 50, 50)], ids=str)
def test_prices_make_subsets_even(sizes: tuple[int, int, int]) -> None:
    rows_NF = groups(*sizes)
    squares_NK = squares(rows_NF, kmeans(rows_NF, 3))
    before = np.bincount(squares_NK.argmin(1), minlength=3)
    after = np.bincount((squares_NK + even_prices(squares_NK)).argmin(1), minlength=3)
    assert before.max() > 1.4 * len(rows_NF) / 3
    assert np.abs(after - len(rows_NF) / 3).max() <= 0.05 * len(rows_NF) / 3


def test_equal_rows_are_no_trouble() -> None:
    assert kmeans(np.ones((5, 2)), 3).tolist() == [[1, 1]] * 3


def test_more_centres_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="4 centres for 3 rows"):
        kmeans(np.ones((3, 2)), 4)
