"""Schemes in virtual time: when rounds end, the published rules, delays drawn and fitted."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from policies.coding.delays import (
    Delays,
    GilbertElliott,
    additive,
    bootstrap,
    fit,
    proportional,
    shuffled,
)
from policies.coding.m_sgc import MSgc
from policies.coding.published import (
    Published,
    choose_published,
    gradient_codes,
    m_sgc_schemes,
    simulate_published,
    sr_sgc_schemes,
)
from policies.coding.simulation import (
    Coded,
    Frc,
    Minimal,
    Scheme,
    Speculation,
    Uncoded,
    load_of,
    simulate,
    speculated,
)
from policies.coding.sr_sgc import SrSgc

TRACES = os.environ.get("ELASTIC_TRACES")
needs_traces = pytest.mark.skipif(
    TRACES is None, reason="ELASTIC_TRACES names no folder with the recorded delays"
)


def constant(rows: list[list[float]]) -> Delays:
    """Delays that do not depend on the load."""
    seconds_RN = np.array(rows)
    return Delays(seconds_RN, np.zeros_like(seconds_RN))


def m_sgc(burst: int, window: int, distinct: int) -> MSgc:
    return MSgc(burst=burst, window=window, distinct=distinct, inner="coded")


def test_when_a_round_of_each_scheme_ends() -> None:
    delays = constant([[1.0, 2.0, 3.0, 9.0]])
    pairs = simulate(Frc(stragglers=1), delays, 1).total_s
    assert pairs in (2.0, 3.0)  # as the groups fall
    assert simulate(Uncoded(), delays, 1).total_s == 9.0
    assert simulate(Coded(stragglers=1), delays, 1).total_s == 3.0
    assert simulate(Coded(stragglers=3), delays, 1).total_s == 1.0


def test_speculation_takes_the_first_of_two_tries() -> None:
    ends_N = np.array([1.0, 2.0, 2.0, 9.0, 2.0])
    again_N = np.array([1.5, 7.0, 7.0, 7.0, 7.0])
    assert speculated(ends_N, again_N, factor=1.5) == 3.0 + 1.5
    assert speculated(ends_N, 9 * again_N, factor=1.5) == 9.0
    assert speculated(ends_N[:3], again_N[:3], factor=2.0) == 2.0


def test_late_work_that_is_not_cancelled_delays_the_next_round() -> None:
    delays = constant([[1.0, 1.0, 9.0], [1.0, 1.0, 1.0]])
    scheme = Coded(stragglers=1)
    assert simulate(scheme, delays, 2).rounds_R.tolist() == [1, 1]
    assert simulate(scheme, delays, 2, cancels=False).rounds_R.tolist() == [1, 1]
    all_late = Coded(stragglers=0)
    assert simulate(all_late, delays, 2, cancels=False).rounds_R.tolist() == [9, 1]
    two = constant([[1.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    assert simulate(Coded(stragglers=2), two, 2, cancels=False).rounds_R.tolist() == [1, 1]
    assert simulate(Frc(stragglers=2), two, 2, cancels=False).rounds_R.tolist() == [1, 1]


def test_m_sgc_waits_for_no_more_than_it_must() -> None:
    scheme, delays = MSgc(burst=1, window=2, distinct=4), constant([[1, 1, 1, 9], [1, 3, 1, 9]])
    run = simulate(scheme, delays, 1, closing=Minimal(patience=1.0))
    assert run.rounds_R.tolist() == [2.0, 9.0]  # worker 3 is needed; the others are not busy
    late = constant([[1, 1, 1, 9], [1, 9, 9, 3]])
    assert simulate(scheme, late, 1, closing=Minimal(patience=1.0)).rounds_R.tolist() == [2, 3]


def test_sr_sgc_waits_for_the_gradient_that_is_due() -> None:
    scheme = SrSgc(burst=1, window=2, distinct=2)
    delays = constant([[1, 1, 9, 9], [5, 1, 4, 1]])
    run = simulate(scheme, delays, 1, closing=Minimal(patience=1.0))
    assert run.rounds_R.tolist() == [2.0, 4.0]  # worker 2, the first that lacks, repeats


@pytest.mark.parametrize(
    "scheme",
    [Frc(stragglers=3), SrSgc(burst=1, window=2, distinct=8), m_sgc(1, 2, 3), m_sgc(2, 3, 16)],
)
def test_all_gradients_are_decoded_in_the_end(scheme: Scheme) -> None:
    dice = np.random.default_rng(1)
    delays = constant((1 + dice.exponential(1.0, (30, 16))).tolist())
    run = simulate(scheme, delays, 20)
    assert run.total_s < simulate(Uncoded(), delays, 20).total_s


def test_loads() -> None:
    assert load_of(Frc(stragglers=9), 256) == 1 / 25
    assert load_of(Coded(stragglers=15), 256) == 0.0625
    assert load_of(Uncoded(), 256) == load_of(Speculation(), 256) == 1 / 256


def test_delays_at_another_load() -> None:
    seen_RN = np.array([[1.0, 2.0]])
    assert additive(seen_RN, 0.5, 4.0).at(3, 0.75).tolist() == [2.0, 3.0]
    assert proportional(seen_RN, 0.5, 0.2).at(0, 1.0).tolist() == pytest.approx([1.8, 3.6])


def test_a_chain_is_found_again() -> None:
    model = GilbertElliott(p_slow=0.03, p_ok=0.4, slowdown=4.0, outlier_rate=0.2)
    seconds_RN = model.draw(400, 64, np.random.default_rng(0))
    found = fit(seconds_RN)
    assert found.straggler_rate == pytest.approx(model.straggler_rate, rel=0.2)
    assert found.p_ok == pytest.approx(0.4, rel=0.25)
    assert found.outlier_rate == pytest.approx(0.2, abs=0.06)
    assert GilbertElliott(p_slow=0.0).straggler_rate == 0.0


def test_bootstrap_keeps_neighbouring_rounds_together() -> None:
    sample_RN = np.arange(12.0)[:, None] * np.ones(3)
    drawn = bootstrap([sample_RN], 22, np.random.default_rng(0), block=4)
    assert drawn.shape == (22, 3)
    steps = np.diff(drawn[:, 0]).reshape(-1)
    assert sum(step in (1, -11) for step in steps) >= 15
    again = shuffled(sample_RN * np.arange(3), 20, np.random.default_rng(0))
    assert again.shape == (20, 3)
    assert sorted(again[1]) == sorted(sample_RN[1] * np.arange(3))


# --- the published rules --------------------------------------------------------------------------


def test_the_published_rule_waits_for_all_or_for_tau() -> None:
    delays = constant([[1, 1.5, 9.0], [1, 9.0, 9.0], [1, 1.2, 1.4]])
    run = simulate_published(Coded(stragglers=2), delays, 3)
    assert run.rounds_R.tolist() == [2.0, 9.0, 1.4]


def recorded(load: str) -> np.ndarray:
    assert TRACES is not None
    file = Path(TRACES) / f"lambda_canada_cnn_load_{load}.npz"
    return np.asarray(np.load(file)["dur"])


REGRESSION: list[tuple[Published, float, float]] = [
    (m_sgc(1, 2, 27), 24.811803, 27.270685),
    (m_sgc(2, 3, 40), 28.763952, 30.421818),
    (SrSgc(burst=2, window=3, distinct=23), 29.778965, 25.49446),
    (Coded(stragglers=15), 31.428797, 24.803831),
    (Uncoded(), 31.428797, 31.428797),
]
"""The authors' own simulator gives 29.778965 for the third, too."""


