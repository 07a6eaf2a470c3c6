"""Rounds of a sequential code over the models of a job, without I/O.

Beside `Turns`, which lets lanes hear what is said here. In round r the step of the job that is
begun with it is worked on, and those of the rounds before that are not complete, each in the lane
of its model; `policies.coding.sequential` says by whom. A round ends once its code may do without
who is late; what was lent in it is then given up, also by who is in the midst of it.

    plain turns ──a step is about to begin, workers and micro-batches fit──▶ rounds
         ▲                                                                     │
         └─ workers came or went, a step is done again, is evaluated, ends ────┘

What is left of begun steps is completed in plain turns, one after the other. So nothing of this is
written down: a successor that has forgotten everything goes on with plain turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from elastic.core.protocol.aggregator import Phase
from elastic.core.protocol.events import Lend, Note, Recall, SaveRound
from elastic.core.protocol.messages import Key, step_of_job
from elastic.core.protocol.node import Node
from policies.coding.codes import Bools
from policies.coding.m_sgc import MSgc
from policies.coding.sequential import SequentialLeases, least_models
from policies.coding.sr_sgc import SrSgc
from policies.gradient_coding import named

PATIENCE = 2.0
"""Times as long as the first worker needed for as much, a round waits for the others: mu = 1 as
published, where all have as much to do."""
GIVE_UP = 4.0
"""After so many times as long more straggle than the code withstands: others help then."""
FLOOR_S = 0.03
"""Neither is shorter than this after the first: a process that may run may wait for a core."""
MAX_PAUSE = 63
"""Steps that take turns after that, at most; the first time one, then ever more."""

Order = tuple[int, Lend | Recall | SaveRound | Note]
"""For which model, and what it is to hear or to have carried out."""


@dataclass(frozen=True, slots=True)
class SequentialRules:
    """What the job asks for. `num_steps` are of each model; it is evaluated `every` so many of
    them, if not 0. `first_round`: none of before has a greater number."""

    scheme: SrSgc | MSgc
    num_micro_batches: int
    num_steps: int
    every: int = 0
    first_round: int = 0


class Rounds:
    """Decides whenever it is asked, by what the lanes are then: no event is missed."""

    def __init__(self, job: SequentialRules, lanes: Sequence[Node]) -> None:
        assert len(lanes) >= least_models(job.scheme), "a step is complete so many rounds later"
        self.due_s = math.inf
        """When to ask again, if nothing happens before."""
        self._job = job
        self._lanes = tuple(lanes)
        self._number = job.first_round
        self._leases: SequentialLeases | None = None
        self._is_begun = False
        self._base = 0
        self._workers: tuple[int, ...] = ()
        self._keys: dict[int, Key] = {}
        """Of each gradient that has begun and is not committed."""
        self._counts: dict[int, int] = {}
        """Micro-batches of it that are known to be granted."""
        self._begin_s = 0.0
        self._pace_s = math.inf
        """Seconds that the first worker needed for a micro-batch of its own in this round."""
        self._sizes: list[int] = []
        """What each worker was to compute when the round began."""
        self._pause = 0
        """Steps of the job that took turns, or will, since there were too many stragglers."""
        self._resume_at = 0
        self._told = ""

    @property
    def is_on(self) -> bool:
        """Whether the lanes work in rounds, and not in turns."""
        return self._leases is not None

    def next(self, now_s: float) -> list[Order]:
        """What to do now."""
        self.due_s = math.inf
        if self._leases is None:
            return self._try(now_s)
        if reason := self._trouble():
            return self._leave(reason)
        self._count(self._leases)
        orders: list[Order] = []
        while not self._is_begun or self._is_at_end(self._leases, now_s):
            if self._is_begun:
                self._leases.end()
                self._is_begun = False
            if self._leases.round >= self._leases.num_gradients:
                self._leases = None  # no step begins: what is left is done in turns, by all
                return orders
            orders += self._begin_round(self._leases, now_s)
            if not self._is_begun:
                return orders
        if self._pace_s < math.inf and now_s >= self._after(GIVE_UP, self._leases.answered):
            self._back_off(self._leases.round)
            orders += self._leave(f"round {self._leases.round}: more straggle than it withstands")
        return orders

    # ------------------------------------------------------- in and out of them

    def _try(self, now_s: float) -> list[Order]:
        """Begin with rounds, if a step is about to begin and everything fits."""
        if self._leaving():
            return []  # in turns it is dismissed once it holds nothing
        failed = [model for model, lane in enumerate(self._lanes) if lane.has_failed]
        if failed:
            is_over = len(failed) == len(self._lanes)
            return [] if is_over else self._tell(f"model {failed[0]} has failed: steps take turns")
        num = len(self._lanes)
        self._base = min(position_of(lane, model, num) for model, lane in enumerate(self._lanes))
        if self._base < self._resume_at:
            return []
        first = self._lane(0)
        num_gradients = self._until_something_else()
        if not first.is_fresh or num_gradients <= self._job.scheme.delay:
            return []
        if not all(self._can_follow(gradient) for gradient in range(1, num)):
            return []
        self._workers = self._present()
        if not self._workers:
            return []
        try:
            self._leases = SequentialLeases(
                self._job.scheme, len(self._workers), self._num_micro_batches, num_gradients
            )
        except ValueError as error:
            return self._tell(f"{error}: speculation")
        self._keys.clear()
        self._counts.clear()
        told = self._tell(f"{named(self._job.scheme)}: rounds of {len(self._workers)} workers")
        return told + self._begin_round(self._leases, now_s)

    def _until_something_else(self) -> int:
        """Steps of the job until one begins with an evaluation, or there is none."""
        num, begun = 0, self._key(0).step
        while (step := self._key(num).step) < self._job.num_steps:
            if step > begun and self._job.every and step % self._job.every == 0:
                break
            num += 1
        return num

    def _can_follow(self, gradient: int) -> bool:
        """Whether nothing of a step was begun that comes after the first one."""
        lane, step = self._lane(gradient), self._key(gradient).step
        if lane.phase is Phase.UPDATING:
            return lane.state.step == step - 1
        return step >= self._job.num_steps or (lane.is_fresh and lane.state.step == step)

    def _trouble(self) -> str:
        """Why it cannot go on in rounds; empty if it can."""
        if self._workers != (now := self._present()):
            return f"{len(now)} workers are there, and {len(self._workers)} were"
        if leaving := self._leaving():
            return f"worker {min(leaving)} leaves"
        for gradient, key in self._keys.items():
            lane = self._lane(gradient)
            if lane.state.step != key.step:
                continue
            if lane.state.key != key or lane.has_questions:
                return f"step {key.step} of model {key.model} is computed again"
            if len(lane.counted) < self._counts[gradient]:
                return f"step {key.step} of model {key.model} has lost something that counted"
        return ""

    def _leave(self, reason: str) -> list[Order]:
        """On with plain turns. Who holds something may finish it."""
        self._leases, self._is_begun = None, False
        return self._tell(f"{reason}: steps take turns until one is about to begin")

    def _back_off(self, num_rounds: int) -> None:
        """Take turns, for longer each time that rounds end in vain: one may be slow for good."""
        self._pause = 1 if num_rounds > MAX_PAUSE else min(MAX_PAUSE, 2 * self._pause + 1)
        self._resume_at = self._base + num_rounds + self._pause

    def _tell(self, reason: str) -> list[Order]:
        """What is new."""
        before, self._told = self._told, reason
        return [(0, Note("scheduling", reason))] if reason != before else []

    # ----------------------------------------------------------------- a round

    def _begin_round(self, leases: SequentialLeases, now_s: float) -> list[Order]:
        """Lend what each worker is to compute, once the step that begins may."""
        lane, key = self._lane(leases.round), self._key(leases.round)
        if not lane.is_fresh or lane.state.step != key.step:
            if lane.phase is Phase.UPDATING or lane.awaits_opinions:
                return []
            return self._leave(f"step {key.step} of model {key.model} cannot begin")
        self._keys[leases.round], self._counts[leases.round] = lane.state.key, 0
        self._number += 1
        self._is_begun, self._begin_s, self._pace_s = True, now_s, math.inf
        orders: list[Order] = []
        for model in range(len(self._lanes)):
            orders += [(model, SaveRound(self._number)), (model, Recall())]
        self._sizes = []
        for place, worker in enumerate(self._workers):
            work = leases.work(place)
            self._sizes.append(len(work))
            for gradient, units in groupby(work, key=lambda unit: unit[0]):
                micro_batches = tuple(micro_batch for _, micro_batch in units)
                lend = Lend(worker, micro_batches, self._number)
                orders.append((self._key(gradient).model, lend))
        return orders

    def _count(self, leases: SequentialLeases) -> None:
        """Hear of what was granted, in whichever round it was lent."""
        for gradient, key in list(self._keys.items()):
            lane = self._lane(gradient)
            counted = lane.counted if lane.state.key == key else range(self._num_micro_batches)
            if len(counted) > self._counts[gradient]:
                self._counts[gradient] = len(counted)
                for micro_batch in counted:
                    leases.granted(gradient, micro_batch)
            if lane.state.step != key.step:  # it is committed: nothing more will come
                del self._keys[gradient], self._counts[gradient]

    def _is_at_end(self, leases: SequentialLeases, now_s: float) -> bool:
        answered = leases.answered
        if math.isinf(self._pace_s):
            done = [size for size, is_done in zip(self._sizes, answered, strict=True) if is_done]
            first = [size for size in done if size]
            if first or answered.all():
                self._pace_s = (now_s - self._begin_s) / min(first, default=1)
        if answered.all():
            return leases.may_end
        if math.isinf(self._pace_s):
            return False
        due_s = self._after(PATIENCE, answered)
        if now_s < due_s:
            self.due_s = due_s
            return False
        self.due_s = self._after(GIVE_UP, answered)
        return leases.may_end

    def _after(self, times: float, answered: Bools) -> float:
        """When who has not answered has taken so many times as long as the first, for as much."""
        late = [size for size, is_done in zip(self._sizes, answered, strict=True) if not is_done]
        usual_s = self._pace_s * max(late or self._sizes)
        return self._begin_s + max(times * usual_s, usual_s + FLOOR_S)

    # ------------------------------------------------------------------- lanes

    @property
    def _num_micro_batches(self) -> int:
        return self._job.num_micro_batches

    def _key(self, gradient: int) -> Key:
        """Which step of which model it is."""
        step, model = divmod(self._base + gradient, len(self._lanes))
        return Key(model, step, 0)

    def _lane(self, gradient: int) -> Node:
        return self._lanes[self._key(gradient).model]

    def _leaving(self) -> set[int]:
        """Those that are to leave, and are still connected."""
        there = set[int]().union(*(lane.connected for lane in self._lanes))
        return there & set(self._lanes[0].membership.leaving)

    def _present(self) -> tuple[int, ...]:
        """Members that all lanes are connected to."""
        there = set(self._lanes[0].membership.members)
        for lane in self._lanes:
            there &= lane.connected
        return tuple(sorted(there))


def position_of(lane: Node, model: int, num_models: int) -> int:
    """Of the step that a lane is to work on, in the order of the job's steps."""
    return step_of_job(model, lane.state.step + (lane.phase is Phase.UPDATING), num_models)
