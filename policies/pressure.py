"""Which nodes lack processor time, memory or disk: that is not the fault of the workers there.

Pure. Letters: N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.signals import Bools, Hosts
from policies.verdicts import Kind, Node, Verdict
from policies.windows import History

_NAMES = ("steal", "memory", "disk")
_WORDS = {
    "steal": "its processors are given to others",
    "memory": "tasks stand still for memory",
    "disk": "tasks stand still for the disk",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """A share of time over its limit, in `votes` of the last `steps`; or a kill for lack of memory.

    Where there are `min_peers` nodes, what all of them have is taken off: that is how they are.
    """

    steal: float = 0.2
    memory: float = 0.2
    disk: float = 0.3
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
        shares_3N = np.stack([hosts.steal_N, hosts.memory_N, hosts.disk_N])[:, order]
        if len(order) >= self.min_peers:
            shares_3N = shares_3N - np.median(shares_3N, axis=1, keepdims=True)
        limits_3 = np.array([self.steal, self.memory, self.disk])
        ratio_3N = shares_3N / limits_3[:, None]
        ratio_N = ratio_3N.max(axis=0)
        kills_N = hosts.out_of_memory_kills_N[order]
        now_N = (ratio_N >= 1) | (kills_N > 0)
        history = before.of(hosts.node_N[order]).added(ratio_N - 1, step, vote=0.0)
        votes_N = np.sum([row >= 0 for row in history.rows], axis=0)
        stays_N = history.is_open_E & (votes_N > self.steps - self.votes)
        is_open_N = (votes_N >= self.votes) | stays_N | (kills_N > 0)
        history = history.marked(is_open_N)
        verdicts = []
        for place in np.flatnonzero(is_open_N).tolist():
            worst = _NAMES[int(ratio_3N[:, place].argmax())]
            numbers = dict(zip(_NAMES, shares_3N[:, place].tolist(), strict=True))
            votes = int(votes_N[place])
            numbers |= {"kills": float(kills_N[place]), "bad_steps": votes, "steps": self.steps}
            reason = f"node {history.id_E[place]}: {_WORDS[worst]} {numbers[worst]:.0%} of the time"
            reason += f", in {votes} of {self.steps} steps (limit {getattr(self, worst):.0%})"
            if kills_N[place]:
                reason = (
                    f"node {history.id_E[place]}: {kills_N[place]} processes were killed for lack"
                    " of memory"
                )
            since = int(history.since_E[place])
            verdicts.append(
                Verdict(
                    kind=Kind.RESOURCE_PRESSURE,
                    culprit=Node(int(history.id_E[place])),
                    since_step=step if since < 0 else since,
                    confidence=1.0 if kills_N[place] else (votes + 1) / (self.steps + 2),
                    reason=reason,
                    evidence=numbers,
                )
            )
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        is_now_N: Bools = now_N[back]
        return verdicts, is_now_N, history