@needs_traces
@pytest.mark.parametrize(("scheme", "half", "one"), REGRESSION)
def test_the_published_figures(scheme: Published, half: float, one: float) -> None:
    delays = additive(recorded("0_000"), 0.0, 0.0)
    for mu, seconds in ((0.5, half), (1.0, one)):
        run = simulate_published(scheme, delays, 20, mu=mu)
        assert run.total_s == pytest.approx(seconds, abs=1e-6)


@needs_traces
def test_the_selection_test() -> None:
    delays = additive(recorded("0_000"), 0.0, 1.12175301)
    code = choose_published(gradient_codes(256), delays, 26)
    assert code.scheme == Coded(stragglers=14)
    assert code.run.total_s == pytest.approx(33.665836, abs=1e-6)
    repeat = choose_published(sr_sgc_schemes(256, 4), delays, 26)
    assert repeat.scheme == SrSgc(burst=1, window=2, distinct=22)
    assert repeat.run.total_s == pytest.approx(33.074582, abs=1e-6)
    multiplexed = choose_published(m_sgc_schemes(256, 4), delays, 26)
    assert multiplexed.scheme == m_sgc(1, 2, 26)
    assert multiplexed.run.total_s == pytest.approx(34.725764, abs=1e-6)
    closed = simulate(Coded(stragglers=35), delays, 26)
    assert closed.total_s == pytest.approx(24.046487, abs=1e-6)
    covered = simulate(Frc(stragglers=9), delays, 26)
    assert covered.total_s <= 0.54 * multiplexed.run.total_s
    assert covered.total_s <= 0.56 * code.run.total_s
