"""Which micro-batches are computed twice, and who lied when two answers differ.

Sums are exact, so a micro-batch has one right answer, whoever computes it: another one is a lie,
not noise. Pure and stateless: which ones are audited follows from (seed, step, micro-batch).

How soon a liar is found: if a worker computes n micro-batches in a step, corrupts each with
probability c, and each is audited with probability p, a step finds it with 1 - (1 - p c)^n. So

    steps(c, n, d) = ceil( ln d / (n ln(1 - p c)) )

steps find it with a probability of 1 - d (`steps_to_find`). One that corrupts every hundredth, of 4
in a step, is found in 999 of 1,000 cases within 172 steps if all are audited, within 1,727 at
p = 0.1; at p = 1 no lie ever counts. Two workers that tell the same lie are believed: auditors are
chosen from other nodes where there are any.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from policies.verdicts import Kind, Node, Verdict, Worker

_MASK = (1 << 64) - 1
_AUDITED, _AUDITOR = 1, 2  # what a random number is for


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker computed for a micro-batch: the digest of its rounded gradient, its sums."""

    worker: int
    node: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class AuditView:
    """Answers so far to the micro-batches of one step and attempt, in the order of their coming.

    `workers`: number and node of those that may compute now.
    """

    step: int
    answers: Mapping[int, Sequence[Answer]]
    workers: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Lease the micro-batch to that worker, too; the step waits for its answer."""

    micro_batch: int
    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lie:
    """The worker's answer was outvoted: drop all that its slot holds of this step, lease that set
    again, and let it compute no more."""

    worker: int
    micro_batch: int
    votes: int
    against: int
    step: int

    @property
    def verdict(self) -> Verdict:
        reason = (
            f"worker {self.worker} computed micro-batch {self.micro_batch} of step {self.step} to"
            f" another result than {self.votes} others that agree"
        )
        return Verdict(
            kind=Kind.SILENT_CORRUPTION,
            culprit=Worker(self.worker),
            since_step=self.step,
            confidence=1 - 0.5 ** (2 * (self.votes - self.against + 1)),
            reason=reason,
            evidence={"votes": self.votes, "against": self.against},
        )


@dataclass(frozen=True, slots=True)
class Undecided:
    """So many answers, and no two agree, or nobody is left to ask: a model that is not
    deterministic, rather than liars."""

    micro_batch: int
    num_answers: int
    reason: str


Decision = AskAgain | Lie | Undecided


@dataclass(frozen=True, slots=True, kw_only=True)
class Audits:
    """Audit each micro-batch with `probability`; ask up to `opinions` workers where they differ."""

    seed: int
    probability: float = 0.01
    opinions: int = 5
    kind: Literal["audits"] = "audits"

    def audited(self, step: int, num_micro_batches: int) -> npt.NDArray[np.bool_]:
        """Of each micro-batch of a step. The same on every node, whatever happened before."""
        numbers = np.arange(num_micro_batches, dtype=np.uint64)
        chance = _random(self.seed, _AUDITED, step, numbers).astype(np.float64) / 2.0**64
        audited: npt.NDArray[np.bool_] = chance < self.probability
        return audited

    def decide(self, view: AuditView) -> list[Decision]:
        """What is left to be asked, and who lied. Nothing: the audits of these answers are done."""
        decisions: list[Decision] = []
        last = max(view.answers, default=-1)
        audited = self.audited(view.step, last + 1)
        for micro_batch, answers in sorted(view.answers.items()):
            if audited[micro_batch] and answers:
                decisions += self._of_one(view, micro_batch, answers)
        return decisions

    def _of_one(
        self, view: AuditView, micro_batch: int, answers: Sequence[Answer]
    ) -> list[Decision]:
        counts = Counter(one.digest for one in answers)
        (most, votes), *rest = counts.most_common()
        if votes >= 2 and (not rest or votes > rest[0][1]):
            return [
                Lie(one.worker, micro_batch, votes, counts[one.digest], view.step)
                for one in answers
                if one.digest != most
            ]
        num = len(answers)
        what = f"{num} answers differ" if rest else "audited"
        if num >= self.opinions:
            return [Undecided(micro_batch, num, f"{what}, limit {self.opinions} opinions")]
        worker = self._auditor(view, micro_batch, answers)
        if worker is None:
            return [Undecided(micro_batch, num, f"{what}, and no other worker is there")]
        return [AskAgain(micro_batch, worker, what)]

    def _auditor(self, view: AuditView, micro_batch: int, answers: Sequence[Answer]) -> int | None:
        """One that has not answered yet, on a node where nobody has if there is one."""
        asked, nodes = {one.worker for one in answers}, {one.node for one in answers}
        able = [one for one in view.workers if one[0] not in asked]
        able = [one for one in able if one[1] not in nodes] or able
        if not able:
            return None
        place = np.array([micro_batch], np.uint64)
        drawn = int(_random(self.seed, _AUDITOR, view.step, place)[0])
        return sorted(able)[(drawn + len(answers)) % len(able)][0]

    def steps_to_find(
        self, *, corrupted: float, per_step: float, missed: float = 0.001
    ) -> int | None:
        """The module's formula; None: never, since nothing is audited or corrupted."""
        chance = self.probability * corrupted
        if chance >= 1:
            return 1
        if chance <= 0 or per_step <= 0:
            return None
        return math.ceil(math.log(missed) / (per_step * math.log1p(-chance)))


class _Odd(NamedTuple):
    """`votes` of other keepers agree with each other, and not with it; 0: nobody knows."""

    votes: int
    chunk: int


def odd_keepers(digests: Mapping[int, Mapping[int, int]], step: int) -> list[Verdict]:
    """Which nodes keep another state of a chunk than most of its keepers, at the same step.

    Where as many have one as another, nobody knows who is right: all of them are named, with half
    the confidence.

    Args:
        digests: of each node, by chunk.
    """
    odd: dict[int, list[_Odd]] = {}
    for chunk in sorted({chunk for own in digests.values() for chunk in own}):
        copies = {node: own[chunk] for node, own in sorted(digests.items()) if chunk in own}
        counts = Counter(copies.values())
        if len(counts) < 2:
            continue
        (most, votes), (_, others) = counts.most_common(2)
        is_tie = votes == others
        for node, digest in copies.items():
            if is_tie or digest != most:
                odd.setdefault(node, []).append(_Odd(0 if is_tie else votes, chunk))
    return [_odd_keeper(node, found, step) for node, found in sorted(odd.items())]


def _odd_keeper(node: int, found: Sequence[_Odd], step: int) -> Verdict:
    votes, chunk = max(found, key=lambda one: one.votes)
    which = f"{votes} others agree" if votes else "nobody knows which is right"
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return Verdict(
        kind=Kind.SILENT_CORRUPTION,
        culprit=Node(node),
        since_step=step,
        confidence=1 - 0.5 ** (2 * votes) if votes else 0.5,
        reason=f"node {node} keeps another state of chunk {chunk}{more} at step {step}: {which}",
        evidence={"votes": votes, "chunks": len(found)},
    )


def _random(
    seed: int, what: int, step: int, numbers: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit numbers, one for each: splitmix64 of all of it (Steele, Lea, Flood 2014)."""
    state = 0
    for word in (seed, what, step):
        state = _mix(state ^ (word & _MASK))
    with np.errstate(over="ignore"):
        mixed = np.uint64(state) ^ (numbers * np.uint64(0x9E3779B97F4A7C15))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
