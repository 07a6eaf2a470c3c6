"""A checkpoint is written when due, tried again with back-off, and at the end not for ever."""

from __future__ import annotations

import pytest

from policies.saving import GiveUp, Hold, Save, SaveWithBackOff, SavingView

POLICY = SaveWithBackOff(every=10, patience_s=30.0, base_s=1.0, cap_s=8.0)
NOW_S = 1000.0


def view(step: int, tried: int, *ages_s: float, ended: float | None = None) -> SavingView:
    """Failures that happened so long ago, oldest first; ended so long ago."""
    ended_s = None if ended is None else NOW_S - ended
    return SavingView(NOW_S, step, tried, [NOW_S - age_s for age_s in ages_s], ended_s)


@pytest.mark.parametrize(
    ("seen", "decision"),
    [
        pytest.param(view(0, 0), Hold(0.0, "not due"), id="the beginning"),
        pytest.param(view(9, 0), Hold(0.0, "not due"), id="not yet"),
        pytest.param(view(10, 0), Save("due at step 10, every 10"), id="due"),
        pytest.param(view(14, 9), Save("due at step 14"), id="late"),
        pytest.param(view(19, 10), Hold(0.0, "not due"), id="between"),
        pytest.param(view(11, 10, 0.5), Hold(NOW_S + 0.5, "backing off 1 s"), id="failed"),
        pytest.param(view(11, 10, 1.0), Save("again after 1"), id="tried again"),
        pytest.param(view(11, 10, 3, 1.5), Hold(NOW_S + 0.5, "off 2 s after 2"), id="doubled"),
        pytest.param(view(11, 10, *[9.0] * 99, 7.0), Hold(NOW_S + 1, "off 8 s"), id="capped"),
        pytest.param(view(20, 11, 9, 0.1), Save("due"), id="a due one does not wait"),
        pytest.param(view(15, 10, ended=0), Save("the last one"), id="the end"),
        pytest.param(view(15, 11, 1, ended=0), Save("the last one, after 1"), id="after a failure"),
        pytest.param(view(15, 15, 0.5, ended=1), Hold(NOW_S + 0.5, ""), id="the last one failed"),
        pytest.param(view(15, 15, 1, ended=2), Save("again"), id="the last one again"),
        pytest.param(view(15, 15, 9, 9, 9, 1, ended=29), Hold(NOW_S + 1, ""), id="no longer"),
        pytest.param(view(15, 15, 9, 9, 9, 1, ended=30), Save("again"), id="once more"),
        pytest.param(view(15, 15, 9, 0, ended=30), GiveUp("tried for 30 s"), id="given up"),
    ],
)
def test_decisions(seen: SavingView, decision: Save | Hold | GiveUp) -> None:
    decided = POLICY.decide(seen)
    assert type(decided) is type(decision)
    assert decision.reason in decided.reason
    if isinstance(decision, Hold):
        assert isinstance(decided, Hold)
        assert decided.until_s == pytest.approx(decision.until_s)


def test_without_a_cadence_only_the_end_counts() -> None:
    policy = SaveWithBackOff(every=0, patience_s=0.0)
    assert isinstance(policy.decide(view(100, 0)), Hold)
    assert isinstance(policy.decide(view(100, 0, ended=0)), Save)
    assert isinstance(policy.decide(view(100, 100, 0, ended=0)), GiveUp)


def test_the_back_off_ends_at_the_cap_after_very_many_failures() -> None:
    decided = POLICY.decide(view(11, 10, *[1.0] * 5000))
    assert isinstance(decided, Hold)
    assert decided.until_s == NOW_S - 1.0 + 8.0
