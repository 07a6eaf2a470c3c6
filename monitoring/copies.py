"""What nodes keep of the same chunks at the same step, as their pulses tell, and who is odd.

Decides nothing: `policies.auditing`.
"""

from __future__ import annotations

from elastic.core.protocol.messages import Pulse
from policies.auditing import odd_keepers
from policies.verdicts import Node, Verdict

PATIENCE_S = 2.0
"""Who says within that time, after the first, what it keeps at a step is compared."""


class Copies:
    """Of one job. Times are of the clock of whoever hears."""

    def __init__(self) -> None:
        self._step = -1
        self._until_s: float | None = None
        self._heard: dict[int, dict[int, int]] = {}
        self._found: list[Verdict] = []
        self.outvoted: frozenset[int] = frozenset()
        """Nodes that most others contradict. One for each comparison: of every chunk there is a
        copy without it. Replaced, never changed."""

    def take(self, pulse: Pulse, heard_s: float) -> None:
        """Take in what a node says: the same again and again, until there is something newer."""
        if pulse.copies is None or pulse.copies.step < self._step:
            return
        if pulse.copies.step > self._step:
            self._compare()
            self._step, self._until_s = pulse.copies.step, heard_s + PATIENCE_S
        if self._until_s is not None:
            self._heard[pulse.node] = dict(pulse.copies.digests)

    def verdicts(self, now_s: float) -> list[Verdict]:
        """What the last comparison has shown."""
        if self._until_s is not None and now_s >= self._until_s:
            self._compare()
        return self._found

    def _compare(self) -> None:
        """Once for each step."""
        if self._until_s is None:
            return
        self._found = odd_keepers(self._heard, self._step)
        sure = (one.culprit for one in self._found if one.evidence["votes"])
        self.outvoted |= {*[one.number for one in sure if isinstance(one, Node)][:1]}
        self._until_s = None
        self._heard.clear()
