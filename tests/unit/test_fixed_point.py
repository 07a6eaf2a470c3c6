"""Sums are exact: any order and grouping gives the same integers, and nothing leaves int32."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.fixed_point import (
    BLOCK,
    LIMIT,
    MAX_EXPONENT,
    TARGET_BITS,
    Encoder,
    add_slots,
    decode,
    exponents_for,
    overflowing,
)
from elastic.core.layout import Layout, make_layout

INT_MIN = -(2**31)
LAYOUT = make_layout(
    [[("a", (7, 9)), ("b", (40,))], [("c", (3,)), ("d", ())]],
    buffers=[("mean", (5,)), ("var", (5,))],
    chunk_elements=48,
)
NUM_CHUNKS = len(LAYOUT.chunks)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SEEDS = st.integers(0, 2**32 - 1)


def draw(layout: Layout, seed: int, *, spread: float = 20.0) -> list[torch.Tensor | None]:
    """A value per field, of magnitudes 2**-spread to 2**spread, some of them None."""
    generator = np.random.default_rng(seed)
    values: list[torch.Tensor | None] = []
    for one in layout.fields:
        scale = np.exp2(generator.uniform(-spread, spread, one.shape))
        drawn = (generator.standard_normal(one.shape) * scale).astype(np.float32)
        values.append(None if generator.random() < 0.1 else torch.from_numpy(np.array(drawn)))
    return values


def flat(layout: Layout, values: list[torch.Tensor | None]) -> np.ndarray:
    """All values in the flat space, in float64."""
    space = np.zeros(layout.num_elements)
    for one, value in zip(layout.fields, values, strict=True):
        if value is not None:
            space[one.start : one.stop] = value.double().numpy().reshape(-1)
    return space


def naive(layout: Layout, values: list[torch.Tensor | None], exponents: np.ndarray) -> np.ndarray:
    """round(value * 2**k), with the exponent of each element's chunk, as int64."""
    scaled = flat(layout, values)
    for chunk in layout.chunks:
        scaled[chunk.start : chunk.stop] *= 2.0 ** exponents[chunk.index]
    return np.rint(scaled).astype(np.int64)


def empty(layout: Layout, fill: int = 0) -> torch.Tensor:
    return torch.full((layout.num_elements,), fill, dtype=torch.int32)


def measured(layout: Layout, batches: list[list[torch.Tensor | None]]) -> np.ndarray:
    encoder = Encoder(layout)
    return np.stack([encoder.maxima(values) for values in batches])


# --- sums ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, num=st.integers(1, 9), num_workers=st.integers(1, 4))
def test_any_order_and_grouping_gives_the_same_sum(seed: int, num: int, num_workers: int) -> None:
    batches = [draw(LAYOUT, seed + one) for one in range(num)]
    old = np.zeros(NUM_CHUNKS, np.int64)
    exponents = exponents_for(measured(LAYOUT, batches), old)
    expected = sum(naive(LAYOUT, values, exponents) for values in batches)
    dice = random.Random(seed)
    for _ in range(2):
        dice.shuffle(batches)
        total = summed(batches, exponents, [dice.randrange(num_workers) for _ in batches])
        assert total.numpy().tolist() == expected.tolist()


def summed(
    batches: list[list[torch.Tensor | None]], exponents: np.ndarray, owners: list[int]
) -> torch.Tensor:
    """Each owner adds its batches in its two halves, then the halves that are live are added."""
    encoder = Encoder(LAYOUT)
    live: dict[int, torch.Tensor] = {}
    for values, owner in zip(batches, owners, strict=True):
        target = empty(LAYOUT)
        encoder.add(values, exponents, base=live.get(owner), out=target)
        live[owner] = target
    total = empty(LAYOUT, fill=77)
    add_slots(list(live.values()), total)
    return total


