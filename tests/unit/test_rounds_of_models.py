"""Several models trained in rounds of a sequential code: real workers' protocol, virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from elastic.core.protocol import aggregator as agg
from elastic.core.protocol import events as ev
from elastic.core.protocol import worker as wrk
from elastic.core.protocol.messages import (
    Admit,
    Key,
    Lease,
    Manifest,
    Membership,
    Message,
    Outcome,
    Report,
    State,
)
from elastic.core.protocol.node import Node
from elastic.core.protocol.sequential import SequentialRules
from elastic.core.protocol.turns import Actions, Turns
from policies.auditing import Audits
from policies.coding.m_sgc import MSgc
from policies.coding.sr_sgc import SrSgc
from policies.scheduling import Shares
from tests.unit.test_turns import outcome

LATENCY_S = 0.0005
UPDATE_S = 0.002
COST_S = 0.1
"""Of a micro-batch."""


@dataclass
class FakeWorker:
    """A worker's protocol, and what it computes; `slowness` multiplies what it takes."""

    protocol: wrk.Worker
    slowness: Callable[[], float] = lambda: 1.0
    alive: bool = True
    waiting: list[Callable[[], None]] | None = None
    """While it is stopped (SIGSTOP): what it does once it is continued."""
    doing: Lease | None = None
    turn: int = 0
    halves: dict[int, list[Counter[tuple[Key, int]]]] = field(default_factory=dict)
    computed: int = 0


