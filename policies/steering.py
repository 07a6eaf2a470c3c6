"""What to do about verdicts: whom to relieve, quarantine, restart, drain or avoid, and when not to.

Pure: verdicts, what was done before and the time arrive in the view; the coordinator acts, logs
every action with its verdict, and can undo each. Never more than the budget allows: a detector
that is wrong must cost little.

    verdict holds ──▶ its mildest remedy ──still holds after `patience_s`──▶ the next one ──▶ ...
    observe: says what it would do.  notify: says so, acts `escalate_s` later.  act: at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from policies.owning import SlowLink
from policies.verdicts import Culprit, Kind, Link, Node, Verdict, Worker


class Remedy(Enum):
    """From mild to harsh. What takes a worker away counts against the budget."""

    LEASE_AGAIN = "lease its work to others"
    ROUTE_AROUND = "plan traffic around"
    AVOID = "start nothing more on"
    RESTART = "restart"
    QUARANTINE = "give no more work to"
    DRAIN = "drain"


_MILD_TO_HARSH = list(Remedy)
_TAKES_AWAY = (Remedy.RESTART, Remedy.QUARANTINE, Remedy.DRAIN)

_REMEDIES: Mapping[Kind, Mapping[type[Culprit], tuple[Remedy, ...]]] = {
    Kind.HANG_OUTSIDE: {
        Worker: (Remedy.LEASE_AGAIN, Remedy.RESTART),
        Node: (Remedy.AVOID, Remedy.DRAIN),
    },
    Kind.HANG_IN_COMMUNICATION: {
        Worker: (Remedy.RESTART,),
        Node: (Remedy.AVOID, Remedy.DRAIN),
        Link: (Remedy.ROUTE_AROUND,),
    },
    Kind.SLOW_COMPUTATION: {Worker: (Remedy.LEASE_AGAIN, Remedy.RESTART, Remedy.QUARANTINE)},
    Kind.SLOW_SENDER: {Node: (Remedy.ROUTE_AROUND, Remedy.AVOID, Remedy.DRAIN)},
    Kind.SLOW_RECEIVER: {Node: (Remedy.ROUTE_AROUND, Remedy.AVOID, Remedy.DRAIN)},
    Kind.SLOW_LINK: {Link: (Remedy.ROUTE_AROUND,)},
    Kind.SILENT_CORRUPTION: {Worker: (Remedy.QUARANTINE,), Node: (Remedy.AVOID, Remedy.DRAIN)},
    Kind.FLAPPING: {
        Worker: (Remedy.QUARANTINE,),
        Node: (Remedy.AVOID, Remedy.DRAIN),
        Link: (Remedy.ROUTE_AROUND,),
    },
    Kind.RESOURCE_PRESSURE: {Node: (Remedy.AVOID, Remedy.DRAIN)},
}
"""What helps against what, in the order in which it is tried."""

_MAX_FACTOR = 16.0
_URGENCY = {Kind.SILENT_CORRUPTION: 0, Kind.HANG_OUTSIDE: 1, Kind.HANG_IN_COMMUNICATION: 1}
"""The smaller, the sooner the budget is spent on it; 2 for the rest."""


@dataclass(frozen=True, slots=True)
class Taken:
    """An action of before. `num_workers` were taken away by it; `undone`: it was not wanted."""

    time_s: float
    remedy: Remedy
    culprit: Culprit
    kind: Kind
    num_workers: int = 0
    undone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringView:
    """`since_s`: when each verdict began, by its name. `node_of`: of each worker that computes.

    `spares`: the node of each worker that is ready to. `taken`: actions, of the last hour at least.
    """

    now_s: float
    verdicts: Sequence[Verdict]
    since_s: Mapping[tuple[Kind, Culprit], float]
    node_of: Mapping[int, int]
    spares: Sequence[int] = ()
    taken: Sequence[Taken] = ()


@dataclass(frozen=True, slots=True)
class Act:
    """Do it now; `bring_spare` workers are to take its place. `elastic undo NAME` takes it back."""

    remedy: Remedy
    verdict: Verdict
    workers: tuple[int, ...]
    bring_spare: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Only say so: the mode, the budget or the confidence does not allow more. Act at `until_s`,
    if the verdict still holds then; None: never by itself."""

    remedy: Remedy
    verdict: Verdict
    until_s: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """`share_per_hour`: of the fleet, how much may be taken away within an hour, at least one."""

    mode: Literal["observe", "notify", "act"] = "notify"
    min_workers: int = 1
    min_nodes: int = 1
    escalate_s: float = 60.0
    patience_s: float = 60.0
    share_per_hour: float = 0.1
    least_confidence: float = 0.6
    kind: Literal["steering"] = "steering"
    window_s: float = field(default=3600.0, init=False)

    def decide(self, view: SteeringView) -> list[Act | Tell]:
        """What to do about each verdict now; nothing for those whose remedies are under way."""
        order = sorted(view.verdicts, key=lambda one: (_URGENCY.get(one.kind, 2), -one.confidence))
        going = drained(view.taken)
        gone = {worker for worker, node in view.node_of.items() if node in going}
        decisions: list[Act | Tell] = []
        for verdict in order:
            remedy = self._next(view, verdict)
            if remedy is None:
                continue
            decision = self._weigh(view, verdict, remedy, gone)
            if isinstance(decision, Act) and remedy in _TAKES_AWAY:
                num = len(set(decision.workers) - gone)
                act = Taken(view.now_s, remedy, verdict.culprit, verdict.kind, num_workers=num)
                view = replace(view, taken=(*view.taken, act))
                gone |= set(decision.workers)
            decisions.append(decision)
        return decisions

    def avoided(self, view: SteeringView) -> frozenset[int]:
        """Nodes on which nothing is to be started: those that are drained, and, while the verdict
        holds, those that are avoided, and those of workers about whom something was done. What was
        done when it held before is over: where it comes again, its time begins anew."""
        since_s = {one.name: view.since_s.get(one.name, view.now_s) for one in view.verdicts}
        nodes = set(drained(view.taken))
        for one in view.taken:
            if one.undone or one.time_s < since_s.get((one.kind, one.culprit), math.inf):
                continue
            match one.culprit:
                case Node(number) if one.remedy is Remedy.AVOID:
                    nodes.add(number)
                case Worker(number) if number in view.node_of:
                    nodes.add(view.node_of[number])
        return frozenset(nodes)

    def slow_links(self, view: SteeringView) -> tuple[SlowLink, ...]:
        """Those that traffic is planned around: while the verdict holds, unless it was undone."""
        holds = {(one.kind, one.culprit): one for one in view.verdicts}
        found: dict[tuple[int, int | None], float] = {}
        for one in view.taken:
            verdict = holds.get((one.kind, one.culprit))
            if one.undone or one.remedy is not Remedy.ROUTE_AROUND or verdict is None:
                continue
            if one.time_s < view.since_s.get(verdict.name, view.now_s):
                continue
            ends = _ends(one.culprit)
            found[ends] = max(found.get(ends, 0.0), _factor(verdict))
        return tuple(SlowLink(*ends, factor) for ends, factor in sorted(found.items(), key=str))

    def _next(self, view: SteeringView, verdict: Verdict) -> Remedy | None:
        """The mildest remedy that was not tried yet, once the one before had its time; milder than
        all that a person took back from that culprit."""
        since_s = view.since_s.get(verdict.name, view.now_s)
        done = [
            one
            for one in view.taken
            if (one.kind, one.culprit) == verdict.name and not one.undone and one.time_s >= since_s
        ]
        if done and view.now_s - max(one.time_s for one in done) < self.patience_s:
            return None
        tried = {one.remedy for one in done}
        refused = [
            _MILD_TO_HARSH.index(one.remedy)
            for one in view.taken
            if one.undone and one.culprit == verdict.culprit
        ]
        mild = _MILD_TO_HARSH[: min(refused, default=None)]
        remedies = _REMEDIES[verdict.kind].get(type(verdict.culprit), ())
        left = [one for one in remedies if one in mild and one not in tried]
        return next(iter(left), None)

    def _weigh(
        self, view: SteeringView, verdict: Verdict, remedy: Remedy, gone: set[int]
    ) -> Act | Tell:
        workers = tuple(sorted(_workers(verdict.culprit, view.node_of)))
        what = f"{remedy.value} {verdict.culprit}{_meanwhile(view, verdict)}: {verdict.reason}"
        since_s = view.since_s.get(verdict.name, view.now_s)
        if self.mode == "observe":
            return Tell(remedy, verdict, None, f"would {what}")
        if self.mode == "notify" and view.now_s - since_s < self.escalate_s:
            until_s = since_s + self.escalate_s
            left_s = until_s - view.now_s
            return Tell(remedy, verdict, until_s, f"in {left_s:.0f} s: {what}")
        if remedy not in _TAKES_AWAY:
            return Act(remedy, verdict, workers, 0, what)
        if verdict.confidence < self.least_confidence:
            least = f"confidence {verdict.confidence:.2f}, at least {self.least_confidence:.2f}"
            return Tell(remedy, verdict, None, f"not sure enough, {least} needed: {what}")
        going = set(drained(view.taken))
        if remedy is Remedy.DRAIN and isinstance(verdict.culprit, Node):
            going.add(verdict.culprit.number)
        num_nodes = len(set(view.node_of.values()) - going)
        if remedy is Remedy.DRAIN and num_nodes < self.min_nodes:
            least = f"{num_nodes} nodes would be left (nodes.min {self.min_nodes})"
            return Tell(remedy, verdict, None, f"{least}: {what}")
        more = set(workers) - gone
        num_spare = sum(node not in going for node in view.spares)
        against = self._over_budget(view, len(more), len(view.node_of) - len(gone) + num_spare)
        if against:
            return Tell(remedy, verdict, None, f"{against}: {what}")
        return Act(remedy, verdict, workers, min(num_spare, len(more)), what)

    def _over_budget(self, view: SteeringView, more: int, there: int) -> str:
        """Why `more` cannot be taken away, of `there` that compute or could; empty if they can."""
        num_workers, left = len(view.node_of), there - more
        if left < self.min_workers:
            return f"{left} workers would be left (workers.min {self.min_workers})"
        recent = sum(
            one.num_workers
            for one in view.taken
            if view.now_s - one.time_s < self.window_s and not one.undone
        )
        allowed = max(1, int(self.share_per_hour * num_workers))
        num = recent + more
        if more and num > allowed:
            return (
                f"{num} workers would be taken away within an hour, of {allowed} allowed"
                f" (monitoring.share_per_hour {self.share_per_hour:g})"
            )
        return ""


