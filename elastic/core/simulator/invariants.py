"""What must hold after every event, whatever died.

Looks at shared memory and at who acts, never at what a protocol class remembers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from elastic.core.protocol.events import Evaluated, Update
from elastic.core.protocol.holdings import VOID
from elastic.core.protocol.messages import Key, Manifest, State, Stop
from elastic.core.simulator.memory import Half, Memory, Version
from elastic.core.simulator.truth import Entry, Truth, means, next_digest

if TYPE_CHECKING:
    from elastic.core.simulator.aggregator_process import AggregatorProcess

LIVENESS_S = 120.0


class Violation(Exception):
    """An invariant does not hold."""


class Checker:
    """Compares shared memory with the truth. `memories` are those of the members, by node;
    `joining` those of nodes that copy."""

    def __init__(self, truth: Truth, memories: dict[int, Memory], *, num_nodes: int) -> None:
        self.memories = memories
        self.joining: dict[int, Memory] = {}
        self.is_alone = num_nodes == 1
        self._truth = truth
        self._position = 0  # of the commit record in the sequence of the undisturbed run
        self._positions: dict[int, int] = {}
        self._checked: tuple[int, ...] = ()

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
        """What that node holds is about to be overwritten by a copy, maybe of an earlier step."""
        memory = self.memories.get(node)
        if memory is not None and node in memory.membership.nodes:
            raise Violation(f"node {node} receives a copy and knows that it is a member")
        self._positions.pop(node, None)

    def committing(self, step: int, nodes: Sequence[int]) -> None:
        """The lead, which knows of these members, is about to write the first record of a step."""
        for node, memory in self.memories.items():
            if node in nodes and memory.prepared == VOID:
                raise Violation(f"step {step} is committed while member {node} holds nothing")
            if node in nodes:
                self._check_version(memory, step)

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

    def _check_slots(self) -> None:
        seen: dict[tuple[Key, int], int] = {}
        for memory in self.memories.values():
            for worker, manifest in memory.counting().items():
                for micro_batch in manifest.micro_batches:
                    if (manifest.key, micro_batch) in seen:
                        raise Violation(
                            f"micro-batch {micro_batch} of {manifest.key} counts twice:"
                            f" workers {seen[manifest.key, micro_batch]} and {worker}"
                        )
                    seen[manifest.key, micro_batch] = worker
                    if memory.rows.get(micro_batch) is None:
                        raise Violation(f"the row of micro-batch {micro_batch} counts and is torn")
                if memory.state.exponents is not None and not self._evaluates(memory.state):
                    self._check_half(memory, worker, manifest)
        if self.is_alone:  # else others hear a little later what counts no more
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
        if sorted(half.entries) != right:
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
            if state == states[position]:
                self._positions[node] = position
                self._position = max(self._position, position)
                return
        wanted = states[first : self._position + 2]
        raise Violation(f"the commit record of node {node} becomes {state}; the truth is {wanted}")

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

    def finished(self, state: State, failure: str, stops: Sequence[Stop]) -> None:
        """The job says that it is at its end, or that it was asked to stop in one of these ways."""
        if any(failure == (stop.reason if stop.failed else "") for stop in stops):
            return  # at a commit record that was checked when it was saved
        if bool(failure) != self._truth.fails:
            raise Violation(f"the job ended with failure {failure!r}")
        if state != self._truth.states[-1]:
            raise Violation(f"the job ended at {state}")


class Sum:
    """One running sum of a node's slots into the next version: it must see nothing change."""

    def __init__(self, memory: Memory, truth: Truth, update: Update, workers: set[int]) -> None:
        self._memory = memory
        self._truth = truth
        self._update = update
        self._halves: list[Half] = []
        if update.step != memory.state.step:
            raise Violation(f"update of step {update.step} at {memory.state}")
        for worker, half in update.slots:
            if worker not in workers:
                continue
            slot = memory.slots.get(worker)
            if slot is None:
                raise Violation(f"the sum reads the dropped slot of worker {worker}")
            self._halves.append(slot.halves[half])
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
        return tuple(entry for half in self._halves for entry in half.entries)

    def end(self, parts: Iterable[tuple[Entry, ...]]) -> None:
        """Check what all nodes added and complete the version."""
        source = self._memory.versions[self._update.step % 2]
        self._target.digest = source.digest
        if not self._update.skip:
            self._check(sorted(entry for part in parts for entry in part))
        self._target.torn = False
        self._memory.serial += 1

    def _check(self, entries: list[Entry]) -> None:
        _, step, attempt = self._memory.state.key
        digest = self._truth.digests[step]
        right = [(step, attempt, m, digest) for m in range(self._truth.num_micro_batches)]
        if entries != right:
            raise Violation(f"the sum holds {entries}; it must hold {right}")
        self._target.digest = next_digest(self._target.digest, entries)
