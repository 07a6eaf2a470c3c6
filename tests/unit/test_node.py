"""The rules of a job's nodes, one by one: who leads, what is relayed, what a lost node means."""

from __future__ import annotations

from dataclasses import replace

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
    relaying,
    said,
    says,
    updating,
    view,
)

from elastic.core.protocol import coordinator as coord
from elastic.core.protocol import events as ev
from elastic.core.protocol import node as nodes
from elastic.core.protocol import orders
from elastic.core.protocol.holdings import can_follow
from elastic.core.protocol.messages import (
    Admit,
    Hello,
    Look,
    Manifest,
    Membership,
    Report,
    State,
)
from policies.owning import SlowLink


def test_the_first_node_asks_all_others_before_it_leases() -> None:
    host = Host(0)
    assert said(host.begun, 1) == said(host.begun, 2) == [orders.Ask(10, MEMBERS)]
    assert not only(ev.Send, host.do(ev.Received(0, Hello(0, 0))))
    host.holds(1)
    assert host.node.role is nodes.Role.GATHERING
    actions = host.holds(2)
    assert host.node.role is nodes.Role.LEADING
    assert {one.worker for one in only(ev.Send, actions)} == {0}, "who waited is served"


def test_who_is_not_first_asks_nobody_and_relays_only_once_it_is_asked() -> None:
    host = Host(1)
    assert not only(nodes.SendNode, host.begun + host.do(ev.Received(1, Hello(1, 1))))
    actions = host.hear(0, orders.Ask(10, MEMBERS))
    assert only(ev.HangUp, actions) == [ev.HangUp(1)], "it says again what was forgotten"
    (held,) = said(actions, 0)
    assert isinstance(held, orders.Holds)
    assert (held.term, held.state) == (10, STATE)
    hello = Hello(1, 1)
    assert said(host.do(ev.Received(1, hello)), 0) == [orders.Relayed(10, 1, hello)]
    assert said(host.do(ev.Disconnected(1)), 0) == [orders.Relayed(10, 1, None)]


def test_orders_go_to_the_home_of_the_worker_rows_before_the_manifest() -> None:
    host = leading()
    actions = host.hear(1, orders.Relayed(10, 1, commit(1)))
    kinds = [type(one) for one in ordered(actions, 1)]
    assert kinds[:4] == [ev.SaveRow, ev.SaveManifest, ev.MarkDone, ev.Send]
    assert [type(one) for one in ordered(actions, 2)] == [ev.MarkDone]
    assert not only(ev.SaveManifest, actions)


def test_traffic_is_planned_by_the_lead_alone() -> None:
    look = Look((SlowLink(0, 2, 8.0),))
    host = leading()
    (note,) = only(ev.Note, host.do(ev.Received(None, look)))
    assert note.kind == "traffic_planned"
    assert "of 1 chunks go over link 0 - 2" in note.reason
    assert host.do(ev.Received(None, look)) == [], "it is said again and again"
    assert relaying().do(ev.Received(None, look)) == []


def test_of_what_is_said_of_slow_links_while_a_lead_gathers_only_the_last_counts() -> None:
    host = Host(0)
    for other in (2, 2, 1):
        assert host.do(ev.Received(None, Look((SlowLink(0, other, 8.0),)))) == []
    host.holds(1)
    (note,) = [one for one in only(ev.Note, host.holds(2)) if one.kind == "traffic_planned"]
    assert "link 0 - 1" in note.reason


def test_orders_of_another_term_are_dropped() -> None:
    host = relaying()
    assert host.hear(0, orders.Order(99, ev.OpenSlot(1))) == []
    assert host.hear(0, orders.Order(10, ev.OpenSlot(1))) == [ev.OpenSlot(1)]
    host.do(nodes.Lost(0))
    assert host.hear(0, orders.Order(10, ev.OpenSlot(1))) == [], "its successor asks first"


def test_a_step_is_committed_once_it_is_complete_everywhere() -> None:
    host, update = updating()
    assert update.nodes == (0, 1, 2)
    number = update.round
    prepared = host.do(ev.Updated(0.5, number))
    assert only(nodes.SavePrepared, prepared) == [nodes.SavePrepared(STATE.key.word)]
    host.hear(1, orders.Complete(10, number, 0.5))
    assert host.node.state == STATE
    assert not only(ev.SaveState, host.hear(2, orders.Complete(10, number - 1, 0.5)))
    actions = host.hear(2, orders.Complete(10, number, 0.5))
    assert host.node.state.step == 4
    assert isinstance(actions[0], ev.SaveState), "the lead's own record first"
    assert only(ev.SaveState, ordered(actions, 1)) == [actions[0]]


