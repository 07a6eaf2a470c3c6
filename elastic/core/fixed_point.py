"""Exact sums: a gradient is rounded once, to fixed point, and integers add in any order.

`q = round(g * 2**k)` as int32, one exponent k per chunk. Every micro-batch reports per chunk
`max|g|`, from which `a = round(max|g| * 2**k)` bounds its q: rounding is monotone and scaling by
a power of two is exact. The step overflows iff the a of all micro-batches add up to more than
2**31 - 1 for some chunk, which bounds every partial sum and does not depend on who computed what.

Coded sums are int64: each q times a coefficient, modulo a prime above 2**32, from which the one
right sum is decoded without a rounding: see `policies.coding.field`.

Legend: M micro-batches, C chunks, N elements. Nothing here depends on an order of summation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from elastic.core.errors import DecodingError
from elastic.core.layout import Layout, Piece
from policies.coding.field import PRIME

LIMIT = 2**31 - 1
HEADROOM_BITS = 3
TARGET_BITS = 31 - HEADROOM_BITS
MAX_EXPONENT = 120  # 2**k and 2**-k are normal float32 numbers
BLOCK = 1 << 17  # elements a kernel touches at once: scratch memory stays in the cache
CODED_BLOCK = 1 << 15  # the same, of int64
_CUT_BITS = 16  # of a coefficient at once, where it is multiplied with what has 35 bits
GATHERED = 1 << 14  # elements up to which small neighbours are put together: cheaper than kernels

Exponents = npt.NDArray[np.int64]
Maxima = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


def exponents_for(maxima_MC: Maxima, old_C: Exponents) -> Exponents:
    """Choose k so that the sum of maxima over M stays below 2**28; a chunk of zeros keeps its k.

    The sum is taken in float64 in micro-batch order, so it is the same on every machine.
    """
    total_C = np.zeros(maxima_MC.shape[1], np.float64)
    for maxima_C in maxima_MC.astype(np.float64):
        total_C += maxima_C
    _, bits_C = np.frexp(total_C)
    new_C = np.clip(TARGET_BITS - bits_C.astype(np.int64), -MAX_EXPONENT, MAX_EXPONENT)
    return np.where(total_C > 0, new_C, old_C)


def sums_of(maxima_MC: Maxima, exponents_C: Exponents) -> Sums:
    """What the magnitude of no number of a chunk's sum exceeds. Finite maxima only."""
    scaled_MC = np.rint(np.ldexp(maxima_MC.astype(np.float64), exponents_C))
    sums_C: Sums = scaled_MC.sum(axis=0)
    return sums_C


