"""Which links carry nothing any more, though both their ends live: or the end that they share.

A link on which nothing comes, not even pings, is given up by its ends within a second, before
whoever waits for its bytes could be seen to hang. So the ends say so, and each may mean that the
other is dead: that is sorted out here. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from policies.verdicts import Culprit, Kind, Link, Node, Verdict

SILENT_S = 1.0
"""A link on which not even pings come for so long is broken: a cable was cut, or a host froze."""
_SURE = 0.9


@dataclass(frozen=True, slots=True)
class Cut:
    """`receiver` heard nothing of `sender` until it gave the link up, in step `step`.

    `silent_s`: for how much longer than the receiver the sender had then said nothing to the
    coordinator either; it may be negative.
    """

    sender: int
    receiver: int
    step: int
    silent_s: float


def decide(cuts: Collection[Cut]) -> list[Verdict]:
    """What is broken between nodes that live: one link, or a node of which several are.

    A node that says nothing to anybody is no link's fault: `policies.stalls` names it.
    """
    alive = [one for one in cuts if one.silent_s < SILENT_S / 2]
    pairs = {(min(one.sender, one.receiver), max(one.sender, one.receiver)) for one in alive}
    step = min((one.step for one in alive), default=0)
    shared = set.intersection(*map(set, pairs)) if len(pairs) > 1 else set()
    culprits: list[Culprit] = [Node(one) for one in sorted(shared)]
    culprits = culprits or [Link(*one) for one in sorted(pairs)]
    what = "has links on which nothing came" if shared else "carries nothing: not even a ping came"
    return [
        Verdict(
            kind=Kind.HANG_IN_COMMUNICATION,
            culprit=one,
            since_step=step,
            confidence=_SURE / len(culprits),
            reason=f"{one} {what} for {SILENT_S:g} s, though both ends live",
            evidence={"silent_s": SILENT_S, "links": len(pairs)},
        )
        for one in culprits
    ]
