"""Who hangs and who only waits: the earliest that is blocked is blamed, victims never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from policies.signals import Groups, OpenTransfers, PollView, Processes
from policies.stalls import Stalls, Suspects
from policies.verdicts import Culprit, Kind, Link, Node, Verdict, Worker

STEP_S, POLL_S = 1.0, 0.05
OUTSIDE, INSIDE = Kind.HANG_OUTSIDE, Kind.HANG_IN_COMMUNICATION


@dataclass(frozen=True)
class Case:
    """Processes by number, all of them nodes; silent ones by their silence in seconds."""

    num: int
    silent_s: dict[int, float]
    waits: Sequence[tuple[int, int]] = ()
    groups: Sequence[tuple[int, int, int, int]] = ()
    """(group, process, started, done)."""
    still: Sequence[tuple[int, int, int]] = ()
    """(group, sender, receiver) of transfers without bytes."""
    idle: Sequence[int] = ()
    new: Sequence[int] = ()
    is_node: bool = True
    is_exempt: bool = False


def view(case: Case, now_s: float) -> PollView:
    numbers = range(case.num)
    groups, still = np.array(case.groups, int).reshape(-1, 4), np.array(case.still, int)
    still = still.reshape(-1, 3)
    return PollView(
        now_s=now_s,
        step=7,
        usual_step_s=STEP_S,
        processes=Processes(
            is_node_P=np.full(case.num, case.is_node),
            number_P=np.arange(case.num),
            silent_s_P=np.array([case.silent_s.get(one, 0.01) for one in numbers]),
            is_busy_P=np.array([one not in case.idle for one in numbers]),
            has_done_P=np.array([one not in case.new for one in numbers]),
        ),
        waits_WQ=np.array(case.waits, int).reshape(-1, 2),
        groups=Groups(
            group_G=groups[:, 0],
            process_G=groups[:, 1],
            started_G=groups[:, 2],
            done_G=groups[:, 3],
        ),
        open_transfers=OpenTransfers(
            group_L=still[:, 0],
            sender_L=still[:, 1],
            receiver_L=still[:, 2],
            silent_s_L=np.full(len(still), 9.0),
        ),
        is_exempt=case.is_exempt,
    )


def decided(case: Case, num_polls: int = 3) -> list[Verdict]:
    policy = Stalls()
    memory: Suspects = policy.begin()
    verdicts: list[Verdict] = []
    for poll in range(num_polls):
        verdicts, memory = policy.decide(view(case, 100 + poll * POLL_S), memory)
    return verdicts


def round_of(num: int, *, behind: Sequence[int] = (), group: int = 0) -> list[tuple[int, ...]]:
    """All have started operation 5 and not done it; those behind are at 4, and done with it."""
    return [(group, one, 4 if one in behind else 5, 4) for one in range(num)]


ALL = dict.fromkeys(range(4), 5.0)
CASES = [
    pytest.param(Case(4, {}), [], id="all move"),
    pytest.param(Case(4, {2: 5.0}), [(OUTSIDE, Node(2))], id="one hangs in its own work"),
    pytest.param(
        Case(4, {2: 5.0}, is_node=False), [(OUTSIDE, Worker(2))], id="a worker, and is called so"
    ),
    pytest.param(Case(4, {2: 5.0}, idle=[2]), [], id="an idle one has no reason to move"),
    pytest.param(Case(4, {2: 5.0}, new=[2]), [], id="a new one may be loading"),
    pytest.param(Case(4, {2: 99.0}, new=[2]), [(OUTSIDE, Node(2))], id="but not for ever"),
    pytest.param(Case(4, {2: 5.0}, is_exempt=True), [], id="in an evaluation or checkpoint"),
    pytest.param(Case(4, {2: 1.9}), [], id="less than two steps"),
    pytest.param(
        Case(4, ALL, waits=[(0, 1), (1, 2), (2, 3)]),
        [(OUTSIDE, Node(3))],
        id="the first in a chain of waits",
    ),
    pytest.param(
        Case(4, {0: 5.0, 1: 5.0}, waits=[(0, 1), (1, 2)]), [], id="who waits for one that moves"
    ),
    pytest.param(
        Case(4, ALL, groups=round_of(4, behind=[2])),
        [(OUTSIDE, Node(2))],
        id="one has not begun the operation that all wait in",
    ),
    pytest.param(
        Case(4, {0: 5.0, 1: 5.0, 3: 5.0}, groups=round_of(4, behind=[2])),
        [],
        id="the one behind moves on",
    ),
    pytest.param(
        Case(
            6,
            dict.fromkeys(range(6), 5.0),
            groups=[*round_of(3, behind=[2]), (1, 2, 9, 8), (1, 3, 9, 8), (1, 4, 8, 8)],
            waits=[(5, 0)],
        ),
        [(OUTSIDE, Node(4))],
        id="behind in one group because it is in flight in another",
    ),
    pytest.param(
        Case(4, ALL, groups=round_of(4), still=[(0, 1, 2)]),
        [(INSIDE, Link(1, 2))],
        id="one link without bytes",
    ),
    pytest.param(
        Case(4, ALL, groups=round_of(4), still=[(0, 1, 2), (0, 0, 2), (0, 2, 3)]),
        [(INSIDE, Node(2))],
        id="all links of one end",
    ),
    pytest.param(
        Case(4, ALL, groups=round_of(4), still=[(0, 0, 1), (0, 2, 3)]),
        [(INSIDE, Link(0, 1)), (INSIDE, Link(2, 3))],
        id="two links with nothing in common",
    ),
    pytest.param(
        Case(4, ALL, groups=round_of(4)),
        [(INSIDE, Node(one)) for one in range(4)],
        id="nothing known of links",
    ),
    pytest.param(
        Case(4, {0: 5.0, 1: 5.0}, groups=round_of(4)), [], id="others in the operation move"
    ),
    pytest.param(
        Case(5, {**ALL, 4: 5.0}, groups=round_of(4), still=[(0, 1, 2)]),
        [(OUTSIDE, Node(4)), (INSIDE, Link(1, 2))],
        id="two faults at once",
    ),
    pytest.param(
        Case(4, ALL, waits=[(0, 1), (1, 2), (2, 1), (3, 0)]),
        [(INSIDE, Node(1)), (INSIDE, Node(2))],
        id="a circle of waits",
    ),
]


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_who_is_blamed(case: Case, expected: list[tuple[Kind, Culprit]]) -> None:
    assert [one.name for one in decided(case)] == expected


def test_a_verdict_takes_three_polls_and_names_numbers() -> None:
    case = Case(4, {2: 5.0})
    assert decided(case, 2) == []
    (verdict,) = decided(case)
    assert verdict.reason == (
        "node 2 waits for nobody and has made no progress for 5.00 s (limit 2.00 s)"
    )
    assert verdict.evidence == {"silent_s": 5.0, "limit_s": 2.0, "accused": 1}
    assert 0.8 < verdict.confidence < 1


def test_the_accused_share_the_confidence() -> None:
    verdicts = decided(Case(4, ALL, groups=round_of(4)))
    assert sum(one.confidence for one in verdicts) < 1
    assert "as one of 4 that do" in verdicts[0].reason


@pytest.mark.parametrize("usual_step_s", [0.4, 2.0])
def test_a_hang_is_found_within_three_steps(usual_step_s: float) -> None:
    policy = Stalls()
    memory = policy.begin()
    for poll in range(400):
        silent_s = poll * POLL_S
        now = view(Case(4, {2: silent_s}), 100 + silent_s)
        now = PollView(
            **{name: getattr(now, name) for name in PollView.__slots__ if name != "usual_step_s"},
            usual_step_s=usual_step_s,
        )
        verdicts, memory = policy.decide(now, memory)
        if verdicts:
            assert silent_s <= 3 * usual_step_s
            return
    pytest.fail("never found")


def test_an_observer_that_stood_still_blames_nobody() -> None:
    """After a pause of the whole machine everybody seems to have been silent."""
    policy = Stalls()
    memory = policy.begin()
    for poll in range(5):
        _, memory = policy.decide(view(Case(4, {}), 100 + poll * POLL_S), memory)
    for poll in range(30):  # 30 s later
        verdicts, memory = policy.decide(view(Case(4, ALL), 130 + poll * POLL_S), memory)
        assert verdicts == []
    for poll in range(30, 60):  # they are silent still
        verdicts, memory = policy.decide(view(Case(4, ALL), 130 + poll * POLL_S), memory)
    assert len(verdicts) == 4


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12), st.data())
def test_in_any_order_of_waits_only_those_are_blamed_that_wait_for_nobody(
    num: int, data: st.DataObject
) -> None:
    """A forest of waits: whoever is silent and waits for somebody is a victim."""
    awaited = {
        one: data.draw(st.integers(0, one - 1))
        for one in range(1, num)
        if data.draw(st.booleans(), f"{one} waits")
    }
    silent = data.draw(st.sets(st.integers(0, num - 1)))
    case = Case(num, dict.fromkeys(silent, 5.0), waits=list(awaited.items()))
    note(f"waits {awaited}, silent {sorted(silent)}")
    blamed = {one.culprit for one in decided(case)}
    assert blamed == {Node(one) for one in silent if one not in awaited}
