"""A process that runs a worker or an aggregator, as those see it who wait for its end. No Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from actors import launch
from actors.launch import Host
from actors.setup import JobSetup
from elastic.core.config import JobConfig
from elastic.core.errors import TaskError
from elastic.core.runs import RunFolder

DEADLINE_S = 20.0


class Worker(Host):
    """Runs until the test lets it go."""

    may_end = threading.Event()
    raises: BaseException | None = None

    def _run(self, setup: JobSetup, role: str, number: int) -> None:
        self.may_end.wait(DEADLINE_S)
        self._result, self._error = f"{role} {number} is done", self.raises


@pytest.fixture
def host(make_job: Callable[..., JobConfig], tmp_path: Path) -> Iterator[Worker]:
    setup = JobSetup(job=make_job(), run=RunFolder(tmp_path), run_id="12ab", secret=bytes(32))
    Worker.may_end.clear()
    yield Worker(setup, "worker", 3)
    Worker.may_end.set()


def test_who_waits_learns_how_it_ended(host: Worker) -> None:
    assert host.join(0.0) is None
    host.may_end.set()
    assert host.join(DEADLINE_S) == "worker 3 is done"
    assert host.join(0.0) == "worker 3 is done"


def test_who_waits_learns_what_it_raised(host: Worker) -> None:
    host.raises = TaskError("loss: refused")
    host.may_end.set()
    with pytest.raises(TaskError, match="loss: refused"):
        host.join(DEADLINE_S)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ActorUnavailableError("a call got lost", None), None),
        (ActorDiedError(), "its process died"),
        (RayTaskError("join", "trace", TaskError("loss: refused")), "loss: refused"),
    ],
    ids=["unavailable", "died", "raised"],
)
def test_only_a_death_is_one(
    error: RayError, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_: object) -> str:
        raise error

    monkeypatch.setattr(launch.ray, "get", get)
    ended = launch._how_it_ended(None)
    assert (None if ended is None else ended.text.partition("\n")[0]) == text


def test_coordinators_that_died_do_not_hold_it_up(host: Worker) -> None:
    """Ray runs 16 calls at a time; those of the dead must make room while the process lives."""
    with ThreadPoolExecutor(16) as threads:
        waiting = [threads.submit(host.join, 0.01) for _ in range(40)]
        assert [one.result(DEADLINE_S) for one in waiting] == [None] * 40