def test_sums_are_added_across_blocks() -> None:
    generator = np.random.default_rng(0)
    num = 2 * BLOCK + 5
    slots = generator.integers(-(2**28), 2**28, (3, num)).astype(np.int32)
    total = torch.full((num,), 9, dtype=torch.int32)
    add_slots([torch.from_numpy(slot) for slot in slots], total)
    assert (total.numpy() == slots.sum(0, dtype=np.int64)).all()


# --- encoding --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, exponent=st.integers(-20, 9))
def test_encoding_rounds_once(seed: int, exponent: int) -> None:
    values = draw(LAYOUT, seed, spread=8)
    exponents = exponent + np.arange(NUM_CHUNKS) % 3
    out = empty(LAYOUT)
    Encoder(LAYOUT).add(values, exponents, base=None, out=out)
    assert out.numpy().tolist() == naive(LAYOUT, values, exponents).tolist()


def test_encoding_rounds_halves_to_even() -> None:
    layout = make_layout([[("a", (6,))]], chunk_elements=16)
    out = empty(layout)
    values = [torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.25])]
    Encoder(layout).add(values, np.zeros(1, np.int64), base=None, out=out)
    assert out[:6].tolist() == [0, 2, 2, 0, -2, 0]


def test_encoding_goes_over_blocks_and_chunks() -> None:
    num = BLOCK + 100
    layout = make_layout([[("a", (3,)), ("b", (num,))]], chunk_elements=BLOCK - 16)
    values = [torch.randn(3), torch.randn(num)]
    exponents = np.arange(len(layout.chunks), dtype=np.int64) + 10
    base = torch.arange(layout.num_elements, dtype=torch.int32)
    out = empty(layout)
    Encoder(layout).add(values, exponents, base=base, out=out)
    expected = naive(layout, values, exponents) + base.numpy()
    for one in layout.fields:
        assert (out.numpy()[one.start : one.stop] == expected[one.start : one.stop]).all()


def test_a_missing_gradient_counts_as_zeros_over_whatever_the_half_holds() -> None:
    layout = make_layout([[("a", (16,)), ("b", (16,))]], chunk_elements=16)
    values = [None, torch.full((16,), 3.0)]
    out, exponents = empty(layout, fill=-5), np.zeros(2, np.int64)
    encoder = Encoder(layout)
    encoder.add(values, exponents, base=None, out=out)
    assert out.tolist() == [0] * 16 + [3] * 16
    again = empty(layout, fill=-5)
    encoder.add(values, exponents, base=out, out=again)
    assert again.tolist() == [0] * 16 + [6] * 16


def test_encoding_leaves_gradients_alone_and_padding_at_zero() -> None:
    values = draw(LAYOUT, 1)
    before = [None if value is None else value.clone() for value in values]
    out = empty(LAYOUT)
    Encoder(LAYOUT).add(values, np.full(NUM_CHUNKS, -10), base=None, out=out)
    for value, old in zip(values, before, strict=True):
        assert (value is None and old is None) or torch.equal(value, old)  # type: ignore[arg-type]
    padding = np.ones(LAYOUT.num_elements, bool)
    for one in LAYOUT.fields:
        padding[one.start : one.stop] = False
    assert padding.any()
    assert not out.numpy()[padding].any()


def test_encoding_takes_gradients_of_any_strides_as_their_values() -> None:
    layout = make_layout([[("a", (4, 5))]], chunk_elements=32)
    values = torch.arange(20.0).reshape(5, 4).T
    out, exponents = empty(layout), np.zeros(1, np.int64)
    Encoder(layout).add([values], exponents, base=None, out=out)
    assert out[:20].tolist() == values.reshape(-1).tolist()


# --- maxima ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_maxima_are_the_largest_magnitude_of_each_chunk(seed: int) -> None:
    values = draw(LAYOUT, seed)
    space = np.abs(flat(LAYOUT, values))
    expected = [space[one.start : one.stop].max() for one in LAYOUT.chunks]
    maxima = Encoder(LAYOUT).maxima(values)
    assert maxima.dtype == np.float32
    assert maxima.tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("position", [0, 40, 62])
