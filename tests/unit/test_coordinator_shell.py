"""The coordinator's process: its node is taken away, another one acts as well. No Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import cast

import pytest

from actors import coordinator
from actors.channel import Channel, accept, listen
from actors.coordinator import CoordinatorShell
from actors.listener import Listener
from actors.mesh import COORDINATOR, Address, Mesh
from actors.outages import Outage, insist
from actors.preemption import NodeWatch
from actors.processes import Ended
from actors.setup import JobSetup
from elastic.core.config import JobConfig
from elastic.core.errors import ClusterError, PreemptedError
from elastic.core.protocol.handshake import Credentials
from elastic.core.protocol.messages import Admit, Membership, Report, Stop
from elastic.core.runs import RunFolder
from policies.preemption import Notice
from policies.preflight import Probe
from tests.fake_steps import NUM_WORKERS, event, healthy, step_line

STEP_S = 10.0
DEADLINE_S = 20.0


class NoProcesses:
    """Takes every wish, and starts nothing."""

    def look(self, num_nodes: int, former: Sequence[int]) -> None: ...

    def known(self, role: str) -> Mapping[int, Ended | None]:
        return {}

    def homes(self, role: str) -> Mapping[int, int]:
        return {}

    def nodes(self) -> Sequence[int]:
        return (0,)

    def machines(self) -> Mapping[int, str]:
        return {}

    def addresses(self) -> Mapping[int, Address]:
        return {}

    def exporters(self) -> Mapping[int, Address]:
        return {}

    def ending(self) -> Mapping[int, Notice]:
        return {}

    def probes(self) -> Mapping[int, Probe]:
        return {}

    def probe_again(self, worker: int) -> None: ...

    def claim(self, generation: int, membership: bytes) -> bytes | None:
        return None

    def start(self, role: str, number: int, node: int) -> None: ...

    def kill(self, role: str, number: int) -> None: ...

    def avoid(self, node: int, reason: str) -> None: ...

    def allow(self, node: int) -> None: ...

    def lost(self, node: int) -> None: ...

    def held(self) -> Mapping[str, str]:
        return {}

    def forgive(self) -> None: ...

    def ask(self, num_hosts: int) -> None: ...

    def clear(self) -> None: ...

    def forget(self) -> None: ...


class FakeWatch:
    """Says what the test says."""

    def __init__(self) -> None:
        self.said: Notice | None = None
        self.broken: dict[str, str] = {}
        self.is_watching = False

    def start(self) -> None:
        self.is_watching = True

    def stop(self) -> None:
        self.is_watching = False

    def notice(self) -> Notice | None:
        return self.said

    def problems(self) -> dict[str, str]:
        return self.broken


@dataclass
class World:
    """A coordinator whose aggregator is the test."""

    shell: CoordinatorShell
    watch: FakeWatch
    run: RunFolder
    channel: Channel
    stops: list[Stop] = field(default_factory=list)

    def kinds(self) -> list[str]:
        """Of what is told about notices."""
        kinds = (event["kind"] for event in self.run.read_events())
        return [kind for kind in kinds if kind.startswith("preempt")]

    def next_stop(self, *, at_once: bool) -> Stop:
        """Read until the coordinator asks to stop in that way."""
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < DEADLINE_S:
            wait([self.channel], 1.0)
            while (message := self.channel.receive()) is not None:
                if isinstance(message, Stop) and message.at_once == at_once:
                    return message
        raise AssertionError("no such stop")

    def finish(self, step: int) -> BaseException | None:
        """Say that the job has ended at `step`; how the coordinator sees it."""
        self.channel.send(Report(step, Membership(), connected=(), finished=True))
        begun_s = time.monotonic()
        while self.shell.status().phase != "done":
            assert time.monotonic() - begun_s < DEADLINE_S
            wait([], 0.005)
        return self.shell.failure()


@pytest.fixture
def world(tmp_path: Path, make_job: Callable[..., JobConfig]) -> Iterator[World]:
    run, job = RunFolder(tmp_path / "run"), make_job(name=f"taken-{os.getpid()}", steps=10)
    run.create()
    for step in range(3):
        run.append_metrics({**step_line(step, healthy()), "step_s": STEP_S})
    setup = JobSetup(job=job, run=run, run_id="12ab", secret=bytes(32))
    store, watch = setup.open_store(), FakeWatch()
    shell = CoordinatorShell(setup, NoProcesses(), cast(NodeWatch, watch))
    store.create()
    listener = listen(store.path / "socket")
    shell.start()
    wait([listener], DEADLINE_S)
    channel = accept(listener)
    channel.send(Report(3, Membership(), connected=()))
    world = World(shell, watch, run, channel)
    yield world
    if shell.status().phase not in ("done", "failed"):
        world.finish(10)
    listener.close()
    channel.close()
    store.close()
    store.remove()


def test_the_step_is_finished_and_given_up_if_time_runs_out(world: World) -> None:
    now_s = time.time()
    world.watch.said = Notice("AWS will terminate this node", now_s + 120)
    stop = world.next_stop(at_once=False)
    assert stop.reason.startswith("AWS will terminate this node in 1")
    world.watch.said = Notice("AWS will terminate this node", now_s + STEP_S)
    world.next_stop(at_once=True)
    world.watch.said = None  # what was begun is not taken back
    failure = world.finish(3)
    assert isinstance(failure, PreemptedError)
    assert "a step needs 22.0 s: stopped at step 3 of 10" in str(failure)
    assert f"elastic resume {world.run.path}" in str(failure)
    assert world.kinds() == ["preempted", "preempted"]
    assert not world.watch.is_watching


def test_a_job_that_ends_all_the_same_is_no_failure(world: World) -> None:
    world.watch.said = Notice("Ray drains this node")
    world.next_stop(at_once=False)
    assert world.finish(10) is None


def test_what_may_come_or_cannot_be_heard_is_told_once(world: World) -> None:
    world.watch.said = Notice("AWS recommends to leave this node", certain=False)
    world.watch.broken = {"aws": "no route"}
    begun_s = time.monotonic()
    while len(world.kinds()) < 2 and time.monotonic() - begun_s < DEADLINE_S:
        wait([], 0.005)
    assert world.finish(4) is None
    assert sorted(world.kinds()) == ["preemption_possible", "preemption_unwatched"]


def test_who_is_slow_is_told_with_a_verdict_that_others_can_read(world: World) -> None:
    run = world.run
    for worker in range(NUM_WORKERS):
        run.append_event(event("worker_joined", 0.0, worker))
    for step in range(40):
        run.append_metrics(step_line(step, {**healthy(), 2: 2.0 if step > 15 else 1.0}))
    begun_s = time.monotonic()
    while not (told := [one for one in run.read_events() if one["kind"] == "verdict"]):
        assert time.monotonic() - begun_s < DEADLINE_S
        wait([], 0.005)
    assert told[0]["worker"] == 2
    assert told[0]["verdict"]["culprit"] == "worker 2"
    assert world.finish(4) is None


# --- several nodes ---------------------------------------------------------------------------


@dataclass
class ManyProcesses(NoProcesses):
    """Two nodes with an aggregator on each. Generations are claimed as the test says."""

    places: dict[int, Address]
    claimed: dict[int, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    raises: set[str] = field(default_factory=set)
    """What Ray's GCS does not answer now."""
    is_deaf: bool = False
    """It does what it is asked, and raises all the same."""

    def _ask(self, what: str) -> None:
        if what in self.raises:
            self.asked.append(f"{what} raises")
            raise ClusterError("Ray's GCS does not answer: RpcError: failed to connect")

    def look(self, num_nodes: int, former: Sequence[int]) -> None:
        self._ask("look")

    def known(self, role: str) -> Mapping[int, Ended | None]:
        return dict.fromkeys(self.places) if role == "aggregator" else {}

    def homes(self, role: str) -> Mapping[int, int]:
        return {node: node for node in self.places} if role == "aggregator" else {}

    def nodes(self) -> Sequence[int]:
        return tuple(self.places)

    def machines(self) -> Mapping[int, str]:
        return {node: where[0] for node, where in self.places.items()}

    def addresses(self) -> Mapping[int, Address]:
        return self.places

    def claim(self, generation: int, membership: bytes) -> bytes | None:
        if not self.is_deaf:
            self._ask("claim")
        self.asked.append(f"claim {generation}")
        is_taken = generation in self.claimed
        other = self.claimed.setdefault(generation, membership)
        self._ask("claim")
        return other if is_taken else None

    def start(self, role: str, number: int, node: int) -> None:
        self._ask("start")
        self.asked.append(f"start {role} {number} on {node}")

    def kill(self, role: str, number: int) -> None:
        self._ask("kill")

    def avoid(self, node: int, reason: str) -> None:
        if f"avoid {node}" not in self.asked:
            self.asked.append(f"avoid {node}")

    def forget(self) -> None:
        self._ask("forget")