def test_a_node_prepares_before_it_says_that_it_is_complete() -> None:
    host = relaying()
    host.hear(0, orders.Order(10, ev.Update(7, (0, 1, 2), 3, (), (10,), 1.0, 0)))
    assert host.do(ev.Updated(0.5, 6)) == [], "of an earlier round"
    actions = host.do(ev.Updated(0.5, 7))
    assert actions[0] == nodes.SavePrepared(STATE.key.word)
    assert said(actions[1:], 0) == [orders.Complete(10, 7, 0.5)]


@pytest.mark.parametrize(
    ("state", "prepared", "can"),
    [
        (NEXT, 0, True),
        (STATE, STATE.key.word, True),
        (STATE, 0, False),
        (STATE, replace(STATE, attempt=1).key.word, False),
        (replace(STATE, step=2), STATE.key.word, False),
    ],
)
def test_who_can_follow_the_newest_record(state: State, prepared: int, can: bool) -> None:
    assert can_follow(state, prepared, NEXT) is can


def test_the_newest_record_of_all_counts_and_who_is_behind_is_gone() -> None:
    host = Host(0, prepared=STATE.key.word)
    host.holds(1, NEXT)
    host.holds(2, replace(STATE, step=2))
    assert host.node.role is nodes.Role.GATHERING
    assert host.told().gone == (2,)
    without = replace(MEMBERS, generation=2, nodes=(0, 1), former=(2,))
    host.do(ev.Received(None, Admit(without)))
    assert (host.node.role, host.node.state) == (nodes.Role.LEADING, NEXT)


def test_what_was_granted_on_a_lost_node_is_leased_again_if_it_is_not_there() -> None:
    host, update = updating()
    actions = host.do(nodes.Lost(1))
    assert only(ev.GiveUp, actions) == [ev.GiveUp(update.round)]
    (ask,) = said(host.do(nodes.Reached(1)), 1)
    assert ask == orders.Ask(10, MEMBERS)
    actions = host.holds(1)
    assert ev.MarkUndone((1,)) in actions
    assert not only(ev.Update, actions), "micro-batch 1 is missing"


def test_what_is_there_still_counts_and_the_round_is_begun_anew() -> None:
    host, update = updating()
    host.do(nodes.Lost(1))
    host.do(nodes.Reached(1))
    (again,) = only(ev.Update, host.holds(1, w1=Manifest(STATE.key, 0, (1,))))
    assert again == replace(update, round=update.round + 1)


def test_a_stalled_round_is_begun_anew_and_an_earlier_one_is_not() -> None:
    host, update = updating()
    assert not only(ev.GiveUp, host.hear(2, orders.Stalled(10, update.round - 1)))
    actions = host.hear(2, orders.Stalled(10, update.round))
    assert only(ev.GiveUp, actions) == [ev.GiveUp(update.round)]
    assert only(ev.Update, actions) == [replace(update, round=update.round + 1)]


@pytest.mark.parametrize("event", [nodes.Lost(2), nodes.Reached(2)])
def test_two_nodes_that_lose_each_other_in_a_round_tell_the_lead(event: nodes.NodeEvent) -> None:
    host = relaying()
    assert not said(host.do(event), 0)
    host.hear(0, orders.Order(10, ev.Update(7, (0, 1, 2), 3, (), (10,), 1.0, 0)))
    assert said(host.do(event), 0) == [orders.Stalled(10, 7)]


def test_a_lost_node_has_time_to_come_back() -> None:
    host = leading()
    host.do(ev.Tick())
    host.do(nodes.Lost(1))
    assert host.told().gone == ()
    while host.now_s < nodes.GRACE_S:
        assert host.told().gone == ()
        assert host.now_s < host.node.next_tick_s <= nodes.GRACE_S
        host.now_s = host.node.next_tick_s
        host.do(ev.Tick())
    assert host.told().gone == (1,)
    host.do(nodes.Reached(1))
    assert host.told().gone == ()


