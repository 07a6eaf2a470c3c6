"""The coordinator's rules for nodes: when a job begins, which leave, which worker moves."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from elastic.core.protocol import coordinator as coord
from elastic.core.protocol.messages import Membership, Report

A = TypeVar("A", bound=coord.Action)


class World:
    """Obedient nodes: each takes up every membership, joins at once, and is free when it leaves."""

    def __init__(
        self, *nodes: int, step: int = 0, workers: int = 2, fresh: bool = True, **limits: Any
    ) -> None:
        everything = {"min_workers": 1, "max_workers": 8, "spare": 0, "first_step": step}
        self.coordinator = coord.Coordinator(
            coord.Limits(**{**everything, **limits}), workers, fresh
        )
        self.step = step
        self.is_slow = False
        """A node that joins does not get there."""
        self.now_s = 0.0
        self.unfit: frozenset[int] = frozenset()
        self.held: frozenset[int] = frozenset()
        self.silent: set[int] = set()
        """Nodes whose aggregators still start."""
        self.unheard: set[int] = set()
        """Nodes that the coordinator does not hear."""
        self.gone: dict[int, tuple[int, ...]] = {}
        """Whom a node has not heard for too long."""
        self.nodes = set(nodes)
        self.homes: dict[int, int] = {}
        self.lives: dict[int, coord.Life] = {}
        self.told = Membership()
        self.notes: list[coord.Note] = []

    def decide(self) -> list[coord.Action]:
        now = self.told
        lead = now.nodes[0]
        living = tuple(one for one, life in self.lives.items() if life is coord.Life.ALIVE)
        ready = () if self.is_slow else now.joining
        report = Report(
            self.step,
            now,
            connected=living,
            node=lead,
            ready=ready,
            free=now.departing,
            gone=self.gone.get(lead, ()),
        )
        others = {
            node: Report(
                self.step, now, connected=(), node=node, leads=False, gone=self.gone.get(node, ())
            )
            for node in self.nodes - {lead} - self.silent - self.unheard
        }
        present = self.nodes - set(self.coordinator.membership.former)
        view = coord.View(
            self.now_s,
            report if lead in self.nodes - self.unheard else None,
            dict(self.lives),
            dict.fromkeys(sorted(present), 2),
            others=others,
            homes=self.homes,
            unfit=self.unfit,
            held=self.held,
        )
        actions = self.coordinator.decide(view)
        self.notes += only(coord.Note, actions)
        for action in actions:
            match action:
                case coord.StartWorker(worker, node):
                    self.homes[worker], self.lives[worker] = node, coord.Life.STARTING
                case coord.KillWorker(worker):
                    del self.lives[worker]
                case coord.SetMembership(membership):
                    self.told = membership
        return actions

    def settle(self) -> None:
        """Turns until nothing happens; workers start, and end when they have left."""
        for _ in range(30):
            self.decide()
            self.lives = {
                one: coord.Life.DEAD if one in self.told.leaving else coord.Life.ALIVE
                for one in self.lives
            }

    def kinds(self) -> list[str]:
        return [one.kind for one in self.notes]

    def loads(self) -> dict[int, int]:
        """How many members each node has."""
        homes = [self.homes[one] for one in self.told.members]
        return {node: homes.count(node) for node in self.told.nodes}


def only(kind: type[A], actions: list[coord.Action]) -> list[A]:
    return [one for one in actions if isinstance(one, kind)]


@pytest.mark.parametrize("step", [0, 70], ids=["fresh", "resumed"])
def test_a_job_waits_with_its_first_step_for_the_nodes_that_it_needs(step: int) -> None:
    world = World(0, step=step, workers=3, min_nodes=3, max_nodes=4)
    world.settle()
    assert world.told.members == ()
    world.nodes.add(1)
    world.settle()
    assert world.told.members == ()
    assert [one.reason for one in world.notes if one.kind == "waiting_for_nodes"] == [
        "1 of 3 nodes (nodes.min) are there; the first step waits for 2 more",
        "2 of 3 nodes (nodes.min) are there; the first step waits for 1 more",
    ]
    world.nodes.add(2)
    world.settle()
    assert world.told.nodes == (0, 1, 2)
    assert "node_joining" not in world.kinds(), "all have the state that the job begins with"
    assert world.loads() == {0: 1, 1: 1, 2: 1}


def test_once_begun_a_job_goes_on_with_fewer_nodes_than_it_began_with() -> None:
    world = World(0, 1, step=70, min_nodes=2)
    world.settle()
    world.step = 71
    world.nodes.remove(1)
    world.settle()
    assert len(world.told.members) == 2
    assert "waiting_for_nodes" not in world.kinds()


def one_hears_nobody(**limits: Any) -> tuple[World, dict[int, tuple[int, ...]]]:
    """Of three nodes the coordinator hears one, which has heard nothing of the others."""
    world = World(0, 1, 2, workers=3, replicas=2, patience_s=10.0, **limits)
    world.settle()
    world.step = 5
    world.unheard = {0, 2}
    world.gone = {1: (0, 2)}
    return world, world.gone


def test_nodes_that_are_silent_are_waited_for_where_state_would_be_gone_with_them() -> None:
    world, gone = one_hears_nobody()
    world.settle()
    assert world.told.nodes == (0, 1, 2)
    gone.clear()
    world.unheard = set()
    world.now_s = 20.0
    world.settle()
    assert world.told.nodes == (0, 1, 2)
    assert "node_lost" not in world.kinds()


def test_who_is_silent_for_long_is_left_behind_whatever_it_keeps() -> None:
    world, _ = one_hears_nobody()
    world.decide()
    world.now_s = 9.9
    world.decide()
    assert world.told.nodes == (0, 1, 2)
    world.now_s = 10.0
    world.decide()
    assert world.told.nodes == (1,)


def test_one_that_is_silent_is_left_behind_at_once_and_the_next_is_waited_for() -> None:
    world, gone = one_hears_nobody()
    world.unheard, gone[1] = {2}, (2,)
    world.decide()
    assert world.told.nodes == (0, 1)
    world.unheard, gone[1] = {0}, (0,)
    world.now_s = 9.0
    world.decide()
    assert world.told.nodes == (0, 1), "of some chunks the only copy may be there"
    world.nodes.remove(0)
    world.decide()
    assert world.told.nodes == (1,), "it is dead: nobody comes back"


def test_without_any_host_a_job_waits_for_the_first() -> None:
    """A head without processors, and an autoscaler that is still to start a host."""
    world = World()
    assert only(coord.StartWorker, world.decide()) == []
    assert world.notes[-1].reason.startswith("0 of 1 nodes")
    world.nodes.add(0)
    world.settle()
    assert world.loads() == {0: 2}


def test_fewer_nodes_the_newest_leave_as_planned() -> None:
    world = World(0, 1, 2, workers=3, min_nodes=1, max_nodes=3)
    world.settle()
    world.step = 5
    assert world.coordinator.scale(None, 1) == ""
    world.settle()
    assert (world.told.nodes, world.told.former) == ((0,), (1, 2))
    assert world.loads() == {0: 3}, "as many workers as before"
    assert [(one.kind, one.node) for one in world.notes if one.kind == "node_leaving"] == [
        ("node_leaving", 1),
        ("node_leaving", 2),
    ]
    assert "node_left" in world.kinds()
    assert "node_lost" not in world.kinds()


def test_a_node_that_only_joins_leaves_before_one_that_counts() -> None:
    world = World(0, 1, max_nodes=3)
    world.settle()
    world.step = 5
    world.nodes.add(2)
    world.decide()
    assert world.told.joining == (2,)
    world.coordinator.scale(None, 2)
    world.settle()
    assert (world.told.nodes, world.told.joining, world.told.former) == ((0, 1), (), (2,))


@pytest.mark.parametrize(
    ("workers", "nodes", "refusal"),
    [
        (None, 4, "4 nodes asked for; nodes.min is 2, nodes.max is 3"),
        (None, 1, "1 nodes asked for; nodes.min is 2, nodes.max is 3"),
        (9, 3, "9 workers asked for; workers.min is 1, workers.max is 8"),
    ],
)
def test_a_refused_wish_changes_nothing(workers: int | None, nodes: int, refusal: str) -> None:
    coordinator = World(0, min_nodes=2, max_nodes=3).coordinator
    assert coordinator.scale(workers, nodes) == refusal
    assert (coordinator.target, coordinator.target_nodes) == (2, 3)


def test_a_restarted_coordinator_wants_as_many_nodes_as_the_last() -> None:
    world = World(0, 1, 2, max_nodes=3)
    world.settle()
    world.coordinator.scale(1, 2)
    world.settle()
    again = World(0, 1, 2, max_nodes=3, fresh=False)
    again.told, again.step = world.told, 5
    again.homes, again.lives = world.homes, world.lives
    again.settle()
    assert (again.coordinator.target, again.coordinator.target_nodes) == (1, 2)
    assert again.told.nodes == world.told.nodes == (0, 1)


def test_a_new_node_gets_its_share_of_the_workers() -> None:
    world = World(0, workers=5, max_nodes=3)
    world.settle()
    world.step = 5
    world.nodes |= {1, 2}
    world.settle()
    assert world.loads() == {0: 2, 1: 2, 2: 1}
    assert len(world.lives) == 5
    assert "worker_lost" not in world.kinds()
    told = world.told
    world.settle()
    assert world.told == told, "and then it is still"


def host_comes(*, workers: int = 4, is_slow: bool = True, spare: int = 0) -> World:
    """To a job that trains on one; it does not get there if it is slow."""
    world = World(0, workers=workers, spare=spare)
    world.settle()
    world.step, world.is_slow = 5, is_slow
    world.nodes.add(1)
    return world


@pytest.mark.parametrize(("least", "members"), [(1, (0, 2)), (3, (0, 2, 1))])
def test_who_is_unfit_becomes_no_member_while_there_are_enough(
    least: int, members: tuple[int, ...]
) -> None:
    world = World(0, workers=3, min_workers=least)
    world.unfit = frozenset({1})
    world.settle()
    assert world.told.members == members
    assert len(world.lives) == 3, "it is left as it is: another one there would do no better"


@pytest.mark.parametrize("step", [0, 7], ids=["before the first step", "while others train"])
def test_a_node_that_is_held_becomes_a_member_only_once_it_is_not(step: int) -> None:
    world = World(0, 1, workers=2, max_nodes=3)
    world.settle()
    world.step, world.held = step, frozenset({2})
    world.nodes.add(2)
    world.settle()
    assert (world.told.nodes, world.told.joining) == ((0, 1), ())
    world.held, world.is_slow = frozenset(), False
    world.settle()
    assert world.told.nodes == (0, 1, 2)


def test_a_job_begins_without_a_node_that_is_held_and_let_go() -> None:
    world = World(0, 1, 2, workers=3, max_nodes=3)
    world.held = frozenset({2})
    world.settle()
    assert world.told.members == (), "it waits for what becomes of it"
    world.coordinator.leave(2)
    world.settle()
    assert (world.told.nodes, len(world.told.members)) == ((0, 1), 3)


def test_on_an_avoided_node_nothing_is_started_while_there_are_others() -> None:
    world = World(0, 1, 2, workers=3)
    world.settle()
    assert world.loads() == {0: 1, 1: 1, 2: 1}
    world.step, world.coordinator.avoided = 5, frozenset({1})
    (worker,) = [one for one in world.told.members if world.homes[one] == 1]
    world.lives[worker] = coord.Life.DEAD
    world.coordinator.scale(5)
    world.settle()
    assert sorted(world.loads().items()) == [(0, 3), (1, 0), (2, 2)]
    world.coordinator.avoided = frozenset()
    world.settle()
    assert world.loads() == {0: 2, 1: 1, 2: 2}, "nodes share alike again"


def test_where_all_nodes_are_avoided_the_job_goes_on() -> None:
    world = World(0, 1, workers=2)
    world.settle()
    world.step, world.coordinator.avoided = 5, frozenset({0, 1})
    world.lives[0] = coord.Life.DEAD
    world.settle()
    assert world.loads() == {0: 1, 1: 1}


def test_a_spare_of_an_avoided_node_becomes_a_member_after_all_others() -> None:
    world = World(0, 1, workers=2, spare=2)
    world.settle()
    world.step, world.coordinator.avoided = 5, frozenset({0})
    world.coordinator.scale(3)
    world.settle()
    assert world.loads() == {0: 1, 1: 2}


def test_a_job_that_begins_on_several_nodes_starts_no_worker_twice() -> None:
    world = World(0, 1, workers=6, min_nodes=2, spare=1)
    world.silent = {1}
    world.settle()
    world.silent = set()
    world.settle()
    assert world.loads() == {0: 3, 1: 3}
    assert len(world.homes) == 7


def test_the_first_worker_of_a_new_node_loads_while_it_joins() -> None:
    """So that it is of use at once."""
    world = host_comes(workers=6)
    world.decide()
    assert [world.homes[one] for one in world.lives].count(1) == 1
    world.settle()
    assert world.loads() == {0: 6}, "those that compute stay until it has joined"
    assert len(world.lives) == 7
    world.is_slow = False
    world.settle()
    assert world.loads() == {0: 3, 1: 3}
    assert max(world.homes) == 8, "each was started once"


def test_a_spare_that_still_loads_keeps_no_host_waiting() -> None:
    world = host_comes(is_slow=False, spare=1)
    spare = next(one for one in world.lives if one not in world.told.members)
    world.lives[spare] = coord.Life.STARTING
    world.decide()
    assert [world.homes[one] for one in world.lives].count(1) == 1


def test_a_node_that_does_not_get_there_is_no_reason_to_do_with_fewer_workers() -> None:
    world = host_comes()
    world.settle()
    world.lives[0] = coord.Life.DEAD
    world.settle()
    assert world.loads() == {0: 4}
    assert 0 not in world.told.members


def test_a_node_that_has_been_joining_for_long_is_told_of_once() -> None:
    world = host_comes()
    world.settle()
    world.now_s = 30.0
    world.settle()
    assert "node_joins_late" not in world.kinds()
    world.now_s = 31.0
    world.settle()
    (late,) = [one for one in world.notes if one.kind == "node_joins_late"]
    assert (late.node, "node 1 has been joining for 30 s" in late.reason) == (1, True)
    world.is_slow = False
    world.settle()
    assert world.told.nodes == (0, 1)


def test_what_was_started_for_a_refused_node_is_ended() -> None:
    world = host_comes(is_slow=False)
    world.decide()
    world.coordinator.leave(1)
    actions = world.decide()
    killed = [one.worker for one in only(coord.KillWorker, actions)]
    assert killed == [worker for worker, node in world.homes.items() if node == 1]
    assert killed


def test_fewer_workers_leave_the_node_that_has_most() -> None:
    world = World(0, 1, workers=4)
    world.settle()
    world.coordinator.scale(2)
    world.settle()
    assert world.loads() == {0: 1, 1: 1}


def test_a_node_on_which_nothing_starts_takes_no_worker_away() -> None:
    """Its workers die while starting: those that compute stay where they are."""
    world = World(0, workers=4)
    world.settle()
    world.step, members = 5, world.told.members
    world.nodes.add(1)
    for _ in range(30):
        world.decide()
        world.lives |= {one: coord.Life.DEAD for one in world.lives if world.homes[one] == 1}
    assert world.told.nodes == (0, 1)
    assert world.told.members == members


def test_a_worker_that_is_frozen_with_its_host_is_none_that_lives() -> None:
    """Nobody knows yet that its process is of no use: another one starts all the same."""
    world = World(0, 1, workers=1)
    world.settle()
    world.step = 5
    (member,) = world.told.members
    world.nodes.remove(world.homes[member])
    world.settle()
    assert world.lives[member] is coord.Life.ALIVE
    assert len(world.told.members) == 1
    assert world.told.members != (member,)
