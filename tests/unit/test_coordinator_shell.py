"""The coordinator's process where its node is taken away: real sockets, no Ray."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from actors.channel import Channel, accept, listen
from actors.coordinator import CoordinatorShell, Ended
from actors.mesh import Address
from actors.preemption import NodeWatch
from actors.setup import JobSetup
from elastic.core.config import JobConfig
from elastic.core.errors import PreemptedError
from elastic.core.protocol.messages import Membership, Report, Stop
from elastic.core.runs import RunFolder
from policies.preemption import Notice

STEP_S = 10.0
DEADLINE_S = 20.0


class NoProcesses:
    """Takes every wish, and starts nothing."""

    def look(self, former: Sequence[int]) -> None: ...

    def known(self, role: str) -> Mapping[int, Ended | None]:
        return {}

    def homes(self, role: str) -> Mapping[int, int]:
        return {}

    def nodes(self) -> Sequence[int]:
        return (0,)

    def addresses(self) -> Mapping[int, Address]:
        return {}

    def ending(self) -> Mapping[int, Notice]:
        return {}

    def claim(self, generation: int, membership: bytes) -> bytes | None:
        return None

    def start(self, role: str, number: int, node: int) -> None: ...

    def kill(self, role: str, number: int) -> None: ...

    def clear(self) -> None: ...


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
            select.select([self.channel], [], [], 1.0)
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
            select.select([], [], [], 0.005)
        return self.shell.failure()


@pytest.fixture
def world(tmp_path: Path, make_job: Callable[..., JobConfig]) -> Iterator[World]:
    run, job = RunFolder(tmp_path / "run"), make_job(name=f"taken-{os.getpid()}", steps=10)
    run.create()
    for step in range(3):
        run.append_metrics({"step": step, "step_s": STEP_S, "loss": 1.0, "samples": 1})
    setup = JobSetup(job=job, run=run, run_id="12ab", secret=bytes(32))
    store, watch = setup.open_store(), FakeWatch()
    shell = CoordinatorShell(setup, NoProcesses(), cast(NodeWatch, watch))
    store.create()
    listener = listen(store.path / "socket")
    shell.start()
    select.select([listener], [], [], DEADLINE_S)
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
        select.select([], [], [], 0.005)
    assert world.finish(4) is None
    assert sorted(world.kinds()) == ["preemption_possible", "preemption_unwatched"]
