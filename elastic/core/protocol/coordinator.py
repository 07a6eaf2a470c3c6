"""The coordinator's side of membership, without I/O.

Level-triggered: each `decide` looks at the world again and says what is missing, so a lost or
repeated action does no harm, and a restarted coordinator needs no memory beyond the membership
that the aggregator keeps. Steps never wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from elastic.core.protocol.messages import Membership, Report
from policies.restarts import BackOff, GiveUp, Hold, RestartView, Start


class Life(Enum):
    """What the coordinator knows of a worker's process."""

    STARTING = auto()
    ALIVE = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True)
class View:
    """The world. `report` is None while no aggregator can be reached."""

    now_s: float
    report: Report | None
    processes: Mapping[int, Life]
    num_aggregators: int
    ends: Mapping[int, str] = field(default_factory=dict)
    """What is known of the ends of dead workers, in words."""


@dataclass(frozen=True, slots=True)
class SetMembership:
    membership: Membership


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: int


@dataclass(frozen=True, slots=True)
class KillWorker:
    """End the process and forget it."""

    worker: int


@dataclass(frozen=True, slots=True)
class StartAggregator:
    """One more aggregator: the acting one's successor, or a standby."""


@dataclass(frozen=True, slots=True)
class Note:
    kind: str
    reason: str
    worker: int | None = None


Action = SetMembership | StartWorker | KillWorker | StartAggregator | Note


@dataclass(frozen=True, slots=True)
class Limits:
    """`workers` of the job file, and whether an aggregator stands by.

    `start_s` is long enough for any start: a worker that needs longer is taken to hang. Where an
    aggregator says nothing for `silence_s` another one is started: it waits while the first
    prepares, and ends it if it hangs.
    """

    min_workers: int
    max_workers: int
    spare: int = 1
    standby: bool = True
    restarts: BackOff = BackOff()
    start_s: float = 600.0
    silence_s: float = 10.0


