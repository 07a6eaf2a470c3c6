"""How long a run would take under a scheme: rounds in virtual time over given delays.

A scheme is uncoded, speculation, a code of one round, or a sequential one; `closing` says when a
round ends. The same scheme classes run on real workers. Letters: R rounds, N workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from policies.coding.codes import Floats, frc
from policies.coding.delays import Delays
from policies.coding.m_sgc import MSgc
from policies.coding.sr_sgc import SrSgc
from policies.dropping import MEMORY, DropCompute, ErasureHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncoded:
    """Each worker computes its own share, a round waits for all."""

    kind: Literal["uncoded"] = "uncoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What is out at `factor` times the median is computed by idle workers too."""

    factor: float = 1.5
    kind: Literal["speculation"] = "speculation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frc:
    """Repetition: s+1 workers compute each part, a round ends when every part is there."""

    stragglers: int
    kind: Literal["frc"] = "frc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A C-code or CRC: a round ends when all but s workers have answered."""

    stragglers: int
    kind: Literal["c_code", "crc"] = "c_code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Minimal:
    """When a round of a sequential scheme ends.

    At (1 + `patience`) times the fastest, or when all have answered; if not everything could be
    decoded in time then, with the first answer after which it can.
    """

    patience: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropping:
    """DropCompute: even shares of `num_each` micro-batches, nobody helps, deadlines. Inexact."""

    num_each: int = 4
    deadline_s: float | None = None
    kind: Literal["drop_compute"] = "drop_compute"


OneRound = Uncoded | Speculation | Frc | Coded | Dropping | ErasureHead
Sequential = SrSgc | MSgc
Scheme = OneRound | Sequential


