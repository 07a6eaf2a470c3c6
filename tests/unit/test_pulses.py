"""How processes get on, as their counters tell: who hangs is named at once, who waits is not."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from actors.pulses import PULSE_S, Pulses
from elastic.core.protocol.messages import Look, Message, ProbedLink, Pulse, Report, Scale
from monitoring.detection import Detector
from monitoring.progress import Progress
from policies.owning import SlowLink
from policies.verdicts import Culprit, Kind, Node, Worker

STEP_S = 0.4
POLL_S = 0.05


class FakeContacts:
    """Nodes that answer when the test says so."""

    def __init__(self) -> None:
        self.reports: dict[int, Report | None] = {}
        self.pulses: deque[Pulse] = deque()
        self.probed: deque[ProbedLink] = deque()
        self.sent: list[tuple[int, Message]] = []

    def turn(self, wait_s: float) -> list[Scale]:
        return []

    def send(self, node: int, message: Message) -> None:
        self.sent.append((node, message))

    def close(self) -> None: ...


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def contacts() -> FakeContacts:
    contacts = FakeContacts()
    contacts.reports = {0: None, 1: None}
    return contacts


@pytest.fixture
def pulses(contacts: FakeContacts, clock: Clock) -> Pulses:
    return Pulses(contacts, wanted=True, clock=clock)


def test_a_node_is_asked_again_only_when_it_has_answered(
    contacts: FakeContacts, clock: Clock, pulses: Pulses
) -> None:
    pulses.turn()
    assert contacts.sent == [(0, Look()), (1, Look())]
    clock.now_s += 10 * PULSE_S
    contacts.pulses.append(Pulse(1, 5))
    pulses.turn()
    assert contacts.sent[2:] == [(1, Look())]
    assert pulses.take() == [(clock.now_s, Pulse(1, 5))]
    assert pulses.take() == []
    assert pulses.waiting == {0: 100.0, 1: clock.now_s}
    contacts.pulses.append(Pulse(1, 5))
    pulses.turn()
    assert len(contacts.sent) == 3, "not before it is time"


def test_every_question_says_over_which_links_less_is_to_go(
    contacts: FakeContacts, pulses: Pulses
) -> None:
    pulses.slow = (SlowLink(0, 1, 4.0),)
    pulses.turn()
    assert contacts.sent == [(node, Look((SlowLink(0, 1, 4.0),))) for node in (0, 1)]


def test_who_is_there_again_is_asked_anew(
    contacts: FakeContacts, clock: Clock, pulses: Pulses
) -> None:
    pulses.turn()
    contacts.reports = {1: None}
    pulses.turn()
    assert pulses.waiting == {1: 100.0}
    contacts.reports = {0: None, 1: None}
    pulses.turn()
    assert contacts.sent[2:] == [(0, Look())]


def test_nobody_is_asked_for_what_nobody_wants(contacts: FakeContacts) -> None:
    pulses = Pulses(contacts, wanted=False)
    pulses.turn()
    assert contacts.sent == []


# --- what is made of them ---------------------------------------------------------------------


class Job:
    """Two workers on each of two nodes, polled until the test looks; all go on by themselves."""

    def __init__(self) -> None:
        self.now_s, self.count = 0.0, 0
        self.nodes = {0, 1}
        self.stopped: set[int] = set()
        self.rests: dict[int, int] = {}
        self.silent: dict[int, float] = {}
        self.holding = dict.fromkeys(range(4), True)
        self._progress, self._detector = Progress(), Detector()

    def found(self, for_s: float) -> Iterator[tuple[float, set[tuple[Kind, Culprit]]]]:
        """What holds, after each poll."""
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s += POLL_S
            self.count += 1
            for node in self.nodes - self.silent.keys():
                counts = [
                    (one, 0 if one in self.stopped else self.rests.get(one, self.count))
                    for one in (2 * node, 2 * node + 1)
                ]
                holding = tuple(self.holding.items()) if node == 0 else None
                pulse = Pulse(node, 7, tuple(counts), holding)
                self._progress.take(pulse, self.now_s)
            view = self._progress.view(self.now_s, STEP_S, self.silent)
            self._detector.poll(view)
            self._progress.hung = self._detector.hung
            yield self.now_s, {one.name for one in self._detector.verdicts(self.now_s, 1)}

    def first(self, for_s: float) -> tuple[float, set[tuple[Kind, Culprit]]]:
        return next(((at_s, names) for at_s, names in self.found(for_s) if names), (0.0, set()))


@pytest.fixture
def job() -> Job:
    job = Job()
    assert job.first(5.0)[1] == set()
    return job


def test_a_worker_that_stops_is_named_within_three_steps_and_forgiven_when_it_goes_on(
    job: Job,
) -> None:
    begun_s = job.now_s
    job.stopped = {3}
    at_s, names = job.first(5.0)
    assert names == {(Kind.HANG_OUTSIDE, Worker(3))}
    assert at_s - begun_s <= 3 * STEP_S
    job.stopped = set()
    assert [names for _, names in job.found(0.1)][-1] == set()


HANGS = {(Kind.HANG_OUTSIDE, Worker(3))}


def test_it_hangs_until_it_moves_though_others_have_its_work(job: Job) -> None:
    job.stopped = {3}
    assert job.first(5.0)[1] == HANGS
    del job.holding[3]
    assert all(names == HANGS for _, names in job.found(5.0))
    job.holding[3] = True
    assert all(names == HANGS for _, names in job.found(5.0))
    job.stopped = set()
    assert [names for _, names in job.found(0.1)][-1] == set()


def test_it_hangs_though_the_observer_stood_still_itself(job: Job) -> None:
    job.stopped = {3}
    assert job.first(5.0)[1] == HANGS
    job.now_s += 60.0
    assert all(names == HANGS for _, names in job.found(5.0))
    job.now_s += 60.0
    job.stopped = set()
    assert [names for _, names in job.found(5.0)][-1] == set()


def test_it_hangs_no_more_once_its_node_is_gone(job: Job) -> None:
    job.stopped = {3}
    assert job.first(5.0)[1] == HANGS
    job.nodes = {0}
    del job.holding[3]  # others are given it
    assert [names for _, names in job.found(10.0)][-1] == set()


def test_who_moves_between_two_late_looks_and_then_rests_does_not_hang(job: Job) -> None:
    job.stopped = {3}
    assert job.first(5.0)[1] == HANGS
    del job.holding[3]
    job.stopped = set()
    job.now_s += 60.0
    next(job.found(5.0))
    job.now_s += 60.0
    next(job.found(5.0))
    job.rests = {3: job.count}
    assert all(names == set() for _, names in job.found(20.0))


def test_who_holds_no_work_may_be_silent(job: Job) -> None:
    job.stopped = {3}
    del job.holding[3]
    assert job.first(5.0)[1] == set()
    job.holding[3] = True
    begun_s = job.now_s
    at_s, names = job.first(5.0)
    assert names == {(Kind.HANG_OUTSIDE, Worker(3))}
    assert 2 * STEP_S < at_s - begun_s <= 3 * STEP_S


def test_who_has_completed_nothing_yet_may_be_compiling(job: Job) -> None:
    job.stopped = {3}
    job.holding[3] = False
    assert job.first(5.0)[1] == set()


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_does_not_answer_is_named_and_its_workers_are_not(job: Job, node: int) -> None:
    job.silent = {node: job.now_s}
    job.stopped = {0, 1, 2, 3} if node == 0 else {2, 3}  # they wait for it
    at_s, names = job.first(5.0)
    victims = {(Kind.HANG_OUTSIDE, Worker(one)) for one in (2 * node, 2 * node + 1)}
    assert (Kind.HANG_OUTSIDE, Node(node)) in names
    assert not names & victims
    assert at_s - job.silent[node] <= 0.5 + 3 * STEP_S


def test_after_the_observer_stood_still_itself_nothing_is_said_at_once(job: Job) -> None:
    job.stopped = {3}
    job.now_s += 60.0
    at_s, names = job.first(5.0)
    assert names == {(Kind.HANG_OUTSIDE, Worker(3))}
    assert at_s > 65.0 + 2 * STEP_S
