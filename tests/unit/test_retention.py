"""The last few checkpoints stay, and the best."""

from __future__ import annotations

import pytest

from policies.retention import Kept, LastAndBest, RetentionView

LOSSES = [Kept(10, 0.9), Kept(20, 0.2), Kept(30, 0.5), Kept(40, 0.3), Kept(50, 0.6)]


@pytest.mark.parametrize(
    ("policy", "removed"),
    [
        (LastAndBest(keep_last=1), (10, 20, 30, 40)),
        (LastAndBest(keep_last=3), (10, 20)),
        (LastAndBest(keep_last=9), ()),
        (LastAndBest(keep_last=1, keep_best=1), (10, 30, 40)),
        (LastAndBest(keep_last=1, keep_best=2), (10, 30)),
        (LastAndBest(keep_last=1, keep_best=1, mode="max"), (20, 30, 40)),
        (LastAndBest(keep_last=2, keep_best=1), (10, 30)),
    ],
)
def test_what_is_removed(policy: LastAndBest, removed: tuple[int, ...]) -> None:
    decision = policy.decide(RetentionView(50, LOSSES))
    assert decision.steps == removed
    assert str(policy.keep_last if removed else 5) in decision.reason


def test_newer_ones_of_a_run_that_went_back_neither_count_nor_go() -> None:
    decision = LastAndBest(keep_last=1, keep_best=1).decide(RetentionView(30, LOSSES))
    assert decision.steps == (10,)


def test_an_unknown_value_is_never_best() -> None:
    kept = [Kept(10), Kept(20, 0.5), Kept(30), Kept(40)]
    decision = LastAndBest(keep_last=1, keep_best=2).decide(RetentionView(40, kept))
    assert decision.steps == (10, 30)


def test_of_equal_ones_the_newest_is_best() -> None:
    kept = [Kept(10, 0.5), Kept(20, 0.5), Kept(30, 0.0)]
    ranked = LastAndBest(keep_last=1, keep_best=1).ranked(kept)
    assert [one.step for one in ranked] == [30, 20, 10]