@pytest.mark.parametrize("node", [0, 1])
def test_a_member_that_no_link_ever_led_to_is_gone_as_well(node: int) -> None:
    host = Host(node, linked=(0, 1))
    host.now_s = nodes.GRACE_S
    host.do(ev.Tick())
    assert host.told().gone == (2,)


@pytest.mark.parametrize("by_order", [False, True])
def test_who_is_no_member_any_more_leaves(by_order: bool) -> None:
    host = relaying()
    without = replace(MEMBERS, generation=2, nodes=(0, 2), former=(1,))
    order = orders.Order(10, ev.SaveMembership(without))
    news = nodes.FromNode(0, order) if by_order else ev.Received(None, Admit(without))
    actions = host.do(news)
    assert only(nodes.Leave, actions)
    assert host.node.role is nodes.Role.FENCED


def test_a_successor_on_a_node_that_is_no_member_leaves() -> None:
    host = Host(1, replace(MEMBERS, nodes=(0, 2), former=(1,)))
    assert only(nodes.Leave, host.begun)


def test_nothing_counts_of_a_node_that_is_no_member_any_more() -> None:
    host = leading()
    without = replace(MEMBERS, generation=2, members=(0,), nodes=(0, 2), former=(1,))
    actions = host.do(ev.Received(None, Admit(without)))
    assert ordered(actions, 1)[0] == ev.SaveMembership(without), "it must hear so"
    assert host.hear(1, orders.Relayed(10, 5, Hello(5, 5))) == []
    assert host.holds(1, w1=Manifest(STATE.key, 0, (1,))) == []
    assert host.node.connected == {0}


def test_the_next_node_leads_once_the_first_is_no_member() -> None:
    host = relaying()
    without = replace(MEMBERS, generation=2, nodes=(1, 2), former=(0,))
    actions = host.do(ev.Received(None, Admit(without)))
    assert said(actions, 2) == [orders.Ask(11, without)]
    assert host.node.role is nodes.Role.GATHERING
    other = relaying(2)
    (held,) = said(other.hear(1, orders.Ask(11, without)), 1)
    assert isinstance(held, orders.Holds)
    assert other.hear(0, orders.Order(10, ev.OpenSlot(1))) == []


def test_an_older_generation_changes_nothing() -> None:
    host = relaying(membership=replace(MEMBERS, generation=5))
    assert host.hear(0, orders.Order(10, ev.SaveMembership(MEMBERS))) == []
    assert host.node.membership.generation == 5


def test_a_node_that_comes_during_a_round_is_part_of_the_next() -> None:
    host, update = updating()
    more = replace(MEMBERS, generation=2, nodes=(0, 1, 2, 3))
    host.do(nodes.Reached(3))
    actions = host.do(ev.Received(None, Admit(more)))
    assert only(ev.GiveUp, actions) == [ev.GiveUp(update.round)]
    assert said(actions, 3)[-1] == orders.Ask(10, more)
    (again,) = only(ev.Update, host.holds(3))
    assert again.nodes == (0, 1, 2, 3)


def test_with_one_node_nothing_is_sent() -> None:
    host = Host(0, replace(MEMBERS, nodes=(0,)), linked=())
    host.do(ev.Received(0, Hello(0, 0)))
    host.do(ev.Received(0, commit(0)))
    actions = host.do(ev.Updated(round=1)) + host.begun
    assert not only(nodes.SendNode, actions)
    assert not only(nodes.SavePrepared, actions)


# The coordinator


@pytest.mark.parametrize(
    ("reports", "lost"),
    [
        ([says(0, leads=True), says(1), says(2)], []),
        ([says(0, 1, leads=True), says(1, 0), says(2)], [1]),
        ([says(0, leads=True), says(1, 2), says(2, 1)], [2]),
        ([None, says(1, 0), says(2, 0)], [0]),
        ([None, says(1, 0), says(2)], []),
        ([None, says(1, 0, 2)], [0, 2]),
        ([None, says(0, 2), says(1), says(2, 0)], [2]),
        ([None], []),
    ],
    ids=[
        "none",
        "the lead's word",
        "the older of two",
        "all but the lead",
        "not all",
        "alone",
        "a lead that gathers",
        "silence",
    ],
)
def test_which_nodes_are_lost(reports: list[Report | None], lost: list[int]) -> None:
    assert coord._lost_nodes(view(reports[0], *reports[1:]), (0, 1, 2)) == lost  # type: ignore[arg-type]


