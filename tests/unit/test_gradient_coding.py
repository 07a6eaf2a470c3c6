"""`auto`: what it measures, what it probes, what it chooses, and when it changes its mind."""

from __future__ import annotations

import numpy as np
import pytest

from policies.coding.adaptive import simulate_auto
from policies.coding.delays import Delays, GilbertElliott, additive, proportional
from policies.coding.m_sgc import MSgc
from policies.coding.measuring import Seen, load_model, measure
from policies.coding.simulation import Frc, Minimal, Speculation, Uncoded, simulate
from policies.gradient_coding import PROBE_COPIES, Auto, Expected, Plan, View

N = 64
AUTO = Auto()


def drawn(rate: float, burst: float = 2.0, *, seed: int = 0, rounds: int = 260) -> np.ndarray:
    p_ok = 1 / burst
    model = GilbertElliott(p_slow=rate * p_ok / (1 - rate), p_ok=p_ok, slowdown=4.0)
    return model.draw(rounds, N, np.random.default_rng(seed))


def probed(delays: Delays) -> View:
    """Everything up to the first choice."""
    run = simulate_auto(AUTO, delays, len(PROBE_COPIES))
    loads_R = np.array(PROBE_COPIES) / N
    rows = [delays.at(row, load) for row, load in enumerate(loads_R)]
    return View(N, Seen(np.tile(loads_R[:, None], N), np.array(rows), run.rounds_R), seed=0)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_the_share_that_does_not_shrink_is_measured(share: float) -> None:
    view = probed(proportional(drawn(0.05), 1 / N, share))
    model = load_model(view.seen)
    assert model.fixed_share(1 / N) == pytest.approx(share, abs=0.06)
    assert model.is_proportional or share > 0.9  # there it makes no difference


def test_delays_that_come_on_top_are_told_from_slow_workers() -> None:
    model = load_model(probed(additive(drawn(0.1), 1 / N, 0.5 * N)).seen)
    assert not model.is_proportional
    assert model.rate_s == pytest.approx(0.5 * N, rel=0.05)


def test_what_was_cut_off_is_filled_in_as_long_as_it_is() -> None:
    """Half of the rounds end early: what is filled in has the distribution of the others."""
    seconds_RN = drawn(0.1, seed=3, rounds=100)
    ends_R = np.where(np.arange(100) % 2, 0.8, np.inf)
    cut_RN = np.where(seconds_RN > ends_R[:, None], np.inf, seconds_RN)
    seen = Seen(np.full((100, N), 1 / N), cut_RN, np.minimum(ends_R, seconds_RN.max(axis=1)))
    filled_RN = measure(seen, 1 / N, np.random.default_rng(0)).seconds_RN
    assert np.isfinite(filled_RN).all()
    assert filled_RN[1::2].mean() == pytest.approx(filled_RN[::2].mean(), rel=0.05)
    assert (filled_RN[1::2][np.isinf(cut_RN[1::2])] >= 0.8).all()


def test_what_was_seen_at_another_load_counts() -> None:
    """Who straggles is well in the next round, which only those show that retry something then."""
    delays = proportional(drawn(0.05, burst=1.0), 1 / N, 0.6)
    scheme = MSgc(burst=1, window=2, distinct=N)
    run = simulate(scheme, delays, 200, closing=Minimal(patience=0.25))
    assert len(np.unique(run.loads_RN[1:200])) == 2
    probe = probed(delays).seen
    seen = probe.and_then(Seen(run.loads_RN[1:200], run.seconds_RN[1:200], run.rounds_R[1:200]))
    filled_RN = measure(seen, 1 / N, np.random.default_rng(0)).seconds_RN[len(probe) :]
    is_late_RN = filled_RN > 2 * np.median(filled_RN)
    assert is_late_RN.mean() == pytest.approx(0.05 * 0.8, rel=0.3)  # some of them hardly are
    assert np.count_nonzero(is_late_RN[1:] & is_late_RN[:-1]) == 0


