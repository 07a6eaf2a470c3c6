"""What happens to an aggregator, and what it does about it.

Plain values. The protocol takes events and gives actions; whoever runs it, a process or the
simulator, carries the actions out in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic.core.protocol.messages import (
    Key,
    Manifest,
    Membership,
    Message,
    Outcome,
    Report,
    State,
)
from policies.resharding import Move

# Events beside messages


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: the lock is held and shared memory was read."""


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """A message of a worker (its id), which lives on `node`, or of the coordinator (None)."""

    sender: int | None
    message: Message
    node: int = 0


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A worker (its id) or the coordinator (None) can be heard no more.

    `is_dead`: its process is known to have died; else there was an end-of-file on its socket.
    """

    sender: int | None
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class Updated:
    """The next version is complete on a node, and may be committed once it is on all."""

    grad_norm: float = 0.0
    round: int = 0
    node: int = 0


@dataclass(frozen=True, slots=True)
class Stalled:
    """The exchange of this round lost something on its way."""

    round: int


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Coded sums of this round do not fit together: nothing was updated."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """A node that joins has the version of `step`, by its commit record."""

    node: int
    step: int


@dataclass(frozen=True, slots=True)
class Collect:
    """A checkpoint of this state is to be written here: the state of all chunks is needed."""

    state: State


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. `progress`: the progress word (`advance`) of each worker that is seen."""

    progress: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """For one model of several: whether it may lease now, and who holds work of another one.

    `ending`, some of the `busy`, hold only what the step before has left over: that is complete,
    and they have yet to see it.
    """

    is_open: bool = True
    busy: frozenset[int] = frozenset()
    ending: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Lend:
    """For one model of several: these are the worker's in this round of the job."""

    worker: int
    micro_batches: tuple[int, ...]
    round: int


@dataclass(frozen=True, slots=True)
class Recall:
    """The round is over: what was lent in it is nobody's."""


@dataclass(frozen=True, slots=True)
class Lied:
    """For one model of several: an audit of another one has found out this worker."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last checkpoint and the result are written."""


@dataclass(frozen=True, slots=True)
class NodeGone:
    """The aggregator of another node cannot be reached. What a member's memory holds may still
    count; what a joining one's holds does not."""

    node: int


@dataclass(frozen=True, slots=True, eq=False)
class NodeThere:
    """It can be reached again, and this is what its memory holds. `kept`: chunks."""

    node: int
    manifests: Mapping[int, Manifest]
    kept: frozenset[int] = frozenset()


Event = (
    Started
    | Received
    | Disconnected
    | Updated
    | Stalled
    | Undecodable
    | CaughtUp
    | Collect
    | Tick
    | NodeGone
    | NodeThere
    | Turn
    | Lend
    | Recall
    | Lied
    | Finished
)

# Actions, to be carried out in order


@dataclass(frozen=True, slots=True)
class Send:
    worker: int
    message: Message


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the coordinator, if it is there."""

    report: Report


@dataclass(frozen=True, slots=True)
class OpenSlot:
    worker: int


@dataclass(frozen=True, slots=True)
class DropSlot:
    """Unlink the slot of a worker that is gone."""

    worker: int


@dataclass(frozen=True, slots=True)
class HangUp:
    worker: int


@dataclass(frozen=True, slots=True, eq=False)
class SaveRow:
    """Write down what a worker reported, on its node."""

    worker: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class SaveManifest:
    """Make the manifest valid: this is the grant."""

    worker: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class MarkDone:
    micro_batches: tuple[int, ...]
    key: Key


@dataclass(frozen=True, slots=True)
class MarkUndone:
    """These were granted on a node that is lost: whoever computes them may go on."""

    micro_batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveMembership:
    membership: Membership


@dataclass(frozen=True, slots=True)
class Update:
    """Compute the next version from this one, on all nodes together; answer with Updated.

    `slots`: (worker, half) of every slot that counts. With `skip`, only carry the state over.
    `nodes` exchange their sums, whatever a node has heard of the membership since; `round` is the
    number of this exchange: the same sums may be exchanged anew.

    `keepers`, of each chunk: the nodes that have its state in this version and compute it for the
    next one, its owner first; all others get the parameters from the owner. `moves`: who is to keep
    a chunk's state from the next version on besides, and gets it from whom. `observers` join: they
    get the parameters of all chunks.

    `coefficients`, if the slots are coded: what each is multiplied with, to add up to the sum. Its
    magnitude cannot exceed `limits`, in no chunk; if it does, answer with Undecodable.

    `num_added`: micro-batches in the slots, if some were dropped; 0: all.
    """

    round: int
    nodes: tuple[int, ...]
    step: int
    slots: tuple[tuple[int, int], ...]
    exponents: tuple[int, ...]
    weight: float
    num_updates: int
    skip: bool = False
    keepers: tuple[tuple[int, ...], ...] = ()
    moves: tuple[Move, ...] = ()
    observers: tuple[int, ...] = ()
    coefficients: tuple[int, ...] = ()
    limits: tuple[int, ...] = ()
    num_added: int = 0

    def kept_by(self, node: int) -> frozenset[int]:
        """The chunks of which `node` has the state in the next version."""
        kept = {chunk for chunk, nodes in enumerate(self.keepers) if node in nodes}
        return frozenset(kept | {one.chunk for one in self.moves if one.receiver == node})


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A node was lost within the exchange: stop this round. The slots stay, and count."""

    round: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The state of some chunks, in this version, goes to `node`, for a checkpoint.

    `senders`, of each chunk: who sends it; `node` itself if it keeps the chunk. A sender takes it
    out of a snapshot: training goes on. A new one ends the earlier one to that node.
    """

    number: int
    node: int
    step: int
    senders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveRound:
    """From now on what was lent in another round is given up, wherever it is computed."""

    round: int


@dataclass(frozen=True, slots=True)
class SaveState:
    """Flip the commit record: a new step or a new attempt begins."""

    state: State


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the event log."""

    kind: str
    reason: str
    worker: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Committed:
    """A step was committed: for the metrics. `work` names every answer: granted, refused, audited;
    or copied, if it is in a coded sum and another one was first.

    `attempt` counts the redoings of its training; `metrics` are sums over the sum of weights.
    `num_unaudited`: micro-batches of which nobody was there to give another opinion.
    `num_dropped`: those that the step ended without.
    """

    step: int
    attempt: int
    loss: float
    grad_norm: float
    skipped: bool
    num_workers: int
    num_duplicates: int
    num_unaudited: int
    work: tuple[tuple[int, int, float, float, str], ...]
    metrics: tuple[float, ...] = ()
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The model of `step` was evaluated: sums over the sum of weights, NaN where that is none.

    To be written down before the next action. A successor may come to the same evaluation again.
    """

    step: int
    loss: float
    metrics: tuple[float, ...]
    work: tuple[tuple[int, int, float, float, str], ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Write the last checkpoint and the result; answer with Finished.

    `is_whole`: the state of all chunks is still there, so that there can be a checkpoint.
    """

    failure: str
    is_whole: bool = True


Action = (
    Send
    | Tell
    | OpenSlot
    | DropSlot
    | HangUp
    | SaveRow
    | SaveManifest
    | MarkDone
    | MarkUndone
    | SaveMembership
    | Update
    | GiveUp
    | Copy
    | SaveRound
    | SaveState
    | Note
    | Committed
    | Evaluated
    | Finish
)
