"""A model of a node's store in shared memory: it outlives every process there.

Stores may be half done. A half holds a multiset of entries instead of numbers. Whatever changes
counts up `serial`, so that the invariants are checked again only when something did change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic.core.protocol.aggregator import Recovered
from elastic.core.protocol.messages import Key, Manifest, Membership, Outcome, State
from elastic.core.simulator.truth import FIRST_DIGEST, NUM_CHUNKS, Entry


@dataclass(slots=True)
class Half:
    """`torn` while it is being written, or for ever after its writer died doing so.

    `coefficients`, if it is coded: what each entry was multiplied with.
    """

    entries: tuple[Entry, ...] = ()
    coefficients: tuple[int, ...] = ()
    torn: bool = False
    writes: int = 0


@dataclass(slots=True, eq=False)
class Slot:
    """One slot file. A worker that mapped it goes on to write there after it was unlinked.

    `coded` lies where both halves do: who writes the one destroys the other.
    """

    worker: int
    halves: tuple[Half, Half] = field(default_factory=lambda: (Half(), Half()))
    coded: Half = field(default_factory=Half)
    progress: int = 0

    def begin(self, half: int, *, coded: bool) -> Half:
        """The half that is about to be written."""
        for other in self.halves if coded else (self.coded,):
            other.entries, other.coefficients = (), ()
            other.writes += 1
        target = self.coded if coded else self.halves[half]
        target.torn = True
        target.writes += 1
        return target


@dataclass(slots=True)
class Version:
    """`states`: the digests of the state of the chunks that are kept here."""

    digest: int = FIRST_DIGEST
    states: dict[int, int] = field(
        default_factory=lambda: dict.fromkeys(range(NUM_CHUNKS), FIRST_DIGEST)
    )
    torn: bool = False
    writes: int = 0


@dataclass(slots=True)
class Memory:
    """Everything that survives the death of all processes."""

    num_micro_batches: int
    state: State
    key_word: int
    membership: Membership = Membership()
    done: list[int] = field(default_factory=list)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    rows: dict[int, Outcome | None] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    versions: tuple[Version, Version] = field(default_factory=lambda: (Version(), Version()))
    active_pid: int = 0
    prepared: int = 0
    serial: int = 0

    def __post_init__(self) -> None:
        self.done = [0] * self.num_micro_batches

    def open_slot(self, worker: int) -> None:
        self.serial += 1
        self.slots.setdefault(worker, Slot(worker))
        self.manifests.setdefault(worker, Manifest(Key(self.state.model, 0, 0)))

    def drop_slot(self, worker: int) -> None:
        self.serial += 1
        self.slots.pop(worker, None)
        self.manifests.pop(worker, None)

    def counting(self) -> dict[int, Manifest]:
        """The manifests of the key that runs, by the commit record."""
        key = self.state.key
        return {
            worker: manifest
            for worker, manifest in self.manifests.items()
            if manifest.key == key and manifest.micro_batches
        }

    def kept(self, step: int) -> frozenset[int]:
        """The chunks whose state is here in the version of that step."""
        return frozenset(self.versions[step % 2].states)

    def recover(self, node: int) -> Recovered:
        """What a successor reads before it acts."""
        rows = {}
        for manifest in self.counting().values():
            for micro_batch in manifest.micro_batches:
                row = self.rows[micro_batch]
                assert row is not None, f"row {micro_batch} is torn though it counts"
                rows[micro_batch] = row
        return Recovered(
            self.state,
            self.membership,
            dict(self.manifests),
            rows,
            kept={node: self.kept(self.state.step)},
            next_kept=self.kept(self.state.step + 1),
        )
