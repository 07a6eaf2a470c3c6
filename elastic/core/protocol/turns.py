"""Several models of one job that are trained in turn, by the same workers, without I/O.

Each has a protocol of its own, which knows nothing of the others: what it computes does not depend
on them. Step r of the job is a step of model r mod N. A model's turn lasts until all of its step is
granted; an evaluation, a pass over maxima and a step done again belong to it. Its update is carried
out when the next one's leases are on their way. There is one membership.

A job of one model has one lane, and nothing here changes what that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from elastic.core.protocol.aggregator import Phase
from elastic.core.protocol.events import (
    Disconnected,
    HangUp,
    Lend,
    Lied,
    Note,
    OpenSlot,
    Recall,
    Received,
    Tell,
    Turn,
    Update,
)
from elastic.core.protocol.messages import Commit, Hello, Membership, Release, Report, step_of_job
from elastic.core.protocol.node import Node, NodeAction, NodeEvent
from elastic.core.protocol.sequential import Rounds, SequentialRules, position_of

Actions = list[tuple[int, NodeAction]]
"""What to do, in order, and for which model."""


class Turns:
    """The protocols of all models of a job, by number. `handle` decides who leases now."""

    def __init__(self, lanes: Sequence[Node], sequential: SequentialRules | None = None) -> None:
        self.lanes = tuple(lanes)
        self._rounds = Rounds(sequential, lanes) if sequential is not None else None
        self._open: int | None = None
        self._told: list[Turn] = [Turn()] * len(lanes)
        self._reports: dict[int, Report] = {}
        self._has_report = False
        self._hung: set[int] = set()

    @property
    def step(self) -> int:
        """Committed steps, of all models together."""
        return sum(lane.state.step for lane in self.lanes)

    @property
    def membership(self) -> Membership:
        return self.lanes[0].membership

    @property
    def has_ended(self) -> bool:
        """Whether all models have."""
        return all(lane.phase is Phase.ENDED for lane in self.lanes)

    @property
    def holding(self) -> tuple[tuple[int, bool], ...] | None:
        """Who holds work, of whichever model, as `Node.holding` says."""
        known = [one for lane in self.lanes if (one := lane.holding) is not None]
        if not known:
            return None
        return tuple(dict(sorted(chain(*known))).items())

    @property
    def next_tick_s(self) -> float:
        """When it wants to be asked again."""
        living = [lane.next_tick_s for lane in self.lanes if lane.phase is not Phase.ENDED]
        own_s = min(living, default=self.lanes[0].next_tick_s)
        return own_s if self._rounds is None else min(own_s, self._rounds.due_s)

    def handle(self, event: NodeEvent, now_s: float, model: int | None = None) -> Actions:
        """Take one event; return what to do.

        Args:
            model: whom it concerns; None: what was received, and what concerns all.
        """
        if len(self.lanes) == 1:
            return [(0, action) for action in self.lanes[0].handle(event, now_s)]
        actions: Actions = []
        for one, part in self._parts(event, model):
            actions += self._hear(one, part, now_s)
            if _is_hung_up(event, actions):
                break  # whoever said it is not there any more: others would wait for it
        actions += self._pass_on(now_s)
        if isinstance(event, Received) and isinstance(event.message, Hello):
            # who is welcome to one model has slots for all
            actions.sort(key=lambda one: not isinstance(one[1], OpenSlot))
        if self._has_report and len(self._reports) == len(self.lanes):
            self._has_report = False
            actions.append((0, Tell(self._united())))
        return sorted(actions, key=lambda one: isinstance(one[1], Update))

    # ----------------------------------------------------------------- events

    def _parts(self, event: NodeEvent, model: int | None) -> Iterator[tuple[int, NodeEvent]]:
        """What each lane is to hear; whose turn it is last, when others know what they hold."""
        if model is not None:
            yield model, event
            return
        match event:
            case Received(sender=int(), message=Commit(lease)):
                yield lease.key.model, event
            case Received(sender=int(), message=Release(leases)):
                for one in self._in_turn():
                    mine = tuple(lease for lease in leases if lease.key.model == one)
                    if mine:
                        yield one, replace(event, message=Release(mine))
            case _:
                for one in self._in_turn():
                    yield one, event

    def _in_turn(self) -> list[int]:
        return sorted(range(len(self.lanes)), key=lambda one: one == self._open)

    def _hear(self, model: int, event: NodeEvent, now_s: float) -> Actions:
        """Let one lane decide. Who is hung up is gone for all, and who lied has lied to all; a
        report waits for the others'."""
        actions: Actions = []
        if model == self._open and not isinstance(event, Turn) and self._is_news(model):
            actions += self._tell_turn(model, now_s)
        for action in self.lanes[model].handle(event, now_s):
            match action:
                case Tell(report):
                    self._reports[model] = report
                    self._has_report = True
                    continue
                case Note("worker_hung", _, int(worker)):
                    if worker in self._hung:
                        continue  # each lane that waits for it notices
                    self._hung.add(worker)
            actions.append((model, action))
            match action:
                case Note("worker_lied", reason, int(worker)):
                    for other in range(len(self.lanes)):
                        if other != model:
                            actions += self._hear(other, Lied(worker, reason), now_s)
                case HangUp(worker):
                    actions += self._hang_up(model, worker, now_s)
        return actions

    def _hang_up(self, model: int, worker: int, now_s: float) -> Actions:
        actions: Actions = []
        for other, lane in enumerate(self.lanes):
            if other != model and worker in lane.connected:
                actions += self._hear(other, Disconnected(worker), now_s)
        return actions

    # ------------------------------------------------------------------ turns

    def _pass_on(self, now_s: float) -> Actions:
        """Let the lane lease whose turn it is, until nothing is new to it."""
        actions = self._in_rounds(now_s)
        while True:
            self._open = whose = self._whose()
            for one in range(len(self.lanes)):
                if one != whose and self._told[one].is_open:
                    actions += self._tell_turn(one, now_s)
            if whose is None or not self._is_news(whose):
                return actions
            actions += self._tell_turn(whose, now_s)

    def _in_rounds(self, now_s: float) -> Actions:
        """What is lent, if the models are trained in rounds of a sequential code."""
        actions: Actions = []
        for model, order in self._rounds.next(now_s) if self._rounds is not None else ():
            match order:
                case Lend() | Recall():
                    actions += self._hear(model, order, now_s)
                case _:
                    actions.append((model, order))
        return actions

    def _whose(self) -> int | None:
        """The lane with the least step. None: that is being updated, or all are done.

        In rounds nothing is leased in turn but audits.
        """
        if self._rounds is not None and self._rounds.is_on:
            audited = (one for one, lane in enumerate(self.lanes) if lane.awaits_opinions)
            return next(audited, None)
        positions = [
            (position_of(lane, model, len(self.lanes)), model)
            for model, lane in enumerate(self.lanes)
            if lane.phase in (Phase.LEASING, Phase.UPDATING)
        ]
        _, model = min(positions, default=(0, None))
        if model is None or self.lanes[model].phase is Phase.UPDATING:
            return None
        return model

    def _is_news(self, model: int) -> bool:
        return self._turn_of(model) != self._told[model]

    def _tell_turn(self, model: int, now_s: float) -> Actions:
        self._told[model] = self._turn_of(model)
        return self._hear(model, self._told[model], now_s)

    def _turn_of(self, model: int) -> Turn:
        if model != self._open:
            return Turn(is_open=False)
        num = len(self.lanes)
        before = step_of_job(model, self.lanes[model].state.step, num) - 1
        busy: set[int] = set()
        waited_for: set[int] = set()
        for other, lane in enumerate(self.lanes):
            if other == model:
                continue
            for worker, leases in lane.leases.items():
                busy.add(worker)
                if any(step_of_job(other, lease.key.step, num) < before for lease in leases):
                    waited_for.add(worker)
        return Turn(busy=frozenset(busy), ending=frozenset(busy - waited_for))

    # ---------------------------------------------------------------- telling

    def _united(self) -> Report:
        """One report, of all models."""
        reports = [self._reports[model] for model in range(len(self.lanes))]
        failures = [
            f"model {model}: {one.failure}" for model, one in enumerate(reports) if one.failure
        ]
        common = {one.failure for one in reports}
        return replace(
            reports[0],
            step=self.step,
            membership=self.membership,
            connected=tuple(sorted(set.intersection(*(set(one.connected) for one in reports)))),
            hung=tuple(sorted(dict(chain(*(one.hung for one in reports))).items())),
            wants_leave=_union([one.wants_leave for one in reports]),
            lost=_union([one.lost for one in reports]),
            finished=all(one.finished for one in reports),
            failure=common.pop() if len(common) == 1 else "; ".join(failures),
        )


def _union(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted(set(chain(*parts))))


def _is_hung_up(event: NodeEvent, actions: Actions) -> bool:
    return isinstance(event, Received) and any(
        isinstance(action, HangUp) and action.worker == event.sender for _, action in actions
    )
