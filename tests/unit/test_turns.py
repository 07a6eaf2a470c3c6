"""Several models in turn: which lane leases, who hears what, and what the coordinator is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from elastic.core.protocol import aggregator as agg
from elastic.core.protocol import events as ev
from elastic.core.protocol.messages import (
    Admit,
    Commit,
    Dismiss,
    Hello,
    Key,
    Lease,
    Leases,
    Manifest,
    Membership,
    Message,
    Outcome,
    Release,
    Report,
    State,
    Stop,
    Welcome,
    step_of_job,
)
from elastic.core.protocol.node import Node
from elastic.core.protocol.turns import Actions, Turns
from policies.auditing import Audits

T = TypeVar("T")
RUNNING = State(step=3, attempt=0, exponents=(10,))


def outcome(micro_batch: int, loss_sum: float = 1.0) -> Outcome:
    maxima_C = np.ones(1, np.float32)
    return Outcome(micro_batch, loss_sum, 1.0, bytes(16), bytes(8), maxima_C)


def only(kind: type[T], actions: Actions) -> list[tuple[int, T]]:
    return [(model, one) for model, one in actions if isinstance(one, kind)]


def leased(actions: Actions) -> list[tuple[int, tuple[int, int]]]:
    """Who got which (model, micro-batch)."""
    return [
        (one.worker, (lease.key.model, micro_batch))
        for _, one in only(ev.Send, actions)
        if isinstance(one.message, Leases)
        for lease in one.message.leases
        for micro_batch in lease.micro_batches
    ]


class Lanes:
    """Models with two micro-batches a step, and members 0, 1, ... that are connected to all."""

    def __init__(
        self,
        num_models: int = 3,
        num_workers: int = 2,
        *,
        states: Sequence[State] | None = None,
        recovered: Sequence[agg.Recovered] | None = None,
        **rules: Any,
    ) -> None:
        members = tuple(range(num_workers))
        self.membership = Membership(generation=1, members=members, next_worker=num_workers)
        states = states or [replace(RUNNING, model=one) for one in range(num_models)]
        all_rules = agg.Rules(**{"num_steps": 5, "num_micro_batches": 2, "num_chunks": 1, **rules})
        known = recovered or [agg.Recovered(one, self.membership) for one in states]
        self.turns = Turns([Node(0, all_rules, one) for one in known])
        self.now_s = 0.0
        self.started = self.do(ev.Started())
        self.hear(None, Report(0, Membership(), ()))
        self.greeted = [self.hear(one, Hello(one, one)) for one in members]

    def do(self, event: ev.Event, model: int | None = None) -> Actions:
        return self.turns.handle(event, self.now_s, model)

    def hear(self, sender: int | None, message: Message) -> Actions:
        return self.do(ev.Received(sender, message))

    def ask(self, worker: int, model: int, micro_batch: int, **answer: float) -> Actions:
        state = self.turns.lanes[model].state
        lease = Lease(state.key, (micro_batch,), self.lead(model)._combine)
        manifest = self.lead(model)._manifests[worker]
        num = len(manifest.micro_batches) if manifest.key == state.key else 0
        half = 1 - manifest.half if num else 0
        return self.hear(worker, Commit(lease, half, num, (outcome(micro_batch, **answer),)))

    def update(self, model: int) -> Actions:
        return self.do(ev.Updated(0.5, round=self.lead(model)._round), model)

    def lead(self, model: int) -> agg.Aggregator:
        lead = self.turns.lanes[model]._lead
        assert lead is not None
        return lead

    def step(self, model: int) -> Actions:
        """Both workers answer for both micro-batches. What follows."""
        self.ask(0, model, 0)
        return self.ask(1, model, 1)


def test_steps_of_the_job_go_around_the_models() -> None:
    steps = [step_of_job(model, step, 3) for step in range(2) for model in range(3)]
    assert steps == list(range(6))


def test_only_the_lane_with_the_least_step_leases() -> None:
    lanes = Lanes()
    assert leased([one for actions in lanes.greeted for one in actions]) == [
        (0, (0, 0)),
        (0, (0, 1)),
        (1, (0, 1)),
    ]


def test_the_next_models_leases_go_out_before_the_update() -> None:
    lanes = Lanes()
    actions = lanes.step(0)
    assert [type(one) for _, one in actions][-1] is ev.Update
    assert actions[-1][0] == 0
    assert {what for _, what in leased(actions[:-1])} == {(1, 0), (1, 1)}
    assert leased(lanes.update(0)) == []  # its next turn is yet to come


def test_after_the_last_model_comes_the_first_ones_next_step() -> None:
    lanes = Lanes()
    for model in (0, 1):
        lanes.step(model)
        lanes.update(model)
    actions = lanes.step(2)
    assert {what for _, what in leased(actions)} == {(0, 0), (0, 1)}
    assert lanes.turns.lanes[0].state.step == 4


def test_who_is_updated_when_its_turn_comes_is_waited_for() -> None:
    lanes = Lanes(2)
    lanes.step(0)
    actions = lanes.step(1)
    assert leased(actions) == []
    assert {what for _, what in leased(lanes.update(0))} == {(0, 0), (0, 1)}


def test_an_overflow_and_an_evaluation_belong_to_the_turn() -> None:
    first = State(step=0, attempt=0, exponents=None)
    lanes = Lanes(states=[replace(first, model=one) for one in range(2)], evaluate_every=1)
    assert {what for _, what in leased(lanes.greeted[0])} == {(0, 0), (0, 1)}
    lanes.ask(0, 0, 0)
    actions = lanes.ask(1, 0, 1)  # all maxima: the sums of the same model come next
    assert {what for _, what in leased(actions)} == {(0, 0), (0, 1)}
    assert lanes.turns.lanes[0].state.attempt == 1


def test_who_still_computes_for_another_model_gets_nothing() -> None:
    lanes = Lanes(2)
    late = Lease(lanes.turns.lanes[0].state.key, (1,))
    lanes.ask(0, 0, 0)
    actions = lanes.ask(0, 0, 1)  # worker 1 has the same one
    assert {worker for worker, _ in leased(actions)} == {0}
    actions = lanes.hear(1, Release((late,)))
    assert {worker for worker, _ in leased(actions)} == {1}


def test_where_all_is_held_by_several_who_is_about_to_be_free_gets_a_share() -> None:
    lanes = Lanes(2, scheduling=agg.Shares(copies=2, helps=True))
    lanes.ask(0, 0, 0)
    actions = lanes.ask(0, 0, 1)
    assert {worker for worker, _ in leased(actions)} == {0, 1}


def test_a_worker_is_welcome_to_all_models_once_it_has_all_slots() -> None:
    lanes = Lanes(2)
    greeted = [one for _, one in lanes.hear(7, Hello(7, 7))]
    kinds = [type(one) for one in greeted if isinstance(one, ev.OpenSlot | ev.Send)]
    assert kinds == [ev.OpenSlot, ev.OpenSlot, ev.Send, ev.Send]
    messages = [one.message for one in greeted if isinstance(one, ev.Send)]
    assert messages == [Welcome(Manifest(Key(model, 0, 0))) for model in (1, 0)]


def test_who_is_fenced_by_one_is_gone_for_all() -> None:
    lanes = Lanes(2)
    actions = lanes.hear(7, Hello(7, 7, has_slot=True))
    assert len(only(ev.HangUp, actions)) == 1
    assert all(7 not in lane.connected for lane in lanes.turns.lanes)


def test_who_is_no_member_any_more_is_gone_for_all() -> None:
    lanes = Lanes(2)
    fewer = replace(lanes.membership, generation=2, members=(0,))
    actions = lanes.hear(None, Admit(fewer))
    assert only(ev.HangUp, actions)
    assert all(lane.connected == {0} for lane in lanes.turns.lanes)
    ((_, tell),) = only(ev.Tell, actions)
    assert (tell.report.connected, tell.report.lost) == ((0,), ())


def test_a_leaving_worker_finishes_what_it_holds_of_another_model() -> None:
    lanes = Lanes(2)
    lanes.ask(0, 0, 0)
    lanes.ask(0, 0, 1)  # worker 1 still holds the same one, of model 0
    leaving = replace(lanes.membership, generation=2, members=(0,), leaving=(1,))
    assert not only(ev.HangUp, lanes.hear(None, Admit(leaving)))
    late = Lease(replace(RUNNING, model=0).key, (1,))
    actions = lanes.hear(1, Release((late,)))
    assert [one.worker for _, one in only(ev.HangUp, actions)] == [1]


def test_reports_are_united() -> None:
    lanes = Lanes(2)
    (_, tell) = only(ev.Tell, lanes.greeted[-1])[-1]
    assert (tell.report.step, tell.report.connected) == (6, (0, 1))
    lanes.step(0)
    ((_, tell),) = only(ev.Tell, lanes.update(0))
    assert tell.report.step == 7


def test_a_model_that_fails_ends_alone_and_the_job_says_so_at_its_end() -> None:
    lanes = Lanes(2, 2, num_steps=4)
    lanes.ask(0, 0, 0, loss_sum=float("nan"))
    actions = lanes.ask(1, 0, 0, loss_sum=float("nan"))
    assert [model for model, _ in only(ev.Finish, actions)] == [0]
    lanes.do(ev.Finished(), 0)
    assert not lanes.turns.has_ended
    lanes.step(1)
    actions = lanes.update(1)
    assert [model for model, _ in only(ev.Finish, actions)] == [1]
    ((_, tell),) = only(ev.Tell, lanes.do(ev.Finished(), 1))
    assert lanes.turns.has_ended
    assert tell.report.finished
    assert tell.report.failure.startswith("model 0: step 3, micro-batch 0: the loss or gradient")


def test_a_stop_ends_those_at_once_that_are_between_steps() -> None:
    lanes = Lanes(3)
    lanes.ask(0, 0, 0)
    actions = lanes.hear(None, Stop("enough"))
    assert [model for model, _ in only(ev.Finish, actions)] == [1, 2]
    lanes.ask(1, 0, 1)
    assert [model for model, _ in only(ev.Finish, lanes.update(0))] == [0]


@pytest.mark.parametrize("granted", [(), (0,), (0, 1)])
def test_a_successor_goes_on_with_the_turn(granted: tuple[int, ...]) -> None:
    """Model 0 was being updated, and some of model 1 was granted."""
    membership = Membership(generation=1, members=(0, 1), next_worker=2)
    recovered = []
    for model, micro_batches in enumerate([(0, 1), granted, ()]):
        state = replace(RUNNING, model=model)
        rows = {one: outcome(one) for one in micro_batches}
        manifests = {0: Manifest(state.key, 0, micro_batches), 1: Manifest(state.key)}
        recovered.append(agg.Recovered(state, membership, manifests, rows))
    lanes = Lanes(recovered=recovered)
    complete = [0, 1] if len(granted) == 2 else [0]
    assert [model for model, _ in only(ev.Update, lanes.started)] == complete
    got = {what for one in lanes.greeted for _, what in leased(one)}
    left = {(1, one) for one in (0, 1) if one not in granted}
    assert got == (left or {(2, 0), (2, 1)})


AUDITED = Audits(probability=0.9999, seed=0)


def audit(lanes: Lanes, model: int) -> Actions:
    """Have all questions about a model answered, as those who are honest do."""
    actions: Actions = []
    while asked := [
        (worker, lease)
        for worker, leases in lanes.turns.lanes[model].leases.items()
        for lease in leases
        if lease.audits
    ]:
        worker, lease = asked[0]
        actions += lanes.hear(worker, Commit(lease, 0, 0, (outcome(lease.micro_batches[0]),)))
    return actions


def lie(lanes: Lanes, model: int) -> Actions:
    """Worker 0 answers wrongly for a model, and is found out."""
    actions = lanes.ask(0, model, 0, loss_sum=7.0)
    actions += lanes.ask(1, model, 1)
    actions += lanes.hear(2, Release(lanes.turns.lanes[model].leases.get(2, ())))
    actions += audit(lanes, model)
    assert [one.worker for _, one in only(ev.Note, actions) if one.kind == "worker_lied"] == [0]
    return actions


def test_who_lies_to_one_model_has_lied_to_all() -> None:
    """In rounds several steps run at once, and a liar may have done a part of each."""
    membership = Membership(generation=1, members=(0, 1, 2), next_worker=3)
    recovered = []
    for model, micro_batches in enumerate([(), (0,)]):
        state = replace(RUNNING, model=model)
        manifests = {0: Manifest(state.key, 0, micro_batches)}
        rows = {one: outcome(one) for one in micro_batches}
        recovered.append(agg.Recovered(state, membership, manifests, rows))
    lanes = Lanes(2, 3, recovered=recovered, audits=AUDITED)
    actions = lie(lanes, 0)
    assert 0 not in lanes.lead(1)._granted_to.values()
    emptied = [(model, one.manifest) for model, one in only(ev.SaveManifest, actions)]
    assert (1, Manifest(replace(RUNNING, model=1).key)) in emptied
    assert (0,) in [one.micro_batches for model, one in only(ev.MarkUndone, actions) if model == 1]
    told = [one for _, one in only(ev.Send, lanes.hear(0, Hello(0, 0, has_slot=True)))]
    assert [(one.worker, type(one.message)) for one in told] == [(0, Dismiss)]
    assert all(0 not in lane.connected for lane in lanes.turns.lanes)


def test_an_update_from_what_a_liar_did_is_given_up() -> None:
    lanes = Lanes(2, 3, audits=AUDITED)
    lanes.step(0)
    lanes.hear(2, Release(lanes.turns.lanes[0].leases.get(2, ())))
    audit(lanes, 0)
    assert lanes.turns.lanes[0].phase is agg.Phase.UPDATING
    begun = lanes.lead(0)._round
    actions = lie(lanes, 1)
    assert [(model, one.round) for model, one in only(ev.GiveUp, actions)] == [(0, begun)]
    lanes.do(ev.Updated(0.5, round=begun), 0)
    assert lanes.turns.lanes[0].state.step == RUNNING.step
    assert (1, (0, 0)) in leased(actions) or (2, (0, 0)) in leased(actions)