class World:
    """Lanes, workers and the memory that they share."""

    def __init__(
        self,
        scheme: SrSgc | MSgc | None,
        *,
        models: int,
        workers: int,
        micro_batches: int,
        steps: int,
        every: int = 0,
        audits: Audits | None = None,
        first_steps: int = 1,
    ) -> None:
        self.now_s, self.order = 0.0, itertools.count()
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.num, self.models = micro_batches, models
        self.membership = Membership(1, tuple(range(workers)), next_worker=workers)
        self.rules = agg.Rules(
            num_steps=steps,
            num_micro_batches=micro_batches,
            num_chunks=1,
            evaluate_every=every,
            num_evaluated=3 if every else 0,
            scheduling=Shares(),
            audits=audits,
        )
        exponents = (10,) if first_steps else None
        states = [
            State(step=first_steps, attempt=0, exponents=exponents, model=model)
            for model in range(models)
        ]
        known = [agg.Recovered(one, self.membership) for one in states]
        self.asked = SequentialRules(scheme, micro_batches, steps, every) if scheme else None
        self.turns = Turns([Node(0, self.rules, one) for one in known], self.asked)
        self.states = states
        self.manifests: list[dict[int, Manifest]] = [{} for _ in range(models)]
        self.rows: list[dict[int, Outcome]] = [{} for _ in range(models)]
        self.epoch, self.is_down = 0, False
        self.dies_after = -1
        """So many actions from now on are carried out before the aggregator dies."""
        self.words = [state.key.word for state in states]
        self.done: list[dict[int, int]] = [{} for _ in range(models)]
        self.round = 0
        self.fakes: dict[int, FakeWorker] = {}
        self.committed: list[tuple[int, int]] = []
        self.notes: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.finished: set[int] = set()
        self.hung_s: dict[int, float] = {}
        self.fails: Key | None = None
        """Of this step the loss is NaN."""
        self.gone_s: dict[int, float] = {}
        self.handle(ev.Started())
        self.handle(ev.Received(None, Report(0, Membership(), ())))
        for worker in range(workers):
            self.join(worker)

    # what happens

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (self.now_s + seconds, next(self.order), what))

    def run(self, until_s: float = 600.0) -> None:
        while len(self.finished) < self.models:
            tick_s = math.inf if self.is_down else max(self.turns.next_tick_s, self.now_s)
            if not self.heap or self.heap[0][0] > tick_s:
                self.now_s = tick_s + 1e-6
                assert self.now_s < until_s, (self.notes, self.committed[-5:])
                self.handle(ev.Tick(self.progress()))
                continue
            self.now_s, _, what = heapq.heappop(self.heap)
            assert self.now_s < until_s, (self.notes, self.committed[-5:])
            what()

    def progress(self) -> dict[int, int]:
        """Of each worker: it changes unless it is stopped, or dead."""
        return {
            one: int(self.now_s * 100) if fake.alive and fake.waiting is None else 0
            for one, fake in self.fakes.items()
        }

    def stop(self, worker: int) -> None:
        """SIGSTOP: its connection stays open."""
        self.fakes[worker].waiting = []

    def join(self, worker: int) -> None:
        self.fakes[worker] = FakeWorker(wrk.Worker(worker, worker))
        self.tell(worker, wrk.Connected())

    def admit(self, *members: int, leaving: tuple[int, ...] = ()) -> None:
        self.membership = replace(
            self.membership,
            generation=self.membership.generation + 1,
            members=members,
            leaving=leaving,
        )
        self.handle(ev.Received(None, Admit(self.membership)))

    def kill(self, worker: int) -> None:
        self.fakes[worker].alive = False
        self.handle(ev.Disconnected(worker))

    # the aggregator

    def handle(self, event: ev.Event, model: int | None = None) -> None:
        if not self.is_down:
            self.carry_out(self.turns.handle(event, self.now_s, model))

    def of_now(self, what: Callable[[], None]) -> Callable[[], None]:
        """What comes to nothing if the aggregator dies before."""
        epoch = self.epoch
        return lambda: what() if epoch == self.epoch else None

    def die(self) -> None:
        """The aggregator's process ends; what it has sent still comes."""
        self.epoch, self.is_down = self.epoch + 1, True
        for worker in self.fakes:
            self.later(LATENCY_S, partial(self.tell, worker, wrk.Disconnected()))
        self.later(0.05, self.take_over)

    def take_over(self) -> None:
        """A successor knows what is in shared memory."""
        known = []
        for state, manifests, rows in zip(self.states, self.manifests, self.rows, strict=True):
            mine = [one for one in manifests.values() if one.key == state.key]
            counted = {one: rows[one] for manifest in mine for one in manifest.micro_batches}
            known.append(agg.Recovered(state, self.membership, dict(manifests), counted))
        asked = replace(self.asked, first_round=self.round) if self.asked else None
        self.turns = Turns([Node(0, self.rules, one) for one in known], asked)
        self.is_down = False
        self.handle(ev.Started())
        self.handle(ev.Received(None, Report(0, Membership(), ())))
        for worker in self.fakes:
            self.later(LATENCY_S, partial(self.tell, worker, wrk.Connected()))

    def keep(self, model: int, action: ev.Action) -> None:
        """Shared memory outlives the aggregator."""
        match action:
            case ev.SaveState(state):
                self.states[model] = state
            case ev.OpenSlot(worker):
                self.manifests[model].setdefault(worker, Manifest(Key(model, 0, 0)))
            case ev.SaveManifest(worker, manifest):
                self.manifests[model][worker] = manifest
            case ev.SaveRow(_, row):
                self.rows[model][row.micro_batch] = row
            case ev.DropSlot(worker):
                del self.manifests[model][worker]

    def carry_out(self, actions: Actions) -> None:
        for model, action in actions:
            if self.dies_after == 0:
                self.dies_after = -1
                self.die()
                return
            self.dies_after -= 1
            self.keep(model, action)  # type: ignore[arg-type]
            match action:
                case ev.Send(worker, message):
                    self.later(LATENCY_S, partial(self.tell, worker, message))
                case ev.SaveState(state):
                    self.words[model] = state.key.word
                case ev.MarkDone(micro_batches, key):
                    self.done[model].update(dict.fromkeys(micro_batches, key.word))
                case ev.MarkUndone(micro_batches):
                    self.done[model].update(dict.fromkeys(micro_batches, 0))
                case ev.SaveRound(number):
                    assert number > self.round or model
                    self.round = number
                case ev.Update():
                    self.check_sum(model, action)
                    answer = ev.Updated(0.5, round=action.round)
                    self.later(UPDATE_S, self.of_now(partial(self.handle, answer, model)))
                case ev.Committed():
                    self.committed.append((model, action.step))
                    self.kinds.update(one[-1] for one in action.work)
                    self.kinds["unaudited"] += action.num_unaudited
                case ev.Evaluated():
                    self.kinds["evaluation"] += 1
                case ev.HangUp(worker):
                    self.gone_s.setdefault(worker, self.now_s)
                case ev.Note():
                    self.notes.append(action.reason)
                    if action.kind == "worker_hung" and action.worker is not None:
                        self.hung_s.setdefault(action.worker, self.now_s)
                case ev.Finish():
                    self.finished.add(model)
                    self.later(0.0, self.of_now(partial(self.handle, ev.Finished(), model)))
        self.poll()

    def check_sum(self, model: int, update: ev.Update) -> None:
        """Each micro-batch of the step is in the slots once."""
        key = self.turns.lanes[model].state.key
        total: Counter[tuple[Key, int]] = Counter()
        for worker, half in update.slots:
            total += self.fakes[worker].halves[model][half]
        assert total == Counter((key, one) for one in range(self.num)), (key, total)

    # workers

    def poll(self) -> None:
        """Who computes what does not matter any more sees it between two layers."""
        for worker, fake in self.fakes.items():
            if fake.doing is not None and self.is_past(fake.doing):
                self.later(COST_S / 20, partial(self.abandon, worker, fake.turn))

    def is_past(self, lease: Lease) -> bool:
        (one,), word = lease.micro_batches, lease.key.word
        is_done = not lease.audits and self.done[lease.key.model].get(one) == word
        is_over = lease.round not in (0, self.round)
        return is_done or is_over or self.words[lease.key.model] != word

    def abandon(self, worker: int, turn: int) -> None:
        fake = self.fakes[worker]
        if self.is_stopped(worker, partial(self.abandon, worker, turn)):
            return
        if fake.turn == turn and fake.doing is not None:
            lease, fake.doing, fake.turn = fake.doing, None, turn + 1
            self.tell(worker, wrk.Abandoned(lease))

    def tell(self, worker: int, event: wrk.Event | Message) -> None:
        fake = self.fakes[worker]
        if not fake.alive or self.is_stopped(worker, partial(self.tell, worker, event)):
            return
        actions = fake.protocol.handle(event, self.words, self.round)  # type: ignore[arg-type]
        for action in actions:
            match action:
                case wrk.Send(message):
                    received = ev.Received(worker, message)
                    self.later(LATENCY_S, self.of_now(partial(self.hear, worker, received)))
                case wrk.Exit():
                    fake.alive = False
                    self.handle(ev.Disconnected(worker))
                case wrk.Compute(lease):
                    fake.doing, fake.turn = lease, fake.turn + 1
                    seconds = COST_S * fake.slowness()
                    self.later(seconds, partial(self.computed, worker, lease, fake.turn))
                    if self.is_past(lease):
                        self.later(0.0, partial(self.abandon, worker, fake.turn))
                case wrk.Encode(lease, half, base):
                    halves = fake.halves.setdefault(lease.key.model, [Counter(), Counter()])
                    sums = Counter() if base is None else halves[base].copy()
                    sums[lease.key, lease.micro_batches[0]] += 1
                    halves[half] = sums
                    self.later(0.0, partial(self.tell, worker, wrk.Encoded()))

    def is_stopped(self, worker: int, what: Callable[[], None]) -> bool:
        """Whether that has to wait."""
        waiting = self.fakes[worker].waiting
        if waiting is None:
            return False
        waiting.append(what)
        return True

    def hear(self, worker: int, received: ev.Received) -> None:
        if self.fakes[worker].alive:
            self.handle(received)

    def computed(self, worker: int, lease: Lease, turn: int) -> None:
        fake = self.fakes[worker]
        if self.is_stopped(worker, partial(self.computed, worker, lease, turn)):
            return
        if fake.turn == turn and fake.alive:
            fake.doing, fake.computed = None, fake.computed + 1
            loss = float("nan") if lease.key == self.fails else 1.0
            self.tell(worker, wrk.Computed(lease, (outcome(lease.micro_batches[0], loss),)))


