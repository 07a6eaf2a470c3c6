"""The hosts of a job over time: asks for those that are missing, as the policy decides.

Part of the coordinator's turn. Remembers only what a restarted coordinator can do without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from actors.processes import Processes
from elastic.core.protocol.coordinator import Coordinator
from policies.growing import NEVER_S, Growing, GrowingView


class HostGrowth:
    """What is asked for, and what came of it."""

    def __init__(
        self, processes: Processes, least: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._processes, self._clock = processes, clock
        self._policy = Growing()
        self._view = GrowingView(now_s=NEVER_S, wanted=0, least=least, there=0, num_workers=0)
        self._told: tuple[object, ...] = ()
        self._held: Mapping[str, str] = {}

    def lost(self, node: int) -> None:
        """A node went without being asked to. It may be about to come back."""
        self._processes.lost(node)
        self._view = replace(self._view, lost_s=self._clock())

    def refused(self) -> None:
        """A host came that the job cannot use."""
        self._view = replace(self._view, refusals_s=(*self._view.refusals_s, self._clock()))

    def forgive(self) -> None:
        """A person wants it tried again."""
        self._processes.forgive()
        self._view = replace(self._view, refusals_s=())

    def turn(self, protocol: Coordinator) -> list[tuple[str, str]]:
        """Ask for what is missing now. Returns events: kinds and reasons."""
        now = protocol.membership
        going = {*now.former, *now.departing, *self._processes.ending()}
        view = replace(
            self._view,
            now_s=self._clock(),
            wanted=protocol.target_nodes,
            there=sum(node not in going for node in self._processes.nodes()),
            num_workers=protocol.target,
        )
        growth = self._policy.decide(view)
        self._view = replace(view, asked=growth.asked)
        self._processes.ask(growth.asked.num)
        news = (view.wanted, view.there, view.num_workers, growth.gave_up)
        told, self._told = self._told, news
        is_news = news != told and (growth.asked.num > 0 or growth.gave_up)
        return ([("nodes_asked", growth.reason)] if is_news else []) + self._held_back()

    def _held_back(self) -> list[tuple[str, str]]:
        """Which hosts are there and not used, each once for each reason."""
        before, self._held = self._held, dict(self._processes.held())
        return [
            ("node_held_back", f"{address}: {reason}")
            for address, reason in self._held.items()
            if before.get(address) != reason
        ]
