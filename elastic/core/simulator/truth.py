"""What an undisturbed job computes: the yardstick of the simulator, independent of the protocol.

A pure function of the schedule. It imports the wire format and the exponent rule, nothing of what
decides who computes what.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from elastic.core import fixed_point
from elastic.core.protocol.messages import Outcome, State

NUM_CHUNKS = 3
FIRST_DIGEST = 1
LIE = 1 << 70
"""Added to the digest of a wrong entry, so many times; honest ones are far smaller."""
Entry = tuple[int, int, int, int]  # step, attempt, micro-batch, digest of the version read


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The one right answer to a micro-batch of a step."""

    loss_sum: float
    weight: float
    samples: bytes
    maxima_C: npt.NDArray[np.float32]
    metric: float

    def outcome(self, micro_batch: int, start_s: float, end_s: float) -> Outcome:
        return Outcome(
            micro_batch,
            self.loss_sum,
            self.weight,
            self.samples,
            bytes(8),
            self.maxima_C,
            metrics=(self.metric,),
            start_s=start_s,
            end_s=end_s,
        )


@dataclass(slots=True)
class Truth:
    """`states`: every commit record in order, attempts included; `digests[t]`: version of step t.

    `answers[t]` are those of step t's training, `evaluations[t]` those of the evaluation before it.
    `fails`: the job must end with a failure after the last of the states.
    """

    answers: list[list[Answer]]
    evaluations: dict[int, list[Answer]]
    states: list[State] = field(default_factory=list)
    digests: list[int] = field(default_factory=lambda: [FIRST_DIGEST])
    fails: bool = False

    @property
    def num_micro_batches(self) -> int:
        return len(self.answers[0])


def make_truth(
    seed: int,
    *,
    num_steps: int,
    num_micro_batches: int,
    skip: bool,
    evaluate_every: int,
    num_evaluated: int,
    model: int = 0,
) -> Truth:
    """Draw the answers of all micro-batches and work out the committed sequence."""
    rng = random.Random(f"truth {seed} {model}" if model else f"truth {seed}")
    steps = [_draw_step(rng, num_micro_batches) for _ in range(num_steps)]
    due = {*range(evaluate_every, num_steps, evaluate_every), num_steps} if evaluate_every else ()
    truth = Truth(steps, {step: _draw_step(rng, num_evaluated) for step in sorted(due)})
    state = State(step=0, attempt=0, exponents=None, model=model)
    truth.states.append(state)
    for step, answers in enumerate(truth.answers):
        state = _evaluate(truth, state)
        if _is_finite(answers):
            state = _apply(truth, state, answers)
        elif skip:
            samples = _chain(state, step).hexdigest(b"skipped")
            state = replace(
                state, step=step + 1, attempt=0, samples=samples, skipped=(*state.skipped, step)
            )
            truth.digests.append(truth.digests[-1])
        else:
            truth.fails = True
            return truth
        truth.states.append(state)
    _evaluate(truth, state)
    return truth


def _evaluate(truth: Truth, state: State) -> State:
    """The state in which the training of a step begins."""
    if state.step in truth.evaluations:
        state = replace(state, attempt=1, evaluated=state.step)
        truth.states.append(state)
    return state


def honest(entry: Entry) -> Entry:
    """What it would be, had its worker not lied."""
    step, attempt, micro_batch, digest = entry
    return step, attempt, micro_batch, (digest + LIE // 2) % LIE - LIE // 2


def next_digest(digest: int, entries: list[Entry]) -> int:
    """The parameters after adding `entries`: the same in any order, and in whichever attempt."""
    return hash((digest, *sorted((step, one, read) for step, _, one, read in entries)))


def _draw_step(rng: random.Random, num_micro_batches: int) -> list[Answer]:
    spike = 2.0 ** rng.choice((6, 9)) if rng.random() < 0.15 else 1.0
    broken = rng.randrange(num_micro_batches) if rng.random() < 0.04 else None
    answers = []
    for micro_batch in range(num_micro_batches):
        maxima = [spike * (0.5 + rng.random()) for _ in range(NUM_CHUNKS)]
        if micro_batch == broken:
            maxima[0] = rng.choice((float("nan"), float("inf")))
        answers.append(
            Answer(
                rng.random(),
                1.0 + rng.random(),
                rng.randbytes(16),
                np.array(maxima, np.float32),
                rng.random(),
            )
        )
    return answers


def _is_finite(answers: list[Answer]) -> bool:
    return all(bool(np.isfinite(one.maxima_C).all()) for one in answers)


def _apply(truth: Truth, state: State, answers: list[Answer]) -> State:
    """Append the attempts that a finite step needs; return the state after it."""
    maxima_MC = np.stack([one.maxima_C for one in answers])
    for _ in range(3):
        old = np.array(state.exponents or (0,) * NUM_CHUNKS, np.int64)
        new = tuple(fixed_point.exponents_for(maxima_MC, old).tolist())
        if state.exponents is not None and not fixed_point.overflowing(maxima_MC, old):
            break
        overflows = state.overflows + (state.exponents is not None)
        state = replace(state, attempt=state.attempt + 1, exponents=new, overflows=overflows)
        truth.states.append(state)
    entries = [(state.step, state.attempt, m, truth.digests[-1]) for m in range(len(answers))]
    truth.digests.append(next_digest(truth.digests[-1], entries))
    chain = _chain(state, state.step)
    for micro_batch, one in enumerate(answers):
        chain.add(micro_batch, one.samples)
    loss, metric = means(answers)
    return replace(
        state,
        step=state.step + 1,
        attempt=0,
        exponents=new,
        samples=chain.hexdigest(),
        num_updates=state.num_updates + 1,
        loss=loss,
        first_loss=loss if state.first_loss is None else state.first_loss,
        metrics=(metric,),
    )


def means(answers: list[Answer]) -> tuple[float, float]:
    """The loss and the metric of a pass: sums in order, over the sum of the weights."""
    loss_sum = metric_sum = weight = 0.0
    for one in answers:
        loss_sum += one.loss_sum
        metric_sum += one.metric
        weight += one.weight
    return loss_sum / weight, metric_sum / weight


class _chain:  # noqa: N801 - reads as a verb where it is used
    """The running digest of (step, micro-batch, sample indices)."""

    def __init__(self, state: State, step: int) -> None:
        self._bytes = bytes.fromhex(state.samples) + step.to_bytes(8, "little")

    def add(self, micro_batch: int, samples: bytes) -> None:
        self._bytes += micro_batch.to_bytes(4, "little") + samples

    def hexdigest(self, end: bytes = b"") -> str:
        return hashlib.sha256(self._bytes + end).hexdigest()