@dataclass
class Many:
    """A coordinator and its two nodes, which are the test."""

    shell: CoordinatorShell
    processes: ManyProcesses
    meshes: dict[int, Mesh]
    admitted: dict[int, list[Membership]]

    def turn(self) -> None:
        """All take one turn."""
        self.shell._turn()
        for node, mesh in self.meshes.items():
            mesh.turn()
            for link in mesh.links.values():
                while (frame := link.receive(lambda _: None)) is not None:
                    if isinstance(frame, Admit):
                        self.admitted[node].append(frame.membership)

    def until(self, condition: Callable[[], object]) -> None:
        begun_s = time.monotonic()
        while not condition():
            assert time.monotonic() - begun_s < DEADLINE_S, self.processes.asked
            self.turn()

    def say(self, report: Report) -> None:
        """A node reports, once it can."""
        links = self.meshes[report.node].links
        self.until(lambda: COORDINATOR in links)
        links[COORDINATOR].send(report)

    @property
    def started(self) -> list[str]:
        return [one for one in self.processes.asked if one.startswith("start worker")]


@pytest.fixture
def many(tmp_path: Path, make_job: Callable[..., JobConfig]) -> Iterator[Many]:
    meshes = {
        node: Mesh(node, Listener("127.0.0.1", Credentials(node, bytes(32)))) for node in (0, 1)
    }
    processes = ManyProcesses({node: mesh.listener.address for node, mesh in meshes.items()})
    run = RunFolder(tmp_path / "run")
    run.create()
    job = make_job(name=f"many-{os.getpid()}", nodes={"min": 2, "max": 2})
    setup = JobSetup(job=job, run=run, run_id="12ab", secret=bytes(32), address="127.0.0.1")
    processes.claim(0, b"an earlier coordinator began the job")
    shell = CoordinatorShell(setup, processes, cast(NodeWatch, FakeWatch()))
    yield Many(shell, processes, meshes, {node: [] for node in meshes})
    shell._clean_up()
    for mesh in meshes.values():
        mesh.end()


