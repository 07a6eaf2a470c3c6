"""A simulated aggregator: what the real actor does around the protocol class, in virtual time.

It carries out actions one by one, so that it may die between any two, and decides nothing that
the protocol decides.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from elastic.core.protocol import events as ev
from elastic.core.protocol import node
from elastic.core.protocol.holdings import VOID
from elastic.core.protocol.messages import Hello, Message
from elastic.core.protocol.orders import NodeMessage, Order
from elastic.core.protocol.turns import Turns
from elastic.core.simulator.memory import Memory
from elastic.core.simulator.updating import Updating
from elastic.core.simulator.world import (
    END_OF_FILE,
    Block,
    Connection,
    EndOfFile,
    Item,
    Link,
    Parameters,
    Process,
)

if TYPE_CHECKING:
    from elastic.core.simulator.job import Job
    from elastic.core.simulator.network import Machine

HEARTBEAT_S = 0.4  # an acting aggregator that is silent for longer is killed by a standby
LOOK_S = 0.15


class AggregatorProcess(Process):
    """An aggregator: waits for the lock, then acts until it dies."""

    def __init__(self, job: Job, number: int, machine: Machine) -> None:
        super().__init__(job.clock, f"aggregator-{number}")
        self.job = job
        self.machine = machine
        self.node = machine.node
        self.turns: Turns | None = None
        self.proto: node.Node | None = None  # of the first model
        self.acting = False
        self.ready = False
        self.silent_since_s = float("inf")
        self.peers: dict[int, Connection] = {}
        self._coordinator: Link | None = None
        self._dropped: list[Connection] = []
        self._todo: deque[tuple[int, node.NodeAction | int]] = deque()
        self._events: deque[tuple[node.NodeEvent, int | None]] = deque()
        self.links: dict[int, Link] = {}
        self.busy = False
        self._updating = Updating(self)
        self._alarm_s = float("inf")
        self.after(job.start_delay_s(), self._stand_by)

    # ------------------------------------------------------------ standing by

    def _stand_by(self) -> None:
        """Try the lock; kill an acting aggregator that shows no sign of life."""
        self.ready = True
        if self.acting or self.machine.lock_owner is self:
            return
        if self.job.try_lock(self):
            self.after(self.clock.rng.uniform(0.001, 0.01), self._act)
            return
        holder = self.job.process(self.machine.memory.active_pid)
        if holder is not None and self.clock.now_s - holder.silent_since_s > HEARTBEAT_S:
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
        if not self.acting and self.machine.lock_owner is None and self.job.try_lock(self):
            self.after(self.clock.rng.uniform(0.001, 0.01), self._act)

    def _act(self) -> None:
        if self.acting:
            return
        memories = self.machine.memories
        self.acting = True
        self.job.acting.append(self)
        memories[0].active_pid = self.pid
        if any(version.torn for memory in memories for version in memory.versions):
            self.clock.seen["takeover mid-update"] += 1
        if any(memory.counting() for memory in memories):
            self.clock.seen["takeover mid-step"] += 1
        newest = max((one.membership for one in memories), key=lambda one: one.generation)
        for memory in memories:
            if memory.membership.generation < newest.generation:
                self.clock.seen["membership made up for"] += 1
                memory.membership = newest
        self.clock.note(self.name, "acts", [memory.state for memory in memories])
        self.turns = Turns([self._lane(memory) for memory in memories])
        self.proto = self.turns.lanes[0]
        self._events.append((ev.Started(), None))
        self.job.listen(self)
        self.wake()

    def _lane(self, memory: Memory) -> node.Node:
        build, seen = self.job.build, self.clock.seen
        return build.node(
            self.node,
            self.job.rules,
            memory.recover(self.node),
            term=self.pid,
            prepared=memory.prepared,
            lead=lambda rules, known, here: build.aggregator(rules, known, here, seen),
        )

    def linked(self, link: Link, peer: int) -> None:
        """A link to another node is open; one that was open before is not."""
        if peer in self.links:
            self._events.append((node.Lost(peer), None))
        self.links[peer] = link
        self._events.append((node.Reached(peer), None))
        self.wake()

    def hear(self, event: ev.Event, model: int) -> None:
        """Something that this process began is done."""
        self._events.append((event, model))
        self.wake()

    def holds(self, link: Link) -> bool:
        return link in self.links.values() or link is self._coordinator

    def drop_link(self, link: Link) -> None:
        """Nothing was heard for too long."""
        if link is self._coordinator:
            self._coordinator = None
            self._events.append((ev.Disconnected(None), None))
        for peer, one in list(self.links.items()):
            if one is link:
                del self.links[peer]
                self._events.append((node.Lost(peer, for_good=True), None))
        self.wake()

    def stop(self) -> None:
        self.silent_since_s = self.clock.now_s
        super().stop()

    def resume(self) -> None:
        self.silent_since_s = float("inf")
        super().resume()
        self.job.network.redial(self)

    def died(self) -> None:
        self.job.aggregator_died(self)

    # ------------------------------------------------------------------ acting

    def run(self) -> None:
        """Do one thing that others can see; then let them run."""
        if self.turns is None:
            return
        while self.alive and not self.stopped and not self.busy:
            if self._todo:
                if self._carry_out(*self._todo.popleft()):
                    break
            elif self._events:
                self._handle(*self._events.popleft())
            elif self.inbox:
                self._read(*self.inbox.popleft())
            elif self.turns.next_tick_s <= self.clock.now_s:
                self._tick()
                break
            else:
                self._set_alarm(self.turns.next_tick_s)
                return
        if self.alive and not self.busy:
            self.wake(self.clock.rng.uniform(2e-6, 4e-5))

    def _set_alarm(self, at_s: float) -> None:
        if self.turns is not None and self.turns.has_ended:
            return
        if at_s < self._alarm_s:
            self._alarm_s = at_s
            self.after(at_s - self.clock.now_s, self._alarm)

    def _alarm(self) -> None:
        self._alarm_s = float("inf")
        self.wake()

    def _tick(self) -> None:
        slots = [memory.slots for memory in self.machine.memories]
        progress = {
            one: sum(of_model[one].progress for of_model in slots if one in of_model)
            for one in self.peers
            if any(one in of_model for of_model in slots)
        }
        self._handle(ev.Tick(progress))

    def _handle(self, event: node.NodeEvent, model: int | None = None) -> None:
        assert self.turns is not None
        self._todo.extend(self.turns.handle(event, self.clock.now_s, model))
        self.job.finished |= self.turns.has_ended

    def _read(self, connection: Connection, item: Item) -> None:
        if isinstance(connection, Link):
            self._read_link(connection, item)
            return
        sender = self.job.worker_of(connection.ends[0])
        if item is END_OF_FILE:
            if self.peers.get(sender) is connection:
                del self.peers[sender]
                self._handle(ev.Disconnected(sender, is_dead=not connection.ends[0].alive))
            return
        if isinstance(item, Hello):
            self.peers[sender] = connection
        if self.peers.get(sender) is connection:
            self._handle(ev.Received(sender, item))  # type: ignore[arg-type]

    def _read_link(self, link: Link, item: Item) -> None:
        """From another node, or from the coordinator, which is on another host."""
        other = link.other(self)
        if not isinstance(other, AggregatorProcess):
            self._read_coordinator(link, item)
            return
        if self.links.get(other.node) is not link:
            return
        match item:
            case Block() | Parameters():
                self._updating.heard(other.node, item)
            case EndOfFile():
                del self.links[other.node]
                self._handle(node.Lost(other.node, for_good=not self.job.has_heir(other)))
            case _:
                self._handle(node.FromNode(other.node, item))  # type: ignore[arg-type]

    def _read_coordinator(self, link: Link, item: Item) -> None:
        if item is END_OF_FILE:
            if link is self._coordinator:
                self._coordinator = None
                self._handle(ev.Disconnected(None))
            return
        if link in self._dropped:
            return
        before, self._coordinator = self._coordinator, link
        if before is not None and before is not link:
            # one that is taken for dead, or its successor: it has to notice, and to greet again,
            # or the death of the other would leave nobody to speak to
            before.close(self)
            self._dropped.append(before)
        self._handle(ev.Received(None, item))  # type: ignore[arg-type]

    def _carry_out(self, model: int, action: node.NodeAction | int) -> bool:
        """True when others may have seen it."""
        name = type(action).__name__
        self.job.point(self, name, "before")
        if self.stopped:
            self._todo.appendleft((model, action))
        if self.stopped or not self.alive:
            return True
        self.clock.note(self.name, "does", action)
        visible = self._do(model, action)
        self.job.point(self, name, "after")
        return visible

    def _do(self, model: int, action: node.NodeAction | int) -> bool:
        memory, checker = self.machine.memories[model], self.job.checkers[model]
        match action:
            case ev.Send(worker, message):
                self._send(worker, message)
                return False
            case ev.Tell(report):
                self.job.told(report)
                if self._coordinator is not None:
                    self._coordinator.send(self, self.job.over_the_wire(report))
                return False
            case node.SendNode(peer, message):
                self._send_node(peer, message)
                return False
            case node.SavePrepared(word):
                memory.prepared = word
                memory.serial += 1
                if word == VOID:
                    checker.begins_anew(self.node)
            case node.Leave():
                self.job.node_left(self.machine)
            case ev.Note(kind, _, worker):
                self.clock.seen[kind] += 1
                if kind == "worker_lied":
                    self.job.accused(worker)
                return False
            case ev.Committed():
                self.job.committed(action)
                return False
            case ev.Evaluated():
                self.clock.seen["evaluated"] += 1
                checker.evaluated(memory.state, action)
            case ev.HangUp(worker):
                connection = self.peers.pop(worker, None)
                if connection is not None:
                    connection.close(self)
                return False
            case ev.OpenSlot(worker):
                memory.open_slot(worker)
            case ev.DropSlot(worker):
                self.clock.seen["slot dropped"] += 1
                memory.drop_slot(worker)
            case ev.SaveRow(_, outcome):
                memory.rows[outcome.micro_batch] = None
                self.job.point(self, "SaveRow", "during")
                if self.alive:
                    memory.rows[outcome.micro_batch] = outcome
            case ev.SaveManifest(worker, manifest):
                memory.manifests[worker] = manifest
                self.job.granted_now(worker, manifest)
                memory.serial += 1
            case ev.MarkDone(micro_batches, key):
                for one in micro_batches:
                    memory.done[one] = key.word
                memory.serial += 1
            case ev.MarkUndone(micro_batches):
                for one in micro_batches:
                    memory.done[one] = 0
                memory.serial += 1
            case ev.SaveMembership(membership):
                memory.membership = membership
            case ev.SaveState(state):
                self.job.save_state(self.machine, state)
                self._todo.appendleft((model, state.key.word))
            case int(word):
                memory.key_word = word
            case ev.Update():
                self._updating.begin((self._term, action.round), action, model)
            case ev.GiveUp(number):
                self._updating.give_up(number)
            case ev.Finish():
                checker.finished(memory.state, action, self.job.stops)
                seconds = self.clock.rng.uniform(0.0, 0.02)
                self.after(seconds, partial(self.hear, ev.Finished(), model))
        return True

    @property
    def _term(self) -> int:
        """Leads that follow each other begin to count rounds anew."""
        assert self.proto is not None
        return self.proto.term or 0

    def _send(self, worker: int, message: Message) -> None:
        if self.proto is not None and self.proto.role is node.Role.LEADING:
            self.job.watch_message(worker, message)
        connection = self.peers.get(worker)
        if connection is not None:
            connection.send(self, self.job.over_the_wire(message))

    def _send_node(self, peer: int, message: NodeMessage) -> None:
        if isinstance(message, Order) and isinstance(message.action, ev.Send):
            self.job.watch_message(message.action.worker, message.action.message)
        if peer in self.links:
            self.links[peer].send(self, self.job.over_the_wire(message))
