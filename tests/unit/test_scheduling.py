"""Who computes what: shares by speed, then what is left, then duplicates of what is late."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.scheduling import (
    FEW_SAMPLES,
    MARGIN,
    PACE_WINDOW,
    SILENCE,
    SILENCE_FLOOR_S,
    Duplicate,
    IdleView,
    Queue,
    Shares,
    StepView,
    Take,
    Wait,
    pace,
    split,
)

POLICY = Shares()
NOW_S = 100.0


@pytest.mark.parametrize(
    ("paces", "num", "shares"),
    [
        pytest.param({}, 5, {}, id="nobody"),
        pytest.param({3: 1.0}, 5, {3: 5}, id="alone"),
        pytest.param({1: 1.0, 2: 1.0}, 0, {1: 0, 2: 0}, id="nothing"),
        pytest.param({1: 1.0, 2: 1.0}, 4, {1: 2, 2: 2}, id="equal"),
        pytest.param({2: 1.0, 1: 1.0}, 3, {1: 2, 2: 1}, id="the lower id gets the odd one"),
        pytest.param({1: 1.0, 2: 2.0}, 6, {1: 4, 2: 2}, id="twice as fast"),
        pytest.param({1: 1.0, 2: 100.0}, 16, {1: 16, 2: 0}, id="too slow to help"),
        pytest.param({1: 1.0, 2: 1.0, 3: 1.0}, 2, {1: 1, 2: 1, 3: 0}, id="more workers than work"),
    ],
)
def test_shares(paces: dict[int, float], num: int, shares: dict[int, int]) -> None:
    assert split(paces, num) == shares
    assigned = POLICY.assign(StepView(paces, range(num), {}))
    assert {worker: len(queue) for worker, queue in assigned.queues.items()} == shares
    assert sorted(one for queue in assigned.queues.values() for one in queue) == list(
        range(num if paces else 0)
    )
    assert assigned.num_copies == 0


@settings(max_examples=100)
@given(
    st.dictionaries(st.integers(0, 9), st.floats(0.01, 10.0), min_size=1, max_size=5),
    st.integers(0, 40),
)
def test_shares_add_up_and_no_move_of_one_ends_earlier(paces: dict[int, float], num: int) -> None:
    shares = split(paces, num)
    assert sum(shares.values()) == num
    end_s = max(shares[one] * paces[one] for one in paces)
    last = max(paces, key=lambda one: shares[one] * paces[one])
    for other in paces:
        if other != last and num:
            assert (shares[other] + 1) * paces[other] >= end_s * (1 - 1e-9)


def test_without_help_shares_are_even_and_nobody_helps() -> None:
    uncoded = Shares(helps=False)
    assigned = uncoded.assign(StepView({1: 1.0, 2: 9.0}, range(4), {}))
    assert assigned.queues == {1: (0, 1), 2: (2, 3)}
    assert isinstance(uncoded.decide(idle(queue(1, 2, silent=60))), Wait)
    assert isinstance(uncoded.decide(idle(pending=(3,))), Take), "what a lost worker held"


@settings(max_examples=100)
@given(
    st.dictionaries(st.integers(0, 30), st.floats(0.01, 10.0), min_size=1, max_size=9),
    st.integers(0, 40),
    st.integers(2, 4),
)
def test_in_a_repetition_everything_has_as_many_holders(
    paces: dict[int, float], num: int, copies: int
) -> None:
    assigned = Shares(copies=copies).assign(StepView(paces, range(num), {}))
    holders = {one: [] for one in range(num)}  # type: dict[int, list[int]]
    for worker, held in assigned.queues.items():
        assert len(set(held)) == len(held)
        for one in held:
            holders[one].append(worker)
    least = min(copies, len(paces))
    assert all(len(held) >= least for held in holders.values())
    groups = {frozenset(held) for held in assigned.queues.values()} - {frozenset()}
    assert sum(map(len, groups)) == num, "the shares of two groups have nothing in common"
    assert assigned.num_copies == sum(len(held) - 1 for held in holders.values())
    assert f"frc with s={copies - 1}" in assigned.reason


def test_members_of_a_group_begin_where_others_end() -> None:
    """One is twice as fast: when it has done two of three, the other has done one."""
    assigned = Shares(copies=2).assign(StepView({4: 1.0, 7: 2.0}, (5, 6, 7), {}))
    assert assigned.queues == {4: (5, 6, 7), 7: (7, 5, 6)}


def test_the_members_of_a_group_are_on_different_hosts() -> None:
    hosts = {0: 0, 1: 0, 2: 10, 3: 10, 4: 9, 5: 9}
    assigned = Shares(copies=2).assign(StepView(dict.fromkeys(hosts, 1.0), range(6), hosts))
    for part in set(map(frozenset, assigned.queues.values())):
        members = [one for one, held in assigned.queues.items() if frozenset(held) == part]
        assert len({hosts[one] for one in members}) == len(members) == 2


def idle(*queues: Queue, pending: tuple[int, ...] = (), pace_s: float = 1.0) -> IdleView:
    return IdleView(NOW_S, 9, pace_s, pending, queues)


def queue(
    *micro_batches: int,
    worker: int = 1,
    since: float = 0.0,
    pace_s: float = 1.0,
    silent: float = 0,
    left: float | None = None,
) -> Queue:
    """`since`: how long ago it began with the first; `left`: seconds of it that are seen to be."""
    end_s = None if left is None else NOW_S + left
    return Queue(worker, micro_batches, NOW_S - since, pace_s, silent, end_s)


@pytest.mark.parametrize(
    ("view", "kind", "micro_batch", "holder"),
    [
        pytest.param(idle(pending=(4, 7)), Take, 4, None, id="what nobody holds comes first"),
        pytest.param(
            idle(queue(1, 2, silent=60), pending=(7,)), Take, 7, None, id="even if one is stuck"
        ),
        pytest.param(idle(queue(1, 2, 3)), Take, 3, 1, id="the last of a long queue"),
        pytest.param(
            idle(queue(1, 2), queue(3, 4, 5, worker=2)), Take, 5, 2, id="of the longest queue"
        ),
        pytest.param(
            idle(queue(1, 2, pace_s=9), queue(3, 4, 5, worker=2)), Take, 2, 1, id="of the slowest"
        ),
        pytest.param(idle(queue(1, silent=60)), Duplicate, 1, 1, id="a stuck one is duplicated"),
        pytest.param(
            idle(queue(1, pace_s=10)), Duplicate, 1, 1, id="a slow one is duplicated in time"
        ),
        pytest.param(idle(queue(1, since=5)), Duplicate, 1, 1, id="a late one is duplicated"),
        pytest.param(
            idle(queue(1, since=0.9, left=1.3)), Duplicate, 1, 1, id="one that is seen to be slow"
        ),
        pytest.param(
            idle(queue(1, 2, silent=60)), Take, 2, 1, id="what a stuck one has not begun is taken"
        ),
    ],
)
def test_what_an_idle_worker_does(
    view: IdleView, kind: type, micro_batch: int, holder: int | None
) -> None:
    decision = POLICY.decide(view)
    assert isinstance(decision, kind), decision
    assert (decision.micro_batch, decision.holder) == (micro_batch, holder)  # type: ignore[attr-defined]
    assert decision.reason  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(idle(), id="nobody holds anything"),
        pytest.param(idle(queue()), id="an empty queue"),
        pytest.param(idle(queue(1, since=0.9)), id="it will be done first"),
        pytest.param(idle(queue(1)), id="both would end at once"),
        pytest.param(idle(queue(1, since=9, left=1.2)), id="late, and seen to be done soon"),
        pytest.param(idle(queue(1, 2, since=0.999), pace_s=50.0), id="we are too slow"),
        pytest.param(idle(queue(1, silent=60), queue(1, worker=2)), id="another computes it too"),
    ],
)
def test_an_idle_worker_waits(view: IdleView) -> None:
    decision = POLICY.decide(view)
    assert isinstance(decision, Wait), decision
    assert NOW_S < decision.until_s <= NOW_S + view.pace_s


def test_a_duplicate_must_win_by_a_margin() -> None:
    at_margin = queue(1, pace_s=1.0 + MARGIN)
    beyond = queue(1, pace_s=1.01 + MARGIN)
    assert isinstance(POLICY.decide(idle(at_margin)), Wait)
    assert isinstance(POLICY.decide(idle(beyond)), Duplicate)


def test_one_that_is_late_is_expected_to_need_as_long_again() -> None:
    assert queue(1, since=0.25).expected_end_s(0, NOW_S) == NOW_S + 0.75
    assert queue(1, since=4.0).expected_end_s(0, NOW_S) == NOW_S + 3.0
    assert queue(1, 2, since=4.0).expected_end_s(1, NOW_S) == NOW_S + 4.0


def test_the_first_one_goes_on_as_it_is_seen_to() -> None:
    assert queue(1, since=2.0, left=2.0).expected_end_s(0, NOW_S) == NOW_S + 2.0
    assert queue(1, 2, since=2.0, left=2.0).expected_end_s(1, NOW_S) == NOW_S + 3.0
    assert queue(1, since=0.25, left=0.25).expected_end_s(0, NOW_S) == NOW_S + 0.25
    assert queue(1, since=2.0, left=-0.5).expected_end_s(0, NOW_S) == NOW_S + 0.5


def test_nothing_is_expected_of_one_that_is_silent() -> None:
    limit_s = SILENCE * 1.0
    assert queue(1, silent=limit_s + 0.01).expected_end_s(0, NOW_S) == math.inf
    assert queue(1, silent=limit_s - 0.01).expected_end_s(0, NOW_S) < math.inf
    fast = queue(1, pace_s=1e-3, silent=SILENCE_FLOOR_S * 0.9)
    assert not fast.is_silent  # it may only wait for a core


@settings(max_examples=200)
@given(
    st.lists(
        st.builds(
            Queue,
            st.integers(0, 8),
            st.lists(st.integers(0, 20), max_size=3).map(tuple),
            st.floats(90.0, 100.0),
            st.floats(0.01, 5.0),
            st.floats(0.0, 9.0),
            st.none() | st.floats(90.0, 110.0),
        ),
        max_size=4,
    ),
    st.lists(st.integers(0, 20), max_size=2),
    st.floats(0.01, 5.0),
)
def test_a_decision_names_work_that_exists(
    queues: list[Queue], pending: list[int], pace_s: float
) -> None:
    decision = POLICY.decide(IdleView(NOW_S, 9, pace_s, pending, queues))
    assert decision == POLICY.decide(IdleView(NOW_S, 9, pace_s, pending, queues))
    if isinstance(decision, Wait):
        assert decision.until_s > NOW_S
        assert not pending
    elif decision.holder is None:
        assert decision.micro_batch in pending
    else:
        held = [one for one in queues if one.worker == decision.holder]
        assert any(
            decision.micro_batch == one.micro_batches[-1] for one in held if one.micro_batches
        )


@pytest.mark.parametrize(
    ("samples_s", "pace_s"),
    [
        pytest.param([], 7.0, id="none: the fallback"),
        pytest.param([900.0], 7.0, id="one: it may be a bad one"),
        pytest.param([8.0, 900.0], 8.0, id="two, one of them bad"),
        pytest.param([1.0, 1.0, 9.0], 1.0, id="a bad one does not count"),
        pytest.param([50.0] * 9 + [1.0] * PACE_WINDOW, 1.0, id="old ones are forgotten"),
        pytest.param([1.0] * 5 + [60.0] * 4, 1.0, id="four bad ones do not count"),
    ],
)
def test_pace(samples_s: list[float], pace_s: float) -> None:
    assert pace(samples_s, 7.0) == pace_s


@given(st.lists(st.floats(0.5, 2.0), max_size=12), st.floats(1e-3, 1e6), st.integers(0, 12))
def test_one_bad_sample_moves_a_pace_no_further_than_good_ones_lie(
    good_s: list[float], bad_s: float, place: int
) -> None:
    samples_s = [*good_s[:place], bad_s, *good_s[place:]]
    recent = [*samples_s[-PACE_WINDOW:], *[1.0] * (FEW_SAMPLES - len(samples_s))]
    if bad_s in recent:
        recent.remove(bad_s)
    assert min(recent) <= pace(samples_s, 1.0) <= max(recent)
