"""SR-SGC and M-SGC for workers that lease micro-batches: a sequential code is a schedule, too.

An answer is the sum of one micro-batch by itself, added to whatever else its worker has computed.
So nothing is coded: what a code has several workers combine is leased to each of them, the first to
finish it counts, and the others skip it. A gradient is there once each of its micro-batches is: the
answers that a code needs cover all of its parts. Whether a round may end is what the schemes say of
whole answers; what of an unfinished answer was granted counts all the same, and is not done again.

Pure. Gradients are numbered by the round in which they begin. Letters: N workers, K parts of a
group of D2, W - 1 parts of D1 of each worker.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from policies.coding.codes import Bools, frc
from policies.coding.m_sgc import MSgc, MSgcRounds
from policies.coding.sr_sgc import IDLE, SrSgc, SrSgcRounds

Unit = tuple[int, int]
"""A gradient, and a micro-batch of it."""


def least_models(scheme: SrSgc | MSgc) -> int:
    """So many take turns: a gradient is complete `delay` rounds after it was begun."""
    return scheme.delay + 1


def check_sequential(scheme: SrSgc | MSgc, num_workers: int, num_micro_batches: int) -> None:
    """Refuse what cannot be scheduled.

    Raises:
        ValueError: there are too few workers, or M cannot be cut into parts; names the nearest.
    """
    scheme.begin(num_workers, 1)
    if isinstance(scheme, MSgc):
        scheme.check(num_workers, num_micro_batches)
    elif num_micro_batches < num_workers:
        raise ValueError(
            f"batch.micro_batches is {num_micro_batches}: sr_sgc with {num_workers} workers needs"
            f" at least {num_workers}"
        )


class SequentialLeases:
    """What each worker is to compute in this round, and whether the round may end.

    Raises:
        ValueError: see `check_sequential`.
    """

    def __init__(
        self,
        scheme: SrSgc | MSgc,
        num_workers: int,
        num_micro_batches: int,
        num_gradients: int,
    ) -> None:
        check_sequential(scheme, num_workers, num_micro_batches)
        self.num_workers = num_workers
        self.num_gradients = num_gradients
        if isinstance(scheme, SrSgc):
            self._code: _Repeated | _Multiplexed = _Repeated(
                scheme.begin(num_workers, num_gradients), num_micro_batches
            )
        else:
            self._code = _Multiplexed(scheme.begin(num_workers, num_gradients), num_micro_batches)
        self._starts = self._code.starts
        self._ends = [*self._starts[1:], num_micro_batches]
        self._left: dict[int, list[set[int]]] = {}
        """Of each gradient that has begun, the micro-batches that each part lacks."""
        self._work: list[list[Unit]] = []
        """Of each worker in this round: gradients and parts, in order."""
        self._open: list[set[Unit]] = []
        """Those that are not complete."""
        self._begin_round()

    @property
    def round(self) -> int:
        return self._code.rounds.round

    @property
    def due(self) -> int:
        """The gradient that this round must complete; negative if none."""
        return self._code.rounds.due

    @property
    def is_over(self) -> bool:
        """Whether all gradients are complete."""
        return self.round >= self._code.rounds.num_rounds

    def work(self, worker: int) -> list[Unit]:
        """What a worker computes in this round, in order, but for what is granted already."""
        return [
            (gradient, micro_batch)
            for gradient, part in self._work[worker]
            for micro_batch in range(self._starts[part], self._ends[part])
            if micro_batch in self._left[gradient][part]
        ]

    def granted(self, gradient: int, micro_batch: int) -> None:
        """A micro-batch counts, whoever has computed it."""
        if gradient not in self._left:
            return
        part = bisect_right(self._starts, micro_batch) - 1
        left = self._left[gradient][part]
        left.discard(micro_batch)
        if not left:
            for one in self._open:
                one.discard((gradient, part))

    @property
    def answered(self) -> Bools:
        """Whether nothing is left (N) of what a worker was to compute in this round."""
        return np.array([not one for one in self._open])

    def is_complete(self, gradient: int) -> bool:
        """Whether each micro-batch of a gradient that has begun is granted."""
        return not any(self._left.get(gradient, ()))

    @property
    def may_end(self) -> bool:
        """Whether all gradients can still be completed in time if nobody straggles any more."""
        return self._code.may_end(self.answered, is_complete=self.is_complete(self.due))

    def end(self) -> None:
        """End the round: what is not granted now is nobody's, until a later round says whose."""
        assert self.may_end, "somebody is to be waited for"
        due = self.due
        self._code.rounds.close(self.answered)
        if due >= 0:
            assert self.is_complete(due), "the answers that a code needs cover all of its parts"
            del self._left[due]
        self._begin_round()

    def _begin_round(self) -> None:
        for gradient, left in self._left.items():
            self._code.say(gradient, np.array([not one for one in left]))
        if self.round < self.num_gradients:
            parts = zip(self._starts, self._ends, strict=True)
            self._left[self.round] = [set(range(start, end)) for start, end in parts]
        every = range(self.num_workers)
        self._work = [[] if self.is_over else self._code.work(worker) for worker in every]
        self._open = [
            {(gradient, part) for gradient, part in work if self._left[gradient][part]}
            for work in self._work
        ]


