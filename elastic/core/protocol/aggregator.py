"""The aggregator's side of the step, without I/O.

    LEASING ──all micro-batches granted──▶ UPDATING ──updated──▶ LEASING (next step)
       │  ▲                                                        │
       │  ├── overflow, or the first maxima: the same step again   │
       │  └── evaluated: the step's training begins                │
       │  ├── a node was lost: what it held is leased again        │
       │  ├── coded sums cannot be decoded: the same step, uncoded │
       └──────── all steps done, or asked to stop ──▶ FINISHING ──▶ ENDED

Everything that counts is in shared memory: the state record, one manifest per slot, one row per
micro-batch. What this class remembers beside them (who is connected, who holds what, how fast)
is rebuilt from what workers say when they connect. So a successor may start from shared memory
after a crash between any two actions.

The grant is the commit: rows first, then the manifest, then the answer.

Where a job has several nodes this runs on the first of them, for the workers of all: see `node`.
A step is committed once the next version is complete on every node; nodes that join, see
`joining`, follow and are not waited for.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import numpy as np

from elastic.core import fixed_point
from elastic.core.errors import ProtocolError
from elastic.core.protocol.advance import Advance
from elastic.core.protocol.auditing import Anew, Auditing, Unsettled, answer_digest
from elastic.core.protocol.choosing import Choosing
from elastic.core.protocol.coding import Coding
from elastic.core.protocol.committing import (
    after_maxima,
    after_skip,
    after_step,
    maxima_of,
    mean,
    metrics,
    total,
)
from elastic.core.protocol.dropping import Dropping
from elastic.core.protocol.events import (
    Action,
    CaughtUp,
    Collect,
    Committed,
    Copy,
    Disconnected,
    DropSlot,
    Evaluated,
    Event,
    Finish,
    Finished,
    GiveUp,
    HangUp,
    Lend,
    Lied,
    MarkDone,
    MarkUndone,
    NodeGone,
    NodeThere,
    Note,
    OpenSlot,
    Recall,
    Received,
    SaveManifest,
    SaveMembership,
    SaveRow,
    SaveState,
    Send,
    Stalled,
    Started,
    Tell,
    Tick,
    Turn,
    Undecodable,
    Update,
    Updated,
)
from elastic.core.protocol.joining import Observers
from elastic.core.protocol.keeping import Keeping
from elastic.core.protocol.messages import (
    Admit,
    Combine,
    Commit,
    Dismiss,
    Granted,
    Hello,
    Key,
    Lease,
    Leases,
    Leave,
    Look,
    Manifest,
    Membership,
    Message,
    Outcome,
    Refused,
    Release,
    Report,
    Revoke,
    State,
    Stop,
    Welcome,
)
from policies.auditing import AskAgain, Audits, Lie
from policies.choosing import Chosen
from policies.coding.simulation import Coded
from policies.dropping import DropCompute, Dropped, ErasureHead
from policies.hangs import Silence, WorkerProgress
from policies.resharding import Move
from policies.scheduling import (
    PACE_WINDOW,
    Assignment,
    Duplicate,
    IdleView,
    Queue,
    Shares,
    StepView,
    Take,
    Wait,
    pace,
)

_LIED = "its answers are not those of others"
TICK_S = 1.0  # at the latest after so long it looks who makes progress
LOOKS = 8  # in the time of a micro-batch
LOOK_FLOOR_S = 0.05


class Phase(Enum):
    LEASING = auto()
    UPDATING = auto()
    FINISHING = auto()
    ENDED = auto()


_MOVES = {
    Phase.LEASING: {Phase.UPDATING, Phase.FINISHING},
    Phase.UPDATING: {Phase.LEASING},
    Phase.FINISHING: {Phase.ENDED},
    Phase.ENDED: set(),
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What the protocol must know of the job. An evaluation has `num_evaluated` micro-batches.

    The state of each chunk is kept on `replicas` nodes, where there are so many.
    """

    num_steps: int
    num_micro_batches: int
    num_chunks: int
    skip_nonfinite: bool = False
    max_skipped: int = 100
    evaluate_every: int = 0
    num_evaluated: int = 0
    replicas: int = 2
    scheduling: Shares | Chosen | Coded | Dropped = Shares()
    hangs: Silence = Silence()
    audits: Audits | None = None


@dataclass(frozen=True, slots=True)
class Recovered:
    """What shared memory says at the start."""

    state: State
    membership: Membership = Membership()
    manifests: Mapping[int, Manifest] = field(default_factory=dict)
    rows: Mapping[int, Outcome] = field(default_factory=dict)
    homes: Mapping[int, int] = field(default_factory=dict)
    """The node of each worker that has a manifest; those not named are here."""
    kept: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """The chunks whose state each node keeps; of one that is not named: all."""
    next_kept: frozenset[int] = frozenset()
    """The same of the version that this node has prepared."""
    checksum: int = 0
    """Of the version, if it is the one that the task made on this node."""


@dataclass(slots=True)
class _Peer:
    """What is remembered of a connected worker; lost without harm."""

    queue: list[Lease] = field(default_factory=list)
    since_s: float = 0.0
    samples_s: deque[float] = field(default_factory=lambda: deque(maxlen=PACE_WINDOW))
    progress: int = -1
    moved_s: float = 0.0  # when it last said something, made progress, or had nothing to do
    advance: Advance = field(default_factory=Advance)
    is_recalled: bool = False  # it has yet to say that it has seen the end of a round
    ask_s: float = 0.0  # when to look again for something to do, if nothing becomes free before

    @property
    def is_busy(self) -> bool:
        """Whether it is to say something. That it is lent something else is no answer."""
        return bool(self.queue) or self.is_recalled


