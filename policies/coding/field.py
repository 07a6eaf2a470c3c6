"""A C-code in a prime field: integers are coded and decoded without any rounding.

The worker in place w has the number x_w = x_0 + w; x_0 is drawn from a seed. What the holders H of
a part add up of it they multiply with

    b_w = product over the other i in H of x_i / (x_i - x_w)          (Lagrange)

which gives p(0) as the sum of b_w p(x_w) for every polynomial p of lower degree than H has members.
Without the answers of some places S, fewer than H has members, the others are multiplied with

    a_w = p(x_w),  p(x) = product over i in S of (x_i - x) / x_i

which is 0 at S, while p(0) = 1: so each part counts once, whoever is in S. No draw can be bad, no
pattern is undecodable, no coefficient is off. It is the C-code of Wang et al. 2019 with a check
matrix of powers, and the arithmetic of Shamir's shared secrets (1979).

Drawn, and anew for each step, so that a_w b_w may be anything: where two compute a part otherwise,
by however little, what is decoded is mostly far larger than it can be, and that is noticed.

All numbers are integers modulo PRIME, which is above 2^32: a sum within +-(2^31 - 1) is the one
integer there with its remainder. Remainders are taken nearest to 0, so that the product of two, and
a third one beside it, are within an int64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from policies.coding.codes import even_allocation, in_a_circle

PRIME = 2**32 + 15


def centred(number: int) -> int:
    """The remainder modulo PRIME that is nearest to 0."""
    return (number + PRIME // 2) % PRIME - PRIME // 2


def least_workers(num_stragglers: int) -> int:
    """With fewer each would have to compute everything."""
    return num_stragglers + 2


def holders_of(
    speeds: Sequence[float], num_micro_batches: int, num_stragglers: int
) -> list[tuple[int, ...]]:
    """The s + 1 places that compute each micro-batch: the next ones in a circle, by speed.

    Raises:
        ValueError: a speed is not positive, or s + 1 workers do not exist.
    """
    counts = even_allocation(speeds, num_micro_batches, num_stragglers)
    rows = in_a_circle(counts, num_micro_batches, num_stragglers + 1).tolist()
    return [tuple(row) for row in rows]


@lru_cache(maxsize=4096)
def encoding(holders: tuple[int, ...], *, seed: int) -> tuple[int, ...]:
    """What each of these places multiplies with, of a part that they all compute."""
    first = _first(seed)
    numbers = [first + one for one in holders]
    return tuple(
        _quotient(
            _product(other for other in numbers if other != one),
            _product(other - one for other in numbers if other != one),
        )
        for one in numbers
    )


def decoding(num_places: int, missing: Collection[int], *, seed: int) -> tuple[int, ...]:
    """What the answer of each place is multiplied with; 0: it is missing.

    Fewer may be missing than hold each part. The seed is that of `encoding`.
    """
    first = _first(seed)
    numbers = [first + one for one in missing]
    divisor = _product(numbers)
    return tuple(
        _quotient(_product(other - one for other in numbers), divisor)
        for one in range(first, first + num_places)
    )


@lru_cache(maxsize=64)
def _first(seed: int) -> int:
    """The number of place 0; with those of a million places after it none is 0 modulo PRIME."""
    digest = hashlib.sha256(seed.to_bytes(8, "little")).digest()
    return 1 + int.from_bytes(digest[:8], "little") % (PRIME - 2**20)


def _product(numbers: Iterable[int]) -> int:
    product = 1
    for number in numbers:
        product = product * number % PRIME
    return product


def _quotient(number: int, divisor: int) -> int:
    return centred(number * pow(divisor, -1, PRIME))
