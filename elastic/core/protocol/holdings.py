"""What the shared memory of a node holds, and what counts of it on all nodes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic.core.errors import ProtocolError
from elastic.core.protocol.aggregator import Recovered
from elastic.core.protocol.events import (
    Action,
    DropSlot,
    HangUp,
    OpenSlot,
    SaveManifest,
    SaveRow,
    SaveState,
    Update,
)
from elastic.core.protocol.messages import Manifest, Membership, Outcome, State
from elastic.core.protocol.orders import Holds

VOID = 2**64 - 1
"""Where a node has prepared this word its versions are those of nothing: it joins, and has received
no whole one."""


@dataclass(slots=True)
class Memory:
    """What this node's shared memory holds, as far as it was told to hold it."""

    state: State
    prepared: int
    manifests: dict[int, Manifest]
    rows: dict[int, Outcome]
    kept: frozenset[int]
    next_kept: frozenset[int]
    node: int
    checksum: int
    workers: set[int] = field(default_factory=set)

    def take(self, action: Action) -> None:
        match action:
            case SaveState(state):
                if state.key != self.state.key:
                    self.rows.clear()
                if state.step != self.state.step:
                    self.kept, self.checksum = self.next_kept, 0
                self.state = state
            case Update():
                self.next_kept = self.kept if action.skip else action.kept_by(self.node)
            case SaveRow(_, outcome):
                self.rows[outcome.micro_batch] = outcome
            case SaveManifest(worker, manifest):
                self.manifests[worker] = manifest
            case OpenSlot(worker):
                self.manifests.setdefault(worker, Manifest(self.state.key))
            case DropSlot(worker):
                self.manifests.pop(worker, None)
            case HangUp(worker):
                self.workers.discard(worker)

    def holds(self, term: int) -> Holds:
        manifests = dict(self.manifests)
        return Holds(
            term,
            self.state,
            self.prepared,
            manifests,
            self.kept,
            self.next_kept,
            self.checksum,
        )


def can_follow(state: State, prepared: int, newest: State) -> bool:
    """Whether a node at `state` has the version of `newest`, or has prepared it."""
    if prepared == VOID:
        return False
    if state.step == newest.step:
        return True
    return state.step == newest.step - 1 and prepared == state.key.word


def merged(
    newest: State,
    membership: Membership,
    holds: Mapping[int, Holds],
    rows: Mapping[int, Mapping[int, Outcome]],
) -> Recovered:
    """What counts on all nodes together. `rows` are by node, too."""
    manifests: dict[int, Manifest] = {}
    counting: dict[int, Outcome] = {}
    homes: dict[int, int] = {}
    for node, held in holds.items():
        for worker, manifest in held.manifests.items():
            if worker in manifests:
                raise ProtocolError(
                    f"worker {worker} has slots on nodes {homes[worker]} and {node}"
                )
            manifests[worker], homes[worker] = manifest, node
            if manifest.key == newest.key:
                counting |= {one: rows[node][one] for one in manifest.micro_batches}
    kept = {node: held.kept_at(newest.step) for node, held in holds.items()}
    return Recovered(newest, membership, manifests, counting, homes, kept)
