"""How long workers take: recorded, fitted, generated or drawn again, at any load.

A worker's answer to round r takes `fixed + rate * load` seconds, where load is the share of the
global batch that it computes. Two models say how the two follow from what was seen at one load:

    additive       the delay comes on top: rate is one number for all (what the authors' rule uses)
    proportional   a slow worker is slow in all it does; a share `fixed` (f) of its time stays

Randomness comes from the caller's generator. Letters: R rounds, N workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.coding.codes import Bools, Floats

SLOW = 2.0
"""Times the fastest of a round: from there on a worker straggles (as with the authors' mu = 1)."""


@dataclass(frozen=True, slots=True, eq=False)
class Delays:
    """Seconds by round and worker; rounds after the last begin again with the first."""

    fixed_RN: Floats
    rate_RN: Floats

    @property
    def num_rounds(self) -> int:
        return len(self.fixed_RN)

    @property
    def num_workers(self) -> int:
        return int(self.fixed_RN.shape[1])

    def at(self, round: int, load: float | Floats) -> Floats:
        """Seconds that each worker takes in a round, at its load."""
        row = round % self.num_rounds
        seconds_N: Floats = self.fixed_RN[row] + self.rate_RN[row] * load
        return seconds_N

    def again(self, round: int, load: float) -> Floats:
        """Another sample for the same round: what a second try would take each worker."""
        return self.at(round + max(1, self.num_rounds // 2), load)


def additive(seconds_RN: Floats, load: float, rate_s: float) -> Delays:
    """Seen at one load; a whole batch more takes every worker `rate_s` seconds more (alpha)."""
    rate_RN = np.broadcast_to(np.float64(rate_s), seconds_RN.shape)
    return Delays(seconds_RN - rate_s * load, rate_RN)


def proportional(seconds_RN: Floats, load: float, fixed: float) -> Delays:
    """Seen at one load, of which a share `fixed` (f) does not shrink with the load."""
    return Delays(seconds_RN * fixed, seconds_RN * (1 - fixed) / load)


# --- drawn again ----------------------------------------------------------------------------------


def bootstrap(
    samples: Sequence[Floats], num_rounds: int, dice: np.random.Generator, block: int = 5
) -> Floats:
    """Rounds drawn in blocks of neighbours, from one sample (R, N) at a time; circular."""
    rows = []
    for _ in range(-(-num_rounds // block)):
        sample_RN = samples[int(dice.integers(len(samples)))]
        first = int(dice.integers(len(sample_RN)))
        rows.append(sample_RN[(first + np.arange(min(block, len(sample_RN)))) % len(sample_RN)])
    while sum(len(one) for one in rows) < num_rounds:
        rows.append(rows[len(rows) % 7 % len(rows)])
    return np.concatenate(rows)[:num_rounds]


def shuffled(sample_RN: Floats, num_rounds: int, dice: np.random.Generator) -> Floats:
    """The sample again and again, each time with other workers at other places.

    What a worker does from round to round stays together, whoever it is.
    """
    num = -(-num_rounds // len(sample_RN))
    parts = [sample_RN[:, dice.permutation(sample_RN.shape[1])] for _ in range(num)]
    return np.concatenate(parts)[:num_rounds]


# --- generated ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GilbertElliott:
    """Each worker is a chain of two states; slow ones take longer, some once in a while very long.

    A delay is `typical_s` (1 + a gamma sample of mean `jitter`) in the ok state, `slowdown` times
    that on average in the slow one. The defaults are fitted to 256 workers on AWS Lambda.
    """

    p_slow: float = 0.048
    """From ok to slow, from round to round."""
    p_ok: float = 0.901
    """From slow to ok; a burst lasts 1 / p_ok rounds on average."""
    typical_s: float = 0.55
    jitter: float = 0.17
    slowdown: float = 2.2
    outlier_rate: float = 0.0
    """Share of rounds in which a few workers take `outlier_s`."""
    outlier_s: float = 30.0

    @property
    def straggler_rate(self) -> float:
        return self.p_slow / (self.p_slow + self.p_ok) if self.p_slow else 0.0

    def draw(self, num_rounds: int, num_workers: int, dice: np.random.Generator) -> Floats:
        """Seconds (R, N)."""
        slow_RN = chains(self, num_rounds, num_workers, dice)
        jitter_RN = dice.gamma(4.0, self.jitter / 4.0, slow_RN.shape)
        extra_RN = 1 + (self.slowdown - 1) * dice.gamma(4.0, 0.25, slow_RN.shape)
        seconds_RN = self.typical_s * (1 + jitter_RN) * np.where(slow_RN, extra_RN, 1.0)
        for row in np.flatnonzero(dice.random(num_rounds) < self.outlier_rate):
            struck = dice.choice(num_workers, min(num_workers, 1 + int(dice.integers(6))), False)
            seconds_RN[row, struck] = self.outlier_s * dice.uniform(0.8, 1.3, len(struck))
        return np.asarray(seconds_RN)


def chains(
    model: GilbertElliott, num_rounds: int, num_workers: int, dice: np.random.Generator
) -> Bools:
    """Who is slow (R, N), from the stationary state on."""
    slow_RN = np.zeros((num_rounds, num_workers), np.bool_)
    now_N = dice.random(num_workers) < model.straggler_rate
    for row in range(num_rounds):
        slow_RN[row] = now_N
        turns_N = dice.random(num_workers)
        now_N = np.where(now_N, turns_N >= model.p_ok, turns_N < model.p_slow)
    return slow_RN


def fit(seconds_RN: Floats, slow: float = SLOW) -> GilbertElliott:
    """The chain that fits recorded delays: a worker is slow at `slow` times the round's fastest.

    Delays of ten times the median are outliers, not stragglers.
    """
    median_s = float(np.median(seconds_RN))
    is_outlier_RN = seconds_RN > 10 * median_s
    fastest_R1 = seconds_RN.min(axis=1, keepdims=True)
    slow_RN = (seconds_RN > slow * fastest_R1) & ~is_outlier_RN
    before, after = slow_RN[:-1], slow_RN[1:]
    ok_s = seconds_RN[~slow_RN & ~is_outlier_RN]
    typical_s = float(np.median(fastest_R1))
    jitter = float(ok_s.mean()) / typical_s - 1
    slow_s = seconds_RN[slow_RN]
    slowdown = float(slow_s.mean() / ok_s.mean()) if len(slow_s) else 1.0
    outliers = seconds_RN[is_outlier_RN]
    return GilbertElliott(
        p_slow=float((~before & after).sum() / max(1, (~before).sum())),
        p_ok=float((before & ~after).sum() / max(1, before.sum())) if before.any() else 1.0,
        typical_s=typical_s,
        jitter=jitter,
        slowdown=slowdown,
        outlier_rate=float(is_outlier_RN.any(axis=1).mean()),
        outlier_s=float(outliers.mean()) if len(outliers) else 0.0,
    )