@dataclass(slots=True)
class Coordinator:
    """Decides who is a member. `target` is how many members are wanted.

    The numbers below the first target are those of the workers that the job begins with. Only a
    `fresh` coordinator, the first one of a job, starts them: at once, so that they load while the
    first aggregator prepares. Later coordinators know that these numbers are taken.
    """

    limits: Limits
    target: int
    fresh: bool = False
    _membership: Membership = field(init=False)
    _num_first: int = field(init=False)
    _deaths_s: list[float] = field(default_factory=list)
    _gone: set[int] = field(default_factory=set)
    _came: set[int] = field(default_factory=set)
    _failed_starts: int = 0
    _starting_s: dict[int, float] = field(default_factory=dict)
    _silent_s: float | None = None
    _given_up: str = ""
    _empty: bool = False

    def __post_init__(self) -> None:
        self._num_first = self.target
        self._membership = Membership(next_worker=self._num_first)

    def scale(self, target: int) -> str:
        """Want `target` members from now on. Returns the reason of a refusal, or nothing."""
        if not self.limits.min_workers <= target <= self.limits.max_workers:
            low, high = self.limits.min_workers, self.limits.max_workers
            return f"{target} workers asked for; workers.min is {low}, workers.max is {high}"
        self.target = target
        self._given_up = ""
        self._deaths_s.clear()
        self._failed_starts = 0
        return ""

    def remove(self, worker: int) -> None:
        """Let one worker leave, and want one fewer."""
        self.target = max(self.limits.min_workers, self.target - 1)
        members = tuple(one for one in self._membership.members if one != worker)
        if members != self._membership.members:
            leaving = (*self._membership.leaving, worker)
            self._change(replace(self._membership, members=members, leaving=leaving))

    @property
    def has_given_up(self) -> bool:
        """No more workers are started until somebody scales."""
        return bool(self._given_up)

    @property
    def membership(self) -> Membership:
        return self._membership

    def decide(self, view: View) -> list[Action]:
        """What to do now, in order."""
        report = view.report
        if report is not None and report.membership.generation > self._membership.generation:
            self._membership = report.membership  # we were restarted: the aggregator remembers
            self.target = report.membership.target or self.target
        came = {worker for worker, life in view.processes.items() if life is Life.ALIVE}
        if came - self._came:
            self._came |= came
            self._failed_starts = 0
        actions = self._bury(view)
        if report is not None and not report.finished:
            generation = self._membership.generation
            self._settle_members(view, report, actions)
            if self._membership.target != self.target:
                self._change(self._membership)
            behind = report.membership.generation < self._membership.generation
            if behind or self._membership.generation != generation:
                actions.append(SetMembership(self._membership))
        if report is None or not report.finished:
            actions += self._start_what_is_missing(view)
        return actions

    def _bury(self, view: View) -> list[Action]:
        """Note each death once, and end those that hang."""
        actions: list[Action] = []
        hung = self._stuck_starts(view)
        hung |= dict(view.report.hung) if view.report is not None else {}
        leaving = set(self._membership.leaving)
        for worker, life in sorted(view.processes.items()):
            if worker in self._gone:
                continue
            if worker not in hung and life is not Life.DEAD:
                continue
            actions.append(KillWorker(worker))  # a dead one may have left its process behind
            self._gone.add(worker)
            if worker in leaving:
                actions.append(Note("worker_left", "finished what it held", worker))
                continue
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
        starting = [one for one, life in view.processes.items() if life is Life.STARTING]
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
        leaving = [one for one in now.leaving if one not in dead]
        for worker in report.wants_leave:
            if worker in members:
                members.remove(worker)
                leaving.append(worker)
        spare = [
            worker
            for worker in report.connected
            if worker not in members and worker not in leaving and worker not in self._gone
        ]
        while len(members) < self.target and spare:
            members.append(spare.pop(0))
            actions.append(Note("worker_joined", f"{len(members)} of {self.target}", members[-1]))
        while len(members) > self.target:
            leaving.append(members.pop())
            actions.append(Note("worker_leaving", f"{self.target} wanted", leaving[-1]))
        if not members and not self._empty and now.members:
            actions.append(Note("no_workers", "waiting for a worker; the state is kept"))
        self._empty = not members
        if (tuple(members), tuple(leaving)) != (now.members, now.leaving):
            self._change(replace(now, members=tuple(members), leaving=tuple(leaving)))

    def _start_what_is_missing(self, view: View) -> list[Action]:
        actions: list[Action] = []
        if view.num_aggregators < self._wanted_aggregators(view):
            actions.append(StartAggregator())
        if self.fresh:
            self.fresh = False
            return actions + [StartWorker(worker) for worker in range(self._num_first)]
        if view.report is None:
            return actions
        living = [
            worker
            for worker, life in view.processes.items()
            if life is not Life.DEAD
            and worker not in self._gone
            and worker not in self._membership.leaving
        ]
        missing = min(self.target + self.limits.spare, self.limits.max_workers + 1) - len(living)
        starting = sum(view.processes[worker] is Life.STARTING for worker in living)
        if missing <= 0 or (starting and len(living) >= self.target):
            return actions  # spares start one at a time, behind those that are needed
        if self._given_up:
            return actions
        deaths = RestartView(view.now_s, self._deaths_s, self._failed_starts)
        match self.limits.restarts.decide(deaths):
            case Start():
                num = max(1, self.target - len(living))
                # an earlier coordinator may have died before the aggregator heard of its last one
                first = max(self._membership.next_worker, 1 + max(view.processes, default=-1))
                self._change(replace(self._membership, next_worker=first + num))
                actions.append(SetMembership(self._membership))
                actions += [StartWorker(worker) for worker in range(first, first + num)]
            case GiveUp(reason):
                self._given_up = reason
                actions.append(Note("worker_given_up", reason))
            case Hold():
                pass
        return actions

    def _wanted_aggregators(self, view: View) -> int:
        """Two with a standby, behind the first workers; also if the one there is says nothing."""
        if view.report is not None:
            self._silent_s = None
            first = (view.processes.get(worker) for worker in range(self._num_first))
            return 2 if self.limits.standby and Life.STARTING not in first else 1
        if self._silent_s is None:
            self._silent_s = view.now_s
        return 2 if view.now_s - self._silent_s > self.limits.silence_s else 1

    def _change(self, membership: Membership) -> None:
        self._membership = replace(
            membership, generation=self._membership.generation + 1, target=self.target
        )