def overflowing(maxima_MC: Maxima, exponents_C: Exponents) -> list[int]:
    """The chunks whose sum could leave int32. Finite maxima only."""
    return [int(chunk) for chunk in np.flatnonzero(sums_of(maxima_MC, exponents_C) > LIMIT)]


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring pieces of one chunk that kernels take at once, padding between them included."""

    pieces: tuple[Piece, ...]
    start: int
    stop: int
    chunk: int


class Encoder:
    """Turns the gradients of one micro-batch into int32 sums in a slot, span by span.

    Holds the scratch memory of one thread; buffers are reused for the whole run, because large
    temporaries cost page faults.
    """

    def __init__(self, layout: Layout) -> None:
        self._num_chunks = len(layout.chunks)
        self._spans = _spans(layout)
        self._highest = torch.zeros(len(self._spans))
        self._lowest = torch.zeros(len(self._spans))
        self._scratch = torch.empty(BLOCK)
        self._gathered = torch.empty(GATHERED)
        self._zeros = torch.zeros(GATHERED)
        self._coded: torch.Tensor | None = None
        owners = np.array([span.chunk for span in self._spans], np.int64)
        self._chunks, self._chunk_starts = np.unique(owners, return_index=True)

    def maxima(self, values: Sequence[torch.Tensor | None]) -> Maxima:
        """max|value| of each chunk, float32 of shape (C,). NaN if any value of the chunk is NaN.

        Args:
            values: contiguous float32 tensor of each field of the layout; None counts as zeros.
        """
        # a vector norm of order infinity takes 20 times as long as both extrema
        self._highest.zero_()
        self._lowest.zero_()
        cells = zip(self._highest.unbind(), self._lowest.unbind(), strict=True)
        for (high, low), block in zip(cells, self._blocks(values), strict=True):
            if block is not None:
                torch.amax(block, 0, out=high)
                torch.amin(block, 0, out=low)
        maxima = np.maximum(self._highest.numpy(), -self._lowest.numpy())
        maxima_C = np.zeros(self._num_chunks, np.float32)
        if len(self._chunks):
            maxima_C[self._chunks] = np.maximum.reduceat(maxima, self._chunk_starts)
        return maxima_C

    def add(
        self,
        values: Sequence[torch.Tensor | None],
        exponents_C: Exponents,
        *,
        base: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Write `base + round(value * 2**k)` to `out`, both int32 of shape (N,).

        A `base` of None counts as zeros; `out` may then hold anything. Values out of int32's
        range give garbage: the overflow rule sees them by their maxima.
        """
        scales = np.ldexp(1.0, exponents_C).tolist()
        for span, block in zip(self._spans, self._blocks(values), strict=True):
            target = out[span.start : span.stop]
            if block is None:
                target.zero_()
            else:
                scaled = self._scratch[: span.stop - span.start]
                target.copy_(torch.mul(block, scales[span.chunk], out=scaled).round_())
            if base is not None:
                target += base[span.start : span.stop]

    def add_coded(
        self,
        values: Sequence[torch.Tensor | None],
        exponents_C: Exponents,
        coefficient: int,
        *,
        is_first: bool,
        out: torch.Tensor,
    ) -> None:
        """Add `coefficient * round(value * 2**k)` to `out`, int64 of shape (N,), modulo PRIME.

        If it is the first, `out` may hold anything.
        """
        if self._coded is None:  # jobs without a code need none
            self._coded = torch.empty(BLOCK, dtype=torch.int64)
        scales = np.ldexp(1.0, exponents_C).tolist()
        for span, block in zip(self._spans, self._blocks(values), strict=True):
            target, num = out[span.start : span.stop], span.stop - span.start
            if is_first:
                target.zero_()
            if block is not None:
                scaled, integers = self._scratch[:num], self._coded[:num]
                integers.copy_(torch.mul(block, scales[span.chunk], out=scaled).round_())
                add_coded(integers, coefficient, out=target)

    def _blocks(self, values: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
        """The values of each span; padding inside a span is zero."""
        flat = [None if value is None else value.reshape(-1) for value in values]
        for span in self._spans:
            parts = [_part(flat[piece.field], piece) for piece in span.pieces]
            if len(parts) == 1:
                yield parts[0]
                continue
            block, at = self._gathered[: span.stop - span.start], span.start
            gathered: list[torch.Tensor] = []
            for piece, part in zip(span.pieces, parts, strict=True):
                if piece.start > at:
                    gathered.append(self._zeros[: piece.start - at])
                gathered.append(self._zeros[: piece.size] if part is None else part)
                at = piece.start + piece.size
            yield torch.cat(gathered, out=block)


def _part(value: torch.Tensor | None, piece: Piece) -> torch.Tensor | None:
    if value is None or piece.size == len(value):
        return value
    return value[piece.field_start : piece.field_start + piece.size]


def _spans(layout: Layout) -> list[_Span]:
    spans: list[_Span] = []
    for piece in layout.pieces(BLOCK):
        last = spans[-1] if spans else None
        stop = piece.start + piece.size
        if last and last.chunk == piece.chunk and stop - last.start <= GATHERED:
            spans[-1] = replace(last, pieces=(*last.pieces, piece), stop=stop)
        else:
            spans.append(_Span((piece,), piece.start, stop, piece.chunk))
    return spans


def add_slots(slots: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Add int32 `slots` of one shape into `out`, block by block. At least one slot."""
    for start in range(0, out.numel(), BLOCK):
        block = out[start : start + BLOCK]
        block.copy_(slots[0][start : start + BLOCK])
        for slot in slots[1:]:
            block += slot[start : start + BLOCK]


def add_coded(integers: torch.Tensor, coefficient: int, *, out: torch.Tensor) -> None:
    """Add `coefficient * integers` to `out`, modulo PRIME; both int64. `integers` is overwritten.

    `out` stays below 2**35 in magnitude, and below 2**63 on the way, if integers are below 2**31.
    """
    out.add_(integers, alpha=coefficient)
    _fold(out, scratch=integers)


def _fold(numbers: torch.Tensor, *, scratch: torch.Tensor) -> None:
    """Leave the remainders modulo PRIME, in smaller int64: below 2**35, then little above 2**31.

    The third time what is the remainder of a number within int32 becomes that number.
    """
    torch.add(numbers, 1 << 31, out=scratch)
    scratch >>= 32
    numbers.sub_(scratch, alpha=PRIME)


def decode_slots(
    slots: Sequence[torch.Tensor], coefficients: Sequence[int], limit: int, out: torch.Tensor
) -> None:
    """Add int64 `slots` of one shape, each times its coefficient, modulo PRIME, into int32 `out`.

    Raises:
        DecodingError: a sum is larger than `limit`, as it cannot be: what was coded differs.
    """
    parts = [_cut(coefficient) for coefficient in coefficients]
    size = min(CODED_BLOCK, out.numel())
    low_N, high_N, scratch_N = (torch.empty(size, dtype=torch.int64) for _ in range(3))
    for start in range(0, out.numel(), CODED_BLOCK):
        target = out[start : start + CODED_BLOCK]
        low, high, scratch = (one[: len(target)].zero_() for one in (low_N, high_N, scratch_N))
        for slot, (lower, higher) in zip(slots, parts, strict=True):
            block = slot[start : start + CODED_BLOCK]
            low.add_(block, alpha=lower)
            if higher:
                high.add_(block, alpha=higher)
        for _ in range(2):
            _fold(high, scratch=scratch)
        low.add_(high, alpha=1 << _CUT_BITS)
        for _ in range(3):
            _fold(low, scratch=scratch)
        largest = max(int(low.max()), -int(low.min()))
        if largest > limit:
            raise DecodingError(
                f"a decoded number is {largest}, and what was answered allows {limit}: answers to"
                " one micro-batch differ between workers"
            )
        target.copy_(low)


def _cut(coefficient: int) -> tuple[int, int]:
    """Two numbers of 16 bits: times 2**35, and over all slots, they stay within an int64."""
    higher = (coefficient + (1 << (_CUT_BITS - 1))) >> _CUT_BITS
    return coefficient - (higher << _CUT_BITS), higher


def decode(total: torch.Tensor, exponent: int, divisor: float, out: torch.Tensor) -> None:
    """Write `total * 2**-exponent / divisor` to `out`, float32 of the same shape."""
    out.copy_(total)
    out.mul_(float(np.ldexp(1.0, -exponent)) / divisor)
