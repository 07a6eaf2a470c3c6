"""How every process of a job gets on, by what nodes say of their counters: what hangs is seen here.

Keeps when which counter moved, by the clock of whoever hears. Decides nothing: `policies.stalls`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from elastic.core.protocol.messages import Pulse
from policies.signals import Groups, OpenTransfers, PollView, Processes

_FRESH_S = 0.25
"""What a lead says of who holds work holds so long, or half a usual step if that is longer."""
_GONE_S = 5.0
"""Of a node that was not heard for so long nobody is said to hang any more."""
_ANSWER_S = 0.5
"""An aggregator may take so long to answer: it adds up, it updates."""


class Progress:
    """Of one job. Workers of which nothing is said any more are forgotten."""

    def __init__(self) -> None:
        self._heard_s: dict[int, float] = {}
        self._workers: dict[int, dict[int, int]] = {}
        self._moved_s: dict[int, float] = {}
        self._holding: dict[int, bool] = {}
        self._lead_s = float("-inf")
        self._step = 0
        self.hung: frozenset[int] = frozenset()
        """Workers that hang: they do until their counter moves, though others have their work."""

    def take(self, pulse: Pulse, heard_s: float) -> None:
        """Take in what a node says. Who is given work begins to be measured then."""
        before = self._workers.get(pulse.node, {})
        moved = {worker for worker, count in pulse.progress if count != before.get(worker)}
        self.hung -= moved
        for worker, _ in pulse.progress:
            if worker in moved or (worker not in self._holding and worker not in self.hung):
                self._moved_s[worker] = heard_s
        self._workers[pulse.node] = dict(pulse.progress)
        self._heard_s[pulse.node] = heard_s
        self._step = max(self._step, pulse.step)
        if pulse.holding is not None:
            self._holding, self._lead_s = dict(pulse.holding), heard_s

    def view(self, now_s: float, usual_step_s: float, waiting: Mapping[int, float]) -> PollView:
        """How all get on now.

        A worker is silent only as far as its node says so. Nobody is taken to hold work while the
        lead is silent: whoever waits for it is a victim.

        Args:
            waiting: nodes that were asked and have not answered, and since when.
        """
        is_fresh = now_s - self._lead_s <= max(_FRESH_S, usual_step_s / 2)
        rows = [
            (True, node, now_s - since_s - _ANSWER_S, True, True)
            for node, since_s in waiting.items()
        ]
        for node, workers in self._workers.items():
            for worker in workers:
                silent_s = self._heard_s[node] - self._moved_s[worker]
                hangs = worker in self.hung and now_s - self._heard_s[node] < _GONE_S
                is_busy = hangs or (is_fresh and worker in self._holding)
                has_done = hangs or self._holding.get(worker, False)
                rows.append((False, worker, silent_s, is_busy, has_done))
        is_node, number, silent, busy, done = zip(*rows, strict=True) if rows else ((),) * 5
        nothing = np.empty(0, np.int64)
        return PollView(
            now_s=now_s,
            step=self._step,
            usual_step_s=usual_step_s,
            processes=Processes(
                is_node_P=np.array(is_node, np.bool_),
                number_P=np.array(number, np.int64),
                silent_s_P=np.array(silent, np.float64),
                is_busy_P=np.array(busy, np.bool_),
                has_done_P=np.array(done, np.bool_),
            ),
            waits_WQ=np.empty((0, 2), np.int64),
            groups=Groups(group_G=nothing, process_G=nothing, started_G=nothing, done_G=nothing),
            open_transfers=OpenTransfers(
                group_L=nothing, sender_L=nothing, receiver_L=nothing, silent_s_L=np.empty(0)
            ),
        )
