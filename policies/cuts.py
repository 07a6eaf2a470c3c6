"""Which links carry nothing any more, though both their ends live: or the end that they share; and
which nodes say nothing to anybody.

A link on which nothing comes, not even pings, is given up by its ends within a second, before
whoever waits for its bytes could be seen to hang. So the ends say so, and each may mean that the
other is dead: that is sorted out here. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from policies.verdicts import Culprit, Kind, Link, Node, Verdict

SILENT_S = 1.0
"""A link on which not even pings come for so long is broken: a cable was cut, or a host froze."""
_SURE = 0.9


@dataclass(frozen=True, slots=True)
class Cut:
    """`receiver` heard nothing of `sender` until it gave the link up, in step `step`.

    `silent_s`: for how much longer than the receiver the sender had then said nothing to the
    coordinator either; it may be negative. `is_answered`: its kernel had acknowledged all the same
    what it was sent.
    """

    sender: int
    receiver: int
    step: int
    silent_s: float
    is_answered: bool = False


def decide(cuts: Collection[Cut], nodes: Collection[int]) -> list[Verdict]:
    """What is broken between nodes that live: one link, or a node of which several are; and who of
    `nodes`, those that were heard lately, has nothing to say to any of the others."""
    alive = [one for one in cuts if one.silent_s < SILENT_S / 2]
    silent = {one.sender for one in cuts} - {one.sender for one in alive}
    return _between(alive) + [
        _of_silent([one for one in cuts if one.sender == node])
        for node in sorted(silent)
        if {one.receiver for one in cuts if one.sender == node} >= {*nodes} - silent
    ]


def _of_silent(cuts: Sequence[Cut]) -> Verdict:
    """Of one node. Who froze is still answered for by its kernel, whose cable was cut is not."""
    node = Node(cuts[0].sender)
    num = sum(one.is_answered for one in cuts)
    froze = 2 * num > len(cuts)
    why = "though its kernel answers" if froze else "not even its kernel answers: off, or cut off"
    return Verdict(
        kind=Kind.HANG_OUTSIDE if froze else Kind.HANG_IN_COMMUNICATION,
        culprit=node,
        since_step=min(one.step for one in cuts),
        confidence=_SURE,
        reason=f"{node} has said nothing to any of {len(cuts)} nodes for {SILENT_S:g} s, {why}",
        evidence={"silent_s": SILENT_S, "nodes": len(cuts), "answered": num},
    )


def _between(alive: Collection[Cut]) -> list[Verdict]:
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