def load_of(scheme: Scheme, num_workers: int) -> float:
    """The share of a global batch that a worker computes in one round, at most."""
    match scheme:
        case Frc() | ErasureHead():
            return 1 / (num_workers // (scheme.stragglers + 1))
        case Coded():
            return (scheme.stragglers + 1) / num_workers
        case SrSgc() | MSgc():
            return scheme.load(num_workers)
        case _:
            return 1 / num_workers


def delay_of(scheme: Scheme) -> int:
    """Rounds between a gradient's start and its decoding: so many models more take turns."""
    return scheme.delay if isinstance(scheme, SrSgc | MSgc) else 0


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Seconds of each round; the rounds after the last gradient began are included.

    `seconds_RN` is what was seen of the workers at their loads: infinite for those whose work was
    abandoned, NaN for those that had none. `lost_R` is the share of the batch that was dropped.
    """

    rounds_R: Floats
    loads_RN: Floats
    seconds_RN: Floats
    lost_R: Floats = field(default_factory=lambda: np.zeros(0))

    @property
    def lost(self) -> float:
        """The share of all batches that was dropped."""
        return float(self.lost_R.mean()) if len(self.lost_R) else 0.0

    @property
    def total_s(self) -> float:
        return float(self.rounds_R.sum())


def simulate(
    scheme: Scheme,
    delays: Delays,
    num_gradients: int,
    *,
    closing: Minimal | None = None,
    cancels: bool = True,
    first_round: int = 0,
) -> Run:
    """Run a scheme over the delays.

    Args:
        cancels: late work is abandoned when its round ends; else a worker finishes it first, and
            starts late in the next round.
        first_round: of the delays.

    Raises:
        ValueError: the scheme does not fit the number of workers.
    """
    if isinstance(scheme, SrSgc | MSgc):
        return _sequential(
            scheme, delays, num_gradients, closing or Minimal(), cancels, first_round
        )
    close = _closing_of(scheme, delays)
    load = load_of(scheme, delays.num_workers)
    run = _empty(num_gradients, delays.num_workers)
    late_N = np.zeros(delays.num_workers)
    for row in range(num_gradients):
        ends_N = late_N + delays.at(first_round + row, load)
        end_s, run.lost_R[row] = close(ends_N, first_round + row)
        run.rounds_R[row], run.loads_RN[row] = end_s, load
        run.seconds_RN[row] = np.where(ends_N <= end_s, ends_N, np.inf) if cancels else ends_N
        if not cancels:
            late_N = np.maximum(0.0, ends_N - end_s)
    return run


def _empty(num_rounds: int, num_workers: int) -> Run:
    shape = num_rounds, num_workers
    return Run(np.zeros(num_rounds), np.zeros(shape), np.full(shape, np.nan), np.zeros(num_rounds))


def _closing_of(scheme: OneRound, delays: Delays) -> Callable[[Floats, int], tuple[float, float]]:
    """When a round ends and what share is lost, from the times at which workers would answer."""
    num_workers = delays.num_workers
    match scheme:
        case Uncoded():
            return lambda ends_N, _: (float(ends_N.max()), 0.0)
        case Frc():
            code = frc(num_workers, scheme.stragglers)
            return lambda ends_N, _: (code.covered_s(ends_N), 0.0)
        case Coded():
            last = num_workers - scheme.stragglers - 1
            return lambda ends_N, _: (float(np.partition(ends_N, last)[last]), 0.0)
        case Speculation():
            load, factor = 1 / num_workers, scheme.factor
            return lambda ends_N, row: (speculated(ends_N, delays.again(row, load), factor), 0.0)
        case Dropping():
            return _deadlines(scheme, delays)
        case ErasureHead():
            groups = frc(num_workers, scheme.stragglers).groups
            return lambda ends_N, _: _erased(ends_N, groups, scheme.wait_for)


def _erased(ends_N: Floats, groups: Sequence[Sequence[int]], wait_for: int) -> tuple[float, float]:
    """After the first `wait_for` workers, or once all groups have answered; which have not."""
    firsts_G = np.array([ends_N[list(group)].min() for group in groups])
    end_s = min(float(np.partition(ends_N, wait_for - 1)[wait_for - 1]), float(firsts_G.max()))
    return end_s, float(np.mean(firsts_G > end_s))


def _deadlines(scheme: Dropping, delays: Delays) -> Callable[[Floats, int], tuple[float, float]]:
    """Rounds that set their deadline by those before, as jobs do."""
    policy = DropCompute(deadline_s=scheme.deadline_s)
    shares_J = np.arange(1, scheme.num_each + 1) / scheme.num_each
    load = 1 / delays.num_workers
    seen: deque[list[float]] = deque(maxlen=MEMORY)
    limit_s, num_since = np.inf, 0

    def close(ends_N: Floats, row: int) -> tuple[float, float]:
        nonlocal limit_s, num_since
        late_N = ends_N - delays.at(row, load)
        grants = np.concatenate([late_N + delays.at(row, load * share) for share in shares_J])
        num_since += 1
        if policy.measures(len(seen), num_since - 1):
            seen.append(grants.tolist())
            limit_s, num_since = np.nan, 0
            return float(grants.max()), 0.0
        if np.isnan(limit_s) or scheme.deadline_s is not None:
            limit_s = policy.decide(seen, 0.0).seconds
        end_s = float(np.clip(limit_s, grants.min(), grants.max()))
        return end_s, float(np.mean(grants > end_s))

    return close


def speculated(ends_N: Floats, again_N: Floats, factor: float) -> float:
    """When all is done, if at `factor` times the median idle workers take what is still out.

    The first to have finished take what is out, each one thing; who is out itself takes nothing.
    """
    begin_s = factor * float(np.median(ends_N))
    out = np.flatnonzero(ends_N > begin_s)
    if not len(out):
        return float(ends_N.max())
    helpers = np.argsort(ends_N, kind="stable")[: len(out)]
    begins_H = np.maximum(begin_s, ends_N[helpers])
    return float(np.minimum(ends_N[out], begins_H + again_N[helpers]).max())


def _sequential(
    scheme: Sequential,
    delays: Delays,
    num_gradients: int,
    closing: Minimal,
    cancels: bool,
    first_round: int,
) -> Run:
    rounds = scheme.begin(delays.num_workers, num_gradients)
    run = _empty(rounds.num_rounds, delays.num_workers)
    late_N = np.zeros(delays.num_workers)
    for row in range(rounds.num_rounds):
        loads_N = rounds.loads()
        busy_N = loads_N > 0
        if not busy_N.any():  # nothing is left to do
            rounds.close(~busy_N)
            continue
        ends_N = np.where(busy_N, late_N + delays.at(first_round + row, loads_N), 0.0)
        first_s = float(ends_N[busy_N].min())
        end_s = min((1 + closing.patience) * first_s, float(ends_N.max()))
        if not rounds.allows(ends_N <= end_s):
            end_s = _earliest(np.sort(ends_N[ends_N > end_s]), ends_N, rounds.allows)
        rounds.close(ends_N <= end_s)
        run.rounds_R[row], run.loads_RN[row] = end_s, loads_N
        run.seconds_RN[row, busy_N] = np.where(ends_N <= end_s, ends_N, np.inf)[busy_N]
        if not cancels:
            late_N = np.maximum(0.0, ends_N - end_s)
    return run


def _earliest(later: Floats, ends_N: Floats, allows: Callable[..., bool]) -> float:
    """The first of these times at which the round may end; it may at the last."""
    low, high = 0, len(later) - 1
    while low < high:
        middle = (low + high) // 2
        if allows(ends_N <= later[middle]):
            high = middle
        else:
            low = middle + 1
    return float(later[low])
