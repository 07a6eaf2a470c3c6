"""SR-SGC and M-SGC: vectors, every conforming pattern of small cases, what must be refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.coding.codes import Bools, Code, Decoded, Undecodable, crc
from policies.coding.m_sgc import MSgc, MSgcRounds
from policies.coding.sr_sgc import IDLE, SrSgc
from policies.coding.stragglers import Arbitrary, Bursty, PerRound, StragglerModel

NUM_GRADIENTS = 3


def flags(num_workers: int, workers: object) -> Bools:
    marked = np.zeros(num_workers, np.bool_)
    marked[list(workers)] = True  # type: ignore[call-overload]
    return marked


def conforming(model: StragglerModel, num_workers: int, num_rounds: int) -> Iterator[Bools]:
    """Every pattern (R, N) that the model allows."""
    every = [
        flags(num_workers, one)
        for size in range(num_workers + 1)
        for one in combinations(range(num_workers), size)
    ]

    def extend(past_RN: Bools) -> Iterator[Bools]:
        if len(past_RN) == num_rounds:
            yield past_RN
            return
        for now_N in every:
            if model.allows(past_RN, now_N):
                yield from extend(np.concatenate([past_RN, now_N[None]]))

    yield from extend(np.zeros((0, num_workers), np.bool_))


# --- M-SGC ----------------------------------------------------------------------------------------


class Sums:
    """What workers compute in an M-SGC run, numerically."""

    def __init__(self, scheme: MSgc, num_workers: int, num_gradients: int = NUM_GRADIENTS) -> None:
        self.rounds: MSgcRounds = scheme.begin(num_workers, num_gradients)
        self.code = scheme.code(num_workers)
        dice = np.random.default_rng(0)
        self.num_own = (scheme.window - 1) * num_workers
        num_coded = 0 if self.code is None else scheme.burst * len(self.code.row(0))
        shape = (num_gradients, self.num_own + num_coded)
        self.parts_TP = dice.integers(-1000, 1000, shape).astype(np.float64)
        self.own: dict[tuple[int, int], float] = {}
        self.coded: dict[tuple[int, int, int], float] = {}

    def round(self, stragglers_N: Bools) -> None:
        """One round; the gradient that is due must come out right."""
        rounds, answered_N = self.rounds, ~stragglers_N
        for worker in np.flatnonzero(answered_N).tolist():
            for slot in rounds.work(worker, self.code):
                value = self.parts_TP[slot.gradient, list(slot.parts)] @ slot.coefficients
                if slot.group is None:
                    self.own[slot.gradient, slot.parts[0]] = value
                else:
                    self.coded[slot.gradient, slot.group, worker] = value
        if rounds.due >= 0:
            decoded = rounds.decode(answered_N, self.code)
            assert not isinstance(decoded, Undecodable), decoded
            total = sum(self.own[rounds.due, part] for part in range(self.num_own))
            for group, one in enumerate(decoded):
                for worker in one.workers:
                    value = self.coded[rounds.due, group, worker]
                    total += one.coefficients_N[worker] * value
            assert total == pytest.approx(self.parts_TP[rounds.due].sum(), abs=1e-6)
        rounds.close(answered_N)


M_CASES = [
    (MSgc(burst=1, window=2, distinct=4), 4, "bursty"),
    (MSgc(burst=1, window=2, distinct=2, inner="coded"), 4, "bursty"),
    (MSgc(burst=1, window=2, distinct=1), 4, "bursty"),
    (MSgc(burst=2, window=3, distinct=1, inner="coded"), 3, "bursty"),
    (MSgc(burst=2, window=3, distinct=2), 3, "bursty"),
    (MSgc(burst=1, window=3, distinct=2, inner="coded"), 3, "bursty"),
    (MSgc(burst=1, window=3, distinct=2, inner="coded"), 3, "arbitrary"),
    (MSgc(burst=2, window=3, distinct=2, inner="coded"), 3, "arbitrary"),
]


@pytest.mark.parametrize(("scheme", "num_workers", "kind"), M_CASES)
def test_m_sgc_decodes_every_conforming_pattern(scheme: MSgc, num_workers: int, kind: str) -> None:
    model: StragglerModel = scheme.model
    if kind == "arbitrary":
        window = scheme.window + scheme.burst - 1
        model = Arbitrary(scheme.burst, window, scheme.distinct)
    num_patterns = 0
    for pattern_RN in conforming(model, num_workers, 2 + scheme.delay):
        sums = Sums(scheme, num_workers, 2)
        for stragglers_N in pattern_RN:
            assert sums.rounds.allows(~stragglers_N)
            sums.round(stragglers_N)
        num_patterns += 1
    assert num_patterns > 28


def test_m_sgc_vectors_without_coded_parts() -> None:
    scheme = MSgc(burst=1, window=2, distinct=4)
    assert (scheme.delay, scheme.load(4), scheme.code(4)) == (1, 0.5, None)
    sums = Sums(scheme, 4)
    assert [sums.rounds.work(worker, None)[0].parts for worker in range(4)] == [
        *((0,), (1,), (2,), (3,))
    ]
    sums.round(flags(4, {0, 2}))
    assert not sums.rounds.allows(~flags(4, {0, 1, 3}))
    refused = sums.rounds.decode(~flags(4, {0, 1, 3}), None)
    assert refused == Undecodable("gradient 0: worker 0 has not computed all its own parts")
    assert sums.rounds.allows(~flags(4, {1, 3}))
    sums.round(flags(4, {1, 3}))


def test_m_sgc_vectors_with_coded_parts() -> None:
    scheme = MSgc(burst=1, window=2, distinct=2, inner="coded")
    assert scheme.load(4) == pytest.approx(0.375)
    assert scheme.multiple(4) == 16
    sums = Sums(scheme, 4)
    sums.round(flags(4, {1}))
    slots = [sums.rounds.work(worker, sums.code)[-1] for worker in range(4)]
    assert [set(slot.parts) for slot in slots] == [{4, 5, 6}, {1}, {6, 7, 4}, {7, 4, 5}]
    assert [slot.group for slot in slots] == [0, None, 0, 0]
    sums.round(flags(4, {3}))


def test_published_loads() -> None:
    assert MSgc(burst=1, window=2, distinct=27, inner="coded").load(256) == pytest.approx(
        0.007543, abs=5e-7
    )
    assert MSgc(burst=1, window=2, distinct=27).load(256) == pytest.approx(0.0075472, abs=5e-8)
    assert SrSgc(burst=2, window=3, distinct=23).load(256) == 0.05078125


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_m_sgc_allows_it_decodes(data: st.DataObject) -> None:
    """Rounds end at random, if only each is allowed; nobody straggles after a refusal."""
    num_workers = data.draw(st.integers(2, 12))
    window = data.draw(st.integers(2, 4))
    scheme = MSgc(
        burst=data.draw(st.integers(1, window - 1)),
        window=window,
        distinct=data.draw(st.integers(1, num_workers)),
        inner=data.draw(st.sampled_from(["frc", "coded"])),
    )
    dice = np.random.default_rng(data.draw(st.integers(0, 999)))
    rate = data.draw(st.sampled_from([0.05, 0.3, 0.7]))
    sums = Sums(scheme, num_workers)
    num_straggled = 0
    for _ in range(sums.rounds.num_rounds):
        stragglers_N = dice.random(num_workers) < rate
        while not sums.rounds.allows(~stragglers_N):  # wait for one more
            stragglers_N[np.flatnonzero(stragglers_N)[0]] = False
        num_straggled += int(stragglers_N.sum())
        sums.round(stragglers_N)
    assert sums.rounds.round == NUM_GRADIENTS + scheme.delay


def test_frc_inside_takes_a_group_for_a_part() -> None:
    scheme = MSgc(burst=1, window=2, distinct=1)
    assert scheme.multiple(4) == scheme.num_parts(4) == 6
    assert scheme.load(4) == pytest.approx(2 / 6)
    scheme.check(4, 12)
    with pytest.raises(ValueError, match=r"m_sgc \(1, 2, 1\) with 4 .* multiple of 6, .* is 18"):
        scheme.check(4, 16)
    with pytest.raises(ValueError, match="distinct is 5, with 4 workers at most 4"):
        MSgc(burst=1, window=2, distinct=5).check(4, 12)


def test_work_before_the_first_and_after_the_last_gradient_is_not_charged() -> None:
    scheme = MSgc(burst=2, window=3, distinct=1)
    rounds = scheme.begin(3, 2)
    everybody = np.ones(3, np.bool_)
    slots = []
    for _ in range(rounds.num_rounds):
        slots.append(round(float(rounds.loads().max()) / scheme.slot_load(3)))
        rounds.close(everybody)
    assert slots == [1, 2, 2, 2, 1]


# --- SR-SGC ---------------------------------------------------------------------------------------

SR_CASES = [
    (SrSgc(burst=1, window=2, distinct=1), 3),
    (SrSgc(burst=1, window=2, distinct=2), 4),
    (SrSgc(burst=2, window=3, distinct=2), 3),
    (SrSgc(burst=1, window=3, distinct=3), 4),
]


def run_sr_sgc(scheme: SrSgc, pattern_RN: Bools, code: Code) -> None:
    num_workers = pattern_RN.shape[1]
    rounds = scheme.begin(num_workers, NUM_GRADIENTS)
    matrix = np.array([code.row(worker) for worker in range(num_workers)])
    for stragglers_N in pattern_RN:
        assert rounds.allows(~stragglers_N)
        due = rounds.due
        rounds.close(~stragglers_N)
        if due >= 0:
            decoded = rounds.decode(due, code)
            assert isinstance(decoded, Decoded), decoded
            assert decoded.coefficients_N @ matrix == pytest.approx(np.ones(matrix.shape[1]))


@pytest.mark.parametrize(("scheme", "num_workers"), SR_CASES)
def test_sr_sgc_decodes_every_conforming_pattern(scheme: SrSgc, num_workers: int) -> None:
    code = crc(num_workers, scheme.num_stragglers)
    num_patterns = 0
    for pattern_RN in conforming(scheme.model, num_workers, NUM_GRADIENTS + scheme.delay):
        run_sr_sgc(scheme, pattern_RN, code)
        num_patterns += 1
    assert num_patterns >= 40


def test_sr_sgc_repeats_what_is_lacking() -> None:
    rounds = SrSgc(burst=1, window=2, distinct=2).begin(4, 2)
    assert rounds.scheme.num_stragglers == 1
    rounds.close(~flags(4, {0, 2}))
    assert rounds.work().tolist() == [0, 1, 1, 1]
    assert not rounds.allows(~flags(4, {0}))
    assert rounds.allows(~flags(4, {3}))
    rounds.close(~flags(4, {3}))
    refused = rounds.decode(1, crc(4, 1))
    assert isinstance(refused, Undecodable)
    assert "gradient 1: 2 of 4 workers have not answered (0, 3)" in refused.reason
    assert rounds.work().tolist() == [1, IDLE, IDLE, IDLE]
    assert rounds.loads().tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SrSgc(burst=2, window=4, distinct=1), "burst must divide window - 1, not 2 of 3"),
        (lambda: SrSgc(burst=1, window=2, distinct=0), "distinct must be at least 1, not 0"),
        (lambda: MSgc(burst=2, window=2, distinct=1), "burst must be 1 to window - 1, not 2 of 2"),
        (lambda: MSgc(burst=1, window=2, distinct=0), "distinct must be at least 1, not 0"),
        (lambda: SrSgc(burst=1, window=2, distinct=5).begin(4, 1), "5 distinct stragglers of 4"),
    ],
)
def test_impossible_parameters(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# --- straggler models -----------------------------------------------------------------------------


def holds(model: StragglerModel, pattern_RN: Bools) -> bool:
    """By the definition, over all windows at once."""
    num_rounds = len(pattern_RN)
    if isinstance(model, PerRound):
        return all(row_N.sum() <= model.most for row_N in pattern_RN)
    windows = [pattern_RN[one : one + model.window] for one in range(num_rounds)]
    if any(one.any(axis=0).sum() > model.distinct for one in windows):
        return False
    if isinstance(model, Arbitrary):
        return all(one.sum(axis=0).max() <= model.times for one in windows)
    spans = [np.flatnonzero(row) for one in windows for row in one.T if row.any()]
    return all(rounds[-1] - rounds[0] <= model.burst - 1 for rounds in spans)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_incremental_check_is_the_definition(data: st.DataObject) -> None:
    window = data.draw(st.integers(2, 5))
    distinct = data.draw(st.integers(1, 3))
    model = data.draw(
        st.sampled_from(
            [
                PerRound(distinct),
                Bursty(data.draw(st.integers(1, window - 1)), window, distinct),
                Arbitrary(data.draw(st.integers(1, 3)), window, distinct),
            ]
        )
    )
    rows = data.draw(st.lists(st.sets(st.integers(0, 3), max_size=3), min_size=1, max_size=8))
    pattern_RN = np.array([flags(4, row) for row in rows])
    allowed = all(model.allows(pattern_RN[:r], pattern_RN[r]) for r in range(len(rows)))
    assert allowed == holds(model, pattern_RN)
