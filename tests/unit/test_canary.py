"""A new version takes over when it is as good, and is taken back when it is not."""

from __future__ import annotations

import re

import pytest

from policies.canary import Arm, CanaryView, Compare, Hold, Promote, RollBack

COMPARE = Compare(min_requests=50, max_failed=0.02, max_slowdown=2.0)
OLD = Arm(500, 5, 0.1)


@pytest.mark.parametrize(
    ("new", "decision", "reason"),
    [
        (Arm(49, 0, 0.1), Hold, "49 of 50"),
        (Arm(50, 0, 0.1), Promote, "0.0% failed"),
        (Arm(50, 1, 0.1), Promote, "2.0% failed"),
        (Arm(50, 2, 0.1), RollBack, "2 of 50"),
        (Arm(3, 3, 0.1), RollBack, "3 of 3"),
        (Arm(1, 1, 0.1), Hold, "1 of 50"),
        (Arm(200, 7, 0.1), RollBack, "7 of 200"),
        (Arm(50, 0, 0.19), Promote, ""),
        (Arm(50, 0, 0.21), RollBack, r"0\.210 s instead of 0\.100 s"),
    ],
    ids=str,
)
def test_judgement(new: Arm, decision: type, reason: str) -> None:
    found = COMPARE.decide(CanaryView(OLD, new))
    assert isinstance(found, decision)
    assert found.reason
    assert re.search(reason, found.reason)


def test_latency_is_not_compared_with_an_old_version_that_few_asked() -> None:
    view = CanaryView(Arm(3, 0, 0.001), Arm(50, 0, 0.1))
    assert isinstance(COMPARE.decide(view), Promote)
