"""A worker hangs when it is silent for far longer than anybody's usual gap."""

from __future__ import annotations

import pytest

from policies.hangs import Silence, WorkerProgress

POLICY = Silence(factor=30.0, floor_s=10.0, patience=6.0)


def worker(
    silent_s: float, *, number: int = 1, busy: bool = True, has_committed: bool = True
) -> WorkerProgress:
    return WorkerProgress(number, silent_s, busy, has_committed)


@pytest.mark.parametrize(
    ("one", "pace_s", "hangs"),
    [
        pytest.param(worker(9.9), 0.1, False, id="under the floor"),
        pytest.param(worker(10.1), 0.1, True, id="over the floor"),
        pytest.param(worker(29.0), 1.0, False, id="under thirty micro-batches"),
        pytest.param(worker(31.0), 1.0, True, id="over thirty micro-batches"),
        pytest.param(worker(999.0, busy=False), 0.1, False, id="idle workers are silent"),
        pytest.param(worker(59.0, has_committed=False), 0.1, False, id="a new one may be loading"),
        pytest.param(worker(61.0, has_committed=False), 0.1, True, id="but not for ever"),
    ],
)
def test_who_hangs(one: WorkerProgress, pace_s: float, hangs: bool) -> None:
    verdicts = POLICY.decide([one], pace_s)
    assert [verdict.worker for verdict in verdicts] == [1] * hangs


def test_a_verdict_gives_the_silence_and_the_limit() -> None:
    (verdict,) = POLICY.decide([worker(31.5)], 1.0)
    assert verdict.reason == "no progress for 31.5 s (limit 30.0 s)"


def test_each_worker_is_judged_alone() -> None:
    workers = [worker(1.0, number=0), worker(50.0, number=4), worker(70.0, number=2)]
    assert [one.worker for one in POLICY.decide(workers, 1.0)] == [4, 2]
    assert POLICY.decide([], 1.0) == []
