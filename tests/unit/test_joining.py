"""How a node joins and how one leaves as planned, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hosts import (
    MEMBERS,
    NEXT,
    RULES,
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
from elastic.core.protocol.aggregator import Aggregator, Recovered
from elastic.core.protocol.holdings import VOID
from elastic.core.protocol.messages import Admit, Hello, Manifest, Membership, Report, State
from policies.resharding import Move

WITH_3 = replace(MEMBERS, generation=2, joining=(3,))
MEMBER_3 = replace(WITH_3, generation=3, nodes=(0, 1, 2, 3), joining=())
UPDATE = ev.Update(7, (0, 1, 2), 3, (), (10,), 1.0, 0, keepers=((0, 1),), observers=(3,))
SECOND = replace(UPDATE, round=8, step=4)
AFTER_NEXT = replace(NEXT, step=5)


def admit(host: Host, membership: Membership) -> list[nodes.NodeAction]:
    return host.do(ev.Received(None, Admit(membership)))


# The lead


def observed() -> Host:
    """Node 0 leads, and node 3 has answered."""
    host = leading()
    admit(host, WITH_3)
    host.do(nodes.Reached(3))
    host.holds(3, State(0, 0, None), VOID)
    return host


def all_granted(host: Host) -> list[nodes.NodeAction]:
    host.do(ev.Received(0, commit(0)))
    return host.hear(1, orders.Relayed(10, 1, commit(1)))


def test_it_takes_part_in_rounds_once_it_answers() -> None:
    host = leading()
    admit(host, WITH_3)
    assert said(host.do(nodes.Reached(3)), 3) == [orders.Ask(10, WITH_3)]
    (update,) = only(ev.Update, all_granted(host))
    assert update.observers == ()
    host.holds(3, State(0, 0, None), VOID)
    host.do(nodes.Lost(1))
    host.do(nodes.Reached(1))
    held = Manifest(STATE.key, 0, (1,))
    (again,) = only(ev.Update, host.holds(1, w1=held))
    assert (again.nodes, again.observers) == ((0, 1, 2), (3,))


def test_who_joins_gets_all_orders_and_is_not_waited_for() -> None:
    host = observed()
    actions = all_granted(host)
    (update,) = only(ev.Update, actions)
    assert (update.nodes, update.observers) == ((0, 1, 2), (3,))
    assert update in ordered(actions, 3)
    host.do(ev.Updated(0.5, update.round))
    host.hear(1, orders.Complete(10, update.round, 0.5))
    assert host.node.state == STATE
    host.hear(2, orders.Complete(10, update.round, 0.5))
    assert host.node.state.step == 4


def test_losing_who_joins_gives_no_round_up() -> None:
    host = observed()
    all_granted(host)
    assert not only(ev.GiveUp, host.do(nodes.Lost(3)))
    assert host.told().gone == ()


def test_it_is_ready_once_it_is_at_most_one_step_behind() -> None:
    host = observed()
    assert host.told().ready == ()
    host.hear(3, orders.CaughtUp(9, 3))
    assert host.told().ready == (), "of an earlier lead"
    host.hear(3, orders.CaughtUp(10, 1))
    assert host.told().ready == (), "two steps behind"
    host.hear(3, orders.CaughtUp(10, 2))
    assert host.told().ready == (3,)


@pytest.mark.parametrize(
    "trouble",
    [nodes.Lost(3), nodes.FromNode(3, orders.Stalled(10, 0))],
    ids=["its link", "a link of its own"],
)
def test_after_trouble_it_takes_part_once_it_answers_anew(trouble: nodes.NodeEvent) -> None:
    host = observed()
    host.hear(3, orders.CaughtUp(10, 3))
    assert host.told().ready == (3,)
    host.do(trouble)
    host.hear(3, orders.CaughtUp(10, 3))
    assert host.told().ready == (), "it crossed the news"
    host.do(nodes.Reached(3))
    host.holds(3, STATE, VOID)
    assert host.told().ready == ()
    (update,) = only(ev.Update, all_granted(host))
    assert update.observers == (3,)


def test_who_does_not_answer_any_more_observes_no_round() -> None:
    host = observed()
    host.do(nodes.Lost(3))
    (update,) = only(ev.Update, all_granted(host))
    assert update.observers == ()


def test_who_joins_no_more_observes_no_round() -> None:
    host = observed()
    admit(host, replace(WITH_3, generation=3, joining=(), former=(3,)))
    (update,) = only(ev.Update, all_granted(host))
    assert update.observers == ()


def test_a_new_lead_asks_who_joins_once_it_leads() -> None:
    host = Host(1, WITH_3, linked=(0, 1, 2, 3))
    without = replace(WITH_3, generation=3, nodes=(1, 2), former=(0,))
    actions = admit(host, without)
    assert not said(actions, 3)
    actions = host.holds(2)
    assert said(actions, 3)[-1] == orders.Ask(11, without)
    assert host.told().ready == ()


def test_a_ready_node_is_asked_what_it_holds_before_it_counts() -> None:
    host = observed()
    actions = admit(host, MEMBER_3)
    assert said(actions, 3)[-1] == orders.Ask(10, MEMBER_3)
    assert not only(ev.Update, all_granted(host))
    (update,) = only(ev.Update, host.holds(3, kept=()))
    assert (update.nodes, update.observers) == ((0, 1, 2, 3), ())
    assert all(3 not in keepers for keepers in update.keepers)


def test_who_became_a_member_without_a_version_is_gone() -> None:
    host = observed()
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
    """What it does on an order, besides what it tells the coordinator."""
    actions = host.hear(0, orders.Order(10, action))
    return [one for one in actions if not isinstance(one, ev.Tell)]


def holding(*records: State) -> Host:
    """It has the version of step 4, or of the last of these records."""
    host = joining()
    for number, record in enumerate(records or (NEXT,)):
        order(host, replace(UPDATE, round=number, step=record.step - 1))
        host.do(ev.Updated(0.5, number))
        order(host, ev.SaveState(record))
    return host


def test_it_answers_once_it_reaches_all_members() -> None:
    host = joining(0, 1)
    assert not said(host.begun, 0)
    void, held = host.do(nodes.Reached(2))
    assert void == nodes.SavePrepared(VOID), "what it has is of no use"
    assert isinstance(held, nodes.SendNode)
    assert isinstance(held.message, orders.Holds)
    assert held.message.prepared == VOID


def test_it_carries_out_rounds_and_the_membership_only() -> None:
    host = joining()
    others = replace(UPDATE, observers=(4,))
    for action in (ev.SaveState(STATE), others, ev.MarkDone((0,), STATE.key), ev.GiveUp(7)):
        assert order(host, action) == []
    other = replace(WITH_3, generation=4)
    assert only(ev.SaveMembership, order(host, ev.SaveMembership(other)))
    assert order(host, UPDATE) == [UPDATE]


def test_its_first_version_is_void_until_the_record_is_there() -> None:
    """Between the two the record of before would be taken for that of the new version."""
    host = joining()
    order(host, UPDATE)
    assert host.do(ev.Updated(0.5, 6)) == [], "another one"
    assert host.do(ev.Updated(0.5, 7)) == []
    saved, whole, told = order(host, ev.SaveState(NEXT))
    assert [saved, whole] == [ev.SaveState(NEXT), nodes.SavePrepared(0)], "in that order"
    assert said([told], 0) == [orders.CaughtUp(10, 4)]


def test_a_record_that_comes_before_the_round_is_complete_waits_for_it() -> None:
    host = joining()
    order(host, UPDATE)
    assert order(host, ev.SaveState(NEXT)) == [], "the others were faster"
    saved, whole, told, *_ = host.do(ev.Updated(0.5, 7))
    assert [saved, whole] == [ev.SaveState(NEXT), nodes.SavePrepared(0)]
    assert said([told], 0) == [orders.CaughtUp(10, 4)]


def test_it_goes_on_from_version_to_version_as_a_member_does() -> None:
    host = holding()
    assert order(host, SECOND) == [SECOND]
    assert host.do(ev.Updated(0.5, 8)) == [nodes.SavePrepared(NEXT.key.word)]
    saved, told = order(host, ev.SaveState(AFTER_NEXT))
    assert saved == ev.SaveState(AFTER_NEXT)
    assert said([told], 0) == [orders.CaughtUp(10, 5)]


def test_a_record_of_an_earlier_step_said_again_is_ignored() -> None:
    host = holding()
    assert order(host, ev.SaveState(STATE)) == []
    order(host, SECOND)
    assert order(host, ev.SaveState(STATE)) == []
    assert host.do(ev.Updated(0.5, 8)) == [nodes.SavePrepared(NEXT.key.word)]


def test_a_record_of_its_own_step_said_again_is_its_own() -> None:
    """A step may be begun anew, with another attempt."""
    host = holding()
    again = replace(NEXT, attempt=1)
    assert only(ev.SaveState, order(host, ev.SaveState(again))) == [ev.SaveState(again)]


def test_a_record_of_a_step_that_it_missed_voids_what_it_has() -> None:
    host = holding()
    assert order(host, ev.SaveState(AFTER_NEXT)) == [nodes.SavePrepared(VOID)]


def test_too_slow_for_a_round_it_goes_on_with_the_next() -> None:
    host = joining()
    order(host, UPDATE)
    order(host, ev.SaveState(NEXT))
    assert order(host, SECOND) == [ev.GiveUp(7), SECOND]
    assert host.do(ev.Updated(0.5, 7)) == [], "of no use any more"
    assert host.do(ev.Updated(0.5, 8)) == []
    assert only(ev.SaveState, order(host, ev.SaveState(AFTER_NEXT)))


def test_before_a_round_overwrites_what_is_needed_its_version_is_void() -> None:
    host = holding()
    later = replace(UPDATE, round=9, step=6)
    assert order(host, later) == [nodes.SavePrepared(VOID), later]


def test_a_step_that_is_skipped_takes_the_version_of_before() -> None:
    skip = replace(SECOND, skip=True)
    assert order(holding(), skip) == [skip]
    host = joining()
    assert order(host, skip) == []
    assert host.do(ev.Updated(0.5, 8)) == []
    order(host, UPDATE)
    assert order(host, skip) == [ev.GiveUp(7)]


def test_a_round_that_is_given_up_is_dropped() -> None:
    host = joining()
    order(host, UPDATE)
    assert order(host, ev.GiveUp(6)) == []
    order(host, ev.SaveState(NEXT))
    assert order(host, ev.GiveUp(7)) == [ev.GiveUp(7)]
    assert host.do(ev.Updated(0.5, 7)) == []
    again = replace(UPDATE, round=8)
    assert order(host, again) == [again]
    assert host.do(ev.Updated(0.5, 8)) == [], "its record is still to come"


@pytest.mark.parametrize("event", [nodes.Lost(2), nodes.Reached(2)])
def test_a_link_to_a_member_ends_its_round(event: nodes.NodeEvent) -> None:
    host = joining()
    order(host, UPDATE)
    actions = host.do(event)
    assert only(ev.GiveUp, actions) == [ev.GiveUp(7)]
    assert said(actions, 0)[0] == orders.Stalled(10, 0)
    answers = said(actions + host.do(nodes.Reached(2)), 0)
    assert isinstance(answers[-1], orders.Holds), "it takes part in the next one"
    assert host.do(ev.Updated(0.5, 7)) == []


def test_a_link_without_a_round_on_it_voids_nothing() -> None:
    host = holding()
    assert host.do(nodes.Lost(2)) == host.do(nodes.Reached(2)) == []
    order(host, SECOND)
    host.do(nodes.Reached(4))
    host.do(nodes.Lost(4))
    assert host.do(ev.Updated(0.5, 8)) == [nodes.SavePrepared(NEXT.key.word)]


def test_nothing_outlives_its_lead() -> None:
    host = holding()
    order(host, SECOND)
    host.do(nodes.Lost(0))
    without = replace(WITH_3, generation=3, nodes=(1, 2), former=(0,))
    actions = host.hear(1, orders.Ask(11, without))
    assert nodes.SavePrepared(VOID) in actions
    (held,) = said(actions, 1)
    assert isinstance(held, orders.Holds)
    assert order(host, ev.SaveState(AFTER_NEXT)) == [], "of the lead before"
    assert host.do(ev.Updated(0.5, 8)) == []


def test_as_a_member_it_answers_once_the_round_under_way_is_complete() -> None:
    host = holding()
    order(host, SECOND)
    order(host, ev.SaveState(AFTER_NEXT))
    assert not said(host.hear(0, orders.Ask(10, MEMBER_3)), 0)
    *_, held = said(host.do(ev.Updated(0.5, 8)), 0)
    assert isinstance(held, orders.Holds)
    assert (held.state, held.prepared) == (AFTER_NEXT, 0)
    assert held.kept_at(5) == frozenset(), "it keeps no state yet"
    whole = replace(UPDATE, round=9, nodes=(0, 1, 2, 3), observers=(), step=5)
    assert order(host, whole) == [whole]
    assert orders.Complete(10, 9, 0.5) in said(host.do(ev.Updated(0.5, 9)), 0)


def test_as_a_member_it_answers_at_once_if_the_round_is_given_up() -> None:
    host = holding()
    order(host, SECOND)
    host.hear(0, orders.Ask(10, MEMBER_3))
    (held,) = said(order(host, ev.GiveUp(8)), 0)
    assert isinstance(held, orders.Holds)
    assert held.state == NEXT


def test_as_a_member_without_a_version_it_says_so_at_once() -> None:
    (held,) = said(joining().hear(0, orders.Ask(10, MEMBER_3)), 0)
    assert isinstance(held, orders.Holds)
    assert held.prepared == VOID


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


def test_a_node_is_free_once_the_state_that_it_keeps_is_elsewhere() -> None:
    """A planned leave loses nothing: the moves are made first, while others train."""
    host = Host(0, kept=())
    host.holds(1)
    host.holds(2, kept=())
    host.do(ev.Received(0, Hello(0, 0)))
    host.hear(1, orders.Relayed(10, 1, Hello(1, 1)))
    admit(host, replace(MEMBERS, generation=2, departing=(1, 2)))
    assert host.told().free == ()
    (update,) = only(ev.Update, all_granted(host))
    assert (update.keepers, update.moves) == (((1,),), (Move(0, 1, 0),))
    for node in (1, 2):
        host.hear(node, orders.Complete(10, update.round, 0.5))
    assert host.told().free == (), "it is not committed yet"
    host.do(ev.Updated(0.5, update.round))
    assert host.told().free == (1, 2)


def test_a_move_of_a_round_that_is_given_up_is_still_to_be_made() -> None:
    host = Host(0, kept=())
    host.holds(1)
    host.holds(2, kept=())
    host.do(ev.Received(0, Hello(0, 0)))
    host.hear(1, orders.Relayed(10, 1, Hello(1, 1)))
    (update,) = only(ev.Update, all_granted(host))
    assert len(update.moves) == 1
    (again,) = only(ev.Update, host.hear(2, orders.Stalled(10, update.round)))
    assert again.moves == update.moves


def test_who_is_to_keep_what_changes_only_between_rounds() -> None:
    """A departure wants other copies; a round that goes by the old ones cannot make them."""
    host, update = updating()
    actions = admit(host, replace(MEMBERS, generation=2, departing=(1,)))
    assert only(ev.GiveUp, actions) == [ev.GiveUp(update.round)]
    (again,) = only(ev.Update, actions)
    for node in (0, 1, 2):
        assert again.kept_by(node) <= {0}, "what it has in the version of before"
    assert 0 in again.kept_by(0) | again.kept_by(2), "one that stays"


def test_losing_the_last_copy_ends_the_job_and_says_why() -> None:
    rules = replace(RULES, num_chunks=2)
    kept = {0: frozenset({0}), 1: frozenset({1})}
    members = replace(MEMBERS, nodes=(0, 1))
    lead = Aggregator(rules, Recovered(STATE, members, kept=kept))
    assert not only(ev.Finish, lead.handle(ev.Started(), 0.0))
    left = replace(members, generation=2, nodes=(0,), former=(1,))
    (finish,) = only(ev.Finish, lead.handle(ev.Received(None, Admit(left)), 0.0))
    assert not finish.is_whole
    assert finish.failure == (
        "step 3: no copy of 1 of 2 chunks is left: nodes [1] are lost; replicas: 2 would have"
        " kept them"
    )


def test_a_member_that_comes_back_without_the_last_copy_ends_the_job() -> None:
    """Its memory outlives its process; but not a host that begins anew under the same number."""
    host = Host(0, kept=())
    host.holds(1, kept=())
    host.holds(2)
    host.do(nodes.Lost(2))
    host.do(nodes.Reached(2))
    (finish,) = only(ev.Finish, host.holds(2, kept=()))
    assert not finish.is_whole
    assert "no copy of 1 of 1 chunks is left" in finish.failure
