"""Which nodes lack processor time, memory, disk or a sound graphics card: that is not the fault of
the workers there.

Pure. Letters: N nodes, S kinds of shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.signals import Bools, Hosts
from policies.verdicts import Kind, Node, Verdict
from policies.windows import History

_NAMES = ("steal", "memory", "disk", "throttled")
_WORDS = {
    "steal": "its processors are given to others",
    "memory": "tasks stand still for memory",
    "disk": "tasks stand still for the disk",
    "throttled": "a graphics card is held back by heat or its power supply",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """A share of time over its limit, in `votes` of the last `steps`; or at once: a kill for lack
    of memory, a fault of a graphics card.

    Where there are `min_peers` nodes, what all of them have is taken off: that is how they are.
    """

    steal: float = 0.2
    memory: float = 0.2
    disk: float = 0.3
    throttled: float = 0.2
    steps: int = 7
    votes: int = 5
    min_peers: int = 3

    def begin(self) -> History:
        """Nothing is remembered yet."""
        return History.empty((self.steps,))

    def decide(
        self, hosts: Hosts, step: int, before: History
    ) -> tuple[list[Verdict], Bools, History]:
        """The verdicts, and of each of `hosts.node_N` whether it is under pressure right now."""
        order = np.argsort(hosts.node_N)
        shares_SN = np.stack([hosts.steal_N, hosts.memory_N, hosts.disk_N, hosts.throttled_N])
        shares_SN = shares_SN[:, order]
        if len(order) >= self.min_peers:
            shares_SN = shares_SN - np.median(shares_SN, axis=1, keepdims=True)
        limits_S = np.array([getattr(self, name) for name in _NAMES])
        ratio_SN = shares_SN / limits_S[:, None]
        ratio_N = ratio_SN.max(axis=0)
        kills_N, faults_N = hosts.out_of_memory_kills_N[order], hosts.card_faults_N[order]
        is_broken_N = (kills_N > 0) | (faults_N > 0)
        now_N = (ratio_N >= 1) | is_broken_N
        history = before.of(hosts.node_N[order]).added(ratio_N - 1, step, vote=0.0)
        votes_N = np.sum([row >= 0 for row in history.rows], axis=0)
        stays_N = history.is_open_E & (votes_N > self.steps - self.votes)
        is_open_N = (votes_N >= self.votes) | stays_N | is_broken_N
        history = history.marked(is_open_N)
        verdicts = []
        for place in np.flatnonzero(is_open_N).tolist():
            worst = _NAMES[int(ratio_SN[:, place].argmax())]
            numbers = dict(zip(_NAMES, shares_SN[:, place].tolist(), strict=True))
            votes = int(votes_N[place])
            kills, faults = int(kills_N[place]), int(faults_N[place])
            numbers |= {"kills": kills, "card_faults": faults}
            numbers |= {"bad_steps": votes, "steps": self.steps}
            reason = f"{_WORDS[worst]} {numbers[worst]:.0%} of the time"
            reason += f", in {votes} of {self.steps} steps (limit {getattr(self, worst):.0%})"
            if faults:
                reason = (
                    f"{faults} faults of graphics cards: errors in their memory that were not"
                    " corrected, or what their driver calls a fault of the card"
                )
            elif kills:
                reason = f"{kills} processes were killed for lack of memory"
            since = int(history.since_E[place])
            verdicts.append(
                Verdict(
                    kind=Kind.RESOURCE_PRESSURE,
                    culprit=Node(int(history.id_E[place])),
                    since_step=step if since < 0 else since,
                    confidence=1.0 if is_broken_N[place] else (votes + 1) / (self.steps + 2),
                    reason=f"node {history.id_E[place]}: {reason}",
                    evidence=numbers,
                )
            )
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        is_now_N: Bools = now_N[back]
        return verdicts, is_now_N, history
