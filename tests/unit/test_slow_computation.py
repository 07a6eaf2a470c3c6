"""Few workers on busy processors: nobody is blamed for the company it has, who is slow is named.

`two_workers_on_busy_cores.json` was recorded by `elastic train`: examples/stdlib_lm, eight
micro-batches a step, on two cores of a virtual machine on which 10 to 20 others wanted to run, too.
A second worker joined at step 33, and shared them from then on. Nothing was wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitoring.detection import Detector
from policies.outliers import Outliers
from policies.signals import Computed, Fleet, StepView
from policies.slow_computation import Paces, SlowComputation
from policies.verdicts import Worker
from tests.fake_steps import event

RECORDED = json.loads(Path(__file__).with_name("two_workers_on_busy_cores.json").read_text())
JOINED = {0: 0, 1: 33}
"""The step at which each worker did."""
SLOW_FROM, LONGEST = 60, max(Outliers().steps)


def recorded(factor: Callable[[int, int], float]) -> dict[int, int]:
    """The step at which each worker is named, if what it took was so many times as long as was
    recorded: by the step, and the worker."""
    detector, named = Detector(), dict[int, int]()
    for row in RECORDED:
        step, time_s = int(row["step"]), float(row["time_s"])
        for worker, joined in JOINED.items():
            if joined == step:
                detector.add("event", event("worker_joined", time_s, worker), {})
        work = [
            [int(worker), at, time_s, time_s + took_s * factor(step, int(worker)), "granted"]
            for worker, times in row["seconds"].items()
            for at, took_s in enumerate(times)
        ]
        line: dict[str, Any] = {**row, "work": work}
        detector.add("step", line, {})
        for one in detector.verdicts(time_s, 1):
            assert isinstance(one.culprit, Worker)
            named.setdefault(one.culprit.number, step)
    return named


def test_two_workers_on_busy_cores_are_not_blamed_for_it() -> None:
    assert recorded(lambda step, worker: 1.0) == {}


@pytest.mark.parametrize(("slow", "times"), [(0, 4.0), (1, 8.0)])
def test_the_slow_one_of_two_is_named_within_the_longest_window(slow: int, times: float) -> None:
    """The second had begun slowly, among processes that loaded."""
    named = recorded(lambda step, worker: times if worker == slow and step >= SLOW_FROM else 1.0)
    assert set(named) == {slow}
    assert SLOW_FROM < named[slow] <= SLOW_FROM + LONGEST


# ------------------------------------------------------------------------- made-up steps


def step_of(step: int, paces: Mapping[int, float]) -> StepView:
    """Each worker computes four micro-batches."""
    workers = np.repeat(np.array(sorted(paces)), 4)
    return StepView(
        step=step,
        fleet=Fleet(
            worker_W=np.array(sorted(paces)),
            role_W=np.zeros(len(paces), np.int64),
            node_W=np.zeros(len(paces), np.int64),
        ),
        computed=Computed(
            worker_B=workers,
            start_s_B=np.zeros(len(workers)),
            end_s_B=np.array([paces[one] for one in workers.tolist()]),
            load_B=np.ones(len(workers)),
            done_B=np.ones(len(workers), np.bool_),
        ),
    )


def run(*parts: tuple[int, Mapping[int, float]]) -> set[int]:
    """Who is named at any time: so many steps at such paces, and so on."""
    policy, step, named = SlowComputation(), 0, set[int]()
    memory: Paces = policy.begin()
    for num, paces in parts:
        for _ in range(num):
            nobody = np.zeros(len(paces), np.bool_)
            found, memory = policy.decide(step_of(step, paces), memory, nobody)
            named |= {one.culprit.number for one in found if isinstance(one.culprit, Worker)}
            step += 1
    return named


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        pytest.param([(60, {0: 1.0}), (60, {0: 2.0, 1: 2.0})], set(),
                     id="who was alone and is not any more"),
        pytest.param([(60, {0: 1.0, 1: 1.0}), (60, {0: 3.0, 1: 1.0})], {0}, id="one of two"),
        pytest.param([(60, {0: 1.0, 1: 1.0}), (60, {0: 3.0, 1: 3.0})], set(), id="both alike"),
        pytest.param([(60, {0: 1.0, 1: 3.0}), (60, {0: 1.0, 1: 1.0})], set(),
                     id="the other has become faster"),
        pytest.param([(60, {0: 1.0, 1: 1.0, 2: 1.0}), (60, {0: 1.5, 1: 1.0, 2: 1.0})], {0},
                     id="one of three, which are compared with each other"),
        pytest.param([(60, {0: 1.0}), (60, {0: 3.0})], set(), id="one alone has nobody to compare"),
    ],
)  # fmt: skip
def test_who_is_named_among_few(parts: list[tuple[int, dict[int, float]]], named: set[int]) -> None:
    assert run(*parts) == named


def test_a_verdict_outlasts_that_somebody_comes() -> None:
    """Two workers, one of them slow by then; a third would be compared with both."""
    policy, memory = SlowComputation(), SlowComputation().begin()
    nobody = np.zeros(2, np.bool_)
    for step in range(120):
        pace = 3.0 if step >= 60 else 1.0
        _, memory = policy.decide(step_of(step, {0: pace, 1: 1.0}), memory, nobody)
    after = memory.of(np.array([0, 2]))
    assert after.history.is_open_E.tolist() == [True, False]
    assert after.past_W[0] == memory.past_W[0] > policy.least_past
    assert after.past_W[1] == 0
