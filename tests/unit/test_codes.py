"""Codes of one round: the published vectors, all patterns of small codes, refusals, exactness."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.coding.codes import (
    Code,
    Decoded,
    Floats,
    Linear,
    Repetition,
    Undecodable,
    c_code,
    check_code,
    crc,
    crc_of,
    cyclic_c_code,
    cyclic_mds,
    even_allocation,
    frc,
)
from policies.coding.exact import (
    MAX_RESIDUE,
    Inexact,
    combine,
    decode_sum,
    limb_bits,
    precision,
    split,
)
from policies.coding.parts import check_micro_batches, micro_batches_of


def matrix_of(code: Code) -> Floats:
    return np.array([code.row(worker) for worker in range(code.num_workers)])


def coefficients(code: Code, stragglers: set[int]) -> list[float]:
    decoded = code.decode(sorted(set(range(code.num_workers)) - stragglers))
    assert isinstance(decoded, Decoded), decoded
    return [float(one) for one in decoded.coefficients_N]


THREE = Linear(np.array([[0.5, 1, 0], [0, 1, -1], [0.5, 0, 1]]), 1)


@pytest.mark.parametrize(("straggler", "row"), [(0, [0, 1, 2]), (1, [1, 0, 1]), (2, [2, -1, 0])])
def test_the_code_of_three_workers(straggler: int, row: list[float]) -> None:
    assert coefficients(THREE, {straggler}) == pytest.approx(row)


def test_repetition_for_four_workers() -> None:
    code = frc(4, 1, hosts=["a", "b", "a", "b"])
    assert np.repeat(matrix_of(code), 2, axis=1).tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    assert coefficients(code, {1, 2}) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("straggler", "row"),
    [
        (0, [0, 1, 5 / 3, 1 / 6]),
        (1, [-2, 0, 1, 1 / 2]),
        (2, [-5, -1.5, 0, 1]),
        (3, [1, 1.5, 2, 0]),
    ],
)
def test_cyclic_repetition_for_four_workers(straggler: int, row: list[float]) -> None:
    code = crc_of(np.array([[1.0, 2, 3, -6]]))
    expected = [[1, -1 / 2, 0, 0], [0, 1, -2 / 3, 0], [0, 0, 1, 1 / 2], [6, 0, 0, 1]]
    assert code.matrix_NK == pytest.approx(np.array(expected))
    assert coefficients(code, {straggler}) == pytest.approx(row)


def test_a_bad_check_is_refused_where_it_fails() -> None:
    holders = np.array([[worker, (worker + 1) % 4] for worker in range(4)])
    code = check_code(np.array([[1.0, 1, 1, 1], [0, 1, 2, 3]]), holders)
    refused = code.decode([0, 2, 3])
    assert isinstance(refused, Undecodable)
    assert "without 1 the sum misses a part by 1" in refused.reason
    assert coefficients(code, {2})[2] == 0


def test_shares_of_unequal_workers() -> None:
    assert even_allocation([1, 2, 3, 4, 4], num_parts=7, num_stragglers=1) == [1, 2, 3, 4, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=9), st.integers(1, 20), st.data())
def test_shares_add_up_and_nobody_gets_more_than_all(
    speeds: list[float], num_parts: int, data: st.DataObject
) -> None:
    stragglers = data.draw(st.integers(0, len(speeds) - 1))
    counts = even_allocation(speeds, num_parts, stragglers)
    assert sum(counts) == num_parts * (stragglers + 1)
    assert max(counts) <= num_parts
    order = sorted(range(len(speeds)), key=lambda worker: speeds[worker])
    assert all(counts[a] <= counts[b] + 1 for a, b in pairwise(order))


@pytest.mark.parametrize(
    ("num_workers", "num_stragglers", "generator"),
    [(5, 2, [1, 1.618034, 1]), (8, 3, [1, 2.414214, 2.414214, 1])],
)
def test_cyclic_mds(num_workers: int, num_stragglers: int, generator: list[float]) -> None:
    code = cyclic_mds(num_workers, num_stragglers)
    assert code.matrix_NK[0, : num_stragglers + 1] == pytest.approx(generator, abs=1e-6)
    assert not code.matrix_NK[0, num_stragglers + 1 :].any()


def small_codes() -> list[Code]:
    codes: list[Code] = []
    for num in range(2, 8):
        for stragglers in range(num):
            codes += [frc(num, stragglers), crc(num, stragglers), cyclic_c_code(num, stragglers)]
            if (num - stragglers) % 2:
                codes.append(cyclic_mds(num, stragglers))
    codes += [c_code(1, [1, 2, 3, 4, 4], 7), c_code(2, [5, 1, 3, 3, 6, 3], 7)]
    return codes


def test_every_pattern_of_small_codes() -> None:
    num_decoded = num_refused = 0
    for code in small_codes():
        matrix_NK, workers = matrix_of(code), range(code.num_workers)
        for size in range(code.num_workers + 1):
            for missing in combinations(workers, size):
                there = sorted(set(workers) - set(missing))
                decoded = code.decode(there)
                if isinstance(decoded, Decoded):
                    row = decoded.coefficients_N
                    assert row @ matrix_NK == pytest.approx(np.ones(matrix_NK.shape[1]), abs=1e-9)
                    assert not row[list(missing)].any()
                    num_decoded += 1
                else:
                    assert size > code.num_stragglers, decoded
                    if isinstance(code, Repetition):
                        assert not matrix_NK[there].any(axis=0).all()
                    num_refused += 1
    assert num_decoded > 1500
    assert num_refused > 1500


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.data())
def test_integers_go_through_a_code_unchanged(num_workers: int, data: st.DataObject) -> None:
    stragglers = data.draw(st.integers(0, num_workers - 1))
    make = data.draw(st.sampled_from([crc, cyclic_c_code]))
    code = make(num_workers, stragglers, seed=data.draw(st.integers(0, 99)))
    try:
        limbs = precision(code).num_limbs
    except ValueError:
        return  # a rare draw; tested below
    dice = np.random.default_rng(data.draw(st.integers(0, 99)))
    top = 2**31 // num_workers - 1
    parts_KE = dice.integers(-top, top, (num_workers, 50), np.int32)
    missing = data.draw(st.sets(st.integers(0, num_workers - 1), max_size=stragglers))
    there = data.draw(st.permutations(sorted(set(range(num_workers)) - missing)))
    answers_LAE = np.stack([combine(code.row(one), parts_KE, limbs) for one in there], axis=1)
    decoded = code.decode(there)
    assert isinstance(decoded, Decoded), decoded
    total_E = decode_sum(code, decoded, there, answers_LAE)
    if isinstance(total_E, Inexact):
        assert "may be off by" in total_E.reason
    else:
        assert (total_E == parts_KE.sum(axis=0, dtype=np.int64)).all()


def test_a_wrong_answer_leaves_a_residue() -> None:
    code = THREE
    decoded = code.decode([0, 1])
    assert isinstance(decoded, Decoded)
    answers_LAE = np.array([[[0.0], [0.6875]]])
    refused = decode_sum(code, decoded, [1, 0], answers_LAE)
    assert isinstance(refused, Inexact)
    assert "0.375 from the nearest integer" in refused.reason
    early = decode_sum(code, decoded, [1], answers_LAE[:, :1])
    assert early == Inexact("the answers of workers [0] are wanted and not there")


@pytest.mark.parametrize("num_limbs", [1, 2, 3])
def test_limbs_make_up_the_integer(num_limbs: int) -> None:
    whole_E = np.array([0, 1, -1, 32767, 32768, -32768, -32769, 2**31 - 1, -(2**31)])
    limbs = split(whole_E, num_limbs)
    assert len(limbs) == num_limbs
    bits = limb_bits(num_limbs)
    assert (sum(limb << (bits * place) for place, limb in enumerate(limbs)) == whole_E).all()
    assert all(np.abs(limb).max() <= 2 ** (bits - 1) for limb in limbs)


@pytest.mark.parametrize(("num", "limbs"), [(8, 1), (64, 2)])
def test_large_codes_need_two_limbs_and_are_then_exact(num: int, limbs: int) -> None:
    found = precision(crc(num, num // 9))
    assert found.num_limbs == limbs
    assert found.bound < MAX_RESIDUE


def test_a_code_that_cannot_be_exact_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"31 bits in use a number may be off by .*; fewer str"):
        precision(cyclic_mds(56, 13))
    with pytest.raises(ValueError, match=r"128 workers for 27 .* cannot be decoded in float64"):
        precision(cyclic_mds(128, 27))
    assert precision(frc(128, 27)).num_limbs == 0


def test_groups_lie_on_different_hosts() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    for group in frc(6, 2, hosts).groups:
        assert len({hosts[worker] for worker in group}) == 3


def test_groups_are_of_even_size_and_hold_everybody() -> None:
    groups = frc(256, 9).groups
    assert sorted(worker for group in groups for worker in group) == list(range(256))
    assert {len(group) for group in groups} == {10, 11}
    assert groups == frc(256, 9).groups


def test_a_repetition_is_there_when_its_last_group_is() -> None:
    code, ends_N = frc(4, 1, hosts=["a", "b"] * 2), np.array([1.0, 9.0, 3.0, 2.0])
    assert code.covered_s(ends_N) == 2.0
    assert not code.covers(ends_N < 2.0)
    assert code.covers(ends_N <= 2.0)


@pytest.mark.parametrize("num", [-1, 4])
def test_impossible_numbers_of_stragglers(num: int) -> None:
    for make in (frc, crc, cyclic_c_code, cyclic_mds):
        with pytest.raises(ValueError, match=f"{num} stragglers of 4 workers: it must be 0 to 3"):
            make(4, num)


def test_cyclic_mds_of_even_difference() -> None:
    with pytest.raises(ValueError, match="n=6, s=2"):
        cyclic_mds(6, 2)


@pytest.mark.parametrize(("num", "nearest"), [(0, 12), (5, 12), (17, 12), (18, 24), (31, 36)])
def test_micro_batches_that_cannot_be_cut(num: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=f"is {num}: crc needs a multiple of 12, .* is {nearest}$"):
        check_micro_batches(num, 12, "crc")


def test_parts_are_ranges_of_micro_batches() -> None:
    check_micro_batches(24, 12, "crc")
    assert [list(micro_batches_of(part, 12, 24)) for part in (0, 11)] == [[0, 1], [22, 23]]
