"""What the commit record becomes once the answers of a pass are there.

Part of the aggregator's protocol: pure functions of the record and of the answers in the order of
the micro-batches, so that the record is the same whoever computed them. Never decides when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from elastic.core import fixed_point
from elastic.core.protocol.messages import Outcome, State


def after_step(before: State, outcomes: list[Outcome], num_micro_batches: int) -> State:
    """The step was computed; `outcomes` are of its micro-batches, in order.

    Those of fewer than `num_micro_batches`, if the rest was dropped.
    """
    assert before.exponents is not None, "the first pass only takes the maxima"
    loss = mean([one.loss_sum for one in outcomes], outcomes)
    maxima_MC = maxima_of(outcomes, num_micro_batches)
    exponents = fixed_point.exponents_for(maxima_MC, np.array(before.exponents, np.int64))
    return replace(
        before,
        step=before.step + 1,
        attempt=0,
        exponents=tuple(exponents.tolist()),
        samples=_digest(before, *(_told(outcome) for outcome in outcomes)),
        num_updates=before.num_updates + 1,
        loss=loss,
        first_loss=loss if before.first_loss is None else before.first_loss,
        metrics=metrics(outcomes),
        dropped=before.dropped + num_micro_batches - len(outcomes),
    )


def maxima_of(outcomes: list[Outcome], num_micro_batches: int) -> fixed_point.Maxima:
    """Of all micro-batches; what was dropped is taken to be as large as the largest that is there,
    so that the next step has room for all."""
    maxima_MC = np.stack([outcome.maxima_C for outcome in outcomes])
    num_missing = num_micro_batches - len(outcomes)
    if not num_missing:
        return maxima_MC
    return np.concatenate([maxima_MC, np.tile(maxima_MC.max(axis=0), (num_missing, 1))])


def after_skip(before: State) -> State:
    """The step is left out."""
    skipped = (*before.skipped, before.step)
    samples = _digest(before, b"skipped")
    return replace(before, step=before.step + 1, attempt=0, samples=samples, skipped=skipped)


def after_maxima(
    before: State, maxima_MC: fixed_point.Maxima, num_chunks: int, *, overflows: bool
) -> State:
    """The same step once more, with exponents from all maxima."""
    old_C = np.array(before.exponents or (0,) * num_chunks, np.int64)
    return replace(
        before,
        attempt=before.attempt + 1,
        exponents=tuple(fixed_point.exponents_for(maxima_MC, old_C).tolist()),
        overflows=before.overflows + overflows,
    )


def total(values: Iterable[float]) -> float:
    """Add in the given order, in float64: the order is part of the result."""
    result = 0.0
    for value in values:
        result += value
    return result


def mean(sums: Iterable[float], outcomes: list[Outcome]) -> float:
    """A sum over the sum of the weights, both in the order of the micro-batches."""
    weight = total(one.weight for one in outcomes)
    return total(sums) / weight if weight > 0 else float("nan")


def metrics(outcomes: list[Outcome]) -> tuple[float, ...]:
    """The mean of each metric of the task."""
    columns = zip(*(one.metrics for one in outcomes), strict=True)
    return tuple(mean(column, outcomes) for column in columns)


def _told(outcome: Outcome) -> bytes:
    return outcome.micro_batch.to_bytes(4, "little") + outcome.samples


def _digest(before: State, *parts: bytes) -> str:
    """The running digest of (step, micro-batch, sample indices)."""
    step = before.step.to_bytes(8, "little")
    return hashlib.sha256(b"".join([bytes.fromhex(before.samples), step, *parts])).hexdigest()
