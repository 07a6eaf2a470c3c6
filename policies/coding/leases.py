"""How long a step would take on workers that lease micro-batches, under the policy they really run.

Pure: drives `policies.scheduling` over given delays, as the aggregator of a job does; what it does
not know of is how fast messages are, and that workers share cores. Letters: N workers.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

from policies.coding.codes import Floats
from policies.scheduling import Duplicate, IdleView, Queue, Shares, StepView, Take, Wait


@dataclass(slots=True)
class _Worker:
    """`queue` begins with what it computes. `delay_s` is still to pass before it computes first."""

    delay_s: float
    cost_s: float
    queue: list[int] = field(default_factory=list)
    since_s: float = 0.0
    is_delayed: bool = False
    turn: int = 0


class Step:
    """One step in virtual time.

    Args:
        delays_N: seconds that pass before a worker computes its first micro-batch.
        costs_N: seconds of each of its micro-batches.
        pace_s: what is thought to be usual for one micro-batch.
    """

    def __init__(
        self,
        policy: Shares,
        num_micro_batches: int,
        delays_N: Floats,
        costs_N: Floats,
        pace_s: float,
    ) -> None:
        self._policy = policy
        self._pace_s = pace_s
        self._open = set(range(num_micro_batches))
        self._workers = [
            _Worker(float(delay_s), float(cost_s))
            for delay_s, cost_s in zip(delays_N, costs_N, strict=True)
        ]
        self._order = itertools.count()
        self._due: list[tuple[float, int, int, int]] = []

    def run(self) -> float:
        """Seconds until every micro-batch was answered once."""
        names = dict.fromkeys(range(len(self._workers)), self._pace_s)
        assigned = self._policy.assign(StepView(names, sorted(self._open), {}))
        for name, queue in assigned.queues.items():
            self._workers[name].queue = list(queue)
        for name in range(len(self._workers)):
            self._next(name, 0.0)
        now_s = 0.0
        while self._open:
            now_s, _, name, turn = heapq.heappop(self._due)
            if turn == self._workers[name].turn:
                self._turn(name, now_s)
        return now_s

    def _turn(self, name: int, now_s: float) -> None:
        """What a worker waited for is there: its delay or its work is over, or it may look."""
        worker = self._workers[name]
        if worker.is_delayed or not worker.queue:
            worker.is_delayed = False
            self._next(name, now_s)
            return
        done = worker.queue[0]
        self._open.discard(done)
        for other, one in enumerate(self._workers):
            computes = bool(one.queue) and one.queue[0] == done and not one.is_delayed
            one.queue = [micro_batch for micro_batch in one.queue if micro_batch != done]
            if computes:  # the others give it up
                one.since_s = now_s
                self._next(other, now_s)

    def _next(self, name: int, now_s: float) -> None:
        worker = self._workers[name]
        worker.turn += 1
        if not worker.queue:
            self._look(name, now_s)
        elif worker.delay_s > 0:
            delay_s, worker.delay_s, worker.is_delayed = worker.delay_s, 0.0, True
            self._wait(name, now_s + delay_s)
        else:
            self._wait(name, now_s + worker.cost_s)

    def _wait(self, name: int, until_s: float) -> None:
        heapq.heappush(self._due, (until_s, next(self._order), name, self._workers[name].turn))

    def _look(self, name: int, now_s: float) -> None:
        """An idle worker takes something, or looks again later."""
        if not self._open or not self._policy.helps:
            return
        held = {one for worker in self._workers for one in worker.queue}
        queues = [
            Queue(
                other,
                tuple(one.queue),
                one.since_s,
                self._pace_s,
                silent_s=now_s - one.since_s if one.is_delayed else 0.0,
            )
            for other, one in enumerate(self._workers)
            if other != name
        ]
        view = IdleView(now_s, name, self._pace_s, sorted(self._open - held), queues)
        match self._policy.decide(view):
            case Wait(until_s):
                self._wait(name, until_s)
                return
            case Take(micro_batch, int(holder)):
                self._workers[holder].queue.remove(micro_batch)
            case Take(micro_batch) | Duplicate(micro_batch):
                pass
        self._workers[name].queue = [micro_batch]
        self._workers[name].since_s = now_s
        self._next(name, now_s)
