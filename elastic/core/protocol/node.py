"""A node's side of a job, without I/O: it leads the step, or relays to the node that does.

    RELAYING ──admitted as the first──▶ GATHERING ──all have said what they hold──▶ LEADING
        ▲                                  │                                           │
        └────── no longer the first ───────┴───────────────────────────────────────────┘
    From anywhere: no member any more ──▶ FENCED.

The lead runs the aggregator's protocol for the workers of all nodes. What it decides for a worker
of another node goes there as an order, and what that worker says comes back relayed. A grant counts
iff it is in the memory of the worker's node; so a new lead, after a death between any two actions,
first asks every node what it holds, and only then leases. With one node nothing is ever sent.

A node that joins relays nothing and counts for nothing: see `joining`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from elastic.core.protocol import orders
from elastic.core.protocol.aggregator import TICK_S, Aggregator, Recovered, Rules
from elastic.core.protocol.aggregator import Phase as StepPhase
from elastic.core.protocol.events import (
    Action,
    CaughtUp,
    Copy,
    Disconnected,
    DropSlot,
    Event,
    GiveUp,
    HangUp,
    MarkDone,
    MarkUndone,
    NodeGone,
    NodeThere,
    OpenSlot,
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
    Update,
    Updated,
)
from elastic.core.protocol.holdings import VOID, Memory, can_follow, merged
from elastic.core.protocol.joining import Observing
from elastic.core.protocol.messages import (
    Admit,
    Lease,
    Look,
    Membership,
    Outcome,
    Report,
    State,
    Stop,
)
from elastic.core.protocol.orders import (
    Ask,
    Complete,
    Holds,
    NodeMessage,
    Order,
    Progress,
    Relayed,
    Row,
)

GRACE_S = 1.0
"""An aggregator's successor is there within that time, or the whole node is taken to be lost."""

NEVER_S = float("-inf")

_OF_ALL = (MarkDone, MarkUndone, SaveMembership, SaveState, Update, GiveUp, Copy)
"""Actions that every node carries out, as far as they concern it."""

_OF_ONE = (Send, OpenSlot, DropSlot, HangUp, SaveRow, SaveManifest)
"""Actions that the node of their worker carries out."""


class Role(Enum):
    RELAYING = auto()
    GATHERING = auto()
    LEADING = auto()
    FENCED = auto()


# Events beside those of the aggregator


@dataclass(frozen=True, slots=True)
class Reached:
    """The link to the acting aggregator of another node is open.

    From then on nothing may come that was sent over an earlier one.
    """

    node: int


@dataclass(frozen=True, slots=True)
class Lost:
    """The link to another node is broken. `for_good`: no successor is about to come."""

    node: int
    for_good: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class FromNode:
    node: int
    message: NodeMessage


NodeEvent = Event | Reached | Lost | FromNode

# Actions beside those of the aggregator


@dataclass(frozen=True, slots=True, eq=False)
class SendNode:
    """Say that to another node, if the link to it is open."""

    node: int
    message: NodeMessage


@dataclass(frozen=True, slots=True)
class SavePrepared:
    """The next version of the key with this word is complete here.

    `holdings.VOID`: no version is, whatever the commit record says.
    """

    word: int


@dataclass(frozen=True, slots=True)
class Leave:
    """This node is no member any more: end, and drop everything. It may come back as another."""

    reason: str


NodeAction = Action | SendNode | SavePrepared | Leave

Lead = Callable[[Rules, Recovered, int], Aggregator]
"""Makes the protocol of the lead: rules, what counts on all nodes together, its own node."""


