"""Which answers of the running attempt await another opinion, whose, and who lied.

Part of the aggregator's protocol, which leases what is asked for and takes back what does not
count. What two answers must agree on is all that a worker reports, but for times: sums are exact.

    granted ──▶ open ──another answer agrees──▶ closed
                 │ ▲
                 │ └── one that counted was a lie: its worker's whole slot is leased again
                 └── nobody else can be asked: computed anew if answers differ, a few times;
                     then let through, or, where all is audited, waiting for another worker;
                 without hope where as many differ as may be asked
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from elastic.core.protocol.messages import Outcome, pack_outcome
from policies.auditing import Answer, AskAgain, Audits, AuditView, Lie

MAX_TRIES = 3
"""So often a micro-batch is computed anew that comes out differently, with nobody else to ask."""


@dataclass(frozen=True, slots=True)
class Anew:
    """Answers differ and nobody else can be asked: take back what `worker`'s slot holds."""

    micro_batch: int
    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unsettled:
    """Nobody can say whether this is right. It counts, or is waited for: see `Auditing`.

    `is_hopeless`: all is audited, and as many as may be asked differ, again and again.
    """

    micro_batch: int
    reason: str
    is_hopeless: bool = False


class Auditing:
    """The audits of one attempt. Rebuilt from what counts; opinions are asked for once more."""

    def __init__(self, audits: Audits | None) -> None:
        self._audits = audits
        self._step = 0
        self._audited: frozenset[int] = frozenset()
        self._open: set[int] = set()
        self._holder: dict[int, int] = {}
        self._answers: dict[int, dict[int, Answer]] = {}
        self._tries: Counter[int] = Counter()
        self._told: set[int] = set()
        self.num_dropped = 0
        """Of this attempt: nobody could take them."""

    @property
    def is_strict(self) -> bool:
        """Whether nothing may count that was not computed alike by two."""
        return self._audits is not None and self._audits.probability >= 1

    @property
    def is_done(self) -> bool:
        """Whether nothing that counts awaits an opinion."""
        return not self._open

    def begin(self, step: int, num_micro_batches: int) -> None:
        """A new attempt. 0 micro-batches: nothing of it is audited."""
        if self._audits is None:
            return
        self._step, audited = step, self._audits.audited(step, num_micro_batches)
        self._audited = frozenset(audited.nonzero()[0].tolist())
        self._open.clear()
        self._holder.clear()
        self._answers.clear()
        self._tries.clear()
        self._told.clear()
        self.num_dropped = 0

    def end(self) -> None:
        """The step waits for no opinion any more."""
        self.num_dropped += len(self._open)
        self._open.clear()

    def granted(self, worker: int, node: int, outcome: Outcome) -> list[Lie]:
        """This answer counts from now on; who lied, as far as that is known."""
        micro_batch = outcome.micro_batch
        if micro_batch not in self._audited:
            return []
        self._holder[micro_batch] = worker
        self._open.add(micro_batch)
        return self.heard(worker, node, outcome)

    def heard(self, worker: int, node: int, outcome: Outcome) -> list[Lie]:
        """An answer, which may count or be an opinion only."""
        micro_batch = outcome.micro_batch
        if micro_batch not in self._audited:
            return []
        answer = Answer(worker, node, answer_digest(outcome))
        self._answers.setdefault(micro_batch, {})[worker] = answer
        return self._settle(micro_batch)

    def taken_back(self, micro_batches: Iterable[int]) -> None:
        """These count no more. Opinions of others stay."""
        for one in micro_batches:
            self._open.discard(one)
            self._answers.get(one, {}).pop(self._holder.pop(one, -1), None)

    def forget(self, worker: int) -> list[Lie]:
        """It lied: nothing that it said counts, nor what was closed because of it."""
        lies: list[Lie] = []
        for micro_batch, answers in self._answers.items():
            if answers.pop(worker, None) is not None and micro_batch in self._holder:
                self._open.add(micro_batch)
                lies += self._settle(micro_batch)
        return lies

    def next(
        self, idle: Mapping[int, int], others: Iterable[int], asked: Iterable[int]
    ) -> list[AskAgain | Anew | Unsettled]:
        """What to do about what is open, as far as it is the same once that is done.

        Args:
            idle: those who can compute now, and their nodes.
            others: all who will be able to, as far as they are waited for.
            asked: micro-batches of which an opinion is on its way.
        """
        found: list[AskAgain | Anew | Unsettled] = []
        free, able, waits = dict(idle), {*idle, *others}, set(asked)
        for micro_batch in sorted(self._open - waits):
            answers = self._answers[micro_batch]
            if len(answers) < self._opinions and able - answers.keys():
                decision = self._ask(micro_batch, free)
                if decision is not None:
                    found.append(decision)
                    del free[decision.worker]
            else:
                found += self._give_up(micro_batch, answers)
                if found and isinstance(found[-1], Anew):
                    break  # with its slot goes what else is open, and whom could be asked
        return found

    @property
    def _opinions(self) -> int:
        assert self._audits is not None, "nothing is open without audits"
        return self._audits.opinions

    def _ask(self, micro_batch: int, free: Mapping[int, int]) -> AskAgain | None:
        assert self._audits is not None, "nothing is open without audits"
        answers = list(self._answers[micro_batch].values())
        view = AuditView(self._step, {micro_batch: answers}, list(free.items()))
        for decision in self._audits.decide(view):
            if isinstance(decision, AskAgain):
                return decision
        return None

    def _give_up(
        self, micro_batch: int, answers: Mapping[int, Answer]
    ) -> list[AskAgain | Anew | Unsettled]:
        assert self._audits is not None, "nothing is open without audits"
        what = f"{len(answers)} answers to micro-batch {micro_batch} of step {self._step}"
        if len(answers) > 1 and self._tries[micro_batch] < MAX_TRIES:
            self._tries[micro_batch] += 1
            answers_differ = f"{what} differ, and nobody else is there to be asked"
            holder = self._holder[micro_batch]
            self._answers[micro_batch] = {holder: answers[holder]}
            return [Anew(micro_batch, holder, answers_differ)]
        waits = self.is_strict
        if not waits:
            self._open.discard(micro_batch)
            self.num_dropped += 1
        told = micro_batch in self._told
        if told or (len(answers) == 1 and not waits):
            return []
        self._told.add(micro_batch)
        does = "the step waits for another worker" if waits else "the first one counts"
        if len(answers) == 1:
            return [Unsettled(micro_batch, f"{what} is there, nobody to compare it with: {does}")]
        again = f"{what} differ, {MAX_TRIES + 1} times"
        if waits and len(answers) >= self._opinions:
            why = f"{again}: the task is not deterministic, so that no audit can end"
            return [Unsettled(micro_batch, why, is_hopeless=True)]
        again += ", and nobody else is there to be asked"
        return [Unsettled(micro_batch, f"{again}: {does}")]

    def _settle(self, micro_batch: int) -> list[Lie]:
        """Close it if all agree; who lied if most do."""
        assert self._audits is not None, "nothing is heard without audits"
        answers = list(self._answers[micro_batch].values())
        view = AuditView(self._step, {micro_batch: answers}, ())
        decisions = self._audits.decide(view)
        if len(answers) > 1 and not decisions:
            self._open.discard(micro_batch)
        return [one for one in decisions if isinstance(one, Lie)]


def answer_digest(outcome: Outcome) -> bytes:
    """Of all that has one right value."""
    told = pack_outcome(replace(outcome, start_s=0.0, end_s=0.0))
    return hashlib.blake2b(told, digest_size=16).digest()