KNOWN = Membership(generation=3, nodes=(0, 1), members=(0,), next_worker=2, target=1)
"""Worker 0 has ended since."""


def test_a_generation_exists_before_anybody_hears_of_it(many: Many) -> None:
    many.say(Report(5, KNOWN, connected=()))
    many.until(lambda: all(many.admitted.values()))
    made = Membership.from_bytes(many.processes.claimed[4])
    assert (made.generation, made.members, made.next_worker) == (4, (), 3)
    assert many.admitted[0][0] == many.admitted[1][0] == made
    assert many.processes.asked.count("claim 4") == 1
    assert many.started == ["start worker 2 on 0"]


def test_who_loses_a_generation_adopts_the_other_one_and_does_nothing_more(many: Many) -> None:
    """Of two coordinators one acts: no worker is started for a generation that does not exist."""
    other = replace(KNOWN, generation=4, members=(), next_worker=40, former=(7,))
    many.processes.claimed[4] = other.to_bytes()
    many.say(Report(5, KNOWN, connected=()))
    many.until(lambda: "claim 4" in many.processes.asked)
    assert many.shell._protocol.membership == other
    assert (many.started, many.admitted) == ([], {0: [], 1: []})
    many.until(lambda: all(many.admitted.values()))
    for told in many.admitted.values():
        assert (told[0].generation, told[0].former, told[0].next_worker) == (5, (7,), 41)
    assert many.started == ["start worker 40 on 0"]


# --- nodes that steering drains --------------------------------------------------------------


def drain(many: Many, node: int) -> None:
    """As the monitor says it on its thread."""
    many.shell._monitor.drained = {node: "monitoring.steering: slow sender"}


def leaving(many: Many) -> list[str]:
    events = many.shell._setup.run.read_events()
    return [one["reason"] for one in events if one["kind"] == "node_leaving"]


