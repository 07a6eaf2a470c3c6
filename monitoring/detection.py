"""Feeds the fault detector with what a job records, and keeps the verdicts that hold.

What workers computed when comes from the lines of committed steps, who hung and who was lost from
events. Decides nothing itself: `policies.fault_detection` and `policies.flapping` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from elastic.core.protocol.messages import Pulse
from monitoring.account import BEGINS, GONE, Done, done_of
from monitoring.copies import Copies
from monitoring.counters import Counters, LinkTotal
from monitoring.cuts import Cuts
from monitoring.metrics import NUM_LINKS
from monitoring.tally import Line, What
from policies.fault_detection import Peers
from policies.flapping import Departure, DeparturesView, Flapping
from policies.signals import Computed, Fleet, PollView, StepView, Transfers
from policies.verdicts import Kind, Node, Verdict, Worker

NUM_STEPS = 100
"""So many of the last steps are enough to begin with, where a predecessor has died."""

MERGED_S = 0.2
"""Steps that are shorter are looked at together, several at a time: looking costs milliseconds."""

AFRESH = 10
"""Looks at links, after a node has joined, that show whether what was slow before still is."""

_OF_LINKS = frozenset({Kind.SLOW_SENDER, Kind.SLOW_RECEIVER, Kind.SLOW_LINK})
_SURE = 0.95
"""Of what the aggregator has seen: it knows what the worker holds, and what others answered."""
_AT_ONCE_S = 1.0
"""Workers of a node that go within that time go with it: one departure."""


class Detector:
    """Of one job. Lines are to be given in the order of their time."""

    def __init__(self, peers: Peers | None = None, flapping: Flapping | None = None) -> None:
        self._peers, self._flapping = peers or Peers(), flapping or Flapping()
        self._memory = self._peers.begin()
        self._members: set[int] = set()
        self._told: dict[int, Verdict] = {}
        self._over: set[int] = set()
        self._departures: list[Departure] = []
        self._machine_of: Mapping[int, str] = {}
        self._is_exempt = True
        self._is_joining = self._was_joining = False
        self._num_afresh = AFRESH
        self._rows: list[Done] = []
        self._num_plans = 0
        self._counters = Counters()
        self._cuts = Cuts()
        self._copies = Copies()
        self._looked_s = 0.0

    def add(self, what: What, line: Line, node_of: Mapping[int, int]) -> None:
        """Take in a line of the run's records. `node_of`: of each worker."""
        if what == "evaluation":
            self._is_exempt = True
        elif what == "event":
            self._event(line, node_of)
        else:
            self._step(line, node_of)

    def take(self, pulse: Pulse, heard_s: float) -> None:
        """Take in what a node counts. `heard_s`: by the clock of `verdicts`."""
        self._counters.take(pulse)
        self._cuts.take(pulse, heard_s)
        self._copies.take(pulse, heard_s)

    def links(self) -> list[LinkTotal]:
        """What went over links, as far as they have series of their own. Asked by any thread."""
        return self._counters.links(NUM_LINKS)

    def join(self, *, is_joining: bool) -> None:
        """Whether a node joins now. What was added since the last call is taken to be of now."""
        self._is_joining = is_joining
        self._was_joining |= is_joining

    def know(self, machine_of: Mapping[int, str]) -> None:
        """What names the machine of each node: a host that comes back is another node."""
        self._machine_of = machine_of

    def poll(self, view: PollView) -> bool:
        """Take in how all processes get on; whether a verdict begins or ends by that."""
        found = self._peers.decide_poll(view, self._memory)
        self._memory = found.memory
        return bool(found.begun or found.ended)

    @property
    def hung(self) -> frozenset[int]:
        """Workers that hang."""
        culprits = (one.culprit for one in self._memory.verdicts if one.kind is Kind.HANG_OUTSIDE)
        return frozenset(one.number for one in culprits if isinstance(one, Worker))

    @property
    def outvoted(self) -> frozenset[int]:
        """Nodes whose copies of what others keep, too, are not to be used any more."""
        return self._copies.outvoted

    def verdicts(self, now_s: float, num_nodes: int) -> list[Verdict]:
        """What holds now. A hang is told of at least once, however soon it was over. What went
        over links is not looked at while a node joins: so nothing holds that was said of it."""
        is_blind = self._was_joining or self._num_afresh < AFRESH
        of_peers = [
            one for one in self._memory.verdicts if not (is_blind and one.kind in _OF_LINKS)
        ]
        found = [*of_peers, *self._told.values(), *self._cuts.verdicts(now_s)]
        found += self._copies.verdicts(now_s)
        found = list({one.name: one for one in found}.values())
        for worker in self._over:
            self._told.pop(worker, None)
        self._over.clear()
        if num_nodes > 1:
            view = DeparturesView(now_s, self._of_machines(), num_nodes)
            found += self._flapping.decide(view)
        return found

    def _step(self, line: Line, node_of: Mapping[int, int]) -> None:
        is_exempt = self._is_exempt or int(line["attempt"]) > 0
        self._is_exempt = False
        if is_exempt:
            return
        self._rows += done_of(line)
        time_s = float(line["time_s"])
        if time_s - self._looked_s >= MERGED_S:
            view = self._view(int(line["step"]), node_of)
            self._memory = self._peers.decide_step(view, self._memory).memory
            self._looked_s = time_s
            self._rows.clear()

    def _view(self, step: int, node_of: Mapping[int, int]) -> StepView:
        rows = self._rows
        worker_W = np.array(sorted(self._members | {one.worker for one in rows}), np.int64)
        node_W = [node_of.get(worker, 0) for worker in worker_W.tolist()]
        return StepView(
            step=step,
            fleet=Fleet(
                worker_W=worker_W,
                role_W=np.zeros(len(worker_W), np.int64),
                node_W=np.array(node_W, np.int64),
            ),
            computed=Computed(
                worker_B=np.array([one.worker for one in rows], np.int64),
                start_s_B=np.array([one.start_s for one in rows]),
                end_s_B=np.array([one.end_s for one in rows]),
                load_B=np.ones(len(rows)),
                done_B=np.array([one.granted for one in rows], np.bool_),
            ),
            transfers=self._transfers(),
            hosts=self._counters.hosts(),
            plan=self._num_plans,
        )

    def _transfers(self) -> Transfers | None:
        """What went over links; nothing while a node joins, which all parameters are sent to."""
        found, was_joining = self._counters.transfers(), self._was_joining
        self._was_joining = self._is_joining
        self._num_afresh = 0 if was_joining else self._num_afresh + (found is not None)
        return None if was_joining else found

    def _event(self, event: Line, node_of: Mapping[int, int]) -> None:
        kind, number = str(event["kind"]), event.get("worker")
        if kind in BEGINS:
            self._members.clear()
            self._told.clear()
            self._memory = self._peers.begin()
            self._rows.clear()
            self._is_exempt = True
        if kind == "node_joining":
            self._was_joining = True
        self._num_plans += kind == "traffic_planned"
        if number is None:
            return
        worker = int(number)
        if kind == "worker_joined":
            self._members.add(worker)
        elif kind == "worker_hung":
            self._told[worker] = _hang(worker, event)
        elif kind == "worker_lied":
            self._told[worker] = _lie(worker, event)
        elif kind in GONE:
            self._members.discard(worker)
            self._over.add(worker)
            if kind == "worker_lost":
                self._departed(Node(node_of.get(worker, 0)), event)

    def _of_machines(self) -> list[Departure]:
        """The departures, those of a machine all of the newest node that it was."""
        newest = {machine: node for node, machine in sorted(self._machine_of.items())}

        def now(node: int) -> Node:
            return Node(newest.get(self._machine_of.get(node, ""), node))

        return [
            replace(one, culprit=now(one.culprit.number))
            for one in self._departures
            if isinstance(one.culprit, Node)
        ]

    def _departed(self, node: Node, event: Line) -> None:
        time_s = float(event["time_s"])
        recent = [one for one in self._departures if time_s - one.time_s <= self._flapping.window_s]
        together = any(one.culprit == node and time_s - one.time_s <= _AT_ONCE_S for one in recent)
        now = [] if together else [Departure(time_s, int(event["step"]), node)]
        self._departures = recent + now


def _hang(worker: int, event: Line) -> Verdict:
    return Verdict(
        kind=Kind.HANG_OUTSIDE,
        culprit=Worker(worker),
        since_step=int(event["step"]),
        confidence=_SURE,
        reason=f"worker {worker} holds work, waits for nobody: {event['reason']}",
    )


def _lie(worker: int, event: Line) -> Verdict:
    return Verdict(
        kind=Kind.SILENT_CORRUPTION,
        culprit=Worker(worker),
        since_step=int(event["step"]),
        confidence=_SURE,
        reason=str(event["reason"]),
    )


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """A verdict as it lies in an event."""
    return {
        "kind": verdict.kind.value,
        "culprit": str(verdict.culprit),
        "since_step": verdict.since_step,
        "confidence": round(verdict.confidence, 3),
        "evidence": {name: float(value) for name, value in verdict.evidence.items()},
    }