def test_a_lost_node_is_a_former_one_and_its_workers_are_no_members() -> None:
    lead = says(0, 2, leads=True, connected=(0, 1, 2))
    (new,) = only(coord.SetMembership, decide(view(lead, says(1))))
    assert new.membership.generation == 2
    assert (new.membership.nodes, new.membership.former) == ((0, 1), (2,))
    assert new.membership.members == (0, 1), "nor is a spare one that was there"


def test_the_workers_of_a_lost_host_are_replaced_elsewhere_whatever_ray_thinks_of_it() -> None:
    now = replace(MEMBERS, generation=2, members=(0, 1), nodes=(0, 1), former=(2,), next_worker=3)
    lead = says(0, leads=True, membership=now, connected=(0, 1))
    seen = view(lead, says(1, membership=now), aggregators={2: 0})
    actions = decide(seen)
    (started,) = only(coord.StartWorker, actions)
    assert started.worker == 3
    assert started.node in now.nodes
    assert not only(coord.StartAggregator, actions)


def test_a_host_that_dies_counts_as_no_death_of_a_worker() -> None:
    now = replace(MEMBERS, generation=2, members=(0, 1), nodes=(0, 1), former=(2,), next_worker=3)
    coordinator = coord.Coordinator(coord.Limits(min_workers=1, max_workers=4), target=3)
    seen = view(says(0, leads=True, membership=now, connected=(0, 1)), says(1, membership=now))
    dead = {**seen.processes, 2: coord.Life.DEAD}
    coordinator.decide(replace(seen, processes=dead))
    assert coordinator._deaths_s == []


def test_a_former_lead_that_has_not_heard_so_decides_nothing() -> None:
    now = replace(MEMBERS, generation=2, members=(1, 2), nodes=(1, 2), former=(0,), target=3)
    stale = says(0, 1, 2, leads=True)
    actions = decide(view(stale, says(1, membership=now), says(2, membership=now)))
    (said_again,) = only(coord.SetMembership, actions)
    assert said_again.membership == now


def test_a_generation_that_exists_already_is_taken_up_and_the_next_follows_it() -> None:
    coordinator = coord.Coordinator(coord.Limits(min_workers=1, max_workers=4), target=3)
    lead = says(0, 2, leads=True)
    coordinator.decide(view(lead, says(1)))
    other = replace(MEMBERS, generation=2, members=(0, 1, 2), target=3)
    coordinator.adopt(other)
    (new,) = only(coord.SetMembership, coordinator.decide(view(lead, says(1))))
    assert (new.membership.generation, new.membership.former) == (3, (2,))


def test_a_job_begins_on_all_nodes_that_there_are() -> None:
    first = Membership(generation=1, target=3, next_worker=3)
    lead = replace(says(0, leads=True, membership=first, connected=(0,)), step=0)
    other = replace(says(1, membership=first), step=0)
    coordinator = coord.Coordinator(coord.Limits(min_workers=1, max_workers=4), target=3)
    coordinator.decide(view(lead, other))
    assert (coordinator.membership.nodes, coordinator.membership.members) == ((0, 1), ())
    coordinator.decide(view(lead, other, replace(other, node=2)))
    assert coordinator.membership.nodes == (0, 1, 2)
    assert coordinator.membership.members == (0,)


@pytest.mark.parametrize(
    ("theirs", "is_refused"), [(0x11, False), (0x22, True), (0, False)], ids=hex
)
def test_nodes_whose_task_makes_other_parameters_are_refused(theirs: int, is_refused: bool) -> None:
    """0: not the parameters that the task made, so there is nothing to compare."""
    alone = replace(MEMBERS, members=(), nodes=(0,))
    first = State(step=0, attempt=0, exponents=None)
    host = Host(0, alone, state=first, checksum=0x11)
    two = replace(alone, generation=2, nodes=(0, 1))
    host.do(ev.Received(None, Admit(two)))
    host.holds(1, first, checksum=theirs)
    failure = host.told().failure
    assert bool(failure) == is_refused
    if is_refused:
        for part in ("node 1", "node 0", "0x00000022", "0x00000011", "the seed alone"):
            assert part in failure