class _Repeated:
    """SR-SGC: N parts; worker i computes parts i to i + s, in a circle."""

    def __init__(self, rounds: SrSgcRounds, num_micro_batches: int) -> None:
        self.rounds = rounds
        num = rounds.num_workers
        self.starts = [part * num_micro_batches // num for part in range(num)]

    def _parts(self, worker: int) -> list[int]:
        num = self.rounds.num_workers
        return [(worker + one) % num for one in range(self.rounds.scheme.num_stragglers + 1)]

    def work(self, worker: int) -> list[Unit]:
        """Gradients and parts of a worker in this round, its own first."""
        gradient = int(self.rounds.work()[worker])
        return [] if gradient == IDLE else [(gradient, part) for part in self._parts(worker)]

    def say(self, gradient: int, has_P: Bools) -> None:
        """Which parts are there."""
        workers = range(self.rounds.num_workers)
        self.rounds.say(gradient, np.array([has_P[self._parts(one)].all() for one in workers]))

    def may_end(self, answered_N: Bools, *, is_complete: bool) -> bool:
        """Later gradients can always be repeated; the one that is due must be complete."""
        return self.rounds.due < 0 or is_complete


class _Multiplexed:
    """M-SGC: first the D1 parts of all workers, then the groups of D2."""

    def __init__(self, rounds: MSgcRounds, num_micro_batches: int) -> None:
        self.rounds = rounds
        scheme, num = rounds.scheme, rounds.num_workers
        self._num_own = num * (scheme.window - 1)
        self._held: list[list[int]] = []
        """Of each worker, what it computes of a group of D2."""
        self._num_K = 0
        own = num_micro_batches // rounds.scheme.num_parts(num)
        if scheme.distinct < num and scheme.inner == "frc":
            groups = frc(num, scheme.distinct).groups
            self._num_K, size = len(groups), own
            part_of = {worker: part for part, group in enumerate(groups) for worker in group}
            self._held = [[part_of[worker]] for worker in range(num)]
        elif scheme.distinct < num:
            self._num_K, copies = num, scheme.distinct + 1
            size = num_micro_batches // scheme.multiple(num)
            own = copies * size
            self._held = [[(one + more) % num for more in range(copies)] for one in range(num)]
        self.starts = [part * own for part in range(self._num_own)]
        if self._held:
            coded = range(scheme.burst * self._num_K)
            self.starts += [self._num_own * own + part * size for part in coded]

    def work(self, worker: int) -> list[Unit]:
        """Gradients and parts of a worker in this round, slot by slot."""
        return [
            (gradient, part)
            for gradient, own, group in self.rounds.slots(worker)
            for part in ([own] if group is None else self._coded(worker, group))
        ]

    def _coded(self, worker: int, group: int) -> list[int]:
        first = self._num_own + group * self._num_K
        return [first + part for part in self._held[worker]]

    def say(self, gradient: int, has_P: Bools) -> None:
        """Which parts are there."""
        num, burst = self.rounds.num_workers, self.rounds.scheme.burst
        own_NW = has_P[: self._num_own].reshape(num, -1)
        coded_BN = np.zeros((burst, num), np.bool_)
        for worker in range(num) if self._held else ():
            for group in range(burst):
                coded_BN[group, worker] = has_P[self._coded(worker, group)].all()
        self.rounds.say(gradient, own_NW, coded_BN)

    def may_end(self, answered_N: Bools, *, is_complete: bool) -> bool:
        """What the scheme says of whole answers."""
        return self.rounds.allows(answered_N)
