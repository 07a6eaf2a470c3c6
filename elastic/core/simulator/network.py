"""The hosts of a simulated job and the links between them, which are cut and come back.

Carries nothing itself and decides nothing: a link is given up by an end that heard nothing for too
long, as the real processes do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from elastic.core.simulator.aggregator_process import AggregatorProcess
from elastic.core.simulator.coordinator_process import CoordinatorProcess
from elastic.core.simulator.memory import Memory
from elastic.core.simulator.world import Clock, Link, Process

SILENT_S = (0.3, 0.8)  # after so long of nothing a link is given up
DIAL_S = (0.01, 0.1)  # and opened again after that, where it can be


@dataclass(eq=False)
class Machine:
    """A node: what its processes share. `is_cut`: nothing from elsewhere reaches it.

    `is_lost`: cut off, or frozen, for ever; it comes to the cluster at `comes_s`.
    """

    node: int
    memories: tuple[Memory, ...]
    """Of each model; who acts is said by the first."""
    listener: AggregatorProcess | None = None
    lock_owner: AggregatorProcess | None = None
    workers: set[int] = field(default_factory=set)
    is_cut: bool = False
    is_alive: bool = True
    is_lost: bool = False
    has_left: bool = False
    departs: bool = False
    comes_s: float = 0.0
    dead_s: float = 0.0

    @property
    def memory(self) -> Memory:
        return self.memories[0]


class Network:
    """All links of a job: between acting aggregators, and from the coordinator to them."""

    def __init__(self, clock: Clock, machines: Mapping[int, Machine]) -> None:
        self._clock = clock
        self._machines = machines
        self._links: list[Link] = []
        self._cut: set[frozenset[int]] = set()

    def link_all(self, machine: Machine) -> None:
        """The aggregator of a node begins to act: link it with those of all others."""
        for other in self._machines.values():
            if other is not machine:
                self._link(machine, other)

    def connect(self, coordinator: CoordinatorProcess, machine: Machine) -> Link | None:
        """A connection of the coordinator to the acting aggregator of a node, if it answers."""
        if machine.listener is None or machine.is_cut or machine.listener.stopped:
            return None
        return self._open(coordinator, machine.listener)

    def cut(self, machine: Machine) -> None:
        """Nothing reaches a node any more, nor comes from it."""
        machine.is_cut = True
        for link in self._links_of(machine):
            self._cut_link(link)

    def cut_between(self, one: Machine, other: Machine) -> None:
        """Nothing goes between these two any more; all others reach both."""
        self._cut.add(frozenset((one.node, other.node)))
        for link in self._links_of(one):
            if other in tuple(self._hosts(link)):
                self._cut_link(link)

    def heal(self, machine: Machine) -> None:
        """The node can be reached again. Links that an end has given up are closed."""
        machine.is_cut = False
        self._cut = {pair for pair in self._cut if machine.node not in pair}
        for link in self._links_of(machine):
            if not self._is_cut(*self._hosts(link)):
                self._mend(link)
        self._dial(machine)

    def reaches_all(self, machine: Machine) -> bool:
        """Whether that node is awake, and nothing is cut between it and any other."""
        listener = machine.listener
        return (
            listener is not None
            and not listener.stopped
            and not machine.is_lost
            and not any(self._is_cut(machine, one) for one in self._machines.values())
        )

    def froze(self, process: AggregatorProcess) -> None:
        """A stopped process says nothing: the other ends of its links give them up."""
        for link in self._links_of(process.machine):
            other = link.other(process)
            self._clock.push(self._draw_s(SILENT_S), partial(self._frozen, link, process, other))

    def _cut_link(self, link: Link) -> None:
        link.cut()
        for end in link.ends:
            self._clock.push(self._draw_s(SILENT_S), partial(self._silent, link, end))

    def _is_cut(self, *machines: Machine) -> bool:
        """Whether nothing goes between these, or from this one to anywhere."""
        pair = frozenset(one.node for one in machines)
        return any(one.is_cut for one in machines) or pair in self._cut

    def _link(self, one: Machine, other: Machine) -> None:
        """Link two nodes whose aggregators act and can reach each other."""
        a, b = one.listener, other.listener
        if a is None or b is None or self._is_cut(one, other) or a.stopped or b.stopped:
            return
        link = self._open(a, b)
        a.linked(link, b.node)
        b.linked(link, a.node)

    def _open(self, opener: Process, acceptor: AggregatorProcess) -> Link:
        link = Link(self._clock, opener, acceptor)
        self._links = [one for one in self._links if not one.closed]
        self._links.append(link)
        return link

    def _dial(self, machine: Machine) -> None:
        for other in self._machines.values():
            if other is not machine:
                again = partial(self._relink, machine, other)
                self._clock.push(self._draw_s(DIAL_S), again)

    def _relink(self, one: Machine, other: Machine) -> None:
        a, b = one.listener, other.listener
        if a is not None and b is not None and (b.node not in a.links or a.node not in b.links):
            self._link(one, other)

    def _links_of(self, machine: Machine) -> list[Link]:
        return [one for one in self._links if not one.closed and machine in tuple(self._hosts(one))]

    def _hosts(self, link: Link) -> Iterable[Machine]:
        return (end.machine for end in link.ends if isinstance(end, AggregatorProcess))

    def _silent(self, link: Link, process: Process) -> None:
        """Nothing came over a link for a while: that end gives it up, once it is awake."""
        if not link.is_cut or not process.alive:
            return
        if process.stopped:
            self._clock.push(self._draw_s(SILENT_S), partial(self._silent, link, process))
            return
        self._clock.seen["silent link given up"] += 1
        _drop(process, link)

    def _frozen(self, link: Link, stopped: AggregatorProcess, other: Process) -> None:
        """The other end of a stopped process gives their link up, once it is awake."""
        if not (stopped.alive and stopped.stopped and other.alive) or link.closed:
            return
        if other.stopped:
            again = partial(self._frozen, link, stopped, other)
            self._clock.push(self._draw_s(SILENT_S), again)
            return
        _drop(other, link)
        link.close(other)

    def _mend(self, link: Link) -> None:
        """What was sent arrives, unless an end has given the link up: the other end hears so."""
        if all(_keeps(end, link) for end in link.ends):
            link.heal()
            return
        for end in link.ends:
            if _keeps(end, link):
                _drop(end, link)

    def redial(self, process: AggregatorProcess) -> None:
        """A process that was stopped looks who can be reached."""
        if process.machine.listener is process:
            self._dial(process.machine)

    def _draw_s(self, bounds_s: tuple[float, float]) -> float:
        return self._clock.rng.uniform(*bounds_s)


def _drop(process: Process, link: Link) -> None:
    if isinstance(process, AggregatorProcess | CoordinatorProcess):
        process.drop_link(link)


def _keeps(process: Process, link: Link) -> bool:
    return (
        isinstance(process, AggregatorProcess | CoordinatorProcess)
        and process.alive
        and process.holds(link)
    )
