"""One model on one node: its memory, its protocol, its updates, its checkpoints and its records.

Carries out what the protocol decides, one action at a time and in order: a crash between any two is
what the protocol is made for. Never listens to anybody, and what is said goes through the shell.
"""

from __future__ import annotations

import os
import pickle
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from actors.checkpointing import Checkpointer
from actors.collecting import Receiver, Sender
from actors.neighbours import Neighbours, Parts
from actors.recording import EventLog, Notebook, Recorder, by_name
from actors.rounds import Rounds
from actors.setup import NICE_STEP, JobSetup, set_nice
from elastic.core.compute import audits_of, make_sizes, model_tensors
from elastic.core.config import Stragglers
from elastic.core.errors import DecodingError
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
from elastic.core.protocol import aggregator as protocol
from elastic.core.protocol import events, node
from elastic.core.protocol.messages import (
    CopiesDigest,
    Manifest,
    Membership,
    State,
    manifest_from_bytes,
    manifest_to_bytes,
    pack_outcome,
    unpack_outcome,
)
from elastic.core.task import Task
from elastic.core.update import Digests, Plan, Snapshot, Updater
from policies.choosing import Chosen
from policies.coding.simulation import Coded
from policies.dropping import DropCompute, Dropped, ErasureHead
from policies.scheduling import Shares


@dataclass(frozen=True, slots=True)
class Around:
    """What a lane needs of its process.

    `handle` takes what happens, for the protocol; `at` fires the faults that are due at a point of
    a step, and `fired` says which were; `beat` shows that the process does not hang. `ended` is
    told on a thread behind, once the result is written.
    """

    journal: Notebook
    event: EventLog
    handle: Callable[[node.NodeEvent], None]
    at: Callable[[str, int], None]
    fired: Callable[[], set[int]]
    beat: Callable[[], None]
    ended: Callable[[], None]


