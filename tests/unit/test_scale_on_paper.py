"""What failures cost, counted by hand on a few of them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scale import WAYS, Case, DropTheStep, FinishTheStep, Fleet, Restart, sensitivity

HORIZON_S = 100_000.0


def fleet(*failures_s: float, num_hosts: int = 100, replace_s: float = 1000.0) -> Fleet:
    return Fleet(
        num_hosts=num_hosts,
        failures_s=np.array(failures_s),
        horizon_s=HORIZON_S,
        replace_s=replace_s,
    )


def test_missing_hosts_are_counted_from_their_failure_to_their_return() -> None:
    lasts_s, out = fleet(10_000, 10_400, 99_500).missing()
    assert lasts_s.tolist() == [10_000, 400, 600, 400, 88_100, 500, 0]
    assert out.tolist() == [0, 1, 2, 1, 0, 1, 0]


def test_dropping_loses_a_group_until_its_host_is_back_and_half_a_step() -> None:
    way = DropTheStep(gap_s=2, hosts_per_group=4)
    assert way.goodput(fleet(50_000), step_s=10) == pytest.approx(1 - (0.04 * 1000 + 7) / HORIZON_S)


def test_finishing_takes_one_micro_batch_more_without_a_spare_and_none_with_one() -> None:
    way = FinishTheStep(overhead=1, micro_batches=4, gap_s=1, join_steps=0.5, spares=0)
    each_s = 1 + 10 * (1 / 4 + 0.5)
    kept = 1 - (1000 * (1 - 4 / 5) + each_s) / HORIZON_S
    assert way.goodput(fleet(50_000), step_s=10) == pytest.approx(kept, rel=0.015)
    spare = FinishTheStep(overhead=1, micro_batches=4, gap_s=1, join_steps=0.5, spares=0.01)
    kept = (1 - each_s / HORIZON_S) / 1.01
    assert spare.goodput(fleet(50_000), step_s=10) == pytest.approx(kept, rel=0.015)


def test_a_second_loss_too_soon_is_a_restart() -> None:
    way = FinishTheStep(recopy_s=60)
    apart, soon = fleet(20_000, 50_000), fleet(20_000, 20_050)
    lost = way.goodput(apart, 10) - way.goodput(soon, 10)
    assert lost * HORIZON_S > way.restart.restart_s


def test_a_restart_costs_its_time_and_half_an_interval() -> None:
    way = Restart(restart_s=300, checkpoint_s=5)
    every_s = np.sqrt(2 * 5 * HORIZON_S)
    kept = (1 - (300 + every_s / 2) / HORIZON_S) * (1 - 5 / every_s)
    assert way.goodput(fleet(50_000), step_s=10) == pytest.approx(kept)

    every_s = np.sqrt(2 * 5 * HORIZON_S / 2)
    kept = (1 - (100 + 300 + every_s / 2) / HORIZON_S) * (1 - 5 / every_s)
    assert way.goodput(fleet(50_000, 50_100), step_s=10) == pytest.approx(kept)


@pytest.mark.parametrize("way", WAYS, ids=lambda one: one.name)
def test_more_failures_never_help(way: FinishTheStep | DropTheStep | Restart) -> None:
    few = Case(way=way, workers=16_384, per_1000_days=3.0).goodputs(days=10, seeds=3)
    many = Case(way=way, workers=16_384, per_1000_days=30.0).goodputs(days=10, seeds=3)
    assert max(many) < min(few) <= 1
    for _, cases in sensitivity(way):
        kind, bad = (one.goodputs(days=10, seeds=1)[0] for one in cases)
        assert kind > 0 < bad
