"""Straggler policies side by side, on recorded or generated delays, in virtual time.

Reads the delays and words of policies that a user names, and simulates; never draws or prints. The
schemes and `auto` are those of `policies`, the ones that real runs use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from elastic.core.errors import ConfigError
from policies.coding.adaptive import simulate_auto
from policies.coding.codes import Floats
from policies.coding.delays import Delays, GilbertElliott, additive, bootstrap, proportional
from policies.coding.m_sgc import MSgc
from policies.coding.simulation import (
    Coded,
    Dropping,
    Frc,
    Minimal,
    Scheme,
    Speculation,
    Uncoded,
    load_of,
    simulate,
)
from policies.coding.sr_sgc import SrSgc
from policies.dropping import ErasureHead
from policies.gradient_coding import Auto, named

MODEL = "gilbert-elliott"
TRACE_KEY = "dur"
BLOCK = 5
"""Recorded rounds that stay together when rounds are drawn again."""
POLICIES = ("uncoded", "speculation", "frc/1", "frc/3", "frc/7", "m_sgc/1/2/16", "auto")
FORMS = (
    "uncoded, speculation, frc/S, c_code/S, crc/S, sr_sgc/B/W/LAMBDA, m_sgc/B/W/LAMBDA, auto,"
    " drop_compute/MICRO_BATCHES_EACH, erasure_head/S/WAIT_FOR"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one policy did. `load` is that of the worst round, `lost` the share of it all that was
    dropped."""

    policy: str
    total_s: float
    median_s: float
    longest_s: float
    load: float
    reason: str = ""
    lost: float = 0.0


def read_delays(source: str, *, num_rounds: int, num_workers: int, seed: int) -> Floats:
    """Seconds (R, N) from a trace file, drawn again in blocks of rounds, or from a model.

    A model is `gilbert-elliott`, with settings if wanted: `gilbert-elliott:p_slow=0.1,p_ok=0.5`.

    Raises:
        ConfigError: the file holds no delays, the model or its settings are unknown.
    """
    dice = np.random.default_rng(seed)
    name, _, settings = source.partition(":")
    if name == MODEL:
        return _model(settings).draw(num_rounds, num_workers, dice)
    return bootstrap([read_trace(Path(source))], num_rounds, dice, BLOCK)


