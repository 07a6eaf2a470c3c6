"""`auto` for jobs: steps as workers really lease, what is measured of them, what is chosen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from elastic.core.protocol.choosing import Choosing
from elastic.core.protocol.messages import Outcome
from policies.choosing import PROBE, PROBE_STEPS, Chosen, StepsSeen, StepsView, expect, measured_of
from policies.coding.delays import additive, proportional
from policies.coding.leases import Step
from policies.scheduling import Shares

UNCODED, SPECULATION, PAIRS = Shares(helps=False), Shares(), Shares(copies=2)
ALL = Shares(copies=4)


def step_s(policy: Shares, num: int, delays: list[float], costs: list[float]) -> float:
    return Step(policy, num, np.array(delays), np.array(costs), pace_s=1.0).run()


@pytest.mark.parametrize(
    ("policy", "num", "delays", "costs", "seconds"),
    [
        pytest.param(UNCODED, 4, [0, 0], [1, 1], 2, id="even shares, all alike"),
        pytest.param(UNCODED, 4, [0, 0], [1, 5], 10, id="the slowest has its share to do"),
        pytest.param(UNCODED, 4, [0, 30], [1, 1], 32, id="and is waited for"),
        pytest.param(ALL, 4, [0, 0, 0, 0], [1] * 4, 1, id="copies share the work"),
        pytest.param(ALL, 4, [0, 30, 30, 30], [1] * 4, 4, id="one of a group does all of it"),
        pytest.param(ALL, 4, [2, 0, 30, 30], [1] * 4, 3, id="who comes later takes a part"),
        pytest.param(SPECULATION, 4, [0, 0], [1, 1], 2, id="nothing to help with"),
        pytest.param(SPECULATION, 4, [0, 30], [1, 1], 4, id="all of one that never begins"),
        pytest.param(SPECULATION, 1, [0, 0, 0], [1] * 3, 1, id="more workers than work"),
    ],
)
def test_a_step_takes_as_long_as_its_policy_makes_it(
    policy: Shares, num: int, delays: list[float], costs: list[float], seconds: float
) -> None:
    assert step_s(policy, num, delays, costs) == pytest.approx(seconds, abs=0.2)


def test_every_policy_ends_every_step() -> None:
    """Random delays and costs: none takes longer than the slowest worker alone, or less than it
    takes all together."""
    dice = np.random.default_rng(4)
    for _ in range(300):
        num_workers, num = int(dice.integers(1, 9)), int(dice.integers(1, 20))
        delays_N = dice.exponential(1.0, num_workers) * (dice.random(num_workers) < 0.5)
        costs_N = dice.uniform(0.1, 2.0, num_workers)
        fewest_s = num / (1 / costs_N).sum()
        for policy in (UNCODED, SPECULATION, PAIRS, Shares(copies=5)):
            took_s = Step(policy, num, delays_N, costs_N, pace_s=1.0).run()
            assert fewest_s * (1 - 1e-9) <= took_s <= (delays_N + num * costs_N).max() * (1 + 1e-9)


# --- what is measured, and chosen


def run_steps(
    policy: Shares, delays_RN: np.ndarray, cost_s: float, per_worker: int
) -> tuple[StepsSeen, int]:
    """Steps as they would have been seen: delays come on top of computing."""
    num = per_worker * delays_RN.shape[1]
    ends = [
        Step(policy, num, row_N, np.full(len(row_N), cost_s), pace_s=cost_s).run()
        for row_N in delays_RN
    ]
    first_RN = delays_RN + cost_s
    is_late_RN = first_RN > np.array(ends)[:, None]
    computing_RN = np.where(is_late_RN, np.nan, cost_s)
    return StepsSeen(np.where(is_late_RN, np.inf, first_RN), computing_RN, np.array(ends)), num


def delays(rate: float, *, num_rounds: int = 60, long_s: float = 3.0, seed: int = 1) -> np.ndarray:
    dice = np.random.default_rng(seed)
    seconds_RN = dice.uniform(0.0, 0.02, (num_rounds, 8))
    return np.where(dice.random(seconds_RN.shape) < rate, long_s, seconds_RN)


def test_the_share_that_does_not_shrink_with_the_load_is_measured() -> None:
    """Half a second before each share of two micro-batches of .25 s: f is a half."""
    steps, num = run_steps(UNCODED, np.full((10, 8), 0.5), 0.25, 2)
    measured = measured_of(steps, num, np.random.default_rng(0))
    assert measured.model.fixed_share(1 / 8) == pytest.approx(0.5)
    assert not measured.model.is_proportional


def test_who_computes_slowly_is_told_from_who_begins_late() -> None:
    first_RN = np.full((10, 8), 1.0)
    first_RN[:, 3] = 4.0
    ends_R = np.full(10, 4.0)
    for computing_s, is_proportional in ((4.0, True), (1.0, False)):
        computing_RN = np.full((10, 8), 1.0)
        computing_RN[:, 3] = computing_s
        steps = StepsSeen(first_RN, computing_RN, ends_R)
        measured = measured_of(steps, 8, np.random.default_rng(0))
        assert measured.model.is_proportional is is_proportional


def test_nothing_is_chosen_before_the_probe_is_over() -> None:
    steps, num = run_steps(SPECULATION, delays(0.1, num_rounds=PROBE_STEPS - 1), 0.1, 2)
    assert Chosen().decide(StepsView(steps, num, 0)) == PROBE
    assert not Chosen().is_due(StepsView(steps, num, 0, PROBE, len(steps)))


@pytest.mark.parametrize(
    ("rate", "cost_s"), [(0.0, 0.1), (0.1, 0.01), (0.1, 1.0), (0.3, 0.1)], ids=str
)
def test_what_is_chosen_is_nearly_the_best(rate: float, cost_s: float) -> None:
    """Against every policy on the delays themselves, of which the choice saw less."""
    truth_RN = delays(rate)
    steps, num = run_steps(SPECULATION, truth_RN, cost_s, 2)
    choice = Chosen().decide(StepsView(steps, num, 0, PROBE, len(steps)))
    assert choice.expected is not None
    took_s = {
        policy: float(run_steps(policy, truth_RN, cost_s, 2)[0].ends_R.mean())
        for policy in (UNCODED, SPECULATION, PAIRS, Shares(copies=4), Shares(copies=8))
    }
    mine_s = float(run_steps(choice.policy, truth_RN, cost_s, 2)[0].ends_R.mean())
    assert mine_s <= 1.1 * min(took_s.values()), (choice.reason, took_s)
    assert choice.expected.mean_s == pytest.approx(mine_s, rel=0.15), choice.reason
    assert "does not shrink" in choice.reason


def test_a_choice_is_reconsidered_when_steps_take_other_than_expected() -> None:
    calm, num = run_steps(SPECULATION, delays(0.0, num_rounds=40), 0.1, 2)
    choice = Chosen().decide(StepsView(calm, num, 0, PROBE, 40))
    assert not Chosen().is_due(StepsView(calm, num, 0, choice, 12))
    slow = StepsSeen(calm.first_RN * 4, calm.computing_RN * 4, calm.ends_R * 4)
    view = StepsView(slow, num, 0, choice, 12)
    assert (Chosen().surprise(view), Chosen().is_due(view)) == ("median", True)


def test_simulated_seconds_are_scaled_to_what_steps_took() -> None:
    """Workers that share cores are slower than any simulation knows."""
    steps, num = run_steps(SPECULATION, delays(0.1), 0.1, 2)
    slower = StepsSeen(steps.first_RN, steps.computing_RN, 1.3 * steps.ends_R)
    plain = Chosen().decide(StepsView(steps, num, 0, PROBE, len(steps))).expected
    scaled = Chosen().decide(StepsView(slower, num, 0, PROBE, len(steps))).expected
    assert plain is not None
    assert scaled is not None
    assert scaled.mean_s == pytest.approx(1.3 * plain.mean_s, rel=0.1)


def test_copies_help_where_load_is_cheap() -> None:
    """The same delays, all of them fixed or all of them growing with the load."""
    seconds_RN = 0.1 + delays(0.15, num_rounds=40, long_s=1.0)
    for fixed in (additive(seconds_RN, 1 / 8, 0.0), proportional(seconds_RN, 1 / 8, 0.1)):
        pairs_s = expect(PAIRS, fixed, 16).mean_s
        assert pairs_s < expect(UNCODED, fixed, 16).mean_s


# --- what the aggregator remembers


def answer(cost_s: float) -> Outcome:
    return Outcome(0, 0.0, 1.0, b"", b"", np.zeros(1, np.float32), end_s=cost_s)


class Watched:
    """Steps of one virtual worker set, told to `Choosing` as the aggregator tells them."""

    def __init__(self, num_workers: int = 4) -> None:
        self.choosing = Choosing(num_micro_batches=num_workers)
        self.workers = range(num_workers)
        self.now_s = 100.0
        self.slower = 1.0
        self.told: list[str] = []

    def step(self, slow: int | None = None) -> None:
        policy = self.choosing.scheduling
        delays_N = np.array([1.0 if one == slow else 0.01 for one in self.workers])
        cost_s = 0.05 * self.slower
        costs_N = np.full(len(delays_N), cost_s)
        end_s = Step(policy, len(self.workers), delays_N, costs_N, pace_s=0.06).run()
        self.choosing.begin(self.now_s)
        for worker in sorted(self.workers, key=lambda one: delays_N[one]):
            first_s = float(delays_N[worker]) + cost_s
            if first_s <= end_s:
                self.choosing.answered(worker, answer(cost_s), self.now_s + first_s)
        self.choosing.answered(0, answer(cost_s), self.now_s + end_s)
        self.told += filter(None, [self.choosing.end(self.workers)])
        self.now_s += end_s


def test_a_choice_is_told_once_and_only_a_new_one_again() -> None:
    watched = Watched()
    for step in range(60):
        watched.step(slow=step % 4)
    assert watched.told
    assert watched.told[0].startswith("auto: ")
    named = [one.split(": ")[1] for one in watched.told]
    assert all(one != other for one, other in pairwise(named))


def test_steps_that_become_slower_are_measured_anew() -> None:
    """All workers slow down after a choice: within a dozen steps another one is made, on the new
    steps alone."""
    watched = Watched()
    for _ in range(45):
        watched.step()
    before = watched.choosing.choice
    watched.slower = 5.0
    for _ in range(12):
        watched.step()
    after = watched.choosing.choice
    assert before.expected is not None
    assert after.expected is not None
    assert after.expected.median_s > 2 * before.expected.median_s
    assert len(watched.choosing._rows) < 45, "what was before says little of what is now"


def test_another_number_of_workers_is_measured_anew() -> None:
    watched = Watched()
    for _ in range(PROBE_STEPS):
        watched.step()
    assert watched.choosing.choice.expected is not None
    policy = watched.choosing.scheduling
    watched.workers = range(3)
    watched.step()
    assert watched.choosing.choice.expected is None
    assert watched.choosing.scheduling == policy, "until there is something better"


def test_a_successor_ignores_a_step_that_it_did_not_see_begin() -> None:
    choosing = Choosing(4)
    choosing.answered(0, answer(0.1), 5.0)
    assert choosing.end([0, 1]) == ""
    assert choosing.choice == PROBE


def test_a_step_without_workers_says_nothing() -> None:
    choosing = Choosing(4)
    for workers in ([], [0, 1]):
        choosing.begin(1.0)
        assert choosing.end(workers) == ""
