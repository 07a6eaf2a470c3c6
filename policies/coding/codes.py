"""Codes of one round: a matrix says what each worker adds up, a decoder who makes up the whole.

Letters: N workers, K parts, S rows of a check matrix. Row w of `matrix_NK` holds the coefficients
with which worker w adds up the parts that it computes; 0: it does not compute that part. A decoder
finds a row vector `a` with `a @ matrix = 1` that is 0 for who has not answered, or says why not.

Sources: Tandon et al. 2017 (FRC, CRC), Wang et al. 2019 (C-code), Raviv et al. 2018 (cyclic MDS).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

DECODED = 1e-6
"""`a @ matrix` may differ from 1 by so much; what that costs in bits is judged by `exact`."""
NO_WEIGHT = 1e-12
"""What rounding leaves of a combination that does not exist."""
NUM_DRAWS = 20
"""Random codes that are drawn before giving up: a bad draw is rare."""
NUM_LISTED = 8
"""Workers that a reason names."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """`coefficients_N` times the workers' answers add up to the gradient; 0: not needed.

    `error` is the largest |a @ matrix - 1| over the parts, `spread` the largest sum of
    |a_i matrix_ij| over the workers i: by so much rounding of the answers is amplified.
    """

    coefficients_N: Floats
    error: float
    spread: float

    @property
    def workers(self) -> list[int]:
        """Whose answers are needed."""
        return [int(one) for one in np.flatnonzero(self.coefficients_N)]


@dataclass(frozen=True, slots=True)
class Undecodable:
    """The answers do not suffice."""

    reason: str


def _listed(workers: Collection[int]) -> str:
    names = [str(one) for one in list(workers)[:NUM_LISTED]]
    return ", ".join([*names, "..."] if len(workers) > NUM_LISTED else names)


@dataclass(frozen=True, eq=False)
class Repetition:
    """FRC: all workers of a group compute the same part, one answer of each group suffices.

    Coefficients are 0 and 1: sums of integers stay integers, and no decoding is needed. Up to s
    workers may be missing, whoever they are; more, as long as every group answers.
    """

    groups: tuple[tuple[int, ...], ...]
    num_stragglers: int

    @property
    def num_workers(self) -> int:
        return sum(len(group) for group in self.groups)

    @cached_property
    def _by_group(self) -> tuple[Ints, Ints]:
        """The workers, group after group, and where each group begins."""
        sizes = [len(group) for group in self.groups]
        return np.concatenate(self.groups), np.cumsum([0, *sizes[:-1]])

    def covers(self, answered_N: Bools) -> bool:
        """Whether every group has answered."""
        order_N, starts_G = self._by_group
        return bool(np.logical_or.reduceat(answered_N[order_N], starts_G).all())

    def covered_s(self, ends_N: Floats) -> float:
        """When every group has answered, if its workers answer at these times."""
        order_N, starts_G = self._by_group
        return float(np.minimum.reduceat(ends_N[order_N], starts_G).max())

    def row(self, worker: int) -> Floats:
        """The coefficients with which a worker adds up the parts."""
        return np.array([float(worker in group) for group in self.groups])

    def decode(self, answered: Collection[int]) -> Decoded | Undecodable:
        """The lowest worker of each group that has answered."""
        there = set(answered)
        coefficients_N = np.zeros(self.num_workers)
        for part, group in enumerate(self.groups):
            first = next((worker for worker in group if worker in there), None)
            if first is None:
                return Undecodable(f"part {part}: none of workers {_listed(group)} has answered")
            coefficients_N[first] = 1
        return Decoded(coefficients_N, error=0.0, spread=1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A code with real coefficients; any `num_stragglers` workers may be missing.

    With `check_SN` (a C-code: check @ matrix = 1) decoding is one small factorization, without it
    least squares over all answers.
    """

    matrix_NK: Floats
    num_stragglers: int
    check_SN: Floats | None = None

    @property
    def num_workers(self) -> int:
        return len(self.matrix_NK)

    def row(self, worker: int) -> Floats:
        """The coefficients with which a worker adds up the parts."""
        row_K: Floats = self.matrix_NK[worker]
        return row_K

    def decode(self, answered: Collection[int]) -> Decoded | Undecodable:
        """Coefficients in float64."""
        is_missing_N = np.ones(self.num_workers, np.bool_)
        is_missing_N[list(answered)] = False
        num_missing = int(is_missing_N.sum())
        names = _listed(np.flatnonzero(is_missing_N).tolist())
        if num_missing > self.num_stragglers:
            return Undecodable(
                f"{num_missing} of {self.num_workers} workers have not answered ({names}); "
                f"the code allows {self.num_stragglers}"
            )
        if self.check_SN is not None:
            coefficients_N = _solve_check(self.check_SN, is_missing_N)
        else:
            coefficients_N = _solve_least_squares(self.matrix_NK, ~is_missing_N)
        sums_K = coefficients_N @ self.matrix_NK
        error = float(np.abs(sums_K - 1).max())
        if not error <= DECODED:  # NaN too
            return Undecodable(f"without {names} the sum misses a part by {error:.2g}")
        spread = float((np.abs(coefficients_N) @ np.abs(self.matrix_NK)).max())
        return Decoded(coefficients_N, error, spread)


