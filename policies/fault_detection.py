"""What is wrong, and who: in the manner of C4 (Alibaba, arXiv 2406.04594), from counters alone.

Steps of a bulk-synchronous job are alike, and so is what members of one role do in them: where the
pattern breaks is the fault. Peers are compared within a role, victims are never blamed, a verdict
takes m of n steps. C4's thresholds were never published; these are ours, tuned on made-up fleets
(`elastic.core.simulator.fleet`, `benchmarks/detection.py`). Pure: what is remembered is passed in
and returned. Acting on verdicts is not for here: `policies.steering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from policies.pressure import Pressure
from policies.signals import PollView, StepView
from policies.slow_communication import Rates, SlowCommunication
from policies.slow_computation import Paces, SlowComputation
from policies.stalls import Stalls, Suspects
from policies.verdicts import Verdict
from policies.windows import History


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """What is remembered from step to step, and of the verdicts that hold."""

    paces: Paces
    rates: Rates
    hosts: History
    suspects: Suspects
    of_steps: tuple[Verdict, ...] = ()
    of_polls: tuple[Verdict, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All that hold now."""
        return self.of_polls + self.of_steps


@dataclass(frozen=True, slots=True, eq=False)
class Diagnosis:
    """`verdicts` hold now; of these `begun` are new; `ended` held before."""

    verdicts: tuple[Verdict, ...]
    begun: tuple[Verdict, ...]
    ended: tuple[Verdict, ...]
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Every threshold has a default that calibrates itself, and can be set."""

    computation: SlowComputation = field(default_factory=SlowComputation)
    communication: SlowCommunication = field(default_factory=SlowCommunication)
    pressure: Pressure = field(default_factory=Pressure)
    stalls: Stalls = field(default_factory=Stalls)
    kind: Literal["peers"] = "peers"

    def begin(self) -> Memory:
        """Nothing is remembered yet: at the start of a job, or of its coordinator."""
        return Memory(
            paces=self.computation.begin(),
            rates=self.communication.begin(),
            hosts=self.pressure.begin(),
            suspects=self.stalls.begin(),
        )

    def decide_step(self, view: StepView, memory: Memory) -> Diagnosis:
        """After each step: who or what is slow."""
        verdicts: list[Verdict] = []
        excused_W, hosts = np.zeros(len(view.fleet.worker_W), np.bool_), memory.hosts
        if view.hosts is not None:
            verdicts, is_now_N, hosts = self.pressure.decide(view.hosts, view.step, hosts)
            excused_W = np.isin(view.fleet.node_W, view.hosts.node_N[is_now_N])
        slow, paces = self.computation.decide(view, memory.paces, excused_W)
        links, rates = self.communication.decide(view, memory.rates)
        now = tuple(verdicts + slow + links)
        after = replace(memory, paces=paces, rates=rates, hosts=hosts, of_steps=now)
        return _diagnosis(memory.of_steps, now, after)

    def decide_poll(self, view: PollView, memory: Memory) -> Diagnosis:
        """Every few hundredths of a second: who or what hangs."""
        found, suspects = self.stalls.decide(view, memory.suspects)
        now = tuple(found)
        after = replace(memory, suspects=suspects, of_polls=now)
        return _diagnosis(memory.of_polls, now, after)


def _diagnosis(before: Sequence[Verdict], now: Sequence[Verdict], memory: Memory) -> Diagnosis:
    held, holds = {one.name for one in before}, {one.name for one in now}
    return Diagnosis(
        memory.verdicts,
        tuple(one for one in now if one.name not in held),
        tuple(one for one in before if one.name not in holds),
        memory,
    )
