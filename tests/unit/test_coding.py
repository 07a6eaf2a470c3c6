"""Coded attempts: who computes what, what counts, and when the step is done again uncoded."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.core.protocol import events as ev
from elastic.core.protocol import worker as wrk
from elastic.core.protocol.aggregator import Phase, Recovered
from elastic.core.protocol.messages import (
    Admit,
    Combine,
    Commit,
    Granted,
    Hello,
    Key,
    Lease,
    Leases,
    Manifest,
    Membership,
    Refused,
    Release,
    State,
    decode_message,
    encode_message,
)
from policies.coding.field import PRIME
from policies.coding.simulation import Coded
from tests.unit.test_protocol import KEY, NAN, Hand, Node, answer, only, outcome

NUM = 6  # micro-batches


def coded(num_workers: int = 4, stragglers: int = 1, **more: Any) -> Node:
    """A node at a step, and members that all have just said Hello."""
    policy = Coded(stragglers=stragglers, kind=more.pop("kind", "crc"))
    first = State(step=0, attempt=0, exponents=(10,))
    node = Node(num_workers, state=first, num_micro_batches=NUM, scheduling=policy, **more)
    if not node.aggregator._coding.is_on:  # the first to come has begun alone
        finish(node)
    return node


def finish(node: Node) -> list[ev.Action]:
    """The running step, uncoded; then the next one begins with all that are there."""
    while node.aggregator.phase is Phase.LEASING:
        worker, lease = next(
            (worker, lease)
            for worker, peer in node.aggregator._peers.items()
            for lease in peer.queue
            if lease.key == node.aggregator.state.key
        )
        manifest = node.aggregator._manifests[worker]
        mine = manifest.micro_batches if manifest.key == lease.key else ()
        half = 1 - manifest.half if mine else 0
        result = outcome(lease.micro_batches[0])
        node.hear(worker, Commit(lease, half, len(mine), (result,)))
    for worker, peer in node.aggregator._peers.items():
        stale = tuple(peer.queue)
        node.hear(worker, Release(stale))
    return node.update()


def held(node: Node, worker: int) -> list[Lease]:
    return list(node.aggregator._peers[worker].queue)


def say(node: Node, worker: int, lease: Lease, num_base: int, **told: float) -> list[ev.Action]:
    result = outcome(lease.micro_batches[0], **told)
    return node.hear(worker, Commit(lease, 0, num_base, (result,)))


def complete(node: Node, worker: int) -> list[ev.Action]:
    """All that is leased to a worker; the actions of its last answer."""
    actions: list[ev.Action] = []
    for number, lease in enumerate(held(node, worker)):
        actions = say(node, worker, lease, number)
    return actions


def times(node: Node, update: ev.Update, leased: dict[int, list[Lease]]) -> list[int]:
    """How often each micro-batch counts in an update."""
    counts = [0] * NUM
    for (worker, _), number in zip(update.slots, update.coefficients, strict=True):
        for lease in leased[worker]:
            counts[lease.micro_batches[0]] += number * lease.coefficient
    return [one % PRIME for one in counts]


def test_each_micro_batch_is_leased_to_one_more_than_may_straggle() -> None:
    node = coded(5, stragglers=2)
    leases = [lease for worker in range(5) for lease in held(node, worker)]
    assert sorted(lease.micro_batches[0] for lease in leases) == sorted([*range(NUM)] * 3)
    assert {lease.combine for lease in leases} == {Combine.CODED}


@pytest.mark.parametrize("missing", range(4))
def test_the_step_ends_without_the_slowest_and_each_counts_once(missing: int) -> None:
    node = coded()
    leased = {worker: held(node, worker) for worker in range(4)}
    actions: list[ev.Action] = []
    for worker in range(4):
        if worker != missing:
            assert not only(ev.Update, actions)
            actions = complete(node, worker)
    (update,) = only(ev.Update, actions)
    assert {worker for worker, _ in update.slots} == set(range(4)) - {missing}
    assert times(node, update, leased) == [1] * NUM
    assert update.limits == (NUM * 2 ** update.exponents[0],), "NUM answers of magnitude 1"
    (done,) = only(ev.MarkDone, actions)
    assert set(done.micro_batches) == set(range(NUM)), "who is late gives up"
    assert not only(ev.SaveManifest, actions)


def test_who_is_done_gets_nothing_else_to_do() -> None:
    node = coded()
    (granted,) = only(ev.Send, complete(node, 0))
    assert isinstance(granted.message, Granted)
    assert not held(node, 0)


def test_a_repeated_question_is_answered_as_before() -> None:
    node = coded()
    lease = held(node, 0)[0]
    assert isinstance(answer(say(node, 0, lease, 0), 0), Granted)
    assert isinstance(answer(say(node, 0, lease, 0), 0), Granted)
    assert isinstance(answer(say(node, 0, held(node, 0)[0], 1), 0), Granted)


def test_only_the_worker_s_own_share_counts() -> None:
    node = coded()
    lease = held(node, 0)[0]
    other = next(one for one in held(node, 1) if one not in held(node, 0))
    plain = Lease(lease.key, lease.micro_batches)
    for wrong in (other, plain):
        refused = answer(say(node, 0, wrong, 0), 0)
        assert isinstance(refused, Refused)


def test_one_lost_worker_is_one_that_straggles_and_two_are_done_without_again() -> None:
    node = coded()
    complete(node, 0)
    key = node.aggregator.state.key
    assert not only(ev.Note, node.do(ev.Disconnected(1)))
    actions = node.do(ev.Disconnected(2))
    (note,) = only(ev.Note, actions)
    assert note.kind == "uncoded"
    assert "the sums of workers [1, 2] are lost, and 1 may be missing" in note.reason
    assert node.aggregator.state.key == key._replace(attempt=key.attempt + 1)
    # who was still busy is told of its stale work; the others have all of the step, uncoded
    assert {one.combine for one in held(node, 0)} == {Combine.SUM}
    assert only(ev.SaveState, actions)[0].state == node.aggregator.state


def test_what_a_worker_had_completed_counts_after_its_death() -> None:
    node = coded()
    complete(node, 0)
    node.do(ev.Disconnected(0))
    node.do(ev.Disconnected(1))
    complete(node, 2)
    (update,) = only(ev.Update, complete(node, 3))
    assert [worker for worker, _ in update.slots] == [0, 2, 3]


def test_a_nan_of_one_machine_is_one_that_straggles() -> None:
    node = coded()
    first = held(node, 0)[0]
    assert isinstance(answer(say(node, 0, first, 0, loss_sum=NAN), 0), Refused)
    for worker in (1, 2):
        complete(node, worker)
    (update,) = only(ev.Update, complete(node, 3))
    assert 0 not in dict(update.slots)


def test_a_nan_of_all_holders_is_the_models_own() -> None:
    node = coded(skip_nonfinite=True)
    seen = []
    for worker in range(4):
        for number, lease in enumerate(held(node, worker)):
            if lease.micro_batches == (0,) and node.aggregator.phase is Phase.LEASING:
                seen += only(ev.Update, say(node, worker, lease, number, loss_sum=NAN))
    (update,) = seen
    assert update.skip


def test_answers_that_differ_are_computed_again_uncoded() -> None:
    node = coded()
    lease = held(node, 0)[0]
    other, again = next(
        (worker, one)
        for worker in (1, 2, 3)
        for one in held(node, worker)
        if one.micro_batches == lease.micro_batches
    )
    say(node, 0, lease, 0)
    actions = say(node, other, again, 0, loss_sum=1.5)
    assert isinstance(answer(actions, other), Refused), "it would wait for the answer for ever"
    (note,) = only(ev.Note, actions)
    assert f"answers to micro-batch {lease.micro_batches[0]} differ" in note.reason
    assert not node.aggregator._coding.is_on


def test_sums_that_do_not_fit_together_are_computed_again_uncoded() -> None:
    node = coded()
    for worker in range(3):
        complete(node, worker)
    key = node.aggregator.state.key
    actions = node.do(ev.Undecodable(node.aggregator._round, "9 where 3 is allowed"))
    assert "9 where 3 is allowed" in only(ev.Note, actions)[0].reason
    assert node.aggregator.phase is Phase.LEASING
    assert node.aggregator.state.attempt == key.attempt + 1
    assert {one.combine for one in held(node, 0)} == {Combine.SUM}
    finish(node)
    assert node.aggregator._coding.is_on, "the next step is coded again"


def test_a_successor_begins_the_attempt_anew() -> None:
    state = State(step=3, attempt=2, exponents=(10,))
    members = Membership(generation=1, members=(0, 1, 2), next_worker=3)
    manifests = {worker: Manifest(Key(0, 2, 0)) for worker in range(3)}
    recovered = Recovered(state, members, manifests)
    policy = Coded(stragglers=1)
    node = Node(3, num_micro_batches=NUM, recovered=recovered, scheduling=policy)
    assert node.aggregator.state == State(step=3, attempt=3, exponents=(10,))
    lease = Lease(state.key, (0,), Combine.CODED, coefficient=5)
    node.hear(0, Hello(0, 0, has_slot=True, holding=(lease,)))
    assert "stale" in str(answer(say(node, 0, lease, 0), 0))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_too_few_workers_for_a_code_compute_uncoded(num_workers: int) -> None:
    node = Node(num_workers, num_micro_batches=NUM, scheduling=Coded(stragglers=1))
    finish(node)
    assert not node.aggregator._coding.is_on
    assert {one.combine for one in held(node, 0)} == {Combine.SUM}


def test_where_machines_may_differ_nothing_is_coded() -> None:
    state = State(step=3, attempt=0, exponents=(10,), exact=False)
    node = Node(4, state=state, num_micro_batches=NUM, scheduling=Coded(stragglers=1))
    finish(node)
    assert not node.aggregator._coding.is_on


@pytest.mark.parametrize(("kind", "is_even"), [("crc", True), ("c_code", False)])
def test_shares_go_by_speed_or_are_even(kind: str, is_even: bool) -> None:
    node = coded(3, kind=kind)
    for step in (1, 2, 3):
        assert node.aggregator.state.step == step
        for number in range(NUM):
            for worker in (0, 1, 2):
                if node.aggregator.phase is Phase.LEASING and held(node, worker):
                    node.now_s += 1.0
                    node.aggregator._peers[worker].since_s = node.now_s - (3 if worker else 1)
                    say(node, worker, held(node, worker)[0], number)
        for worker in range(3):
            node.hear(worker, Release(tuple(held(node, worker))))
        node.update()
    sizes = [len(held(node, worker)) for worker in range(3)]
    assert sum(sizes) == 2 * NUM
    assert (len(set(sizes)) == 1) == is_even, sizes


# The worker's side


def lease_of(micro_batch: int) -> Lease:
    return Lease(KEY, (micro_batch,), Combine.CODED, coefficient=-(2**31) - micro_batch)


def test_a_worker_adds_all_of_its_share_in_one_place() -> None:
    hand, (first, second) = Hand(), (lease_of(0), lease_of(1))
    hand.do(Leases((first, second)))
    assert hand.do(wrk.Computed(first, (outcome(0),))) == [wrk.Encode(first, 0, None)]
    asked = hand.do(wrk.Encoded())[0]
    assert isinstance(asked, wrk.Send)
    assert isinstance(asked.message, Commit)
    assert (asked.message.half, asked.message.num_base) == (0, 0)
    hand.do(Granted(first, 0))
    assert hand.do(wrk.Computed(second, (outcome(1),))) == [wrk.Encode(second, 0, 0)]
    asked = hand.do(wrk.Encoded())[0]
    assert isinstance(asked, wrk.Send)
    assert isinstance(asked.message, Commit)
    assert (asked.message.half, asked.message.num_base) == (0, 1)


def test_coefficients_cross_the_wire_and_plain_leases_have_no_more_bytes() -> None:
    leases = (lease_of(0), Lease(KEY, (4,)), lease_of(9))
    assert decode_message(encode_message(Leases(leases))) == Leases(leases)
    hello = Hello(3, 33, True, leases)
    assert decode_message(encode_message(hello)) == hello
    result = Commit(leases[0], 0, 1, (outcome(0),))
    same = decode_message(encode_message(result))
    assert isinstance(same, Commit)
    assert same.lease == leases[0]
    plain, marked = Lease(KEY, (4,)), Lease(KEY, (4,), coefficient=7)
    assert encode_message(Leases((plain,))) == encode_message(Leases((marked,)))


def test_one_that_leaves_and_stands_still_holds_no_step_up() -> None:
    """Its sum is lost with that of another one, and nobody else would ever be asked."""
    node = coded()
    complete(node, 1)
    node.hear(None, Admit(Membership(2, members=(1, 2, 3), leaving=(0,), next_worker=4)))
    node.do(ev.Disconnected(2))
    complete(node, 3)
    notes: list[ev.Note] = []
    while node.aggregator._coding.is_on and node.now_s < 600:
        node.now_s += 1
        notes += only(ev.Note, node.do(ev.Tick(dict.fromkeys(range(4), 7))))
    assert (notes[0].kind, notes[0].worker) == ("worker_hung", 0)
    assert node.aggregator.phase is Phase.LEASING
    assert node.aggregator.state.attempt == 1, "as plain sums of those who are left"