SCHEMES: dict[str, tuple[SrSgc | MSgc, int]] = {
    "sr_sgc": (SrSgc(burst=1, window=2, distinct=2), 8),
    "sr_sgc of two": (SrSgc(burst=2, window=3, distinct=2), 9),
    "m_sgc": (MSgc(burst=1, window=2, distinct=1), 12),
    "m_sgc of four": (MSgc(burst=1, window=2, distinct=4), 8),
    "m_sgc coded": (MSgc(burst=1, window=2, distinct=2, inner="coded"), 16),
    "m_sgc longer": (MSgc(burst=1, window=3, distinct=1), 10),
}


def world(name: str, *, steps: int = 8, models: int = 4, **more: object) -> World:
    scheme, micro_batches = SCHEMES[name]
    return World(
        scheme,
        models=models,
        workers=4,
        micro_batches=micro_batches,
        steps=steps,
        **more,  # type: ignore[arg-type]
    )


def all_steps(made: World, steps: int) -> None:
    first = 1 if made.committed[0][1] == 1 else 0
    wanted = sorted((model, step) for model in range(made.models) for step in range(first, steps))
    assert sorted(made.committed) == wanted


@pytest.mark.parametrize("name", SCHEMES)
def test_all_steps_are_done_in_rounds_where_nobody_is_late(name: str) -> None:
    made = world(name)
    made.run()
    all_steps(made, 8)
    assert len(made.notes) == 1
    assert "rounds of 4 workers" in made.notes[0]
    assert made.round == 7 * 4 - 1, "the first step begins with the first worker"
    assert made.kinds["granted"] == 7 * 4 * made.num


