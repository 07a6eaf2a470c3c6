"""Asks every node what its counters say, several times a second, and keeps what they answer.

One question to a node at a time, so nothing piles up where somebody reads nothing. Decides nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from actors.contacts import Contacts
from elastic.core.protocol.messages import Look, Pulse
from policies.owning import SlowLink

PULSE_S = 0.1
_MAX_PULSES = 10_000  # the oldest are forgotten: counters never go back


class Pulses:
    """Of all nodes that can be reached. `turn` is for one thread, the rest for another."""

    def __init__(
        self, contacts: Contacts, *, wanted: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._contacts, self._wanted, self._clock = contacts, wanted, clock
        self._asked_s: dict[int, float] = {}
        self._answered: set[int] = set()
        self._heard: deque[tuple[float, Pulse]] = deque(maxlen=_MAX_PULSES)
        self.waiting: Mapping[int, float] = {}
        """Nodes that have not answered yet, and since when. Replaced, never changed."""
        self.slow: tuple[SlowLink, ...] = ()
        """What every question says of links. Replaced, never changed."""

    def turn(self) -> None:
        """Take what was answered; ask again those whose turn it is."""
        if not self._wanted:
            return
        now_s, reached = self._clock(), list(self._contacts.reports)
        while self._contacts.pulses:
            pulse = self._contacts.pulses.popleft()
            self._answered.add(pulse.node)
            self._heard.append((now_s, pulse))
        self._asked_s = {one: self._asked_s[one] for one in reached if one in self._asked_s}
        for node in reached:
            is_due = node in self._answered and now_s - self._asked_s.get(node, 0.0) >= PULSE_S
            if is_due or node not in self._asked_s:
                self._asked_s[node] = now_s
                self._answered.discard(node)
                self._contacts.send(node, Look(self.slow))
        self.waiting = {
            node: asked_s for node, asked_s in self._asked_s.items() if node not in self._answered
        }

    def take(self) -> list[tuple[float, Pulse]]:
        """What was heard since the last call, and when."""
        return [self._heard.popleft() for _ in range(len(self._heard))]