def test_a_drained_node_leaves_and_one_that_left_long_ago_is_not_told_of_again(many: Many) -> None:
    drain(many, 1)
    many.say(Report(5, replace(KNOWN, former=(1,), nodes=(0,)), connected=()))
    many.until(lambda: many.shell._protocol.membership.generation > KNOWN.generation)
    many.turn()
    assert leaving(many) == []
    assert "avoid 1" in many.processes.asked, "its host is not taken again"


def test_a_drained_node_leaves_once_the_nodes_are_heard_of(many: Many) -> None:
    drain(many, 1)
    many.say(Report(5, KNOWN, connected=()))
    many.until(lambda: many.shell._protocol.membership.departing == (1,))
    assert len(leaving(many)) == 1


def test_a_number_that_no_host_has_is_not_used_up_by_draining_it(many: Many) -> None:
    drain(many, 7)
    many.say(Report(5, KNOWN, connected=()))
    many.until(lambda: many.shell._protocol.membership.generation > KNOWN.generation)
    many.turn()
    assert many.shell._protocol.membership.former == ()
    assert leaving(many) == []


def test_the_monitor_is_told_of_spares_and_hosts(many: Many) -> None:
    many.say(Report(5, KNOWN, connected=(0, 5, 6)))
    many.until(lambda: many.shell.status().num_spare)
    now = many.shell._now()
    assert (now.spares, set(now.machine_of)) == ((5, 6), {0, 1})


# --- Ray's GCS is away -----------------------------------------------------------------------


def away(many: Many) -> list[str]:
    events = many.shell._setup.run.read_events()
    return [one["reason"] for one in events if one["kind"] == "gcs_away"]


@pytest.mark.parametrize("what", ["look", "claim", "start"])
def test_changes_wait_while_the_gcs_raises_and_are_made_once_it_answers(
    what: str, many: Many
) -> None:
    many.say(Report(5, KNOWN, connected=()))
    many.processes.raises.add(what)
    many.until(lambda: many.processes.asked.count(f"{what} raises") == 3)
    assert many.started == []
    (told,) = away(many)
    assert "RpcError: failed to connect: steps go on, changes of membership wait" in told
    many.processes.raises.clear()
    many.until(lambda: many.started)
    assert many.started == ["start worker 2 on 0"]
    assert list(many.processes.claimed) == [0, 4]
    many.until(lambda: all(many.admitted.values()))
    assert many.shell.status().phase == "training"
    assert len(away(many)) == 1


def test_what_the_nodes_say_is_heard_while_the_gcs_raises(many: Many) -> None:
    many.say(Report(5, KNOWN, connected=()))
    many.processes.raises.add("look")
    many.until(lambda: away(many))
    many.say(Report(9, KNOWN, connected=()))
    many.until(lambda: many.shell._step == 9)
    assert len(away(many)) == 1


def test_each_outage_is_told(many: Many) -> None:
    for number in (1, 2):
        many.processes.raises.add("look")
        many.until(lambda number=number: len(away(many)) == number)
        many.processes.raises.clear()
        many.until(lambda: many.shell._outage == Outage())


def test_a_generation_that_exists_though_the_gcs_raised_is_taken_up(many: Many) -> None:
    """The coordinator cannot know whose it is: it adopts it, and goes on from it."""
    many.say(Report(5, KNOWN, connected=()))
    many.processes.raises.add("claim")
    many.processes.is_deaf = True
    many.until(lambda: away(many))
    made = Membership.from_bytes(many.processes.claimed[4])
    many.processes.raises.clear()
    many.until(lambda: many.started)
    later = Membership.from_bytes(many.processes.claimed[5])
    assert (made.next_worker, later.next_worker) == (3, 4)
    assert many.started == ["start worker 3 on 0"]


def test_a_job_ends_also_without_the_gcs(many: Many, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray was to forget is kept for a while, and then left."""
    many.say(Report(5, KNOWN, connected=()))
    monkeypatch.setattr(coordinator, "insist", partial(insist, patience_s=0.2))
    many.processes.raises |= {"look", "kill", "forget"}
    many.meshes[0].links[COORDINATOR].send(Report(9, KNOWN, connected=(), finished=True))
    begun_s = time.monotonic()
    while many.shell.status().phase != "done":
        assert time.monotonic() - begun_s < DEADLINE_S
        many.shell._turn()
    assert many.shell.failure() is None
    many.processes.raises.clear()