@pytest.mark.parametrize("name", SCHEMES)
def test_a_straggler_of_a_round_is_not_waited_for(name: str) -> None:
    """A worker takes twenty times as long, 2 s, in three rounds that end without it: its late work
    is given up, and it begins the next round with the others."""
    made, calm = world(name), world(name)
    made.fakes[2].slowness = lambda: 20.0 if made.round in (5, 15, 20) else 1.0
    made.run()
    calm.run()
    all_steps(made, 8)
    assert len(made.notes) == 1, made.notes
    assert made.now_s < calm.now_s + 3 * 0.7


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_each_micro_batch_counts_once(seed: int) -> None:
    """Random schemes, delays, deaths and joins, with their seed."""
    dice = random.Random(seed)
    name = dice.choice(sorted(SCHEMES))
    every = dice.choice((0, 0, 3))
    audits = Audits(probability=0.1, seed=seed) if dice.random() < 0.3 else None
    made = world(
        name,
        models=dice.choice((3, 4, 6)) if "longer" not in name else 4,
        every=every,
        audits=audits,
        first_steps=dice.choice((0, 1)),
    )
    rate, factor = dice.choice((0.0, 0.02, 0.2)), dice.choice((3.0, 50.0))
    slowness = lambda: factor if dice.random() < rate else dice.uniform(0.9, 1.1)  # noqa: E731
    for fake in made.fakes.values():
        fake.slowness = slowness
    if dice.random() < 0.5:
        made.later(dice.uniform(0, 8), partial(lose_and_replace, made, dice.randrange(4), slowness))
    made.run()
    all_steps(made, 8)
    assert made.round > 0 or made.notes


