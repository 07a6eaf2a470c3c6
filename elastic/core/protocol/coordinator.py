"""The coordinator's side of membership, without I/O.

Level-triggered: each `decide` looks at the world again and says what is missing, so a lost or
repeated action does no harm, and a restarted coordinator needs no memory beyond the membership
that the aggregator keeps. Steps never wait for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from elastic.core.protocol.messages import Membership, Report
from policies.growing import giver, moves
from policies.restarts import BackOff, GiveUp, Hold, RestartView, Start


class Life(Enum):
    """What the coordinator knows of a worker's process."""

    STARTING = auto()
    ALIVE = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True)
class View:
    """The world. `report` is None while the aggregator that leads cannot be reached."""

    now_s: float
    report: Report | None
    processes: Mapping[int, Life]
    aggregators: Mapping[int, int]
    """How many live on each node that the job may use."""
    ends: Mapping[int, str] = field(default_factory=dict)
    """What is known of the ends of dead workers, in words."""
    others: Mapping[int, Report] = field(default_factory=dict)
    """What the nodes say that do not lead, as far as they can be reached."""
    homes: Mapping[int, int] = field(default_factory=dict)
    """The nodes of workers; 0 where none is named."""
    unfit: frozenset[int] = frozenset()
    """Workers that become members only where there would be too few without them."""
    held: frozenset[int] = frozenset()
    """Nodes that may not become members now."""

    def home(self, worker: int) -> int:
        return self.homes.get(worker, 0)


@dataclass(frozen=True, slots=True)
class SetMembership:
    """Make the generation exist, unless another one of its number does; tell who is behind.

    What follows is only done if that succeeds; else `adopt` the one that exists.
    """

    membership: Membership


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: int
    node: int = 0


@dataclass(frozen=True, slots=True)
class KillWorker:
    """End the process and forget it."""

    worker: int


@dataclass(frozen=True, slots=True)
class StartAggregator:
    """One more aggregator on a node: the acting one's successor, or a standby."""

    node: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    kind: str
    reason: str
    worker: int | None = None
    node: int | None = None


Action = SetMembership | StartWorker | KillWorker | StartAggregator | Note


@dataclass(frozen=True, slots=True)
class Limits:
    """`workers` and `nodes` of the job file, and whether an aggregator stands by.

    `first_step` is the one that the job begins with, another one than 0 if it was resumed.
    `start_s` is long enough for any start: a worker that needs longer is taken to hang. Where an
    aggregator says nothing for `silence_s` another one is started: it waits while the first
    prepares, and ends it if it hangs. A node that has been joining for `join_s` is told of: nobody
    waits for it, but somebody may wonder. Where `replicas` nodes or more are lost within
    `patience_s` state would be gone with them: those that are only silent are waited for, as long.
    """

    min_workers: int
    max_workers: int
    spare: int = 1
    standby: bool = True
    min_nodes: int = 1
    max_nodes: int = sys.maxsize
    first_step: int = 0
    restarts: BackOff = BackOff()
    start_s: float = 600.0
    silence_s: float = 10.0
    join_s: float = 30.0
    replicas: int = sys.maxsize
    patience_s: float = 10.0


