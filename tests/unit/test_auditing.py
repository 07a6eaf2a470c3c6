"""Who lied, and how soon one is found: by digests alone, from seeds alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from policies.auditing import (
    Answer,
    AskAgain,
    Audits,
    AuditView,
    Decision,
    Lie,
    Undecided,
    odd_keepers,
)
from policies.verdicts import Kind, Node, Worker

ALL = Audits(seed=1, probability=1.0)
RIGHT, WRONG, OTHER = b"right", b"wrong", b"other"
WORKERS = [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]


def view(*answers: tuple[int, bytes], workers: list[tuple[int, int]] | None = None) -> AuditView:
    """Answers (worker, digest) to micro-batch 7 of step 3."""
    nodes = dict(WORKERS)
    given = [Answer(worker, nodes[worker], digest) for worker, digest in answers]
    return AuditView(3, {7: given}, WORKERS if workers is None else workers)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        pytest.param([(0, RIGHT), (2, RIGHT)], [], id="two agree"),
        pytest.param([(0, RIGHT), (2, WRONG), (4, RIGHT)], [Lie(2, 7, 2, 1, 3)], id="one lies"),
        pytest.param([(0, WRONG), (2, RIGHT), (4, RIGHT)], [Lie(0, 7, 2, 1, 3)], id="the first"),
        pytest.param(
            [(0, WRONG), (1, OTHER), (2, RIGHT), (3, RIGHT)],
            [Lie(0, 7, 2, 1, 3), Lie(1, 7, 2, 1, 3)],
            id="two lie differently",
        ),
    ],
)
def test_who_lied(answers: list[tuple[int, bytes]], expected: list[Decision]) -> None:
    assert ALL.decide(view(*answers)) == expected


@pytest.mark.parametrize(
    ("answers", "allowed"),
    [
        pytest.param([(0, RIGHT)], {2, 3, 4}, id="the second is on another node"),
        pytest.param([(0, RIGHT), (2, WRONG)], {4}, id="the third on a third node"),
        pytest.param([(0, RIGHT), (2, WRONG), (4, OTHER)], {1, 3}, id="then anybody"),
        pytest.param([(0, RIGHT), (1, WRONG), (2, WRONG), (3, RIGHT)], {4}, id="two against two"),
    ],
)
def test_who_is_asked_next(answers: list[tuple[int, bytes]], allowed: set[int]) -> None:
    (asked,) = ALL.decide(view(*answers))
    assert isinstance(asked, AskAgain)
    assert asked.worker in allowed


def test_where_nobody_agrees_or_nobody_is_left_nobody_is_blamed() -> None:
    digests = [(worker, bytes([worker])) for worker in range(5)]
    (undecided,) = ALL.decide(view(*digests))
    assert isinstance(undecided, Undecided)
    assert "5 answers differ, limit 5 opinions" in undecided.reason
    (alone,) = ALL.decide(view((0, RIGHT), workers=[(0, 0)]))
    assert isinstance(alone, Undecided)
    assert "no other worker" in alone.reason


def test_what_is_not_audited_is_asked_once() -> None:
    never = Audits(seed=1, probability=0.0)
    assert never.decide(view((0, RIGHT))) == []
    assert never.decide(view((0, RIGHT), (2, WRONG))) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9), st.floats(0, 1))
def test_what_is_audited_depends_on_seed_step_and_number_alone(
    seed: int, step: int, probability: float
) -> None:
    policy = Audits(seed=seed, probability=probability)
    audited = policy.audited(step, 4000)
    np.testing.assert_array_equal(audited[:100], policy.audited(step, 100))
    note(f"seed {seed}, step {step}: {audited.mean()} of {probability}")
    assert abs(audited.mean() - probability) < 0.05
    assert (
        not np.array_equal(audited, policy.audited(step + 1, 4000))
        or probability in (0, 1)
        or (min(audited.mean(), 1 - audited.mean()) < 0.01)
    )


def test_a_liar_is_found_within_the_documented_number_of_steps() -> None:
    """One of 8 workers, 4 micro-batches each in a step, corrupts every hundredth."""
    limit = Audits(seed=0, probability=0.1).steps_to_find(corrupted=0.01, per_step=4)
    assert limit == 1727
    taken = []
    for seed in range(40):
        dice, policy = np.random.default_rng(seed), Audits(seed=seed, probability=0.1)
        hits = np.stack([policy.audited(step, 4) for step in range(limit)])
        hits &= dice.random(hits.shape) < 0.01
        taken.append(int(np.argmax(hits.any(axis=1))) if hits.any() else limit)
    assert max(taken) < limit
    assert 100 < np.median(taken) < limit / 5  # nor is the formula far too careful


@pytest.mark.parametrize(
    ("probability", "corrupted", "steps"),
    [(1.0, 0.01, 172), (1.0, 1.0, 1), (0.0, 0.5, None), (0.5, 0.0, None)],
)
def test_the_formula(probability: float, corrupted: float, steps: int | None) -> None:
    policy = Audits(seed=0, probability=probability)
    assert policy.steps_to_find(corrupted=corrupted, per_step=4) == steps


def test_a_lie_is_a_verdict() -> None:
    verdict = Lie(2, 7, 2, 1, 3).verdict
    assert verdict.name == (Kind.SILENT_CORRUPTION, Worker(2))
    assert verdict.reason == (
        "worker 2 computed micro-batch 7 of step 3 to another result than 2 others that agree"
    )
    assert verdict.confidence > 0.9


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        pytest.param({0: {5: 1}, 1: {5: 1}, 2: {5: 1}}, {}, id="all alike"),
        pytest.param({0: {5: 1}, 1: {5: 2}, 2: {5: 1}}, {1: 2}, id="one is odd"),
        pytest.param({0: {5: 1}, 1: {5: 2}}, {0: 0, 1: 0}, id="two of two: nobody knows"),
        pytest.param({0: {5: 1}, 1: {5: 2}, 2: {5: 3}}, {0: 0, 1: 0, 2: 0}, id="no two agree"),
        pytest.param({0: {5: 1}, 1: {6: 2}, 2: {7: 3}}, {}, id="nothing is kept twice"),
        pytest.param(
            {0: {5: 1, 6: 1}, 1: {5: 2, 6: 2}, 2: {5: 1}}, {0: 0, 1: 2}, id="one more than a tie"
        ),
    ],
)
def test_who_keeps_another_state_than_most(
    digests: dict[int, dict[int, int]], odd: dict[int, int]
) -> None:
    verdicts = odd_keepers(digests, step=9)
    assert {one.culprit: one.evidence["votes"] for one in verdicts} == {
        Node(node): votes for node, votes in odd.items()
    }
    assert all((one.confidence == 0.5) == (not one.evidence["votes"]) for one in verdicts)


def test_an_odd_keeper_is_told_of_once_for_all_its_chunks() -> None:
    right, wrong = {4: 1, 5: 1, 6: 1}, {4: 1, 5: 2, 6: 2}
    (verdict,) = odd_keepers({0: right, 1: right, 7: wrong}, step=50)
    assert verdict.reason == (
        "node 7 keeps another state of chunk 5 and 1 more at step 50: 2 others agree"
    )
