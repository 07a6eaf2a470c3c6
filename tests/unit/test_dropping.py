"""Inexact policies: deadlines, parts that nobody waits for, what is said of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elastic.core.config import load_job
from elastic.core.errors import ConfigError
from elastic.core.protocol import events as ev
from elastic.core.protocol.aggregator import Phase
from elastic.core.protocol.committing import after_step, maxima_of
from elastic.core.protocol.messages import Commit, Key, Refused, Release, State
from elastic.core.simulator.stragglers import compare, parse_policy
from policies.auditing import Audits
from policies.coding.delays import proportional
from policies.coding.simulation import Dropping, Frc, Uncoded, simulate
from policies.dropping import EVERY, MEASURED, DropCompute, ErasureHead
from tests.unit.test_protocol import NAN, RUNNING, Node, answer, only, outcome

NUM = 4  # micro-batches


# --- the deadline


def test_the_deadline_gets_the_most_done_in_the_same_time() -> None:
    """One of ten comes at 4 s, the others within 1 s: nine tenths in a quarter of the time."""
    steps = [[0.1 * (one + 1) for one in range(9)] + [4.0]] * MEASURED
    found = DropCompute().decide(steps, rest_s=0.0)
    assert found.seconds == pytest.approx(0.1, abs=1e-9), "the first comes after .1 s: ten times"
    found = DropCompute().decide(steps, rest_s=1.0)
    assert found.seconds == pytest.approx(0.9)
    assert "137% more done, 10.0% dropped" in found.reason  # .9 * (4 + 1) / (.9 + 1)


def test_the_deadline_is_the_best_of_all() -> None:
    """Beside trying every time between the first and the last grant. The spec has the formula."""
    dice = np.random.default_rng(3)
    for _ in range(50):
        steps = dice.exponential(1.0, (5, 6)) + 0.2
        rest_s = float(dice.uniform(0, 1))

        def speed_up(deadline_s: float, steps: Any = steps, rest_s: float = rest_s) -> float:
            gains = []
            for grants in steps:
                end_s = min(max(deadline_s, grants.min()), grants.max())
                drop = 1 - max(1, (grants <= deadline_s).sum()) / len(grants)
                saved = 1 - (end_s + rest_s) / (grants.max() + rest_s)
                gains.append((1 - drop) / (1 - saved) - 1)
            return float(np.mean(gains))

        best = max(speed_up(one) for one in np.unique(steps))
        found = DropCompute().decide(steps.tolist(), rest_s)
        if math.isinf(found.seconds):
            assert best < 0.02
        else:
            assert speed_up(found.seconds) == pytest.approx(best)


def test_where_nothing_is_late_nothing_is_dropped() -> None:
    found = DropCompute().decide([[1.0, 1.0, 1.01]] * MEASURED, rest_s=0.0)
    assert found.seconds == math.inf
    assert found.reason == "none: none gets 2% more done"


def test_the_first_steps_and_one_in_ten_are_measured() -> None:
    assert DropCompute().measures(MEASURED - 1, 0)
    assert not DropCompute().measures(MEASURED, 0)
    assert DropCompute().measures(MEASURED, EVERY - 1)
    assert not DropCompute(deadline_s=1.0).measures(0, 0)


# --- the step


def dropping(num_workers: int = 2, **more: Any) -> Node:
    """At the beginning of a step of workers that are all there."""
    policy = more.pop("policy", DropCompute(deadline_s=2.0))
    node = Node(num_workers, state=RUNNING, num_micro_batches=NUM, scheduling=policy, **more)
    finish(node)
    return node


def grant(node: Node, worker: int, **told: float) -> list[ev.Action]:
    """The worker answers the first thing that it holds."""
    lease = next(one for one in node.aggregator._peers[worker].queue if one.key == key(node))
    manifest = node.aggregator._manifests[worker]
    mine = manifest.micro_batches if manifest.key == lease.key else ()
    result = outcome(lease.micro_batches[0], **told)
    half = 1 - manifest.half if mine else 0
    return node.hear(worker, Commit(lease, half, len(mine), (result,)))


def key(node: Node) -> Key:
    return node.aggregator.state.key


def finish(node: Node) -> list[ev.Action]:
    """Answer until the step is complete, then begin the next one."""
    while node.aggregator.phase is Phase.LEASING:
        peers = node.aggregator._peers
        grant(node, next(w for w in peers if any(one.key == key(node) for one in peers[w].queue)))
    return begin_next(node)


def begin_next(node: Node) -> list[ev.Action]:
    """The update is done, and who held something of the step sees that it is over."""
    actions = node.update()
    for worker, peer in node.aggregator._peers.items():
        stale = tuple(one for one in peer.queue if one.key != key(node))
        actions += node.hear(worker, Release(stale))
    return actions


def test_a_step_ends_at_its_deadline_with_what_is_there() -> None:
    node = dropping()
    begin_s = node.now_s
    first = [grant(node, 0), grant(node, 1)]
    assert not any(only(ev.Update, actions) for actions in first)
    assert node.aggregator.next_tick_s <= begin_s + 2.0
    node.now_s = begin_s + 1.99
    assert not only(ev.Update, node.do(ev.Tick()))
    node.now_s = begin_s + 2.0
    actions = node.do(ev.Tick())
    (update,) = only(ev.Update, actions)
    assert (update.num_added, update.weight) == (2, 4.0), "divided by all four"
    assert len(update.slots) == 2
    (done,) = only(ev.MarkDone, actions)
    counted = set(node.aggregator._outcomes)
    assert set(done.micro_batches) == set(range(NUM)) - counted, "who computes them gives up"
    (committed,) = only(ev.Committed, node.update())
    assert (committed.num_dropped, committed.skipped) == (2, False)
    assert node.aggregator.state.dropped == 2


def test_what_comes_after_the_deadline_does_not_count() -> None:
    node = dropping()
    grant(node, 0)
    late = next(one for one in node.aggregator._peers[1].queue if one.key == key(node))
    node.now_s += 5.0
    node.do(ev.Tick())
    refused = answer(node.hear(1, Commit(late, 0, 0, (outcome(late.micro_batches[0]),))), 1)
    assert refused == Refused(late, "the step is complete")


def test_one_micro_batch_at_least_is_waited_for() -> None:
    node = dropping()
    node.now_s += 60.0
    assert not only(ev.Update, node.do(ev.Tick()))
    assert node.aggregator.next_tick_s > node.now_s, "it does not spin"
    (update,) = only(ev.Update, grant(node, 0))
    assert (update.num_added, update.weight) == (1, 4.0)


def test_a_step_without_delay_is_that_of_an_exact_policy() -> None:
    one, other = dropping(), dropping(policy=DropCompute())
    exact = Node(2, state=RUNNING, num_micro_batches=NUM)
    finish(exact)
    states = []
    for node in (one, other, exact):
        actions = finish(node)
        assert only(ev.Committed, actions)[0].num_dropped == 0
        states.append(node.aggregator.state)
    assert states[0] == states[1] == states[2]


def test_what_was_not_finite_is_asked_for_before_a_step_ends() -> None:
    node = dropping()
    grant(node, 0)
    grant(node, 1, largest=NAN)
    node.now_s += 60.0
    assert not only(ev.Update, node.do(ev.Tick()))


def test_the_maxima_and_evaluations_are_of_all() -> None:
    policy = DropCompute(deadline_s=1.0)
    maxima = Node(2, state=State(0, 0, None), num_micro_batches=NUM, scheduling=policy)
    evaluation = Node(2, scheduling=policy, evaluate_every=3, num_evaluated=3)
    for node in (maxima, evaluation):
        grant(node, 0)
        node.now_s += 60.0
        node.do(ev.Tick())
        assert len(node.aggregator._outcomes) == 1, "the pass goes on"


def test_audits_are_not_waited_for_at_a_deadline_and_counted() -> None:
    node = dropping(3, audits=Audits(probability=0.9999, seed=0))
    grant(node, 0)
    node.now_s += 60.0
    node.do(ev.Tick())
    (committed,) = only(ev.Committed, node.update())
    assert (committed.num_dropped, committed.num_unaudited) == (3, 1)


def complete(node: Node) -> None:
    """Each micro-batch is granted to the first who holds it. No audit is answered."""
    lead = node.aggregator
    while held := [
        (worker, one)
        for worker, peer in lead._peers.items()
        for one in peer.queue
        if one.key == key(node) and not one.audits
    ]:
        worker, lease = held[0]
        if lease.micro_batches[0] in lead._outcomes:
            node.hear(worker, Release((lease,)))
        else:
            grant(node, worker)


def test_who_is_complete_waits_for_its_audits_until_the_deadline() -> None:
    node = dropping(4, audits=Audits(probability=0.9999, seed=0))
    begin_s = node.now_s
    complete(node)
    assert node.aggregator.phase is Phase.LEASING
    node.now_s = begin_s + 2.0
    assert only(ev.Update, node.do(ev.Tick()))
    (committed,) = only(ev.Committed, node.update())
    assert (committed.num_dropped, committed.num_unaudited) == (0, NUM)


def test_erasure_head_waits_for_the_audits_of_a_complete_step() -> None:
    policy = ErasureHead(stragglers=1, wait_for=2)
    node = dropping(4, policy=policy, audits=Audits(probability=0.9999, seed=0))
    complete(node)
    assert node.aggregator.phase is Phase.LEASING, "there is no deadline"
    while node.aggregator.phase is Phase.LEASING:
        worker, lease = next(
            (worker, one)
            for worker, peer in node.aggregator._peers.items()
            for one in peer.queue
            if one.audits and one.key == key(node)
        )
        node.hear(worker, Commit(lease, 0, 0, (outcome(lease.micro_batches[0]),)))
    (committed,) = only(ev.Committed, node.update())
    assert (committed.num_dropped, committed.num_unaudited) == (0, 0)


def test_a_deadline_is_measured_and_told_once() -> None:
    """Of four one takes ten times as long in each step."""
    node = dropping(policy=DropCompute())
    node.aggregator._rules = replace(node.aggregator._rules, num_steps=99)
    told, dropped = list[str](), list[int]()
    for _ in range(3 * EVERY):
        actions: list[ev.Action] = []
        for late_s in (0.1, 0.1, 0.1, 1.0):
            node.now_s += late_s
            actions += node.do(ev.Tick())
            if node.aggregator.phase is not Phase.LEASING:
                break
            peers = node.aggregator._peers
            busy = [w for w in peers if any(one.key == key(node) for one in peers[w].queue)]
            actions += grant(node, busy[0])
        actions += begin_next(node)
        dropped += [one.num_dropped for one in only(ev.Committed, actions)]
        told += [one.reason for one in only(ev.Note, actions) if one.kind == "scheduling"]
    assert sum(dropped[: MEASURED - 1]) == 0, "one was there before"
    assert sum(dropped[MEASURED:]) > 0
    assert 0 in dropped[MEASURED:], "one in ten is measured"
    assert len(told) == 1
    assert told[0].startswith("drop_compute with a deadline of ")


def test_erasure_head_ends_after_so_many_workers() -> None:
    """Two groups of two; the one of workers that both stand still is lost."""
    node = dropping(4, policy=ErasureHead(stragglers=1, wait_for=2))
    share = set(node.holds(0))
    (partner,) = [one for one in (1, 2, 3) if set(node.holds(one)) == share]
    assert len(share) == 2
    grant(node, 0)
    assert node.aggregator.phase is Phase.LEASING
    grant(node, partner)
    for worker in (0, partner):  # neither computes any more what the other one has finished
        queue = node.aggregator._peers[worker].queue
        node.hear(worker, Release(tuple(one for one in queue if set(one.micro_batches) <= share)))
    assert node.aggregator.phase is Phase.UPDATING
    assert set(node.aggregator._outcomes) == share


def test_the_next_step_has_room_for_what_was_dropped() -> None:
    outcomes = [outcome(0, largest=1.0), outcome(2, largest=3.0)]
    assert maxima_of(outcomes, 4)[:, 0].tolist() == [1.0, 3.0, 3.0, 3.0]
    alone = after_step(RUNNING, outcomes, 2)
    dropped = after_step(RUNNING, outcomes, 20)
    assert alone.exponents is not None
    assert dropped.exponents is not None
    assert dropped.exponents[0] < alone.exponents[0]
    assert dropped.samples == alone.samples, "the digest is of what counts"
    assert (alone.dropped, dropped.dropped) == (0, 18)


# --- simulated, and in the job file


def test_nothing_is_lost_by_exact_policies_and_little_by_the_others() -> None:
    dice = np.random.default_rng(0)
    seconds_RN = np.where(dice.random((80, 16)) < 0.1, 5.0, 1.0)
    delays = proportional(seconds_RN, 1 / 16, 0.2)
    uncoded = simulate(Uncoded(), delays, 60)
    assert uncoded.lost == simulate(Frc(stragglers=1), delays, 60).lost == 0
    cut = simulate(Dropping(), delays, 60)
    assert 0 < cut.lost < 0.2
    assert cut.total_s < 0.6 * uncoded.total_s
    measured = list(cut.lost_R[:MEASURED])
    assert measured == [0] * MEASURED
    erased = simulate(ErasureHead(stragglers=1, wait_for=12), delays, 60)
    assert 0 < erased.lost < 0.1
    assert erased.total_s < simulate(Frc(stragglers=1), delays, 60).total_s


def test_erasure_head_that_waits_for_all_is_frc() -> None:
    seconds_RN = np.random.default_rng(1).exponential(1.0, (30, 8)) + 0.1
    delays = proportional(seconds_RN, 1 / 8, 0.5)
    whole = simulate(ErasureHead(stragglers=1, wait_for=8), delays, 30)
    assert whole.lost == 0
    assert whole.rounds_R.tolist() == simulate(Frc(stragglers=1), delays, 30).rounds_R.tolist()


def test_inexact_policies_are_compared_by_name() -> None:
    delays = proportional(np.full((30, 8), 1.0), 1 / 8, 0.5)
    one, other = compare(["drop_compute/4", "erasure_head/1/6"], delays, 20, 0)
    assert "inexact" in one.policy
    assert "inexact" in other.policy
    for wrong in ("erasure_head/1/9", "erasure_head/8/2", "drop_compute/0", "erasure_head/1/0"):
        with pytest.raises(ConfigError, match="policy"):
            compare([wrong], delays, 20, 0)
    assert parse_policy("drop_compute/3") == Dropping(num_each=3)


JOB = {"name": "t", "steps": 1, "batch": {"micro_batches": 4, "micro_batch_size": 2}}


@pytest.mark.parametrize(
    ("stragglers", "more", "expected"),
    [
        ({"kind": "drop_compute", "stragglers": 1}, {}, "none with other kinds"),
        ({"kind": "frc", "stragglers": 1, "wait_for": 2}, {}, "got kind frc, wait_for 2"),
        ({"kind": "erasure_head", "stragglers": 1}, {}, "needs wait_for, at least 1"),
        ({"kind": "frc", "stragglers": 1, "deadline_s": 2.0}, {}, "got kind frc, deadline_s 2"),
        ({"kind": "drop_compute", "deadline_s": 0.0}, {}, "deadline_s: got 0"),
        ({"kind": "erasure_head", "stragglers": 1, "wait_for": 9}, {}, "workers.max is 8"),
        ({"kind": "drop_compute"}, {"nodes": {"max": 2}}, "and nodes.max is 2; must be 1"),
        ({"kind": "drop_compute"}, {"audit": "all"}, "what is dropped cannot be audited"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_makes_no_sense_is_refused(
    stragglers: dict[str, Any], more: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_job(JOB | {"stragglers": stragglers} | more)


def test_the_kinds_that_are_inexact_say_so() -> None:
    inexact = {"drop_compute": {}, "erasure_head": {"stragglers": 1, "wait_for": 3}}
    for kind, more in inexact.items():
        assert not load_job(JOB | {"stragglers": {"kind": kind, **more}}).stragglers.is_exact
    assert load_job(JOB).stragglers.is_exact
