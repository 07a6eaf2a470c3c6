"""What the process of a joining node does besides: receives a copy, keeps and applies totals.

Decides nothing that the protocol decides.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from elastic.core.protocol.events import Copied, Copy, Event, Update, Updated
from elastic.core.simulator.invariants import Sum, Violation
from elastic.core.simulator.world import Share, Total

if TYPE_CHECKING:
    from elastic.core.simulator.aggregator_process import AggregatorProcess

Name = tuple[int, int]  # the term of a lead, and the number of a copy or a round


class CatchingUp:
    """The copies and totals that reached one process. Of each there is one part per member."""

    def __init__(self, process: AggregatorProcess) -> None:
        self._process = process
        self._shares: dict[Name, dict[int, int]] = {}
        self._totals: dict[Name, dict[int, Total]] = {}
        self._copy: tuple[Name, Copy] | None = None
        self._kept: dict[int, tuple[Name, Update]] = {}
        self._running: tuple[Name, Update, Sum] | None = None

    def begin(self, name: Name, copy: Copy) -> None:
        """Nothing that is here counts from now on."""
        self._process.clock.seen["copy begun anew" if self._copy else "copy begun"] += 1
        self._copy, self._running = (name, copy), None
        self._kept.clear()
        memory = self._process.machine.memory
        for version in memory.versions:
            version.torn = True
            version.writes += 1
        memory.serial += 1
        self._copied()

    def share(self, node: int, share: Share) -> None:
        self._shares.setdefault((share.term, share.number), {})[node] = share.digest
        self._copied()

    def keep(self, name: Name, update: Update) -> None:
        self._kept[update.round] = name, update

    def total(self, node: int, total: Total) -> None:
        self._totals.setdefault((total.term, total.round), {})[node] = total
        self._apply_if_complete()

    def drop(self, number: int) -> None:
        """A round was given up."""
        if self._kept.pop(number, None) is not None:
            self._process.clock.seen["kept totals dropped"] += 1
        if self._running is not None and self._running[1].round == number:
            self._running = None

    def apply(self, number: int) -> None:
        process = self._process
        name, update = self._kept.pop(number)
        running = Sum(process.machine.memory, process.job.truth, update, set())
        self._running = name, update, running
        self._apply_if_complete()

    def _copied(self) -> None:
        if self._copy is None:
            return
        name, copy = self._copy
        shares = self._shares.get(name, {})
        if not shares.keys() >= set(copy.nodes):
            return
        if len(set(shares.values())) > 1:
            raise Violation(f"the shares of copy {copy} differ: {shares}")
        memory = self._process.machine.memory
        version = memory.versions[copy.state.step % 2]
        version.digest, version.torn = next(iter(shares.values())), False
        memory.serial += 1
        del self._shares[name]
        self._say(Copied(copy.number))

    def _apply_if_complete(self) -> None:
        if self._running is None:
            return
        name, update, running = self._running
        totals = self._totals.get(name, {})
        if totals.keys() >= set(update.nodes):
            seconds = self._process.clock.rng.uniform(0.004, 0.012)
            self._process.after(seconds, partial(self._applied, name, running))

    def _applied(self, name: Name, running: Sum) -> None:
        if self._running is None or self._running[2] is not running:
            return
        totals = self._totals.pop(name, None)
        if totals is None:
            return  # said twice
        parts = {total.entries for total in totals.values()}
        if len(parts) > 1:
            raise Violation(f"the totals of round {name} differ between their owners")
        running.end(parts)
        self._process.clock.seen["kept round applied"] += 1
        number, self._running = self._running[1].round, None
        self._say(Updated(round=number))

    def _say(self, event: Event) -> None:
        self._process.hear(event)
