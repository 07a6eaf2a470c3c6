"""The shells of the simulator: what the real actors do around the protocol classes.

They carry out actions one by one, so that a process may die between any two, and take virtual
time for what takes time. They decide nothing that the protocol decides.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from elastic.core.protocol import aggregator as agg
from elastic.core.protocol import coordinator as coord
from elastic.core.protocol import worker as wrk
from elastic.core.protocol.messages import (
    Admit,
    Commit,
    Hello,
    Lease,
    Leave,
    Membership,
    Message,
    Outcome,
    Report,
    Welcome,
)
from elastic.core.simulator.invariants import Sum, Violation
from elastic.core.simulator.memory import Half, Slot
from elastic.core.simulator.world import END_OF_FILE, Connection, Item, Process

if TYPE_CHECKING:
    from elastic.core.simulator.job import Job

LAYERS = 3
HEARTBEAT_S = 0.4
LOOK_S = 0.15


class WorkerProcess(Process):
    """A worker: computes, writes its slot, asks. Looks at its socket only in between."""

    def __init__(self, job: Job, worker: int) -> None:
        super().__init__(job.clock, f"worker-{worker}")
        self.job = job
        self.worker = worker
        self.ready = False
        self.dead_s = 0.0
        self.notice_s = 0.0
        self.slow = 1.0
        self.sick_until_s = 0.0
        self.wants_leave = False
        self.slot: Slot | None = None
        self._proto = job.build.worker(worker, self.pid, job.clock.seen)
        self._todo: deque[wrk.Action] = deque()
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
            elif self._connection is None and self.job.listener is not None:
                self._connect(self.job.listener)
            else:
                return

    def _handle(self, event: wrk.Event) -> None:
        self._todo.extend(self._proto.handle(event, self.job.memory.key_word))

    def _read(self) -> None:
        connection, item = self.inbox.popleft()
        if connection is not self._connection:
            return
        if item is END_OF_FILE:
            self._connection = None
            self._handle(wrk.Disconnected())
            return
        if isinstance(item, Welcome):
            self._map_slot()
        assert isinstance(item, wrk.Event)
        self._handle(item)

    def _map_slot(self) -> None:
        """Map the slot at the first welcome; it must be the same file for ever after."""
        slot = self.job.memory.slots.get(self.worker)
        if self.slot is None:
            self.slot = slot
        elif slot is not self.slot:
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

    def _carry_out(self, action: wrk.Action) -> None:
        match action:
            case wrk.Send(message):
                self._send(message)
            case wrk.Compute(lease):
                self._busy = True
                self._compute(lease)
            case wrk.Encode(lease, half, base):
                self._busy = True
                self._encode(lease, half, base)
            case wrk.Exit(reason):
                self.clock.note(self.name, "exits", reason)
                self.kill()

    def _send(self, message: Message) -> None:
        self.job.point(self, "Commit" if isinstance(message, Commit) else "", "before")
        if self.alive and self._connection is not None:
            self.clock.note(self.name, "sends", message)
            self._connection.send(self, self.job.over_the_wire(message))
        self.job.point(self, "Commit" if isinstance(message, Commit) else "", "after")

    def _compute(self, lease: Lease) -> None:
        self.clock.note(self.name, "computes", lease)
        version = self.job.memory.versions[lease.key.step % 2]
        seconds = self._pace_s * self.slow * self.clock.rng.uniform(0.8, 1.3)
        layer = partial(self._layer, lease, version.writes, self.clock.now_s, seconds / LAYERS)
        self.job.point(self, "Compute", "during", seconds)
        self.after(seconds / LAYERS, partial(layer, 1))

    def _layer(
        self, lease: Lease, writes: int, start_s: float, layer_s: float, number: int
    ) -> None:
        if self.slot is not None:
            self.slot.progress += 1
        memory, word = self.job.memory, lease.key.word
        done = any(memory.done[one] == word for one in lease.micro_batches)
        if memory.key_word != word or done:
            self._end_compute(wrk.Abandoned(lease))
        elif number < LAYERS:
            again = partial(self._layer, lease, writes, start_s, layer_s)
            self.after(layer_s, partial(again, number + 1))
        else:
            outcomes = tuple(self._outcome(lease, one, start_s) for one in lease.micro_batches)
            self._read_key = lease.key
            self._gradients = self._gradient(lease, writes)
            self._end_compute(wrk.Computed(lease, outcomes))

    def _outcome(self, lease: Lease, micro_batch: int, start_s: float) -> Outcome:
        answer = self.job.truth.answers[lease.key.step][micro_batch]
        outcome = answer.outcome(micro_batch, start_s, self.clock.now_s)
        if self.job.machine_errs(self, lease.key, micro_batch):
            return Outcome(
                micro_batch, float("nan"), 1.0, outcome.samples, bytes(8), outcome.maxima_C
            )
        return outcome

    def _gradient(self, lease: Lease, writes: int) -> tuple[tuple[int, int, int, int], ...]:
        """The entries of this lease; of no digest if the version changed meanwhile."""
        version = self.job.memory.versions[lease.key.step % 2]
        clean = version.writes == writes and not version.torn
        digest = version.digest if clean else 0
        _, step, attempt = lease.key
        return tuple((step, attempt, one, digest) for one in lease.micro_batches)

    def _end_compute(self, event: wrk.Event) -> None:
        """Read what came meanwhile, then say how the computation ended."""
        self._busy = False
        while self.inbox:
            self._read()
        exiting = any(isinstance(action, wrk.Exit) for action in self._todo)
        if not exiting:
            self._handle(event)
        self.run()

    def _encode(self, lease: Lease, half: int, base: int | None) -> None:
        assert self.slot is not None
        self.clock.note(self.name, "encodes", (lease, half, base))
        target = self.slot.halves[half]
        source = self.slot.halves[base] if base is not None else None
        target.torn = True
        target.writes += 1
        self.job.memory.serial += 1
        before = source.entries if source is not None else ()
        seconds = self.clock.rng.uniform(0.001, 0.006) * self.slow
        self.job.point(self, "Encode", "during", seconds)
        self.after(seconds, partial(self._end_encode, target, before))

    def _end_encode(self, target: Half, before: tuple[tuple[int, int, int, int], ...]) -> None:
        assert self.slot is not None
        target.entries = before + self._gradients
        target.torn = False
        self.slot.progress += 1
        self.job.memory.serial += 1
        self._busy = False
        self._handle(wrk.Encoded())
        self.run()


class AggregatorProcess(Process):
    """An aggregator: waits for the lock, then acts until it dies."""

    def __init__(self, job: Job, number: int) -> None:
        super().__init__(job.clock, f"aggregator-{number}")
        self.job = job
        self.proto: agg.Aggregator | None = None
        self.acting = False
        self.ready = False
        self.stopped_s = 0.0
        self.peers: dict[int | None, Connection] = {}
        self._todo: deque[agg.Action | int] = deque()
        self._events: deque[agg.Event] = deque()
        self._busy = False
        self._alarm_s = float("inf")
        self.after(job.start_delay_s(), self._stand_by)

    # ------------------------------------------------------------ standing by

    def _stand_by(self) -> None:
        """Try the lock; kill an acting aggregator that shows no sign of life."""
        self.ready = True
        if self.acting or self.job.lock_owner is self:
            return
        if self.job.try_lock(self):
            self.after(self.clock.rng.uniform(0.001, 0.01), self._act)
            return
        holder = self.job.process(self.job.memory.active_pid)
        silent = holder is not None and holder.alive and holder.stopped
        if silent and isinstance(holder, AggregatorProcess):
            if self.clock.now_s - holder.stopped_s > HEARTBEAT_S:
                self.clock.seen["hung aggregator killed"] += 1
                if self.job.build.needs_lock:
                    self.clock.push(self.clock.rng.uniform(0.0, 0.05), holder.kill)
                else:
                    self._act()
        self.after(LOOK_S, self._stand_by)

    def look_again(self) -> None:
        """The lock may be free."""
        self.after(self.clock.rng.uniform(1e-4, 2e-3), self._stand_by_once)

    def _stand_by_once(self) -> None:
        if not self.acting and self.job.lock_owner is None and self.job.try_lock(self):
            self.after(self.clock.rng.uniform(0.001, 0.01), self._act)

    def _act(self) -> None:
        if self.acting:
            return
        memory = self.job.memory
        self.acting = True
        self.job.acting.append(self)
        memory.active_pid = self.pid
        if any(version.torn for version in memory.versions):
            self.clock.seen["takeover mid-update"] += 1
        if memory.counting():
            self.clock.seen["takeover mid-step"] += 1
        recovered = memory.recover()
        self.clock.note(self.name, "acts", memory.state)
        self.proto = self.job.build.aggregator(self.job.rules, recovered, self.clock.seen)
        self._events.append(agg.Started())
        self.job.listen(self)
        self.wake()

    def stop(self) -> None:
        self.stopped_s = self.clock.now_s
        super().stop()

    def died(self) -> None:
        self.job.aggregator_died(self)

    # ------------------------------------------------------------------ acting

    def run(self) -> None:
        """Do one thing that others can see; then let them run."""
        if self.proto is None:
            return
        while self.alive and not self.stopped and not self._busy:
            if self._todo:
                if self._carry_out(self._todo.popleft()):
                    break
            elif self._events:
                self._handle(self._events.popleft())
            elif self.inbox:
                self._read(*self.inbox.popleft())
            elif self.proto.next_tick_s <= self.clock.now_s:
                self._tick()
                break
            else:
                self._set_alarm(self.proto.next_tick_s)
                return
        if self.alive and not self._busy:
            self.wake(self.clock.rng.uniform(2e-6, 4e-5))

    def _set_alarm(self, at_s: float) -> None:
        if self.proto is not None and self.proto.phase is agg.Phase.ENDED:
            return
        if at_s < self._alarm_s:
            self._alarm_s = at_s
            self.after(at_s - self.clock.now_s, self._alarm)

    def _alarm(self) -> None:
        self._alarm_s = float("inf")
        self.wake()

    def _tick(self) -> None:
        slots = self.job.memory.slots
        progress = {
            one: slots[one].progress for one in self.peers if one in slots and one is not None
        }
        self._handle(agg.Tick(progress))

    def _handle(self, event: agg.Event) -> None:
        assert self.proto is not None
        self._todo.extend(self.proto.handle(event, self.clock.now_s))
        self.job.finished |= self.proto.phase is agg.Phase.ENDED

    def _read(self, connection: Connection, item: Item) -> None:
        sender = self.job.worker_of(connection.ends[0])
        if item is END_OF_FILE:
            if self.peers.get(sender) is connection:
                del self.peers[sender]
                self._handle(agg.Disconnected(sender))
            return
        if isinstance(item, Hello) or sender is None:
            self.peers[sender] = connection
        if self.peers.get(sender) is connection:
            self._handle(agg.Received(sender, item))  # type: ignore[arg-type]

    def _carry_out(self, action: agg.Action | int) -> bool:
        """True when others may have seen it."""
        name = type(action).__name__
        self.job.point(self, name, "before")
        if self.stopped:
            self._todo.appendleft(action)
        if self.stopped or not self.alive:
            return True
        self.clock.note(self.name, "does", action)
        visible = self._do(action)
        self.job.point(self, name, "after")
        return visible

    def _do(self, action: agg.Action | int) -> bool:
        memory = self.job.memory
        match action:
            case agg.Send(worker, message):
                self._send(worker, message)
                return False
            case agg.Tell(report):
                self._send(None, report)
                return False
            case agg.Note(kind):
                self.clock.seen[kind] += 1
                return False
            case agg.Committed():
                self.job.committed(action)
                return False
            case agg.HangUp(worker):
                connection = self.peers.pop(worker, None)
                if connection is not None:
                    connection.close(self)
                return False
            case agg.OpenSlot(worker):
                memory.open_slot(worker)
            case agg.DropSlot(worker):
                self.clock.seen["slot dropped"] += 1
                memory.drop_slot(worker)
            case agg.SaveRow(outcome):
                memory.rows[outcome.micro_batch] = None
                self.job.point(self, "SaveRow", "during")
                if self.alive:
                    memory.rows[outcome.micro_batch] = outcome
            case agg.SaveManifest(worker, manifest):
                memory.manifests[worker] = manifest
                self.job.granted_now(worker)
                memory.serial += 1
            case agg.MarkDone(micro_batches, key):
                for one in micro_batches:
                    memory.done[one] = key.word
                memory.serial += 1
            case agg.SaveMembership(membership):
                memory.membership = membership
            case agg.SaveState(state):
                self.job.save_state(state)
                self._todo.appendleft(state.key.word)
            case int(word):
                memory.key_word = word
            case agg.Update():
                self._busy = True
                self._update(action)
            case agg.Finish(failure):
                self.job.checker.finished(failure)
                self._events.append(agg.Finished())
        return True

    def _send(self, worker: int | None, message: Message) -> None:
        self.job.watch_message(worker, message)
        connection = self.peers.get(worker)
        if connection is not None:
            connection.send(self, self.job.over_the_wire(message))

    def _update(self, update: agg.Update) -> None:
        running = Sum(self.job.memory, self.job.truth, update)
        seconds = self.clock.rng.uniform(0.004, 0.012)
        self.job.point(self, "Update", "during", seconds)
        self.after(seconds, partial(self._updated, running))

    def _updated(self, running: Sum) -> None:
        running.end()
        self._busy = False
        self._events.append(agg.Updated())
        self.wake()


class CoordinatorProcess(Process):
    """The coordinator: looks at the world every now and then, and at every report."""

    def __init__(self, job: Job, number: int, target: int) -> None:
        super().__init__(job.clock, f"coordinator-{number}")
        self.job = job
        self.proto = job.build.coordinator(job.limits, target)
        self._known = {worker.worker for worker in job.workers.values() if worker.alive}
        self._report: Report | None = None
        self._connection: Connection | None = None
        self.after(0.05, self._look)

    def died(self) -> None:
        self.job.coordinator_died()

    def _look(self) -> None:
        listener = self.job.listener
        if self._connection is None and listener is not None:
            self._connection = Connection(self.clock, self, listener)
            self._connection.send(self, Report(0, Membership(), ()))
        self._decide()
        if self.alive:
            self.after(0.1, self._look)

    def run(self) -> None:
        while self.inbox and self.alive:
            connection, item = self.inbox.popleft()
            if connection is not self._connection:
                continue
            if item is END_OF_FILE:
                self._connection = self._report = None
            elif isinstance(item, Report):
                self._report = item
            self._decide()

    def _decide(self) -> None:
        processes = {one: self.job.life(one) for one in sorted(self._known)}
        num = sum(one.alive for one in self.job.aggregators)
        view = coord.View(self.clock.now_s, self._report, processes, num)
        for action in self.proto.decide(view):
            self.job.point(self, type(action).__name__, "before")
            if not self.alive:
                return
            self.clock.note(self.name, "does", action)
            self._do(action)

    def _do(self, action: coord.Action) -> None:
        match action:
            case coord.SetMembership(membership):
                if self._connection is not None:
                    self._connection.send(self, self.job.over_the_wire(Admit(membership)))
            case coord.StartWorker(worker):
                self._known.add(worker)
                self.job.start_worker(worker)
            case coord.KillWorker(worker):
                self._known.discard(worker)
                self.job.kill_later(worker)
            case coord.StartAggregator():
                self.job.start_aggregator()
            case coord.Note(kind):
                self.clock.seen[kind] += 1
        self.job.point(self, type(action).__name__, "after")


__all__ = ["AggregatorProcess", "CoordinatorProcess", "WorkerProcess"]