def test_what_is_not_finite_is_seen_in_its_chunk_only(bad: float, position: int) -> None:
    values = [torch.ones(one.shape) for one in LAYOUT.fields]
    values[0].view(-1)[position] = bad
    maxima = Encoder(LAYOUT).maxima(values)
    wrong = [index for index, value in enumerate(maxima) if not np.isfinite(value)]
    assert wrong == [position // 48]
    assert np.isnan(maxima[wrong[0]]) == np.isnan(bad)


def test_maxima_forget_the_micro_batch_before() -> None:
    encoder = Encoder(LAYOUT)
    encoder.maxima([torch.full(one.shape, 9.0) for one in LAYOUT.fields])
    assert encoder.maxima([None] * len(LAYOUT.fields)).tolist() == [0.0] * NUM_CHUNKS


def test_a_layout_without_fields_has_no_maxima() -> None:
    layout = make_layout([], chunk_elements=16)
    assert Encoder(layout).maxima([]).shape == (0,)


# --- overflow --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maxima", "exponent", "overflows"),
    [
        pytest.param([2.0**31 - 128], 0, False, id="largest float32 below"),
        pytest.param([2.0**31], 0, True, id="one too large"),
        pytest.param([2.0**31 - 128, 127.0], 0, False, id="sum is the limit"),
        pytest.param([2.0**31 - 128, 128.0], 0, True, id="sum is one more"),
        pytest.param([2.0**31 - 128, 127.5], 0, True, id="rounded to one more"),
        pytest.param([2.0**31 - 128, 127.4], 0, False, id="rounded to the limit"),
        pytest.param([1.0, 1.0], 30, True, id="two halves of the range"),
        pytest.param([1.0, 1.0], 29, False, id="half of that"),
        pytest.param([0.4] * 8, 0, False, id="each rounds to zero"),
        pytest.param([3e38, 3e38], MAX_EXPONENT, True, id="beyond float32"),
        pytest.param([0.0, 0.0], MAX_EXPONENT, False, id="zeros"),
    ],
)
def test_the_overflow_rule(maxima: list[float], exponent: int, overflows: bool) -> None:
    maxima_MC = np.zeros((len(maxima), 3), np.float32)
    maxima_MC[:, 1] = maxima
    exponents = np.array([0, exponent, 0])
    assert overflowing(maxima_MC, exponents) == ([1] if overflows else [])


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(FINITE, min_size=1, max_size=20), exponent=st.integers(-100, 100), seed=SEEDS
)
def test_without_overflow_no_partial_sum_leaves_int32(
    values: list[float], exponent: int, seed: int
) -> None:
    layout = make_layout([[("a", (1,))]], chunk_elements=16)
    batches: list[list[torch.Tensor | None]] = [[torch.tensor([value])] for value in values]
    exponents = np.array([exponent])
    if overflowing(measured(layout, batches), exponents):
        exponents = exponents_for(measured(layout, batches), exponents)
        assert overflowing(measured(layout, batches), exponents) == []
    random.Random(seed).shuffle(batches)
    encoder, total, expected = Encoder(layout), None, 0
    for one in batches:
        out = empty(layout)
        encoder.add(one, exponents, base=total, out=out)
        total, expected = out, expected + int(naive(layout, one, exponents)[0])
        assert abs(expected) <= LIMIT
        assert total[0].item() == expected
        assert total[0].item() != INT_MIN


@pytest.mark.parametrize("value", [2.0**31, -(2.0**31), 2.0**40, -3e38, 3e38])
def test_a_value_out_of_range_is_seen_although_its_integer_is_garbage(value: float) -> None:
    layout = make_layout([[("a", (2,))]], chunk_elements=16)
    maxima_MC = measured(layout, [[torch.tensor([value, 0.0])]])
    assert overflowing(maxima_MC, np.array([0])) == [0]


