"""A node's side of a job, without I/O: it leads the step, or relays to the node that does.

    RELAYING ──admitted as the first──▶ GATHERING ──all have said what they hold──▶ LEADING
        ▲                                  │                                           │
        └────── no longer the first ───────┴───────────────────────────────────────────┘
    From anywhere: no member any more ──▶ FENCED.

The lead runs the aggregator's protocol for the workers of all nodes. What it decides for a worker
of another node goes there as an order, and what that worker says comes back relayed. A grant counts
iff it is in the memory of the worker's node; so a new lead, after a death between any two actions,
first asks every node what it holds, and only then leases. With one node nothing is ever sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from elastic.core.errors import ProtocolError
from elastic.core.protocol import orders
from elastic.core.protocol.aggregator import TICK_S, Aggregator, Recovered, Rules
from elastic.core.protocol.aggregator import Phase as StepPhase
from elastic.core.protocol.events import (
    Action,
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
from elastic.core.protocol.messages import Admit, Manifest, Membership, Outcome, Report, State
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

_OF_ALL = (MarkDone, MarkUndone, SaveMembership, SaveState, Update, GiveUp)
"""Actions that every node carries out."""

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
    """The next version of the key with this word is complete here."""

    word: int


@dataclass(frozen=True, slots=True)
class Leave:
    """This node is no member any more: end, and drop everything. It may come back as another."""

    reason: str


NodeAction = Action | SendNode | SavePrepared | Leave

Lead = Callable[[Rules, Recovered, int], Aggregator]
"""Makes the protocol of the lead: rules, what counts on all nodes together, its own node."""


@dataclass(slots=True)
class _Memory:
    """What this node's shared memory holds, as far as it was told to hold it."""

    state: State
    prepared: int
    manifests: dict[int, Manifest]
    rows: dict[int, Outcome]
    workers: set[int] = field(default_factory=set)

    def take(self, action: NodeAction) -> None:
        match action:
            case SaveState(state):
                if state.key != self.state.key:
                    self.rows.clear()
                self.state = state
            case SaveRow(_, outcome):
                self.rows[outcome.micro_batch] = outcome
            case SaveManifest(worker, manifest):
                self.manifests[worker] = manifest
            case OpenSlot(worker):
                self.manifests.setdefault(worker, Manifest(self.state.key))
            case DropSlot(worker):
                self.manifests.pop(worker, None)
            case HangUp(worker):
                self.workers.discard(worker)
            case SavePrepared(word):
                self.prepared = word

    def holds(self, term: int) -> Holds:
        return Holds(term, self.state, self.prepared, dict(self.manifests))


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
        self._memory = _Memory(
            recovered.state, prepared, dict(recovered.manifests), dict(recovered.rows)
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
        actions = self._react(event, now_s)
        if self._lead is None:
            actions += self._tell(now_s)
        for action in actions:
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
        if self.node not in membership.nodes:
            return saved  # it waits to be one
        self._miss(now_s)
        leads = membership.nodes[0] == self.node
        if leads and self._lead is not None:
            return self._led(Received(None, Admit(membership)), now_s) + self._ask(
                [one for one in membership.nodes if one not in before.nodes]
            )
        if leads:
            return [*saved, *self._gather(now_s)]
        if self.role is not Role.RELAYING or before.nodes[0] != membership.nodes[0]:
            self._step_down()
        return saved

    def _fenced(self) -> list[NodeAction]:
        self._step_down()
        self.role = Role.FENCED
        reason = f"generation {self.membership.generation} goes on without node {self.node}"
        return [*self._hang_up(), Leave(reason)]

    def _step_down(self) -> None:
        """Lead no more, and take orders from nobody before somebody asks."""
        self.role, self._lead, self._term = Role.RELAYING, None, None
        self._holds.clear()
        self._rows.clear()
        self._waiting.clear()

    def _hang_up(self) -> list[NodeAction]:
        """Have all workers say again who they are and what they hold."""
        return [HangUp(worker) for worker in sorted(self._memory.workers)]

    # -------------------------------------------------------------- gathering

    def _gather(self, now_s: float) -> list[NodeAction]:
        """Begin to lead: first learn what counts, wherever it is."""
        if self.role is not Role.GATHERING:
            self._step_down()
            self.role = Role.GATHERING
        actions = self._give_up() + self._hang_up() + self._ask(self.membership.nodes)
        return actions + self._lead_if_known(now_s)

    def _ask(self, nodes: Iterable[int]) -> list[NodeAction]:
        if self.role not in (Role.GATHERING, Role.LEADING):
            return []
        ask = Ask(self._own_term, self.membership)
        others = set(nodes) & set(self.membership.nodes) & self._linked
        return [SendNode(node, ask) for node in sorted(others - {self.node})]

    def _lead_if_known(self, now_s: float) -> list[NodeAction]:
        """Lead once every member has said what it holds. The newest commit record counts."""
        members = set(self.membership.nodes)
        if not members <= {self.node, *self._holds}:
            return []
        holds = {one: held for one, held in self._holds.items() if one in members}
        holds[self.node] = self._memory.holds(self._own_term)
        newest = max((held.state for held in holds.values()), key=lambda state: state.key)
        behind = [
            one for one, held in holds.items() if not can_follow(held.state, held.prepared, newest)
        ]
        if behind:
            self._gone_s |= dict.fromkeys(behind, NEVER_S)  # they cannot go on as they are
            return []
        self.role = Role.LEADING
        rows = {**self._rows, self.node: self._memory.rows}
        known = _merged(newest, self.membership, holds, rows)
        self._lead = self._make_lead(self._rules, known, self.node)
        self._holds.clear()
        self._rows.clear()
        waiting, self._waiting = self._waiting, []
        actions = self._led(Started(), now_s)
        if self._coordinator:
            actions += self._led(Received(None, Report(0, self.membership, ())), now_s)
        for event in waiting:
            actions += self._led(event, now_s)
        return actions

    # ---------------------------------------------------------------- leading

    def _led(self, event: Event, now_s: float) -> list[NodeAction]:
        """Let the lead's protocol decide; send what others are to do."""
        lead = self._lead
        assert lead is not None
        lead.gone = self._gone(now_s)
        before = lead.membership.nodes  # those that are no members any more must hear so
        actions: list[NodeAction] = []
        for action in lead.handle(event, now_s):
            if isinstance(action, _OF_ALL):
                orders = [
                    SendNode(one, Order(self._own_term, action))
                    for one in dict.fromkeys((*before, *lead.membership.nodes))
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
        self._term = term
        rows = [SendNode(node, Row(term, outcome)) for outcome in self._memory.rows.values()]
        holds = SendNode(node, self._memory.holds(term))
        return [*actions, *self._give_up(), *self._hang_up(), *rows, holds]

    def _give_up(self) -> list[NodeAction]:
        """An exchange that an earlier lead began has no end."""
        update, self._update = self._update, None
        return [GiveUp(update.round)] if update is not None else []

    def _ordered(self, action: Action, now_s: float) -> list[NodeAction]:
        match action:
            case Update():
                self._update = action
            case GiveUp():
                self._update = None
            case SaveMembership(membership):
                return self._admitted(membership, now_s)
        return [action]

    def _answered(self, node: int, holds: Holds, now_s: float) -> list[NodeAction]:
        if self.role is Role.GATHERING:
            self._holds[node] = holds
            return self._lead_if_known(now_s)
        if self._lead is None:
            return []
        if not can_follow(holds.state, holds.prepared, self._lead.state):
            self._gone_s[node] = NEVER_S
            return self._led(NodeGone(node), now_s)
        return self._led(NodeThere(node, holds.manifests), now_s)

    def _lose(self, node: int, gone_s: float, now_s: float) -> list[NodeAction]:
        self._linked.discard(node)
        self._progress.pop(node, None)
        self._holds.pop(node, None)
        self._rows.pop(node, None)
        self._gone_s[node] = gone_s
        if node == self.membership.nodes[0]:
            self._term = None  # its successor asks first
        if self._lead is None or node not in self.membership.nodes:
            return self._stalled(node)
        return self._led(NodeGone(node), now_s)

    def _stalled(self, node: int) -> list[NodeAction]:
        """A round cannot end if a block of it was lost: the lead begins another."""
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


def can_follow(state: State, prepared: int, newest: State) -> bool:
    """Whether a node at `state` has the version of `newest`, or has prepared it."""
    if state.step == newest.step:
        return True
    return state.step == newest.step - 1 and prepared == state.key.word


def _merged(
    newest: State,
    membership: Membership,
    holds: Mapping[int, Holds],
    rows: Mapping[int, Mapping[int, Outcome]],
) -> Recovered:
    """What counts on all nodes together. `rows` are by node, too."""
    manifests: dict[int, Manifest] = {}
    counting: dict[int, Outcome] = {}
    homes: dict[int, int] = {}
    for node, held in holds.items():
        for worker, manifest in held.manifests.items():
            if worker in manifests:
                raise ProtocolError(
                    f"worker {worker} has slots on nodes {homes[worker]} and {node}"
                )
            manifests[worker], homes[worker] = manifest, node
            if manifest.key == newest.key:
                counting |= {one: rows[node][one] for one in manifest.micro_batches}
    return Recovered(newest, membership, manifests, counting, homes)