def _ends(culprit: Culprit) -> tuple[int, int | None]:
    """Between which nodes: the same for both directions."""
    match culprit:
        case Link(sender, receiver):
            return min(sender, receiver), max(sender, receiver)
        case _:
            return culprit.number, None


def _factor(verdict: Verdict) -> float:
    """How many times as long as usual a byte is taken to need, in steps of the square root of 2: it
    is measured anew all the time. Of a node the mean of its links is known, clipped: it is to own
    nothing. What breaks again and again is to carry hardly anything."""
    excess = verdict.evidence.get("excess_ratio")
    if excess is None or isinstance(verdict.culprit, Node):
        return _MAX_FACTOR
    return min(_MAX_FACTOR, math.pow(2.0, max(1, round(2 * math.log2(1 + excess))) / 2))


def drained(taken: Sequence[Taken]) -> dict[int, Kind]:
    """The nodes that are to be gone, and what was said of them."""
    return {
        one.culprit.number: one.kind
        for one in taken
        if one.remedy is Remedy.DRAIN and not one.undone and isinstance(one.culprit, Node)
    }


def undo(taken: Taken) -> Taken:
    """The action as one that is taken back: it is not done to that culprit again by itself, nor
    is anything harsher."""
    return replace(taken, undone=True)


def _meanwhile(view: SteeringView, verdict: Verdict) -> str:
    """What follows for the node of a worker, where there are others."""
    node = None
    if isinstance(verdict.culprit, Worker):
        node = view.node_of.get(verdict.culprit.number)
    if node is None or len(set(view.node_of.values())) == 1:
        return ""
    return f", {Remedy.AVOID.value} node {node} meanwhile"


def _workers(culprit: Culprit, node_of: Mapping[int, int]) -> set[int]:
    """Those that a remedy for the culprit would take away."""
    match culprit:
        case Worker(number):
            return {number} & set(node_of)
        case Node(number):
            return {worker for worker, node in node_of.items() if node == number}
        case _:
            return set()
