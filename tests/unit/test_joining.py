"""How a node joins and how one leaves as planned, rule by rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hosts import (
    MEMBERS,
    NEXT,
    STATE,
    Host,
    commit,
    decide,
    leading,
    only,
    ordered,
    said,
    says,
    updating,
    view,
)

from elastic.core.protocol import coordinator as coord
from elastic.core.protocol import events as ev
from elastic.core.protocol import node as nodes
from elastic.core.protocol import orders
from elastic.core.protocol.holdings import VOID
from elastic.core.protocol.messages import Admit, Hello, Manifest, Membership, Report, State

WITH_3 = replace(MEMBERS, generation=2, joining=(3,))
MEMBER_3 = replace(WITH_3, generation=3, nodes=(0, 1, 2, 3), joining=())
COPY = ev.Copy(1, 3, (0, 1, 2), STATE)
UPDATE = ev.Update(7, (0, 1, 2), 3, (), (10,), 1.0, 0, observers=(3,))


def admit(host: Host, membership: Membership) -> list[nodes.NodeAction]:
    return host.do(ev.Received(None, Admit(membership)))


# The lead


def copying() -> Host:
    """Node 0 leads, and a copy goes to node 3."""
    host = leading()
    admit(host, WITH_3)
    host.do(nodes.Reached(3))
    host.holds(3, State(0, 0, None))
    return host


def test_a_copy_begins_once_the_node_answers_and_all_members_carry_it_out() -> None:
    host = leading()
    assert not only(ev.Copy, admit(host, WITH_3))
    assert said(host.do(nodes.Reached(3)), 3) == [orders.Ask(10, WITH_3)]
    actions = host.holds(3, State(0, 0, None))
    assert only(ev.Copy, actions) == [COPY], "the lead sends its share, too"
    for node in (1, 2, 3):
        assert ordered(actions, node) == [COPY]


def test_no_copy_begins_while_a_member_is_away_or_a_round_runs() -> None:
    host, update = updating()
    admit(host, WITH_3)
    host.do(nodes.Reached(3))
    assert not only(ev.Copy, host.holds(3, State(0, 0, None)))
    host.do(nodes.Lost(1))
    host.do(nodes.Reached(1))
    actions = host.holds(1, w1=Manifest(STATE.key, 0, (1,)))
    (copy,) = only(ev.Copy, actions)
    (again,) = only(ev.Update, actions)
    assert actions.index(copy) < actions.index(again), "it gets the totals of all that follows"
    assert (copy.state, again.observers, again.round) == (STATE, (3,), update.round + 1)


def test_who_joins_gets_all_orders_and_is_not_waited_for() -> None:
    host = copying()
    host.do(ev.Received(0, commit(0)))
    actions = host.hear(1, orders.Relayed(10, 1, commit(1)))
    (update,) = only(ev.Update, actions)
    assert (update.nodes, update.observers) == ((0, 1, 2), (3,))
    assert update in ordered(actions, 3)
    host.do(ev.Updated(0.5, update.round))
    host.hear(1, orders.Complete(10, update.round, 0.5))
    assert host.node.state == STATE
    host.hear(2, orders.Complete(10, update.round, 0.5))
    assert host.node.state.step == 4


def test_losing_who_joins_gives_no_round_up() -> None:
    host = copying()
    host.do(ev.Received(0, commit(0)))
    host.hear(1, orders.Relayed(10, 1, commit(1)))
    assert not only(ev.GiveUp, host.do(nodes.Lost(3)))
    assert host.told().gone == ()


def test_it_is_ready_once_it_is_at_most_one_step_behind() -> None:
    host = copying()
    assert host.told().ready == ()
    host.hear(3, orders.Copied(10, 2, 3))
    assert host.told().ready == (), "of another copy"
    host.hear(3, orders.Copied(10, 1, 1))
    assert host.told().ready == (), "two steps behind"
    host.hear(3, orders.Copied(10, 1, 2))
    assert host.told().ready == (3,)


@pytest.mark.parametrize(
    "trouble",
    [
        [nodes.Lost(3), nodes.Reached(3)],
        [nodes.FromNode(3, orders.Stalled(10, 0))],
        [nodes.Lost(1), nodes.Reached(1), nodes.FromNode(1, orders.Holds(10, STATE, 0, {}))],
    ],
    ids=["its link", "a link of its own", "a member's link"],
)
def test_a_copy_begins_anew_after_trouble(trouble: Sequence[nodes.NodeEvent]) -> None:
    host = copying()
    host.hear(3, orders.Copied(10, 1, 3))
    begun = [one for event in trouble for one in only(ev.Copy, host.do(event))]
    assert host.told().ready == ()
    if not begun:
        begun = only(ev.Copy, host.holds(3, State(0, 0, None)))
    assert begun == [replace(COPY, number=2)]


def test_a_new_lead_asks_who_joins_once_it_leads() -> None:
    host = Host(1, WITH_3, linked=(0, 1, 2, 3))
    without = replace(WITH_3, generation=3, nodes=(1, 2), former=(0,))
    actions = admit(host, without)
    assert not said(actions, 3)
    actions = host.holds(2)
    assert said(actions, 3)[-1] == orders.Ask(11, without)
    assert only(ev.Copy, host.holds(3))[0].nodes == (1, 2)


def test_a_ready_node_is_asked_what_it_holds_before_it_counts() -> None:
    host = copying()
    actions = admit(host, MEMBER_3)
    assert said(actions, 3)[-1] == orders.Ask(10, MEMBER_3)
    host.do(ev.Received(0, commit(0)))
    assert not only(ev.Update, host.hear(1, orders.Relayed(10, 1, commit(1))))
    (update,) = only(ev.Update, host.holds(3))
    assert (update.nodes, update.observers) == ((0, 1, 2, 3), ())


def test_who_became_a_member_without_a_copy_is_gone() -> None:
    host = copying()
    admit(host, MEMBER_3)
    host.holds(3, STATE, VOID)
    assert host.told().gone == (3,)


# The node that joins


def joining(*linked: int) -> Host:
    """Node 3, asked by node 0."""
    host = Host(3, WITH_3, state=State(0, 0, None), linked=linked or (0, 1, 2))
    host.begun = host.hear(0, orders.Ask(10, WITH_3))
    return host


def order(host: Host, action: ev.Action) -> list[nodes.NodeAction]:
    return host.hear(0, orders.Order(10, action))


def caught_up() -> Host:
    host = joining()
    order(host, COPY)
    host.do(ev.Copied(1))
    return host


def test_it_answers_once_it_reaches_all_members() -> None:
    host = joining(0, 1)
    assert not said(host.begun, 0)
    (held,) = said(host.do(nodes.Reached(2)), 0)
    assert isinstance(held, orders.Holds)


def test_before_a_copy_it_carries_out_no_order_but_the_membership() -> None:
    host = joining()
    for action in (ev.SaveState(STATE), UPDATE, ev.MarkDone((0,), STATE.key), ev.GiveUp(7)):
        assert order(host, action) == []
    other = replace(WITH_3, generation=4)
    assert only(ev.SaveMembership, order(host, ev.SaveMembership(other)))


def test_what_it_holds_is_void_until_the_copy_is_complete() -> None:
    host = joining()
    assert order(host, COPY) == [nodes.SavePrepared(VOID), COPY]
    assert host.do(ev.Copied(2)) == [], "another one"
    saved, whole, *rest = host.do(ev.Copied(1))
    assert [saved, whole] == [ev.SaveState(STATE), nodes.SavePrepared(0)], "in that order"
    assert said(rest, 0) == [orders.Copied(10, 1, 3)]


def test_totals_are_kept_and_applied_in_order_and_the_record_follows() -> None:
    host = joining()
    order(host, COPY)
    assert order(host, UPDATE) == [UPDATE], "its totals are kept"
    assert order(host, ev.SaveState(NEXT)) == []
    later = replace(UPDATE, round=8, step=4)
    assert order(host, later) == [later]
    assert ev.Apply(7) in host.do(ev.Copied(1))
    assert host.do(ev.Updated(0.5, 8)) == [], "not its turn"
    actions = host.do(ev.Updated(0.5, 7))
    assert actions[:2] == [nodes.SavePrepared(STATE.key.word), ev.SaveState(NEXT)]
    assert actions[2] == ev.Apply(8)
    assert said(actions, 0) == [orders.Copied(10, 1, 4)]


@pytest.mark.parametrize("before", [True, False])
def test_a_round_that_is_given_up_is_dropped(before: bool) -> None:
    host = joining() if before else caught_up()
    if before:
        order(host, COPY)
    order(host, UPDATE)
    assert order(host, ev.GiveUp(7)) == [ev.GiveUp(7)]
    if before:
        assert not only(ev.Apply, host.do(ev.Copied(1)))
    assert host.do(ev.Updated(0.5, 7)) == []
    again = replace(UPDATE, round=8)
    assert ev.Apply(8) in order(host, again)


@pytest.mark.parametrize("event", [nodes.Lost(2), nodes.Reached(2)])
def test_a_link_to_a_member_voids_the_copy(event: nodes.NodeEvent) -> None:
    host = joining()
    order(host, COPY)
    order(host, UPDATE)
    actions = host.do(event)
    assert only(ev.GiveUp, actions) == [ev.GiveUp(7)]
    assert said(actions, 0)[0] == orders.Stalled(10, 0)
    answers = said(actions + host.do(nodes.Reached(2)), 0)
    assert isinstance(answers[-1], orders.Holds), "another copy may begin"
    assert host.do(ev.Copied(1)) == []


def test_a_link_to_another_that_joins_voids_nothing() -> None:
    host = joining()
    order(host, COPY)
    host.do(nodes.Reached(4))
    host.do(nodes.Lost(4))
    assert only(ev.SaveState, host.do(ev.Copied(1)))


def test_nothing_of_a_copy_outlives_its_lead() -> None:
    host = caught_up()
    host.do(nodes.Lost(0))
    without = replace(WITH_3, generation=3, nodes=(1, 2), former=(0,))
    (held,) = said(host.hear(1, orders.Ask(11, without)), 1)
    assert isinstance(held, orders.Holds)
    assert order(host, ev.SaveState(NEXT)) == []
    assert host.do(ev.Updated(0.5, 7)) == []


def test_as_a_member_it_answers_once_it_has_applied_what_was_ordered_before() -> None:
    host = caught_up()
    order(host, UPDATE)
    order(host, ev.SaveState(NEXT))
    assert not said(host.hear(0, orders.Ask(10, MEMBER_3)), 0)
    *_, held = said(host.do(ev.Updated(0.5, 7)), 0)
    assert isinstance(held, orders.Holds)
    assert held.state == NEXT
    whole = replace(UPDATE, round=9, nodes=(0, 1, 2, 3), observers=(), step=4)
    assert order(host, whole) == [whole]
    assert orders.Complete(10, 9, 0.5) in said(host.do(ev.Updated(0.5, 9)), 0)


def test_as_a_member_without_a_complete_copy_it_says_so_at_once() -> None:
    host = joining()
    order(host, COPY)
    (held,) = said(host.hear(0, orders.Ask(10, MEMBER_3)), 0)
    assert isinstance(held, orders.Holds)
    assert held.prepared == VOID
    assert order(host, replace(COPY, number=2)) == [], "a member receives no copy"


def test_who_holds_nothing_never_leads() -> None:
    alone = replace(MEMBER_3, nodes=(3,), former=(0, 1, 2))
    host = Host(3, alone, prepared=VOID, linked=())
    assert only(nodes.Leave, host.begun)


# The coordinator


def decided(*reports: Report, **more: Any) -> Membership:
    found = only(coord.SetMembership, decide(view(*reports, **more)))
    return found[-1].membership


def lead_says(membership: Membership, **more: Any) -> Report:
    full = replace(membership, members=(0, 1, 2), target=3)
    return replace(says(0, leads=True, membership=full, connected=(0, 1, 2)), **more)


def others(membership: Membership, *numbers: int) -> list[Report]:
    full = replace(membership, members=(0, 1, 2), target=3)
    return [says(one, membership=full) for one in numbers]


def test_a_new_node_joins_and_is_a_member_once_it_is_ready() -> None:
    there = {"aggregators": {3: 1}}
    new = decided(lead_says(MEMBERS), *others(MEMBERS, 1, 2, 3), **there)
    assert (new.nodes, new.joining) == ((0, 1, 2), (3,))
    new = decided(lead_says(WITH_3, ready=(3,)), *others(WITH_3, 1, 2, 3), **there)
    assert (new.nodes, new.joining) == ((0, 1, 2, 3), ())


def test_its_workers_are_members_only_when_it_is() -> None:
    now = replace(WITH_3, members=(0, 1), target=3, next_worker=4)
    lead = says(0, leads=True, membership=now, connected=(0, 1, 3))
    seen = view(lead, *others(WITH_3, 1, 2), aggregators={3: 1})
    seen = replace(
        seen, homes={**seen.homes, 3: 3}, processes={**seen.processes, 3: coord.Life.ALIVE}
    )
    changes = only(coord.SetMembership, decide(seen))
    assert all(3 not in one.membership.members for one in changes)


def test_a_joining_node_that_is_lost_disturbs_nobody() -> None:
    lead = lead_says(WITH_3)
    new = decided(lead, *others(WITH_3, 1, 2))
    assert (new.nodes, new.joining, new.former) == ((0, 1, 2), (), (3,))
    assert new.members == (0, 1, 2)


def leaving(node: int, **more: Any) -> Membership:
    """What is decided once a coordinator that knows the membership is told to let a node go."""
    coordinator = coord.Coordinator(coord.Limits(min_workers=1, max_workers=4), target=3)
    lead = replace(lead_says(MEMBERS), **more)
    seen = view(lead, *others(MEMBERS, 1, 2))
    coordinator.decide(seen)
    assert coordinator.leave(node) == ""
    coordinator.decide(seen)
    return coordinator.membership


def test_the_workers_of_a_departing_node_finish_what_they_hold() -> None:
    now = leaving(1)
    assert (now.nodes, now.departing) == ((0, 1, 2), (1,))
    assert (now.members, now.leaving) == ((0, 2), (1,))


def test_a_departing_node_goes_once_it_holds_nothing() -> None:
    now = replace(MEMBERS, generation=5, departing=(0,), target=2, next_worker=4)
    free = replace(says(0, leads=True, membership=replace(now, members=(1, 2))), free=(0,))
    new = decided(free, *others(MEMBERS, 1, 2))
    assert (new.nodes, new.former, new.departing) == ((1, 2), (0,), ())
    held = replace(says(0, leads=True, membership=replace(now, members=(1, 2))))
    busy = replace(
        says(0, leads=True, membership=replace(now, members=(1, 2), leaving=(0,))), free=(0,)
    )
    for lead in (held, busy):
        changes = only(coord.SetMembership, decide(view(lead, *others(MEMBERS, 1, 2))))
        assert all(0 in one.membership.nodes for one in changes)


def test_the_last_node_that_stays_cannot_leave() -> None:
    coordinator = coord.Coordinator(coord.Limits(min_workers=1, max_workers=4), target=3)
    coordinator.decide(view(lead_says(MEMBERS), *others(MEMBERS, 1, 2)))
    assert [coordinator.leave(one) for one in (0, 1)] == ["", ""]
    assert coordinator.leave(2) == "node 2 is the last one that stays: nobody could go on"


def test_who_is_left_of_those_that_depart_stays() -> None:
    now = replace(MEMBERS, generation=5, nodes=(0, 1), departing=(1,), former=(2,), target=2)
    other = replace(says(1, 0), membership=now)
    new = decided(None, other, aggregators={0: 0})  # type: ignore[arg-type]
    assert (new.nodes, new.departing, new.former) == ((1,), (), (2, 0))


def test_a_node_is_free_once_nothing_of_the_running_step_is_there() -> None:
    departing = replace(MEMBERS, generation=2, departing=(1, 2))
    host = leading()
    host.hear(1, orders.Relayed(10, 1, commit(1)))
    admit(host, departing)
    assert host.told().free == (2,)
    host.do(ev.Received(0, Hello(0, 0)))
    host.do(ev.Received(0, commit(0)))
    number = 1
    for node in (1, 2):
        host.hear(node, orders.Complete(10, number, 0.5))
    host.do(ev.Updated(0.5, number))
    assert host.node.state.step == 4
    assert host.told().free == (1, 2)
