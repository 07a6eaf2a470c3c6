"""A simulated coordinator: what the real actor does around the protocol class, in virtual time.

It carries out actions one by one, so that it may die between any two, and decides nothing that
the protocol decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic.core.protocol import coordinator as coord
from elastic.core.protocol.messages import Admit, Membership, Report
from elastic.core.simulator.world import END_OF_FILE, Connection, Process

if TYPE_CHECKING:
    from elastic.core.simulator.job import Job

LOOK_S = 0.1


class CoordinatorProcess(Process):
    """The coordinator: looks at the world every now and then, and at every report."""

    def __init__(self, job: Job, number: int, target: int) -> None:
        super().__init__(job.clock, f"coordinator-{number}")
        self.job = job
        self.proto = job.build.coordinator(job.limits, target, number == 1)
        self._known = {worker.worker for worker in job.workers.values() if worker.alive}
        self._report: Report | None = None
        self._connection: Connection | None = None
        self.after(0.05, self._look)

    def died(self) -> None:
        self.job.coordinator_died()

    def _look(self) -> None:
        listener = self.job.listener
        if self._connection is None and listener is not None:
            self._connection = Connection(self.clock, self, listener)
            self._connection.send(self, Report(0, Membership(), ()))
        self._ask_to_stop()
        self._decide()
        if self.alive:
            self.after(LOOK_S, self._look)

    def run(self) -> None:
        while self.inbox and self.alive:
            connection, item = self.inbox.popleft()
            if connection is not self._connection:
                continue
            if item is END_OF_FILE:
                self._connection = self._report = None
            elif isinstance(item, Report):
                self._report = item
            self._decide()

    def _decide(self) -> None:
        processes = {one: self.job.life(one) for one in sorted(self._known)}
        num = sum(one.alive for one in self.job.aggregators)
        view = coord.View(self.clock.now_s, self._report, processes, num)
        for action in self.proto.decide(view):
            self.job.point(self, type(action).__name__, "before")
            if not self.alive:
                return
            self.clock.note(self.name, "does", action)
            self._do(action)

    def _ask_to_stop(self) -> None:
        if self._connection is not None and self.job.stops:
            self._connection.send(self, self.job.stops[-1])

    def _do(self, action: coord.Action) -> None:
        match action:
            case coord.SetMembership(membership):
                if self._connection is not None:
                    self._connection.send(self, self.job.over_the_wire(Admit(membership)))
            case coord.StartWorker(worker):
                self._known.add(worker)
                self.job.start_worker(worker)
            case coord.KillWorker(worker):
                self._known.discard(worker)
                self.job.kill_later(worker)
            case coord.StartAggregator():
                self.job.start_aggregator()
            case coord.Note(kind):
                self.clock.seen[kind] += 1
        self.job.point(self, type(action).__name__, "after")