def read_trace(path: Path) -> Floats:
    """Seconds (R, N) of the array `dur` of an .npz file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        with np.load(path) as arrays:
            seconds_RN = np.asarray(arrays[TRACE_KEY], np.float64)
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise ConfigError(
            f"{path}: no trace: an .npz file with an array {TRACE_KEY!r} of seconds by round and "
            f"worker is needed, or the model {MODEL!r}: {error}"
        ) from error
    if seconds_RN.ndim != 2 or not seconds_RN.size or not (seconds_RN > 0).all():
        raise ConfigError(
            f"{path}: {TRACE_KEY!r} has shape {seconds_RN.shape}; seconds > 0 by round and worker"
        )
    return seconds_RN


def _model(settings: str) -> GilbertElliott:
    known = {field.name for field in dataclasses.fields(GilbertElliott)}
    values: dict[str, float] = {}
    for word in filter(None, settings.split(",")):
        key, _, value = word.partition("=")
        try:
            if key not in known:
                raise ValueError(f"known are {', '.join(sorted(known))}")
            values[key] = float(value)
        except ValueError as error:
            raise ConfigError(f"{MODEL}: {word!r}: {error}") from error
    return GilbertElliott(**values)


def make_delays(
    seconds_RN: Floats, *, load: float | None, fixed: float, rate_s: float | None
) -> Delays:
    """The delays at any load: `rate_s` seconds come on top for a whole batch, or a share is fixed.

    Args:
        load: at which they were seen; by default that of uncoded training.
    """
    seen_at = 1 / seconds_RN.shape[1] if load is None else load
    if rate_s is not None:
        return additive(seconds_RN, seen_at, rate_s)
    return proportional(seconds_RN, seen_at, fixed)


def parse_policy(words: str) -> Scheme | Auto:
    """A policy from its name and numbers: `frc/3`, `m_sgc/1/2/27`.

    Raises:
        ConfigError: there is no such policy, or its numbers make no sense.
    """
    kind, *parts = words.split("/")
    try:
        numbers = [int(part) for part in parts]
        match kind, numbers:
            case "uncoded", []:
                return Uncoded()
            case "speculation", []:
                return Speculation()
            case "auto", []:
                return Auto(models=4)
            case "frc", [stragglers]:
                return Frc(stragglers=stragglers)
            case "c_code", [stragglers]:
                return Coded(stragglers=stragglers)
            case "crc", [stragglers]:
                return Coded(stragglers=stragglers, kind="crc")
            case "drop_compute", [num_each] if num_each > 0:
                return Dropping(num_each=num_each)
            case "erasure_head", [stragglers, wait_for]:
                return ErasureHead(stragglers=stragglers, wait_for=wait_for)
            case "sr_sgc", [burst, window, distinct]:
                return SrSgc(burst=burst, window=window, distinct=distinct)
            case "m_sgc", [burst, window, distinct]:
                return MSgc(burst=burst, window=window, distinct=distinct)
    except ValueError as error:
        raise ConfigError(f"policy {words!r}: {error}") from error
    raise ConfigError(f"policy {words!r}: known are {FORMS}")


def compare(
    policies: Sequence[str], delays: Delays, num_gradients: int, seed: int
) -> list[Outcome]:
    """Every policy on the same delays, in the order given.

    Raises:
        ConfigError: a policy is unknown, or does not fit the number of workers.
    """
    return [_outcome(words, delays, num_gradients, seed) for words in policies]


def _outcome(words: str, delays: Delays, num_gradients: int, seed: int) -> Outcome:
    policy = parse_policy(words)
    if isinstance(policy, Auto):
        run = simulate_auto(policy, delays, num_gradients, seed=seed)
        last = run.plans[-1][1]
        return _sum_up("auto", run.rounds_R, load_of(last.scheme, delays.num_workers), last.reason)
    stragglers = policy.stragglers if isinstance(policy, Frc | Coded | ErasureHead) else 0
    if not 0 <= stragglers < delays.num_workers:
        raise ConfigError(
            f"policy {words!r}: {stragglers} stragglers of {delays.num_workers} workers"
        )
    if isinstance(policy, ErasureHead) and not 0 < policy.wait_for <= delays.num_workers:
        raise ConfigError(f"policy {words!r}: {policy.wait_for} of {delays.num_workers} workers")
    try:
        fixed = simulate(policy, delays, num_gradients)
    except ValueError as error:
        raise ConfigError(f"policy {words!r}: {error}") from error
    made = _sum_up(named(policy), fixed.rounds_R, load_of(policy, delays.num_workers))
    return dataclasses.replace(made, lost=fixed.lost)


def _sum_up(name: str, rounds_R: Floats, load: float, reason: str = "") -> Outcome:
    return Outcome(
        policy=name,
        total_s=float(rounds_R.sum()),
        median_s=float(np.median(rounds_R)),
        longest_s=float(rounds_R.max()),
        load=load,
        reason=reason,
    )


# --- which policy wins where ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """The fastest fixed policy of one regime, and its time over that of uncoded."""

    fixed: float
    straggler_rate: float
    scheme: Scheme
    ratio: float


def regime(
    straggler_rate: float, burst: float, *, slowdown: float = 3.0, outlier_rate: float = 0.0
) -> GilbertElliott:
    """Delays of which a share straggles, for `burst` rounds on average."""
    p_ok = 1 / burst
    p_slow = straggler_rate * p_ok / (1 - straggler_rate)
    return GilbertElliott(p_slow=p_slow, p_ok=p_ok, slowdown=slowdown, outlier_rate=outlier_rate)


def map_regimes(
    fixed: Sequence[float],
    straggler_rates: Sequence[float],
    *,
    burst: float = 2.0,
    num_workers: int = 256,
    num_gradients: int = 150,
    models: int = 4,
) -> list[Cell]:
    """For each share of fixed time and each straggler rate, which policy is the fastest."""
    cells = []
    for column, rate in enumerate(straggler_rates):
        dice = np.random.default_rng(column)
        seconds_RN = regime(rate, burst).draw(num_gradients + 10, num_workers, dice)
        for share in fixed:
            delays = proportional(seconds_RN, 1 / num_workers, share)
            scheme, total_s = fastest(delays, num_gradients, models)
            uncoded_s = simulate(Uncoded(), delays, num_gradients).total_s
            cells.append(Cell(share, rate, scheme, total_s / uncoded_s))
    return cells


def fastest(delays: Delays, num_gradients: int, models: int) -> tuple[Scheme, float]:
    """The fixed policy that is known afterwards to have been the fastest, and its seconds."""

    def total_s(candidate: tuple[Scheme, Minimal]) -> float:
        return simulate(candidate[0], delays, num_gradients, closing=candidate[1]).total_s

    tried = {one: total_s(one) for one in Auto(models=models).candidates(delays.num_workers)}
    best = min(tried, key=lambda one: tried[one])
    return best[0], tried[best]
