"""What the coordinator asks Ray for in each turn, and what it tells of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from actors.growth import HostGrowth
from actors.processes import Processes
from elastic.core.protocol.coordinator import Coordinator, Limits
from policies.growing import Growing
from policies.preemption import Notice

POLICY = Growing()


@dataclass
class Cluster:
    """Hosts that come and go as the test says."""

    present: tuple[int, ...] = (0,)
    taken_away: dict[int, Notice] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    forgiven: bool = False

    def nodes(self) -> Sequence[int]:
        return self.present

    def ending(self) -> Mapping[int, Notice]:
        return self.taken_away

    def held(self) -> Mapping[str, str]:
        return self.waiting

    def ask(self, num_hosts: int) -> None:
        self.asked = num_hosts

    def lost(self, node: int) -> None:
        self.present = tuple(one for one in self.present if one != node)

    def forgive(self) -> None:
        self.forgiven = True


@dataclass
class World:
    cluster: Cluster
    growth: HostGrowth
    protocol: Coordinator
    now_s: float = 0.0

    def turn(self, passed_s: float = 0.05) -> list[str]:
        """What is told in the next turn."""
        self.now_s += passed_s
        return [f"{kind}: {reason}" for kind, reason in self.growth.turn(self.protocol)]


@pytest.fixture
def world() -> World:
    cluster = Cluster()
    growth = HostGrowth(cast(Processes, cluster), 1, clock=lambda: made.now_s)
    made = World(cluster, growth, Coordinator(Limits(1, 8, max_nodes=3), 6))
    return made


def test_what_is_missing_is_asked_for_and_told_once(world: World) -> None:
    assert world.turn() == ["nodes_asked: asks for 2 more: 1 of 3 hosts are there"]
    assert (world.cluster.asked, world.turn()) == (2, [])
    world.cluster.present = (0, 1)
    assert world.turn() == ["nodes_asked: asks for 1 more: 2 of 3 hosts are there"]
    world.cluster.present = (0, 1, 2)
    assert (world.turn(), world.cluster.asked) == ([], 0)


def test_a_host_that_will_be_taken_away_is_replaced_in_time(world: World) -> None:
    world.cluster.present = (0, 1, 2)
    world.turn()
    world.cluster.taken_away = {2: Notice("spot")}
    world.turn(POLICY.cooldown_s)
    assert world.cluster.asked == 1


def test_a_lost_host_may_come_back_by_itself_first(world: World) -> None:
    world.cluster.present = (0, 1, 2)
    world.turn()
    world.turn(POLICY.cooldown_s)
    world.growth.lost(2)
    assert (world.turn(), world.cluster.asked) == ([], 0)
    world.turn(POLICY.cooldown_s)
    assert world.cluster.asked == 1


def test_scaling_counts_at_once_and_forgives(world: World) -> None:
    for _ in range(POLICY.refusal_limit):
        world.growth.refused()
    assert "elastic scale" in world.turn()[0]
    assert (world.cluster.asked, world.turn()) == (0, [])
    world.protocol.scale(None, 2)
    world.growth.forgive()
    assert world.turn() == ["nodes_asked: asks for 1 more: 1 of 2 hosts are there"]
    assert world.cluster.forgiven


def test_hosts_that_have_to_wait_are_told_of_once_for_each_reason(world: World) -> None:
    world.turn()
    world.cluster.waiting = {"10.0.0.7": "lost 3 times"}
    assert world.turn() == ["node_held_back: 10.0.0.7: lost 3 times"]
    assert world.turn() == []
    world.cluster.waiting = {"10.0.0.7": "lost 4 times"}
    assert world.turn() == ["node_held_back: 10.0.0.7: lost 4 times"]
