"""What is done about verdicts, in which order, and what the budget forbids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.owning import SlowLink
from policies.steering import (
    Act,
    Remedy,
    Steering,
    SteeringView,
    Taken,
    Tell,
    drained,
    undo,
)
from policies.verdicts import Culprit, Kind, Link, Node, Verdict, Worker

NODE_OF = {worker: worker // 4 for worker in range(40)}
ACT = Steering(mode="act", min_workers=2)


def verdict(kind: Kind, culprit: Culprit, confidence: float = 0.95) -> Verdict:
    return Verdict(
        kind=kind, culprit=culprit, since_step=7, confidence=confidence, reason="it is so"
    )


SLOW = verdict(Kind.SLOW_COMPUTATION, Worker(3))
LIAR = verdict(Kind.SILENT_CORRUPTION, Worker(5))
PRESSED = verdict(Kind.RESOURCE_PRESSURE, Node(2))


def view(
    *verdicts: Verdict,
    now_s: float = 1000.0,
    taken: Sequence[Taken] = (),
    spares: Sequence[int] = (),
    since_s: float = 990.0,
) -> SteeringView:
    return SteeringView(
        now_s=now_s,
        verdicts=verdicts,
        since_s={one.name: since_s for one in verdicts},
        node_of=NODE_OF,
        spares=spares,
        taken=taken,
    )


def done(remedy: Remedy, of: Verdict, time_s: float, num_workers: int = 0) -> Taken:
    return Taken(time_s, remedy, of.culprit, of.kind, num_workers)


FIRST = [
    pytest.param(SLOW, Remedy.LEASE_AGAIN, id="slow worker"),
    pytest.param(LIAR, Remedy.QUARANTINE, id="liar"),
    pytest.param(verdict(Kind.HANG_OUTSIDE, Worker(1)), Remedy.LEASE_AGAIN, id="hung worker"),
    pytest.param(verdict(Kind.HANG_OUTSIDE, Node(1)), Remedy.AVOID, id="hung node"),
    pytest.param(
        verdict(Kind.HANG_IN_COMMUNICATION, Link(0, 1)), Remedy.ROUTE_AROUND, id="hung link"
    ),
    pytest.param(verdict(Kind.SLOW_LINK, Link(0, 1)), Remedy.ROUTE_AROUND, id="slow link"),
    pytest.param(verdict(Kind.SLOW_SENDER, Node(1)), Remedy.ROUTE_AROUND, id="slow sender"),
    pytest.param(verdict(Kind.RESOURCE_PRESSURE, Node(1)), Remedy.AVOID, id="pressure"),
    pytest.param(verdict(Kind.FLAPPING, Node(1)), Remedy.AVOID, id="flapping"),
]


@pytest.mark.parametrize(("one", "remedy"), FIRST)
def test_the_mildest_remedy_comes_first(one: Verdict, remedy: Remedy) -> None:
    (act,) = ACT.decide(view(one))
    assert isinstance(act, Act)
    assert act.remedy is remedy
    also = ""
    if isinstance(one.culprit, Worker):
        also = f", start nothing more on node {NODE_OF[one.culprit.number]} meanwhile"
    assert act.reason == f"{remedy.value} {one.culprit}{also}: it is so"


def test_where_there_is_one_node_only_it_is_not_said_to_be_avoided() -> None:
    (act,) = ACT.decide(replace(view(SLOW), node_of=dict.fromkeys(range(4), 0)))
    assert act.reason == "lease its work to others worker 3: it is so"


def test_every_kind_has_a_remedy() -> None:
    for kind in Kind:
        culprits: list[Culprit] = [Worker(1), Node(1), Link(0, 1)]
        assert any(ACT.decide(view(verdict(kind, one))) for one in culprits), kind


def test_a_verdict_that_holds_brings_the_next_remedy_after_a_while() -> None:
    taken = [done(Remedy.LEASE_AGAIN, SLOW, 990.0)]
    assert ACT.decide(view(SLOW, now_s=1000.0, taken=taken)) == []
    (act,) = ACT.decide(view(SLOW, now_s=1060.0, taken=taken, spares=(5, 6, 7)))
    assert isinstance(act, Act)
    assert (act.remedy, act.workers, act.bring_spare) == (Remedy.RESTART, (3,), 1)
    taken.append(done(Remedy.RESTART, SLOW, 1060.0, 1))
    taken.append(done(Remedy.QUARANTINE, SLOW, 1130.0, 1))
    assert ACT.decide(view(SLOW, now_s=9000.0, taken=taken)) == []


def test_a_verdict_that_comes_again_is_met_mildly_again() -> None:
    pressed = verdict(Kind.RESOURCE_PRESSURE, Node(2))
    taken = [done(Remedy.AVOID, pressed, 500.0), done(Remedy.AVOID, SLOW, 500.0)]
    (act,) = ACT.decide(view(pressed, taken=taken))
    assert act.remedy is Remedy.AVOID
    (act,) = ACT.decide(view(pressed, taken=taken, since_s=499.0))
    assert act.remedy is Remedy.DRAIN


def paced(kind: Kind, culprit: Culprit, excess: float) -> Verdict:
    return replace(verdict(kind, culprit), evidence={"excess_ratio": excess})


def around(*verdicts: Verdict, undone: bool = False, since_s: float = 990.0) -> list[SlowLink]:
    """What traffic is planned around, once that was done about each of them."""
    taken = [replace(done(Remedy.ROUTE_AROUND, one, 995.0), undone=undone) for one in verdicts]
    return list(ACT.slow_links(view(*verdicts, taken=taken, since_s=since_s)))


def test_traffic_is_planned_around_a_slow_link_as_long_as_it_is_slow() -> None:
    both = [paced(Kind.SLOW_LINK, Link(2, 1), 3.1), paced(Kind.SLOW_LINK, Link(1, 2), 6.7)]
    assert around(*both) == [SlowLink(1, 2, 8.0)], "in both directions goes the same"
    assert around(*both, undone=True) == []
    assert around(*both, since_s=999.0) == [], "it was well meanwhile"
    taken = [done(Remedy.ROUTE_AROUND, one, 995.0) for one in both]
    assert ACT.slow_links(view(taken=taken)) == ()
    assert ACT.slow_links(view(*both)) == (), "nobody has decided it yet"


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        pytest.param(paced(Kind.SLOW_SENDER, Node(3), 0.5), SlowLink(3, None, 16.0), id="sender"),
        pytest.param(paced(Kind.SLOW_LINK, Link(0, 1), 0.2), SlowLink(0, 1, 2**0.5), id="little"),
        pytest.param(paced(Kind.SLOW_LINK, Link(0, 1), 900.0), SlowLink(0, 1, 16.0), id="much"),
        pytest.param(verdict(Kind.FLAPPING, Link(0, 1)), SlowLink(0, 1, 16.0), id="flapping"),
    ],
)
def test_how_much_less_is_to_go_there_follows_from_how_slow_it_is(
    one: Verdict, expected: SlowLink
) -> None:
    assert around(one) == [expected]


def test_observe_only_says_and_notify_acts_once_its_time_is_up() -> None:
    (told,) = Steering(mode="observe").decide(view(SLOW))
    assert isinstance(told, Tell)
    assert told.until_s is None
    assert told.reason.startswith("would lease its work to others worker 3")
    notify = Steering(mode="notify", escalate_s=60.0)
    (told,) = notify.decide(view(SLOW))
    assert isinstance(told, Tell)
    assert told.until_s == 1050.0
    assert told.reason.startswith("in 50 s: ")
    assert isinstance(notify.decide(view(SLOW, now_s=1050.0))[0], Act)


@pytest.mark.parametrize(
    ("of", "undone", "left"),
    [
        pytest.param(SLOW, Remedy.LEASE_AGAIN, None, id="mildest"),
        pytest.param(SLOW, Remedy.RESTART, Remedy.LEASE_AGAIN, id="in between"),
        pytest.param(LIAR, Remedy.QUARANTINE, None, id="only one"),
        pytest.param(PRESSED, Remedy.AVOID, None, id="node avoided"),
        pytest.param(PRESSED, Remedy.DRAIN, Remedy.AVOID, id="node drained"),
    ],
)
def test_what_was_undone_is_not_done_again_nor_anything_harsher(
    of: Verdict, undone: Remedy, left: Remedy | None
) -> None:
    """Whatever it was taken back from, and at whatever time."""
    for kind in (of.kind, Kind.FLAPPING):
        taken = [undo(Taken(900.0, undone, of.culprit, kind))]
        decisions = ACT.decide(view(of, taken=taken))
        assert [one.remedy for one in decisions] == ([] if left is None else [left])
        if left is not None:
            taken.append(done(left, of, 990.0))
        assert ACT.decide(view(of, now_s=2000.0, taken=taken)) == []


def test_a_doubtful_verdict_takes_nobody_away() -> None:
    doubtful = replace(LIAR, confidence=0.5)
    (told,) = ACT.decide(view(doubtful))
    assert isinstance(told, Tell)
    assert "not sure enough, confidence 0.50, at least 0.60 needed: give" in told.reason


def test_never_below_the_least_number_of_workers() -> None:
    narrow = replace(ACT, min_workers=40)
    (told,) = narrow.decide(view(LIAR))
    assert isinstance(told, Tell)
    assert "39 workers would be left (workers.min 40)" in told.reason
    assert isinstance(narrow.decide(view(LIAR, spares=(1,)))[0], Act)


def test_no_more_than_a_share_of_the_fleet_within_an_hour_the_worst_first() -> None:
    """A tenth of forty: four."""
    liars = [verdict(Kind.SILENT_CORRUPTION, Worker(one), 0.8 + one / 100) for one in range(6)]
    decisions = ACT.decide(view(*liars))
    acted = [one.workers for one in decisions if isinstance(one, Act)]
    assert acted == [(5,), (4,), (3,), (2,)]
    told = [one.reason for one in decisions if isinstance(one, Tell)]
    assert len(told) == 2
    assert "5 workers would be taken away within an hour, of 4 allowed" in told[0]
    before = [done(Remedy.QUARANTINE, verdict(Kind.FLAPPING, Worker(30)), 900.0, 4)]
    assert isinstance(ACT.decide(view(LIAR, taken=before))[0], Tell)
    assert isinstance(ACT.decide(view(LIAR, now_s=4600.0, taken=before))[0], Act)
    assert isinstance(ACT.decide(view(LIAR, taken=[undo(before[0])]))[0], Act)


def test_a_drained_node_takes_all_of_its_workers() -> None:
    pressed = verdict(Kind.RESOURCE_PRESSURE, Node(2))
    held = view(pressed, taken=[done(Remedy.AVOID, pressed, 0.0)], since_s=0.0)
    (act,) = ACT.decide(held)
    assert isinstance(act, Act)
    assert (act.remedy, act.workers) == (Remedy.DRAIN, (8, 9, 10, 11))
    (told,) = replace(ACT, min_nodes=10).decide(held)
    assert isinstance(told, Tell)
    assert told.reason.startswith("9 nodes would be left (nodes.min 10): drain node 2")


def test_a_node_that_was_drained_counts_no_more() -> None:
    pressed, other = (verdict(Kind.RESOURCE_PRESSURE, Node(one)) for one in (2, 3))
    before = [done(Remedy.AVOID, pressed, 0.0), done(Remedy.DRAIN, other, 0.0)]
    assert drained([*before, undo(done(Remedy.DRAIN, pressed, 0.0))]) == {3: other.kind}
    policy = replace(ACT, min_nodes=9)
    (told,) = policy.decide(view(pressed, taken=before, since_s=0.0))
    assert isinstance(told, Tell)


def test_nodes_that_are_drained_at_once_count_together() -> None:
    sick = [verdict(Kind.RESOURCE_PRESSURE, Node(one)) for one in (2, 3, 4)]
    before = [done(Remedy.AVOID, one, 0.0) for one in sick]
    policy = replace(ACT, min_nodes=8, share_per_hour=1.0)
    decisions = policy.decide(view(*sick, taken=before, since_s=0.0))
    assert [isinstance(one, Act) for one in decisions] == [True, True, False]
    assert decisions[2].reason.startswith("7 nodes would be left (nodes.min 8): drain node 4")


@pytest.mark.parametrize(
    ("spares", "can"), [((), False), ((2,), False), ((7,), False), ((3,), True)]
)
def test_spares_of_nodes_that_go_are_none_that_are_left(spares: Sequence[int], can: bool) -> None:
    """Node 2 is to go; node 7 went, or still does, with its four workers: 33 are wanted of 32."""
    gone = done(Remedy.DRAIN, verdict(Kind.FLAPPING, Node(7)), 0.0, 4)
    taken = [gone, done(Remedy.AVOID, PRESSED, 0.0)]
    policy = replace(ACT, min_workers=33, share_per_hour=1.0)
    (decision,) = policy.decide(view(PRESSED, taken=taken, spares=spares, since_s=0.0))
    assert isinstance(decision, Act) == can
    if isinstance(decision, Act):
        assert decision.bring_spare == 1
    else:
        assert "32 workers would be left (workers.min 33)" in decision.reason


def test_nothing_is_started_on_a_suspect_node() -> None:
    gone = done(Remedy.DRAIN, verdict(Kind.FLAPPING, Node(7)), 0.0, 4)
    pressed = verdict(Kind.RESOURCE_PRESSURE, Node(6))
    taken = [gone, done(Remedy.AVOID, pressed, 0.0)]
    taken.append(undo(done(Remedy.AVOID, verdict(Kind.FLAPPING, Node(8)), 0.0)))

    def avoided(*verdicts: Verdict, taken: Sequence[Taken]) -> frozenset[int]:
        return ACT.avoided(view(*verdicts, taken=taken, since_s=0.0))

    assert avoided(SLOW, pressed, taken=taken) == {6, 7}, "nothing was done about it yet"
    relieved = done(Remedy.LEASE_AGAIN, SLOW, 0.0)
    assert avoided(SLOW, pressed, taken=[*taken, relieved]) == {0, 6, 7}
    assert avoided(SLOW, pressed, taken=[*taken, undo(relieved)]) == {6, 7}
    assert avoided(taken=[*taken, relieved]) == {7}, "as long as it is under pressure"


def test_a_verdict_that_comes_again_is_told_again_before_anything_is_done() -> None:
    """What was done the last time does not count as done now."""
    notify = Steering(mode="notify", escalate_s=60.0)
    for sick, remedy in ((PRESSED, Remedy.AVOID), (SLOW, Remedy.LEASE_AGAIN)):
        taken = [done(remedy, sick, 500.0)]
        soon = view(sick, taken=taken, since_s=990.0)
        assert notify.avoided(soon) == frozenset()
        (told,) = notify.decide(soon)
        assert isinstance(told, Tell)
        assert told.until_s == 1050.0
        late = view(sick, now_s=1050.0, taken=taken, since_s=990.0)
        (act,) = notify.decide(late)
        assert isinstance(act, Act)
        assert act.remedy is remedy
        after = view(sick, now_s=1051.0, taken=[*taken, done(remedy, sick, 1050.0)], since_s=990.0)
        assert len(notify.avoided(after)) == 1


@given(st.floats(0.0, 59.9), st.lists(st.floats(0.0, 989.0), max_size=3))
def test_in_notify_mode_nothing_is_done_before_it_was_told_for_so_long(
    waited_s: float, before_s: list[float]
) -> None:
    notify = Steering(mode="notify", escalate_s=60.0)
    verdicts = (SLOW, LIAR, PRESSED)
    taken = [done(Remedy.AVOID, PRESSED, time_s) for time_s in before_s]
    now = view(*verdicts, now_s=990.0 + waited_s, taken=taken, since_s=990.0)
    assert all(isinstance(one, Tell) for one in notify.decide(now))
    assert notify.avoided(now) == frozenset()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 39), max_size=40, unique=True),
    st.integers(1, 40),
    st.floats(0.01, 1.0),
    st.integers(0, 4),
)
def test_whatever_the_verdicts_the_budget_holds(
    liars: list[int], min_workers: int, share: float, spares: int
) -> None:
    policy = Steering(mode="act", min_workers=min_workers, share_per_hour=share)
    verdicts = [verdict(Kind.SILENT_CORRUPTION, Worker(one)) for one in liars]
    acts = [
        one for one in policy.decide(view(*verdicts, spares=(9,) * spares)) if isinstance(one, Act)
    ]
    gone = {worker for act in acts for worker in act.workers}
    assert len(gone) <= max(1, int(share * 40))
    assert 40 - len(gone) + spares >= min_workers or not gone
