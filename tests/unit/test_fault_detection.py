"""Verdicts on slow workers and links, pressure and flapping: who is blamed, and who is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from policies.fault_detection import Memory, Peers
from policies.flapping import Departure, DeparturesView, Flapping, poisson_tail
from policies.signals import StepView
from policies.slow_computation import SlowComputation, pace_of
from policies.verdicts import Culprit, Kind, Link, Node, Verdict, Worker
from tests.steps import fleet, hosts, step_view, transfers

Name = tuple[Kind, Culprit]
Make = Callable[[int], StepView]


def run(
    make: Make, num_steps: int, *, detector: Peers | None = None, memory: Memory | None = None
) -> tuple[dict[Name, int], list[Verdict], Memory]:
    """In which step each verdict first came, those that hold at the end, and the memory."""
    detector = detector or Peers()
    memory = memory or detector.begin()
    first: dict[Name, int] = {}
    verdicts: Sequence[Verdict] = ()
    for step in range(num_steps):
        diagnosis = detector.decide_step(make(step), memory)
        memory, verdicts = diagnosis.memory, diagnosis.verdicts
        for one in diagnosis.begun:
            first.setdefault(one.name, step)
    return first, list(verdicts), memory


def slowed(
    who: Mapping[int, float], *, roles: Sequence[int] = (0,) * 8, since: int = 20, seed: int = 0
) -> Make:
    """These workers take so many times as long, from a step on."""
    dice, members = np.random.default_rng(seed), fleet(roles)

    def make(step: int) -> StepView:
        return step_view(step, members, who if step >= since else {}, dice=dice)

    return make


# --- slow computation -----------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.25, 1.5, 4.0], ids="{:g} times".format)
def test_a_slow_worker_is_named_within_ten_steps_by_how_much_and_since_when(factor: float) -> None:
    first, verdicts, _ = run(slowed({3: factor}), 45)
    assert list(first) == [(Kind.SLOW_COMPUTATION, Worker(3))]
    assert first[Kind.SLOW_COMPUTATION, Worker(3)] < 20 + 10
    (verdict,) = verdicts
    assert verdict.since_step == 20
    assert verdict.evidence["excess_ratio"] == pytest.approx(factor - 1, rel=0.15)
    assert verdict.confidence > 0.9
    assert verdict.reason.startswith("worker 3 computes")
    assert "its 7 peers of role 0 since step 20" in verdict.reason


@pytest.mark.parametrize(
    ("roles", "pace_s", "load"),
    [
        pytest.param([0] * 8, {}, {}, id="all alike"),
        pytest.param([0, 0, 0, 0, 1, 1, 1, 1], {4: 3, 5: 3, 6: 3, 7: 3}, {}, id="a long stage"),
        pytest.param([0, 1, 2, 3], {1: 2.5, 3: 1.7}, {}, id="stages of one worker each"),
        pytest.param([0] * 8, {}, {2: 2.0, 5: 0.5}, id="more and less to do"),
        pytest.param([0] * 8, {6: 1.08}, {}, id="a little slower than others"),
    ],
)
def test_nobody_is_blamed_for_its_stage_or_its_load(
    roles: list[int], pace_s: dict[int, float], load: dict[int, float]
) -> None:
    dice, who = np.random.default_rng(5), fleet(roles)
    first, _, _ = run(lambda step: step_view(step, who, pace_s, dice=dice, load=load), 120)
    assert first == {}


def test_a_stage_of_one_worker_is_compared_with_its_own_past() -> None:
    pace = {1: 2.5, 3: 1.7}
    dice, who = np.random.default_rng(1), fleet([0, 1, 2, 3])

    def make(step: int) -> StepView:
        now = {**pace, 1: 2.5 * 1.6} if step >= 30 else pace
        return step_view(step, who, now, dice=dice)

    assert list(run(make, 60)[0]) == [(Kind.SLOW_COMPUTATION, Worker(1))]


def test_when_all_become_slower_nobody_is_blamed() -> None:
    assert run(slowed(dict.fromkeys(range(8), 2.0)), 60)[0] == {}
    assert run(slowed(dict.fromkeys(range(4), 2.0), roles=[0, 1, 2, 3]), 60)[0] == {}


@pytest.mark.parametrize("num_bad", [1, 3, 6])
def test_a_few_bad_steps_are_no_verdict(num_bad: int) -> None:
    dice, who = np.random.default_rng(2), fleet([0] * 8)

    def make(step: int) -> StepView:
        return step_view(step, who, {2: 5.0} if 20 <= step < 20 + num_bad else {}, dice=dice)

    assert run(make, 60)[0] == {}


def test_the_first_steps_of_a_newcomer_and_exempt_steps_teach_nothing() -> None:
    dice = np.random.default_rng(3)

    def make(step: int) -> StepView:
        who = fleet([0] * (8 if step < 20 else 9))
        pace = {8: 9.0} if step < 23 else {}
        if step % 10 < 8 and step > 30:  # most steps are exempt, and worker 1 is slow in them
            return step_view(step, who, {1: 3.0}, dice=dice, is_exempt=True)
        return step_view(step, who, pace, dice=dice)

    assert run(make, 90)[0] == {}


def test_a_verdict_ends_soon_after_the_fault() -> None:
    detector = Peers()
    memory, dice, who = detector.begin(), np.random.default_rng(4), fleet([0] * 8)
    ended = {}
    for step in range(120):
        pace = {3: 1.5} if 20 <= step < 80 else {}
        diagnosis = detector.decide_step(step_view(step, who, pace, dice=dice), memory)
        memory = diagnosis.memory
        ended |= {one.name: step for one in diagnosis.ended}
    assert list(ended) == [(Kind.SLOW_COMPUTATION, Worker(3))]
    assert 80 <= ended[Kind.SLOW_COMPUTATION, Worker(3)] < 92
    assert memory.verdicts == ()


def test_micro_batches_that_were_given_up_count_once_they_took_too_long() -> None:
    """A worker so slow that others always do its work has nothing else to show."""
    dice, who = np.random.default_rng(6), fleet([0] * 8)

    def make(step: int) -> StepView:
        view = step_view(step, who, {5: 2.0}, dice=dice)
        is_slow_B = view.computed.worker_B == 5
        return replace(view, computed=replace(view.computed, done_B=~is_slow_B))

    assert list(run(make, 20)[0]) == [(Kind.SLOW_COMPUTATION, Worker(5))]
    view = step_view(0, who, {5: 0.3}, dice=dice)
    computed = replace(view.computed, done_B=view.computed.worker_B != 5)
    assert np.isnan(pace_of(computed, who.worker_W)[0][5])


def test_a_worker_that_is_gone_is_forgotten() -> None:
    dice = np.random.default_rng(7)

    def make(step: int) -> StepView:
        who = fleet([0] * 8)
        view = step_view(step, who, {3: 2.0}, dice=dice)
        if step < 30:
            return view
        keep = who.worker_W != 3
        left = replace(
            who, worker_W=who.worker_W[keep], role_W=who.role_W[keep], node_W=who.node_W[keep]
        )
        return replace(view, fleet=left)

    first, verdicts, memory = run(make, 40)
    assert list(first) == [(Kind.SLOW_COMPUTATION, Worker(3))]
    assert verdicts == []
    assert 3 not in memory.paces.history.id_E


def test_thresholds_can_be_set() -> None:
    strict = SlowComputation()
    strict = replace(strict, outliers=replace(strict.outliers, min_excess=0.6))
    assert run(slowed({3: 1.5}), 60, detector=Peers(computation=strict))[0] == {}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(4, 24),
    factor=st.floats(1.3, 6.0),
    data=st.data(),
)
def test_whoever_is_slow_is_found_and_nobody_else(
    seed: int, num: int, factor: float, data: st.DataObject
) -> None:
    slow = data.draw(st.sets(st.integers(0, num - 1), max_size=max(1, (num - 1) // 4)))
    note(f"seed {seed}: of {num} workers {sorted(slow)} are {factor:.2f} times as slow")
    first, _, _ = run(slowed(dict.fromkeys(slow, factor), roles=[0] * num, seed=seed), 50)
    assert set(first) == {(Kind.SLOW_COMPUTATION, Worker(one)) for one in slow}


def test_a_decision_changes_no_memory() -> None:
    detector, make = Peers(), slowed({3: 2.0})
    memory = detector.begin()
    for step in range(27):
        memory = detector.decide_step(make(step), memory).memory
    rows = [row.copy() for row in memory.paces.history.rows]
    view = make(27)
    once, again = detector.decide_step(view, memory), detector.decide_step(view, memory)
    assert [one.reason for one in once.verdicts] == [one.reason for one in again.verdicts]
    for before, row in zip(rows, memory.paces.history.rows, strict=True):
        np.testing.assert_array_equal(before, row)


# --- links ----------------------------------------------------------------------------------


LINK_FAULTS = [
    pytest.param(8, {(2, None): 1.5}, {(Kind.SLOW_SENDER, Node(2))}, id="a sender"),
    pytest.param(8, {(None, 5): 1.5}, {(Kind.SLOW_RECEIVER, Node(5))}, id="a receiver"),
    pytest.param(8, {(2, 5): 2.0}, {(Kind.SLOW_LINK, Link(2, 5))}, id="a link"),
    pytest.param(
        8,
        {(2, None): 1.5, (None, 5): 2.0},
        {(Kind.SLOW_SENDER, Node(2)), (Kind.SLOW_RECEIVER, Node(5))},
        id="a sender and a receiver",
    ),
    pytest.param(
        8,
        {(2, None): 1.6, (4, 6): 3.0},
        {(Kind.SLOW_SENDER, Node(2)), (Kind.SLOW_LINK, Link(4, 6))},
        id="a sender and a link of others",
    ),
    pytest.param(
        8,
        {(2, 3): 2.0, (2, 6): 3.0},
        {(Kind.SLOW_LINK, Link(2, 3)), (Kind.SLOW_LINK, Link(2, 6))},
        id="two links of one sender",
    ),
    pytest.param(3, {(1, None): 6.0}, {(Kind.SLOW_SENDER, Node(1))}, id="a sender of three"),
    pytest.param(3, {(0, 2): 6.0}, {(Kind.SLOW_LINK, Link(0, 2))}, id="a link of three nodes"),
    pytest.param(8, {}, set(), id="nothing"),
]


@pytest.mark.parametrize(("num_nodes", "slow", "expected"), LINK_FAULTS)
def test_where_the_matrix_is_hot(
    num_nodes: int, slow: dict[tuple[int | None, int | None], float], expected: set[Name]
) -> None:
    dice, who = np.random.default_rng(8), fleet([0] * num_nodes, nodes=list(range(num_nodes)))

    def make(step: int) -> StepView:
        went = transfers(num_nodes, slow if step >= 20 else {}, dice=dice)
        return step_view(step, who, {}, dice=dice, transfers=went)

    first, verdicts, _ = run(make, 60)
    assert set(first) == expected
    assert all(step < 30 for step in first.values())
    assert {one.name for one in verdicts} == expected
    assert all(abs(one.since_step - 20) <= 2 for one in verdicts)


@pytest.mark.parametrize(
    ("factor", "num_workers", "expected"),
    [
        pytest.param(1.6, 3, set(), id="a little slower than it was"),
        pytest.param(6.0, 3, {(Kind.SLOW_RECEIVER, Node(0))}, id="six times as slow"),
        pytest.param(6.0, 6, {(Kind.SLOW_RECEIVER, Node(0))}, id="when workers came"),
    ],
)
def test_few_links_are_compared_with_their_own_past(
    factor: float, num_workers: int, expected: set[Name]
) -> None:
    dice = np.random.default_rng(8)

    def make(step: int) -> StepView:
        num = 3 if step < 30 else num_workers
        who = fleet([0] * num, nodes=[one % 3 for one in range(num)])
        went = transfers(3, {(None, 0): factor} if step >= 30 else {}, dice=dice)
        return step_view(step, who, {}, dice=dice, transfers=went)

    first, _, _ = run(make, 80)
    assert set(first) == expected


@pytest.mark.parametrize(
    ("slow", "expected"),
    [
        pytest.param(
            {(0, 1): 6.0, (2, 1): 1.7, (3, 1): 1.7}, (Kind.SLOW_LINK, Link(0, 1)), id="one"
        ),
        pytest.param(
            {(0, 1): 6.0, (2, 1): 4.0, (3, 1): 4.0}, (Kind.SLOW_RECEIVER, Node(1)), id="all"
        ),
        pytest.param(
            {(None, 1): 9.0, (1, None): 4.0}, (Kind.SLOW_RECEIVER, Node(1)), id="and answers late"
        ),
    ],
)
def test_of_few_links_those_of_a_slow_end_are_slow_alike(
    slow: dict[tuple[int | None, int | None], float], expected: Name
) -> None:
    """Who waits for a slow link takes what comes over its others later, too; and the way back is
    slow for what acknowledges what came."""
    dice, who = np.random.default_rng(8), fleet([0] * 4, nodes=list(range(4)))

    def make(step: int) -> StepView:
        went = transfers(4, slow if step >= 30 else {}, dice=dice)
        return step_view(step, who, {}, dice=dice, transfers=went)

    assert list(run(make, 60)[0]) == [expected]


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        pytest.param((0.0, 0.9), (Kind.SLOW_SENDER, Node(0)), id="only the receiver waits"),
        pytest.param((0.9, 0.0), (Kind.SLOW_RECEIVER, Node(1)), id="only the sender waits"),
        pytest.param((0.9, 0.9), (Kind.SLOW_LINK, Link(0, 1)), id="both wait"),
    ],
)
def test_of_ends_with_one_peer_the_waits_tell(waits: tuple[float, float], expected: Name) -> None:
    """Six nodes in pairs, so that every link is the only one of both ends."""
    dice, who = np.random.default_rng(9), fleet([0] * 6, nodes=list(range(6)))

    def make(step: int) -> StepView:
        all_of_them = transfers(6, {(0, 1): 8.0} if step >= 10 else {}, dice=dice, waits=waits)
        keep = (all_of_them.sender_L // 2 == all_of_them.receiver_L // 2) & (
            all_of_them.sender_L % 2 == 0
        )
        fields = {name: getattr(all_of_them, name)[keep] for name in type(all_of_them).__slots__}
        return step_view(step, who, {}, dice=dice, transfers=type(all_of_them)(**fields))

    assert list(run(make, 40)[0]) == [expected]


def test_links_of_a_lost_node_are_forgotten_and_small_messages_say_nothing() -> None:
    dice = np.random.default_rng(10)

    def make(step: int) -> StepView:
        num = 5 if step < 20 else 4
        went = transfers(num, {(1, 2): 9.0} if step >= 20 else {}, dice=dice)
        if step >= 20:
            went = replace(went, bytes_L=np.full(len(went.bytes_L), 512))
        who = fleet([0] * num, nodes=list(range(num)))
        return step_view(step, who, {}, dice=dice, transfers=went)

    first, _, memory = run(make, 50)
    assert first == {}
    assert len(memory.rates.links.id_E) in (0, 12)


@pytest.mark.parametrize("after", [3, 1], ids=["one comes", "one goes"])
def test_links_that_share_their_cards_with_others_from_now_on_are_not_slow(after: int) -> None:
    """Of three nodes the first has less to share than the others, and it shows."""
    dice, shares = np.random.default_rng(12), {(0, 1): 2.0, (0, None): 1.3}

    def make(step: int) -> StepView:
        num = {3: 2, 1: 3}[after] if step < 40 else {3: 3, 1: 2}[after]
        went = transfers(num, shares if num == 3 else {}, dice=dice)
        who = fleet([0] * num, nodes=list(range(num)))
        return step_view(step, who, {}, dice=dice, transfers=went)

    assert run(make, 100)[0] == {}


def test_a_link_that_was_slow_when_another_node_came_is_slow_still() -> None:
    dice, who = np.random.default_rng(13), fleet([0] * 4, nodes=list(range(4)))

    def make(step: int) -> StepView:
        num = 3 if step < 60 else 4
        went = transfers(num, {(0, 2): 6.0} if step >= 30 else {}, dice=dice)
        members = fleet([0] * num, nodes=list(range(num))) if num == 3 else who
        return step_view(step, members, {}, dice=dice, transfers=went)

    first, verdicts, _ = run(make, 100)
    assert set(first) == {(Kind.SLOW_LINK, Link(0, 2))}
    assert [one.name for one in verdicts] == list(first)
    assert verdicts[0].since_step < 40


# --- nodes ----------------------------------------------------------------------------------


def test_a_node_under_pressure_is_blamed_and_its_workers_are_not() -> None:
    dice, who = np.random.default_rng(11), fleet([0] * 8, nodes=[0, 0, 1, 1, 2, 2, 3, 3])

    def make(step: int) -> StepView:
        under = 20 <= step < 50
        pace = {2: 2.0, 3: 2.0} if under else {}
        return step_view(
            step, who, pace, dice=dice, hosts=hosts(4, steal={1: 0.5} if under else {})
        )

    first, _, _ = run(make, 80)
    assert list(first) == [(Kind.RESOURCE_PRESSURE, Node(1))]
    (verdict,) = run(make, 45)[1]
    assert verdict.since_step == 20
    assert "its processors are given to others 49% of the time" in verdict.reason


def test_what_all_nodes_have_is_no_pressure_and_a_kill_for_memory_always_is() -> None:
    dice, who = np.random.default_rng(12), fleet([0] * 8, nodes=[0, 0, 1, 1, 2, 2, 3, 3])
    all_of_them = dict.fromkeys(range(4), 0.4)
    seen = hosts(4, steal=all_of_them)
    assert run(lambda step: step_view(step, who, {}, dice=dice, hosts=seen), 30)[0] == {}
    killed = hosts(4, kills=[2])
    first, (verdict,), _ = run(lambda step: step_view(step, who, {}, dice=dice, hosts=killed), 1)
    assert list(first) == [(Kind.RESOURCE_PRESSURE, Node(2))]
    assert "killed for lack of memory" in verdict.reason


def test_a_card_that_is_held_back_is_pressure_and_its_workers_are_not_blamed() -> None:
    dice, who = np.random.default_rng(13), fleet([0] * 8, nodes=[0, 0, 1, 1, 2, 2, 3, 3])

    def make(step: int) -> StepView:
        hot = 20 <= step < 50
        seen = hosts(4, throttled={2: 0.8} if hot else {})
        return step_view(step, who, {4: 1.6, 5: 1.6} if hot else {}, dice=dice, hosts=seen)

    first, _, _ = run(make, 80)
    assert list(first) == [(Kind.RESOURCE_PRESSURE, Node(2))]
    (verdict,) = run(make, 45)[1]
    assert "a graphics card is held back by heat or its power supply 80% of" in verdict.reason
    assert verdict.evidence["throttled"] == pytest.approx(0.8)


def test_cards_that_are_held_back_everywhere_are_no_pressure_and_a_fault_of_one_always_is() -> None:
    dice, who = np.random.default_rng(14), fleet([0] * 8, nodes=[0, 0, 1, 1, 2, 2, 3, 3])
    warm = hosts(4, throttled=dict.fromkeys(range(4), 0.5))
    assert run(lambda step: step_view(step, who, {}, dice=dice, hosts=warm), 30)[0] == {}
    broken = hosts(4, faults=[3])
    first, (verdict,), _ = run(lambda step: step_view(step, who, {}, dice=dice, hosts=broken), 1)
    assert list(first) == [(Kind.RESOURCE_PRESSURE, Node(3))]
    assert verdict.confidence == 1.0
    assert verdict.reason.startswith("node 3: 1 faults of graphics cards: errors in their memory")


@pytest.mark.parametrize(
    ("times", "num_alike", "flaps"),
    [
        pytest.param({1: 3}, 8, True, id="three times of eight"),
        pytest.param({1: 2}, 8, False, id="twice is chance"),
        pytest.param({1: 3, 2: 3, 3: 3, 4: 3, 5: 2, 6: 3, 7: 3, 8: 3}, 8, False, id="all do"),
        pytest.param({1: 9, 2: 1, 3: 1, 4: 1}, 8, True, id="one far more often than others"),
        pytest.param({1: 3}, 10_000, True, id="three times of ten thousand"),
    ],
)
def test_who_flaps(times: dict[int, int], num_alike: int, flaps: bool) -> None:
    gone = [
        Departure(100.0 * turn + node, turn, Node(node))
        for node, num in times.items()
        for turn in range(num)
    ]
    verdicts = Flapping().decide(DeparturesView(1000.0, gone, num_alike))
    assert [one.culprit for one in verdicts] == [Node(1)] * flaps
    late = Flapping().decide(DeparturesView(9000.0, gone, num_alike))
    assert late == []


def test_the_tail_of_the_poisson_distribution() -> None:
    assert poisson_tail(0, 2.0) == 1.0
    assert poisson_tail(1, 0.5) == pytest.approx(1 - np.exp(-0.5))
    assert poisson_tail(3, 2.0) == pytest.approx(1 - 5 * np.exp(-2.0))
