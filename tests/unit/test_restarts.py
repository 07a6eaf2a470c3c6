"""One death is an accident; then back-off, then giving up with a reason."""

from __future__ import annotations

import pytest

from policies.restarts import BackOff, GiveUp, Hold, RestartView, Start

POLICY = BackOff(limit=6, window_s=60.0, base_s=0.5, cap_s=3.0)
NOW_S = 1000.0


def view(*ages_s: float) -> RestartView:
    """Deaths that happened so long ago, oldest first."""
    return RestartView(NOW_S, [NOW_S - age_s for age_s in ages_s])


@pytest.mark.parametrize(
    ("seen", "decision"),
    [
        pytest.param(view(), Start("0 deaths within 60 s"), id="none"),
        pytest.param(view(0.0), Start("1 deaths within 60 s"), id="an accident"),
        pytest.param(
            view(9, 0.0), Hold(NOW_S + 0.5, "backing off 0.5 s after 2 deaths"), id="the second"
        ),
        pytest.param(view(9, 0.4), Hold(NOW_S + 0.1, ""), id="waiting on"),
        pytest.param(view(9, 0.5), Start("2 deaths within 60 s"), id="waited"),
        pytest.param(view(9, 9, 0.9), Hold(NOW_S + 0.1, ""), id="the third waits twice as long"),
        pytest.param(view(9, 9, 9, 1.9), Hold(NOW_S + 0.1, ""), id="the fourth again"),
        pytest.param(view(9, 9, 9, 9, 2.9), Hold(NOW_S + 0.1, ""), id="up to the cap"),
        pytest.param(view(9, 9, 9, 9, 3.0), Start("5 deaths within 60 s"), id="past the cap"),
        pytest.param(view(*[61.0] * 50), Start("0 deaths within 60 s"), id="long ago"),
        pytest.param(view(60.0, 59.9), Start("1 deaths within 60 s"), id="at the border"),
    ],
)
def test_decisions(seen: RestartView, decision: Start | Hold) -> None:
    decided = POLICY.decide(seen)
    assert type(decided) is type(decision)
    if isinstance(decision, Hold):
        assert isinstance(decided, Hold)
        assert decided.until_s == pytest.approx(decision.until_s)
        assert decision.reason in decided.reason
    else:
        assert decided == decision


@pytest.mark.parametrize("num", [6, 7, 100])
def test_giving_up_says_why_and_what_helps(num: int) -> None:
    decided = POLICY.decide(view(*[1.0] * num))
    assert isinstance(decided, GiveUp)
    for part in (f"{num} workers died within 60 s", "limit 6", "elastic scale"):
        assert part in decided.reason


def test_giving_up_ends_when_deaths_are_forgotten() -> None:
    deaths_s = [NOW_S] * 6
    assert isinstance(POLICY.decide(RestartView(NOW_S, deaths_s)), GiveUp)
    assert isinstance(POLICY.decide(RestartView(NOW_S + 60.0, deaths_s)), Start)


def test_waiting_never_exceeds_the_cap() -> None:
    for num in range(2, POLICY.limit):
        decided = POLICY.decide(view(*[0.0] * num))
        assert isinstance(decided, Hold)
        assert NOW_S < decided.until_s <= NOW_S + POLICY.cap_s
