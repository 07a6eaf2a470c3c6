"""Straggler policies in virtual time: the published figures, `auto` beside the others, decoding.

    python -m benchmarks.stragglers --traces DIR [--only published] [--quick] [--out DIR]

    published   the published rules on the recorded delays, and the selection test
    recorded    480 gradients of 256 workers on recorded delays drawn again, 4 seeds
    regimes     `auto` beside the best fixed policy known afterwards, 20 generated regimes
    decode      what decoding a 10M-parameter gradient costs beyond adding it up

DIR holds `lambda_canada_cnn_load_*.npz`: delays of 256 workers on AWS Lambda, published by the
authors of Sequential Gradient Coding. One thread; no process but this one is started.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks import jobs, record
from benchmarks.record import Figure, figure
from elastic.core.simulator.stragglers import fastest, map_regimes, read_trace, regime
from elastic.report.straggler_picture import draw_map
from policies.coding.adaptive import simulate_auto
from policies.coding.codes import Decoded, Floats, crc
from policies.coding.delays import Delays, additive, bootstrap, proportional
from policies.coding.exact import BLOCK_ELEMENTS, Inexact, combine, decode_sum, precision
from policies.coding.m_sgc import MSgc
from policies.coding.measuring import Seen
from policies.coding.published import (
    Published,
    choose_published,
    gradient_codes,
    m_sgc_schemes,
    simulate_published,
    sr_sgc_schemes,
)
from policies.coding.simulation import Coded, Frc, Scheme, Speculation, Uncoded, simulate
from policies.coding.sr_sgc import SrSgc
from policies.gradient_coding import Auto, View, named

PARTS = ("published", "recorded", "regimes", "decode")
LOADS = ("0_000", "0_250", "0_500", "0_750", "1_000")
NUM_WORKERS = 256
ALPHA_S, PAPER_ALPHA_S = 1.12175301, 2.2013
"""Seconds that a whole batch adds to a delay: of these recordings, and of the authors' long run."""
JOBS, TEST_JOBS, TABLE_JOBS = 480, 26, 20
NUM_SEEDS = 4
MODELS = 4

PUBLISHED: tuple[tuple[Published, float, float], ...] = (
    (MSgc(burst=1, window=2, distinct=27, inner="coded"), 24.811803, 27.270685),
    (MSgc(burst=2, window=3, distinct=40, inner="coded"), 28.763952, 30.421818),
    (SrSgc(burst=2, window=3, distinct=23), 29.778965, 25.49446),
    (Coded(stragglers=15), 31.428797, 24.803831),
    (Uncoded(), 31.428797, 31.428797),
)
"""Seconds for mu = 0.5 and 1, from the authors' simulator."""

REGIMES = tuple(
    (fixed, rate, burst, slowdown, outliers)
    for fixed in (0.05, 0.3, 0.6, 0.9, 0.99)
    for rate, burst, slowdown, outliers in (
        (0.0, 1.0, 2.5, 0.0),
        (0.02, 1.0, 4.0, 0.02),
        (0.08, 3.0, 3.0, 0.0),
        (0.2, 10.0, 2.5, 0.05),
    )
)
"""Share that does not shrink, straggler rate, rounds of a burst, slowdown, rounds with outliers."""

MAP_SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99)
MAP_RATES = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2)
MAP_WORKERS, MAP_GRADIENTS = 128, 80


def published(traces: Path, quick: bool) -> Iterator[Figure]:
    """The ten figures, and the selection test on 26 rounds."""
    seconds_RN = read_trace(traces / "lambda_canada_cnn_load_0_000.npz")
    plain = additive(seconds_RN, 0.0, 0.0)
    differences = [
        abs(simulate_published(scheme, plain, TABLE_JOBS, mu=mu).total_s - expected)
        for scheme, *both in PUBLISHED
        for mu, expected in zip((0.5, 1.0), both, strict=True)
    ]
    yield figure(
        "published rules, 10 figures: largest difference",
        differences,
        unit="s",
        limit=1e-6,
        statistic="largest",
    )
    delays = additive(seconds_RN, 0.0, ALPHA_S)
    code = choose_published(gradient_codes(NUM_WORKERS), delays, TEST_JOBS)
    repeat = choose_published(sr_sgc_schemes(NUM_WORKERS, MODELS), delays, TEST_JOBS)
    multiplexed = choose_published(m_sgc_schemes(NUM_WORKERS, MODELS), delays, TEST_JOBS)
    for name, found, expected in (
        ("GC", code, 33.665836),
        ("SR-SGC", repeat, 33.074582),
        ("M-SGC", multiplexed, 34.725764),
    ):
        yield figure(
            f"selection test, {name} by the published rules: difference",
            [abs(found.run.total_s - expected)],
            unit="s",
            limit=1e-6,
            note=named(found.scheme),
        )
    plan = Auto().decide(_all_seen(seconds_RN[:TEST_JOBS], traces))
    chosen_s = simulate(plan.scheme, delays, TEST_JOBS, closing=plan.closing).total_s
    probing_s = simulate_auto(Auto(), delays, TEST_JOBS).total_s
    for name, found, limit in (("GC", code, 0.56), ("M-SGC", multiplexed, 0.54)):
        yield figure(
            f"selection test, what auto chooses / {name} by the published rules",
            [chosen_s / found.run.total_s],
            unit="x",
            limit=limit,
            note=f"{named(plan.scheme)}, {chosen_s:.2f} s; with its own probe {probing_s:.2f} s",
        )


