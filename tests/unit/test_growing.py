"""How many hosts are asked for, and which may come back, over time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.growing import (
    Asked,
    Growing,
    GrowingView,
    HostView,
    Readmission,
    Refuse,
    Take,
    Wait,
    moves,
)

NOW_S = 1000.0
POLICY = Growing(cooldown_s=10.0, patience_s=100.0, refusal_limit=2, window_s=500.0)
JOB = GrowingView(now_s=NOW_S, wanted=8, least=1, there=2, num_workers=16)
ASKING = Asked(6, NOW_S - 50, NOW_S - 50, there=2)


@pytest.mark.parametrize(
    ("view", "num", "reason"),
    [
        pytest.param(JOB, 6, "asks for 6 more: 2 of 8 hosts are there", id="all at once"),
        pytest.param(replace(JOB, there=8), 0, "8 hosts are there, 8 wanted", id="all are there"),
        pytest.param(replace(JOB, there=9), 0, "9 hosts are there", id="more than wanted"),
        pytest.param(replace(JOB, num_workers=5), 3, "2 of 5 hosts", id="one for each worker"),
        pytest.param(replace(JOB, num_workers=1, least=4), 2, "2 of 4", id="at least the least"),
        pytest.param(replace(JOB, there=5, asked=ASKING), 3, "5 of 8", id="less at once"),
        pytest.param(
            replace(JOB, there=1, asked=replace(ASKING, changed_s=NOW_S - 4)),
            6,
            "cooling down for 6.0 s",
            id="more after a change",
        ),
        pytest.param(
            replace(JOB, there=1, lost_s=NOW_S - 1, asked=ASKING),
            6,
            "cooling down for 9.0 s",
            id="more after a loss",
        ),
        pytest.param(
            replace(JOB, there=1, least=2, lost_s=NOW_S, asked=ASKING),
            7,
            "asks for 7 more",
            id="at once if it cannot go on",
        ),
        pytest.param(
            replace(JOB, asked=replace(ASKING, since_s=NOW_S - 100)),
            3,
            "none came within 100 s",
            id="half if nobody comes",
        ),
        pytest.param(
            replace(JOB, asked=replace(ASKING, num=1, since_s=NOW_S - 100, unanswered=2)),
            6,
            "asks for 6 more",
            id="all again",
        ),
        pytest.param(
            replace(JOB, there=3, asked=replace(ASKING, num=1, since_s=0.0, unanswered=2)),
            5,
            "3 of 8",
            id="all that are missing once one came",
        ),
        pytest.param(
            replace(JOB, refusals_s=(NOW_S - 9, NOW_S - 1), asked=ASKING),
            0,
            "2 hosts were of no use within 500 s (limit 2)",
            id="not for more of no use",
        ),
        pytest.param(replace(JOB, refusals_s=(NOW_S - 500, NOW_S - 1)), 6, "", id="long ago"),
    ],
)
def test_decisions(view: GrowingView, num: int, reason: str) -> None:
    growth = POLICY.decide(view)
    assert growth.asked.num == num
    assert reason in growth.reason


class Cluster:
    """Gives all hosts of a request at once, `delay_s` after it; none if it cannot have them all."""

    def __init__(self, most: int, delay_s: float) -> None:
        self.most, self.delay_s = most, delay_s
        self.there = 1
        self._asked: tuple[int, float] = (0, 0.0)

    def ask(self, num: int, now_s: float) -> None:
        if num != self._asked[0]:
            self._asked = num, now_s
        num, since_s = self._asked
        if num and self.there + num <= self.most and now_s - since_s >= self.delay_s:
            self.there += num


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.floats(0, 90))
def test_it_gets_what_the_cluster_can_give_and_never_more_than_is_wanted(
    wanted: int, num_workers: int, most: int, delay_s: float
) -> None:
    cluster, asked = Cluster(most, delay_s), Asked()
    for second in range(0, 20_000, 5):
        view = GrowingView(
            now_s=float(second),
            wanted=wanted,
            least=1,
            there=cluster.there,
            num_workers=num_workers,
            asked=asked,
        )
        asked = POLICY.decide(view).asked
        assert 0 <= asked.num <= max(0, min(wanted, num_workers) - cluster.there)
        cluster.ask(asked.num, view.now_s)
        if cluster.there == min(wanted, num_workers):
            break
    assert cluster.there == max(1, min(wanted, num_workers, most))


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.1, 50)), min_size=1, max_size=60))
def test_more_is_asked_for_only_after_the_cooldown(happens: list[tuple[int, float]]) -> None:
    now_s, asked, rose_s = 0.0, Asked(), float("-inf")
    for there, passed_s in happens:
        now_s += passed_s
        view = replace(JOB, now_s=now_s, least=0, there=there, asked=asked)
        after = POLICY.decide(view).asked
        if after.num > asked.num:
            assert now_s - max(rose_s, asked.changed_s) >= POLICY.cooldown_s
            rose_s = now_s
        asked = after


HOSTS = Readmission(free=2, limit=6, window_s=1000.0, base_s=10.0, cap_s=30.0)


@pytest.mark.parametrize(
    ("ages_s", "decision"),
    [
        pytest.param([], Take(""), id="never lost"),
        pytest.param([5, 0], Take(""), id="twice is free"),
        pytest.param([9, 5, 0], Wait(NOW_S + 10, "lost 3 times within 1000 s"), id="the third"),
        pytest.param([9, 5, 10], Take(""), id="waited"),
        pytest.param([9, 9, 9, 0], Wait(NOW_S + 20, "taken again after 20 s"), id="twice as long"),
        pytest.param([9, 9, 9, 9, 0], Wait(NOW_S + 30, "after 30 s"), id="up to the cap"),
        pytest.param([9, 9, 9, 9, 9, 0], Refuse("lost 6 times within 1000 s (limit 6)"), id="last"),
        pytest.param([1000] * 50, Take(""), id="long ago"),
    ],
)
def test_a_host_that_is_lost_again_and_again(
    ages_s: list[float], decision: Take | Wait | Refuse
) -> None:
    decided = HOSTS.decide(HostView(NOW_S, [NOW_S - age_s for age_s in ages_s]))
    assert type(decided) is type(decision)
    assert decision.reason in decided.reason
    if isinstance(decision, Wait):
        assert isinstance(decided, Wait)
        assert decided.until_s == pytest.approx(decision.until_s)


@given(st.lists(st.floats(0, 3000), max_size=30))
def test_a_host_is_taken_again_once_its_losses_are_forgotten(losses_s: list[float]) -> None:
    now_s = max(losses_s, default=0.0)
    decided = HOSTS.decide(HostView(now_s, sorted(losses_s)))
    if isinstance(decided, Wait):
        assert now_s < decided.until_s <= now_s + HOSTS.cap_s
    assert isinstance(HOSTS.decide(HostView(now_s + HOSTS.window_s, sorted(losses_s))), Take)


@pytest.mark.parametrize(
    ("loads", "made"),
    [
        ({}, []),
        ({0: 3}, []),
        ({0: 2, 1: 1}, []),
        ({0: 4, 1: 0}, [(0, 1), (0, 1)]),
        ({0: 3, 1: 3, 2: 0}, [(1, 2), (0, 2)]),
        ({0: 4, 1: 0, 2: 0}, [(0, 1), (0, 2)]),
    ],
)
def test_moves_even_out(loads: dict[int, int], made: list[tuple[int, int]]) -> None:
    assert moves(loads) == made
