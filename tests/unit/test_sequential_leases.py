"""Sequential codes as schedules: beside the schemes of whole answers, and with half answers."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from policies.coding.codes import Bools
from policies.coding.m_sgc import MSgc
from policies.coding.sequential import SequentialLeases, check_sequential, least_models
from policies.coding.sr_sgc import SrSgc
from tests.unit.test_sequential_codes import conforming

Scheme = SrSgc | MSgc
NUM_GRADIENTS = 3
CASES: list[tuple[Scheme, int, int]] = [
    (SrSgc(burst=1, window=2, distinct=2), 4, 8),
    (SrSgc(burst=2, window=3, distinct=2), 3, 7),
    (SrSgc(burst=1, window=3, distinct=3), 4, 4),
    (MSgc(burst=1, window=2, distinct=4), 4, 8),
    (MSgc(burst=1, window=2, distinct=2, inner="coded"), 4, 16),
    (MSgc(burst=1, window=2, distinct=1), 4, 12),
    (MSgc(burst=2, window=3, distinct=1, inner="coded"), 3, 18),
    (MSgc(burst=2, window=3, distinct=2), 3, 8),
    (MSgc(burst=1, window=3, distinct=2, inner="coded"), 3, 21),
]
IDS = [f"{one.kind} {one.burst},{one.window},{one.distinct} n={num}" for one, num, _ in CASES]


def grant_all(leases: SequentialLeases, worker: int) -> int:
    """A worker does all that it has in this round; how much that was."""
    work = leases.work(worker)
    for unit in work:
        leases.granted(*unit)
    return len(work)


def rounds_of_whole_answers(
    scheme: Scheme, num: int, num_micro_batches: int, late_RN: Bools
) -> int:
    """Rounds that end as those of the scheme do. How many had to be done again."""
    reference = scheme.begin(num, NUM_GRADIENTS)
    leases = SequentialLeases(scheme, num, num_micro_batches, NUM_GRADIENTS)
    for late_N in late_RN:
        assert not leases.is_over
        for worker in np.flatnonzero(~late_N).tolist():
            grant_all(leases, worker)
        assert reference.allows(~late_N)
        assert leases.may_end
        due = leases.due
        reference.close(~late_N)
        leases.end()
        assert leases.round == reference.round
        assert due < 0 or leases.is_complete(due)
    assert leases.is_over
    return leases.round


@pytest.mark.parametrize(("scheme", "num", "micro_batches"), CASES, ids=IDS)
def test_every_conforming_pattern_completes_the_same_rounds(
    scheme: Scheme, num: int, micro_batches: int
) -> None:
    num_rounds = NUM_GRADIENTS + scheme.delay
    patterns = list(conforming(scheme.model, num, num_rounds))
    assert len(patterns) > 28
    for late_RN in patterns:
        assert rounds_of_whole_answers(scheme, num, micro_batches, late_RN) == num_rounds


@pytest.mark.parametrize(("scheme", "num", "micro_batches"), CASES, ids=IDS)
def test_nobody_has_more_to_do_than_the_load(scheme: Scheme, num: int, micro_batches: int) -> None:
    """As published; worker 0 does nothing in its first round, and nobody skips anything. Parts of
    unequal size may have one more each."""
    leases = SequentialLeases(scheme, num, micro_batches, 9)
    loads = []
    while not leases.is_over:
        work = [leases.work(worker) for worker in range(num)]
        loads.append(max(map(len, work)))
        for one in work[leases.round == 0 :]:
            for unit in one:
                leases.granted(*unit)
        leases.end()
    wanted = scheme.load(num) * micro_batches
    rest = 0 if micro_batches % num == 0 or isinstance(scheme, MSgc) else 2
    assert wanted <= max(loads) + 1e-9
    assert max(loads) <= wanted + rest


@pytest.mark.parametrize("seed", range(40))
def test_half_answers_count_and_each_micro_batch_once(seed: int) -> None:
    """Workers stop anywhere; a round ends as soon as it may. Random cases, with their seed."""
    dice = random.Random(seed)
    num = dice.randint(3, 9)
    scheme = random_scheme(dice, num)
    multiple = scheme.multiple(num) if isinstance(scheme, MSgc) else 1
    micro_batches = multiple * (dice.randint(1, 3) if multiple > 1 else dice.randint(num, 4 * num))
    leases = SequentialLeases(scheme, num, micro_batches, 12)
    begun: dict[int, int] = {}
    done: dict[int, int] = {}
    granted: Counter[tuple[int, int]] = Counter()
    rate = dice.choice((0.05, 0.3, 0.8))
    while not leases.is_over:
        work = {worker: leases.work(worker) for worker in range(num)}
        for units in work.values():
            for gradient, _ in units:
                begun.setdefault(gradient, leases.round)
            assert not {unit for unit in units if granted[unit]}, "what counts is not leased again"
        late = [worker for worker in work if dice.random() < rate]
        for worker in dice.sample(range(num), num):
            stop = dice.randint(0, len(work[worker])) if worker in late else None
            for unit in work[worker][:stop]:
                granted[unit] = 1
                leases.granted(*unit)
        for worker in late:  # who is waited for
            if leases.may_end:
                break
            for unit in work[worker]:
                granted[unit] = 1
                leases.granted(*unit)
        due = leases.due
        leases.end()
        if due >= 0:
            done[due] = leases.round - 1
    assert begun == {gradient: gradient for gradient in range(12)}
    assert done == {gradient: gradient + scheme.delay for gradient in range(12)}
    assert granted.total() == 12 * micro_batches


def random_scheme(dice: random.Random, num: int) -> Scheme:
    burst = dice.randint(1, 2)
    distinct = dice.randint(1, num)
    if dice.random() < 0.4:
        scheme = SrSgc(burst=burst, window=1 + burst * dice.randint(1, 2), distinct=distinct)
        return scheme if scheme.num_stragglers < num else random_scheme(dice, num)
    window = burst + dice.randint(1, 2)
    inner = "frc" if dice.random() < 0.5 else "coded"
    return MSgc(burst=burst, window=window, distinct=distinct, inner=inner)


def test_a_round_that_lacks_more_than_can_be_made_up_for_may_not_end() -> None:
    leases = SequentialLeases(MSgc(burst=1, window=2, distinct=4), 4, 8, 3)
    for worker in (1, 3):
        grant_all(leases, worker)
    leases.end()
    grant_all(leases, 2)
    assert not leases.may_end, "0 and 1 lack theirs of gradient 0, which is due"
    grant_all(leases, 0)
    assert leases.may_end
    leases.end()
    assert leases.is_complete(0)


def test_what_was_half_done_is_not_done_again() -> None:
    leases = SequentialLeases(MSgc(burst=1, window=2, distinct=4), 4, 16, 3)
    for worker in (1, 2, 3):
        grant_all(leases, worker)
    first, *rest = leases.work(0)
    leases.granted(*first)
    leases.end()
    retried = [unit for unit in leases.work(0) if unit[0] == 0]
    assert retried == rest
    assert not [unit for unit in leases.work(1) if unit[0] == 0]


def test_a_round_of_sr_sgc_ends_once_all_is_covered() -> None:
    """Two of four have not answered, one more than the code withstands, but what they lack others
    have done."""
    leases = SequentialLeases(SrSgc(burst=1, window=2, distinct=2), 4, 4, 2)
    for worker in (0, 2):
        grant_all(leases, worker)
    assert leases.is_complete(0)
    leases.end()
    assert all(gradient == 1 for worker in range(4) for gradient, _ in leases.work(worker))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 6, the nearest is 18"):
        check_sequential(MSgc(burst=1, window=2, distinct=1), 4, 16)
    with pytest.raises(ValueError, match="distinct is 5, with 4 workers"):
        check_sequential(MSgc(burst=1, window=2, distinct=5), 4, 8)
    with pytest.raises(ValueError, match="sr_sgc with 4 workers needs at least 4"):
        check_sequential(SrSgc(burst=1, window=2, distinct=1), 4, 3)
    with pytest.raises(ValueError, match="5 distinct stragglers of 4 workers"):
        check_sequential(SrSgc(burst=1, window=2, distinct=5), 4, 8)
    assert least_models(MSgc(burst=2, window=3, distinct=1)) == 4