def lose_and_replace(made: World, worker: int, slowness: Callable[[], float]) -> None:
    made.kill(worker)
    made.later(0.5, partial(replace_by, made, worker, 4, slowness))


def replace_by(made: World, old: int, new: int, slowness: Callable[[], float]) -> None:
    made.admit(*(one for one in (*range(4), new) if one != old))
    made.join(new)
    made.fakes[new].slowness = slowness


def test_after_a_death_the_scheme_begins_anew() -> None:
    made = world("m_sgc of four", steps=12)
    made.later(2.0, partial(lose_and_replace, made, 1, lambda: 1.0))
    made.run()
    all_steps(made, 12)
    assert sum("rounds of 4 workers" in one for one in made.notes) == 2, made.notes
    assert any("3 workers are there, and 4 were" in one for one in made.notes)
    assert any("m_sgc" in one and "with 3 workers" in one for one in made.notes), made.notes


def test_evaluations_are_made_between_rounds() -> None:
    made = world("m_sgc", steps=7, every=3, first_steps=0)
    made.run()
    all_steps(made, 7)
    assert made.kinds["evaluation"] == 4 * 3, "at 3, at 6, and at the end"
    assert made.round > 0


def test_what_is_audited_is_complete_once_another_has_said_the_same() -> None:
    made = world("sr_sgc", audits=Audits(probability=0.2, seed=1))
    made.run()
    all_steps(made, 8)
    assert made.kinds["audited"] > 20


def test_more_stragglers_than_the_code_withstands_are_helped() -> None:
    """Three of four stand still for good: the rounds are left, and the fourth does all of it."""
    made = world("m_sgc of four", steps=4)

    def stand_still() -> None:
        for worker in (1, 2, 3):
            made.fakes[worker].slowness = lambda: 1e6

    made.later(1.0, stand_still)
    made.run(until_s=3000.0)
    all_steps(made, 4)
    assert any("more straggle than it withstands" in one for one in made.notes), made.notes


@pytest.mark.parametrize("name", SCHEMES)
def test_who_is_slow_for_good_is_waited_for_ever_less_often(name: str) -> None:
    """With it rounds of m_sgc end in vain; then steps take turns, for longer each time."""
    made, calm = world(name, steps=24), world(name, steps=24)

    def stand_still() -> None:
        made.fakes[2].slowness = lambda: 1e6

    made.later(1.0, stand_still)
    made.run(until_s=3000.0)
    calm.run()
    all_steps(made, 24)
    assert len(made.notes) <= 2 * 6 + 1, made.notes
    assert made.now_s < 2.5 * calm.now_s, "of three workers 1.5 times that"


@pytest.mark.parametrize("name", SCHEMES)
def test_who_is_late_at_last_is_helped(name: str) -> None:
    """Nobody else has anything to do in the rounds after the last step has begun."""
    made, calm = world(name, steps=3), world(name, steps=3)
    made.fakes[2].slowness = lambda: 1e6 if made.round >= 8 else 1.0
    made.run(until_s=3000.0)
    calm.run()
    all_steps(made, 3)
    assert made.now_s < calm.now_s + 3.0


@pytest.mark.parametrize("name", [None, *SCHEMES])
def test_who_is_stopped_is_named_whatever_it_is_lent(name: str | None) -> None:
    """Its connection stays, and rounds end without it: nothing that is said to it is an answer."""
    scheme, num = SCHEMES[name or "sr_sgc"]
    made = World(scheme if name else None, models=4, workers=4, micro_batches=num, steps=30)
    made.later(3.0, partial(made.stop, 2))
    made.run(until_s=3000.0)
    all_steps(made, 30)
    assert set(made.hung_s) == {2}
    assert made.hung_s[2] < 3.0 + 10.0 + 3.0, "the limit is 10 s, and it may have been idle"