Code = Repetition | Linear


def _solve_check(check_SN: Floats, is_missing_N: Bools) -> Floats:
    """A combination of the check's rows that is 0 at who is missing, scaled to add up to 1."""
    missing_SM = check_SN[:, is_missing_N]
    ones_S = np.ones(len(check_SN))
    basis_SM, _ = np.linalg.qr(missing_SM)
    weights_S = ones_S - basis_SM @ (basis_SM.T @ ones_S)
    weights_S -= basis_SM @ (basis_SM.T @ weights_S)  # once more: what rounding has left
    total = weights_S.sum()
    if total <= NO_WEIGHT:  # the missing columns span the ones: no such combination
        return np.zeros(len(is_missing_N))
    coefficients_N: Floats = weights_S @ check_SN / total
    coefficients_N[is_missing_N] = 0
    return coefficients_N


def _solve_least_squares(matrix_NK: Floats, is_there_N: Bools) -> Floats:
    """The shortest solution, refined once."""
    there_KA = matrix_NK[is_there_N].T
    ones_K = np.ones(matrix_NK.shape[1])
    found_A = np.linalg.lstsq(there_KA, ones_K, rcond=None)[0]
    found_A += np.linalg.lstsq(there_KA, ones_K - there_KA @ found_A, rcond=None)[0]
    coefficients_N = np.zeros(len(matrix_NK))
    coefficients_N[is_there_N] = found_A
    return coefficients_N


def _check_counts(num_workers: int, num_stragglers: int) -> None:
    if not 0 <= num_stragglers < num_workers:
        raise ValueError(
            f"{num_stragglers} stragglers of {num_workers} workers: "
            f"it must be 0 to {num_workers - 1}"
        )


def frc(num_workers: int, num_stragglers: int, hosts: Sequence[str] | None = None) -> Repetition:
    """As many groups as have at least s+1 workers each, their sizes as even as can be.

    Args:
        hosts: where each worker runs: the members of a group are put on different hosts as long as
            no host has more workers than there are groups. By default groups are drawn by lot,
            always the same: neighbours straggle together. On recorded delays of 256 workers pairs
            of neighbours took 20 to 160 % longer than pairs drawn by lot.

    Raises:
        ValueError: `num_stragglers` is not in 0..N-1.
    """
    _check_counts(num_workers, num_stragglers)
    num_groups = num_workers // (num_stragglers + 1)
    order = np.random.default_rng(num_workers).permutation(num_workers).tolist()
    if hosts is not None:
        order = sorted(range(num_workers), key=lambda worker: (hosts[worker], worker))
    groups = tuple(tuple(sorted(order[first::num_groups])) for first in range(num_groups))
    return Repetition(groups, num_stragglers)


def even_allocation(speeds: Sequence[float], num_parts: int, num_stragglers: int) -> list[int]:
    """How many parts each worker computes: in proportion to its speed, none more than all.

    They add up to K (s+1); remainders go to the largest fractions, then to the lower workers.

    Raises:
        ValueError: a speed is not positive, or s+1 workers do not exist.
    """
    _check_counts(len(speeds), num_stragglers)
    if min(speeds) <= 0:
        raise ValueError(f"speeds must be > 0, not {min(speeds)}")
    counts_N = np.zeros(len(speeds), np.int64)
    speeds_N = np.asarray(speeds, np.float64)
    is_open_N = np.ones(len(speeds), np.bool_)
    left = num_parts * (num_stragglers + 1)
    while True:  # who would get more than all parts gets all; the others share the rest
        wanted_N = np.where(is_open_N, left * speeds_N / speeds_N[is_open_N].sum(), 0)
        is_full_N = is_open_N & (wanted_N >= num_parts)
        if not is_full_N.any():
            break
        counts_N[is_full_N] = num_parts
        left -= num_parts * int(is_full_N.sum())
        is_open_N &= ~is_full_N
        if not left:
            return [int(one) for one in counts_N]
    counts_N += np.floor(wanted_N + DECODED).astype(np.int64)
    rest = num_parts * (num_stragglers + 1) - int(counts_N.sum())
    fractions_N = np.where(is_open_N, wanted_N - np.floor(wanted_N + DECODED), -1)
    counts_N[np.argsort(-fractions_N, kind="stable")[:rest]] += 1
    return [int(one) for one in counts_N]


