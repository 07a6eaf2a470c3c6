"""The code of real workers, in a prime field: every sum is right, whoever is missing."""

from __future__ import annotations

import itertools
import random

import pytest

from policies.coding.field import PRIME, centred, decoding, encoding, holders_of

SEED = 7


def decoded(holders: list[tuple[int, ...]], num: int, missing: tuple[int, ...]) -> list[int]:
    """How often each part counts in what is decoded, modulo PRIME."""
    answers = decoding(num, missing, seed=SEED)
    return [
        sum(answers[one] * b for one, b in zip(row, encoding(row, seed=SEED), strict=True)) % PRIME
        for row in holders
    ]


@pytest.mark.parametrize("num", range(2, 9))
def test_each_part_counts_once_whoever_is_missing(num: int) -> None:
    for stragglers in range(num):
        holders = holders_of([1.0] * num, 2 * num + 1, stragglers)
        for size in range(stragglers + 1):
            for missing in itertools.combinations(range(num), size):
                assert decoded(holders, num, missing) == [1] * len(holders)
                assert all(decoding(num, missing, seed=SEED)[one] == 0 for one in missing)


def test_one_more_than_withstood_is_not_decoded() -> None:
    holders = holders_of([1.0] * 5, 5, 1)
    assert decoded(holders, 5, (0, 1)) != [1] * 5


def test_shares_go_by_speed_and_each_part_has_as_many_holders() -> None:
    holders = holders_of([1.0, 2.0, 3.0, 4.0, 4.0], 7, 1)
    counts = [sum(one in row for row in holders) for one in range(5)]
    assert counts == [1, 2, 3, 4, 4], "the example of the paper on heterogeneous workers"
    assert all(len(set(row)) == 2 for row in holders)
    assert decoded(holders, 5, (3,)) == [1] * 7


def test_large_numbers_of_workers_lose_no_bit() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    num, stragglers = 256, 27
    holders = holders_of([dice.uniform(0.5, 2) for _ in range(num)], 300, stragglers)
    for missing in (tuple(range(27)), tuple(dice.sample(range(num), 27)), ()):
        assert decoded(holders, num, missing) == [1] * 300


def test_nobody_missing_is_a_plain_sum() -> None:
    assert set(decoding(9, (), seed=SEED)) == {1}


@pytest.mark.parametrize("number", [0, 1, -1, 2**31 - 1, -(2**31 - 1), PRIME // 2, 2**40, -(2**40)])
def test_remainders_are_the_nearest_to_0(number: int) -> None:
    assert abs(centred(number)) <= PRIME // 2
    assert (centred(number) - number) % PRIME == 0
    if abs(number) <= 2**31 - 1:
        assert centred(number) == number


def test_the_modulus_is_prime_and_holds_every_sum() -> None:
    assert PRIME > 2 * (2**31 - 1) + 1
    assert all(PRIME % divisor for divisor in range(2, 65_537))


@pytest.mark.parametrize("num", [3, 4, 8, 16])
def test_a_difference_of_1_mostly_decodes_to_more_than_a_sum_may_be(num: int) -> None:
    """Whoever is missing, and whoever of the others is off; in other cases in each step."""
    noticed = []
    for seed in range(40):
        for holders in holders_of([1.0] * num, num, 1):
            for missing in range(num):
                answers = decoding(num, (missing,), seed=seed)
                for place, coefficient in zip(holders, encoding(holders, seed=seed), strict=True):
                    if missing not in holders:
                        noticed.append(abs(centred(answers[place] * coefficient)) > 2**28)
    assert sum(noticed) / len(noticed) == pytest.approx(7 / 8, abs=0.06)
