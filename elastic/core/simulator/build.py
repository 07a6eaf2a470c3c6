"""The protocol that a simulated job runs: the real classes, with their moves counted.

A test may put a broken subclass in the place of one, to see that the simulator notices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from elastic.core.protocol.aggregator import Aggregator, Recovered, Rules
from elastic.core.protocol.aggregator import Phase as AggregatorPhase
from elastic.core.protocol.coordinator import Coordinator, Limits
from elastic.core.protocol.node import Node
from elastic.core.protocol.worker import Phase as WorkerPhase
from elastic.core.protocol.worker import Worker


class RecordedWorker(Worker):
    """A worker whose moves are counted."""

    def __init__(self, worker: int, pid: int, seen: Counter[str]) -> None:
        super().__init__(worker, pid)
        self._seen_moves = seen

    def _move(self, phase: WorkerPhase) -> None:
        self._seen_moves[f"worker {self.phase.name} -> {phase.name}"] += 1
        super()._move(phase)


class RecordedAggregator(Aggregator):
    """An aggregator whose moves are counted."""

    def __init__(self, rules: Rules, recovered: Recovered, node: int, seen: Counter[str]) -> None:
        super().__init__(rules, recovered, node)
        self._seen_moves = seen

    def _move(self, phase: AggregatorPhase) -> None:
        self._seen_moves[f"aggregator {self.phase.name} -> {phase.name}"] += 1
        super()._move(phase)


@dataclass(frozen=True, slots=True)
class Build:
    """The protocol under test. Mutations replace a part of it."""

    worker: Callable[[int, int, Counter[str]], Worker] = RecordedWorker
    aggregator: Callable[[Rules, Recovered, int, Counter[str]], Aggregator] = RecordedAggregator
    node: Callable[..., Node] = Node
    coordinator: Callable[[Limits, int, bool], Coordinator] = Coordinator
    needs_lock: bool = True
    needs_generations: bool = True
