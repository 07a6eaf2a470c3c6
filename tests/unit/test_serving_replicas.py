"""Experts in applications of their own: every replica has a version before requests meet it."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError

from elastic.core.experts.repository import Repository
from serve.version import Version, read_version
from tests.served import FakeClock, make_repository, trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve 2.60 declares settings as pydantic 1 did
    from ray.serve.exceptions import RayServeException

    from serve.replicas import ExpertReplica, RemotePool

Reply = Callable[[np.ndarray], Any]


def good(answer: np.ndarray) -> Any:
    return answer


def garbage(answer: np.ndarray) -> Any:
    return answer * np.nan


def died(answer: np.ndarray) -> Any:
    return RayActorError()


class FakeHandle:
    """Of an application whose replicas reply as they are told to."""

    def __init__(self, replica: ExpertReplica, replies: list[Reply]) -> None:
        self._replica, self._replies = replica, replies

    def broadcast(self, method: str, *arguments: Any) -> Any:
        assert method == "ask"
        self._answer = asyncio.run(self._replica.ask(*arguments))
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0
        assert return_exceptions
        return [reply(self._answer) for reply in self._replies]


@pytest.fixture
def version(tmp_path: Path) -> Version:
    make_repository(tmp_path / "tiny")
    return read_version(tmp_path / "tiny", None)


def prepared(version: Version, replies: list[Reply], num_missing: int = 0) -> dict[str, str]:
    """What is wrong; every second replica of expert-1 replies as told."""
    path, clock = version.repository.path, FakeClock()
    missing = iter(range(num_missing))

    def find(application: str) -> FakeHandle:
        if next(missing, None) is not None:
            raise RayServeException("no such application yet")
        name = application.removeprefix("tiny-")
        told = replies if name == "expert-1" else [good, good]
        return FakeHandle(ExpertReplica(str(path), name, 1), told)

    pool = RemotePool(clock, find)
    wrong = pool.prepare(version)
    if not wrong:
        replies[:] = [garbage]  # what was tried is not tried again
        assert pool.prepare(version) == {}
        pool.keep([])
        assert list(pool.prepare(version)) == ["expert-1"]
    return wrong


def test_each_replica_is_asked_before_requests_are(version: Version) -> None:
    assert prepared(version, [good, good]) == {}
    assert list(prepared(version, [good, garbage])) == ["expert-1"]
    assert prepared(version, [died, good]) == {}  # its successor begins with the newest version
    assert prepared(version, [good, good], num_missing=2) == {}


def test_a_replica_keeps_the_versions_that_came_last(version: Version) -> None:
    path = version.repository.path
    replica = ExpertReplica(str(path), "expert-0", 1)
    entries = [Repository.open(path).expert("expert-0")]
    for seed in range(60, 65):
        Repository.open(path).replace_expert("expert-0", trained("flow", seed).weights)
        entries.append(Repository.open(path).expert("expert-0"))
    inputs = tuple(one.numpy() for one in version.example())

    async def all_at_once() -> list[np.ndarray]:
        asked = (replica.ask(one.model_dump_json(), inputs) for one in entries)
        return await asyncio.gather(*asked)

    for _ in range(2):
        for entry, answer in zip(entries, asyncio.run(all_at_once()), strict=True):
            alone = version.manifest.model_copy(update={"experts": (entry,)})
            with torch.inference_mode():
                wanted = Repository(path, alone).load_expert("expert-0")(*version.example())
            assert answer == pytest.approx(wanted.numpy())
    assert len(replica._modules) == 4
