"""The detector on a run's records: who is slow is named, who is not is left alone; what is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.contacts import OneContact
from actors.monitor import Monitor
from actors.pulses import Pulses
from actors.setup import JobSetup
from elastic.core.config import JobConfig
from elastic.core.protocol.messages import LinkCount, Pulse
from elastic.core.runs import RunFolder
from elastic.core.status import Status
from monitoring.actions import action_fields, taken_of
from monitoring.detection import MERGED_S, Detector
from monitoring.tally import Now
from policies.owning import SlowLink
from policies.steering import Remedy, Taken, undo
from policies.verdicts import Culprit, Kind, Link, Node, Verdict, Worker
from tests.fake_steps import NUM_WORKERS, event, healthy, step_line

DEADLINE_S = 20.0
NODE_OF = dict.fromkeys(range(NUM_WORKERS), 0)


def names(verdicts: Sequence[Verdict]) -> list[tuple[Kind, Any]]:
    return [one.name for one in verdicts]


@pytest.fixture
def detector() -> Detector:
    """Four workers and twenty steps in which nothing happens."""
    detector = Detector()
    for worker in range(NUM_WORKERS):
        detector.add("event", event("worker_joined", 0.0, worker), NODE_OF)
    for step in range(20):
        detector.add("step", step_line(step, healthy()), NODE_OF)
    assert detector.verdicts(20.0, 1) == []
    return detector


def test_half_as_slow_again_is_found_within_ten_steps_and_its_end_too(detector: Detector) -> None:
    for step in range(20, 30):
        detector.add("step", step_line(step, {**healthy(), 2: 1.5}), NODE_OF)
    (verdict,) = detector.verdicts(30.0, 1)
    assert verdict.name == (Kind.SLOW_COMPUTATION, Worker(2))
    assert 0.3 < verdict.evidence["excess_ratio"] < 0.7
    for step in range(30, 60):
        detector.add("step", step_line(step, healthy()), NODE_OF)
    assert detector.verdicts(60.0, 1) == []


def test_short_steps_are_looked_at_together(detector: Detector) -> None:
    for number in range(200):
        line = step_line(20 + number, {**healthy(), 2: 1.5})
        line["time_s"] = 20.0 + number / 50
        detector.add("step", line, NODE_OF)
    (verdict,) = detector.verdicts(30.0, 1)
    assert verdict.name == (Kind.SLOW_COMPUTATION, Worker(2))
    assert verdict.evidence["steps"] <= 200 / (50 * MERGED_S) + 20


def test_nothing_is_learned_of_a_step_that_is_no_step_like_the_others(detector: Detector) -> None:
    for step in range(20, 40):
        slow = step_line(step, {**healthy(), 2: 5.0})
        detector.add("evaluation", {"time_s": float(step)}, NODE_OF)
        detector.add("step", slow, NODE_OF)
        detector.add("step", {**slow, "attempt": 1}, NODE_OF)
    assert detector.verdicts(40.0, 1) == []


def exchanged(detector: Detector, step: int, busy_s: Mapping[int, float]) -> None:
    """A step of four hosts; `busy_s`: for how long each has been sending, to each of the others."""
    for node, sent_s in busy_s.items():
        links = [LinkCount(one, (step + 1) * 10_000_000, sent_s) for one in busy_s if one != node]
        detector.take(Pulse(node, step, links=tuple(links)), float(step))
    detector.add("step", step_line(step, healthy()), {one: one for one in busy_s})


@pytest.mark.parametrize("is_joining", [True, False])
def test_a_head_that_sends_all_parameters_to_who_joins_is_no_slow_sender(
    detector: Detector, is_joining: bool
) -> None:
    busy_s = dict.fromkeys(range(NUM_WORKERS), 0.0)
    for step in range(20, 110):
        if step == 50 and is_joining:
            detector.add("event", event("node_joining", 50.0), NODE_OF)
        slow = 50 <= step < 70
        detector.join(is_joining=slow and is_joining)
        busy_s = {one: busy_s[one] + (0.3 if slow and one == 0 else 0.1) for one in busy_s}
        exchanged(detector, step, busy_s)
        if detector.verdicts(float(step), 4):
            assert not is_joining, step
            assert Kind.SLOW_SENDER in {one.kind for one in detector.verdicts(float(step), 4)}
            return
    assert is_joining, "else it is one"


def slow_sender(detector: Detector) -> tuple[int, dict[int, float]]:
    """Node 0 of four sends slowly until there is a verdict: after how many steps, and seconds."""
    busy_s = dict.fromkeys(range(NUM_WORKERS), 0.0)
    for step in range(20, 110):
        busy_s = {one: busy_s[one] + (0.3 if step >= 50 and one == 0 else 0.1) for one in busy_s}
        exchanged(detector, step, busy_s)
        if (Kind.SLOW_SENDER, Node(0)) in names(detector.verdicts(float(step), 4)):
            return step + 1, busy_s
    raise AssertionError("no verdict")


@pytest.mark.parametrize("is_slow", [True, False])
def test_what_was_said_of_links_does_not_hold_while_a_node_joins_and_is_seen_afresh_then(
    detector: Detector, is_slow: bool
) -> None:
    """Else a node that never gets there keeps a verdict open for ever, and a host is drained."""
    begin, busy_s = slow_sender(detector)
    held = []
    for step in range(begin, begin + 150):
        detector.join(is_joining=step < begin + 50)
        busy_s = {one: busy_s[one] + (0.3 if is_slow and one == 0 else 0.1) for one in busy_s}
        exchanged(detector, step, busy_s)
        if detector.verdicts(float(step), 4):
            held.append(step - begin)
    if is_slow:
        assert 50 <= held[0] < 80
        assert held[-1] == 149, "and it is found again"
    else:
        assert held == []


def test_a_healthy_run_has_no_verdict() -> None:
    for seed in range(5):
        detector = Detector()
        for step in range(200):
            detector.add("step", step_line(step, healthy(), seed), NODE_OF)
            assert detector.verdicts(float(step), 1) == []


def test_a_hang_is_told_of_once_even_if_the_worker_is_gone_already(detector: Detector) -> None:
    detector.add("event", event("worker_hung", 20.0, 1, "no progress for 10.0 s"), NODE_OF)
    detector.add("event", event("worker_lost", 20.1, 1), NODE_OF)
    (verdict,) = detector.verdicts(20.2, 1)
    assert verdict.name == (Kind.HANG_OUTSIDE, Worker(1))
    assert "no progress for 10.0 s" in verdict.reason
    assert detector.verdicts(20.4, 1) == []


def test_a_node_whose_workers_die_again_and_again_flaps(detector: Detector) -> None:
    node_of = {one: one % 4 for one in range(100)}
    for number in range(5):
        detector.add("event", event("worker_lost", 30.0 + 10 * number, 4 * number), node_of)
    assert names(detector.verdicts(80.0, 4)) == [(Kind.FLAPPING, Node(0))]
    assert names(detector.verdicts(80.0, 1)) == []  # nobody to compare it with
    assert names(detector.verdicts(5000.0, 4)) == []


def test_a_host_that_comes_back_as_another_node_flaps_under_its_newest_number(
    detector: Detector,
) -> None:
    for number in range(5):
        detector.add(
            "event", event("worker_lost", 30.0 + 10 * number, number), {number: 3 + number}
        )
    assert names(detector.verdicts(80.0, 4)) == [], "each was lost once"
    detector.know({0: "a", 1: "b", 2: "c", **dict.fromkeys(range(3, 9), "d")})
    assert names(detector.verdicts(80.0, 4)) == [(Kind.FLAPPING, Node(8))]


def test_workers_that_are_lost_with_their_node_are_one_departure(detector: Detector) -> None:
    for number in range(8):
        detector.add("event", event("worker_lost", 30.0 + number / 100, number), {})
    assert detector.verdicts(31.0, 4) == []


def test_a_new_beginning_forgets(detector: Detector) -> None:
    for step in range(20, 32):
        detector.add("step", step_line(step, {**healthy(), 2: 1.5}), NODE_OF)
    assert detector.verdicts(32.0, 1)
    detector.add("event", event("job_resumed", 40.0), NODE_OF)
    assert detector.verdicts(40.0, 1) == []


# --- the thread of the coordinator ------------------------------------------------------------


class World:
    """A run folder that the test writes to, and a monitor that watches it."""

    def __init__(self, make_job: Callable[..., JobConfig], path: Path, **settings: Any) -> None:
        job = make_job(monitoring={"port": None, **settings})
        self.run = RunFolder(path)
        self.run.create()
        self.swapped: list[int] = []
        self.contacts = OneContact(path / "nobody")
        self._setup = JobSetup(job=job, run=self.run, run_id="x", secret=b"")
        self._time_s = 0.0
        self.monitor = self.make()

    def make(self) -> Monitor:
        self.pulses = Pulses(self.contacts, wanted=True)
        return Monitor(self._setup, self._now, self._event, self.swapped.append, self.pulses)

    def _now(self) -> Now:
        status = Status(phase="training", num_steps=9, run_dir="r", num_spare=1)
        return Now(status=status, node_of=NODE_OF, replicas=1, replicas_wanted=1, spares=(9,))

    def _event(self, kind: str, reason: str, worker: int | None = None, **more: Any) -> None:
        self.run.append_event({**event(kind, time.time(), worker, reason), **more})

    def write(self, steps: range, paces: Mapping[int, float]) -> None:
        for step in steps:
            self.run.append_metrics(step_line(step, paces))

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.run.read_events() if one["kind"] == kind]

    def await_told(self, kind: str) -> dict[str, Any]:
        begun_s = time.monotonic()
        while not (found := self.told(kind)):
            assert time.monotonic() - begun_s < DEADLINE_S, kind
            time.sleep(0.01)
        return found[-1]


@pytest.fixture
def slow(make_job: Callable[..., JobConfig], tmp_path: Path) -> Callable[..., World]:
    """A job with a slow worker, watched with these settings."""

    def make(**settings: Any) -> World:
        world = World(make_job, tmp_path, **settings)
        for worker in range(NUM_WORKERS):
            world.run.append_event(event("worker_joined", 0.0, worker))
        world.write(range(20), healthy())
        world.write(range(20, 40), {**healthy(), 3: 2.0})
        return world

    return make


def test_verdicts_and_what_would_be_done_are_events(slow: Callable[..., World]) -> None:
    world = slow()
    world.monitor.start()
    verdict = world.await_told("verdict")
    assert verdict["worker"] == 3
    assert verdict["reason"].startswith("slow computation: worker 3 computes")
    assert (verdict["verdict"]["kind"], verdict["verdict"]["culprit"]) == (
        "slow computation", "worker 3",
    )  # fmt: skip
    advice = world.await_told("advice")
    assert advice["reason"].startswith("would ")
    world.write(range(40, 80), healthy())
    assert world.await_told("verdict_ended")["verdict"] == {
        "kind": "slow computation", "culprit": "worker 3",
    }  # fmt: skip
    world.monitor.stop()
    assert len(world.told("verdict")) == len(world.told("advice")) == 1
    assert world.swapped == []


def test_it_acts_if_it_may(slow: Callable[..., World]) -> None:
    world = slow(steering="act")
    world.monitor._steering = replace(world.monitor._steering, patience_s=0.0)
    world.monitor.start()
    world.await_told("steered")
    begun_s = time.monotonic()
    while not world.swapped:
        assert time.monotonic() - begun_s < DEADLINE_S
        time.sleep(0.01)
    world.monitor.stop()
    world.monitor._thread.join()
    assert world.swapped[0] == 3
    num_done = len(world.told("steered"))
    world.monitor = world.make()  # the coordinator was restarted
    world.monitor._remember()
    assert len(world.monitor.undo("worker 3")) == num_done
    assert world.monitor.undo("worker 3") == []
    assert len(world.told("undone")) == num_done
    again = world.make()
    again._remember()
    assert all(one.undone for one in again._taken)
    assert len(again._taken) == num_done


def test_a_node_at_fault_is_avoided_then_drained_until_a_person_undoes_it(
    make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    """What is done about it survives the coordinator; what is avoided, as long as the verdict."""
    world = World(make_job, tmp_path, steering="act")
    node_of = {0: 0, 1: 1, 2: 2, 3: 3}
    sick = Verdict(
        kind=Kind.SLOW_SENDER, culprit=Node(2), since_step=3, confidence=0.9, reason="it is so"
    )
    world.monitor._tell([sick])
    world.monitor._steer([sick], node_of, [0])
    assert world.pulses.slow == (SlowLink(2, None, 16.0),)
    world.monitor._steering = replace(world.monitor._steering, patience_s=0.0)
    world.monitor._steer([sick], node_of, [0])
    assert (world.monitor.avoided, world.monitor.drained) == ({2}, {})
    world.monitor._steer([], node_of, [0])
    assert (world.monitor.avoided, world.pulses.slow) == (frozenset(), ())
    world.monitor._steer([sick], node_of, [0])
    assert world.monitor.drained == {2: "monitoring.steering: slow sender"}
    again = world.make()
    again._remember()
    assert again.drained == world.monitor.drained
    done = ["plan traffic around node 2", "start nothing more on node 2", "drain node 2"]
    assert again.undo("node 2") == done
    assert again.drained == {}
    assert world.swapped == []
    assert [one["action"]["num_workers"] for one in world.told("steered")] == [0, 0, 1]


def test_traffic_is_planned_around_a_slow_link_until_a_person_undoes_it(
    make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    world = World(make_job, tmp_path, steering="act")
    sick = Verdict(
        kind=Kind.SLOW_LINK,
        culprit=Link(1, 2),
        since_step=3,
        confidence=0.9,
        reason="it is so",
        evidence={"excess_ratio": 3.0},
    )
    world.monitor._tell([sick])
    for _ in range(2):
        world.monitor._steer([sick], {0: 0, 1: 1, 2: 2}, [])
        assert world.pulses.slow == (SlowLink(1, 2, 4.0),)
    assert world.monitor.undo("link 1 -> 2") == ["plan traffic around link 1 -> 2"]
    for _ in range(2):
        world.monitor._steer([sick], {0: 0, 1: 1, 2: 2}, [])
        assert world.pulses.slow == ()
    assert len(world.told("steered")) == len(world.told("undone")) == 1


def test_what_was_undone_holds_for_the_host_when_it_comes_back_as_another_node(
    make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    world = World(make_job, tmp_path, steering="act")
    undone = undo(Taken(time.time(), Remedy.AVOID, Node(2), Kind.SLOW_SENDER))
    for machine, expected in [("another", {3}), ("c", frozenset[int]())]:
        monitor = world.make()
        monitor._taken.append(undone)
        monitor._machine_of = {0: "a", 1: "b", 2: "c", 3: machine}
        sick = Verdict(
            kind=Kind.SLOW_SENDER, culprit=Node(3), since_step=3, confidence=0.9, reason="it is so"
        )
        monitor._tell([sick])
        monitor._steering = replace(monitor._steering, patience_s=0.0)
        for _ in range(2):  # traffic is planned around it first
            monitor._steer([sick], {0: 0, 1: 1, 3: 3}, [])
        assert monitor.avoided == expected
        monitor._steer([sick], {0: 0, 1: 1, 3: 3}, [])
        assert set(monitor.drained) == expected


def test_a_machine_that_flaps_is_drained_though_it_comes_back_as_another_node(
    make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    """What was said of it and done about it counts on: its time does not begin anew each time."""
    for machine, expected in [("another", set[int]()), ("c", {3})]:
        world = World(make_job, tmp_path, steering="act")
        monitor = world.monitor
        monitor._steering = replace(monitor._steering, patience_s=0.0)
        for node, others in [(2, "abc"), (3, ["a", "b", "c", machine])]:
            monitor._machine_of = dict(enumerate(others))
            flaps = Verdict(
                kind=Kind.FLAPPING, culprit=Node(node), since_step=3, confidence=0.9, reason="so"
            )
            monitor._tell([flaps])
            monitor._steer([flaps], {0: 0, 1: 1, 2: node}, [])
            assert node in monitor.avoided
        assert set(monitor.drained) == expected


@pytest.mark.parametrize("kind", ["job_started", "job_resumed"])
def test_where_a_job_begins_anew_nobody_is_steered_by_an_old_number(
    make_job: Callable[..., JobConfig], tmp_path: Path, kind: str
) -> None:
    world = World(make_job, tmp_path)
    drain = Taken(5.0, Remedy.DRAIN, Node(2), Kind.SLOW_SENDER, num_workers=1)
    world.run.tell("job_started", "9 steps")
    world.run.tell("steered", "drain node 2", action=action_fields(drain))
    world.monitor._remember()
    assert set(world.monitor.drained) == {2}
    world.run.tell(kind, "begins again")
    again = world.make()
    again._remember()
    assert again.drained == {}


@pytest.mark.parametrize("culprit", [Worker(3), Node(1), Link(0, 2)], ids=str)
def test_what_was_done_survives_its_event(culprit: Culprit) -> None:
    taken = Taken(5.0, Remedy.RESTART, culprit, Kind.SLOW_COMPUTATION, num_workers=1)
    assert taken_of({"time_s": 5.0, "action": action_fields(taken)}) == taken


def test_a_successor_tells_no_verdict_twice(slow: Callable[..., World]) -> None:
    world = slow()
    world.monitor.start()
    world.await_told("advice")
    world.monitor.stop()
    world.monitor._thread.join()
    world.monitor = world.make()
    world.monitor.start()
    world.write(range(40, 80), healthy())
    world.await_told("verdict_ended")
    world.monitor.stop()
    assert len(world.told("verdict")) == 1


def test_nothing_is_told_after_the_end_of_the_job(slow: Callable[..., World]) -> None:
    world = slow()
    world.run.append_event(event("job_finished", 50.0))
    world.monitor._begin()
    world.monitor._turn()
    assert world.told("verdict") == []


def test_detection_can_be_switched_off(slow: Callable[..., World]) -> None:
    world = slow(detect=False)
    world.monitor._begin()
    world.monitor._turn()
    assert world.told("verdict") == []
