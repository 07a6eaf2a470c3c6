"""The rules of the step protocol, one by one, without a simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from elastic.core.errors import ProtocolError
from elastic.core.protocol import advance
from elastic.core.protocol import aggregator as agg
from elastic.core.protocol import coordinator as coord
from elastic.core.protocol import events as ev
from elastic.core.protocol import worker as wrk
from elastic.core.protocol.messages import (
    Admit,
    Combine,
    Commit,
    Dismiss,
    Granted,
    Hello,
    Key,
    Lease,
    Leases,
    Leave,
    Manifest,
    Membership,
    Message,
    Outcome,
    Refused,
    Release,
    Report,
    Revoke,
    State,
    Stop,
    Welcome,
)
from policies.hangs import Silence
from policies.restarts import BackOff

T = TypeVar("T")
NAN = float("nan")
RUNNING = State(step=3, attempt=0, exponents=(10,))


def outcome(micro_batch: int, *, largest: float = 1.0, loss_sum: float = 1.0) -> Outcome:
    maxima_C = np.array([largest], np.float32)
    return Outcome(micro_batch, loss_sum, 1.0, bytes(16), bytes(8), maxima_C)


def only(kind: type[T], actions: Sequence[Any]) -> list[T]:
    return [one for one in actions if isinstance(one, kind)]


class Node:
    """An aggregator with connected members 0, 1, ... and a clock that the test turns."""

    def __init__(
        self,
        num_workers: int = 2,
        *,
        state: State = RUNNING,
        num_micro_batches: int = 2,
        recovered: agg.Recovered | None = None,
        **rules: Any,
    ) -> None:
        members = tuple(range(num_workers))
        membership = Membership(generation=1, members=members, next_worker=num_workers)
        self.now_s = 0.0
        all_rules = agg.Rules(
            num_steps=5, num_micro_batches=num_micro_batches, num_chunks=1, **rules
        )
        self.aggregator = agg.Aggregator(all_rules, recovered or agg.Recovered(state, membership))
        self.do(ev.Started())
        self.hear(None, Report(0, Membership(), ()))
        for worker in members if recovered is None else ():
            self.hear(worker, Hello(worker, worker))

    def do(self, event: ev.Event) -> list[ev.Action]:
        return self.aggregator.handle(event, self.now_s)

    def update(self) -> list[ev.Action]:
        """The next version is complete."""
        return self.do(ev.Updated(round=self.aggregator._round))

    def hear(self, sender: int | None, message: Message) -> list[ev.Action]:
        return self.do(ev.Received(sender, message))

    def ask(
        self,
        worker: int,
        micro_batch: int,
        *,
        num_base: int = 0,
        half: int = 0,
        key: Key | None = None,
        **answer: float,
    ) -> list[ev.Action]:
        """The commit of one micro-batch by a worker."""
        key = key or self.aggregator.state.key
        result = outcome(micro_batch, **answer)
        lease = Lease(key, (micro_batch,), self.aggregator._combine)
        return self.hear(worker, Commit(lease, half, num_base, (result,)))

    def holds(self, worker: int) -> list[int]:
        """The micro-batches that the aggregator thinks a worker holds."""
        return [
            one for lease in self.aggregator._peers[worker].queue for one in lease.micro_batches
        ]


def answer(actions: Sequence[ev.Action], worker: int) -> Message:
    """The first message to a worker."""
    return next(one.message for one in only(ev.Send, actions) if one.worker == worker)


# Evaluation


def evaluating(**rules: Any) -> Node:
    """A node at a step that begins with an evaluation of three micro-batches."""
    return Node(evaluate_every=3, num_evaluated=3, **rules)


def test_a_step_that_is_due_begins_with_an_evaluation() -> None:
    node = evaluating()
    assert sorted(node.holds(0) + node.holds(1)) == [0, 1, 2]
    assert node.aggregator._combine is Combine.EVALUATE
    holders = {one: worker for worker in (0, 1) for one in node.holds(worker)}
    other = 1 - holders[0]
    actions = [*node.ask(holders[0], 0), *node.ask(other, 2, loss_sum=2.0)]
    assert not only(ev.Evaluated, actions)
    last = node.ask(holders[1], 1, num_base=1, half=1, loss_sum=6.0)
    (evaluated,) = only(ev.Evaluated, last)
    assert (evaluated.step, evaluated.loss) == (3, (1.0 + 2.0 + 6.0) / 3)
    (saved,) = only(ev.SaveState, last)
    assert saved.state == replace(RUNNING, attempt=1, evaluated=3)
    assert last.index(evaluated) < last.index(saved), "written down before it is done with"
    assert node.aggregator._combine is Combine.SUM
    leases = [one for send in only(ev.Send, last) for one in getattr(send.message, "leases", ())]
    assert {one.micro_batches for one in leases if one.key == saved.state.key} == {(0,), (1,)}


def test_an_evaluation_that_counts_is_not_begun_again() -> None:
    node = evaluating(state=replace(RUNNING, attempt=1, evaluated=3))
    assert node.aggregator._combine is Combine.SUM


def test_what_comes_late_from_an_evaluation_is_stale() -> None:
    node = evaluating()
    key = node.aggregator.state.key
    for micro_batch in range(3):
        node.ask(0, micro_batch, num_base=micro_batch, half=micro_batch % 2)
    late = node.ask(1, 0, key=key)
    assert isinstance(answer(late, 1), Refused)
    assert not node.aggregator._outcomes


def test_the_job_ends_with_an_evaluation() -> None:
    node = Node(state=replace(RUNNING, step=5), evaluate_every=4, num_evaluated=1)
    last = node.ask(0, 0)
    assert [type(one) for one in last if isinstance(one, ev.Evaluated | ev.Finish)] == [
        ev.Evaluated,
        ev.Finish,
    ]


def test_an_evaluation_that_is_not_finite_twice_has_no_value_and_the_job_goes_on() -> None:
    node = evaluating()
    node.ask(0, 0, loss_sum=NAN)
    last = node.ask(1, 0, loss_sum=NAN)
    (evaluated,) = only(ev.Evaluated, last)
    assert np.isnan(evaluated.loss)
    assert "evaluation of step 3, micro-batch 0" in only(ev.Note, last)[-1].reason
    assert not only(ev.Finish, last)
    assert node.aggregator._combine is Combine.SUM


def test_a_job_that_stops_does_not_begin_an_evaluation() -> None:
    node = Node(0, evaluate_every=3, num_evaluated=1)
    assert only(ev.Finish, node.hear(None, Stop("asked to")))


def test_the_pace_of_an_evaluation_says_nothing_of_training() -> None:
    node = evaluating()
    node.ask(0, 0)
    assert not node.aggregator._peers[0].samples_s


# The grant


def test_rows_come_before_the_manifest_and_the_manifest_before_the_answer() -> None:
    kinds = [type(one) for one in Node().ask(0, 0)[:4]]
    assert kinds == [ev.SaveRow, ev.SaveManifest, ev.MarkDone, ev.Send]


def test_a_micro_batch_is_granted_once() -> None:
    node = Node()
    assert isinstance(answer(node.ask(0, 0), 0), Granted)
    again = node.ask(1, 0)
    assert answer(again, 1) == Refused(Lease(RUNNING.key, (0,)), "granted to another worker")
    assert not only(ev.SaveManifest, again)


def test_a_repeated_question_is_answered_as_before_and_stores_nothing() -> None:
    node = Node()
    first = answer(node.ask(0, 0), 0)
    again = node.ask(0, 0)
    assert answer(again, 0) == first
    assert not only(ev.SaveManifest, again) + only(ev.SaveRow, again)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"key": Key(0, 2, 0)}, "stale: step 3 attempt 0 runs"),
        ({"key": Key(0, 3, 1)}, "stale: step 3 attempt 0 runs"),
        ({"num_base": 1}, "sum of 1 in half 0: 0 count here"),
        ({"micro_batch": 7}, "micro-batches (7,) do not exist"),
    ],
    ids=["step", "attempt", "sum", "number"],
)
def test_what_cannot_count_is_refused(how: dict[str, Any], reason: str) -> None:
    refusal = answer(Node().ask(0, **{"micro_batch": 0, **how}), 0)
    assert isinstance(refusal, Refused)
    assert refusal.reason == reason


def test_a_sum_over_the_live_half_is_refused() -> None:
    node = Node(1, num_micro_batches=3)
    node.ask(0, 0, half=1)
    refusal = answer(node.ask(0, 1, num_base=1, half=1), 0)
    assert isinstance(refusal, Refused)
    assert "sum of 1 in half 1" in refusal.reason
    assert isinstance(answer(node.ask(0, 1, num_base=1, half=0), 0), Granted)


def test_a_spare_may_not_commit() -> None:
    node = Node(1)
    node.hear(7, Hello(7, 7))
    refusal = answer(node.ask(7, 0), 7)
    assert isinstance(refusal, Refused)
    assert refusal.reason == "not a member"


def test_a_stranger_is_not_answered() -> None:
    assert not only(ev.Send, Node().ask(9, 0))


def test_staleness_is_looked_at_before_a_nan() -> None:
    node = Node()
    actions = node.ask(0, 0, key=Key(0, 2, 0), loss_sum=NAN)
    assert "stale" in str(answer(actions, 0))
    assert not only(ev.Note, actions)
    assert not node.aggregator._nonfinite


# The step


def test_the_first_pass_takes_the_maxima_and_starts_again() -> None:
    node = Node(state=State(step=0, attempt=0, exponents=None))
    assert node.aggregator._combine is Combine.MAXIMA
    node.ask(0, 0, largest=1.0)
    (saved,) = only(ev.SaveState, node.ask(1, 1, largest=3.0))
    assert (saved.state.step, saved.state.attempt, saved.state.overflows) == (0, 1, 0)
    assert saved.state.exponents is not None
    assert node.aggregator._combine is Combine.SUM


def test_an_overflow_does_all_of_the_step_again() -> None:
    node = Node()
    node.ask(0, 0, largest=2.0**25)
    actions = node.ask(1, 1, largest=1.0)
    (saved,) = only(ev.SaveState, actions)
    assert (saved.state.step, saved.state.attempt, saved.state.overflows) == (3, 1, 1)
    assert "overflow" in [one.kind for one in only(ev.Note, actions)]
    assert sorted(node.holds(0) + node.holds(1))[-2:] == [0, 1]
    assert "stale" in str(answer(node.ask(0, 0, key=RUNNING.key), 0))


def test_a_complete_step_is_summed_then_flipped_then_the_next_is_leased() -> None:
    node = Node()
    node.ask(0, 0)
    (update,) = only(ev.Update, node.ask(1, 1, half=1))
    assert (update.slots, update.weight, update.skip) == (((0, 0), (1, 1)), 2.0, False)
    actions = node.do(ev.Updated(0.5, round=1))
    assert [type(one) for one in actions[:2]] == [ev.SaveState, ev.Committed]
    assert node.aggregator.state.step == 4
    assert sorted(node.holds(0) + node.holds(1)) == [0, 1]


def test_weights_that_add_up_to_nothing_are_an_error() -> None:
    node = Node(1, num_micro_batches=1)
    nothing = replace(outcome(0), weight=0.0)
    (finish,) = only(ev.Finish, node.hear(0, Commit(Lease(RUNNING.key, (0,)), 0, 0, (nothing,))))
    assert "must be > 0" in finish.failure


def test_counters_that_differ_are_an_error() -> None:
    node = Node()
    node.ask(0, 0)
    other = replace(outcome(1), counters=b"12345678")
    actions = node.hear(1, Commit(Lease(RUNNING.key, (1,)), 0, 0, (other,)))
    (finish,) = only(ev.Finish, actions)
    assert "integer buffers differ" in finish.failure


def test_the_last_step_finishes_the_job() -> None:
    node = Node(1, state=replace(RUNNING, step=4), num_micro_batches=1)
    node.ask(0, 0)
    assert only(ev.Finish, node.update()) == [ev.Finish("")]
    (tell,) = only(ev.Tell, node.do(ev.Finished()))
    assert tell.report.finished


def test_a_stop_for_which_no_time_is_left_does_not_wait_for_the_step() -> None:
    node = Node(1, num_micro_batches=2)
    node.ask(0, 0)
    assert not only(ev.Finish, node.hear(None, Stop("soon gone")))
    actions = node.hear(None, Stop("soon gone", at_once=True))
    assert only(ev.Finish, actions) == [ev.Finish("")]
    assert node.aggregator.state.step == 3


def test_a_stop_lets_the_step_end_first() -> None:
    node = Node(1, num_micro_batches=2)
    node.ask(0, 0)
    assert not only(ev.Finish, node.hear(None, Stop("asked to")))
    node.ask(0, 1, num_base=1, half=1)
    actions = node.update()
    assert only(ev.Finish, actions) == [ev.Finish("")]
    assert not only(ev.Send, actions)
    assert node.aggregator.state.step == 4


# What is not finite


def test_a_nan_is_recomputed_by_another_worker_which_may_be_right() -> None:
    node = Node()
    actions = node.ask(0, 0, loss_sum=NAN)
    assert answer(actions, 0) == Refused(Lease(RUNNING.key, (0,)), "not finite")
    assert not only(ev.SaveManifest, actions)
    node.now_s = 100.0
    node.ask(1, 1)
    assert node.holds(0) == [], "not by the worker that it came from"
    assert node.holds(1) == [0]
    assert isinstance(answer(node.ask(1, 0, num_base=1, half=1), 1), Granted)


@pytest.mark.parametrize("skip", [False, True])
def test_a_nan_seen_by_two_workers_is_the_models_own(skip: bool) -> None:
    node = Node(skip_nonfinite=skip)
    node.ask(0, 0, loss_sum=NAN)
    actions = node.ask(1, 0, loss_sum=NAN)
    if not skip:
        (finish,) = only(ev.Finish, actions)
        assert "step 3, micro-batch 0: the loss or gradient is not finite" in finish.failure
        return
    (update,) = only(ev.Update, actions)
    assert (update.skip, update.slots) == (True, ())
    node.update()
    assert (node.aggregator.state.step, node.aggregator.state.skipped) == (4, (3,))


def test_too_many_skipped_steps_end_the_job() -> None:
    state = replace(RUNNING, skipped=(0, 1))
    node = Node(state=state, skip_nonfinite=True, max_skipped=2)
    node.ask(0, 0, loss_sum=NAN)
    (finish,) = only(ev.Finish, node.ask(1, 0, loss_sum=NAN))
    assert "nonfinite.max_skipped: 2" in finish.failure


def test_a_lone_worker_computes_its_nan_again() -> None:
    node = Node(1, num_micro_batches=1)
    assert not only(ev.Finish, node.ask(0, 0, loss_sum=NAN))
    assert node.holds(0) == [0]
    assert only(ev.Finish, node.ask(0, 0, loss_sum=NAN))


def test_a_worker_that_was_alone_no_longer_decides_once_another_came() -> None:
    node = Node(1, num_micro_batches=1)
    node.ask(0, 0, loss_sum=NAN)
    node.hear(1, Hello(1, 1))
    node.hear(None, Admit(Membership(generation=2, members=(0, 1))))
    assert not only(ev.Finish, node.ask(0, 0, loss_sum=NAN))
    assert node.holds(1) == [0]


# Membership


def test_a_worker_that_leaves_finishes_what_it_holds() -> None:
    node = Node(2, num_micro_batches=2)
    held = node.holds(0)
    node.hear(0, Leave("asked to"))
    node.hear(None, Admit(Membership(generation=2, members=(1,), leaving=(0,))))
    assert node.holds(0) == held
    actions = node.ask(0, held[0])
    assert isinstance(answer(actions, 0), Granted)
    assert only(ev.Send, actions)[1] == ev.Send(0, Dismiss("left as planned"))
    assert ev.HangUp(0) in actions


def test_the_wish_to_leave_is_told() -> None:
    (tell,) = only(ev.Tell, Node().hear(1, Leave("asked to")))
    assert tell.report.wants_leave == (1,)


def test_a_spare_may_leave_at_once() -> None:
    node = Node(1)
    node.hear(5, Hello(5, 5))
    assert answer(node.hear(5, Leave("asked to")), 5) == Dismiss("left as planned")


def test_no_wish_to_leave_counts_once_all_stop() -> None:
    node = Node(2)
    node.hear(None, Stop("asked to"))
    assert only(ev.Tell, node.hear(1, Leave("asked to"))) == []


def test_who_is_no_member_any_more_is_dismissed_and_its_work_is_free() -> None:
    node = Node(2)
    held = node.holds(1)
    actions = node.hear(None, Admit(Membership(generation=2, members=(0,))))
    assert [type(one) for one in actions[:3]] == [ev.SaveMembership, ev.Send, ev.HangUp]
    assert answer(actions, 1) == Dismiss("no member any more")
    assert set(held) <= set(node.holds(0)) | set(node.aggregator._pending())


def test_an_old_membership_changes_nothing() -> None:
    assert not only(ev.SaveMembership, Node().hear(None, Admit(Membership(generation=1))))


def test_a_slot_is_dropped_only_once_its_step_is_over_and_its_worker_is_fenced() -> None:
    node = Node(2)
    node.ask(0, 0)
    node.do(ev.Disconnected(0))
    actions = node.hear(None, Admit(Membership(generation=2, members=(1,))))
    assert not only(ev.DropSlot, actions)
    (update,) = only(ev.Update, node.ask(1, 1))
    assert update.slots == ((0, 0), (1, 0)), "what the dead worker committed counts"
    assert only(ev.DropSlot, node.update()) == [ev.DropSlot(0)]
    actions = node.hear(0, Hello(0, 0, has_slot=True))
    assert answer(actions, 0) == Dismiss("fenced")
    assert not only(ev.OpenSlot, actions)


def test_what_a_lost_worker_held_is_taken_by_another() -> None:
    node = Node(2)
    node.ask(1, node.holds(1)[0])
    lost = node.holds(0)
    node.do(ev.Disconnected(0))
    assert node.holds(1) == lost


def test_a_worker_that_is_known_to_have_died_is_told_of_at_once() -> None:
    node = Node(2)
    assert not any(one.report.hung for one in only(ev.Tell, node.do(ev.Disconnected(0))))
    (tell,) = only(ev.Tell, node.do(ev.Disconnected(1, is_dead=True)))
    assert tell.report.hung == ((1, "its process died"),)


def test_a_slow_worker_is_helped_as_soon_as_it_is_seen_to_be_slow() -> None:
    node = Node(2)
    for peer in node.aggregator._peers.values():
        peer.samples_s.extend([1.0] * 3)
    (mine,), (late,) = node.holds(0), node.holds(1)
    for node.now_s in (0.2, 0.4, 0.6, 0.8):
        node.do(ev.Tick({1: advance.WHOLE * int(100 * node.now_s / 3) // 100}))  # a third as fast
    node.ask(0, mine)
    assert node.holds(0) == [late]


def test_one_as_fast_as_others_is_not_helped() -> None:
    node = Node(2)
    for peer in node.aggregator._peers.values():
        peer.samples_s.extend([1.0] * 3)
    (mine,), _ = node.holds(0), node.holds(1)
    for node.now_s in (0.2, 0.4, 0.6, 0.8):
        node.do(ev.Tick({1: advance.WHOLE * int(100 * node.now_s) // 100}))
    node.ask(0, mine)
    assert node.holds(0) == []


def test_who_was_beaten_after_a_long_time_is_known_to_be_slow() -> None:
    node = Node(2)
    peers = node.aggregator._peers
    peers[1].samples_s.extend([1.0] * 3)
    (mine,), (late,) = node.holds(0), node.holds(1)
    lease = peers[1].queue[0]
    node.ask(0, mine)
    node.now_s = 9.0
    node.do(ev.Tick({}))
    assert node.holds(0) == [late]
    node.ask(0, late, num_base=1, half=1)
    node.hear(1, Release((lease,)))
    assert list(peers[1].samples_s) == [1.0, 1.0, 1.0, 2.0], "it may have stood still"


def test_who_was_beaten_soon_may_have_been_as_fast() -> None:
    node = Node(2)
    peers = node.aggregator._peers
    peers[1].samples_s.extend([1.0] * 3)
    node.now_s = 0.5
    node.hear(1, Release((peers[1].queue[0],)))
    assert list(peers[1].samples_s) == [1.0, 1.0, 1.0]


def test_a_worker_that_gets_nothing_is_tried_again() -> None:
    start = State(step=0, attempt=0, exponents=(10,))
    node, shares = Node(3, num_micro_batches=3, state=start), []
    peers = node.aggregator._peers
    for step in range(3):
        counted = [0, 0, 0]
        while busy := [worker for worker in peers if node.holds(worker)]:
            worker, num = busy[0], counted[busy[0]]
            node.ask(worker, node.holds(worker)[0], num_base=num, half=num % 2)
            counted[worker] += 1
        for worker, samples_s in enumerate(([1.0] * 3, [1.0] * 3, [3.0] * 3)):
            if worker < 2 or step == 0:
                peers[worker].samples_s.clear()
                peers[worker].samples_s.extend(samples_s)
        node.update()
        shares.append(len(node.holds(2)))
    assert shares == [0, 0, 1], "two bad samples are not held against it for ever"


def test_a_successor_goes_on_from_manifests_and_rows() -> None:
    done = Manifest(RUNNING.key, half=1, micro_batches=(1,))
    old = Manifest(Key(0, 2, 0), half=0, micro_batches=(0,))
    membership = Membership(generation=4, members=(0, 1))
    node = Node(recovered=agg.Recovered(RUNNING, membership, {0: old, 1: done}, {1: outcome(1)}))
    actions = node.hear(0, Hello(0, 0, has_slot=True))
    assert answer(actions, 0) == Welcome(old)
    assert node.holds(0) == [0]
    (update,) = only(ev.Update, node.ask(0, 0))
    assert update.slots == ((0, 0), (1, 1))
    node.update()
    assert answer(node.hear(1, Hello(1, 1, has_slot=True)), 1) == Welcome(done)


def test_a_successor_leaves_to_workers_what_they_hold() -> None:
    membership = Membership(generation=4, members=(0,))
    node = Node(recovered=agg.Recovered(RUNNING, membership, {0: Manifest(Key(0, 0, 0))}, {}))
    holding = (Lease(RUNNING.key, (1,)), Lease(Key(0, 2, 0), (0,)))
    node.hear(0, Hello(0, 0, has_slot=True, holding=holding))
    assert node.holds(0) == [1]


@pytest.mark.parametrize("connected", [True, False])
def test_a_member_that_does_nothing_or_never_comes_is_taken_to_hang(connected: bool) -> None:
    node = Node(1, hangs=Silence(factor=1.0, floor_s=1.0, patience=2.0))
    if not connected:
        node.do(ev.Disconnected(0))
    node.do(ev.Tick({0: 5}))
    node.now_s = 1.9
    assert not only(ev.Note, node.do(ev.Tick({0: 5})))
    node.now_s = 2.1
    actions = node.do(ev.Tick({0: 5}))
    assert [(one.kind, one.worker) for one in only(ev.Note, actions)] == [("worker_hung", 0)]
    (tell,) = only(ev.Tell, actions)
    assert tell.report.hung[0][0] == 0


def test_traffic_does_not_put_off_the_next_look_at_progress() -> None:
    node = Node(1, num_micro_batches=1)
    node.do(ev.Tick({0: 1}))
    due_s = node.aggregator.next_tick_s
    for _ in range(9):
        node.now_s += 0.5
        node.hear(None, Report(0, Membership(), ()))
    assert node.aggregator.next_tick_s <= due_s


def test_illegal_moves_raise() -> None:
    node = Node()
    with pytest.raises(ProtocolError, match="illegal move"):
        node.aggregator._move(agg.Phase.ENDED)
    with pytest.raises(ProtocolError, match="illegal move"):
        wrk.Worker(0, 0)._move(wrk.Phase.ENCODING)


# The worker

KEY = Key(0, 3, 0)
A, B = Lease(KEY, (0,)), Lease(KEY, (1,))


class Hand:
    """A worker that was welcomed, and the key that runs."""

    def __init__(self, manifest: Manifest | None = None) -> None:
        self.worker = wrk.Worker(4, 44)
        self.key = KEY
        self.do(wrk.Connected())
        self.do(Welcome(manifest or Manifest(Key(0, 0, 0))))

    def do(self, event: wrk.Event) -> list[wrk.Action]:
        return self.worker.handle(event, (self.key.word,))

    def compute(self, lease: Lease) -> list[wrk.Action]:
        """Have it lease, compute and encode one micro-batch."""
        self.do(Leases((lease,)))
        self.do(wrk.Computed(lease, (outcome(lease.micro_batches[0]),)))
        return self.do(wrk.Encoded())


def test_the_first_of_a_step_overwrites_and_the_next_goes_to_the_other_half() -> None:
    hand = Hand()
    assert hand.do(Leases((A, B))) == [wrk.Compute(A)]
    assert hand.do(wrk.Computed(A, (outcome(0),))) == [wrk.Encode(A, 0, None)]
    asked, begun = hand.do(wrk.Encoded())
    assert isinstance(asked, wrk.Send)
    assert isinstance(asked.message, Commit)
    assert (asked.message.half, asked.message.num_base) == (0, 0)
    assert begun == wrk.Compute(B), "it computes while the answer is out"
    assert hand.do(wrk.Computed(B, (outcome(1),))) == []
    assert hand.worker.phase is wrk.Phase.HOLDING
    assert hand.do(Granted(A, 0)) == [wrk.Encode(B, 1, 0)]


def test_after_a_refusal_the_same_half_is_overwritten() -> None:
    hand = Hand()
    hand.compute(A)
    hand.do(Refused(A, "granted to another worker"))
    hand.do(Leases((B,)))
    assert hand.do(wrk.Computed(B, (outcome(1),))) == [wrk.Encode(B, 0, None)]


def test_maxima_are_asked_without_writing() -> None:
    hand = Hand()
    lease = Lease(KEY, (0,), Combine.MAXIMA)
    hand.do(Leases((lease,)))
    (asked,) = hand.do(wrk.Computed(lease, (outcome(0),)))
    assert isinstance(asked, wrk.Send)


def test_stale_leases_are_given_back() -> None:
    hand = Hand()
    stale = Lease(Key(0, 2, 0), (0,))
    assert hand.do(Leases((stale, A))) == [wrk.Send(Release((stale,))), wrk.Compute(A)]


def test_what_goes_stale_while_computed_is_given_back() -> None:
    hand = Hand()
    hand.do(Leases((A,)))
    hand.key = Key(0, 4, 0)
    assert hand.do(wrk.Computed(A, (outcome(0),))) == [wrk.Send(Release((A,)))]
    assert hand.worker.phase is wrk.Phase.IDLE


OTHER = Lease(Key(1, 2, 0), (0,))


class HandOfTwo(Hand):
    """A worker of two models, of which the second is a step behind."""

    def do(self, event: wrk.Event) -> list[wrk.Action]:
        return self.worker.handle(event, (self.key.word, OTHER.key.word))


def test_a_lease_is_stale_by_the_word_of_its_model() -> None:
    hand = HandOfTwo()
    hand.do(Welcome(Manifest(Key(1, 0, 0))))
    stale = replace(OTHER, key=Key(1, 1, 0))
    assert hand.do(Leases((stale, OTHER))) == [wrk.Send(Release((stale,))), wrk.Compute(OTHER)]
    hand.key = Key(0, 9, 0)  # of no concern to it
    assert hand.do(wrk.Computed(OTHER, (outcome(0),))) == [wrk.Encode(OTHER, 0, None)]


def test_each_model_has_a_slot_and_a_welcome_of_its_own() -> None:
    hand = HandOfTwo(Manifest(KEY, 1, (5,)))
    hand.do(Leases((A, OTHER)))
    assert hand.do(wrk.Computed(A, (outcome(0),))) == [wrk.Encode(A, 0, 1)]
    hand.do(wrk.Encoded())
    hand.do(Granted(A, 0))
    assert hand.do(wrk.Computed(OTHER, (outcome(0),))) == [wrk.Encode(OTHER, 0, None)]
    assert hand.do(wrk.Encoded()) == []  # it is not welcome to that model yet
    (asked,) = hand.do(Welcome(Manifest(Key(1, 0, 0))))
    assert isinstance(asked, wrk.Send)
    assert isinstance(asked.message, Commit)
    assert (asked.message.lease, asked.message.half, asked.message.num_base) == (OTHER, 0, 0)


def test_a_revoked_lease_is_forgotten_unless_it_was_begun() -> None:
    hand = Hand()
    hand.do(Leases((A, B)))
    hand.do(Revoke(A))
    hand.do(Revoke(B))
    hand.do(wrk.Computed(A, (outcome(0),)))
    assert len(hand.do(wrk.Encoded())) == 1


def test_an_open_question_is_asked_again_of_a_successor_only_once_welcomed() -> None:
    hand = Hand()
    (first,) = hand.compute(A)
    hand.do(wrk.Disconnected())
    assert hand.do(wrk.Connected()) == [wrk.Send(Hello(4, 44, True, (A,)))]
    assert hand.do(Welcome(Manifest(KEY))) == [first]


def test_a_question_that_comes_up_before_the_welcome_is_sent_once() -> None:
    hand = Hand()
    hand.do(Leases((A,)))
    hand.do(wrk.Disconnected())
    hand.do(wrk.Computed(A, (outcome(0),)))
    hand.do(wrk.Connected())
    assert hand.do(wrk.Encoded()) == []
    (asked,) = hand.do(Welcome(Manifest(KEY)))
    assert isinstance(asked, wrk.Send)
    assert isinstance(asked.message, Commit)


def test_a_grant_that_the_welcome_told_of_counts_once() -> None:
    hand = Hand()
    hand.compute(A)
    hand.do(wrk.Disconnected())
    hand.do(wrk.Connected())
    hand.do(Welcome(Manifest(KEY, 0, (0,))))
    hand.do(Granted(A, 0))
    (asked,) = hand.compute(B)
    assert isinstance(asked, wrk.Send)
    assert isinstance(asked.message, Commit)
    assert (asked.message.num_base, asked.message.half) == (1, 1)


@pytest.mark.parametrize("phase", list(wrk.Phase)[:-1], ids=lambda phase: phase.name)
def test_a_dismissed_worker_ends_whatever_it_does(phase: wrk.Phase) -> None:
    hand = Hand()
    if phase is wrk.Phase.HOLDING:
        hand.compute(A)
    if phase is not wrk.Phase.IDLE:
        hand.do(Leases((B,)))
    if phase in (wrk.Phase.HOLDING, wrk.Phase.ENCODING):
        hand.do(wrk.Computed(B, (outcome(1),)))
    assert hand.worker.phase is phase
    assert hand.do(Dismiss("fenced")) == [wrk.Exit("fenced")]


# The coordinator

ALIVE, DEAD, STARTING = coord.Life.ALIVE, coord.Life.DEAD, coord.Life.STARTING


class World:
    """What a coordinator sees; an obedient aggregator takes up every membership."""

    def __init__(self, target: int = 2, *, fresh: bool = True, **limits: Any) -> None:
        everything = {"min_workers": 1, "max_workers": 4, "spare": 0, **limits}
        self.coordinator = coord.Coordinator(coord.Limits(**everything), target, fresh)
        self.now_s = 0.0
        self.report: Report | None = Report(0, Membership(), ())
        self.processes: dict[int, coord.Life] = {}
        self.num_aggregators = 2

    def decide(self) -> list[coord.Action]:
        view = coord.View(self.now_s, self.report, dict(self.processes), {0: self.num_aggregators})
        actions = self.coordinator.decide(view)
        for action in actions:
            if isinstance(action, coord.StartWorker):
                self.processes[action.worker] = STARTING
            if isinstance(action, coord.SetMembership) and self.report is not None:
                self.report = replace(self.report, membership=action.membership)
        return actions

    def connect(self, *workers: int) -> None:
        self.processes |= dict.fromkeys(workers, ALIVE)
        assert self.report is not None
        self.report = replace(self.report, connected=workers)

    @property
    def members(self) -> tuple[int, ...]:
        return self.coordinator.membership.members


def kinds(actions: Sequence[coord.Action]) -> list[str]:
    return [one.kind for one in only(coord.Note, actions)]


def test_workers_are_started_and_become_members_once_they_are_connected() -> None:
    world = World()
    assert only(coord.StartWorker, world.decide()) == [coord.StartWorker(0), coord.StartWorker(1)]
    assert world.members == ()
    world.connect(0, 1)
    assert kinds(world.decide()) == ["worker_joined", "worker_joined"]
    assert world.members == (0, 1)
    assert world.decide() == [], "it says nothing twice"


def test_a_new_job_starts_its_workers_beside_its_first_aggregator() -> None:
    world = World()
    told, world.report = world.report, None
    world.num_aggregators = 0
    first = [coord.StartAggregator(), coord.StartWorker(0), coord.StartWorker(1)]
    assert world.decide() == first
    world.num_aggregators = 1
    assert world.decide() == []
    world.processes[0] = DEAD
    assert not only(coord.StartWorker, world.decide()), "its end may be the aggregator's doing"
    world.report = told
    assert only(coord.StartWorker, world.decide()) == [coord.StartWorker(2)]


def test_a_coordinator_that_is_not_the_first_never_starts_the_first_workers() -> None:
    world = World(fresh=False)
    told, world.report = world.report, None
    world.num_aggregators = 0
    assert world.decide() == [coord.StartAggregator()]
    world.num_aggregators, world.report = 1, told
    assert only(coord.StartWorker, world.decide()) == [coord.StartWorker(2), coord.StartWorker(3)]


def test_a_standby_waits_until_the_first_workers_have_started() -> None:
    world = World(fresh=False)
    world.num_aggregators = 1
    world.processes = {0: ALIVE, 1: STARTING}
    assert not only(coord.StartAggregator, world.decide())
    world.processes |= {1: DEAD, 2: STARTING}
    assert only(coord.StartAggregator, world.decide()) == [coord.StartAggregator()]


def test_a_standby_waits_no_longer_than_an_aggregator_may_be_silent() -> None:
    """An aggregator that hangs by then lets no worker start, and nobody would ever end it."""
    world = World(fresh=False, silence_s=10.0)
    world.num_aggregators = 1
    world.processes = {0: ALIVE, 1: STARTING}
    assert not only(coord.StartAggregator, world.decide())
    world.now_s = 10.5
    assert only(coord.StartAggregator, world.decide()) == [coord.StartAggregator()]


def test_a_spare_is_started_once_those_that_are_needed_run() -> None:
    world = World(spare=1)
    world.decide()
    assert not only(coord.StartWorker, world.decide())
    world.connect(0, 1)
    assert only(coord.StartWorker, world.decide()) == [coord.StartWorker(2)]
    world.connect(0, 1, 2)
    world.decide()
    assert world.members == (0, 1)
    world.processes[0] = DEAD
    world.decide()
    assert world.members == (1, 2)


def test_the_dead_are_buried_once_and_replaced_under_new_numbers() -> None:
    world = World()
    world.decide()
    world.connect(0, 1)
    world.decide()
    world.processes[1] = DEAD
    actions = world.decide()
    assert "worker_lost" in kinds(actions)
    assert only(coord.StartWorker, actions) == [coord.StartWorker(2)]
    assert world.members == (0,)
    assert "worker_lost" not in kinds(world.decide())


def test_who_died_while_there_was_no_coordinator_is_told_of_once() -> None:
    world = World()
    members, leaving = (0, 1), (2,)
    membership = Membership(generation=5, members=members, leaving=leaving, next_worker=3, target=2)
    world.report = Report(4, membership, connected=(0,), lost=(1, 2))
    world.processes = {0: ALIVE}  # the names of the others ended with them
    actions = world.decide()
    assert {(one.kind, one.worker) for one in only(coord.Note, actions)} == {
        ("worker_lost", 1),
        ("worker_left", 2),
    }
    assert world.members == (0,)
    assert not kinds(world.decide())


def test_the_hung_are_killed() -> None:
    world = World()
    world.decide()
    world.connect(0, 1)
    world.decide()
    assert world.report is not None
    world.report = replace(world.report, hung=((1, "no progress"),))
    assert only(coord.KillWorker, world.decide()) == [coord.KillWorker(1)]
    assert world.members == (0,)


def test_a_start_that_never_ends_is_given_up() -> None:
    world = World(1, start_s=60.0)
    world.decide()
    world.now_s = 59.0
    world.decide()
    world.report, told = None, world.report
    world.now_s = 500.0
    assert not only(coord.KillWorker, world.decide()), "there was nothing to connect to"
    world.report = told
    world.decide()
    world.now_s = 561.0
    assert only(coord.KillWorker, world.decide()) == [coord.KillWorker(0)]
    assert 1 in world.processes


def test_a_flapping_worker_is_replaced_more_and_more_slowly_then_not_at_all() -> None:
    world = World(1, restarts=BackOff(limit=4, base_s=1.0))
    starts_s = []
    for _ in range(400):
        world.now_s += 0.1
        actions = world.decide()
        if only(coord.StartWorker, actions):
            starts_s.append(world.now_s)
        if "worker_given_up" in kinds(actions):
            break
        world.processes = dict.fromkeys(world.processes, DEAD)
    gaps = np.diff(starts_s)
    assert len(starts_s) == 4
    assert list(gaps) == sorted(gaps)
    assert world.coordinator.has_given_up
    world.now_s += 1000.0
    assert not only(coord.StartWorker, world.decide()), "only a person changes that"
    assert world.coordinator.scale(1) == ""
    assert only(coord.StartWorker, world.decide())


def test_a_job_without_workers_says_so_once() -> None:
    world = World(1)
    world.decide()
    world.connect(0)
    world.decide()
    world.processes[0] = DEAD
    assert "no_workers" in kinds(world.decide())
    assert "no_workers" not in kinds(world.decide())
    world.connect(1)
    assert "worker_joined" in kinds(world.decide())


def test_scaling_down_lets_the_newest_leave_and_is_bounded() -> None:
    world = World(3)
    world.decide()
    world.connect(0, 1, 2)
    world.decide()
    assert world.coordinator.scale(9) == ("9 workers asked for; workers.min is 1, workers.max is 4")
    world.coordinator.scale(2)
    assert kinds(world.decide()) == ["worker_leaving"]
    assert world.coordinator.membership.leaving == (2,)
    world.processes[2] = DEAD
    assert kinds(world.decide()) == ["worker_left"]
    assert world.coordinator.membership.leaving == ()


def test_one_named_worker_can_be_removed() -> None:
    world = World(2)
    world.decide()
    world.connect(0, 1)
    world.decide()
    world.coordinator.remove(0)
    (said,) = only(coord.SetMembership, world.decide())
    assert (said.membership.members, said.membership.leaving) == ((1,), (0,))
    assert world.coordinator.target == 1


def test_a_worker_that_is_swapped_leaves_and_another_takes_its_place() -> None:
    world = World(2)
    world.decide()
    world.connect(0, 1)
    world.decide()
    world.coordinator.swap(0)
    actions = world.decide()
    assert (world.members, world.coordinator.membership.leaving) == ((1,), (0,))
    assert only(coord.StartWorker, actions) == [coord.StartWorker(2)]
    assert world.coordinator.target == 2


def test_a_wish_to_leave_is_granted_and_a_substitute_started() -> None:
    world = World(2)
    world.decide()
    world.connect(0, 1)
    world.decide()
    assert world.report is not None
    world.report = replace(world.report, wants_leave=(0,))
    actions = world.decide()
    assert (world.members, world.coordinator.membership.leaving) == ((1,), (0,))
    assert only(coord.StartWorker, actions) == [coord.StartWorker(2)]
    assert "worker_leaving" in kinds(actions)


def test_the_last_worker_leaves_once_another_one_is_there() -> None:
    world = World(1)
    world.decide()
    world.connect(0)
    world.decide()
    assert world.report is not None
    world.report = replace(world.report, wants_leave=(0,))
    world.decide()
    assert world.members == (0,)
    world.connect(0, 1)
    world.decide()
    assert (world.members, world.coordinator.membership.leaving) == ((1,), (0,))


def test_a_restarted_coordinator_takes_up_the_membership_and_uses_no_number_twice() -> None:
    world = World(2, fresh=False)
    known = Membership(generation=9, members=(3, 4), next_worker=5, target=2)
    world.report = Report(7, known, (3, 4))
    world.processes = {3: ALIVE, 4: DEAD, 5: STARTING, 6: DEAD}
    actions = world.decide()
    assert world.members == (3,)
    assert world.coordinator.membership.generation > 9
    world.processes[5] = DEAD
    actions += world.decide()
    world.now_s += 60.0  # it backs off
    started = only(coord.StartWorker, actions + world.decide())
    assert started == [coord.StartWorker(7)]


@pytest.mark.parametrize(
    ("standby", "report", "num", "starts"),
    [(True, True, 1, 1), (True, True, 2, 0), (False, True, 1, 0), (True, False, 1, 0)],
    ids=["standby", "both", "none wanted", "the first is not ready"],
)
def test_a_standby_is_started_behind_an_acting_aggregator(
    standby: bool, report: bool, num: int, starts: int
) -> None:
    world = World(standby=standby)
    world.num_aggregators = num
    world.report = world.report if report else None
    assert len(only(coord.StartAggregator, world.decide())) == starts


def test_an_aggregator_that_never_says_anything_gets_a_successor() -> None:
    world = World(standby=False, start_s=60.0)
    world.report, world.num_aggregators = None, 1
    assert not only(coord.StartAggregator, world.decide())
    world.now_s = 61.0
    assert only(coord.StartAggregator, world.decide())