class Lane:
    """One model. Maps its memory at once, so that nothing is left to be done when it is to act.

    `neighbours` are the other nodes of the job, if it may have any.
    """

    def __init__(self, setup: JobSetup, task: Task) -> None:
        job, store = setup.job, setup.open_store()
        self._setup, self._store, self._task = setup, store, task
        self.spec: ModelSpec = pickle.loads(store.spec_path.read_bytes())
        self.sizes = make_sizes(self.spec, job)
        self.control = Control(store.path, self.sizes, writable=True)
        self._versions = (
            Version(store.path, 0, self.sizes, writable=True, optimizer=True),
            Version(store.path, 1, self.sizes, writable=True, optimizer=True),
        )
        self._constants = None
        if self.spec.constants:
            path = store.path / "constants"
            self._constants = MappedFile(path, self.sizes.constants_bytes, writable=False)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._comparing = ThreadPoolExecutor(1, thread_name_prefix="compare")
        self._digesting: Future[None] | None = None
        self.copies: CopiesDigest | None = None
        """Of what this node keeps, for the others that do, too: the newest."""
        self._updater = Updater(
            self.spec,
            self._versions,
            num_micro_batches=job.batch.micro_batches,
            clip_norm=job.clip_norm,
            ema_decay=job.ema.decay if job.ema else None,
            num_threads=len(os.sched_getaffinity(0)),
        )
        self.neighbours: Neighbours | None = None
        self._checkpoints: Checkpointer | None = None
        self._incomplete: deque[tuple[State, Snapshot]] = deque()
        self._collecting: Snapshot | None = None
        self._slots: dict[int, Slot] = {}
        self._manifests: dict[int, Record] = {}
        self._finishing: Future[None] | None = None
        self._leads = False

    def act(self, around: Around, *, took_over: bool) -> None:
        """Take up what is in memory: from now on this process is the only one that writes it."""
        self._around = around
        self._recorder = Recorder(self._setup, self.spec, self._task, around.event, around.journal)
        recovered = self._recover(took_over=took_over)
        for worker in recovered.manifests:
            self._open_slot(worker)
        self.protocol = self._make_protocol(recovered)
        self._update_since_s = time.monotonic()

    def abandon(self) -> None:
        """Write no checkpoint any more: wait only for a disk, never for other nodes."""
        if self._checkpoints is not None:
            self._checkpoints.abandon()
        for _, snapshot in self._incomplete:
            snapshot.fail("the aggregator ends")
        if self.neighbours is not None:
            self.neighbours.stop_collecting()
        self._background.shutdown()

    def close(self) -> None:
        """Wait until no thread writes any more."""
        self._updater.close()
        self._comparing.shutdown()

    # --------------------------------------------------------------- beginning

    def _make_protocol(self, recovered: protocol.Recovered) -> node.Node:
        """The protocol, under a term that is greater than all this node has heard of."""
        job = self._setup.job
        term = max(int(time.time() * 1000), self.control.term[0] + 1)
        self.control.term[0] = term
        rules = protocol.Rules(
            num_steps=job.steps,
            num_micro_batches=job.batch.micro_batches,
            num_chunks=len(self.spec.layout.chunks),
            skip_nonfinite=job.nonfinite.action == "skip",
            max_skipped=job.nonfinite.max_skipped,
            evaluate_every=job.evaluate.every,
            num_evaluated=job.evaluate.micro_batches,
            replicas=job.replicas,
            scheduling=_scheduling(job.stragglers),
            audits=audits_of(job),
        )
        prepared = self.control.prepared[0]
        return node.Node(self._setup.node, rules, recovered, term=term, prepared=prepared)

    @property
    def membership(self) -> Membership:
        """What memory says."""
        raw = self.control.membership.read()
        return Membership.from_bytes(raw) if raw else Membership()

    def admit(self, membership: Membership) -> None:
        """Another lane has heard of it, and this one died before it did. Before `act`."""
        if membership.generation > self.membership.generation:
            self.control.membership.write(membership.to_bytes())

    def _recover(self, *, took_over: bool) -> protocol.Recovered:
        """Read what counts from shared memory."""
        state = self.saved_state
        assert state is not None, "the spec is written after the state"
        manifests = {}
        for worker in self._store.worker_ids():
            raw = open_manifest(self._store.path, worker, self.sizes).read()
            manifests[worker] = manifest_from_bytes(raw) or Manifest(state.key)
        counted = {
            one
            for manifest in manifests.values()
            if manifest.key == state.key
            for one in manifest.micro_batches
        }
        rows = {one: unpack_outcome(self.control.read_row(one))[0] for one in counted}
        version, other = self._versions[state.step % 2], self._versions[1 - state.step % 2]
        return protocol.Recovered(
            state,
            self.membership,
            manifests,
            rows,
            kept={self._setup.node: version.kept_chunks},
            next_kept=other.kept_chunks,
            checksum=_checksum(version) if self._setup.has_nodes and not took_over else 0,
        )

    @property
    def saved_state(self) -> State | None:
        """The commit record in memory."""
        data = self.control.state.read()
        return State.from_bytes(data) if data else None

    @property
    def where(self) -> tuple[int, int]:
        """The step and the generation at hand, for the records."""
        if hasattr(self, "protocol"):
            return self.protocol.state.step, self.protocol.membership.generation
        return (0, 0) if (state := self.saved_state) is None else (state.step, 0)

    # ----------------------------------------------------------------- acting

    @property
    def progress(self) -> dict[int, int]:
        """Of each worker with a slot, its progress word."""
        return {worker: slot.progress[0] for worker, slot in self._slots.items()}

    def tick(self) -> None:
        """Time passed."""
        if self._checkpoints is not None:
            self._checkpoints.turn(self.protocol.state)

    def flush(self) -> None:
        """Tell what nobody waited for."""
        self._recorder.flush()

    def turn(self) -> None:
        """Take what threads have done."""
        self._complete_snapshots()
        self.flush()
        if self._digesting is not None and self._digesting.done():
            self._digesting.result()
            self._digesting = None
        if self._finishing is not None and self._finishing.done():
            self._finishing.result()
            self._finishing = None
            self._around.handle(events.Finished())

    def take_role(self) -> None:
        """Begin or end to lead, as the protocol has decided."""
        leads = self.protocol.role is node.Role.LEADING
        if leads and not self._leads:
            self._begin_to_lead()
        elif self._leads and not leads:
            self._checkpoints = None
        self._leads = leads

    def heard_of(self, term: int) -> None:
        """A successor must lead under a greater one."""
        self.control.term[0] = max(term, self.control.term[0])

    def carry_out(self, action: node.NodeAction) -> None:
        """Do what the protocol has decided, unless it is to say something."""
        match action:
            case events.OpenSlot(worker):
                self._open_slot(worker)
            case events.DropSlot(worker):
                self._slots.pop(worker, None)
                self._manifests.pop(worker, None)
                self._store.drop_slot(worker)
            case events.SaveRow(_, outcome):
                self.control.write_row(outcome.micro_batch, pack_outcome(outcome))
                self._around.at("after_row", self.protocol.state.step)
            case events.SaveManifest(worker, manifest):
                self._manifests[worker].write(manifest_to_bytes(manifest))
                self._around.at("after_grant", manifest.key.step)
            case events.MarkDone(micro_batches, key):
                for micro_batch in micro_batches:
                    self.control.done[micro_batch] = key.word
            case events.MarkUndone(micro_batches):
                for micro_batch in micro_batches:
                    self.control.done[micro_batch] = 0
            case events.SaveMembership(membership):
                self.control.membership.write(membership.to_bytes())
            case events.Update():
                self._update(action)
            case events.GiveUp(number):
                if self.neighbours is not None:  # else it is computed at once, and then not wanted
                    self.neighbours.give_up(number)
            case events.Copy() if action.node == self._setup.node:
                self._collect(action)
            case events.Copy():
                assert self.neighbours is not None, "a job of one node has no others"
                self.neighbours.send_state(action, term=self._lead_term)
            case node.SavePrepared(word):
                self.control.prepared[0] = word
            case events.SaveRound(number):
                self.control.round[0] = number
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

    def parts(self, wake: Callable[[], None]) -> Parts:
        """What takes part in the job over links, besides messages."""
        me, sizes, updater, versions = self._setup.node, self.sizes, self._updater, self._versions
        return Parts(
            Rounds(updater, versions, sizes, me, wake),
            Sender(me, sizes, updater, versions, wake),
            Receiver(sizes),
        )

    def _open_slot(self, worker: int) -> None:
        if worker not in self._slots:
            self._manifests[worker] = open_manifest(self._store.path, worker, self.sizes)
            self._slots[worker] = Slot(self._store.path, worker, self.sizes, writable=True)

    def _update(self, action: events.Update) -> None:
        """Compute the next version, alone or with other nodes."""
        self._around.at("before_update", action.step)
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
            num_added=action.num_added,
        )
        if not action.skip and len({*action.nodes, *action.observers}) > 1:
            self._update_together(action, plan)
            return
        if self.neighbours is not None:
            self.neighbours.settle()
        middle = len(self.spec.layout.chunks) // 2

        def beat(chunk: int) -> None:
            self._around.beat()
            if chunk == middle:
                self._around.at("mid_update", action.step)

        try:
            norm = self._updater.run(plan, beat)
        except DecodingError as error:
            self._around.handle(events.Undecodable(action.round, str(error)))
        else:
            self._around.handle(events.Updated(norm, action.round))

    def _update_together(self, action: events.Update, plan: Plan) -> None:
        assert self.neighbours is not None, "a job of one node has no others"
        counters = None
        if plan.slots and action.slots[0][0] in self._slots:
            counters = plan.slots[0][0].counters[plan.slots[0][1]]
        self.neighbours.begin(action, plan, term=self._lead_term, counters=counters)
        self._around.at("mid_update", action.step)

    @property
    def _lead_term(self) -> int:
        term = self.protocol.term
        assert term is not None, "only a lead gives orders"
        return term

    def _save_state(self, state: State) -> None:
        has_committed = state.attempt == 0 and state.step > 0
        if has_committed:
            self._recorder.update_s = time.monotonic() - self._update_since_s
            self._around.at("before_flip", state.step - 1)
        self.control.state.write(state.to_bytes())
        self.control.key[0] = state.key.word
        if has_committed:
            self._around.at("after_flip", state.step - 1)
            if self._checkpoints is not None:
                self._checkpoints.turn(state)
            self._compare(state)
        self._around.at("step_start", state.step)

    def _compare(self, state: State) -> None:
        """Have what is kept here digested, where it is time: the coordinator compares."""
        monitoring = self._setup.job.monitoring
        every = monitoring.compare_every if monitoring.detect else 0
        if not self._setup.has_nodes or not every or state.step % every or self._digesting:
            return
        digests = Digests(self.spec.layout, state.step % 2, self._versions[state.step % 2])
        self._updater.held.append(digests)

        def digest() -> None:
            self.copies = CopiesDigest(state.step, digests.read())
            self._updater.held.remove(digests)

        self._digesting = self._comparing.submit(digest)

    # ------------------------------------------ leading: checkpoints and result

    def _begin_to_lead(self) -> None:
        """From now on this node writes the run's records and checkpoints."""
        state = self.protocol.state
        if self.protocol.membership.generation:
            self._recorder.take_over(state)
        if self.neighbours is not None:
            reason = f"node {self._setup.node}, from step {state.step}"
            self._around.event("node_leads", reason)
        self._checkpoints = Checkpointer(
            self._setup,
            self._store.path / "durable",
            self._background,
            first=state,
            chunks=self.spec.layout.chunks,
            take=self._take_snapshot,
            release=self._release_snapshot,
            weights=lambda snapshot, averaged: model_tensors(
                self.spec, snapshot, self._constants, averaged=averaged
            ),
            trained=self._trained,
            event=self._around.event,
        )

    def _trained(self, state: State) -> dict[str, float | None]:
        """Loss and metrics of its last step. Its evaluation, read next, is written down."""
        self._around.journal.drain()
        return {"loss": state.loss, **by_name(self.spec.metrics, state.metrics)}

    def _take_snapshot(self, state: State) -> Snapshot:
        """On any thread. What is not kept here comes from other nodes."""
        index, wake = state.step % 2, self.neighbours.wake if self.neighbours else None
        snapshot = Snapshot(self.sizes, index, self._versions[index], moved=wake)
        self._updater.held.append(snapshot)
        if snapshot.missing:
            assert self.neighbours is not None, "a node that is alone keeps everything"
            self._incomplete.append((state, snapshot))
            self.neighbours.wake()
        return snapshot

    def _complete_snapshots(self) -> None:
        while self._incomplete:
            state, self._collecting = self._incomplete.popleft()
            self._around.handle(events.Collect(state))
            if self._collecting is not None:  # nobody has what is missing any more
                self._collecting.fail(f"step {state.step} is over")

    def _collect(self, copy: events.Copy) -> None:
        assert self.neighbours is not None, "a node that is alone keeps everything"
        assert self._collecting is not None, "it was asked for"
        self.neighbours.collect(copy, self._collecting, term=self._lead_term)
        self._collecting = None

    def _release_snapshot(self, snapshot: Snapshot) -> None:
        if snapshot in self._updater.held:
            self._updater.held.remove(snapshot)

    def _finish(self, checkpoints: Checkpointer, finish: events.Finish) -> None:
        """The last checkpoint and the result. Doing it twice does no harm."""
        # at a low priority it would seldom run, and hold Python's lock meanwhile: nobody would be
        # answered, and this node be taken to be lost
        set_nice(NICE_STEP)
        state, failure = self.protocol.state, finish.failure
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
            self.protocol.membership,
            failure=failure,
            unwritten=unwritten,
            faults_fired=sorted(self._around.fired()),
        )
        self._around.ended()


def _checksum(version: Version) -> int:
    """What other hosts must have begun with, too."""
    return zlib.crc32(bytes_of(version.counters), zlib.crc32(bytes_of(version.values)))


def _scheduling(given: Stragglers) -> Shares | Chosen | Coded | Dropped:
    """The policy that the job file asks for."""
    if given.kind == "drop_compute":
        return DropCompute(deadline_s=given.deadline_s)
    if given.kind == "erasure_head":
        return ErasureHead(stragglers=given.stragglers, wait_for=given.wait_for)
    if given.kind == "auto":
        return Chosen()
    if given.kind in ("c_code", "crc"):
        return Coded(stragglers=given.stragglers, kind=given.kind)
    return Shares(copies=1 + given.stragglers, helps=given.kind != "uncoded")