class Node:
    """The acting aggregator of one node. `next_tick_s` is when it wants to be asked again.

    Args:
        term: a number that no other process of the job has.
        lead: makes the protocol of the lead.
    """

    def __init__(
        self,
        node: int,
        rules: Rules,
        recovered: Recovered,
        *,
        term: int = 0,
        prepared: int = 0,
        lead: Lead = Aggregator,
    ) -> None:
        self.node = node
        self.role = Role.RELAYING
        self.membership = recovered.membership
        self._rules = rules
        self._make_lead = lead
        self._memory = Memory(
            recovered.state,
            prepared,
            dict(recovered.manifests),
            dict(recovered.rows),
            kept=recovered.kept.get(node, frozenset(range(rules.num_chunks))),
            next_kept=recovered.next_kept,
            node=node,
            checksum=recovered.checksum,
        )
        self._own_term = term
        self._term: int | None = None
        self._lead: Aggregator | None = None
        self._linked: set[int] = set()
        self._gone_s: dict[int, float] = {}
        self._holds: dict[int, Holds] = {}
        self._rows: dict[int, dict[int, Outcome]] = {}
        self._waiting: list[Event] = []
        self._progress: dict[int, dict[int, int]] = {}
        self._coordinator = False
        self._told: Report | None = None
        self._update: Update | None = None
        self._is_asked = False
        self._observing: Observing | None = None
        self._tick_s = 0.0
        self._now_s = 0.0

    # ----------------------------------------------------------- what it is

    @property
    def state(self) -> State:
        """The commit record of this node."""
        return self._lead.state if self._lead is not None else self._memory.state

    @property
    def term(self) -> int | None:
        """The term of whoever leads, as far as this node knows."""
        return self._own_term if self.role in (Role.GATHERING, Role.LEADING) else self._term

    @property
    def connected(self) -> frozenset[int]:
        """The workers, of all nodes, that are connected to the lead, if this is it."""
        return self._lead.connected if self._lead is not None else frozenset()

    @property
    def holding(self) -> tuple[tuple[int, bool], ...] | None:
        """Who holds work, as `Aggregator.holding` says; None: this node does not lead."""
        return self._lead.holding if self._lead is not None else None

    @property
    def leases(self) -> dict[int, tuple[Lease, ...]]:
        """What each worker that holds work holds, if this node leads."""
        return self._lead.leases if self._lead is not None else {}

    @property
    def is_fresh(self) -> bool:
        """As `Aggregator.is_fresh` says, if this node leads."""
        return self._lead is not None and self._lead.is_fresh

    @property
    def has_failed(self) -> bool:
        """As `Aggregator.has_failed` says, if this node leads."""
        return self._lead is not None and self._lead.has_failed

    @property
    def counted(self) -> Collection[int]:
        """The micro-batches that count in the pass that runs, if this node leads."""
        return self._lead.counted if self._lead is not None else ()

    @property
    def has_questions(self) -> bool:
        """As `Aggregator.has_questions` says, if this node leads."""
        return self._lead is not None and self._lead.has_questions

    @property
    def awaits_opinions(self) -> bool:
        """As `Aggregator.awaits_opinions` says, if this node leads."""
        return self._lead is not None and self._lead.awaits_opinions

    @property
    def phase(self) -> StepPhase:
        """The phase of the step, as far as this node knows."""
        return self._lead.phase if self._lead is not None else StepPhase.LEASING

    @property
    def next_tick_s(self) -> float:
        own_s = self._tick_s if self._lead is None else self._lead.next_tick_s
        return min([own_s, *self._due_s()])

    # --------------------------------------------------------------- events

    def handle(self, event: NodeEvent, now_s: float) -> list[NodeAction]:
        """Take one event; return what to do, in order."""
        self._now_s = now_s
        actions = self._remember(self._react(event, now_s))
        if self._lead is None:
            actions += self._remember(self._answer())
            actions += self._tell(now_s)
        return actions

    def _remember(self, actions: list[NodeAction]) -> list[NodeAction]:
        """Know what the memory holds once they are carried out."""
        for action in actions:
            match action:
                case SavePrepared(word):
                    self._memory.prepared = word
                case SendNode() | Leave():
                    pass
                case _:
                    self._memory.take(action)
        return actions

    def _react(self, event: NodeEvent, now_s: float) -> list[NodeAction]:
        match event:
            case Started():
                return self._begin(now_s)
            case Reached(node):
                self._linked.add(node)
                self._gone_s.pop(node, None)
                return self._ask([node]) + self._stalled(node)
            case Lost(node, for_good):
                return self._lose(node, now_s if for_good else now_s + GRACE_S, now_s)
            case FromNode(node, message):
                return self._from_node(node, message, now_s)
            case Received(sender=None, message=Admit(membership)) if (
                membership.generation > self.membership.generation
            ):
                return self._admitted(membership, now_s)
            case Received(sender=None, message=Report() | Admit()):
                self._coordinator, self._told = True, None
            case Disconnected(sender=None):
                self._coordinator = False
            case Tick():
                return self._tick(event, now_s)
            case Updated(grad_norm, number) if self._lead is None:
                return self._prepared(grad_norm, number)
            case Updated():
                event = replace(event, node=self.node)
            case Received(sender=int(worker)):
                self._memory.workers.add(worker)
                event = replace(event, node=self.node)
            case Disconnected(sender=int(worker)):
                self._memory.workers.discard(worker)
        if self.role is Role.GATHERING:
            if _is_look(event):  # they come again and again: only what the last one says holds
                self._waiting = [one for one in self._waiting if not _is_look(one)]
            self._waiting.append(event)
            return []
        if self._lead is not None:
            return self._prepare(event) + self._led(event, now_s)
        return self._relay(event)

    # ------------------------------------------------------------ membership

    def _begin(self, now_s: float) -> list[NodeAction]:
        if self.node in self.membership.former:
            return self._fenced()
        self._miss(now_s)
        return self._gather(now_s) if self.membership.nodes[0] == self.node else []

    def _admitted(self, membership: Membership, now_s: float) -> list[NodeAction]:
        """A new generation. Who leads is a function of it."""
        if membership.generation <= self.membership.generation:
            return []
        before, self.membership = self.membership, membership
        saved: list[NodeAction] = [SaveMembership(membership)]
        if self.node in membership.former:
            return [*saved, *self._fenced()]
        if self.node not in membership.nodes:  # it joins, or waits to do so
            if before.nodes[0] != membership.nodes[0]:
                saved += self._step_down()
            return saved
        self._miss(now_s)
        leads = membership.nodes[0] == self.node
        if leads and self._lead is not None:
            known = {*before.nodes, *before.joining}
            asked = [one for one in membership.nodes if one not in before.nodes]
            asked += [one for one in membership.joining if one not in known]
            return self._led(Received(None, Admit(membership)), now_s) + self._ask(asked)
        if leads:
            return [*saved, *self._gather(now_s)]
        if self.role is not Role.RELAYING or before.nodes[0] != membership.nodes[0]:
            saved += self._step_down()
        return saved

    def _fenced(self) -> list[NodeAction]:
        reason = f"generation {self.membership.generation} goes on without node {self.node}"
        return self._leave(reason)

    def _leave(self, reason: str) -> list[NodeAction]:
        ended = self._step_down()
        self.role = Role.FENCED
        return [*ended, *self._hang_up(), Leave(reason)]

    def _step_down(self) -> list[NodeAction]:
        """Lead no more, and take orders from nobody before somebody asks."""
        self.role, self._lead, self._term = Role.RELAYING, None, None
        self._holds.clear()
        self._rows.clear()
        self._waiting.clear()
        return self._stop_observing()

    def _hang_up(self) -> list[NodeAction]:
        """Have all workers say again who they are and what they hold."""
        return [HangUp(worker) for worker in sorted(self._memory.workers)]

    # -------------------------------------------------------------- gathering

    def _gather(self, now_s: float) -> list[NodeAction]:
        """Begin to lead: first learn what counts, wherever it is."""
        actions = self._give_up()
        if self.role is not Role.GATHERING:
            actions += self._step_down()
            self.role = Role.GATHERING
        actions += self._hang_up() + self._ask(self.membership.nodes)
        return actions + self._lead_if_known(now_s)

    def _ask(self, nodes: Iterable[int]) -> list[NodeAction]:
        if self.role not in (Role.GATHERING, Role.LEADING):
            return []
        ask = Ask(self._own_term, self.membership)
        concerned = set(self.membership.nodes)
        if self.role is Role.LEADING:  # before that there are no rounds
            concerned.update(self.membership.joining)
        others = set(nodes) & concerned & self._linked
        return [SendNode(node, ask) for node in sorted(others - {self.node})]

    def _lead_if_known(self, now_s: float) -> list[NodeAction]:
        """Lead once every member has said what it holds. The newest commit record counts."""
        members = set(self.membership.nodes)
        if not members <= {self.node, *self._holds}:
            return []
        holds = {one: held for one, held in self._holds.items() if one in members}
        holds[self.node] = self._memory.holds(self._own_term)
        whole = [held.state for held in holds.values() if held.prepared != VOID]
        newest = max(whole, default=self._memory.state, key=lambda state: state.key)
        behind = [
            one for one, held in holds.items() if not can_follow(held.state, held.prepared, newest)
        ]
        if self.node in behind:
            return self._leave(f"node {self.node} cannot go on from step {newest.step}")
        if behind:
            self._gone_s |= dict.fromkeys(behind, NEVER_S)  # they cannot go on as they are
            return []
        self.role = Role.LEADING
        rows = {**self._rows, self.node: self._memory.rows}
        known = merged(newest, self.membership, holds, rows)
        self._lead = self._make_lead(self._rules, known, self.node)
        self._holds.clear()
        self._rows.clear()
        waiting, self._waiting = self._waiting, []
        actions = self._led(Started(), now_s)
        if self._coordinator:
            actions += self._led(Received(None, Report(0, self.membership, ())), now_s)
        for event in waiting:
            actions += self._led(event, now_s)
        return actions + self._ask(self.membership.joining)

    # ---------------------------------------------------------------- leading

    def _led(self, event: Event, now_s: float) -> list[NodeAction]:
        """Let the lead's protocol decide; send what others are to do."""
        lead = self._lead
        assert lead is not None
        lead.gone = self._gone(now_s)
        before = lead.membership  # those that are no members any more must hear so
        actions: list[NodeAction] = []
        for action in lead.handle(event, now_s):
            if isinstance(action, _OF_ALL):
                now = lead.membership
                concerned = (*before.nodes, *now.nodes, *before.joining, *now.joining)
                orders = [
                    SendNode(one, Order(self._own_term, action))
                    for one in dict.fromkeys(concerned)
                    if one != self.node
                ]
                # a commit is the lead's first; what takes long is begun everywhere at once
                first = isinstance(action, Update)
                actions += [*orders, action] if first else [action, *orders]
            elif isinstance(action, _OF_ONE) and lead.home_of(action.worker) != self.node:
                home = lead.home_of(action.worker)
                actions.append(SendNode(home, Order(self._own_term, action)))
            else:
                actions.append(action)
        return actions

    def _prepare(self, event: Event) -> list[NodeAction]:
        """Before others may commit this version, a successor here must know that it is complete."""
        if len(self.membership.nodes) == 1 or not isinstance(event, Updated):
            return []
        return [SavePrepared(self.state.key.word)]

    def _tick(self, tick: Tick, now_s: float) -> list[NodeAction]:
        self._tick_s = now_s + TICK_S
        if self._lead is not None:
            counts = dict(tick.progress)
            for others in self._progress.values():
                counts.update(others)
            return self._led(Tick(counts), now_s)
        if self._term is not None and tick.progress:
            return self._to_lead(Progress(self._term, dict(tick.progress)))
        return []

    # --------------------------------------------------------------- relaying

    def _relay(self, event: Event) -> list[NodeAction]:
        """Pass on what workers say. Before anybody leads it is forgotten: they say it again."""
        match event:
            case Received(sender=int(worker), message=message) if self._term is not None:
                return self._to_lead(Relayed(self._term, worker, message))
            case Disconnected(sender=int(worker)) if self._term is not None:
                return self._to_lead(Relayed(self._term, worker, None))
        return []

    def _prepared(self, grad_norm: float, number: int) -> list[NodeAction]:
        if self._observing is not None:
            return self._observed(self._observing, number)
        update = self._update
        if self._term is None or update is None or update.round != number:
            return []
        complete = Complete(self._term, number, grad_norm)
        return [SavePrepared(self._memory.state.key.word), *self._to_lead(complete)]

    def _to_lead(self, message: NodeMessage) -> list[NodeAction]:
        return [SendNode(self.membership.nodes[0], message)]

    # ------------------------------------------------------------------ links

    def _from_node(self, node: int, message: NodeMessage, now_s: float) -> list[NodeAction]:
        match message:
            case Ask(term, membership):
                return self._asked(node, term, membership, now_s)
            case Order(term, action) if term == self._term:
                return self._ordered(action, now_s)
            case _ if node in self.membership.joining:
                return self._from_joining(node, message, now_s)
            case _ if node not in self.membership.nodes:
                return []  # it has not heard so yet
            case Row(term, outcome) if term == self._own_term:
                self._rows.setdefault(node, {})[outcome.micro_batch] = outcome
            case Holds(term) if term == self._own_term:
                return self._answered(node, message, now_s)
            case Relayed(term, worker, said) if term == self._own_term:
                event = Disconnected(worker) if said is None else Received(worker, said, node)
                return self._as_lead(event, now_s)
            case Progress(term, counts) if term == self._own_term:
                self._progress[node] = dict(counts)
            case orders.Stalled(term, number) if term == self._own_term:
                return self._as_lead(Stalled(number), now_s)
            case Complete(term, number, grad_norm) if term == self._own_term:
                return self._as_lead(Updated(grad_norm, number, node), now_s)
        return []

    def _as_lead(self, event: Event, now_s: float) -> list[NodeAction]:
        if self.role is Role.GATHERING:
            self._waiting.append(event)
            return []
        return self._led(event, now_s) if self._lead is not None else []

    def _asked(
        self, node: int, term: int, membership: Membership, now_s: float
    ) -> list[NodeAction]:
        """Whoever leads asks first. What was relayed to another is said again."""
        actions = self._admitted(membership, now_s)
        if self.membership.nodes[0] != node or self.role is not Role.RELAYING:
            return actions  # it does not know yet that it leads no more
        if term != self._term:
            actions += self._stop_observing()
        self._term, self._is_asked = term, True
        return [*actions, *self._give_up()]

    def _answer(self) -> list[NodeAction]:
        """Say what the memory holds, once that is final."""
        if not self._is_asked or self._term is None:
            return []
        if self.node not in self.membership.nodes:
            if not self._linked.issuperset(self.membership.nodes):
                return []  # no round could be complete here
        elif self._observing is not None and self._observing.is_receiving:
            return []  # it will have carried out what the lead ordered before
        ended = self._stop_observing()
        if self.node not in self.membership.nodes and self._memory.prepared != VOID:
            ended.append(SavePrepared(VOID))
            self._memory.prepared = VOID  # it says so at once: it may have been admitted meanwhile
        self._is_asked = False
        lead, term = self.membership.nodes[0], self._term
        rows = [SendNode(lead, Row(term, outcome)) for outcome in self._memory.rows.values()]
        holds = SendNode(lead, self._memory.holds(term))
        return [*ended, *self._hang_up(), *rows, holds]

    def _give_up(self) -> list[NodeAction]:
        """An exchange that an earlier lead began has no end."""
        update, self._update = self._update, None
        return [GiveUp(update.round)] if update is not None else []

    def _ordered(self, action: Action, now_s: float) -> list[NodeAction]:
        match action:
            case SaveMembership(membership):
                return self._admitted(membership, now_s)
            case _ if self.node not in self.membership.nodes:
                return self._observe(action)
            case _ if self._observing is not None:  # it has become a member meanwhile
                return self._observe(action)
            case Update():
                self._update = action
            case GiveUp():
                self._update = None
        return [action]

    # ---------------------------------------------------------------- joining

    def _observe(self, order: Action) -> list[NodeAction]:
        """An order to a node that joins: it only receives."""
        if self._observing is None:
            self._observing = Observing(self.node)
        return self._in_order(self._observing.take(order), self._observing)

    def _observed(self, observing: Observing, number: int) -> list[NodeAction]:
        actions = observing.updated(number)
        if actions is None:
            return []
        state, has_version = self._memory.state, self._memory.prepared != VOID
        if not actions and has_version and state.step + 1 == observing.step:
            return [SavePrepared(state.key.word)]
        return self._in_order(actions, observing)

    def _in_order(self, actions: list[Action], observing: Observing) -> list[NodeAction]:
        """Saves a version before it says so to the lead; says that it has none before one is
        overwritten."""
        saved = [one.state for one in actions if isinstance(one, SaveState)]
        if saved and self._term is not None:
            done = [SavePrepared(0)] if self._memory.prepared == VOID else []
            return [*actions, *done, *self._to_lead(orders.CaughtUp(self._term, saved[-1].step))]
        if observing.step is None and self._memory.prepared != VOID:
            return [SavePrepared(VOID), *actions]
        return [*actions]

    def _stop_observing(self) -> list[NodeAction]:
        """The round that was under way is not followed any further."""
        observing, self._observing = self._observing, None
        return [*observing.give_up()] if observing is not None else []

    def _from_joining(self, node: int, message: NodeMessage, now_s: float) -> list[NodeAction]:
        """What it holds does not count; that it answers says that it can take part in rounds."""
        if self._lead is None:
            return []
        match message:
            case Holds(term) if term == self._own_term:
                return self._led(NodeThere(node, {}), now_s)
            case orders.Stalled(term) if term == self._own_term:
                return self._led(NodeGone(node), now_s)
            case orders.CaughtUp(term, step) if term == self._own_term:
                return self._led(CaughtUp(node, step), now_s)
        return []

    def _answered(self, node: int, holds: Holds, now_s: float) -> list[NodeAction]:
        if self.role is Role.GATHERING:
            self._holds[node] = holds
            return self._lead_if_known(now_s)
        if self._lead is None:
            return []
        if not can_follow(holds.state, holds.prepared, self._lead.state):
            self._gone_s[node] = NEVER_S
            return self._led(NodeGone(node), now_s)
        checksum = self._memory.checksum
        if checksum and holds.checksum and checksum != holds.checksum:
            reason = (
                f"the task makes other parameters on node {node} than on node {self.node}:"
                f" their checksums are {holds.checksum:#010x} and {checksum:#010x}; they must be"
                " a function of the seed alone"
            )
            return self._led(Received(None, Stop(reason, failed=True, at_once=True)), now_s)
        kept = holds.kept_at(self._lead.state.step)
        return self._led(NodeThere(node, holds.manifests, kept), now_s)

    def _lose(self, node: int, gone_s: float, now_s: float) -> list[NodeAction]:
        self._linked.discard(node)
        self._progress.pop(node, None)
        self._holds.pop(node, None)
        self._rows.pop(node, None)
        self._gone_s[node] = gone_s
        if node == self.membership.nodes[0]:
            self._term = None  # its successor asks first
        concerned = {*self.membership.nodes, *self.membership.joining}
        if self._lead is None or node not in concerned:
            return self._stalled(node)
        return self._led(NodeGone(node), now_s)

    def _stalled(self, node: int) -> list[NodeAction]:
        """A round cannot end if a block of it was lost: the lead begins another."""
        if self._observing is not None and self._observing.needs(node):
            ended, self._is_asked = self._stop_observing(), True
            if self._term is None:
                return ended
            return [*ended, *self._to_lead(orders.Stalled(self._term, 0))]
        update = self._update
        if self._term is None or update is None or node not in update.nodes:
            return []
        return self._to_lead(orders.Stalled(self._term, update.round))

    # ---------------------------------------------------------------- telling

    def _gone(self, now_s: float) -> tuple[int, ...]:
        """Members that have been away for too long to come back as they were."""
        gone = [one for one, at_s in self._gone_s.items() if at_s <= now_s]
        return tuple(sorted(set(gone) & set(self.membership.nodes)))

    def _due_s(self) -> list[float]:
        """When members that are away will have been so for too long."""
        return [at_s for at_s in self._gone_s.values() if at_s > self._now_s]

    def _miss(self, now_s: float) -> None:
        """A member that no link ever led to is away as well."""
        for node in {*self.membership.nodes} - {self.node, *self._linked}:
            self._gone_s.setdefault(node, now_s + GRACE_S)

    def _tell(self, now_s: float) -> list[NodeAction]:
        report = Report(
            step=self._memory.state.step,
            membership=self.membership,
            connected=(),
            node=self.node,
            leads=False,
            gone=self._gone(now_s),
        )
        if not self._coordinator or report == self._told:
            return []
        self._told = report
        return [Tell(report)]


def _is_look(event: Event) -> bool:
    return isinstance(event, Received) and isinstance(event.message, Look)
