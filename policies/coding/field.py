"""A C-code in a prime field: integers are coded and decoded without any rounding.

The worker in place w has the number x_w = 5^(w+1). What the holders H of a part add up of it they
multiply with

    b_w = product over the other i in H of x_i / (x_i - x_w)          (Lagrange)

which gives p(0) as the sum of b_w p(x_w) for every polynomial p of lower degree than H has members.
Without the answers of some places S, fewer than H has members, the others are multiplied with

    a_w = p(x_w),  p(x) = product over i in S of (x_i - x) / x_i

which is 0 at S, while p(0) = 1: so each part counts once, whoever is in S. No draw can be bad, no
pattern is undecodable, no coefficient is off. It is the C-code of Wang et al. 2019 with a check
matrix of powers, and the arithmetic of Shamir's shared secrets (1979).

Powers, so that coefficients are large, whoever the holders are: where two compute a part otherwise,
by however little, what is decoded is far larger than it can be, and that is noticed.

All numbers are integers modulo PRIME, which is above 2^32: a sum within +-(2^31 - 1) is the one
integer there with its remainder. Remainders are taken nearest to 0, so that the product of two, and
a third one beside it, are within an int64.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from math import prod

from policies.coding.codes import even_allocation, in_a_circle

PRIME = 2**32 + 15
MAX_PLACES = 1024
_NUMBERS = tuple(pow(5, place + 1, PRIME) for place in range(MAX_PLACES))


def centred(number: int) -> int:
    """The remainder modulo PRIME that is nearest to 0."""
    return (number + PRIME // 2) % PRIME - PRIME // 2


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
def encoding(holders: tuple[int, ...]) -> tuple[int, ...]:
    """What each of these places multiplies with, of a part that they all compute."""
    numbers = [_NUMBERS[one] for one in holders]
    return tuple(
        _quotient(
            prod(other for other in numbers if other != one),
            prod(other - one for other in numbers if other != one),
        )
        for one in numbers
    )


def decoding(num_places: int, missing: Collection[int]) -> tuple[int, ...]:
    """What the answer of each place is multiplied with; 0: it is missing.

    Fewer may be missing than hold each part.
    """
    numbers = [_NUMBERS[one] for one in missing]
    divisor = prod(numbers)
    return tuple(
        _quotient(prod(other - one for other in numbers), divisor) for one in _NUMBERS[:num_places]
    )


def _quotient(number: int, divisor: int) -> int:
    return centred(number * pow(divisor, -1, PRIME))
