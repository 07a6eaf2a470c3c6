"""A simulated worker: what the real actor does around the protocol class, in virtual time.

It carries out actions one by one, so that it may die between any two, and decides nothing that
the protocol decides.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from elastic.core.protocol import advance
from elastic.core.protocol import worker as wrk
from elastic.core.protocol.messages import (
    Combine,
    Commit,
    Lease,
    Leave,
    Message,
    Outcome,
    Welcome,
)
from elastic.core.simulator.invariants import Violation
from elastic.core.simulator.memory import Half, Slot
from elastic.core.simulator.truth import LIE, Entry
from elastic.core.simulator.world import END_OF_FILE, Connection, Process

if TYPE_CHECKING:
    from elastic.core.simulator.aggregator_process import AggregatorProcess
    from elastic.core.simulator.job import Job
    from elastic.core.simulator.network import Machine

LAYERS = 3  # of the model: between them the worker looks whether its work is still wanted


class WorkerProcess(Process):
    """A worker: computes, writes its slot, asks. Looks at its socket only in between."""

    def __init__(self, job: Job, worker: int, machine: Machine) -> None:
        super().__init__(job.clock, f"worker-{worker}")
        self.job = job
        self.worker = worker
        self.machine = machine
        self.ready = False
        self.dead_s = 0.0
        self.notice_s = 0.0
        self.slow = 1.0
        self.sick_until_s = 0.0
        self.wants_leave = False
        self.lies = 0.0
        self._slots: dict[int, Slot] = {}
        self._proto = job.build.worker(worker, self.pid, job.clock.seen)
        self._todo: deque[wrk.Send | wrk.Exit] = deque()
        self._pending: wrk.Compute | wrk.Encode | None = None
        self._busy = False
        self._connection: Connection | None = None
        self._pace_s = job.clock.rng.uniform(0.01, 0.03)
        self.after(job.start_delay_s(), self._start)

    def _start(self) -> None:
        self.ready = True
        self.wake()

    def died(self) -> None:
        self.job.worker_died(self)

    def run(self) -> None:
        while self.alive and not self.stopped and not self._busy:
            if self._todo:
                self._carry_out(self._todo.popleft())
            elif self.inbox:
                self._read()
            elif self._connection is None and self.machine.listener is not None:
                self._connect(self.machine.listener)
            elif self._pending is not None:
                self._work()
            else:
                return

    def _handle(self, event: wrk.Event) -> None:
        words = [memory.key_word for memory in self.machine.memories]
        for action in self._proto.handle(event, words):
            if isinstance(action, wrk.Send | wrk.Exit):
                self._todo.append(action)
            else:
                assert self._pending is None, "one computation at a time"
                self._pending = action

    def _read(self) -> None:
        connection, item = self.inbox.popleft()
        if connection is not self._connection:
            return
        if item is END_OF_FILE:
            self._connection = None
            self._handle(wrk.Disconnected())
            return
        if isinstance(item, Welcome):
            self._map_slot(item.manifest.key.model)
        assert isinstance(item, wrk.Event)
        self._handle(item)

    def _map_slot(self, model: int) -> None:
        """Map the slot at the first welcome; it must be the same file for ever after."""
        slot = self.machine.memories[model].slots.get(self.worker)
        assert slot is not None, "it was opened before"
        if self._slots.setdefault(model, slot) is not slot:
            raise Violation(f"{self.name} was welcomed with another slot than the one it maps")

    def _connect(self, listener: AggregatorProcess) -> None:
        self._connection = Connection(self.clock, self, listener)
        self._handle(wrk.Connected())
        if self.wants_leave:
            self._todo.append(wrk.Send(Leave("asked to")))

    def leave(self) -> None:
        """Its machine is taken away soon: say so, now and to every successor."""
        self.wants_leave = True
        if self._connection is not None:
            self._connection.send(self, Leave("asked to"))

    def _carry_out(self, action: wrk.Send | wrk.Exit) -> None:
        match action:
            case wrk.Send(message):
                self._send(message)
            case wrk.Exit(reason):
                self.clock.note(self.name, "exits", reason)
                self.kill()

    def _work(self) -> None:
        """Do the pending computation; news was read first."""
        action, self._pending = self._pending, None
        self._busy = True
        match action:
            case wrk.Compute(lease):
                self._compute(lease)
            case wrk.Encode(lease, half, base):
                self._encode(lease, half, base)

    def _send(self, message: Message) -> None:
        self.job.point(self, "Commit" if isinstance(message, Commit) else "", "before")
        if self.alive and self._connection is not None:
            self.clock.note(self.name, "sends", message)
            self._connection.send(self, self.job.over_the_wire(message))
        self.job.point(self, "Commit" if isinstance(message, Commit) else "", "after")

    def _compute(self, lease: Lease) -> None:
        self.clock.note(self.name, "computes", lease)
        version = self.machine.memories[lease.key.model].versions[lease.key.step % 2]
        seconds = self._pace_s * self.slow * self.clock.rng.uniform(0.8, 1.3)
        layer = partial(self._layer, lease, version.writes, self.clock.now_s, seconds / LAYERS)
        self.job.point(self, "Compute", "during", seconds)
        self.after(seconds / LAYERS, partial(layer, 1))

    def _layer(
        self, lease: Lease, writes: int, start_s: float, layer_s: float, number: int
    ) -> None:
        memory, word = self.machine.memories[lease.key.model], lease.key.word
        slot = self._slots[lease.key.model]
        slot.progress += advance.WHOLE // LAYERS
        done = any(memory.done[one] == word for one in lease.micro_batches) and not lease.audits
        if memory.key_word != word or done:
            slot.progress = advance.rounded_up(slot.progress)
            self._end_work(wrk.Abandoned(lease))
        elif number < LAYERS:
            again = partial(self._layer, lease, writes, start_s, layer_s)
            self.after(layer_s, partial(again, number + 1))
        else:
            slot.progress = advance.rounded_up(slot.progress)
            outcomes = tuple(self._outcome(lease, one, start_s) for one in lease.micro_batches)
            self._gradients = self._gradient(lease, writes)
            self._end_work(wrk.Computed(lease, outcomes))

    def _outcome(self, lease: Lease, micro_batch: int, start_s: float) -> Outcome:
        evaluates = lease.combine is Combine.EVALUATE
        truth = self.job.truths[lease.key.model]
        steps = truth.evaluations if evaluates else truth.answers
        answer = steps[lease.key.step][micro_batch]
        outcome = answer.outcome(micro_batch, start_s, self.clock.now_s)
        if self._lies() and not evaluates:
            self.clock.seen["lie"] += 1
            return replace(outcome, loss_sum=outcome.loss_sum + 1 + self.worker)
        if self.job.machine_errs(self, lease.key, micro_batch):
            return Outcome(
                micro_batch, float("nan"), 1.0, outcome.samples, bytes(8), outcome.maxima_C
            )
        return outcome

    def _gradient(self, lease: Lease, writes: int) -> tuple[Entry, ...]:
        """The entries of this lease; of no digest if the version changed meanwhile."""
        version = self.machine.memories[lease.key.model].versions[lease.key.step % 2]
        clean = version.writes == writes and not version.torn
        digest = version.digest if clean else 0
        _, step, attempt = lease.key
        if self._lies():
            self.clock.seen["lie"] += 1
            digest += (self.worker + 1) * LIE  # two that tell the same lie are believed
        return tuple((step, attempt, one, digest) for one in lease.micro_batches)

    def _lies(self) -> bool:
        return self.lies > 0 and self.clock.rng.random() < self.lies

    def _end_work(self, event: wrk.Event) -> None:
        """Read what came meanwhile, then say how the computation ended."""
        self._busy = False
        while self.inbox:
            self._read()
        exiting = any(isinstance(action, wrk.Exit) for action in self._todo)
        if not exiting:
            self._handle(event)
        self.run()

    def _encode(self, lease: Lease, half: int, base: int | None) -> None:
        memory, slot = self.machine.memories[lease.key.model], self._slots[lease.key.model]
        self.clock.note(self.name, "encodes", (lease, half, base))
        is_coded = lease.combine is Combine.CODED
        target = slot.begin(half, coded=is_coded)
        source = target if is_coded else slot.halves[base or 0]
        before: tuple[Entry, ...] = ()
        multiplied: tuple[int, ...] = ()
        if base is not None:
            before, multiplied = source.entries, source.coefficients
        if is_coded:
            multiplied = (*multiplied, lease.coefficient)
        memory.serial += 1
        seconds = self.clock.rng.uniform(0.001, 0.006) * self.slow
        self.job.point(self, "Encode", "during", seconds)
        end = partial(self._end_encode, lease.key.model, target, before, multiplied)
        self.after(seconds, end)

    def _end_encode(
        self, model: int, target: Half, before: tuple[Entry, ...], multiplied: tuple[int, ...]
    ) -> None:
        target.entries = before + self._gradients
        target.coefficients = multiplied
        target.torn = False
        self.machine.memories[model].serial += 1
        told = repr(self._gradients).encode()
        self._end_work(wrk.Encoded(hashlib.blake2b(told, digest_size=16).digest()))
