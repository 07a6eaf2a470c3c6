"""An aggregator process: prepares the store or stands by, then acts until the job ends.

Listens, and carries what workers, the coordinator and other nodes say to the protocol, and what it
says to them. Everything else that it decides is carried out by the `Lane` of its model.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import selectors
import socket
import time
from functools import partial
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from actors.channel import Channel, accept, listen
from actors.gpu_counters import GpuWatch, watch_gpus
from actors.host_counters import HostCounters
from actors.injector import AggregatorInjector
from actors.lane import Around, Lane
from actors.neighbours import Neighbours, inherit
from actors.preparing import prepare_store
from actors.recording import EventLog, Notebook, Scribe
from actors.setup import JobSetup, hurry, load_tasks
from actors.several import Part, Results, Scribes
from elastic.core.compute import deterministic
from elastic.core.errors import ChannelClosed, ConfigError
from elastic.core.faults import Fault
from elastic.core.journal import Journal
from elastic.core.mapped import Control
from elastic.core.optim import without_compiler
from elastic.core.protocol import events, node
from elastic.core.protocol.messages import (
    Hello,
    Look,
    Message,
    ProbeLink,
    Pulse,
    Scale,
    step_of_job,
)
from elastic.core.protocol.orders import Ask
from elastic.core.protocol.sequential import SequentialRules
from elastic.core.protocol.turns import Turns
from elastic.core.store import kill_and_wait

if TYPE_CHECKING:
    from actors.node_exporter import NodeExporter

log = logging.getLogger(__name__)

_TICK_S = 0.25
_LINGER_S = 60.0
_ALONE_S = 600.0  # a node that hears nobody for so long frees its memory
_HUNG_S = 3.0  # an acting aggregator beats at least every _TICK_S
_ENDED = "the job has ended"


class AggregatorShell:
    """One aggregator: waits until it may act, then acts. `run` returns when the job has ended."""

    def __init__(self, setup: JobSetup) -> None:
        self._setup = setup
        self._job = setup.job
        self._run = setup.run
        self._store = setup.open_store()
        self._scribes = Scribes(setup) if setup.models else None
        self._event = EventLog(self._scribes or Scribe(setup.run), self._where)
        self._events = [self._event_log(one) for one in range(len(setup.lanes))]
        self._tasks = load_tasks(setup)
        self._lanes: list[Lane] = []
        self._exporter: NodeExporter | None = None
        self._neighbours: Neighbours | None = None
        self._inherited: socket.socket | None = None
        self._journal: Journal | None = None
        self._host = HostCounters()
        self._gpus: GpuWatch | None = None

    def run(self) -> str:
        """Stand by, act, end. Whatever happens, the lock is given back for a successor."""
        deterministic(threads=1)  # cores work on different chunks
        without_compiler()
        self._store.create()
        try:
            return self._live()
        finally:
            if self._exporter is not None:
                self._exporter.close()
            if self._gpus is not None:
                self._gpus.close()
            for lane in self._lanes:
                lane.abandon()
            if self._neighbours is not None:
                self._neighbours.close()
            for lane in self._lanes:
                lane.close()
            self._close_journal()
            self._store.close()

    def _close_journal(self) -> None:
        """Write down what was told; what comes later is written at once."""
        for log in (self._event, *self._events):
            log.journal = None
        if self._journal is not None:
            self._journal.close()

    def _live(self) -> str:
        if not self._run.job_json.exists():
            raise ConfigError(
                f"{self._run.path}: this host of the job does not see the run folder; nodes.max is"
                f" {self._job.nodes.max}, so it must lie where all hosts do: --run-dir DIR or"
                " RunConfig.storage_path"
            )
        acting = self._store.try_act() or self._await_spec()
        self._took_over = self._store.spec_path.exists()
        if not self._took_over:
            if not acting:
                return _ENDED
            prepare_store(self._setup, self._tasks, self._events)
            ctypes.CDLL(None).malloc_trim(0)  # the model and its trial took several times its size
        for lane, task in zip(self._setup.lanes, self._tasks, strict=True):
            self._lanes.append(Lane(lane, task))
        self._injector = AggregatorInjector(self._setup.faults, self._store.path)
        if not acting and not self._stand_by():
            return _ENDED
        return self._act()

    def _await_spec(self) -> bool:
        """Wait until the acting aggregator has prepared the store, or is dead. True: act now."""
        while self._store.path.exists() and not self._store.spec_path.exists():
            if self._store.try_act():
                return True
            time.sleep(0.05)
        return False

    # ------------------------------------------------------------ standing by

    def _stand_by(self) -> bool:
        """Wait until the acting aggregator is dead; kill it if it hangs. False: the job ended.

        Acting needs the lock, which the kernel gives once the old process is gone: generations
        cannot fence stores to memory.
        """
        beat, beat_s = -1, time.monotonic()
        while self._store.path.exists():
            if self._store.try_act():
                return True
            self._injector.wake()
            if self._setup.has_nodes and self._inherited is None:
                self._inherited = inherit(self._store.path)
            pid = self._control.active_pid[0]
            if self._control.heartbeat[0] != beat:
                beat, beat_s = self._control.heartbeat[0], time.monotonic()
            elif pid and time.monotonic() - beat_s > _HUNG_S:
                self._event("aggregator_hung", f"pid {pid} hangs for {_HUNG_S:.0f} s; killed")
                kill_and_wait(pid, _HUNG_S)
                continue
            _wait_for_death(pid, _TICK_S)
        return False

    # ----------------------------------------------------------------- acting

    def _act(self) -> str:
        hurry()
        self._control.active_pid[0] = os.getpid()
        path, scribe = self._store.path / "journal", self._scribes or Scribe(self._run)
        self._journal = self._event.journal = Journal(path, scribe, beat=self._beat)
        newest = max((lane.membership for lane in self._lanes), key=lambda one: one.generation)
        results = Results(self._setup, self._event)
        for model, lane in enumerate(self._lanes):
            lane.admit(newest)  # whoever died may have told some
            lane.act(self._around(model, results), took_over=self._took_over)
        self._turns = Turns([lane.protocol for lane in self._lanes], self._sequential())
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int | None, Channel] = {}
        self._senders: dict[Channel, int | None] = {}
        self._deaths: dict[Channel, int] = {}
        self._left = ""
        self._alone_s = time.monotonic()
        if self._setup.has_nodes:
            (lane,) = self._lanes
            self._neighbours = lane.neighbours = self._meet_neighbours(lane)
        listener = listen(self._store.path / "socket")
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
        if self._took_over:
            self._event("aggregator_took_over", f"pid {os.getpid()} goes on with {self._at_hand}")
        monitoring = self._setup.job.monitoring
        if monitoring.node_port is not None:
            self._exporter = self._listen()
        if self._setup.job.device == "cuda" and (monitoring.detect or self._exporter is not None):
            self._gpus = watch_gpus()
        self._handle(events.Started())
        while self._is_needed():
            self._turn()
        if self._left:
            self._store.remove()
            return self._left
        self._handle(events.Tick())  # tell the coordinator
        self._linger()
        return _ENDED

    def _event_log(self, model: int) -> EventLog:
        """Of one model, of which the job tells, too."""
        if self._scribes is None:
            return self._event

        def where() -> tuple[int, int]:
            lane = self._lanes[model] if len(self._lanes) > model else None
            return (0, 0) if lane is None else lane.where

        return EventLog(self._scribes.write_as(model), where)

    def _around(self, model: int, results: Results) -> Around:
        assert self._journal is not None, "it acts"
        journal: Notebook = self._journal
        if self._scribes is not None:
            journal = self._events[model].journal = Part(journal, model)
        num = len(self._lanes)
        return Around(
            journal=journal,
            event=self._events[model],
            handle=partial(self._handle, model=model),
            at=lambda point, step: self._at(point, step_of_job(model, step, num)),
            fired=self._injector.fired,
            beat=self._beat,
            ended=_nothing if self._scribes is None else results.complete,
        )

    @property
    def _control(self) -> Control:
        """Whose words say who acts."""
        return self._lanes[0].control

    @property
    def _at_hand(self) -> str:
        if self._scribes is not None:
            return f"step {self._turns.step} of all models together"
        key = self._lanes[0].protocol.state.key
        return f"step {key.step}, attempt {key.attempt}"

    def _sequential(self) -> SequentialRules | None:
        """The code of whose rounds the models are trained in, if they are."""
        scheme, job = self._job.stragglers.scheme, self._job
        if scheme is None:
            return None
        first = max(lane.control.round[0] for lane in self._lanes)
        num, every = job.batch.micro_batches, job.evaluate.every
        return SequentialRules(scheme, num, job.steps, every, first_round=first)

    def _is_needed(self) -> bool:
        if self._left or self._turns.has_ended:
            return False
        if self._lanes[0].protocol.role is node.Role.LEADING:
            return True
        if self._neighbours is None or not self._neighbours.is_alone:
            self._alone_s = time.monotonic()
        elif time.monotonic() - self._alone_s > _ALONE_S:
            self._store.remove()  # the job has ended, or goes on elsewhere
        return self._store.path.exists()

    def _turn(self) -> None:
        """Wait for something and handle it."""
        self._beat()
        timeout_s = min(max(0.0, self._turns.next_tick_s - time.monotonic()), _TICK_S)
        ready = self._selector.select(timeout_s)
        for key, mask in ready:
            key.data(mask)
        if not ready or time.monotonic() >= self._turns.next_tick_s:
            self._tick()
        if self._neighbours is not None:
            self._neighbours.turn()
        for lane in self._lanes:
            lane.turn()
        if self._exporter is not None:
            self._exporter.turn(self._pulse)

    def _tick(self) -> None:
        self._injector.wake()
        self._handle(events.Tick(self._progress))
        for lane in self._lanes:
            lane.tick()

    @property
    def _progress(self) -> dict[int, int]:
        """Of each worker, whatever it computes."""
        counts: dict[int, int] = {}
        for lane in self._lanes:
            for worker, count in lane.progress.items():
                counts[worker] = counts.get(worker, 0) + count
        return counts

    def _beat(self) -> None:
        self._control.heartbeat[0] += 1

    def _linger(self) -> None:
        """Tell every coordinator that the job has ended, until one frees the memory."""
        alone_s = time.monotonic()
        while self._store.path.exists():
            self._turn()
            if self._hears_coordinator:
                alone_s = time.monotonic()
            elif time.monotonic() - alone_s > _LINGER_S:
                self._store.remove()

    # --------------------------------------------------------------- channels

    def _listen(self) -> NodeExporter:
        from actors.node_exporter import NodeExporter  # only where it is wanted

        return NodeExporter(self._setup, self._store.path, self._event)

    def _meet_neighbours(self, lane: Lane) -> Neighbours:
        def hear(message: Message | None) -> None:
            if message is None:
                self._handle(events.Disconnected(None))
            else:
                self._receive(None, message)

        return Neighbours(
            self._setup,
            self._store.path,
            self._selector,
            handle=self._handle,
            term=lambda: lane.protocol.term,
            hear=hear,
            parts=lane.parts,
            inherited=self._inherited,
        )

    @property
    def _hears_coordinator(self) -> bool:
        if self._neighbours is not None:
            return self._neighbours.hears_coordinator
        return None in self._channels

    def _accept(self, listener: socket.socket, _: int) -> None:
        channel = accept(listener)
        self._selector.register(channel, selectors.EVENT_READ, partial(self._read, channel))
        self._watch(channel)

    def _watch(self, channel: Channel) -> None:
        death = channel.open_death()
        if death is not None:
            self._deaths[channel] = death
            self._selector.register(death, selectors.EVENT_READ, partial(self._read_last, channel))

    def _unwatch(self, channel: Channel) -> None:
        death = self._deaths.pop(channel, None)
        if death is not None:
            self._selector.unregister(death)
            os.close(death)

    def _read_last(self, channel: Channel, _: int) -> None:
        """A thread at the other end has ended. If it died with all others, what was said last still
        counts."""
        self._unwatch(channel)
        if channel.fileno() >= 0 and not channel.is_dying:
            self._watch(channel)
            return
        self._read(channel, selectors.EVENT_READ)
        self._close(channel)

    def _read(self, channel: Channel, _: int) -> None:
        """Handle what one channel has. Its first message says who it is."""
        try:
            while channel.fileno() >= 0 and (message := channel.receive()) is not None:
                if channel not in self._senders:
                    sender = message.worker if isinstance(message, Hello) else None
                    self._senders[channel] = sender
                    self._channels[sender] = channel
                self._receive(self._senders[channel], message)
        except ChannelClosed:
            self._close(channel)

    def _receive(self, sender: int | None, message: Message) -> None:
        if isinstance(message, Look):
            self._tell(self._pulse())
            if self._neighbours is not None:
                self._handle(events.Received(sender, message))
            return
        if isinstance(message, ProbeLink):
            assert self._neighbours is not None, "a job of one node has no links"
            self._neighbours.probe(message.peer)
            return
        if self._setup.faults:
            step = self._turns.step
            self._at("step_start", step)
            self._at("before_grant", step)
        self._handle(events.Received(sender, message))

    def _pulse(self) -> Pulse:
        """For the coordinator, which asks for it if somebody watches."""
        progress = tuple(self._progress.items())
        node, step = self._setup.node, self._turns.step
        links = () if self._neighbours is None else self._neighbours.counts
        cuts = () if self._neighbours is None else self._neighbours.cuts
        host, holding = self._host.read(), self._turns.holding
        gpus = () if self._gpus is None else self._gpus.newest
        copies = self._lanes[0].copies  # a job of several nodes trains one model
        return Pulse(node, step, progress, holding, links, host, cuts, gpus, copies)

    def _close(self, channel: Channel) -> None:
        known, is_dead = channel in self._senders, channel.fileno() >= 0 and channel.is_dying
        sender = self._senders.pop(channel, None)
        self._forget(channel)
        if known and self._channels.get(sender) is channel:
            del self._channels[sender]
            self._handle(events.Disconnected(sender, is_dead))

    def _forget(self, channel: Channel) -> None:
        """Twice does no harm."""
        if channel.fileno() >= 0:
            self._selector.unregister(channel)
            channel.close()
        self._unwatch(channel)

    def _send(self, receiver: int, message: Message) -> None:
        channel = self._channels.get(receiver)
        if channel is None:
            return
        with contextlib.suppress(ChannelClosed):  # its end of file is read in the next turn
            channel.send(message)

    def _tell(self, message: Message) -> None:
        """Say it to the coordinator, if it is there."""
        if self._neighbours is not None:
            self._neighbours.tell(message)
        elif None in self._channels:
            with contextlib.suppress(ChannelClosed):
                self._channels[None].send(message)

    # ---------------------------------------------------------------- actions

    def _handle(self, event: node.NodeEvent, model: int | None = None) -> None:
        """What happens to one model; None: what was received, and what concerns all."""
        match event:
            case node.FromNode(_, Ask(term)):
                self._lanes[0].heard_of(term)
        actions = self._turns.handle(event, time.monotonic(), model)
        for lane in self._lanes:
            lane.take_role()
        for whose, action in actions:
            self._carry_out(action, self._lanes[whose])

    def _carry_out(self, action: node.NodeAction, lane: Lane) -> None:
        match action:
            case events.Send(worker, message):
                self._send(worker, message)
            case events.Tell(report):
                self._tell(report)
            case node.SendNode(other, order):
                assert self._neighbours is not None, "a job of one node has no others"
                self._neighbours.send(other, order)
            case events.HangUp(worker):
                if worker in self._channels:
                    channel = self._channels.pop(worker)
                    self._senders.pop(channel, None)
                    self._forget(channel)
            case node.Leave(reason):
                self._left = reason
            case events.Committed():
                for one in self._lanes:
                    one.flush()  # in the order of the job's steps
                lane.carry_out(action)
            case _:
                lane.carry_out(action)

    def _at(self, point: str, step: int) -> None:
        if not self._setup.faults:
            return
        coordinator = self._channels.get(None)
        self._injector.at(
            point,
            step,
            {worker: one.peer_pid for worker, one in self._channels.items() if worker is not None},
            coordinator_pid=coordinator.peer_pid if coordinator is not None else None,
            scale=self._scale,
            note=self._note_fault,
        )

    def _scale(self, delta: int, worker: int | None) -> bool:
        self._tell(Scale(delta, worker))
        return True

    def _note_fault(self, fault: Fault) -> None:
        worker = fault.target if isinstance(fault.target, int) else None
        self._event("fault", str(fault), worker)

    def _where(self) -> tuple[int, int]:
        """The step and the generation at hand, for the records."""
        if hasattr(self, "_turns"):
            return self._turns.step, self._turns.membership.generation
        return sum(lane.where[0] for lane in self._lanes), 0


def _nothing() -> None:
    """The result of the only model is the job's."""


def _wait_for_death(pid: int, timeout_s: float) -> None:
    """Wait until the process is gone, at most that long."""
    if not pid:
        time.sleep(0.02)
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        time.sleep(0.001)  # the kernel is about to give its lock back
        return
    try:
        wait([descriptor], timeout_s)
    finally:
        os.close(descriptor)
