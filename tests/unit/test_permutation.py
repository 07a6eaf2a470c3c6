"""The shuffle: a bijection for every size, named by its key, the same for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.core.permutation import FEW_POSITIONS, MAX_NUM, derive_key, permute

KEYS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 255, 1000, 4097])
def test_every_number_is_hit_once(num: int) -> None:
    for key in range(5):
        assert sorted(permute(np.arange(num), num, key).tolist()) == list(range(num))


@given(num=st.integers(1, 3000), key=KEYS)
def test_it_is_a_bijection_for_any_size_and_key(num: int, key: int) -> None:
    assert len(set(permute(np.arange(num), num, key).tolist())) == num


@given(num=st.integers(2, 10**15), key=KEYS, seed=st.integers(0, 2**32))
def test_few_positions_and_many_go_the_same_way(num: int, key: int, seed: int) -> None:
    many = np.random.default_rng(seed).integers(0, num, size=3 * FEW_POSITIONS)
    one_by_one = [permute(many[i : i + 1], num, key)[0] for i in range(len(many))]
    assert permute(many, num, key).tolist() == one_by_one


@pytest.mark.parametrize("num", [10**12, 10**15, MAX_NUM])
def test_huge_sets_stay_in_range_and_spread(num: int) -> None:
    images = permute(np.arange(20_000), num, key=1)
    assert images.min() >= 0
    assert images.max() < num
    assert len(np.unique(images)) == len(images)
    counts = np.bincount(images // (num // 10 + 1), minlength=10)
    assert np.abs(counts - 2000).max() < 250  # about 6 standard deviations


def test_each_position_goes_anywhere_over_the_keys() -> None:
    num, num_keys = 10, 4000
    images = np.stack([permute(np.arange(num), num, key) for key in range(num_keys)])
    counts = np.stack([np.bincount(column, minlength=num) for column in images.T])
    assert np.abs(counts - num_keys / num).max() < 120  # about 6 standard deviations
    assert len({tuple(row) for row in images.tolist()}) > 0.99 * num_keys


def test_neighbours_do_not_stay_neighbours() -> None:
    images = permute(np.arange(50_000), 50_000, key=3).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03


def test_all_orders_of_three_occur() -> None:
    assert len({tuple(permute(np.arange(3), 3, key).tolist()) for key in range(100)}) == 6


def test_the_values_never_change() -> None:
    assert permute(np.arange(10), 10, 42).tolist() == [1, 6, 5, 9, 4, 8, 0, 7, 2, 3]
    ends = np.array([0, 1, 10**12 - 1])
    assert permute(ends, 10**12, 42).tolist() == [802565494947, 460383143896, 210843121887]
    assert derive_key() == 13020603013274838756
    assert derive_key("epoch", 0, 3) == 16192978710785989061
    assert derive_key(-1) == 15422518530090533802


def test_keys_depend_on_type_order_and_boundaries() -> None:
    parts = [(1, 2), (2, 1), (12,), ("1", 2), ("12",), ("1", "2"), ("", "12"), ("12", ""), ()]
    assert len({derive_key(*part) for part in parts}) == len(parts)


def test_shape_is_kept_and_the_input_untouched() -> None:
    positions = np.arange(60).reshape(3, 20)
    assert permute(positions, 60, 0).shape == (3, 20)
    assert permute(positions[:0], 60, 0).shape == (0, 20)
    assert positions.tolist() == np.arange(60).reshape(3, 20).tolist()


@pytest.mark.parametrize(
    ("positions", "num"), [([0], 0), ([0], MAX_NUM + 1), ([5], 5), ([-1], 5)], ids=str
)
def test_mistakes_are_refused(positions: list[int], num: int) -> None:
    with pytest.raises(ValueError, match=r"num|positions"):
        permute(np.array(positions), num, 0)