class Aggregator:
    """The acting aggregator of one job. `next_tick_s` is when it wants to be asked again."""

    def __init__(self, rules: Rules, recovered: Recovered, node: int = 0) -> None:
        self.phase = Phase.LEASING
        self.state = recovered.state
        self.membership = recovered.membership
        self.next_tick_s = 0.0
        self.gone: tuple[int, ...] = ()
        self._node = node
        self._rules = rules
        self._round = 0
        self._updated: set[int] = set()
        self._present = set(recovered.membership.nodes)
        self._observers = Observers()
        self._keeping = Keeping(rules.replicas, rules.num_chunks)
        self._moves: tuple[Move, ...] = ()
        self._skips = False
        self._num_copies = 0
        self._manifests = dict(recovered.manifests)
        self._homes = {one: recovered.homes.get(one, node) for one in recovered.manifests}
        self._outcomes: dict[int, Outcome] = {}
        self._granted_to: dict[int, int] = {}
        self._peers: dict[int, _Peer] = {}
        self._seen: set[int] = set()
        self._hung: dict[int, str] = {}
        self._wants_leave: set[int] = set()
        self._lost: set[int] = set()
        self._nonfinite: dict[int, list[int]] = {}
        self._auditing = Auditing(rules.audits if recovered.state.exact else None)
        self._liars: set[int] = set()
        self._work: list[tuple[int, int, float, float, str]] = []
        self._turn = Turn()
        self._leased = False
        self._num_duplicates = 0
        self._shared = ""
        policy, num = rules.scheduling, rules.num_micro_batches
        self._choosing = Choosing(num) if isinstance(policy, Chosen) else None
        self._coding = Coding(policy if isinstance(policy, Coded) else None, num)
        self._dropping = Dropping(policy if isinstance(policy, DropCompute | ErasureHead) else None)
        self._now_s = 0.0
        self._may_have_lost = False  # whether a coded sum may be lost by the event that is handled
        if self._manifests and self._is_coded_next:  # nothing says what was coded, and how
            self.state = replace(self.state, attempt=self.state.attempt + 1)
        self._watched_s = 0.0
        self._absent_s: dict[int, float] = {}
        self._stop_reason = ""
        self._stop_at_once = False
        self._failure = ""
        self._is_whole = True
        self._coordinator = False
        self._told: Report | None = None
        nodes, every = recovered.membership.nodes, range(rules.num_chunks)
        kept = {one: recovered.kept.get(one, every) for one in nodes}
        self._fail_without(self._keeping.begin(kept, nodes, recovered.membership.departing))
        self._begin_audits()
        for worker in self._manifests:
            for micro_batch in self._in_slot(worker):
                self._outcomes[micro_batch] = recovered.rows[micro_batch]
                self._granted_to[micro_batch] = worker
                self._auditing.granted(worker, self._homes[worker], recovered.rows[micro_batch])

    # ---------------------------------------------------------------- events

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event; return what to do, in order."""
        self._may_have_lost = self._coding.is_on
        self._now_s = now_s
        actions = self._react(event, now_s)
        while self.phase is Phase.LEASING:
            actions += self._advance()
            if self.phase is not Phase.LEASING or self._is_over:
                break
            actions += self._feed(now_s)
            if not self._is_over:
                break  # else its last audits were dropped: nobody can take them
        if now_s < self._dropping.due_s:
            self.next_tick_s = min(self.next_tick_s, self._dropping.due_s)
        actions += self._tell()
        return actions

    @property
    def _is_over(self) -> bool:
        """Whether nothing of the pass that runs is left to be computed, or to be audited."""
        is_there = len(self._outcomes) == self._num_wanted and self._coding.is_complete
        return (is_there and self._auditing.is_done) or self._ends_early

    @property
    def _ends_early(self) -> bool:
        """Whether the step drops what is not granted. What was not finite is asked for first.

        If all is granted it waits for its audits, as any step does, but no longer than a deadline.
        """
        if self._dropping.policy is None or self.has_questions:
            return False
        if len(self._outcomes) == self._num_wanted and self._now_s < self._dropping.due_s:
            return False
        held = {
            worker: {
                one
                for lease in peer.queue
                if lease.key == self.state.key and not lease.audits
                for one in lease.micro_batches
            }
            for worker, peer in self._peers.items()
        }
        return self._dropping.may_end(self._now_s, self._outcomes.keys(), held)

    def _react(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case Started():
                return [*self._say_again(), *self._empty_doubtful()]
            case Received(sender=None, message=message):
                return self._from_coordinator(message)
            case Received(sender=int(worker), message=message, node=node):
                if isinstance(message, Hello):
                    self._homes[worker] = node
                return self._from_worker(worker, message, now_s)
            case Disconnected(sender=None):
                self._coordinator = False
            case Disconnected(sender=int(worker), is_dead=is_dead):
                if is_dead and worker in self.membership.members:
                    self._hung[worker] = "its process died"  # Ray says so a second or two later
                return self._lose(worker)
            case Updated():
                return self._updated_on(event)
            case Stalled(number) if number == self._round:
                return self._give_up()
            case Undecodable(number, reason) if number == self._round:
                self._move(Phase.LEASING)
                return self._uncoded(reason)
            case NodeGone(node) if node in self.membership.nodes:
                return self._miss(node)
            case NodeGone(node):
                self._observers.gone(node)
            case NodeThere(node, manifests, kept) if node in self.membership.nodes:
                self._fail_without(self._keeping.there(node, kept))
                return self._reconcile(node, manifests)
            case NodeThere(node):
                self._observers.there(node)
            case CaughtUp(node, step):
                self._observers.caught_up(node, step)
            case Collect(state) if state.step == self.state.step and self._is_whole:
                return self._collect()
            case Tick(progress):
                return self._watch(progress, now_s)
            case Turn():
                self._turn = event
            case Lend(worker) if worker in self._peers and self.phase is Phase.LEASING:
                return self._lend(event, now_s)
            case Recall():
                self._recall(now_s)
            case Lied(worker, reason) if worker not in self._liars:
                barred = self._bar(worker, reason)
                return [*barred, *self._quarantine(self._auditing.forget(worker))]
            case Finished():
                self._move(Phase.ENDED)
        return []

    def _from_coordinator(self, message: Message) -> list[Action]:
        self._coordinator = True
        match message:
            case Admit(membership) if membership.generation > self.membership.generation:
                return self._admit(membership)
            case Admit():
                self._told = None  # it has not heard that we know: another one may have
            case Stop(reason, failed, at_once):
                self._stop_reason = reason
                self._stop_at_once |= at_once
                if failed:
                    self._failure = self._failure or reason
            case Report():
                self._told = None  # the coordinator's greeting: it wants to hear everything
            case Look(slow):
                reason = self._keeping.route(slow)
                return [Note("traffic_planned", reason)] if reason else []
        return []

    def _from_worker(self, worker: int, message: Message, now_s: float) -> list[Action]:
        if isinstance(message, Hello):
            return self._greet(message, now_s)
        peer = self._peers.get(worker)
        if peer is None:
            return []
        peer.moved_s, peer.is_recalled = now_s, False
        match message:
            case Commit():
                return self._asked(worker, peer, message, now_s)
            case Release(leases):
                for lease in leases:
                    if lease in peer.queue[:1]:
                        self._beaten(peer, lease, now_s - peer.since_s)
                    self._settle(peer, lease, now_s)
            case Leave() if worker in self.membership.members:
                if not self._stop_reason:  # else all leave after this step
                    self._wants_leave.add(worker)
            case Leave() if worker not in self.membership.leaving:
                self._lose(worker)
                return [Send(worker, Dismiss("left as planned")), HangUp(worker)]
        return []

    # ------------------------------------------------------------ membership

    def _greet(self, hello: Hello, now_s: float) -> list[Action]:
        worker = hello.worker
        if hello.has_slot and worker not in self._manifests:
            # its slot was unlinked: what it still maps must never be read
            return [Send(worker, Dismiss("fenced")), HangUp(worker)]
        if worker in self._liars:
            return [Send(worker, Dismiss(_LIED)), HangUp(worker)]
        self._seen.add(worker)
        peer = _Peer(since_s=now_s, moved_s=now_s)
        peer.queue = [lease for lease in hello.holding if lease.key == self.state.key]
        self._peers[worker] = peer
        self._lost.discard(worker)
        manifest = self._manifests.setdefault(worker, Manifest(Key(self.state.model, 0, 0)))
        return [OpenSlot(worker), Send(worker, Welcome(manifest))]

    def home_of(self, worker: int) -> int:
        """The node of a worker that said Hello or that has a manifest."""
        return self._homes[worker]

    @property
    def connected(self) -> frozenset[int]:
        """The workers that are connected, on whatever node."""
        return frozenset(self._peers)

    @property
    def holding(self) -> tuple[tuple[int, bool], ...]:
        """The workers that hold work, and whether they have completed any."""
        return tuple((one, bool(peer.samples_s)) for one, peer in self._peers.items() if peer.queue)

    @property
    def leases(self) -> dict[int, tuple[Lease, ...]]:
        """What each worker that holds work holds."""
        return {one: tuple(peer.queue) for one, peer in self._peers.items() if peer.queue}

    def _workers_of(self, node: int) -> list[int]:
        return [worker for worker, home in self._homes.items() if home == node]

    def _miss(self, node: int) -> list[Action]:
        """No step ends without a member. What was granted there counts, until it says otherwise."""
        self._present.discard(node)
        for worker in self._workers_of(node):
            self._lose(worker)
        return self._give_up()

    def _reconcile(self, node: int, manifests: Mapping[int, Manifest]) -> list[Action]:
        """A member is back. Its process may have died before it had carried out a grant."""
        undone = self._take_back(node, manifests)
        for worker in self._workers_of(node):
            self._manifests.pop(worker, None)
        for worker, manifest in manifests.items():
            self._manifests[worker] = manifest
            self._homes[worker] = node
        self._present.add(node)
        return [*undone, *self._say_again(), *self._empty_doubtful()]

    def _say_again(self) -> list[Action]:
        """What a successor, or a node that is back, may have missed."""
        missing = tuple(one for one in range(self._num_wanted) if one not in self._outcomes)
        done = MarkDone(tuple(self._outcomes), self.state.key)
        return [SaveState(self.state), MarkUndone(missing), done]

    def _fail_without(self, reason: str) -> None:
        """The state of some chunks is lost, if there is a reason: nothing could go on."""
        if reason:
            self._failure, self._is_whole = f"step {self.state.step}: {reason}", False

    def _collect(self) -> list[Action]:
        """Have those who own chunks that are not kept here send their state."""
        senders = tuple(
            self._node if self._node in keepers else keepers[0] for keepers in self._keeping.holders
        )
        self._num_copies += 1
        return [Copy(self._num_copies, self._node, self.state.step, senders)]

    def _is_free(self, node: int) -> bool:
        """Whether nothing of the running step is on that node alone, and no state."""
        if self._keeping.is_moving:
            return False
        return not any(self._in_slot(worker) for worker in self._workers_of(node))

    def _in_slot(self, worker: int) -> tuple[int, ...]:
        """The micro-batches of the pass that runs whose sum a worker's slot is said to hold."""
        manifest = self._manifests.get(worker)
        if manifest is None or manifest.key != self.state.key:
            return ()
        return manifest.micro_batches

    @property
    def _all_present(self) -> bool:
        return self._present.issuperset(self.membership.nodes)

    def _drop_node(self, node: int) -> list[Action]:
        """It is no member any more, and its memory is gone."""
        actions = [*self._miss(node), *self._take_back(node, {})]
        for worker in self._workers_of(node):
            self._manifests.pop(worker, None)
        return actions

    def _take_back(self, node: int, manifests: Mapping[int, Manifest]) -> list[Action]:
        """Lease again what was granted to the workers of `node` and does not count there."""
        counting = {
            one
            for manifest in manifests.values()
            if manifest.key == self.state.key
            for one in manifest.micro_batches
        }
        return self._undo(set(self._workers_of(node)), counting)

    def _undo(self, workers: set[int], counting: Iterable[int] = ()) -> list[Action]:
        """Lease again what was granted to `workers`, but for what counts all the same."""
        undone = tuple(
            one
            for one, worker in self._granted_to.items()
            if worker in workers and one not in counting
        )
        for one in undone:
            del self._outcomes[one], self._granted_to[one]
        self._auditing.taken_back(undone)
        return [MarkUndone(undone)] if undone else []

    def _give_up(self) -> list[Action]:
        if self.phase is not Phase.UPDATING:
            return []
        self._move(Phase.LEASING)
        return [GiveUp(self._round)]

    def _admit(self, membership: Membership) -> list[Action]:
        actions: list[Action] = [SaveMembership(membership)]
        nodes, departing = self.membership.nodes, self.membership.departing
        before = set(self.membership.members) | set(self.membership.leaving)
        after = set(membership.members) | set(membership.leaving)
        self.membership = membership
        self._observers.keep(membership.joining)
        if (nodes, departing) != (membership.nodes, membership.departing):
            actions += self._give_up()  # its keepers are those of before
            self._fail_without(self._keeping.admit(membership.nodes, membership.departing))
        for node in nodes:
            if node not in membership.nodes:
                actions += self._drop_node(node)
        for worker in sorted(before - after):
            self._hung.pop(worker, None)
            if worker in self._peers:
                actions += [Send(worker, Dismiss("no member any more")), HangUp(worker)]
                actions += self._lose(worker)
            self._lost.discard(worker)
            self._wants_leave.discard(worker)
        return actions

    def _lose(self, worker: int) -> list[Action]:
        """Forget a connection. What its slot holds stays; what it was computing is free again."""
        if self._peers.pop(worker, None) is None:
            return []
        if worker in self.membership.members or worker in self.membership.leaving:
            self._lost.add(worker)
        return []

    def _watch(self, progress: Mapping[int, int], now_s: float) -> list[Action]:
        self._watched_s, usual_s = now_s, self._usual_pace_s()
        look_s = max(LOOK_FLOOR_S, usual_s / LOOKS)
        self.next_tick_s = now_s + min(TICK_S, look_s)  # only here: no traffic puts it off
        views = []
        for worker, peer in self._peers.items():
            word = progress.get(worker, 0)
            peer.advance.see(word, now_s, usual_s)
            if word != peer.progress or not peer.is_busy:
                peer.progress, peer.moved_s = word, now_s
            silent_s = now_s - peer.moved_s
            views.append(WorkerProgress(worker, silent_s, peer.is_busy, bool(peer.samples_s)))
        views += self._absent(now_s)
        for verdict in self._rules.hangs.decide(views, usual_s):
            if verdict.worker in self.membership.leaving and verdict.worker in self._peers:
                note = Note("worker_hung", verdict.reason, verdict.worker)
                return [note, HangUp(verdict.worker), *self._lose(verdict.worker)]
            if verdict.worker not in self._hung and verdict.worker in self.membership.members:
                self._hung[verdict.worker] = verdict.reason
                return [Note("worker_hung", verdict.reason, verdict.worker)]
        return []

    def _absent(self, now_s: float) -> list[WorkerProgress]:
        """Members that are not connected: one that was stopped before a takeover never comes."""
        absent = [worker for worker in self.membership.members if worker not in self._peers]
        self._absent_s = {worker: self._absent_s.get(worker, now_s) for worker in absent}
        return [
            WorkerProgress(worker, now_s - since_s, busy=True, has_committed=False)
            for worker, since_s in self._absent_s.items()
        ]

    def _tell(self) -> list[Action]:
        report = Report(
            step=self.state.step,
            membership=self.membership,
            connected=tuple(sorted(self._peers)),
            hung=tuple(sorted(self._hung.items())),
            wants_leave=tuple(sorted(self._wants_leave)),
            lost=tuple(sorted(self._lost)),
            finished=self.phase is Phase.ENDED,
            failure=self._failure,
            node=self._node,
            gone=self.gone,
            ready=self._observers.ready(self.state.step),
            free=tuple(one for one in self.membership.departing if self._is_free(one)),
        )
        if not self._coordinator or report == self._told:
            return []
        self._told = report
        return [Tell(report)]

    # -------------------------------------------------------------- granting

    def _asked(self, worker: int, peer: _Peer, commit: Commit, now_s: float) -> list[Action]:
        lease = commit.lease
        begun_s, is_first = peer.since_s, lease in peer.queue[:1]
        self._settle(peer, lease, now_s)
        manifest = self._manifests[worker]
        mine = manifest.micro_batches if manifest.key == lease.key else ()
        if lease.key == self.state.key and set(lease.micro_batches) <= set(mine):
            return [Send(worker, Granted(lease, manifest.half))]
        if lease.audits:
            return self._audited(worker, commit)
        if self._choosing is not None and lease.key == self.state.key:
            self._choosing.answered(worker, commit.outcomes[0], now_s)
        refusal = self._refusal(worker, commit, mine, manifest)
        if refusal:
            if lease.key == self.state.key:
                self._record(worker, commit, "refused")
            if is_first:
                self._beaten(peer, lease, now_s - begun_s)
            return [Send(worker, Refused(lease, refusal))]
        if not all(outcome.finite for outcome in commit.outcomes):
            return self._question(worker, commit)
        if lease.combine is not Combine.EVALUATE:
            peer.samples_s.append(now_s - begun_s)
        if self._coding.is_on:
            return self._grant_coded(worker, commit, manifest)
        self._record(worker, commit, "granted")
        return self._grant(worker, commit, manifest)

    def _refusal(
        self, worker: int, commit: Commit, mine: tuple[int, ...], manifest: Manifest
    ) -> str:
        """Why a commit does not count; empty if it may. Staleness before anything else."""
        lease = commit.lease
        if lease.key != self.state.key:
            return f"stale: step {self.state.step} attempt {self.state.attempt} runs"
        if self.phase is not Phase.LEASING:
            return "the step is complete"
        if worker not in self.membership.members and worker not in self.membership.leaving:
            return "not a member"
        if reason := self._coding.refusal(worker, lease):
            return reason
        is_coded = self._coding.is_on
        if not is_coded and any(one in self._outcomes for one in lease.micro_batches):
            return "granted to another worker"
        is_live = bool(mine) and commit.half == manifest.half and not is_coded
        if commit.num_base != len(mine) or is_live:
            return f"sum of {commit.num_base} in half {commit.half}: {len(mine)} count here"
        if not all(0 <= one < self._num_wanted for one in lease.micro_batches):
            return f"micro-batches {lease.micro_batches} do not exist"
        return ""

    def _grant(self, worker: int, commit: Commit, manifest: Manifest) -> list[Action]:
        lease = commit.lease
        manifest = manifest.added(lease, commit.half)
        self._manifests[worker] = manifest
        for outcome in commit.outcomes:
            self._outcomes[outcome.micro_batch] = outcome
            self._granted_to[outcome.micro_batch] = worker
            self._dropping.granted(self._now_s)
        rows: list[Action] = [SaveRow(worker, outcome) for outcome in commit.outcomes]
        lies: list[Lie] = []
        for outcome in commit.outcomes:
            lies += self._auditing.granted(worker, self._homes[worker], outcome)
        return [
            *rows,
            SaveManifest(worker, manifest),
            MarkDone(lease.micro_batches, lease.key),
            Send(worker, Granted(lease, commit.half)),
            *self._quarantine(lies),
        ]

    def _grant_coded(self, worker: int, commit: Commit, manifest: Manifest) -> list[Action]:
        """It is in the worker's sum. What several say of a micro-batch must be the same."""
        (outcome,), lease = commit.outcomes, commit.lease
        is_first = outcome.micro_batch not in self._outcomes
        self._record(worker, commit, "granted" if is_first else "copied")
        before = self._outcomes.setdefault(outcome.micro_batch, outcome)
        if answer_digest(before) != answer_digest(outcome):
            differ = f"answers to micro-batch {outcome.micro_batch} differ"
            refused = Send(worker, Refused(lease, differ))
            return [refused, *self._uncoded(f"{differ}, one of them worker {worker}'s")]
        self._coding.granted(worker, lease)
        self._may_have_lost = False
        self._granted_to.setdefault(outcome.micro_batch, worker)
        self._manifests[worker] = manifest.added(lease, commit.half)
        return [Send(worker, Granted(lease, commit.half))]

    # -------------------------------------------------------------- auditing

    def _begin_audits(self) -> None:
        """Evaluations change nothing that is computed afterwards."""
        num = 0 if self._evaluates else self._num_wanted
        self._auditing.begin(self.state.step, num)

    def _audited(self, worker: int, commit: Commit) -> list[Action]:
        """An opinion. It is never granted: what it is about counts already, for another."""
        lease, lies = commit.lease, list[Lie]()
        if lease.key == self.state.key and self.phase is Phase.LEASING:
            self._record(worker, commit, "audited")
            for outcome in commit.outcomes:
                lies += self._auditing.heard(worker, self._homes[worker], outcome)
        return [Send(worker, Refused(lease, "audited")), *self._quarantine(lies)]

    def _quarantine(self, lies: list[Lie]) -> list[Action]:
        """Nothing that a liar did in this step counts, and it gets no more to do."""
        actions: list[Action] = []
        for lie in lies:
            worker = lie.worker
            if worker in self._liars:
                continue
            actions.append(Note("worker_lied", lie.verdict.reason, worker))
            actions += self._bar(worker, lie.verdict.reason)
            actions += [Send(worker, Dismiss(_LIED)), HangUp(worker)]
            actions += self._quarantine(self._auditing.forget(worker))
        return actions

    def _bar(self, worker: int, reason: str) -> list[Action]:
        """Take back what it did in this step, also if the update of that has begun."""
        self._liars.add(worker)
        if worker in self.membership.members:
            self._hung[worker] = reason
        self._lose(worker)
        is_in_sum = bool(self._in_slot(worker))
        actions = self._give_up() if is_in_sum else []
        if self.phase is not Phase.LEASING:
            return actions
        if self._coding.is_on:
            return actions + (self._uncoded(f"worker {worker} lied") if is_in_sum else [])
        return actions + self._empty(worker)

    def _empty(self, worker: int) -> list[Action]:
        """Its slot is one sum: where a part of it is wrong, all of it is."""
        undone = self._undo({worker})
        if not self._in_slot(worker):
            return undone  # its host may be lost: an opinion is all that is left of it
        self._manifests[worker] = Manifest(self.state.key)
        return [*undone, SaveManifest(worker, self._manifests[worker])]

    def _empty_doubtful(self) -> list[Action]:
        """Slots that say more than was granted: they were to be emptied, and nobody did it."""
        doubtful = [
            worker
            for worker in self._manifests
            if any(self._granted_to.get(one) != worker for one in self._in_slot(worker))
        ]
        actions: list[Action] = []
        for worker in doubtful:
            actions += self._empty(worker)
            if worker in self._peers:
                actions += [HangUp(worker), *self._lose(worker)]
        return actions

    def _audit(self, idle: list[int], now_s: float) -> list[Action]:
        """Have answers that count computed by others, too, as far as somebody is free.

        Who has been asked and stands still is as good as absent, if there is another one.
        """
        usual_s = self._usual_pace_s()
        moving = {one for one in self._peers if not self._queue(one, usual_s).is_silent}
        asked = [
            micro_batch
            for worker in moving
            for lease in self._peers[worker].queue
            if lease.audits and lease.key == self.state.key
            for micro_batch in lease.micro_batches
        ]
        homes = {worker: self._homes[worker] for worker in idle}
        others = set(self.membership.members) - self._liars
        if not self._auditing.is_strict:
            others &= moving  # a step does not wait for who is not there
        actions: list[Action] = []
        for decision in self._auditing.next(homes, others, asked):
            match decision:
                case AskAgain(micro_batch, worker):
                    actions.append(self._lease(worker, [micro_batch], now_s, audits=True))
                case Anew(_, worker, reason):
                    # it comes back, and is told at its welcome that nothing counts any more
                    actions += [Note("audited_anew", reason), *self._empty(worker)]
                    actions += [HangUp(worker), *self._lose(worker)]
                case Unsettled(_, reason, is_hopeless):
                    actions.append(Note("audit_undecided", reason))
                    if is_hopeless:
                        self._failure = self._failure or reason
        return actions

    def _question(self, worker: int, commit: Commit) -> list[Action]:
        """A NaN is computed once more, elsewhere if possible: it may be the machine's."""
        actions: list[Action] = [Send(worker, Refused(commit.lease, "not finite"))]
        for outcome in commit.outcomes:
            if not outcome.finite:
                self._nonfinite.setdefault(outcome.micro_batch, []).append(worker)
                times = len(self._nonfinite[outcome.micro_batch])
                reason = f"micro-batch {outcome.micro_batch} is not finite, seen {times} times"
                actions.append(Note("nonfinite", reason, worker))
        return actions

    def _record(self, worker: int, commit: Commit, outcome: str) -> None:
        for one in commit.outcomes:
            self._work.append((worker, one.micro_batch, one.start_s, one.end_s, outcome))

    def _beaten(self, peer: _Peer, lease: Lease, took_s: float) -> None:
        """Somebody else was first. Who had been at it for longer than it usually takes is slower,
        though nobody knows by how much: one that stood still says nothing of its pace."""
        is_sample = lease.combine is not Combine.EVALUATE and not lease.audits
        usual_s = pace(peer.samples_s, self._usual_pace_s())
        if is_sample and peer.samples_s and took_s > usual_s:
            peer.samples_s.append(min(took_s, 2 * usual_s))

    def _settle(self, peer: _Peer, lease: Lease, now_s: float) -> None:
        if lease in peer.queue:
            peer.queue.remove(lease)
            peer.since_s = now_s

    # -------------------------------------------------------------- the step

    def _advance(self) -> list[Action]:
        """Go on where the step allows it."""
        is_over = self.state.step >= self._rules.num_steps and not self._evaluates
        if self._failure or is_over or self._stop_at_once:
            return self._finish()
        if self._stop_reason and not self._leased and not self._outcomes:
            return self._finish()
        if not self._all_present:
            return []
        open_ = self._nonfinite.keys() - self._outcomes.keys()
        twice = sorted(one for one in open_ if self._is_own(one))
        if twice:
            return self._own_nonfinite(twice[0])
        if self._is_over:
            return self._evaluated(self._in_order()) if self._evaluates else self._complete()
        if self._may_have_lost:
            queues = {one: peer.queue for one, peer in self._peers.items()}
            if reason := self._coding.lost(queues):
                return self._uncoded(reason)
        return []

    def _uncoded(self, reason: str) -> list[Action]:
        """The same step once more, as plain sums."""
        state = replace(self.state, attempt=self.state.attempt + 1)
        self._begin(state, uncoded=True)
        told = f"step {state.step} is computed again, uncoded: {reason}"
        return [Note("uncoded", told), SaveState(state)]

    def _is_own(self, micro_batch: int) -> bool:
        """Whether a NaN is the model's: seen by two workers, or twice by one without others."""
        tried = self._nonfinite[micro_batch]
        return len(set(tried)) > 1 or (len(tried) > 1 and self._may_try(tried[0], micro_batch))

    def _own_nonfinite(self, micro_batch: int) -> list[Action]:
        where = f"step {self.state.step}, micro-batch {micro_batch}"
        if self._evaluates:
            note = Note("nonfinite", f"evaluation of {where}: not finite on two tries")
            return [note, *self._evaluated([])]
        if not self._rules.skip_nonfinite:
            self._failure = (
                f"{where}: the loss or gradient is not finite on two tries;"
                " nonfinite.action: skip would skip the step"
            )
            return self._finish()
        if len(self.state.skipped) >= self._rules.max_skipped:
            self._failure = f"{where}: not finite, and {len(self.state.skipped)} steps were skipped"
            self._failure += f" already (nonfinite.max_skipped: {self._rules.max_skipped})"
            return self._finish()
        exponents = self.state.exponents or (0,) * self._rules.num_chunks
        note = Note("step_skipped", f"{where}: not finite on two tries")
        return [note, self._update((), exponents, 1.0, skip=True)]

    def _complete(self) -> list[Action]:
        outcomes = self._in_order()
        if len({outcome.counters for outcome in outcomes}) > 1:
            self._failure = (
                f"step {self.state.step}: the integer buffers differ between micro-batches,"
                " so that no order-free result exists; make them depend on the step only"
            )
            return self._finish()
        weight = total(outcome.weight for outcome in outcomes)
        if not weight > 0:
            self._failure = f"step {self.state.step}: the weights add up to {weight}, must be > 0"
            return self._finish()
        maxima_MC = maxima_of(outcomes, self._rules.num_micro_batches)
        if self.state.exponents is None:
            return self._again(maxima_MC, [])
        exponents = np.array(self.state.exponents, np.int64)
        overflowing = fixed_point.overflowing(maxima_MC, exponents)
        if overflowing:
            return self._again(maxima_MC, overflowing)
        self._dropping.end(self._now_s)
        self._auditing.end()  # what a deadline cuts off
        if len(outcomes) < self._num_wanted:
            return self._drop(outcomes, weight)
        if self._coding.is_on:
            return self._decode(fixed_point.sums_of(maxima_MC, exponents), weight)
        return [*self._chosen(), self._update(self._slots, self.state.exponents, weight)]

    @property
    def _slots(self) -> tuple[tuple[int, int], ...]:
        """Those that count, and the half that does."""
        return tuple(
            (worker, self._manifests[worker].half)
            for worker in sorted(self._manifests)
            if self._in_slot(worker)
        )

    def _drop(self, outcomes: list[Outcome], weight: float) -> list[Action]:
        """Update without the rest, which is not waited for any more, nor are audits.

        Divided by what all would weigh if the rest weighed as much as what is there.
        """
        num, all_of_it = len(outcomes), self._rules.num_micro_batches
        rest = tuple(one for one in range(all_of_it) if one not in self._outcomes)
        update = self._update(self._slots, self.state.exponents or (), weight * all_of_it / num)
        return [MarkDone(rest, self.state.key), replace(update, num_added=num)]

    def _decode(self, limits_C: fixed_point.Sums, weight: float) -> list[Action]:
        """Update from coded sums. Those that are not complete are not waited for any more."""
        slots, coefficients = self._coding.decoding()
        done = MarkDone(tuple(self._outcomes), self.state.key)
        update = self._update(slots, self.state.exponents or (), weight)
        limits = tuple(int(one) for one in limits_C)
        return [done, replace(update, coefficients=coefficients, limits=limits)]

    def _chosen(self) -> list[Action]:
        """A step has all its answers: what the next ones run may be another policy."""
        if self._choosing is None:
            return []
        reason = self._choosing.end([one for one in self.membership.members if one in self._peers])
        return [Note("scheduling", reason)] if reason else []

    @property
    def _scheduling(self) -> Shares:
        """Who computes what, in this step."""
        if self._choosing is not None:
            return self._choosing.scheduling
        policy = self._rules.scheduling
        if self._dropping.policy is not None:
            return self._dropping.policy.shares
        return policy if isinstance(policy, Shares) else Shares()  # of what is not coded

    def _update(
        self,
        slots: tuple[tuple[int, int], ...],
        exponents: tuple[int, ...],
        weight: float,
        *,
        skip: bool = False,
    ) -> Update:
        self._move(Phase.UPDATING)
        self._round += 1
        self._updated.clear()
        self._moves = () if skip else self._keeping.moves()
        self._skips = skip
        return Update(
            round=self._round,
            nodes=self.membership.nodes,
            step=self.state.step,
            slots=slots,
            exponents=exponents,
            weight=weight,
            num_updates=self.state.num_updates,
            skip=skip,
            keepers=() if skip else self._keeping.keepers,
            moves=self._moves,
            observers=self._observers.nodes,
        )

    def _updated_on(self, updated: Updated) -> list[Action]:
        """Commit once the next version is complete on every node."""
        if self.phase is not Phase.UPDATING or updated.round != self._round:
            return []
        self._updated.add(updated.node)
        if not self._updated.issuperset(self.membership.nodes):
            return []
        return self._commit(updated.grad_norm)

    @property
    def _evaluates(self) -> bool:
        """Whether the model of this step is to be evaluated before the step's training."""
        step, every = self.state.step, self._rules.evaluate_every
        if not every or step <= self.state.evaluated:
            return False
        return step % every == 0 or step >= self._rules.num_steps

    @property
    def _num_wanted(self) -> int:
        """Micro-batches of the pass that runs."""
        return self._rules.num_evaluated if self._evaluates else self._rules.num_micro_batches

    def _evaluated(self, outcomes: list[Outcome]) -> list[Action]:
        """Go on to the training of the step. Its key is another: nothing late can be mistaken."""
        step = self.state.step
        loss = mean([one.loss_sum for one in outcomes], outcomes)
        evaluated = Evaluated(step, loss, metrics(outcomes), tuple(self._work))
        self._begin(replace(self.state, attempt=self.state.attempt + 1, evaluated=step))
        return [evaluated, SaveState(self.state), *self._advance()]

    def _again(self, maxima_MC: fixed_point.Maxima, overflowing: list[int]) -> list[Action]:
        """The same step once more, with exponents from all maxima."""
        num_chunks, overflows = self._rules.num_chunks, bool(overflowing)
        state = after_maxima(self.state, maxima_MC, num_chunks, overflows=overflows)
        actions: list[Action] = []
        if overflowing:
            reason = f"step {self.state.step}: chunks {overflowing[:8]} left int32; done again"
            actions.append(Note("overflow", reason))
        self._begin(state)
        return [*actions, SaveState(state)]

    def _commit(self, grad_norm: float) -> list[Action]:
        """The next version is complete: make it the state."""
        before = self.state
        skipped, num = self._skips, self._rules.num_micro_batches
        moved = "" if skipped else self._keeping.moved(self._moves)
        state = after_skip(before) if skipped else after_step(before, self._in_order(), num)
        granted = set(self._granted_to.values())  # after a takeover not all are back yet
        committed = Committed(
            step=before.step,
            attempt=before.attempt - (0 < before.step == before.evaluated),
            loss=float("nan") if skipped or state.loss is None else state.loss,
            grad_norm=grad_norm,
            skipped=skipped,
            num_workers=len(set(self.membership.members) & (set(self._peers) | granted)),
            num_duplicates=self._num_duplicates,
            num_unaudited=self._auditing.num_dropped,
            num_dropped=state.dropped - before.dropped,
            work=tuple(self._work),
            metrics=() if skipped else state.metrics,
        )
        self._begin(state)
        self._move(Phase.LEASING)
        notes = [Note("state_moved", moved)] if moved else []
        return [SaveState(state), committed, *notes, *self._drop_slots()]

    def _begin(self, state: State, *, uncoded: bool = False) -> None:
        self.state = state
        self._coding.begin(plain=uncoded)
        self._dropping.forget()
        self._outcomes.clear()
        self._granted_to.clear()
        self._nonfinite.clear()
        self._work.clear()
        self._leased = False
        self._num_duplicates = 0
        self._begin_audits()

    def _drop_slots(self) -> list[Action]:
        keep = set(self._peers) | set(self.membership.members) | set(self.membership.leaving)
        gone = sorted((set(self._manifests) & self._seen) - keep)
        for worker in gone:
            del self._manifests[worker]
        return [DropSlot(worker) for worker in gone]

    def _finish(self) -> list[Action]:
        self._move(Phase.FINISHING)
        return [Finish(self._failure, self._is_whole)]

    # -------------------------------------------------------------- leasing

    def _feed(self, now_s: float) -> list[Action]:
        """Give work to those who have none, of no model."""
        if not self._turn.is_open:
            return []
        actions = self._dismiss_leaving()
        idle = [worker for worker in self.membership.members if self._is_idle(worker)]
        if not idle or self._coding.is_on:
            return actions
        if not self._leased and not self._stop_reason:
            self._leased = True
            return actions + self._share(self._ready(), now_s)
        pending = self._pending()
        if not pending and not self._auditing.is_done:
            actions += self._audit(idle, now_s)
            pending = self._pending()
        for worker in idle:
            if worker not in self._peers or self._peers[worker].queue:
                continue  # it audits, or is gone
            peer = self._peers[worker]
            if pending or now_s >= peer.ask_s:
                actions += self._occupy(worker, now_s)
            if peer.ask_s:
                self.next_tick_s = min(self.next_tick_s, peer.ask_s)
        return actions

    def _is_idle(self, worker: int) -> bool:
        peer = self._peers.get(worker)
        return peer is not None and not peer.queue and worker not in self._turn.busy

    def _dismiss_leaving(self) -> list[Action]:
        actions: list[Action] = []
        for worker in self.membership.leaving:
            if self._is_idle(worker):
                actions += [Send(worker, Dismiss("left as planned")), HangUp(worker)]
                del self._peers[worker]
                self._lost.add(worker)
        return actions

    def _ready(self) -> list[int]:
        """Who gets a share: the idle, and, where all is held by several, who is about to be idle.

        It has yet to see that the step before is over. One that did not see it for a whole step
        may never do so.
        """
        by_several = self._scheduling.copies > 1 or self._is_coded_next
        by_several |= self._dropping.policy is not None
        step = self.state.step if by_several else -1
        busy = self._turn.busy - (self._turn.ending if by_several else frozenset())
        return [
            worker
            for worker in self.membership.members
            if worker in self._peers
            and worker not in busy
            and all(
                lease.key != self.state.key and lease.key.step in (step, step - 1)
                for lease in self._peers[worker].queue
            )
        ]

    def _share(self, idle: list[int], now_s: float) -> list[Action]:
        pending = [one for one in self._pending() if one not in self._nonfinite]
        usual_s = self._usual_pace_s()
        paces = {worker: pace(self._peers[worker].samples_s, usual_s) for worker in idle}
        if self._is_coded_next and (shares := self._coding.share(self.state.key, paces)):
            return self._share_coded(shares, now_s)
        assigned = self._scheduling.assign(StepView(paces, pending, self._homes))
        self._num_duplicates += assigned.num_copies
        actions: list[Action] = []
        if self._choosing is not None:
            if self._combine is Combine.SUM:
                self._choosing.begin(now_s)
        elif self._dropping.policy is not None:
            actions += self._begin_dropping(assigned, now_s)
        elif self._is_coded_next:
            actions += self._tell_shares(f"{self._coding.lack}: {assigned.reason}")
        elif self._rules.scheduling not in (Shares(), self._coding.policy):
            actions += self._tell_shares(assigned.reason)
        for worker, mine in assigned.queues.items():
            if mine:
                actions.append(self._lease(worker, mine, now_s))
            elif samples_s := self._peers[worker].samples_s:
                samples_s.popleft()  # who gets nothing is measured no more: what was, fades
        return actions

    def _begin_dropping(self, assigned: Assignment, now_s: float) -> list[Action]:
        """Of a step; of passes that only take maxima, or evaluate, nothing is dropped."""
        if self._combine is not Combine.SUM:
            return []
        num_workers = len(self.membership.members)
        reason = self._dropping.begin(now_s, assigned.queues, num_workers)
        return [Note("scheduling", reason)] if reason else []

    def _tell_shares(self, reason: str) -> list[Action]:
        """What is new about who computes what."""
        before, self._shared = self._shared, reason
        return [Note("scheduling", reason)] if reason != before else []

    def _share_coded(self, shares: Mapping[int, tuple[Lease, ...]], now_s: float) -> list[Action]:
        """The copies are the audit: what does not fit together is not decoded."""
        self._auditing.begin(self.state.step, 0)
        self._num_duplicates += self._coding.num_copies
        actions = self._tell_shares(self._coding.reason)
        return actions + [self._send_leases(one, mine, now_s) for one, mine in shares.items()]

    @property
    def _is_coded_next(self) -> bool:
        """Whether the pass that runs is to be coded, if there are enough workers for that."""
        if not self._coding.may_begin or self._combine is not Combine.SUM:
            return False
        return self.state.exact and self.state.step < self._rules.num_steps

    @property
    def is_fresh(self) -> bool:
        """Whether a step's training begins, and nothing of it was leased or granted."""
        is_over = self.state.step >= self._rules.num_steps or bool(self._failure)
        if self.phase is not Phase.LEASING or is_over or self._combine is not Combine.SUM:
            return False
        return not (self._leased or self._outcomes or self._stop_reason)

    @property
    def has_failed(self) -> bool:
        """Whether it ends, or has ended, with an error."""
        return bool(self._failure)

    @property
    def counted(self) -> Collection[int]:
        """The micro-batches that count in the pass that runs."""
        return self._outcomes.keys()

    @property
    def has_questions(self) -> bool:
        """Whether something came out as NaN, and is to be asked of another one."""
        return bool(self._nonfinite.keys() - self._outcomes.keys())

    @property
    def awaits_opinions(self) -> bool:
        """Whether a step is complete but for its audits."""
        is_there = len(self._outcomes) == self._num_wanted
        return is_there and self.phase is Phase.LEASING and not self._is_over

    def _lend(self, lend: Lend, now_s: float) -> list[Action]:
        """Lease what somebody else says, as far as it is not granted."""
        self._leased = True
        held = {one for peer in self._peers.values() for one in self._wanted(peer.queue)}
        wanted = [one for one in lend.micro_batches if one not in self._outcomes]
        self._num_duplicates += len(held & set(wanted))
        leases = tuple(
            Lease(self.state.key, (one,), self._combine, round=lend.round) for one in wanted
        )
        return [self._send_leases(lend.worker, leases, now_s)] if leases else []

    def _recall(self, now_s: float) -> None:
        """Forget what was lent. Who computes it sees that the round is over; what was computed
        before counts if it comes."""
        for peer in self._peers.values():
            kept = [lease for lease in peer.queue if not lease.round]
            if len(kept) < len(peer.queue):
                peer.queue, peer.since_s, peer.is_recalled = kept, now_s, True

    def _occupy(self, worker: int, now_s: float) -> list[Action]:
        peer, usual_s = self._peers[worker], self._usual_pace_s()
        barred = {one for one in self._nonfinite if not self._may_try(worker, one)}
        queues = [self._queue(other, usual_s, barred) for other in self._peers if other != worker]
        view = IdleView(
            now_s=now_s,
            worker=worker,
            pace_s=pace(peer.samples_s, usual_s),
            pending=[m for m in self._pending() if m not in barred],
            queues=queues,
        )
        match self._scheduling.decide(view):
            case Take(micro_batch, None):
                return [self._lease(worker, [micro_batch], now_s)]
            case Take(micro_batch, int(holder)):
                queue = self._peers[holder].queue
                lease = next(one for one in queue if self._wanted([one]) == (micro_batch,))
                queue.remove(lease)
                return [
                    Send(holder, Revoke(lease)),
                    self._lease(worker, [micro_batch], now_s),
                ]
            case Duplicate(micro_batch):
                self._num_duplicates += 1
                return [self._lease(worker, [micro_batch], now_s)]
            case Wait(until_s):
                peer.ask_s = until_s
        return []

    def _queue(self, worker: int, usual_s: float, barred: Set[int] = frozenset()) -> Queue:
        peer = self._peers[worker]
        micro_batches = tuple(one for one in self._wanted(peer.queue) if one not in barred)
        is_at_it = bool(peer.queue) and peer.queue[0].micro_batches == micro_batches[:1]
        return Queue(
            worker,
            micro_batches,
            peer.since_s,
            pace(peer.samples_s, usual_s),
            silent_s=self._watched_s - peer.moved_s,
            end_s=peer.advance.end_s(peer.since_s) if is_at_it else None,
        )

    def _lease(
        self, worker: int, micro_batches: Iterable[int], now_s: float, *, audits: bool = False
    ) -> Send:
        key = self.state.key
        leases = tuple(Lease(key, (one,), self._combine, audits) for one in micro_batches)
        return self._send_leases(worker, leases, now_s)

    def _send_leases(self, worker: int, leases: tuple[Lease, ...], now_s: float) -> Send:
        peer = self._peers[worker]
        if not peer.is_busy:
            peer.moved_s = now_s
        if not self._wanted(peer.queue):
            peer.since_s = now_s
        peer.ask_s = 0.0
        peer.queue.extend(leases)
        return Send(worker, Leases(leases))

    @property
    def _combine(self) -> Combine:
        if self._evaluates:
            return Combine.EVALUATE
        return Combine.MAXIMA if self.state.exponents is None else Combine.SUM

    def _wanted(self, queue: Iterable[Lease]) -> tuple[int, ...]:
        """The micro-batches of a queue that still matter."""
        key = self.state.key
        return tuple(
            micro_batch
            for lease in queue
            if lease.key == key and not lease.audits
            for micro_batch in lease.micro_batches
            if micro_batch not in self._outcomes
        )

    def _pending(self) -> list[int]:
        """Micro-batches that neither count nor are held by a connected worker."""
        held = {one for peer in self._peers.values() for one in self._wanted(peer.queue)}
        return [
            micro_batch
            for micro_batch in range(self._num_wanted)
            if micro_batch not in self._outcomes and micro_batch not in held
        ]

    def _may_try(self, worker: int, micro_batch: int) -> bool:
        """Whether `worker` may compute what came out as NaN: another one, if there is another."""
        tried = self._nonfinite.get(micro_batch, ())
        if worker not in tried:
            return True
        return not any(
            other in self._peers and other not in tried for other in self.membership.members
        )

    def _usual_pace_s(self) -> float:
        samples = [one for peer in self._peers.values() for one in list(peer.samples_s)[-3:]]
        return statistics.median(samples[-PACE_WINDOW:]) if samples else 1.0

    def _in_order(self) -> list[Outcome]:
        return [self._outcomes[micro_batch] for micro_batch in sorted(self._outcomes)]

    def _move(self, phase: Phase) -> None:
        if phase not in _MOVES[self.phase]:
            raise ProtocolError(f"illegal move {self.phase} -> {phase}")
        self.phase = phase
