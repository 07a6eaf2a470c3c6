"""Integers through a linear code and back: every bit right, or a refusal with the numbers.

Gradients are fixed-point integers whose magnitudes, over a whole global batch, add up to less than
2^bits. Workers combine them in float64, the decoder combines the answers in float64 and rounds to
the nearest integer. With u = 2^-53, spread and error of `Decoded`, N answers of up to P parts each,
and magnitudes that add up to A, the result is off by no more than

    A (error + u (2 N + 2 P + 4) spread)

(each of two sums rounds once per term and product; Higham, Accuracy and Stability, 3.1; once more
for the error itself, which was computed). At 1/4 or more nothing is decoded. Where one float64 per
number does not hold enough bits, the integers are cut into two *limbs* of 16 bits or three of 11,
combined separately: then A is 2^15 or 2^10 per part, at twice or three times the bytes.

Letters: N workers, A answers, P parts of one worker, L limbs, E elements of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies.coding.codes import Code, Decoded, Floats, Ints, Linear, Repetition, Undecodable

BITS = 31
"""Sums of gradients are below 2^BITS: more is an overflow, and the step is redone."""
MAX_RESIDUE = 0.25
WORD_BITS = 32
MAX_LIMBS = 3
UNIT = 2.0**-53
BLOCK_ELEMENTS = 16_384
"""Decoded at a time: stays in the cache."""
NUM_TRIED = 32
"""Straggler patterns of each kind (in a row, random) that a code is tried with."""


@dataclass(frozen=True, slots=True)
class Inexact:
    """The answers are there, but the integers cannot be recovered for certain."""

    reason: str


@dataclass(frozen=True, slots=True)
class Precision:
    """How a code carries integers: as `num_limbs` float64 each, off by at most `bound`.

    The bound is that of the worst pattern of stragglers that was tried; each decoding is held
    against its own. `num_limbs` is 0 for a repetition: integers stay integers.
    """

    num_limbs: int
    bound: float


def error_bound(code: Linear, decoded: Decoded, num_limbs: int, bits: int = BITS) -> float:
    """By how much a decoded number may be off, before it is rounded to an integer."""
    num_workers, num_parts = code.matrix_NK.shape
    parts_per_worker = int(np.count_nonzero(code.matrix_NK, axis=1).max())
    magnitude = math.ldexp(1, bits)
    if num_limbs > 1:
        limb = limb_bits(num_limbs)
        magnitude = num_parts * math.ldexp(1, limb - 1) + math.ldexp(
            1, bits - limb * (num_limbs - 1)
        )
    terms = 2.0 * num_workers + 2 * parts_per_worker + 4
    return float(magnitude * (decoded.error + UNIT * terms * decoded.spread))


def precision(code: Code, bits: int = BITS) -> Precision:
    """How to carry integers through the code, whose sums are below 2^bits.

    Raises:
        ValueError: a pattern that was tried cannot be decoded, or is off by 1/4 with three limbs.
    """
    if isinstance(code, Repetition):
        return Precision(0, 0.0)
    worst: tuple[float, Decoded, list[int]] | None = None
    for missing in _patterns(code.num_workers, code.num_stragglers):
        there = sorted(set(range(code.num_workers)) - set(missing))
        decoded = code.decode(there)
        if isinstance(decoded, Undecodable):
            raise ValueError(
                f"a code of {code.num_workers} workers for {code.num_stragglers} stragglers cannot "
                f"be decoded in float64: {decoded.reason}; fewer stragglers, or kind frc"
            )
        bound = error_bound(code, decoded, MAX_LIMBS, bits)
        if worst is None or bound > worst[0]:
            worst = bound, decoded, missing
    assert worst is not None
    for num_limbs in range(1, MAX_LIMBS + 1):
        bound = error_bound(code, worst[1], num_limbs, bits)
        if bound < MAX_RESIDUE:
            return Precision(num_limbs, bound)
    raise ValueError(
        f"a code of {code.num_workers} workers for {code.num_stragglers} stragglers is not exact: "
        f"without workers {worst[2]} rounding is amplified {worst[1].spread:.2g} times and the "
        f"coefficients are off by {worst[1].error:.2g}, so with {bits} bits in use a number may be "
        f"off by {bound:.2g}, where {MAX_RESIDUE} is allowed; fewer stragglers, or kind frc"
    )


def _patterns(num_workers: int, num_missing: int) -> Iterator[list[int]]:
    """Missing workers: in a row, which is the worst for cyclic codes, and at random."""
    for first in range(0, num_workers, max(1, num_workers // NUM_TRIED)):
        yield sorted((first + one) % num_workers for one in range(num_missing))
    dice = np.random.default_rng(0)
    for _ in range(NUM_TRIED):
        yield sorted(dice.choice(num_workers, num_missing, replace=False).tolist())


def limb_bits(num_limbs: int) -> int:
    """The bits of each limb but the highest, its sign included."""
    return -(-WORD_BITS // num_limbs)


def split(integers: npt.NDArray[np.integer], num_limbs: int) -> Ints:
    """(..., E) integers as (L, ..., E) limbs, the lowest first; each rounded to nearest."""
    rest = np.asarray(integers, np.int64)
    bits, limbs = limb_bits(num_limbs), []
    for _ in range(num_limbs - 1):
        higher = (rest + (1 << (bits - 1))) >> bits
        limbs.append(rest - (higher << bits))
        rest = higher
    return np.stack([*limbs, rest])


def combine(coefficients_P: Floats, sums_PE: npt.NDArray[np.integer], num_limbs: int) -> Floats:
    """What a worker answers: (L, E) float64, of the integer sums of its parts."""
    combined: Floats = coefficients_P @ split(sums_PE, num_limbs).astype(np.float64)
    return combined


def decode_sum(
    code: Linear,
    decoded: Decoded,
    workers: Sequence[int],
    answers_LAE: Floats,
    bits: int = BITS,
) -> Ints | Inexact:
    """The (E,) integers of the gradient. Answer a, which may have come at any time, is of
    `workers[a]`; all that the decoder wants must be there.

    Reads every answer once, as adding them up would; then rounds each element once.
    """
    num_limbs, _, num_elements = answers_LAE.shape
    bound = error_bound(code, decoded, num_limbs, bits)
    if bound >= MAX_RESIDUE:
        return Inexact(
            f"a number may be off by {bound:.2g} with these answers, with {bits} bits in use "
            f"as {num_limbs} float64; {MAX_RESIDUE} is allowed"
        )
    absent = set(decoded.workers) - set(workers)
    if absent:
        return Inexact(f"the answers of workers {sorted(absent)} are wanted and not there")
    coefficients_A = decoded.coefficients_N[list(workers)]
    shift = math.ldexp(1, limb_bits(num_limbs))
    totals_E = np.empty(num_elements, np.int64)
    residue_E = np.empty(min(BLOCK_ELEMENTS, num_elements))
    for low in range(0, num_elements, BLOCK_ELEMENTS):
        block = slice(low, low + BLOCK_ELEMENTS)
        total_E = np.zeros(len(totals_E[block]))
        for answers_AE in answers_LAE[::-1]:  # the highest limb first; all sums are exact
            sums_E = coefficients_A @ answers_AE[:, block]
            rounded_E = np.rint(sums_E)
            rest_E = np.subtract(sums_E, rounded_E, out=residue_E[: len(sums_E)])
            residue = max(float(rest_E.max()), -float(rest_E.min()))
            if not residue <= MAX_RESIDUE:  # NaN too
                return Inexact(f"a decoded number lies {residue:.3g} from the nearest integer")
            total_E *= shift
            total_E += rounded_E
        totals_E[block] = total_E
    return totals_E
