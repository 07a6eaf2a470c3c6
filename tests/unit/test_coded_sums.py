"""Coded sums decode to the very integers of plain ones, and are refused where they cannot be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from elastic.core.device import Accelerator, Device, Host
from elastic.core.errors import DecodingError
from elastic.core.fixed_point import (
    CODED_BLOCK,
    LIMIT,
    Encoder,
    add_coded,
    add_slots,
    decode_slots,
    sums_of,
)
from elastic.core.layout import make_layout
from elastic.core.mapped import Sizes, Slot
from elastic.core.protocol.messages import Combine, Lease
from elastic.core.update import Plan
from policies.coding.field import decoding, encoding, holders_of
from tests.unit.test_device import LAYOUT, values
from tests.unit.test_update import NUM, equal, wide_node

SEED = 11
MakeNode = Callable[..., Any]
CPU = torch.device("cpu")


def coded_slots(integers: np.ndarray, num_workers: int, stragglers: int) -> list[torch.Tensor]:
    """What each worker adds up of (M, N) integers."""
    slots = [torch.zeros(integers.shape[1], dtype=torch.int64) for _ in range(num_workers)]
    rows = holders_of([1.0] * num_workers, len(integers), stragglers)
    for row, holders in zip(integers, rows, strict=True):
        for place, coefficient in zip(holders, encoding(holders, seed=SEED), strict=True):
            add_coded(torch.from_numpy(row.copy()), coefficient, out=slots[place])
    return slots


def decoded(slots: list[torch.Tensor], missing: tuple[int, ...], limit: int = LIMIT) -> list[int]:
    there = [place for place in range(len(slots)) if place not in missing]
    answers = decoding(len(slots), missing, seed=SEED)
    out = torch.full(slots[0].shape, 77, dtype=torch.int32)
    decode_slots([slots[one] for one in there], [answers[one] for one in there], limit, out)
    return out.tolist()


@pytest.mark.parametrize(("num", "stragglers"), [(3, 1), (5, 3), (40, 4)])
def test_any_sum_within_int32_is_decoded(num: int, stragglers: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator, dice = np.random.default_rng(seed), random.Random(seed)
    share = LIMIT // 20
    integers = generator.integers(-share, share + 1, (20, CODED_BLOCK + 3))
    for missing in ((), tuple(dice.sample(range(num), stragglers)), tuple(range(stragglers))):
        slots = coded_slots(integers, num, stragglers)
        assert decoded(slots, missing) == integers.sum(axis=0).tolist()


@pytest.mark.parametrize("total", [LIMIT, -LIMIT, LIMIT - 7, 120 - LIMIT, 1, 0])
def test_the_ends_of_int32_are_decoded(total: int) -> None:
    """One micro-batch has all of it: nothing on the way may leave an int64."""
    integers = np.array([[0, total], [total, 0], [0, 0], [0, 0]])
    for missing in ((), (0,), (3,)):
        assert decoded(coded_slots(integers, 4, 1), missing) == [total, total]


def test_more_workers_than_there_can_be_stay_within_int64() -> None:
    """The largest coefficients, and slots as large as they get."""
    num = 1024
    slots = [torch.full((5,), 2**34 * (1 if one % 2 else -1)) for one in range(num)]
    coefficients = [2**31 + 7 if one % 2 else -(2**31) - 7 for one in range(num)]
    out = torch.empty(5, dtype=torch.int32)
    exact = sum(int(slot[0]) * one for slot, one in zip(slots, coefficients, strict=True))
    prime = 2**32 + 15
    wanted = (exact + prime // 2) % prime - prime // 2
    assert abs(wanted) <= LIMIT
    decode_slots(slots, coefficients, LIMIT, out)
    assert out.tolist() == [wanted] * 5


def test_answers_that_differ_are_refused() -> None:
    """One of two holders of one micro-batch has its numbers off by 1."""
    integers = np.random.default_rng(0).integers(-1000, 1000, (6, 20))
    slots, holders = coded_slots(integers, 4, 1), holders_of([1.0] * 4, 6, 1)[2]
    off, coefficient = holders[0], encoding(holders, seed=SEED)[0]
    add_coded(torch.ones(20, dtype=torch.int64), coefficient, out=slots[off])
    for missing in [(), *((one,) for one in range(4) if one not in holders)]:
        with pytest.raises(DecodingError, match="what was answered allows 6000"):
            decoded(slots, missing, limit=6000)
    assert decoded(slots, (off,), limit=6000) == integers.sum(axis=0).tolist()


def test_what_is_coded_needs_no_more_memory() -> None:
    for counters in ([], [("num", (3,), "int64", 24)]):
        layout = make_layout([[("a", (33,))]], counters=counters, chunk_elements=1024)
        sizes = Sizes(layout, 4)
        assert 8 * layout.num_elements + layout.counters_bytes <= 2 * sizes.half_bytes


@pytest.mark.parametrize("make", [Host, lambda layout: Accelerator(layout, CPU)])
def test_a_device_adds_what_the_definition_says(make: Callable[..., Device], tmp_path: Any) -> None:
    """Three attempts in one slot: plain, coded, plain; padding is zero in each of them."""
    slot, device = Slot(tmp_path, 0, Sizes(LAYOUT, 4), writable=True), make(LAYOUT)
    exponents = np.arange(len(LAYOUT.chunks), dtype=np.int64) + 18
    plain = torch.zeros(LAYOUT.num_elements, dtype=torch.int32)
    for seed in range(2):
        encoder = Encoder(LAYOUT)
        encoder.add(values(seed), exponents, base=plain.clone() if seed else None, out=plain)
    for attempt in range(3):
        for seed in range(2):
            device.maxima(values(seed))
            half = 0 if attempt == 1 else seed
            device.add(
                values(seed),
                exponents,
                slot,
                half=half,
                base=0 if seed else None,
                coefficient=9 if attempt == 1 else None,
            )
            device.wait()
        if attempt == 1:
            assert torch.equal(slot.coded, 9 * plain.to(torch.int64))
        else:
            assert torch.equal(slot.halves[1], plain)


def test_a_coded_step_gives_the_bits_of_a_plain_one(make_node: MakeNode, tiny_task: Any) -> None:
    """With buffers, over several chunks; workers had plain sums in their slots before."""
    results = []
    for missing in (None, (), (1,)):
        node = wide_node(make_node, tiny_task)
        updater, workers = node.updater(num_threads=2), [node.worker() for _ in range(3)]
        node.measure(workers[0])
        for step in range(3):
            outcomes = {}
            is_coded = missing is not None and step > 0
            rows = holders_of([1.0] * 3, NUM, 1) if is_coded else [(one % 3,) for one in range(NUM)]
            begun: set[int] = set()
            for one, holders in enumerate(rows):
                for place, coefficient in zip(holders, encoding(holders, seed=SEED), strict=True):
                    if not is_coded:
                        outcomes[one] = node.accumulate(workers[place], place, one)
                        continue
                    lease = Lease(node.state.key, (one,), Combine.CODED, coefficient=coefficient)
                    outcomes[one] = workers[place].compute(lease)
                    base = 0 if place in begun else None
                    workers[place].encode(lease, node.slots[place], half=0, base=base)
                    begun.add(place)
            plan: Plan = node.plan(weight=sum(one.weight for one in outcomes.values()))
            if is_coded:
                there = [one for one in range(3) if one not in missing]
                answers = decoding(3, missing, seed=SEED)
                maxima = np.stack([outcomes[one].maxima_C for one in range(NUM)])
                limits = sums_of(maxima, np.array(node.state.exponents))
                plan = replace(
                    plan,
                    slots=[(node.slots[one], 0) for one in there],
                    coefficients=[answers[one] for one in there],
                    limits=[int(one) for one in limits],
                )
            updater.run(plan, lambda chunk: None)
            node.commit()
        updater.close()
        results.append(node.parameters(node.state.step % 2))
        assert len(node.spec.layout.chunks) >= 5
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_the_sum_is_that_of_plain_slots() -> None:
    integers = np.random.default_rng(1).integers(-(2**20), 2**20, (8, 50))
    slots = [torch.from_numpy(one.astype(np.int32)) for one in integers]
    out = torch.empty(50, dtype=torch.int32)
    add_slots(slots, out)
    assert decoded(coded_slots(integers, 5, 2), (0, 4)) == out.tolist()
