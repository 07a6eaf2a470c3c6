"""What must hold after every event, whatever died.

Looks at shared memory and at who acts, never at what a protocol class remembers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from elastic.core.protocol.events import Evaluated, Finish, Update
from elastic.core.protocol.holdings import VOID
from elastic.core.protocol.messages import Key, Manifest, Membership, State, Stop
from elastic.core.simulator.memory import Half, Memory, Version
from elastic.core.simulator.truth import NUM_CHUNKS, Entry, Truth, honest, means, next_digest
from elastic.core.simulator.world import Parameters
from policies.coding.field import PRIME

if TYPE_CHECKING:
    from elastic.core.simulator.aggregator_process import AggregatorProcess

LIVENESS_S = 120.0


class Violation(Exception):
    """An invariant does not hold."""


class Checker:
    """Compares shared memory with the truth. `memories` are those of the members, by node;
    `joining` those of nodes that join."""

    def __init__(self, truth: Truth, memories: dict[int, Memory], *, num_nodes: int) -> None:
        self.memories = memories
        self.joining: dict[int, Memory] = {}
        self.is_alone = num_nodes == 1
        self.has_liars = False
        self.may_redo = False
        """Attempts may be more than those of the undisturbed run: what is coded may be lost."""
        self._truth = truth
        self._position = 0  # of the commit record in the sequence of the undisturbed run
        self._positions: dict[int, int] = {}
        self._checked: tuple[int, ...] = ()
        self._keepers: dict[int, set[int]] = {}  # of each chunk, in the newest committed version

    def after_event(self, acting: Sequence[AggregatorProcess]) -> None:
        """The invariants over the memories; cheap while nothing was stored."""
        if len({one.node for one in acting}) < len(acting):
            names = ", ".join(one.name for one in acting)
            raise Violation(f"two aggregators act on one node: {names}")
        memories = (*self.memories.values(), *self.joining.values())
        serials = tuple(memory.serial for memory in memories)
        if self._checked == serials:
            return
        self._checked = serials
        for memory in memories:
            if memory.prepared != VOID:
                self._check_version(memory, memory.state.step)
        self._check_slots()

    def begins_anew(self, node: int) -> None:
        """What that node holds is about to be overwritten, maybe by an earlier step."""
        memory = self.memories.get(node)
        if memory is not None and node in memory.membership.nodes:
            raise Violation(f"node {node} receives a version and knows that it is a member")
        self._positions.pop(node, None)

    def committing(self, step: int, membership: Membership) -> None:
        """The lead, which knows of these members, is about to write the first record of a step."""
        nodes = membership.nodes
        members = {node: one for node, one in self.memories.items() if node in nodes}
        for node, memory in members.items():
            if memory.prepared == VOID:
                raise Violation(f"step {step} is committed while member {node} holds nothing")
            self._check_version(memory, step)
        for chunk in range(NUM_CHUNKS):
            keepers = {node for node, one in members.items() if chunk in one.kept(step)}
            before = self._keepers.get(chunk, set()) & members.keys() - set(membership.departing)
            if len(keepers) < min(2, len(before)):
                raise Violation(
                    f"the state of chunk {chunk} was on nodes {sorted(before)} before step {step},"
                    f" and is on {sorted(keepers)}"
                )
            self._keepers[chunk] = keepers

    def ready(self, node: int, memory: Memory, step: int) -> None:
        """A joining node is said to be able to follow at `step`."""
        has = memory.state.step + (memory.prepared == memory.state.key.word)
        if memory.prepared == VOID or has < step - 1:
            raise Violation(f"node {node} is said to be ready at step {step} and is not")

    def _check_version(self, memory: Memory, step: int) -> None:
        version = memory.versions[step % 2]
        if version.torn:
            raise Violation(f"the version of step {step} can be read while half written")
        if version.digest != self._truth.digests[step]:
            raise Violation(f"the version of step {step} is not that of the undisturbed run")
        for chunk, digest in version.states.items():
            if digest != self._truth.digests[step]:
                raise Violation(f"the state of chunk {chunk} is not that of step {step}")

    def _check_slots(self) -> None:
        seen: dict[tuple[Key, int], int] = {}
        for memory in self.memories.values():
            for worker, manifest in memory.counting().items():
                for micro_batch in manifest.micro_batches:
                    if (manifest.key, micro_batch) in seen and not (
                        self.has_liars and not self.is_alone  # who is to empty a slot may be dead
                    ):
                        raise Violation(
                            f"micro-batch {micro_batch} of {manifest.key} counts twice:"
                            f" workers {seen[manifest.key, micro_batch]} and {worker}"
                        )
                    seen[manifest.key, micro_batch] = worker
                    if memory.rows.get(micro_batch) is None:
                        raise Violation(f"the row of micro-batch {micro_batch} counts and is torn")
                if memory.state.exponents is not None and not self._evaluates(memory.state):
                    self._check_half(memory, worker, manifest)
        if (
            self.is_alone and not self.may_redo
        ):  # else others hear a little later what counts no more
            for memory in self.memories.values():
                self._check_done(memory, {micro_batch for _, micro_batch in seen})

    def _check_done(self, memory: Memory, counting: set[int]) -> None:
        for micro_batch, done in enumerate(memory.done):
            if done == memory.state.key.word and micro_batch not in counting:
                raise Violation(f"micro-batch {micro_batch} is marked done and does not count")

    def _evaluates(self, state: State) -> bool:
        """Whether the pass that runs evaluates, so that nothing is written."""
        return state.step in self._truth.evaluations and state.evaluated < state.step

    def _check_half(self, memory: Memory, worker: int, manifest: Manifest) -> None:
        """The half that counts holds what its manifest says, computed from the right version."""
        slot = memory.slots.get(worker)
        if slot is None:
            raise Violation(f"the slot of worker {worker} counts and was dropped")
        half = slot.halves[manifest.half]
        if half.torn:
            raise Violation(f"half {manifest.half} of worker {worker} counts and is half written")
        _, step, attempt = manifest.key
        digest = self._truth.digests[step]
        right = sorted((step, attempt, one, digest) for one in manifest.micro_batches)
        if sorted(map(honest, half.entries)) != right:  # lies must not get into a sum: see `Sum`
            raise Violation(
                f"half {manifest.half} of worker {worker} should hold {manifest}"
                f" and holds {half.entries}"
            )

    def saving(self, node: int, state: State) -> None:
        """A commit record is about to be written: the same again, or the next of the truth.

        A node that was away follows the others, never goes back, and none is ahead of all by more.
        """
        states = self._truth.states
        first = self._positions.get(node, 0)
        for position in range(first, min(self._position + 2, len(states))):
            if self._is(state, states[position]):
                self._positions[node] = position
                self._position = max(self._position, position)
                return
        wanted = states[first : self._position + 2]
        raise Violation(f"the commit record of node {node} becomes {state}; the truth is {wanted}")

    def _is(self, state: State, truth: State) -> bool:
        if self.may_redo and state.attempt > truth.attempt:
            state = replace(state, attempt=truth.attempt)
        return state == truth

    def evaluated(self, state: State, evaluated: Evaluated) -> None:
        """The model was evaluated: it reports the right sums, or nothing if it is not finite."""
        answers = self._truth.evaluations.get(evaluated.step)
        if answers is None or state.step != evaluated.step:
            raise Violation(f"step {evaluated.step} is evaluated at {state}")
        is_finite = math.isfinite(evaluated.loss)
        if is_finite and (evaluated.loss, *evaluated.metrics) != means(answers):
            raise Violation(f"{evaluated} is reported, the truth is {means(answers)}")
        broken = not all(bool(np.isfinite(one.maxima_C).all()) for one in answers)
        if is_finite == broken:
            raise Violation(f"{evaluated} is reported of answers that are {'not ' * broken}finite")

    def finished(self, state: State, finish: Finish, stops: Sequence[Stop]) -> None:
        """The job says that it is at its end, or that it was asked to stop in one of these ways."""
        failure = finish.failure
        if not finish.is_whole:
            self._check_lost(state.step)
            return
        if any(failure == (stop.reason if stop.failed else "") for stop in stops):
            return  # at a commit record that was checked when it was saved
        if bool(failure) != self._truth.fails:
            raise Violation(f"the job ended with failure {failure!r}")
        if not self._is(state, self._truth.states[-1]):
            raise Violation(f"the job ended at {state}")

    def _check_lost(self, step: int) -> None:
        """The state of a chunk is nowhere: of a node that lives, in the newest version."""
        kept = [one.kept(step) for one in self.memories.values() if one.prepared != VOID]
        if len(frozenset().union(*kept)) == NUM_CHUNKS:
            raise Violation(f"the job ends at step {step} for want of state, and all is there")


class Sum:
    """One running sum of a node's slots into the next version: it must see nothing change.

    A node that observes has no slots. `digest` is that of the next version, `states` what this node
    has computed of it, once `is_updated`.
    """

    def __init__(
        self,
        memory: Memory,
        truth: Truth,
        update: Update,
        workers: set[int],
        *,
        observes: bool = False,
    ) -> None:
        self.digest = 0
        self.states: dict[int, int] = {}
        self.is_updated = False
        self._memory = memory
        self._truth = truth
        self._update = update
        self._halves: list[Half] = []
        if update.step != memory.state.step and not observes:
            raise Violation(f"update of step {update.step} at {memory.state}")
        for worker, half in update.slots:
            if worker not in workers:
                continue
            slot = memory.slots.get(worker)
            if slot is None:
                raise Violation(f"the sum reads the dropped slot of worker {worker}")
            self._halves.append(slot.coded if update.coefficients else slot.halves[half])
        self._writes = [half.writes for half in self._halves]
        self.begin(self._target)

    @property
    def _target(self) -> Version:
        return self._memory.versions[(self._update.step + 1) % 2]

    def begin(self, version: Version) -> None:
        version.torn = True
        version.writes += 1
        self._memory.serial += 1

    def own(self) -> tuple[Entry, ...]:
        """The sum of this node's slots."""
        if any(half.torn for half in self._halves):
            raise Violation("the sum reads a half that is half written")
        if self._writes != [half.writes for half in self._halves]:
            raise Violation("a half was written while it was summed")
        if self._update.coefficients:
            return self._decoded()
        return tuple(entry for half in self._halves for entry in half.entries)

    def _decoded(self) -> tuple[Entry, ...]:
        """What counts once; it must be that all does, or not at all."""
        times: Counter[Entry] = Counter()
        for half, answer in zip(self._halves, self._update.coefficients, strict=True):
            for entry, coefficient in zip(half.entries, half.coefficients, strict=True):
                times[entry] = (times[entry] + answer * coefficient) % PRIME
        if wrong := {entry: number for entry, number in times.items() if number not in (0, 1)}:
            raise Violation(f"these count so many times in what is decoded: {wrong}")
        return tuple(entry for entry, number in times.items() if number)

    def add(self, parts: Iterable[tuple[Entry, ...]], node: int) -> None:
        """Check what all nodes added, and compute the state of the chunks that `node` keeps."""
        self._check(sorted(entry for part in parts for entry in part))
        source = self._memory.versions[self._update.step % 2]
        for chunk, nodes in enumerate(self._update.keepers):
            if node in nodes:
                self.states[chunk] = self._next(source, chunk)
        self.is_updated = True

    def _next(self, source: Version, chunk: int) -> int:
        if source.states.get(chunk) != source.digest:
            raise Violation(f"chunk {chunk} is updated without its state: {source}")
        return self.digest

    def receive(self, parts: Sequence[Parameters], node: int) -> None:
        """Check what others have computed, and complete the version."""
        chunks = set(self.states)
        for part in parts:
            if self.digest not in (0, part.digest):
                raise Violation(f"the parameters of {self._update} differ between their owners")
            self.digest = part.digest
            chunks.update(part.owned)
            self.states.update(part.states)
        if len(chunks) < NUM_CHUNKS:
            raise Violation(f"only {chunks} of {NUM_CHUNKS} chunks are complete by {self._update}")
        wanted = self._update.kept_by(node)
        if self.states.keys() != wanted:
            raise Violation(f"node {node} has the state of {set(self.states)}, not of {wanted}")
        self._complete()

    def carry(self) -> None:
        """A step that is skipped: the same once more."""
        source = self._memory.versions[self._update.step % 2]
        self.digest, self.states = source.digest, dict(source.states)
        self._complete()

    def _complete(self) -> None:
        self._target.digest, self._target.states = self.digest, self.states
        self._target.torn = False
        self._memory.serial += 1

    def _check(self, entries: list[Entry]) -> None:
        _, step, attempt = self._memory.state.key
        digest = self._truth.digests[step]
        right = [(step, attempt, m, digest) for m in range(self._truth.num_micro_batches)]
        if entries != right:
            raise Violation(f"the sum holds {entries}; it must hold {right}")
        self.digest = next_digest(digest, entries)