def _all_seen(seconds_RN: Floats, traces: Path) -> View:
    """The rounds of the test, as the published rule sees them, and recordings at other loads."""
    others = [
        (float(load.replace("_", ".")), read_trace(traces / f"lambda_canada_cnn_load_{load}.npz"))
        for load in LOADS[1:]
    ]
    samples_RN = [*(sample_RN[:10] for _, sample_RN in others), seconds_RN]
    loads_R = [*(load for load, _ in others for _ in range(10)), *(0.0,) * len(seconds_RN)]
    all_RN = np.concatenate(samples_RN)
    loads_RN = np.repeat(np.array(loads_R)[:, None], NUM_WORKERS, axis=1)
    return View(NUM_WORKERS, Seen(loads_RN, all_RN, all_RN.max(axis=1)), seed=0)


def recorded(traces: Path, quick: bool) -> Iterator[Figure]:
    """All five recordings, their load taken off, drawn again in blocks of 5 rounds."""
    samples = [
        read_trace(traces / f"lambda_canada_cnn_load_{load}.npz")
        - ALPHA_S * float(load.replace("_", "."))
        for load in LOADS
    ]
    runs: dict[str, list[float]] = {}
    took_s: list[float] = []
    for seed in range(1 if quick else NUM_SEEDS):
        drawn_RN = bootstrap(samples, JOBS + 20, np.random.default_rng(seed))
        delays = additive(drawn_RN, 0.0, PAPER_ALPHA_S)
        for name, total_s in _contenders(delays, seed):
            begin_s = time.process_time()
            runs.setdefault(name, []).append(total_s())
            took_s.append(time.process_time() - begin_s)
    auto = runs["auto"]
    for name, limit in (
        ("GC by the published rule, s=15", 0.5),
        ("M-SGC (1, 2, 27) by the published rule", 0.4),
        ("speculation", 0.5),
        ("GC that ends with n-s answers, s=15", None),
    ):
        yield figure(
            f"480 gradients, auto with its probe / {name}",
            [float(np.mean(auto) / np.mean(runs[name]))],
            unit="x",
            limit=limit,
        )
    for name, seconds in runs.items():
        yield figure(f"480 gradients: {name}", seconds, unit="s", statistic="mean")
    yield figure("processor time of simulating a policy", took_s, unit="s", statistic="largest")


def _contenders(delays: Delays, seed: int) -> Iterator[tuple[str, Callable[[], float]]]:
    multiplexed = MSgc(burst=1, window=2, distinct=27, inner="coded")
    rule = simulate_published
    yield "uncoded", lambda: rule(Uncoded(), delays, JOBS).total_s
    code = Coded(stragglers=15)
    yield "GC by the published rule, s=15", lambda: rule(code, delays, JOBS).total_s
    yield (
        "M-SGC (1, 2, 27) by the published rule",
        lambda: rule(multiplexed, delays, JOBS).total_s,
    )
    yield "speculation", lambda: simulate(Speculation(), delays, JOBS).total_s
    yield "GC that ends with n-s answers, s=15", lambda: simulate(code, delays, JOBS).total_s
    several = MSgc(burst=3, window=4, distinct=60)
    yield "M-SGC (3, 4, 60), minimal waiting", lambda: simulate(several, delays, JOBS).total_s
    for stragglers in (1, 3, 5, 7):
        yield f"FRC s={stragglers}", functools.partial(_total_s, Frc(stragglers=stragglers), delays)
    yield "auto", lambda: simulate_auto(Auto(models=MODELS), delays, JOBS, seed=seed).total_s


def _total_s(scheme: Scheme, delays: Delays) -> float:
    return simulate(scheme, delays, JOBS).total_s