@pytest.mark.parametrize("name", SCHEMES)
def test_who_is_only_late_is_not_named(name: str) -> None:
    made = world(name, steps=30)
    made.fakes[2].slowness = lambda: 50.0
    made.run(until_s=3000.0)
    all_steps(made, 30)
    assert not made.hung_s


@pytest.mark.parametrize("slowness", [1.0, 8.0])
@pytest.mark.parametrize("leaves_s", [0.7, 2.0, 3.1])
def test_who_leaves_is_dismissed_before_rounds_begin_again(
    leaves_s: float, slowness: float
) -> None:
    scheme, _ = SCHEMES["sr_sgc"]
    made = World(scheme, models=4, workers=5, micro_batches=24, steps=12)
    made.fakes[4].slowness = lambda: slowness
    made.later(leaves_s, partial(made.admit, 0, 1, 2, 3, leaving=(4,)))
    made.run()
    all_steps(made, 12)
    held_s = 10 * COST_S
    """It may finish the two parts of five that it holds; others do so if it is slow."""
    assert 0 <= made.gone_s[4] - leaves_s < held_s + 2 * COST_S * slowness, made.notes
    assert "rounds of 4 workers" in made.notes[-1], made.notes


@pytest.mark.parametrize(
    ("micro_batches", "slowness"),
    [(64, {2: 3.7, 3: 3.06}), (32, {2: 3.65, 3: 2.85})],
    ids=["64", "32"],
)
def test_who_has_the_most_to_do_may_take_the_longest(
    micro_batches: int, slowness: dict[int, float]
) -> None:
    """After two were late in one round, as the code withstands, they have four times as much to do
    in the next one as the first to answer; nobody is late in that."""
    scheme, _ = SCHEMES["sr_sgc"]
    made = World(scheme, models=4, workers=4, micro_batches=micro_batches, steps=4)
    for worker, factor in slowness.items():
        made.fakes[worker].slowness = lambda factor=factor: factor if made.round == 5 else 1.0
    made.run()
    all_steps(made, 4)
    assert len(made.notes) == 1, made.notes


@pytest.mark.parametrize("name", SCHEMES)
def test_after_a_model_has_failed_the_others_take_turns_and_that_is_said(name: str) -> None:
    made = world(name)
    made.fails = Key(1, 4, 0)
    made.run()
    steps = {model: range(1, 4 if model == 1 else 8) for model in range(4)}
    assert sorted(made.committed) == [(model, one) for model in steps for one in steps[model]]
    assert made.notes[-1] == "model 1 has failed: steps take turns", made.notes


@pytest.mark.parametrize("seed", range(40))
def test_a_successor_goes_on_wherever_the_aggregator_dies(seed: int) -> None:
    """Between any two actions, up to four times; a worker may be stopped for good, or leave."""
    dice = random.Random(seed)
    name = dice.choice(sorted(SCHEMES))
    made = world(
        name, steps=8, audits=Audits(probability=0.05, seed=seed) if dice.random() < 0.3 else None
    )
    for fake in made.fakes.values():
        fake.slowness = lambda: 6.0 if dice.random() < 0.1 else dice.uniform(0.9, 1.1)
    for _ in range(4):
        made.later(dice.uniform(0, 6), partial(setattr, made, "dies_after", dice.randrange(30)))
    stops, leaves = dice.random() < 0.3, dice.random() < 0.3
    if stops:
        made.later(dice.uniform(0.5, 5), partial(made.stop, 3))
    if leaves:
        made.later(dice.uniform(0.5, 5), partial(made.admit, 1, 2, 3, leaving=(0,)))
    made.run(until_s=3000.0)
    assert made.epoch > 0
    assert [state.step for state in made.states] == [8] * 4
    assert set(made.hung_s) <= {3}
    assert not leaves or not made.fakes[0].alive, "it was dismissed"
