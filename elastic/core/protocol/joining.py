"""How a node joins while the others go on: it takes part in rounds as one that only receives.

    THERE ──a round──▶ its version is complete ──at most one step behind──▶ a member
      ▲                     │
      └─────────────────────┴── a link or the lead was lost, or it was too slow: the next round

Every round brings all parameters of the next version, so one is enough, whatever was before.
`Observers` is the lead's side, `Observing` that of the node that joins. Neither makes anybody wait:
what a joining node holds counts for nothing until it is a member and has said what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic.core.protocol.events import Action, GiveUp, SaveState, Update
from elastic.core.protocol.messages import State


class Observers:
    """The nodes that join, as the lead knows them."""

    def __init__(self) -> None:
        self._there: set[int] = set()
        self._steps: dict[int, int] = {}

    @property
    def nodes(self) -> tuple[int, ...]:
        """Who must get the parameters of every round from now on."""
        return tuple(sorted(self._there))

    def there(self, node: int) -> None:
        """A joining node reaches all members. What it has is of no use."""
        self.gone(node)
        self._there.add(node)

    def gone(self, node: int) -> None:
        self._there.discard(node)
        self._steps.pop(node, None)

    def keep(self, joining: Iterable[int]) -> None:
        """All others join no more."""
        for node in self._there - set(joining):
            self.gone(node)

    def caught_up(self, node: int, step: int) -> None:
        """It has the version of `step`, and says so in its commit record."""
        if node in self._there:
            self._steps[node] = step

    def ready(self, step: int) -> tuple[int, ...]:
        """Those at most one step behind."""
        return tuple(sorted(node for node, at in self._steps.items() if at >= step - 1))


class Observing:
    """What a node that joins has: `step` is that of its version, None before one is complete."""

    def __init__(self, node: int) -> None:
        self.step: int | None = None
        self._node = node
        self._update: Update | None = None
        self._record: State | None = None

    @property
    def is_receiving(self) -> bool:
        """Whether a round is under way that will be complete here, if nothing is lost."""
        return self._update is not None

    def needs(self, node: int) -> bool:
        """Whether the round that is under way needs that node."""
        return self._update is not None and node in self._update.nodes

    def take(self, order: Action) -> list[Action]:
        """An order of the lead. What concerns workers does not concern a node that has none."""
        match order:
            case Update() if self._node in order.observers:
                return self._begin(order)
            case GiveUp(number) if self._update is not None and self._update.round == number:
                self._update = self._record = None
                return [order]
            case SaveState(state):
                return self._save(state)
        return []

    def updated(self, number: int) -> list[Action] | None:
        """The next version is complete by this round. None if it is of no use any more."""
        if self._update is None or self._update.round != number:
            return None
        self.step = self._update.step + 1
        record, self._update, self._record = self._record, None, None
        return [] if record is None else [SaveState(record)]

    def give_up(self) -> list[Action]:
        """The round that is under way has no end."""
        update, self._update, self._record = self._update, None, None
        return [] if update is None else [GiveUp(update.round)]

    def _begin(self, update: Update) -> list[Action]:
        """Of a step that is skipped only those with the version of before can have the next one."""
        dropped = self.give_up()
        if self.step != update.step:
            self.step = None
            if update.skip:
                return dropped
        self._update = update
        return [*dropped, update]

    def _save(self, state: State) -> list[Action]:
        if state.step == self.step:
            return [SaveState(state)]
        if self._update is not None and state.step == self._update.step + 1:
            self._record = state  # the others were faster
        elif self.step is not None and state.step > self.step:
            self.step = None
        return []