# --- exponents -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(maxima=st.lists(FINITE.map(abs), min_size=1, max_size=30), old=st.integers(-50, 50))
def test_exponents_leave_three_bits_of_headroom(maxima: list[float], old: int) -> None:
    maxima_MC = np.array(maxima, np.float32)[:, None]
    (exponent,) = exponents_for(maxima_MC, np.array([old])).tolist()
    total = sum(float(value) for value in maxima_MC[:, 0])
    if total == 0:
        assert exponent == old
    elif abs(exponent) < MAX_EXPONENT:
        assert 2 ** (TARGET_BITS - 1) <= total * 2.0**exponent < 2**TARGET_BITS
    else:
        assert total * 2.0**exponent < 2**TARGET_BITS


def test_there_are_three_bits_and_they_are_enough_for_seven_fold_growth() -> None:
    maxima_MC = np.array([[1.0], [0.99]], np.float32)
    exponents = exponents_for(maxima_MC, np.zeros(1, np.int64))
    assert overflowing(7 * maxima_MC, exponents) == []
    assert overflowing(17 * maxima_MC, exponents) == [0]


@pytest.mark.parametrize(
    ("total", "exponent"),
    [
        pytest.param(1.0, TARGET_BITS - 1, id="one"),
        pytest.param(0.999, TARGET_BITS, id="just under one"),
        pytest.param(0.0, 13, id="zero keeps"),
        pytest.param(1e-45, MAX_EXPONENT, id="clamped above"),
        pytest.param(3e38, TARGET_BITS - 128, id="largest"),
    ],
)
def test_exponents(total: float, exponent: int) -> None:
    maxima_MC = np.array([[total]], np.float32)
    assert exponents_for(maxima_MC, np.array([13])).tolist() == [exponent]


def test_a_chunk_keeps_its_exponent_whatever_others_do() -> None:
    maxima_MC = np.array([[0.0, 4.0], [0.0, 0.0]], np.float32)
    exponents = exponents_for(maxima_MC, np.array([7, 7]))
    assert exponents.dtype == np.int64
    assert exponents.tolist() == [7, TARGET_BITS - 3]


def test_scales_are_normal_float32_numbers() -> None:
    info = np.finfo(np.float32)
    assert float(info.tiny) <= 2.0**-MAX_EXPONENT
    assert float(info.max) >= 2.0**MAX_EXPONENT


# --- decoding --------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(integer=st.integers(-LIMIT, LIMIT), exponent=st.integers(-90, 90), bits=st.integers(0, 12))
def test_decoding_is_exact_up_to_one_rounding(integer: int, exponent: int, bits: int) -> None:
    out = torch.full((1,), 5.0)
    decode(torch.tensor([integer], dtype=torch.int32), exponent, float(2**bits), out)
    assert out.item() == float(np.float32(integer)) * 2.0 ** (-exponent - bits)


def test_decoding_divides_by_the_weight() -> None:
    out = torch.empty(3)
    decode(torch.tensor([96, -48, 0], dtype=torch.int32), 4, 3.0, out)
    assert out.tolist() == [2.0, -1.0, 0.0]


def test_the_mean_is_the_float_mean_up_to_rounding() -> None:
    batches = [draw(LAYOUT, one, spread=1) for one in range(8)]
    exponents = exponents_for(measured(LAYOUT, batches), np.zeros(NUM_CHUNKS, np.int64))
    total = summed(batches, exponents, [0] * 8)
    mean = torch.empty(LAYOUT.num_elements)
    for chunk in LAYOUT.chunks:
        part = slice(chunk.start, chunk.stop)
        decode(total[part], int(exponents[chunk.index]), 8.0, mean[part])
    expected = sum(flat(LAYOUT, values) for values in batches) / 8
    largest = max(np.abs(flat(LAYOUT, values)).max() for values in batches)
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-6, atol=largest * 2.0**-24)
