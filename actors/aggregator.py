"""An aggregator process: prepares the store or stands by, then acts until the job ends.

Carries events and actions between sockets, shared memory and the protocol, one action at a time
and in order: a crash between any two is what the protocol is made for.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import select
import selectors
import socket
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from actors.channel import Channel, accept, listen
from actors.checkpointing import Checkpointer
from actors.collecting import Receiver, Sender
from actors.host_counters import HostCounters
from actors.injector import AggregatorInjector
from actors.neighbours import Neighbours, Parts, inherit
from actors.preparing import prepare_store
from actors.recording import EventLog, Recorder, Scribe, by_name
from actors.rounds import Rounds
from actors.setup import NICE_STEP, JobSetup, set_nice
from elastic.core.compute import audits_of, deterministic, make_sizes, model_tensors
from elastic.core.config import Stragglers
from elastic.core.errors import ChannelClosed, ConfigError, DecodingError
from elastic.core.faults import Fault
from elastic.core.journal import Journal
from elastic.core.mapped import (
    Control,
    MappedFile,
    Record,
    Slot,
    Version,
    bytes_of,
    open_manifest,
)
from elastic.core.model import ModelSpec
from elastic.core.optim import without_compiler
from elastic.core.protocol import aggregator as protocol
from elastic.core.protocol import events, node
from elastic.core.protocol.messages import (
    Hello,
    Look,
    Manifest,
    Membership,
    Message,
    Pulse,
    Scale,
    State,
    manifest_from_bytes,
    manifest_to_bytes,
    pack_outcome,
    unpack_outcome,
)
from elastic.core.protocol.orders import Ask
from elastic.core.store import kill_and_wait
from elastic.core.task import Task
from elastic.core.update import Plan, Snapshot, Updater
from policies.choosing import Chosen
from policies.coding.simulation import Coded
from policies.scheduling import Shares

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
        self._event = EventLog(setup.run, self._where)
        self._task: Task = setup.load_task()
        self._neighbours: Neighbours | None = None
        self._inherited: socket.socket | None = None
        self._checkpoints: Checkpointer | None = None
        self._incomplete: deque[tuple[State, Snapshot]] = deque()
        self._collecting: Snapshot | None = None
        self._host = HostCounters()

    def run(self) -> str:
        """Stand by, act, end. Whatever happens, the lock is given back for a successor."""
        deterministic(threads=1)  # cores work on different chunks
        without_compiler()
        self._store.create()
        try:
            return self._live()
        finally:
            self._end_checkpoints()
            if self._neighbours is not None:
                self._neighbours.close()
            if hasattr(self, "_updater"):
                self._updater.close()
            self._close_journal()
            self._store.close()

    def _close_journal(self) -> None:
        """Write down what was told; what comes later is written at once."""
        journal, self._event.journal = self._event.journal, None
        if journal is not None:
            journal.close()

    def _end_checkpoints(self) -> None:
        """Wait until none is being written: only for a disk, never for other nodes."""
        if self._checkpoints is not None:
            self._checkpoints.abandon()
        for _, snapshot in self._incomplete:
            snapshot.fail("the aggregator ends")
        if self._neighbours is not None:
            self._neighbours.stop_collecting()
        if hasattr(self, "_background"):
            self._background.shutdown()

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
            prepare_store(self._setup, self._store, self._task, self._event)
            ctypes.CDLL(None).malloc_trim(0)  # the model and its trial took several times its size
        self._open()
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

    def _open(self) -> None:
        """Map the store and make everything that acting needs, before it is needed."""
        job = self._job
        self._spec: ModelSpec = pickle.loads(self._store.spec_path.read_bytes())
        self._sizes = make_sizes(self._spec, job)
        self._control = Control(self._store.path, self._sizes, writable=True)
        self._versions = (
            Version(self._store.path, 0, self._sizes, writable=True, optimizer=True),
            Version(self._store.path, 1, self._sizes, writable=True, optimizer=True),
        )
        self._constants = None
        if self._spec.constants:
            path = self._store.path / "constants"
            self._constants = MappedFile(path, self._sizes.constants_bytes, writable=False)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._updater = Updater(
            self._spec,
            self._versions,
            num_micro_batches=job.batch.micro_batches,
            clip_norm=job.clip_norm,
            ema_decay=job.ema.decay if job.ema else None,
            num_threads=len(os.sched_getaffinity(0)),
        )
        self._injector = AggregatorInjector(self._setup.faults, self._store.path)

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
        set_nice(NICE_STEP)
        self._control.active_pid[0] = os.getpid()
        path, scribe = self._store.path / "journal", Scribe(self._run)
        self._journal = self._event.journal = Journal(path, scribe, beat=self._beat)
        self._recorder = Recorder(self._setup, self._spec, self._task, self._event, self._journal)
        recovered = self._recover()
        self._slots: dict[int, Slot] = {}
        self._manifests: dict[int, Record] = {}
        for worker in recovered.manifests:
            self._open_slot(worker)
        self._protocol = self._make_protocol(recovered)
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int | None, Channel] = {}
        self._senders: dict[Channel, int | None] = {}
        self._finishing: Future[None] | None = None
        self._left = ""
        self._update_since_s = self._alone_s = time.monotonic()
        if self._setup.has_nodes:
            self._neighbours = self._meet_neighbours()
        listener = listen(self._store.path / "socket")
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
        if self._took_over:
            key = recovered.state.key
            reason = f"pid {os.getpid()} goes on with step {key.step}, attempt {key.attempt}"
            self._event("aggregator_took_over", reason)
        self._handle(events.Started())
        while self._is_needed():
            self._turn()
        if self._left:
            self._store.remove()
            return self._left
        self._handle(events.Tick())  # tell the coordinator
        self._linger()
        return _ENDED

    def _make_protocol(self, recovered: protocol.Recovered) -> node.Node:
        """The protocol, under a term that is greater than all this node has heard of."""
        job = self._job
        term = max(int(time.time() * 1000), self._control.term[0] + 1)
        self._control.term[0] = term
        rules = protocol.Rules(
            num_steps=job.steps,
            num_micro_batches=job.batch.micro_batches,
            num_chunks=len(self._spec.layout.chunks),
            skip_nonfinite=job.nonfinite.action == "skip",
            max_skipped=job.nonfinite.max_skipped,
            evaluate_every=job.evaluate.every,
            num_evaluated=job.evaluate.micro_batches,
            replicas=job.replicas,
            scheduling=_scheduling(job.stragglers),
            audits=audits_of(job),
        )
        prepared = self._control.prepared[0]
        return node.Node(self._setup.node, rules, recovered, term=term, prepared=prepared)

    def _recover(self) -> protocol.Recovered:
        """Read what counts from shared memory."""
        data = self._control.state.read()
        assert data is not None, "the spec is written after the state"
        state = State.from_bytes(data)
        manifests = {}
        for worker in self._store.worker_ids():
            raw = open_manifest(self._store.path, worker, self._sizes).read()
            manifests[worker] = manifest_from_bytes(raw) or Manifest(state.key)
        counted = {
            one
            for manifest in manifests.values()
            if manifest.key == state.key
            for one in manifest.micro_batches
        }
        rows = {one: unpack_outcome(self._control.read_row(one))[0] for one in counted}
        raw = self._control.membership.read()
        membership = Membership.from_bytes(raw) if raw else Membership()
        version, other = self._versions[state.step % 2], self._versions[1 - state.step % 2]
        return protocol.Recovered(
            state,
            membership,
            manifests,
            rows,
            kept={self._setup.node: version.kept_chunks},
            next_kept=other.kept_chunks,
            checksum=self._checksum(version) if self._setup.has_nodes else 0,
        )

    def _checksum(self, version: Version) -> int:
        """What other hosts must have begun with, too."""
        if self._took_over:
            return 0
        return zlib.crc32(bytes_of(version.counters), zlib.crc32(bytes_of(version.values)))

    def _is_needed(self) -> bool:
        if self._left or self._protocol.phase is protocol.Phase.ENDED:
            return False
        if self._protocol.role is node.Role.LEADING:
            return True
        if self._neighbours is None or not self._neighbours.is_alone:
            self._alone_s = time.monotonic()
        elif time.monotonic() - self._alone_s > _ALONE_S:
            self._store.remove()  # the job has ended, or goes on elsewhere
        return self._store.path.exists()

    def _turn(self) -> None:
        """Wait for something and handle it."""
        self._beat()
        timeout_s = min(max(0.0, self._protocol.next_tick_s - time.monotonic()), _TICK_S)
        ready = self._selector.select(timeout_s)
        for key, mask in ready:
            key.data(mask)
        if not ready or time.monotonic() >= self._protocol.next_tick_s:
            self._tick()
        if self._neighbours is not None:
            self._neighbours.turn()
        self._complete_snapshots()
        self._recorder.flush()
        if self._finishing is not None and self._finishing.done():
            self._finishing.result()
            self._finishing = None
            self._handle(events.Finished())

    def _tick(self) -> None:
        self._injector.wake()
        progress = {worker: slot.progress[0] for worker, slot in self._slots.items()}
        self._handle(events.Tick(progress))
        if self._checkpoints is not None:
            self._checkpoints.turn(self._protocol.state)

    def _beat(self, _: int = 0) -> None:
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

    # ---------------------------------------------------------------- leading

    def _begin_to_lead(self) -> None:
        """From now on this node writes the run's records and checkpoints."""
        state = self._protocol.state
        if self._protocol.membership.generation:
            self._recorder.take_over(state)
        if self._neighbours is not None:
            self._event("node_leads", f"node {self._setup.node}, from step {state.step}")
        self._checkpoints = Checkpointer(
            self._setup,
            self._store.path / "durable",
            self._background,
            first=state,
            chunks=self._spec.layout.chunks,
            take=self._take_snapshot,
            release=self._release_snapshot,
            weights=lambda snapshot, averaged: model_tensors(
                self._spec, snapshot, self._constants, averaged=averaged
            ),
            trained=self._trained,
            event=self._event,
        )

    def _trained(self, state: State) -> dict[str, float | None]:
        """Loss and metrics of its last step. Its evaluation, read next, is written down."""
        self._journal.drain()
        return {"loss": state.loss, **by_name(self._spec.metrics, state.metrics)}

    # --------------------------------------------------------------- channels

    def _meet_neighbours(self) -> Neighbours:
        def hear(message: Message | None) -> None:
            if message is None:
                self._handle(events.Disconnected(None))
            else:
                self._receive(None, message)

        def parts(wake: Callable[[], None]) -> Parts:
            me, sizes = self._setup.node, self._sizes
            updater, versions = self._updater, self._versions
            return Parts(
                Rounds(updater, versions, sizes, me, wake),
                Sender(me, sizes, updater, versions, wake),
                Receiver(sizes),
            )

        return Neighbours(
            self._setup,
            self._store.path,
            self._selector,
            handle=self._handle,
            term=lambda: self._protocol.term,
            hear=hear,
            parts=parts,
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
            return
        if self._setup.faults:
            step = self._protocol.state.step
            self._at("step_start", step)
            self._at("before_grant", step)
        self._handle(events.Received(sender, message))

    def _pulse(self) -> Pulse:
        """For the coordinator, which asks for it if somebody watches."""
        progress = tuple((worker, slot.progress[0]) for worker, slot in self._slots.items())
        node, step = self._setup.node, self._protocol.state.step
        links = () if self._neighbours is None else self._neighbours.counts
        cuts = () if self._neighbours is None else self._neighbours.cuts
        host, holding = self._host.read(), self._protocol.holding
        return Pulse(node, step, progress, holding, links, host, cuts)

    def _close(self, channel: Channel) -> None:
        known = channel in self._senders
        sender = self._senders.pop(channel, None)
        if channel.fileno() >= 0:
            self._selector.unregister(channel)
            channel.close()
        if known and self._channels.get(sender) is channel:
            del self._channels[sender]
            self._handle(events.Disconnected(sender))

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

    def _handle(self, event: node.NodeEvent) -> None:
        match event:
            case node.FromNode(_, Ask(term)):
                self._control.term[0] = max(term, self._control.term[0])
        led = self._protocol.role is node.Role.LEADING
        actions = self._protocol.handle(event, time.monotonic())
        leads = self._protocol.role is node.Role.LEADING
        if leads and not led:
            self._begin_to_lead()
        elif led and not leads:
            self._checkpoints = None
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: node.NodeAction) -> None:
        match action:
            case events.Send(worker, message):
                self._send(worker, message)
            case events.Tell(report):
                self._tell(report)
            case node.SendNode(other, order):
                assert self._neighbours is not None, "a job of one node has no others"
                self._neighbours.send(other, order)
            case events.OpenSlot(worker):
                self._open_slot(worker)
            case events.DropSlot(worker):
                self._slots.pop(worker, None)
                self._manifests.pop(worker, None)
                self._store.drop_slot(worker)
            case events.HangUp(worker):
                if worker in self._channels:
                    channel = self._channels.pop(worker)
                    self._senders.pop(channel, None)
                    self._selector.unregister(channel)
                    channel.close()
            case events.SaveRow(_, outcome):
                self._control.write_row(outcome.micro_batch, pack_outcome(outcome))
                self._at("after_row", self._protocol.state.step)
            case events.SaveManifest(worker, manifest):
                self._manifests[worker].write(manifest_to_bytes(manifest))
                self._at("after_grant", manifest.key.step)
            case events.MarkDone(micro_batches, key):
                for micro_batch in micro_batches:
                    self._control.done[micro_batch] = key.word
            case events.MarkUndone(micro_batches):
                for micro_batch in micro_batches:
                    self._control.done[micro_batch] = 0
            case events.SaveMembership(membership):
                self._control.membership.write(membership.to_bytes())
            case events.Update():
                self._update(action)
            case events.GiveUp(number):
                assert self._neighbours is not None, "a job of one node has no rounds"
                self._neighbours.give_up(number)
            case events.Copy() if action.node == self._setup.node:
                self._collect(action)
            case events.Copy():
                assert self._neighbours is not None, "a job of one node has no others"
                self._neighbours.send_state(action, term=self._lead_term)
            case node.SavePrepared(word):
                self._control.prepared[0] = word
            case events.SaveState(state):
                self._save_state(state)
            case events.Note() | events.Committed():
                self._recorder.later(action)
            case events.Evaluated():
                self._recorder.evaluated(action)
            case events.Finish():
                assert self._checkpoints is not None, "only the lead ends the job"
                self._checkpoints.stop()
                self._recorder.flush()
                self._finishing = self._background.submit(self._finish, self._checkpoints, action)
            case node.Leave(reason):
                self._left = reason

    def _open_slot(self, worker: int) -> None:
        if worker not in self._slots:
            self._manifests[worker] = open_manifest(self._store.path, worker, self._sizes)
            self._slots[worker] = Slot(self._store.path, worker, self._sizes, writable=True)

    def _update(self, action: events.Update) -> None:
        """Compute the next version, alone or with other nodes."""
        self._at("before_update", action.step)
        self._update_since_s = time.monotonic()
        slots = [(self._slots[w], half) for w, half in action.slots if w in self._slots]
        plan = Plan(
            source=action.step % 2,
            slots=[] if action.skip else slots,
            exponents=action.exponents,
            weight=action.weight,
            factor=self._recorder.factor(action.step),
            fresh=action.num_updates == 0,
            coefficients=action.coefficients,
            limits=action.limits,
        )
        if not action.skip and len({*action.nodes, *action.observers}) > 1:
            self._update_together(action, plan)
            return
        if self._neighbours is not None:
            self._neighbours.settle()
        middle = len(self._spec.layout.chunks) // 2

        def beat(chunk: int) -> None:
            self._beat()
            if chunk == middle and self._setup.faults:
                self._at("mid_update", action.step)

        try:
            norm = self._updater.run(plan, beat)
        except DecodingError as error:
            self._handle(events.Undecodable(action.round, str(error)))
        else:
            self._handle(events.Updated(norm, action.round))

    def _update_together(self, action: events.Update, plan: Plan) -> None:
        assert self._neighbours is not None, "a job of one node has no others"
        counters = None
        if plan.slots and action.slots[0][0] in self._slots:
            counters = plan.slots[0][0].counters[plan.slots[0][1]]
        self._neighbours.begin(action, plan, term=self._lead_term, counters=counters)
        self._at("mid_update", action.step)

    @property
    def _lead_term(self) -> int:
        term = self._protocol.term
        assert term is not None, "only a lead gives orders"
        return term

    def _save_state(self, state: State) -> None:
        has_committed = state.attempt == 0 and state.step > 0
        if has_committed:
            self._recorder.update_s = time.monotonic() - self._update_since_s
            self._at("before_flip", state.step - 1)
        self._control.state.write(state.to_bytes())
        self._control.key[0] = state.key.word
        if has_committed:
            self._at("after_flip", state.step - 1)
            if self._checkpoints is not None:
                self._checkpoints.turn(state)
        self._at("step_start", state.step)

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
        if hasattr(self, "_protocol"):
            return self._protocol.state.step, self._protocol.membership.generation
        if hasattr(self, "_control") and (data := self._control.state.read()):
            return State.from_bytes(data).step, 0
        return 0, 0

    # ----------------------------------------------------- checkpoints, result

    def _take_snapshot(self, state: State) -> Snapshot:
        """On any thread. What is not kept here comes from other nodes."""
        index, wake = state.step % 2, self._neighbours.wake if self._neighbours else None
        snapshot = Snapshot(self._sizes, index, self._versions[index], moved=wake)
        self._updater.snapshots.append(snapshot)
        if snapshot.missing:
            assert self._neighbours is not None, "a node that is alone keeps everything"
            self._incomplete.append((state, snapshot))
            self._neighbours.wake()
        return snapshot

    def _complete_snapshots(self) -> None:
        while self._incomplete:
            state, self._collecting = self._incomplete.popleft()
            self._handle(events.Collect(state))
            if self._collecting is not None:  # nobody has what is missing any more
                self._collecting.fail(f"step {state.step} is over")

    def _collect(self, copy: events.Copy) -> None:
        assert self._neighbours is not None, "a node that is alone keeps everything"
        assert self._collecting is not None, "it was asked for"
        self._neighbours.collect(copy, self._collecting, term=self._lead_term)
        self._collecting = None

    def _release_snapshot(self, snapshot: Snapshot) -> None:
        if snapshot in self._updater.snapshots:
            self._updater.snapshots.remove(snapshot)

    def _finish(self, checkpoints: Checkpointer, finish: events.Finish) -> None:
        """The last checkpoint and the result. Doing it twice does no harm."""
        state, failure = self._protocol.state, finish.failure
        unwritten = checkpoints.finish(state) if finish.is_whole else ""
        if unwritten:
            unwritten = (
                f"the last checkpoint, of step {state.step}, could not be written to"
                f" {self._setup.checkpoints}: {unwritten}"
            )
            failure = "; ".join(filter(None, (failure, unwritten)))
        self._recorder.result(
            state,
            self._versions[state.step % 2],
            self._protocol.membership,
            failure=failure,
            unwritten=unwritten,
            faults_fired=sorted(self._injector.fired()),
        )


def _scheduling(given: Stragglers) -> Shares | Chosen | Coded:
    """The policy that the job file asks for."""
    if given.kind == "auto":
        return Chosen()
    if given.kind in ("c_code", "crc"):
        return Coded(stragglers=given.stragglers, kind=given.kind)
    return Shares(copies=1 + given.stragglers, helps=given.kind != "uncoded")


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
        select.select([descriptor], [], [], timeout_s)
    finally:
        os.close(descriptor)
