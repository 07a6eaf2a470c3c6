"""How a node joins while the others go on: a copy of the state, and the totals of what came since.

    THERE ──Copy──▶ the copy ──Copied──▶ the rounds since ──at most one step behind──▶ a member
      ▲               │                        │
      └───────────────┴── a link, a member or the lead was lost: it begins anew

`Copies` is the lead's side, `Catching` that of the node that joins. Neither makes anybody wait:
what a joining node holds counts for nothing until it is a member and has said what it holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from elastic.core.protocol.events import Action, Apply, Copy, GiveUp, SaveState, Update
from elastic.core.protocol.messages import State


class Copies:
    """What goes to the nodes that join, as the lead knows it."""

    def __init__(self) -> None:
        self._there: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._steps: dict[int, int] = {}
        self._num_begun = 0

    @property
    def observers(self) -> tuple[int, ...]:
        """Who must get the totals of every round from now on."""
        return tuple(sorted(self._numbers))

    def there(self, node: int) -> None:
        """A joining node reaches all members. What it has is of no use."""
        self.gone(node)
        self._there.add(node)

    def gone(self, node: int) -> None:
        self._there.discard(node)
        self._numbers.pop(node, None)
        self._steps.pop(node, None)

    def keep(self, joining: Iterable[int]) -> None:
        """All others join no more."""
        for node in self._there - set(joining):
            self.gone(node)

    def void(self) -> None:
        """A member was lost: it may have heard of a copy or a round, or not."""
        self._numbers.clear()
        self._steps.clear()

    def begin(self, state: State, nodes: tuple[int, ...]) -> list[Action]:
        """Copy this state to whoever is there and gets none yet. All members are present."""
        actions: list[Action] = []
        for node in sorted(self._there - self._numbers.keys()):
            self._num_begun += 1
            self._numbers[node] = self._num_begun
            actions.append(Copy(self._num_begun, node, nodes, state))
        return actions

    def copied(self, node: int, number: int, step: int) -> None:
        """It has the version of `step`, by the copy of this number."""
        if self._numbers.get(node) == number:
            self._steps[node] = step

    def ready(self, step: int) -> tuple[int, ...]:
        """Those at most one step behind."""
        return tuple(sorted(node for node, at in self._steps.items() if at >= step - 1))


class Catching:
    """A copy that this node receives, and what was ordered since, to be carried out after it.

    `step` is the newest version that is complete here, None before the copy is.
    """

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.nodes = set(copy.nodes)
        self.step: int | None = None
        self._log: deque[Update | SaveState] = deque()
        self._applied: int | None = None

    @property
    def is_behind(self) -> bool:
        """Whether something that was ordered is still to be carried out, and will be."""
        return self.step is not None and bool(self._log) and not self.is_broken

    @property
    def is_broken(self) -> bool:
        """Whether the lead took this node for one that does not observe any more."""
        first = self._log[0] if self._log else None
        return (
            self.step is not None and isinstance(first, SaveState) and first.state.step > self.step
        )

    def take(self, order: Action) -> list[Action]:
        """An order of the lead. What concerns workers does not concern a node that has none."""
        match order:
            case Update() if self.copy.node in order.observers:
                self.nodes.update(order.nodes)
                self._log.append(order)
                return [order, *self._go_on()]
            case GiveUp(number):
                self._forget(number)
                return [order, *self._go_on()]
            case SaveState():
                self._log.append(order)
                return self._go_on()
        return []

    def copied(self) -> list[Action]:
        """All shares are in memory: its state is this node's record."""
        self.step = self.copy.state.step
        return [SaveState(self.copy.state), *self._go_on()]

    def applied(self, number: int) -> list[Action] | None:
        """The next version is complete by this round. None if that was not asked for."""
        if number != self._applied:
            return None
        update = self._log.popleft()
        assert isinstance(update, Update)
        self.step, self._applied = update.step + 1, None
        return self._go_on()

    def give_up(self) -> list[Action]:
        """It is of no use any more: drop the totals."""
        return [GiveUp(one.round) for one in self._log if isinstance(one, Update)]

    def _forget(self, number: int) -> None:
        for one in [one for one in self._log if isinstance(one, Update) and one.round == number]:
            self._log.remove(one)
        if self._applied == number:
            self._applied = None

    def _go_on(self) -> list[Action]:
        """Commit records in order, each once its version is complete; then the next round."""
        actions: list[Action] = []
        while self._log and self.step is not None and self._applied is None and not self.is_broken:
            first = self._log[0]
            if isinstance(first, SaveState):
                actions.append(first)
                self._log.popleft()
            else:
                self._applied = first.round
                actions.append(Apply(first.round))
        return actions