def test_the_probe_trains_all_the_while_and_is_cheap_where_load_is_dear() -> None:
    light = simulate_auto(AUTO, proportional(drawn(0.0), 1 / N, 0.9), 10).plans
    heavy = simulate_auto(AUTO, proportional(drawn(0.0), 1 / N, 0.05), 10).plans
    assert [plan.scheme for _, plan in light[:3]] == [
        *[Speculation(), Speculation(), Frc(stragglers=1)]
    ]
    assert Frc(stragglers=3) in [plan.scheme for _, plan in light]
    assert Frc(stragglers=3) not in [plan.scheme for _, plan in heavy]
    assert all(plan.is_probe for _, plan in light[:10])
    assert light[2][1].reason == "probe 3 of 10, at 2 times the load of uncoded"


@pytest.mark.parametrize(
    ("share", "rate", "kinds"),
    [
        pytest.param(0.99, 0.05, {"frc"}, id="load costs nothing"),
        pytest.param(0.05, 0.0, {"uncoded", "speculation"}, id="nobody straggles"),
        pytest.param(0.05, 0.02, {"speculation", "frc"}, id="load is dear"),
    ],
)
def test_the_choice_follows_the_regime(share: float, rate: float, kinds: set[str]) -> None:
    delays = proportional(drawn(rate), 1 / N, share)
    run = simulate_auto(AUTO, delays, 240)
    kind, reason = run.plans[-1][1].scheme.kind, run.plans[-1][1].reason
    assert kind in kinds
    assert "does not shrink with its load" in reason
    assert "\n" not in reason
    others = [simulate(scheme, delays, 240).total_s for scheme, _ in AUTO.candidates(N)]
    assert run.total_s <= 1.10 * min(others)
    assert run.total_s <= 1.03 * simulate(Uncoded(), delays, 240).total_s


def test_several_models_may_be_trained_in_turn() -> None:
    kinds = {scheme.kind for scheme, _ in Auto(models=4).candidates(N)}
    assert kinds == {"uncoded", "speculation", "frc", "m_sgc"}
    delays = [scheme.delay for scheme, _ in Auto(models=4).candidates(N) if scheme.kind == "m_sgc"]
    assert max(delays) == 3


def test_a_change_of_the_pattern_is_noticed() -> None:
    seconds_RN = np.concatenate([drawn(0.0, rounds=100), drawn(0.2, 5, seed=1, rounds=160)])
    delays = proportional(seconds_RN, 1 / N, 0.3)
    run = simulate_auto(AUTO, delays, 250)
    before = [plan for begin, plan in run.plans if 10 <= begin < 100]
    after = [(begin, plan) for begin, plan in run.plans if begin > 100]
    assert {plan.scheme.kind for plan in before} <= {"uncoded", "speculation"}
    assert after[0][0] <= 125
    best_s = min(
        simulate(Frc(stragglers=s), delays, 150, first_round=100).total_s for s in (1, 2, 3)
    )
    calm_s = simulate(Uncoded(), delays, 100).total_s
    assert run.total_s < 1.25 * (best_s + calm_s)


def seen_for(seconds: list[float]) -> Seen:
    rounds_R = np.array(seconds)
    return Seen(np.full((len(seconds), N), 1 / N), np.ones((len(seconds), N)), rounds_R)


@pytest.mark.parametrize(
    ("seconds", "surprise"),
    [
        pytest.param([1.0] * 40, "", id="as expected"),
        pytest.param([1.0] * 35 + [9.0] + [1.0] * 4, "mean", id="one very long"),
        pytest.param([1.0] * 30 + [2.0] * 10, "median", id="slower"),
        pytest.param([1.0] * 30 + [0.5] * 10, "median", id="faster"),
    ],
)
def test_surprises(seconds: list[float], surprise: str) -> None:
    plan = Plan(Uncoded(), Minimal(), "", Expected(1.0, 1.0))
    view = View(N, seen_for(seconds), 0, plan, num_since=15)
    assert AUTO.surprise(view) == surprise
    assert AUTO.is_due(view) == bool(surprise)
    early = View(N, seen_for(seconds), 0, plan, num_since=5)
    assert not AUTO.surprise(early)
    assert AUTO.is_due(View(N, seen_for([1.0] * 40), 0, plan, num_since=20))