def regimes(traces: Path, quick: bool) -> Iterator[Figure]:
    """`auto` knows nothing at the start, and its probe counts."""
    to_best, to_uncoded, words = [], [], []
    for number, (fixed, rate, burst, slowdown, outliers) in enumerate(
        REGIMES[:: 5 if quick else 1]
    ):
        model = regime(rate, burst, slowdown=slowdown, outlier_rate=outliers)
        drawn_RN = model.draw(JOBS + 20, NUM_WORKERS, np.random.default_rng(100 + number))
        delays = proportional(drawn_RN, 1 / NUM_WORKERS, fixed)
        scheme, best_s = fastest(delays, JOBS, MODELS)
        auto_s = simulate_auto(Auto(models=MODELS), delays, JOBS, seed=number).total_s
        to_best.append(auto_s / best_s)
        to_uncoded.append(auto_s / simulate(Uncoded(), delays, JOBS).total_s)
        words.append(f"f={fixed} rate={rate} burst={burst:g}: {named(scheme)} {to_best[-1]:.3f}")
    yield figure(
        f"auto / the best fixed policy, worst of {len(to_best)} regimes",
        to_best,
        unit="x",
        limit=1.10,
        statistic="largest",
        note="; ".join(words),
    )
    yield figure(
        f"auto / uncoded, worst of {len(to_best)} regimes",
        to_uncoded,
        unit="x",
        limit=1.03,
        statistic="largest",
    )


def decode(traces: Path, quick: bool) -> Iterator[Figure]:
    """CRC, n=256, s=27. A few blocks stand for 10M parameters: all answers would take 56 GB."""
    num_workers, num_missing, num_parameters = NUM_WORKERS, 27, 10_000_000
    code = crc(num_workers, num_missing)
    num_limbs = precision(code).num_limbs
    num_elements = BLOCK_ELEMENTS * (2 if quick else 4)
    dice = np.random.default_rng(0)
    parts_KE = dice.integers(-(2**22), 2**22, (num_workers, num_elements))
    missing = dice.choice(num_workers, num_missing, replace=False).tolist()
    there = sorted(set(range(num_workers)) - set(missing))
    answers_LAE = np.empty((num_limbs, len(there), num_elements))
    for row, worker in enumerate(there):
        held = np.flatnonzero(code.row(worker))
        answers_LAE[:, row] = combine(code.row(worker)[held], parts_KE[held], num_limbs)
    scale = num_parameters / num_elements
    beyond_s, sums_s, solves_s = [], [], []
    for _ in range(3 if quick else 9):
        begin_s = time.perf_counter()
        _add_up(answers_LAE)
        sums_s.append(scale * (time.perf_counter() - begin_s))
        begin_s = time.perf_counter()
        decoded = code.decode(there)
        solves_s.append(time.perf_counter() - begin_s)
        assert isinstance(decoded, Decoded)
        begin_s = time.perf_counter()
        total_E = decode_sum(code, decoded, there, answers_LAE)
        whole_s = scale * (time.perf_counter() - begin_s) + solves_s[-1]
        assert not isinstance(total_E, Inexact), total_E.reason
        assert (total_E == parts_KE.sum(axis=0)).all()
        beyond_s.append(whole_s - sums_s[-1])
    name = f"CRC n=256 s=27, 10M parameters as {num_limbs} float64"
    yield figure(f"{name}: decoding beyond adding up", beyond_s, unit="s", limit=0.3)
    yield figure(f"{name}: adding up", sums_s, unit="s")
    yield figure("CRC n=256 s=27: coefficients alone", solves_s, unit="s")


def _add_up(answers_LAE: Floats) -> None:
    """The plain sum of the answers, as fast as it goes: a product with ones, block by block."""
    ones_A = np.ones(answers_LAE.shape[1])
    for answers_AE in answers_LAE:
        for low in range(0, answers_AE.shape[1], BLOCK_ELEMENTS):
            ones_A @ answers_AE[:, low : low + BLOCK_ELEMENTS]


def main() -> int:
    """Measure, print, write. 1 if a figure misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--traces", type=Path, default=None, help="folder of the recorded delays")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--map", type=Path, default=None, help="draw the map of regimes here")
    parser.add_argument("--quick", action="store_true", help="few repetitions, no result file")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {record.RESULTS}")
    options = parser.parse_args()
    if options.map is not None:
        cells = map_regimes(
            MAP_SHARES, MAP_RATES, num_workers=MAP_WORKERS, num_gradients=MAP_GRADIENTS
        )
        title = f"Fastest policy, and its time / uncoded: {MAP_WORKERS} workers, bursts of 2 rounds"
        print(draw_map(cells, options.map, title))
        return 0
    parts = options.only or PARTS
    if options.traces is None and {"published", "recorded"} & set(parts):
        parser.error("--traces: published and recorded need the recorded delays")
    missed = False
    for part in parts:
        figures = list(globals()[part](options.traces, options.quick))
        made = record.make_record(f"stragglers-{part}", {"workers": NUM_WORKERS}, figures)
        folder = options.out or (jobs.RUNS / "quick" if options.quick else record.RESULTS)
        print(json.dumps([asdict(one) for one in figures], indent=1))
        print(record.write(made, folder), flush=True)
        missed |= any(one.ok is False for one in figures)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
