"""Selection policies: rows sum to 1 over the living, and each rule picks whom it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.routing import (
    All,
    Cascade,
    Core,
    Mass,
    NobodyLives,
    Policy,
    TopK,
    kinds,
    policy_from,
    window,
)

EVERY: list[Policy] = [
    TopK(k=1),
    TopK(k=2),
    TopK(k=9),
    TopK(k=2**70),
    Mass(threshold=0.9, at_most=3),
    Mass(threshold=0.9, at_most=2**70),
    All(),
    Cascade(low=0.4, high=0.6),
    Core(at_most=2),
    Core(at_most=2**70),
]
ROW = np.array([[0.5, 0.3, 0.15, 0.05]])
ALIVE = np.ones(4, bool)


def test_every_policy_is_in_the_registry() -> None:
    assert {policy.kind for policy in EVERY} == set(kinds())


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 6), experts=st.integers(1, 9))
@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_rows_sum_to_one_over_the_living(
    policy: Policy, seed: int, rows: int, experts: int
) -> None:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(experts, 0.3), rows)
    alive = generator.random(experts) < 0.6
    alive[generator.integers(experts)] = True
    weights = policy.weights(probabilities, alive)
    assert weights.shape == (rows, experts)
    assert (weights >= 0).all()
    assert (weights[:, ~alive] == 0).all()
    assert weights.sum(axis=1) == pytest.approx(np.ones(rows))
    for row in range(rows):  # whatever batch a row shares
        alone = policy.weights(probabilities[row : row + 1], alive)
        assert (alone[0] == weights[row]).all()


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_nobody_alive_is_refused_and_a_wrong_shape_too(policy: Policy) -> None:
    with pytest.raises(NobodyLives, match="none of 4 experts"):
        policy.weights(ROW, np.zeros(4, bool))
    with pytest.raises(ValueError, match="for 3 experts"):
        policy.weights(ROW, np.ones(3, bool))


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_survivors_answer_where_the_router_gives_them_nothing(policy: Policy) -> None:
    weights = policy.weights(np.array([[1.0, 0.0, 0.0]]), np.array([False, True, True]))
    assert weights.sum() == pytest.approx(1)
    assert weights[0, 0] == 0


def test_each_rule_picks_whom_it_says() -> None:
    assert TopK(k=1).weights(ROW, ALIVE).tolist() == [[1, 0, 0, 0]]
    assert TopK(k=2).weights(ROW, ALIVE)[0] == pytest.approx([0.625, 0.375, 0, 0])
    assert All().weights(ROW, ALIVE)[0] == pytest.approx(ROW[0])
    mass = Mass(threshold=0.9, at_most=4).weights(ROW, ALIVE)[0]
    assert mass == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95)
    assert Mass(threshold=0.5, at_most=4).weights(ROW, ALIVE).tolist() == [[1, 0, 0, 0]]
    assert (Mass(threshold=1.0, at_most=2).weights(ROW, ALIVE) > 0).sum() == 2


def test_a_lost_expert_is_replaced_by_the_next_one() -> None:
    alive = np.array([False, True, True, True])
    assert TopK(k=1).weights(ROW, alive).tolist() == [[0, 1, 0, 0]]
    assert TopK(k=2).weights(ROW, alive)[0] == pytest.approx([0, 2 / 3, 1 / 3, 0])


def test_of_equal_experts_the_first_answers() -> None:
    assert TopK(k=1).weights(np.full((1, 4), 0.25), ALIVE).tolist() == [[1, 0, 0, 0]]


def test_a_cascade_goes_on_only_inside_its_window() -> None:
    cascade = Cascade(low=0.4, high=0.6)
    rows = np.repeat(ROW, 3, axis=0)
    weights = cascade.next_weights(rows, ALIVE, 1, np.array([0.3, 0.5, 0.7]))
    assert weights.tolist() == [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0]]
    assert not cascade.goes_on(np.array([0.5]), 2).any()


def test_the_window_holds_its_share_of_the_data() -> None:
    confidence = np.random.default_rng(5).random(10_000)
    low, high = window(confidence, 0.7)
    assert ((low <= confidence) & (confidence <= high)).mean() == pytest.approx(0.2, abs=0.01)
    assert low < 0.7 < high
    assert window(confidence, 2.0)[1] == confidence.max()


def test_core_damps_who_stands_alone() -> None:
    core = Core(at_most=3)
    agreed = [0.8, 0.1, 0.1]
    predictions = np.array([[agreed, agreed, [0.1, 0.1, 0.8], [np.nan] * 3]])
    weights = np.array([[1 / 3, 1 / 3, 1 / 3, 0.0]])
    combined = core.combine(weights, predictions)
    assert combined.sum() == pytest.approx(1)
    plain = predictions[0, :3].mean(axis=0)
    assert combined[0, 0] > plain[0]
    assert combined[0, 2] < plain[2]
    same = core.combine(weights, np.array([[agreed] * 4]))
    assert same[0] == pytest.approx(agreed)


def test_a_policy_is_read_by_its_kind() -> None:
    assert policy_from({"kind": "top_k", "k": 2}) == TopK(k=2)
    assert policy_from({"kind": "mass", "threshold": 1, "at_most": 2}) == Mass(
        threshold=1, at_most=2
    )
    assert policy_from({"kind": "all"}) == All()


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({}, "kind None: needs one of top_k"),
        ({"kind": "best"}, "kind 'best'"),
        ({"kind": ["all"]}, "needs one of"),
        ({"kind": "top_k"}, "needs k"),
        ({"kind": "top_k", "k": 0}, "k 0"),
        ({"kind": "top_k", "k": 1.5}, "k 1.5 is not a number"),
        ({"kind": "top_k", "k": True}, "k True"),
        ({"kind": "top_k", "k": 1, "p": 2}, "no setting 'p'; has k"),
        ({"kind": "mass", "threshold": 1.5, "at_most": 1}, "threshold 1.5"),
        ({"kind": "mass", "threshold": float("nan"), "at_most": 1}, "threshold nan"),
        ({"kind": "mass", "threshold": 0.5, "at_most": 0}, "at_most 0"),
        ({"kind": "cascade", "low": 0.9, "high": 0.1}, "low is above high"),
        ({"kind": "core", "at_most": 0}, "at_most 0"),
        ({"kind": "cascade", "low": 0, "high": 10**400}, "high is a whole number of 401 digits"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        policy_from(section)
