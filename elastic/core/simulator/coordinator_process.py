"""A simulated coordinator: what the real actor does around the protocol class, in virtual time.

It carries out actions one by one, so that it may die between any two, and decides nothing that
the protocol decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic.core.protocol import coordinator as coord
from elastic.core.protocol.messages import Admit, Look, Membership, Report
from elastic.core.simulator.world import END_OF_FILE, Link, Process
from policies.owning import SlowLink

if TYPE_CHECKING:
    from elastic.core.simulator.job import Job

LOOK_S = 0.1
PLAN_LOOKS = 5


class CoordinatorProcess(Process):
    """The coordinator: looks at the world every now and then, and at every report."""

    def __init__(self, job: Job, number: int, target: int) -> None:
        super().__init__(job.clock, f"coordinator-{number}")
        self.job = job
        self.proto = job.build.coordinator(job.limits, target, number == 1)
        self._known = {worker.worker for worker in job.workers.values() if worker.alive}
        self._reports: dict[int, Report] = {}
        self._links: dict[int, Link] = {}
        self._newest = self._num_looks = 0
        self.after(0.05, self._look)

    def died(self) -> None:
        self.job.coordinator_died(self)

    def holds(self, link: Link) -> bool:
        return link in self._links.values()

    def drop_link(self, link: Link) -> None:
        """Nothing was heard for too long, or its other end is closed."""
        for node, one in list(self._links.items()):
            if one is link:
                del self._links[node]
                self._reports.pop(node, None)

    def _look(self) -> None:
        for node, machine in list(self.job.machines.items()):
            if node not in self._links:
                link = self.job.network.connect(self, machine)
                if link is not None:
                    self._links[node] = link
                    link.send(self, Report(0, Membership(), ()))
        self._ask_to_stop()
        self._decide()
        if self.alive:
            self._plan_traffic()
            self.after(LOOK_S, self._look)

    def _plan_traffic(self) -> None:
        """Say now and then, on a job of several nodes, that other links are slow: owners change."""
        self._num_looks += 1
        number, late = divmod(self._num_looks, PLAN_LOOKS)
        nodes = self.proto.membership.nodes
        if late or len(nodes) < 2:
            return
        other = nodes[(number + 1) % len(nodes)] if number % 3 == 1 else None
        slow = (SlowLink(nodes[number % len(nodes)], other, 8.0),) if number % 3 else ()
        for link in self._links.values():
            link.send(self, self.job.over_the_wire(Look(slow)))

    def run(self) -> None:
        while self.inbox and self.alive:
            connection, item = self.inbox.popleft()
            node = next((one for one, link in self._links.items() if link is connection), None)
            if node is None:
                continue
            if item is END_OF_FILE:
                self.drop_link(self._links[node])
            elif isinstance(item, Report):
                self._reports[node] = item
            self._decide()

    def _decide(self) -> None:
        lead = next((one for one in self._reports.values() if self._leads(one)), None)
        view = coord.View(
            self.clock.now_s,
            lead,
            {one: self.job.life(one) for one in sorted(self._known)},
            self.job.nodes(),
            others={one: report for one, report in self._reports.items() if report is not lead},
            homes={one: self.job.workers[one].machine.node for one in self._known},
        )
        for action in self.proto.decide(view):
            self.job.point(self, type(action).__name__, "before")
            if not self.alive:
                return
            self.clock.note(self.name, "does", action)
            if not self._do(action):
                return

    def _leads(self, report: Report) -> bool:
        return report.leads and report.membership.nodes[0] == report.node

    def _exists(self, membership: Membership) -> bool:
        """Whether this generation is the one of its number; if not, take up the one that is."""
        if membership.generation <= self._newest:
            return True  # said again
        other = self.job.put_generation(membership)
        self._newest = membership.generation
        if other is not None:
            self.proto.adopt(other)
        return other is None

    def _ask_to_stop(self) -> None:
        for link in self._links.values():
            if self.job.stops:
                link.send(self, self.job.stops[-1])

    def _do(self, action: coord.Action) -> bool:
        """False if nothing that follows may be done."""
        match action:
            case coord.SetMembership(membership):
                if not self._exists(membership):
                    return False
                for node, link in self._links.items():
                    report = self._reports.get(node)
                    if report is None or report.membership.generation < membership.generation:
                        link.send(self, self.job.over_the_wire(Admit(membership)))
            case coord.StartWorker(worker, node):
                self._known.add(worker)
                self.job.start_worker(worker, node)
            case coord.KillWorker(worker):
                self._known.discard(worker)
                self.job.kill_later(worker)
            case coord.StartAggregator(node):
                self.job.start_aggregator(node)
            case coord.Note(kind):
                self.clock.seen[kind] += 1
        self.job.point(self, type(action).__name__, "after")
        return self.alive