def c_code(num_stragglers: int, counts: Sequence[int], num_parts: int, seed: int = 0) -> Linear:
    """Heterogeneity-aware: worker w computes `counts[w]` parts, the next ones in a circle.

    Every part has s+1 holders. Column j of the matrix solves check[:, holders] b = 1.

    Raises:
        ValueError: the counts do not add up to K (s+1), or one is more than K.
    """
    _check_counts(len(counts), num_stragglers)
    copies = num_stragglers + 1
    if sum(counts) != num_parts * copies or max(counts) > num_parts:
        raise ValueError(
            f"{num_parts} parts for {num_stragglers} stragglers need counts that add up to "
            f"{num_parts * copies}, none above {num_parts}; they add up to {sum(counts)}, "
            f"the largest is {max(counts)}"
        )
    holders_KC = in_a_circle(counts, num_parts, copies)
    return _mildest(
        lambda dice: check_code(dice.standard_normal((copies, len(counts))), holders_KC), seed
    )


def in_a_circle(counts: Sequence[int], num_parts: int, copies: int) -> Ints:
    """(K, copies): who computes each part, if each takes so many, the next ones in a circle."""
    holder_of = np.repeat(np.arange(len(counts)), counts)  # place in the circle: worker
    return np.stack([holder_of[turn * num_parts :][:num_parts] for turn in range(copies)], 1)


def _mildest(draw: Callable[[np.random.Generator], Linear], seed: int) -> Linear:
    """Of some random codes the one with the smallest coefficients: they amplify rounding."""
    dice = np.random.default_rng(seed)
    return min(
        (draw(dice) for _ in range(NUM_DRAWS)),
        key=lambda code: float(np.abs(code.matrix_NK).max()),
    )


def check_code(check_SN: Floats, holders_KC: Ints) -> Linear:
    """The code of a check matrix; row k of `holders_KC` names the s+1 workers that hold part k."""
    copies, num_workers = check_SN.shape
    columns_KCS = check_SN.T[holders_KC].transpose(0, 2, 1)
    solved_KC = np.linalg.solve(columns_KCS, np.ones((len(holders_KC), copies, 1)))[:, :, 0]
    matrix_NK = np.zeros((num_workers, len(holders_KC)))
    matrix_NK[holders_KC, np.arange(len(holders_KC))[:, None]] = solved_KC
    return Linear(matrix_NK, copies - 1, check_SN)


def cyclic_c_code(num_workers: int, num_stragglers: int, seed: int = 0) -> Linear:
    """The C-code of equal workers: worker i computes parts i to i+s of n, in a circle."""
    _check_counts(num_workers, num_stragglers)
    parts_N = np.arange(num_workers)
    holders_KC = (parts_N[:, None] - np.arange(num_stragglers + 1)) % num_workers
    shape = num_stragglers + 1, num_workers
    return _mildest(lambda dice: check_code(dice.standard_normal(shape), holders_KC), seed)


def crc(num_workers: int, num_stragglers: int, seed: int = 0) -> Linear:
    """Cyclic repetition: worker i computes parts i to i+s of n, in a circle."""
    _check_counts(num_workers, num_stragglers)

    def draw(dice: np.random.Generator) -> Linear:
        null_SN = dice.standard_normal((num_stragglers, num_workers))
        null_SN[:, -1] = -null_SN[:, :-1].sum(axis=1)
        return crc_of(null_SN)

    return _mildest(draw, seed)


def crc_of(null_SN: Floats) -> Linear:
    """The CRC of a matrix whose rows add up to 0: B[i,i] = 1, B[i,i+1..i+s] = -H_i+1..^-1 H_i."""
    num_stragglers, num_workers = null_SN.shape
    rows_N = np.arange(num_workers)
    next_NS = (rows_N[:, None] + 1 + np.arange(num_stragglers)) % num_workers
    columns_NSS = null_SN.T[next_NS].transpose(0, 2, 1)
    matrix_NK = np.eye(num_workers)
    if num_stragglers:
        solved_NS = np.linalg.solve(columns_NSS, null_SN.T[:, :, None])[:, :, 0]
        matrix_NK[rows_N[:, None], next_NS] = -solved_NS
    return Linear(matrix_NK, num_stragglers)


def cyclic_mds(num_workers: int, num_stragglers: int) -> Linear:
    """A circulant of the polynomial with s consecutive n-th roots of 1 around -1; no randomness.

    Contiguous stragglers make it nearly singular at large n: `exact` refuses it there.

    Raises:
        ValueError: n - s is even: the polynomial would not be real.
    """
    _check_counts(num_workers, num_stragglers)
    if (num_workers - num_stragglers) % 2 == 0:
        raise ValueError(
            f"a cyclic MDS code is real only if n - s is odd: n={num_workers}, s={num_stragglers}"
        )
    first = (num_workers - num_stragglers + 1) // 2
    turns_S = np.arange(first, first + num_stragglers) / num_workers
    generator_S = np.atleast_1d(np.poly(np.exp(2j * np.pi * turns_S))).real
    rows_N = np.arange(num_workers)
    matrix_NK = np.zeros((num_workers, num_workers))
    for place, value in enumerate(generator_S):
        matrix_NK[rows_N, (rows_N + place) % num_workers] = value
    return Linear(matrix_NK, num_stragglers)
