"""What the aggregators of different nodes say to each other.

The first node leads. What it says carries the number of its term, a new one for each process that
leads, so that nothing of an earlier lead is ever mistaken for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastic.core.protocol.events import Action
from elastic.core.protocol.messages import Manifest, Membership, Message, Outcome, State

# Lead -> node


@dataclass(frozen=True, slots=True)
class Ask:
    """What does your memory hold? From now on this term leads.

    A node that joins answers once it reaches all members: then it can take part in rounds.
    """

    term: int
    membership: Membership


@dataclass(frozen=True, slots=True)
class Order:
    """Carry this out, in the order of the orders."""

    term: int
    action: Action


# Node -> lead


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The row of a micro-batch that counts on this node, said before Holds."""

    term: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Holds:
    """What else a node's memory holds: the answer to Ask.

    `prepared` is the word of the key whose next version is complete here, 0: of none. `kept` are
    the chunks whose state is here in the version of `state`, `next_kept` in the one prepared.
    `checksum` is of that version if it is the one that the task made here, else 0.
    """

    term: int
    state: State
    prepared: int
    manifests: Mapping[int, Manifest]
    kept: frozenset[int] = frozenset()
    next_kept: frozenset[int] = frozenset()
    checksum: int = 0

    def kept_at(self, step: int) -> frozenset[int]:
        """The chunks whose state is here in the version of that step."""
        return self.kept if step == self.state.step else self.next_kept


@dataclass(frozen=True, slots=True)
class Relayed:
    """A worker of this node said that, or (None) its socket is at its end."""

    term: int
    worker: int
    message: Message | None


@dataclass(frozen=True, slots=True)
class Progress:
    """The counters of this node's workers."""

    term: int
    counts: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Complete:
    """The next version is complete here."""

    term: int
    round: int
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Stalled:
    """A link to another node broke, or is there again: what was on it in this round is lost.

    A node that joins takes part in rounds once it answers Ask again.
    """

    term: int
    round: int


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """This node joins, and its commit record is that of `step`."""

    term: int
    step: int


NodeMessage = Ask | Order | Row | Holds | Relayed | Progress | Complete | Stalled | CaughtUp
