"""What a notice that a node will be taken away means: leave, leave at once, or stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.preemption import Leave, LeaveInTime, Notice, PreemptionView, Stay, TooLate

NOW_S = 1_700_000_000.0
POLICY = LeaveInTime(num_steps=2.0, save_s=3.0)


def view(
    left_s: float | None, *, step_s: float | None = 5.0, certain: bool = True
) -> PreemptionView:
    deadline_s = None if left_s is None else NOW_S + left_s
    return PreemptionView(NOW_S, Notice("AWS will terminate", deadline_s, certain), step_s)


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        pytest.param(PreemptionView(NOW_S, None, 5.0), Stay, id="no notice"),
        pytest.param(view(None, certain=False), Stay, id="it may never come"),
        pytest.param(view(None), Leave, id="nobody says when"),
        pytest.param(view(120.0), Leave, id="in two minutes"),
        pytest.param(view(13.0), Leave, id="just enough for two steps and a checkpoint"),
        pytest.param(view(12.9), TooLate, id="not enough"),
        pytest.param(view(3.0, step_s=None), Leave, id="no step has been seen"),
        pytest.param(view(-1.0), TooLate, id="it should be gone"),
    ],
)
def test_what_a_notice_means(seen: PreemptionView, kind: type) -> None:
    assert type(POLICY.decide(seen)) is kind


def test_a_decision_says_when_and_why() -> None:
    leave = POLICY.decide(view(120.0))
    assert leave == Leave("AWS will terminate in 120 s", NOW_S + 120)
    late = POLICY.decide(view(4.0))
    assert late == TooLate("AWS will terminate in 4.0 s; a step needs 13.0 s", NOW_S + 4)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e4), st.floats(0, 1e4))
def test_time_passing_never_makes_it_early(left_s: float, step_s: float, passed_s: float) -> None:
    before = POLICY.decide(view(left_s, step_s=step_s))
    after = POLICY.decide(view(left_s - passed_s, step_s=step_s))
    assert not (isinstance(before, TooLate) and isinstance(after, Leave))
