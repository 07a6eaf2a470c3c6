"""Which hosts of a cluster a job takes, without a cluster."""

from __future__ import annotations

import pytest

from actors import cluster_nodes
from actors.cluster_nodes import ClusterNodes
from policies.growing import Readmission

POLICY = Readmission()


class Cluster:
    """Ray, as far as hosts and names are concerned. Time passes as the test says."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = {f"ray-{host}": host for host in hosts}
        self.now_s = 100.0
        self._written: dict[bytes, bytes] = {}

    def get(self, key: bytes, *, namespace: bytes) -> bytes | None:
        return self._written.get(key)

    def put(self, key: bytes, value: bytes, *, overwrite: bool, namespace: bytes) -> bool:
        """Whether there was something already."""
        existed = key in self._written
        self._written.setdefault(key, value)
        return existed


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster("a", "b", "c")
    monkeypatch.setattr(cluster_nodes, "_hosts", lambda: dict(made.hosts))
    monkeypatch.setattr(cluster_nodes, "_internal_kv_get", made.get)
    monkeypatch.setattr(cluster_nodes, "_internal_kv_put", made.put)
    monkeypatch.setattr(cluster_nodes.time, "monotonic", lambda: made.now_s)
    return made


def look(cluster: Cluster, nodes: ClusterNodes, num: int, *former: int) -> dict[int, str]:
    """The hosts that are taken, by number, a second later."""
    cluster.now_s += 1
    nodes.look(num, former, ())
    return {node: nodes.ray_id(node).removeprefix("ray-") for node in nodes.present}


def test_the_host_of_the_driver_comes_first_and_no_more_are_taken_than_wanted(
    cluster: Cluster,
) -> None:
    nodes = ClusterNodes("job", "ray-b")
    assert look(cluster, nodes, 2) == {0: "b", 1: "a"}
    assert 2 not in nodes
    assert look(cluster, nodes, 3) == {0: "b", 1: "a", 2: "c"}
    assert 2 in nodes
    assert [nodes.ray_id(node) for node in range(3)] == ["ray-b", "ray-a", "ray-c"]
    assert nodes.living == {"ray-a", "ray-b", "ray-c"}
    again = ClusterNodes("job", "ray-b")
    assert look(cluster, again, 2) == {0: "b", 1: "a", 2: "c"}, "a number is for good"
    assert look(cluster, again, 2, 1) == {0: "b", 2: "c"}, (
        "which host left is not this one's choice"
    )


def test_a_host_that_is_lost_again_and_again_waits_also_behind_a_new_raylet(
    cluster: Cluster,
) -> None:
    nodes, former = ClusterNodes("job", "ray-a"), list[int]()
    look(cluster, nodes, 3)
    for number in range(POLICY.free + 1):
        (node,) = [one for one, host in look(cluster, nodes, 3, *former).items() if host[0] == "c"]
        nodes.lost(node)
        former.append(node)
        cluster.hosts = {"ray-a": "a", "ray-b": "b", f"ray-c{number}": "c"}
    assert {nodes.addresses[node] for node in former} == {"c"}
    assert sorted(look(cluster, nodes, 3, *former).values()) == ["a", "b"]
    assert "lost 3 times" in nodes.held["c"]
    cluster.now_s += POLICY.base_s
    assert len(look(cluster, nodes, 3, *former)) == 3
    assert nodes.held == {}


def test_a_person_may_forgive_a_host(cluster: Cluster) -> None:
    nodes = ClusterNodes("job", "ray-a")
    (node,) = set(look(cluster, nodes, 3)) - {0, 1}
    for _ in range(POLICY.limit):
        nodes.lost(node)
    assert len(look(cluster, nodes, 3, node)) == 2
    assert "not taken again" in nodes.held["c"]
    nodes.forgive()
    assert len(look(cluster, nodes, 3, node)) == 3
