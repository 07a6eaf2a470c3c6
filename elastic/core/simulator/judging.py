"""How well a fault detector does on a made-up fleet: right, wrong, missed, how soon, how costly.

A verdict is right if it names kind and culprit of a fault that lasts, or has ended within LATE
steps; everything else is a false one. Only reads what the detector says.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from elastic.core.simulator.fleet import FleetPlan, Injected, MadeUpFleet
from policies.fault_detection import Peers
from policies.verdicts import Kind, Link, Node, Verdict, Worker

LATE = 10
"""Steps after the end of a fault in which it may still be named."""


@dataclass
class Judgement:
    """`steps_to_verdict` of each fault that was found, `cost_s` of processor time of each step.

    `confusion` counts (fault, verdict) by kind; None: no fault, or none was found.
    """

    num_faults: int = 0
    num_found: int = 0
    num_right: int = 0
    wrong: list[tuple[int, Verdict]] = field(default_factory=list)
    missed: list[Injected] = field(default_factory=list)
    steps_to_verdict: dict[Injected, int] = field(default_factory=dict)
    cost_s: list[float] = field(default_factory=list)
    confusion: Counter[tuple[Kind | None, Kind | None]] = field(default_factory=Counter)

    @property
    def precision(self) -> float:
        """Of the verdicts, the share that is right."""
        return self.num_right / max(self.num_right + len(self.wrong), 1)

    @property
    def recall(self) -> float:
        """Of the faults, the share that was found."""
        return self.num_found / max(self.num_faults, 1)


def judge(plan: FleetPlan, num_steps: int, detector: Peers | None = None) -> Judgement:
    """Run the detector over `num_steps` steps of the fleet."""
    detector = detector or Peers()
    memory, result = detector.begin(), Judgement()
    found: dict[Injected, int] = {}
    for view in MadeUpFleet(plan).steps(num_steps):
        begin_s = time.thread_time()
        diagnosis = detector.decide_step(view, memory)
        result.cost_s.append(time.thread_time() - begin_s)
        memory = diagnosis.memory
        for verdict in diagnosis.begun:
            fault = _meant(verdict, view.step, plan.faults)
            if fault is None:
                result.wrong.append((view.step, verdict))
                near = _near(verdict, view.step, plan.faults)
                result.confusion[near.kind if near else None, verdict.kind] += 1
            else:
                result.num_right += 1
                found.setdefault(fault, view.step)
    for one in plan.faults:
        if one.begin + LATE >= num_steps:
            continue
        result.num_faults += 1
        if one in found:
            result.num_found += 1
            result.steps_to_verdict[one] = found[one] - one.begin + 1
            result.confusion[one.kind, one.kind] += 1
        else:
            result.missed.append(one)
            result.confusion[one.kind, None] += 1
    return result


def _holds(fault: Injected, step: int) -> bool:
    return fault.begin <= step < fault.end + LATE


def _meant(verdict: Verdict, step: int, faults: Sequence[Injected]) -> Injected | None:
    same = (one for one in faults if (one.kind, one.culprit) == verdict.name)
    return next((one for one in same if _holds(one, step)), None)


def _near(verdict: Verdict, step: int, faults: Sequence[Injected]) -> Injected | None:
    """A fault that the verdict may have been mistaken for: one with a node or worker in common."""
    for one in faults:
        if _holds(one, step) and _ends(one.culprit) & _ends(verdict.culprit):
            return one
    return None


def _ends(culprit: Worker | Node | Link) -> set[tuple[str, int]]:
    match culprit:
        case Worker(number):
            return {("worker", number)}
        case Node(number):
            return {("node", number)}
        case Link(sender, receiver):
            return {("node", sender), ("node", receiver)}
