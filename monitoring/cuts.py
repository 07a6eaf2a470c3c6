"""Links that nodes gave up since nothing came, as their pulses tell, and what that says.

Decides nothing: `policies.cuts`.
"""

from __future__ import annotations

from elastic.core.protocol.messages import CutCount, Pulse
from policies.cuts import SILENT_S, Cut, decide
from policies.verdicts import Verdict

TOLD_S = 10.0
"""For so long it is told: a link that is given up is over, and what came of it goes on."""

_LATELY_S = 2 * SILENT_S
"""Who was heard within that time before the newest that was is there, or has only just gone."""


class Cuts:
    """Of one job. Times are of the clock of whoever hears."""

    def __init__(self) -> None:
        self._counts: dict[int, dict[int, CutCount]] = {}
        self._heard_s: dict[int, float] = {}
        self._found: dict[Cut, float] = {}

    def take(self, pulse: Pulse, heard_s: float) -> None:
        """Take in what a node says. What it had given up before it was first heard is over."""
        now = {one.peer: one for one in pulse.cuts}
        before = self._counts.get(pulse.node, now)
        last_s = self._heard_s.get(pulse.node, heard_s)
        self._counts[pulse.node], self._heard_s[pulse.node] = now, heard_s
        for peer, count in now.items():
            then = before.get(peer, CutCount(peer, 0))
            if count.num > then.num:
                silent_s = last_s - self._heard_s.get(peer, float("-inf"))
                is_answered = count.unanswered == then.unanswered
                cut = Cut(peer, pulse.node, pulse.step, silent_s, is_answered)
                self._found[cut] = heard_s

    def verdicts(self, now_s: float) -> list[Verdict]:
        """What is told now."""
        self._found = {cut: at_s for cut, at_s in self._found.items() if now_s - at_s <= TOLD_S}
        newest_s = max(self._heard_s.values(), default=now_s)
        heard = [node for node, at_s in self._heard_s.items() if newest_s - at_s <= _LATELY_S]
        return decide(self._found, heard)
