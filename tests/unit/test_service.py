"""A service beside others and over time: folders that change, threads in turn, who leaves.

Its threads are not started: a test calls what they would.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic.core.errors import ConfigError
from elastic.core.experts.repository import Repository
from serve.engine import Job
from serve.service import UNLOADED_FILE, Ask, Service
from serve.settings import load_serving
from serve.version import Version, check_router
from serve.work import Denoising, noise_of
from tests.integration.support import wait_until
from tests.served import SHAPE, FakeClock, Unruly, make_repository, trained


class Held(Unruly):
    """The second version that it prepares waits for a test."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.num_prepared = 0
        self.is_held, self.may_go = threading.Event(), threading.Event()

    def prepare(self, version: Version) -> dict[str, str]:
        self.num_prepared += 1
        if self.num_prepared == 2:
            self.is_held.set()
            assert self.may_go.wait(timeout=30)
        return super().prepare(version)


class Raises(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        raise KeyError("a table that is not there")


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    make_repository(tmp_path / "flow")
    return tmp_path / "flow"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def service(flow: Path, clock: FakeClock) -> Iterator[Service]:
    made = make(flow, Unruly(clock))
    yield made
    made.stop()


def make(path: Path, pool: Unruly, **settings: Any) -> Service:
    return Service(load_serving({"repository": str(path), **settings}), pool, pool._clock)


def renew(path: Path, seed: int, name: str = "expert-1") -> None:
    Repository.open(path).replace_expert(name, trained("flow", seed).weights)


def test_what_two_replicas_unload_stays_unloaded(
    flow: Path, service: Service, clock: FakeClock
) -> None:
    other = make(flow, Unruly(clock))
    service.unload("expert-0")
    other.unload("expert-1")
    assert json.loads((flow / UNLOADED_FILE).read_text()) == ["expert-0", "expert-1"]
    service.load("expert-0")
    assert service.engine.patients.unloaded == {"expert-1"}
    other.stop()


@pytest.mark.parametrize("text", ["5", "{", "null", '"expert-0"'])
def test_a_damaged_list_of_who_is_unloaded_changes_nothing(
    flow: Path, service: Service, text: str
) -> None:
    service.unload("expert-0")
    (flow / UNLOADED_FILE).write_text(text)
    service.poll()
    assert service.engine.patients.unloaded == {"expert-0"}


def test_an_older_manifest_never_comes_after_a_newer_one(flow: Path, clock: FakeClock) -> None:
    pool = Held(clock)
    service = make(flow, pool)
    renew(flow, 50)
    first = threading.Thread(target=service.poll)
    first.start()
    assert pool.is_held.wait(timeout=30)
    renew(flow, 51)
    second = threading.Thread(target=service.poll)
    second.start()
    second.join(timeout=0.5)  # where they do not take turns, it is through by now
    pool.may_go.set()
    first.join(timeout=30)
    second.join(timeout=30)
    assert service.rollout.current.manifest.experts[1].version == "3"
    service.stop()


def test_what_is_refused_is_not_kept_and_is_told(flow: Path, service: Service) -> None:
    assert isinstance(service._pool, Unruly)
    before = set(service._pool._modules)
    renew(flow, 50, "expert-0")
    broken = {name: one * 1e38 for name, one in trained("flow", 1).weights.items()}
    Repository.open(flow).replace_expert("expert-1", broken)
    service.poll()
    assert "expert-1: answered with numbers that are not finite" in service.fault
    assert set(service._pool._modules) == before
    renew(flow, 51)
    service.poll()
    assert service.fault == ""
    assert set(service._pool._modules) > before


def test_a_file_that_was_missing_is_tried_again_when_asked(flow: Path, service: Service) -> None:
    renew(flow, 50)
    weights = flow / Repository.open(flow).expert("expert-1").weights
    aside = weights.rename(weights.with_suffix(".aside"))
    service.try_again()
    assert "no such file" in service.fault
    aside.rename(weights)
    service.poll()
    assert service.fault  # a manifest is tried once
    service.try_again()
    assert service.fault == ""
    assert service.rollout.current.manifest.experts[1].version == "2"


def test_experts_of_old_versions_are_tried_again_too(
    flow: Path, service: Service, clock: FakeClock
) -> None:
    old, patients = service.rollout.current, service.engine.patients
    renew(flow, 50)
    service.poll()
    assert service.rollout.current is not old
    patients.condemn(old, {"expert-1": "was slow"})
    assert patients.alive(old).tolist() == [True, False, True]
    clock.now_s += 2
    service._probe()
    wait_until(lambda: patients.alive(old).all(), "the old version's expert answers again")


def test_who_leaves_frees_the_engine_and_does_not_judge_a_canary(
    flow: Path, clock: FakeClock
) -> None:
    pool = Unruly(clock)
    service = make(flow, pool, canary={"percent": 50, "min_requests": 1})
    renew(flow, 50)
    service.poll()
    trial = service.rollout.candidate
    assert trial is not None

    async def leave() -> None:
        works = [Denoising(noise_of(1, SHAPE), 5)]
        request = asyncio.create_task(service.run(works, trial, Ask("left", timeout_s=60)))
        await asyncio.sleep(0)  # until it waits
        assert service.engine.num_rows == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(leave())
    service.engine.tick()
    assert (service.engine.num_rows, pool.num_rows) == (0, [])
    assert service.rollout.candidate is trial  # one good request would have let it take over
    service.stop()


def test_an_answer_that_comes_while_we_stop_is_given(flow: Path, clock: FakeClock) -> None:
    """Though it has the new version taken back, which nobody writes into the folder any more."""
    pool = Unruly(clock)
    service = make(flow, pool, canary={"percent": 50, "min_requests": 1})
    current = service.rollout.current
    renew(flow, 50)
    service.poll()
    trial = service.rollout.candidate
    assert trial is not None
    named = Repository.open(flow).manifest

    async def ask(version: Version) -> Job:
        works = [Denoising(noise_of(1, SHAPE), 5)]
        request = asyncio.create_task(service.run(works, version, Ask("late", timeout_s=60)))
        await asyncio.sleep(0)  # until it waits
        while service.engine.tick():
            pass
        return await request

    assert not asyncio.run(ask(current)).lost
    pool.faults[1] = lambda answer: answer * torch.nan
    service.stop()
    assert asyncio.run(ask(trial)).lost
    assert trial.identity in service.rollout.refused
    assert Repository.open(flow).manifest == named


def test_whatever_a_model_raises_is_told_of_it(service: Service) -> None:
    version = service.rollout.current
    with pytest.raises(ConfigError, match="a table that is not there"):
        check_router(replace(version, router=Raises()))
    assert isinstance(service._pool, Unruly)
    service._pool._modules[version.keys[2]] = Raises()
    assert list(service._pool.prepare(version)) == ["expert-2"]
