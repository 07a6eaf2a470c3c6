"""The coded attempt of a step: who computes what with which coefficient, and who has.

Part of the aggregator's protocol, which leases what `share` says, and asks `lost` and `is_complete`
after each event. Knows nothing of numbers: see `policies.coding.field` and `fixed_point`.

Each micro-batch is leased to s + 1 workers at once. A worker's sum counts once all that was leased
to it was granted; the step is complete when all sums but s count. Nothing of it is written down:
whatever goes wrong beyond s, or with the aggregator, the step is done again as another attempt, as
plain sums.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from elastic.core.protocol.messages import Combine, Key, Lease
from policies.coding.field import decoding, encoding, holders_of, least_workers
from policies.coding.simulation import Coded
from policies.scheduling import LEAST_S


class Coding:
    """Remembers one attempt. Without a policy no attempt is ever coded."""

    def __init__(self, policy: Coded | None, num_micro_batches: int) -> None:
        self.policy = policy
        self._num_micro_batches = num_micro_batches
        self._left: dict[int, set[Lease]] = {}
        """Of each worker that has a share: what is not granted yet."""
        self._places: dict[int, int] = {}
        self._seed = 0
        self.may_begin = policy is not None
        """Whether the attempt that runs may be coded."""

    @property
    def is_on(self) -> bool:
        """Whether the attempt that runs is coded."""
        return bool(self._left)

    def begin(self, *, plain: bool) -> None:
        """A new attempt."""
        self._left.clear()
        self.may_begin = self.policy is not None and not plain

    def share(self, key: Key, paces: Mapping[int, float]) -> dict[int, tuple[Lease, ...]]:
        """What each worker computes, if there are enough for a code; else nothing.

        Args:
            paces: seconds of a micro-batch, of those who get a share.
        """
        if self.policy is None or len(paces) < least_workers(self.policy.stragglers):
            return {}
        workers = sorted(paces)
        by_speed = self.policy.kind == "c_code"
        speeds = [1 / max(paces[one], LEAST_S) if by_speed else 1.0 for one in workers]
        shares: dict[int, list[Lease]] = {worker: [] for worker in workers}
        self._seed = key.step
        rows = holders_of(speeds, self._num_micro_batches, self.policy.stragglers)
        for micro_batch, holders in enumerate(rows):
            for place, coefficient in zip(holders, encoding(holders, seed=key.step), strict=True):
                lease = Lease(key, (micro_batch,), Combine.CODED, coefficient=coefficient)
                shares[workers[place]].append(lease)
        self._places = {worker: place for place, worker in enumerate(workers)}
        self._left = {worker: set(leases) for worker, leases in shares.items() if leases}
        return {worker: tuple(leases) for worker, leases in shares.items() if leases}

    @property
    def reason(self) -> str:
        """In words, what `share` gave."""
        return f"{self._name}: coded shares of {len(self._left)} workers"

    @property
    def lack(self) -> str:
        """In words, why `share` gave nothing."""
        assert self.policy is not None, "nothing is coded without a policy"
        return f"{self._name} needs {least_workers(self.policy.stragglers)} workers"

    @property
    def _name(self) -> str:
        assert self.policy is not None, "nothing is coded without a policy"
        return f"{self.policy.kind} with s={self.policy.stragglers}"

    @property
    def num_copies(self) -> int:
        """Leases beyond one for each micro-batch."""
        return sum(map(len, self._left.values())) - self._num_micro_batches

    def refusal(self, worker: int, lease: Lease) -> str:
        """Why an answer is none of those that are waited for; empty if it is."""
        if self.is_on != (lease.combine is Combine.CODED):
            return f"this attempt is {'' if self.is_on else 'not '}coded"
        if self.is_on and lease not in self._left.get(worker, ()):
            return "it is not in the worker's share of the code"
        return ""

    def granted(self, worker: int, lease: Lease) -> None:
        """It is in the worker's sum."""
        self._left[worker].discard(lease)

    @property
    def is_complete(self) -> bool:
        """Whether the sums that count suffice. Without a code they always do."""
        return len(self._incomplete) <= self._num_stragglers

    def lost(self, queues: Mapping[int, Collection[Lease]]) -> str:
        """Why the attempt can never be complete; empty if it can.

        Args:
            queues: what each connected worker still holds.
        """
        lost = [
            one for one in self._incomplete if not self._left[one].issubset(queues.get(one, ()))
        ]
        if len(lost) <= self._num_stragglers:
            return ""
        return f"the sums of workers {lost} are lost, and {self._num_stragglers} may be missing"

    def decoding(self) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
        """(worker, half) of each sum that counts, and what to multiply it with."""
        missing = [self._places[worker] for worker in self._incomplete]
        answers = decoding(len(self._places), missing, seed=self._seed)
        workers = [worker for worker, left in self._left.items() if not left]
        slots = tuple((worker, 0) for worker in workers)
        return slots, tuple(answers[self._places[worker]] for worker in workers)

    @property
    def _incomplete(self) -> list[int]:
        return [worker for worker, left in self._left.items() if left]

    @property
    def _num_stragglers(self) -> int:
        return self.policy.stragglers if self.policy is not None else 0
