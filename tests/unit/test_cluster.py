"""Blocks that use a cluster share it, on whatever thread; the last one ends it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private import services
from ray._raylet import AuthenticationTokenLoader, Config

from elastic import cluster
from elastic.core.errors import ConfigError


class FakeRay:
    """Counts starts and ends."""

    def __init__(self) -> None:
        self.num_starts = self.num_ends = 0

    def is_initialized(self) -> bool:
        return self.num_starts > self.num_ends

    def shutdown(self) -> None:
        self.num_ends += 1

    def join(self, address: str | None) -> None:
        self.num_starts += 1

    def get_runtime_context(self) -> FakeRay:
        assert self.is_initialized()
        return self

    gcs_address = "here:1"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(cluster, "ray", fake)
    monkeypatch.setattr(cluster, "join_cluster", fake.join)
    monkeypatch.setattr(cluster, "_users", cluster._Users())  # other tests may hold a real one
    return fake


def test_the_last_block_ends_what_the_first_began(ray: FakeRay) -> None:
    left, entered = threading.Event(), threading.Event()

    def longer() -> None:
        with cluster.local_cluster():
            entered.set()
            left.wait(10)
            assert ray.is_initialized()

    with cluster.local_cluster() as address:
        assert address == "here:1"
        thread = threading.Thread(target=longer)
        thread.start()
        assert entered.wait(10)
    assert (ray.num_starts, ray.num_ends) == (1, 0)
    left.set()
    thread.join(10)
    assert (ray.num_starts, ray.num_ends) == (1, 1)


def test_a_cluster_that_was_there_stays(ray: FakeRay) -> None:
    ray.join(None)
    with cluster.local_cluster(), cluster.local_cluster():
        pass
    assert ray.num_ends == 0


class Joined(FakeRay):
    """Takes what would be given to Ray; `answer` ends the attempt."""

    def __init__(self, answer: Exception | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.settings: dict[str, Any] = {}
        self.has_autoscaler = True

    def end_autoscaler(self) -> None:
        self.has_autoscaler = False

    def init(self, **settings: Any) -> None:
        self.settings = settings
        self.mode = os.environ["RAY_AUTH_MODE"]
        if self.answer is not None:
            raise self.answer


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Joined]:
    """A Ray to connect to, by a user who has set nothing and has no token."""
    fake = Joined()
    monkeypatch.setattr(cluster, "ray", fake)
    monkeypatch.setattr(cluster, "_silence_raylet", lambda: None)
    monkeypatch.setattr(cluster, "_end_autoscaler", fake.end_autoscaler)
    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", lambda address: address)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    AuthenticationTokenLoader.instance().reset_cache()
    yield fake
    monkeypatch.undo()
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def give_token(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("ab" * 32)
    AuthenticationTokenLoader.instance().reset_cache()


def test_a_cluster_of_our_own_has_no_authentication(joined: Joined, tmp_path: Path) -> None:
    give_token(tmp_path)
    cluster.join_cluster(None)
    assert joined.settings["address"] == "local"
    assert joined.mode == cluster.auth_mode() == "disabled"
    assert not joined.has_autoscaler


def test_a_cluster_that_was_started_on_this_machine_is_joined(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", lambda _: "here:6379")
    cluster.join_cluster(None)
    assert joined.settings["address"] == "here:6379"
    assert "object_store_memory" not in joined.settings, "Ray refuses it there"
    assert joined.has_autoscaler, "it is not ours"


@pytest.mark.parametrize(
    ("has_token", "variable", "known", "mode"),
    [
        (False, None, None, "disabled"),
        (True, None, None, "token"),
        (True, "disabled", None, "disabled"),
        (False, "token", None, "token"),
        (True, "token", "disabled", "disabled"),
        (False, None, "token", "token"),
    ],
)
def test_how_a_cluster_authenticates_is_always_said(
    joined: Joined,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_token: bool,
    variable: str | None,
    known: str | None,
    mode: str,
) -> None:
    if has_token:
        give_token(tmp_path)
    if variable is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", variable)
    cluster.join_cluster("127.0.0.1:6379", known)
    assert joined.settings["address"].endswith(":6379")
    assert joined.mode == cluster.auth_mode() == mode


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001", "nowhere"])
def test_an_address_that_is_none_of_a_cluster_is_refused(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(
        cluster, "canonicalize_bootstrap_address", services.canonicalize_bootstrap_address
    )
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS: got {address}.*ray job submit"):
        cluster.join_cluster(address)
    assert joined.settings == {}


def test_a_cluster_that_does_not_answer_is_named(joined: Joined) -> None:
    joined.answer = ConnectionError("no answer")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1.*RAY_AUTH_MODE=disabled; .*: no answer"):
        cluster.join_cluster("127.0.0.1:1")
