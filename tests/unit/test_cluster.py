"""Blocks that use a cluster share it, on whatever thread; the last one ends it."""

from __future__ import annotations

import threading

import pytest

from elastic import cluster


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