@dataclass(slots=True)
class Coordinator:
    """Decides who is a member. `target` is how many members are wanted, on `target_nodes` nodes.

    The numbers below the first target are those of the workers that the job begins with. Only a
    `fresh` coordinator, the first one of a job, starts them: at once, so that they load while the
    first aggregator prepares. Later coordinators know that these numbers are taken.
    """

    limits: Limits
    target: int
    fresh: bool = False
    target_nodes: int = field(init=False)
    avoided: frozenset[int] = frozenset()
    """Nodes on which nothing is started, nor made a member, while there are others."""
    _membership: Membership = field(init=False)
    _num_first: int = field(init=False)
    _deaths_s: list[float] = field(default_factory=list)
    _gone: set[int] = field(default_factory=set)
    _came: set[int] = field(default_factory=set)
    _failed_starts: int = 0
    _starting_s: dict[int, float] = field(default_factory=dict)
    _waits: dict[int, tuple[bool, float]] = field(default_factory=dict)
    _joining_s: dict[int, float] = field(default_factory=dict)
    _settled: int = 0
    _losses_s: list[float] = field(default_factory=list)
    _silent_s: dict[int, float] = field(default_factory=dict)
    _given_up: str = ""
    _empty: bool = False
    _num_noted: int | None = None

    def __post_init__(self) -> None:
        self._num_first = self.target
        self.target_nodes = self.limits.max_nodes
        self._membership = Membership(next_worker=self._num_first)

    def scale(self, target: int | None, target_nodes: int | None = None) -> str:
        """Want `target` members on `target_nodes` nodes from now on; None: as before.

        Returns the reason of a refusal, after which all is as before, or nothing.
        """
        limits = self.limits
        if target is not None and not limits.min_workers <= target <= limits.max_workers:
            low, high = limits.min_workers, limits.max_workers
            return f"{target} workers asked for; workers.min is {low}, workers.max is {high}"
        if target_nodes is not None and not limits.min_nodes <= target_nodes <= limits.max_nodes:
            low, high = limits.min_nodes, limits.max_nodes
            return f"{target_nodes} nodes asked for; nodes.min is {low}, nodes.max is {high}"
        self.target = self.target if target is None else target
        self.target_nodes = self.target_nodes if target_nodes is None else target_nodes
        self._given_up = ""
        self._deaths_s.clear()
        self._failed_starts = 0
        return ""

    def remove(self, worker: int) -> None:
        """Let one worker leave, and want one fewer."""
        self.target = max(self.limits.min_workers, self.target - 1)
        self.swap(worker)

    def swap(self, worker: int) -> None:
        """Let one worker leave, once it holds nothing, and another take its place."""
        members = tuple(one for one in self._membership.members if one != worker)
        if members != self._membership.members:
            leaving = (*self._membership.leaving, worker)
            self._change(replace(self._membership, members=members, leaving=leaving))

    def leave(self, node: int) -> str:
        """Let a node go as planned, and recompute nothing. To be said as long as it holds.

        Its workers finish what they hold; the membership goes on without it once it holds nothing
        of the running step. Returns the reason of a refusal, or nothing.
        """
        now = self._membership
        stay = [one for one in now.nodes if one != node and one not in now.departing]
        if not self._settled or node in now.former or node in now.departing:
            return ""
        if node not in now.nodes:
            joining = tuple(one for one in now.joining if one != node)
            self._change(replace(now, joining=joining, former=(*now.former, node)))
        elif stay:
            self._change(replace(now, departing=(*now.departing, node)))
        else:
            return f"node {node} is the last one that stays: nobody could go on"
        return ""

    @property
    def has_given_up(self) -> bool:
        """No more workers are started until somebody scales."""
        return bool(self._given_up)

    @property
    def membership(self) -> Membership:
        return self._membership

    def decide(self, view: View) -> list[Action]:
        """What to do now, in order."""
        reports = [*view.others.values(), *([view.report] if view.report is not None else [])]
        for one in reports:
            if one.membership.generation > self._settled:
                self.adopt(one.membership)  # we were restarted: the aggregators remember
        if view.report is not None and view.report.node != self._membership.nodes[0]:
            view = replace(view, report=None)  # it has not heard yet that it leads no more
        report = view.report
        came = {worker for worker, life in view.processes.items() if life is Life.ALIVE}
        if came - self._came:
            self._came |= came
            self._failed_starts = 0
        actions = self._bury(view)
        if report is not None and report.finished:
            return actions
        self._note_waiting(view, actions)
        self._settle_nodes(view, actions)
        self._let_surplus_go(actions)
        self._note_late(view, actions)
        if report is not None:
            self._settle_members(view, report, actions)
            now = self._membership
            if (now.target, now.target_nodes) != (self.target, self.target_nodes):
                self._change(now)
        starts = self._start_what_is_missing(view)
        generation = self._membership.generation
        behind = any(one.membership.generation < generation for one in reports)
        if behind or generation > self._settled:
            self._settled = generation
            actions.append(SetMembership(self._membership))
        return actions + starts

    def adopt(self, membership: Membership) -> None:
        """Take up a generation that exists."""
        self._membership = membership
        self._settled = membership.generation
        self.target = membership.target or self.target
        self.target_nodes = membership.target_nodes or self.target_nodes

    def _let_surplus_go(self, actions: list[Action]) -> None:
        """Where fewer nodes are wanted the newest leave, those that only join before others."""
        if not self._settled:
            return
        for node in (*self._staying, *self._membership.joining)[self.target_nodes :]:
            if not self.leave(node):
                reason = f"node {node}: {self.target_nodes} wanted"
                actions.append(Note("node_leaving", reason, node=node))

    def _settle_nodes(self, view: View, actions: list[Action]) -> None:
        """Which nodes take part from now on. A new one receives the parameters before it does."""
        now = self._membership
        lost = self._given_up_of(view, _lost_nodes(view, now.nodes))
        kept = [one for one in now.nodes if one not in lost]
        if not kept:
            return  # nothing is left that could go on
        departing = [one for one in now.departing if one in kept]
        if departing and set(departing) == set(kept):
            actions.append(Note("node_stays", f"nobody else is left than {departing}"))
            departing = []
        free = [] if lost else self._free(view)  # it may keep what the lost one kept
        left = [one for one in free if one in departing]
        kept = [one for one in kept if one not in left]
        joining = [one for one in now.joining if one in view.aggregators]
        joined = []
        if view.report is not None:
            known = {*now.nodes, *now.former, *now.joining}
            new = [one for one in view.others if one not in known and one not in view.held]
            joined = [one for one in joining if one in view.report.ready and one in view.others]
            joining = [one for one in joining if one not in joined]
            if view.report.step == self.limits.first_step:  # it has this state by itself
                joined += new
            else:
                joining += new
        departing = [one for one in departing if one in kept]
        after = (*kept, *joined), tuple(joining), tuple(departing)
        if after == (now.nodes, now.joining, now.departing):
            return
        gone = [one for one in now.joining if one not in view.aggregators]
        self._losses_s += [view.now_s] * len(lost)
        for node in (*lost, *gone):
            reason = f"node {node}: the others go on without it"
            actions.append(Note("node_lost", reason, node=node))
        actions += [Note("node_left", f"node {node}: it held nothing", node=node) for node in left]
        for node in joining:
            if node not in now.joining:
                reason = f"node {node} receives the parameters"
                actions.append(Note("node_joining", reason, node=node))
        actions += [Note("node_joined", f"node {node}", node=node) for node in joined]
        ended = (*lost, *left, *gone)
        self._change(
            replace(
                now,
                nodes=(*kept, *joined),
                joining=tuple(joining),
                departing=tuple(departing),
                former=(*now.former, *ended),
                members=tuple(one for one in now.members if view.home(one) not in ended),
                leaving=tuple(one for one in now.leaving if view.home(one) not in ended),
            )
        )

    def _given_up_of(self, view: View, lost: list[int]) -> list[int]:
        """Those that are not waited for: they are dead, or enough copies of all state are left."""
        now_s, limits = view.now_s, self.limits
        self._losses_s = [one for one in self._losses_s if now_s - one < limits.patience_s]
        silent = [one for one in lost if one in view.aggregators]
        self._silent_s = {one: self._silent_s.get(one, now_s) for one in silent}
        if len(self._losses_s) + len(lost) < limits.replicas:
            return lost
        waits = {one for one, at_s in self._silent_s.items() if now_s - at_s < limits.patience_s}
        return [one for one in lost if one not in waits]

    def _free(self, view: View) -> list[int]:
        """Departing nodes that nothing counts on any more, nor can."""
        now, report = self._membership, view.report
        if report is None or report.membership.generation != now.generation:
            return []  # the lead may still grant something there
        busy = {view.home(worker) for worker in (*now.members, *now.leaving)}
        return [one for one in now.departing if one in report.free and one not in busy]

    def _bury(self, view: View) -> list[Action]:
        """Note each death once, and end those that hang."""
        actions: list[Action] = []
        hung = self._stuck_starts(view)
        hung |= dict(view.report.hung) if view.report is not None else {}
        leaving = set(self._membership.leaving)
        for worker, life in sorted(view.processes.items()):
            if worker in self._gone:
                continue
            is_left_over = life is Life.STARTING and view.home(worker) in self._membership.former
            if worker not in hung and life is not Life.DEAD and not is_left_over:
                continue
            actions.append(KillWorker(worker))  # a dead one may have left its process behind
            self._gone.add(worker)
            if worker in leaving:
                actions.append(Note("worker_left", "finished what it held", worker))
                continue
            if view.home(worker) not in (*self._membership.former, *self._membership.joining):
                # else a host died, not a worker
                self._deaths_s.append(view.now_s)
                self._failed_starts += worker not in self._came
            reason = hung.get(worker) or view.ends.get(worker, "its process is gone")
            actions.append(Note("worker_lost", reason, worker))
        return actions

    def _stuck_starts(self, view: View) -> dict[int, str]:
        """Workers whose start takes so long that it will never end, and why that is thought."""
        if view.report is None:  # no start can end: there is nothing to connect to
            self._starting_s = {}
            return {}
        starting = [
            one
            for one, life in view.processes.items()
            if life is Life.STARTING and view.home(one) not in self._membership.joining
        ]
        self._starting_s = {one: self._starting_s.get(one, view.now_s) for one in starting}
        limit_s = self.limits.start_s
        return {
            worker: f"still starting after {limit_s:.0f} s"
            for worker, since_s in self._starting_s.items()
            if view.now_s - since_s > limit_s
        }

    def _settle_members(self, view: View, report: Report, actions: list[Action]) -> None:
        """Who is a member from now on."""
        now = self._membership
        absent = {one for one in (*now.members, *now.leaving) if one not in view.processes}
        for worker in sorted(absent):
            kind = "worker_lost" if worker in now.members else "worker_left"
            actions.append(Note(kind, "ended while no coordinator looked", worker))
        dead = self._gone | absent
        dead |= set(report.lost) & {
            one for one in report.lost if view.processes.get(one) is not Life.ALIVE
        }
        members = [one for one in now.members if one not in dead]
        going = [one for one in sorted(members) if view.home(one) in now.departing]
        members = [one for one in members if one not in going]
        leaving = [*(one for one in now.leaving if one not in dead), *going]
        spare = [
            worker
            for worker in report.connected
            if worker not in members and worker not in leaving and worker not in self._gone
            if view.home(worker) in self._staying
        ]
        fit = [worker for worker in spare if worker not in view.unfit]
        for worker in report.wants_leave:
            if worker in members and (fit or len(members) > 1):  # the last one waits for another
                members.remove(worker)
                leaving.append(worker)
                actions.append(Note("worker_leaving", "its process was told to end", worker))
        num_lacking = max(0, self.limits.min_workers - len(members) - len(fit))
        spare = fit + [worker for worker in spare if worker in view.unfit][:num_lacking]
        is_new = report.step == self.limits.first_step and not now.members
        if is_new and self._waits_for_nodes(view):
            return
        loads = self._loads(view, members)
        while len(members) < self.target and spare:
            members.append(
                min(spare, key=lambda one: (view.home(one) in self.avoided, loads[view.home(one)]))
            )
            spare.remove(members[-1])
            loads[view.home(members[-1])] += 1
            actions.append(Note("worker_joined", f"{len(members)} of {self.target}", members[-1]))
        while len(members) > self.target:
            leaving.append(max(members, key=lambda one: (loads[view.home(one)], one)))
            members.remove(leaving[-1])
            loads[view.home(leaving[-1])] -= 1
            actions.append(Note("worker_leaving", f"{self.target} wanted", leaving[-1]))
        for worker in spare:
            node = giver(loads, view.home(worker))
            if node is None or view.home(worker) in self.avoided:
                continue
            leaving.append(max(one for one in members if view.home(one) == node))
            members[members.index(leaving[-1])] = worker
            loads[node] -= 1
            loads[view.home(worker)] += 1
            reason = f"worker {leaving[-1]} of node {node} leaves for it: nodes share alike"
            actions.append(Note("worker_joined", reason, worker))
        if not members and not self._empty and now.members:
            actions.append(Note("no_workers", "waiting for a worker; the state is kept"))
        self._empty = not members
        if (tuple(members), tuple(leaving)) != (now.members, now.leaving):
            self._change(replace(now, members=tuple(members), leaving=tuple(leaving)))

    def _note_waiting(self, view: View, actions: list[Action]) -> None:
        """Say it where the job cannot begin, once for each number of nodes that are there."""
        step = self.limits.first_step if view.report is None else view.report.step
        if self._membership.members or step > self.limits.first_step:
            return
        num, least = len(view.aggregators), self.limits.min_nodes
        if num < least and num != self._num_noted:
            reason = f"{num} of {least} nodes (nodes.min) are there; the first step waits for"
            actions.append(Note("waiting_for_nodes", f"{reason} {least - num} more"))
        self._num_noted = num

    def _note_late(self, view: View, actions: list[Action]) -> None:
        """Say once which nodes have been joining for long."""
        joining, limit_s = self._membership.joining, self.limits.join_s
        since_s = {node: self._joining_s.get(node, view.now_s) for node in joining}
        for node, at_s in since_s.items():
            if view.now_s - at_s > limit_s:
                reason = (
                    f"node {node} has been joining for {limit_s:.0f} s: it has to receive all"
                    " parameters within one step of the others, which its host or its link has not"
                    " done yet; the others go on without it"
                )
                actions.append(Note("node_joins_late", reason, node=node))
                since_s[node] = float("inf")
        self._joining_s = since_s

    def _waits_for_nodes(self, view: View) -> bool:
        """A job begins on all nodes that there are; whoever comes later joins within a step."""
        now = self._membership
        known = {*now.nodes, *now.former, *now.joining}
        few = len(now.nodes) < self.limits.min_nodes
        return few or not known.issuperset(view.aggregators)

    def _start_what_is_missing(self, view: View) -> list[Action]:
        actions: list[Action] = [
            StartAggregator(node)
            for node, num in view.aggregators.items()
            if node not in self._membership.former and num < self._wanted_aggregators(view, node)
        ]
        if self.fresh and len(view.aggregators) < self.limits.min_nodes:
            return actions  # the first workers are spread over the nodes that the job begins on
        if self.fresh:
            self.fresh = False
            nodes = list(view.aggregators)
            return actions + [
                StartWorker(worker, nodes[worker % len(nodes)]) for worker in range(self._num_first)
            ]
        if view.report is None:
            return actions
        now = self._membership
        leaving, away = {*now.leaving}, {*now.former, *now.departing}
        living = {
            worker: view.home(worker)
            for worker, life in view.processes.items()
            if life is not Life.DEAD and worker not in self._gone and worker not in leaving
            if view.home(worker) not in away
        }
        # before it has members the job waits for all nodes, and for their workers
        staying = {*self._staying} if now.members else {*living.values()}
        here = [worker for worker, node in living.items() if node in staying]
        coming = Counter(node for node in living.values() if node not in staying)
        if self._given_up or not (places := self._places(view, here, coming)):
            return actions
        deaths = RestartView(view.now_s, self._deaths_s, self._failed_starts)
        match self.limits.restarts.decide(deaths):
            case Start():
                # an earlier coordinator may have died before the aggregator heard of its last one
                first = max(self._membership.next_worker, 1 + max(view.processes, default=-1))
                self._change(replace(self._membership, next_worker=first + len(places)))
                actions += [StartWorker(first + num, node) for num, node in enumerate(places)]
            case GiveUp(reason):
                self._given_up = reason
                actions.append(Note("worker_given_up", reason))
            case Hold():
                pass
        return actions

    def _places(self, view: View, living: Sequence[int], coming: Counter[int]) -> list[int]:
        """The nodes on which a worker is to be started, once for each.

        With nothing missing: those that have fewer than others. The first worker of a node that is
        about to take part loads meanwhile, the others would delay it and its aggregator. `coming`
        is how many workers such nodes have: they count for nothing else.
        """
        now = self._membership
        missing = min(self.target + self.limits.spare, self.limits.max_workers + 1) - len(living)
        if missing > 0:
            starting = any(view.processes[worker] is Life.STARTING for worker in living)
            if starting and len(living) >= self.target:
                return []  # spares start one at a time, behind those that are needed
            loads, places = self._loads(view, living), []
            for _ in range(max(1, self.target - len(living))):
                places.append(min(loads, key=lambda one: (one in self.avoided, loads[one], one)))
                loads[places[-1]] += 1
            return places
        if missing < 0 or len(now.members) < self.target:
            return []
        loads = self._loads(view, now.members)
        new = [one for one in view.aggregators if one not in (*now.nodes, *now.former)]
        loads.update(dict.fromkeys(new, 0))
        takers = Counter(taker for _, taker in moves(loads))
        takers.update({node: 1 - takers[node] for node in new if takers[node]})
        for node in self.avoided:
            del takers[node]
        spare = Counter(view.home(one) for one in living if one not in now.members)
        return sorted((takers - spare - coming).elements())

    def _loads(self, view: View, living: Iterable[int]) -> Counter[int]:
        """How many workers live on each node that takes part, and will."""
        loads = Counter(dict.fromkeys(self._staying, 0))
        for worker in living:
            if view.home(worker) in loads:
                loads[view.home(worker)] += 1
        return loads

    @property
    def _staying(self) -> tuple[int, ...]:
        now = self._membership
        return tuple(one for one in now.nodes if one not in now.departing)

    def _wanted_aggregators(self, view: View, node: int) -> int:
        """Two with a standby, behind the first workers; also if the one there is of no use.

        One that hangs before the first workers are there lets none of them start.
        """
        speaks = node in view.others or (
            node == self._membership.nodes[0] and view.report is not None
        )
        first = [view.processes.get(worker) for worker in range(self._num_first)]
        if speaks and Life.STARTING not in first:
            self._waits.pop(node, None)
            return 2 if self.limits.standby else 1
        spoke, since_s = self._waits.get(node, (speaks, view.now_s))
        if spoke != speaks:
            since_s = view.now_s
        self._waits[node] = speaks, since_s
        is_late = view.now_s - since_s > self.limits.silence_s
        return 2 if is_late and (self.limits.standby or not speaks) else 1

    def _change(self, membership: Membership) -> None:
        """Generations follow each other: the next one is that after the last that exists."""
        self._membership = replace(
            membership,
            generation=self._settled + 1,
            target=self.target,
            target_nodes=self.target_nodes,
        )


def _lost_nodes(view: View, nodes: tuple[int, ...]) -> list[int]:
    """Members that cannot go on with those before them. Of the lead all others must say so."""
    lead = nodes[0]
    gone = {one: set(view.others[one].gone) for one in nodes if one in view.others}
    if view.report is not None:
        gone[lead] = set(view.report.gone)
    lost = [one for one in nodes if one not in view.aggregators]
    if lead not in gone and gone and all(lead in theirs for theirs in gone.values()):
        lost.append(lead)
    kept: list[int] = []
    for node in nodes:
        if node not in lost and not any(node in gone.get(one, ()) for one in kept):
            kept.append(node)
    return [one for one in nodes if one not in kept]
