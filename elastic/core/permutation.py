"""Stateless pseudo-random permutation of range(num): the shuffle without an index array.

A Feistel network is a bijection on 2**bits numbers whatever its round function is; numbers that
land outside range(num) are sent through it again until they land inside (cycle walking), which
keeps it a bijection (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
It must never keep state, and its values must never change: runs are reproduced by them.
This is a shuffle, not encryption.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

NUM_ROUNDS = 6
MAX_NUM = 2**62  # the largest even number of bits that fits an int64

# The finaliser of splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
# Generators", OOPSLA 2014); its last shift is dropped, since only the top bits are used.
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFT_1, _SHIFT_2 = 30, 27
_MASK_64 = 2**64 - 1

# Below this many positions Python's integers are faster than numpy's calls: 2 positions take
# 25 us instead of 160, and a worker asks for one micro-batch at a time. Same values either way.
FEW_POSITIONS = 24


def derive_key(*parts: int | str) -> int:
    """Hash `parts` to a 64-bit key. Parts of other types, number or order give another key."""
    hasher = blake2b(digest_size=8)
    for part in parts:
        text = part.encode() if isinstance(part, str) else b"%d" % part
        kind = b"s" if isinstance(part, str) else b"i"
        hasher.update(b"%b%d:%b" % (kind, len(text), text))
    return int.from_bytes(hasher.digest(), "little")


def permute(positions: Int64Array, num: int, key: int) -> Int64Array:
    """Where each of `positions` goes under the permutation of range(num) that `key` names.

    The result is a new array of the same shape. Time grows with the number of positions only:
    under four passes on average for each.

    Raises:
        ValueError: `num` is not in 1..MAX_NUM, or a position is not in range(num).
    """
    if not 1 <= num <= MAX_NUM:
        raise ValueError(f"num is {num}, must be in 1..{MAX_NUM}")
    start = np.asarray(positions, dtype=np.int64)
    if start.size and not (start.min() >= 0 and start.max() < num):
        raise ValueError(f"positions {start.min()}..{start.max()} are not all in range({num})")
    num_half_bits = max(1, ((num - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(key)
    if start.size <= FEW_POSITIONS:
        few = [_walk_one(at, num, num_half_bits, round_keys) for at in start.reshape(-1).tolist()]
        return np.array(few, dtype=np.int64).reshape(start.shape)
    return _walk_many(start.reshape(-1), num, num_half_bits, round_keys).reshape(start.shape)


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(derive_key(key, index) for index in range(NUM_ROUNDS))


def _walk_one(number: int, num: int, num_half_bits: int, round_keys: tuple[int, ...]) -> int:
    """`_walk_many` for one number: the same function in Python's integers."""
    keep_top = 64 - num_half_bits
    half_mask = (1 << num_half_bits) - 1
    while True:
        left, right = number >> num_half_bits, number & half_mask
        for round_key in round_keys:
            mixed = (right + round_key) & _MASK_64
            mixed = ((mixed ^ (mixed >> _SHIFT_1)) * _MIX_1) & _MASK_64
            mixed = ((mixed ^ (mixed >> _SHIFT_2)) * _MIX_2) & _MASK_64
            left, right = right, left ^ (mixed >> keep_top)
        number = (left << num_half_bits) | right
        if number < num:
            return number


def _walk_many(
    start: Int64Array, num: int, num_half_bits: int, round_keys: tuple[int, ...]
) -> Int64Array:
    """Send every number through the network until it is below `num`."""
    walked = _feistel(start.astype(np.uint64), num_half_bits, round_keys)
    outside = np.flatnonzero(walked >= num)
    while outside.size:
        again = _feistel(walked[outside], num_half_bits, round_keys)
        walked[outside] = again
        outside = outside[again >= num]
    return walked.astype(np.int64)


def _feistel(numbers: UInt64Array, num_half_bits: int, round_keys: tuple[int, ...]) -> UInt64Array:
    """One pass: a bijection on 2**(2 * num_half_bits) numbers."""
    half, keep_top = np.uint64(num_half_bits), np.uint64(64 - num_half_bits)
    left, right = numbers >> half, numbers & np.uint64((1 << num_half_bits) - 1)
    for round_key in round_keys:
        mixed = right + np.uint64(round_key)  # unsigned arrays wrap, silently and as wanted
        mixed ^= mixed >> np.uint64(_SHIFT_1)
        mixed *= np.uint64(_MIX_1)
        mixed ^= mixed >> np.uint64(_SHIFT_2)
        mixed *= np.uint64(_MIX_2)
        mixed >>= keep_top
        mixed ^= left
        left, right = right, mixed
    return (left << half) | right
