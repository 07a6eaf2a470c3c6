"""What must hold after every event, whatever died.

Looks at shared memory and at who acts, never at what a protocol class remembers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from elastic.core.protocol.events import Evaluated, Update
from elastic.core.protocol.messages import Manifest, State, Stop
from elastic.core.simulator.memory import Half, Memory, Version
from elastic.core.simulator.truth import Entry, Truth, means, next_digest

if TYPE_CHECKING:
    from elastic.core.simulator.aggregator_process import AggregatorProcess

LIVENESS_S = 120.0


class Violation(Exception):
    """An invariant does not hold."""


class Checker:
    """Compares shared memory with the truth."""

    def __init__(self, truth: Truth, memory: Memory) -> None:
        self._truth = truth
        self._memory = memory
        self._position = 0  # of the commit record in the sequence of the undisturbed run
        self._checked = -1

    def after_event(self, acting: Sequence[AggregatorProcess]) -> None:
        """The invariants over the memory; cheap while nothing was stored."""
        if len(acting) > 1:
            names = ", ".join(one.name for one in acting)
            raise Violation(f"two aggregators act: {names}")
        if self._checked == self._memory.serial:
            return
        self._checked = self._memory.serial
        self._check_version()
        self._check_slots()

    def _check_version(self) -> None:
        step = self._memory.state.step
        version = self._memory.versions[step % 2]
        if version.torn:
            raise Violation(f"the version of step {step} can be read while half written")
        if version.digest != self._truth.digests[step]:
            raise Violation(f"the version of step {step} is not that of the undisturbed run")

    def _check_slots(self) -> None:
        seen: dict[int, int] = {}
        for worker, manifest in self._memory.counting().items():
            for micro_batch in manifest.micro_batches:
                if micro_batch in seen:
                    raise Violation(
                        f"micro-batch {micro_batch} of {manifest.key} counts twice:"
                        f" workers {seen[micro_batch]} and {worker}"
                    )
                seen[micro_batch] = worker
                if self._memory.rows.get(micro_batch) is None:
                    raise Violation(f"the row of micro-batch {micro_batch} counts and is torn")
            if self._memory.state.exponents is not None and not self._evaluates():
                self._check_half(worker, manifest)
        word = self._memory.state.key.word
        for micro_batch, done in enumerate(self._memory.done):
            if done == word and micro_batch not in seen:
                raise Violation(f"micro-batch {micro_batch} is marked done and does not count")

    def _evaluates(self) -> bool:
        """Whether the pass that runs evaluates, so that nothing is written."""
        state = self._memory.state
        return state.step in self._truth.evaluations and state.evaluated < state.step

    def _check_half(self, worker: int, manifest: Manifest) -> None:
        """The half that counts holds what its manifest says, computed from the right version."""
        slot = self._memory.slots.get(worker)
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

    def saving(self, state: State) -> None:
        """A commit record is about to be written: the same again, or the next of the truth."""
        states = self._truth.states
        if state == states[self._position]:
            return
        if self._position + 1 < len(states) and state == states[self._position + 1]:
            self._position += 1
            return
        wanted = states[self._position : self._position + 2]
        raise Violation(f"the commit record becomes {state}; the truth is {wanted}")

    def evaluated(self, evaluated: Evaluated) -> None:
        """The model was evaluated: it reports the right sums, or nothing if it is not finite."""
        state, answers = self._memory.state, self._truth.evaluations.get(evaluated.step)
        if answers is None or state.step != evaluated.step:
            raise Violation(f"step {evaluated.step} is evaluated at {state}")
        is_finite = math.isfinite(evaluated.loss)
        if is_finite and (evaluated.loss, *evaluated.metrics) != means(answers):
            raise Violation(f"{evaluated} is reported, the truth is {means(answers)}")
        broken = not all(bool(np.isfinite(one.maxima_C).all()) for one in answers)
        if is_finite == broken:
            raise Violation(f"{evaluated} is reported of answers that are {'not ' * broken}finite")

    def finished(self, failure: str, stops: Sequence[Stop]) -> None:
        """The job says that it is at its end, or that it was asked to stop in one of these ways."""
        if any(failure == (stop.reason if stop.failed else "") for stop in stops):
            return  # at a commit record that was checked when it was saved
        if bool(failure) != self._truth.fails:
            raise Violation(f"the job ended with failure {failure!r}")
        if self._memory.state != self._truth.states[-1]:
            raise Violation(f"the job ended at {self._memory.state}")


class Sum:
    """One running sum of slots into the next version: it must see nothing change."""

    def __init__(self, memory: Memory, truth: Truth, update: Update) -> None:
        self._memory = memory
        self._truth = truth
        self._update = update
        self._halves: list[Half] = []
        if update.step != memory.state.step:
            raise Violation(f"update of step {update.step} at {memory.state}")
        for worker, half in update.slots:
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

    def end(self) -> None:
        """Check what was added and complete the version."""
        source = self._memory.versions[self._update.step % 2]
        self._target.digest = source.digest
        if not self._update.skip:
            self._target.digest = next_digest(source.digest, self._entries())
        self._target.torn = False
        self._memory.serial += 1

    def _entries(self) -> list[Entry]:
        if any(half.torn for half in self._halves):
            raise Violation("the sum reads a half that is half written")
        if self._writes != [half.writes for half in self._halves]:
            raise Violation("a half was written while it was summed")
        entries = sorted(entry for half in self._halves for entry in half.entries)
        _, step, attempt = self._memory.state.key
        digest = self._truth.digests[step]
        right = [(step, attempt, m, digest) for m in range(self._truth.num_micro_batches)]
        if entries != right:
            raise Violation(f"the sum holds {entries}; it must hold {right}")
        return entries
