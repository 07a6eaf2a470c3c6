"""Flows on Clos networks: near the linear program's optimum, few cut, few moved; ECMP beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_array

from policies.spreading import Ways, spread
from policies.topology import Cable, Topology, clos, node_name
from policies.traffic import Flow, LeastLoaded, NoWay, Plan, Shares, TrafficView

POLICY = LeastLoaded()
SEEDS = st.integers(0, 2**32 - 1)


def open_ways(topology: Topology, flow: Flow) -> list[tuple[int, ...]]:
    capacities = topology.capacities
    every = topology.ways(flow.sender, flow.receiver)
    return [way for way in every if min(capacities[[*way]]) > 0]


def optimum_s(topology: Topology, flows: Sequence[Flow]) -> float:
    """How long the busiest link is busy at least, every flow being spread as it likes: an LP."""
    links, columns, sizes, owners = [], [], [], []
    num = 0
    for number, flow in enumerate(flows):
        for way in open_ways(topology, flow):
            links += way
            columns += [num] * len(way)
            sizes += [flow.size_bytes] * len(way)
            owners.append(number)
            num += 1
    capacities = topology.capacities
    num_links = len(capacities)
    rows = [*links, *range(num_links)]
    values = [*sizes, *(-capacities)]
    shape = (num_links, num + 1)
    of_links = csr_array((values, (rows, [*columns, *[num] * num_links])), shape=shape)
    of_flows = csr_array((np.ones(num), (owners, range(num))), shape=(len(flows), num + 1))
    solved = linprog(
        np.append(np.zeros(num), 1.0),
        A_ub=of_links,
        b_ub=np.zeros(num_links),
        A_eq=of_flows,
        b_eq=np.ones(len(flows)),
    )
    return float(solved.fun)


def longest_s(topology: Topology, shares: Shares) -> float:
    """Worked out from the shares alone; checks that they are whole and lead where they should."""
    loads = np.zeros(len(topology.capacities))
    for flow, parts in shares.items():
        assert sum(part.share for part in parts) == pytest.approx(1.0)
        for part in parts:
            assert part.way in open_ways(topology, flow)
            loads[[*part.way]] += part.share * flow.size_bytes
    used = loads > 0
    return float((loads[used] / topology.capacities[used]).max())


def planned(topology: Topology, flows: Sequence[Flow], before: Plan | None = None) -> Plan:
    plan = POLICY.decide(TrafficView(topology, flows, before.shares if before else {}))
    assert isinstance(plan, Plan), plan
    assert plan.longest_s == pytest.approx(longest_s(topology, plan.shares))
    return plan


def by_chance(topology: Topology, flows: Sequence[Flow], seed: int, num: int = 50) -> float:
    """What ECMP makes of it: the mean rate of the slowest flow, of the optimum."""
    dice, rates = np.random.default_rng(seed), []
    for _ in range(num):
        loads = np.zeros(len(topology.capacities))
        for flow in flows:
            ways = open_ways(topology, flow)
            loads[[*ways[dice.integers(len(ways))]]] += flow.size_bytes
        used = loads > 0
        rates.append(1 / (loads[used] / topology.capacities[used]).max())
    return float(np.mean(rates)) * optimum_s(topology, flows)


def across(num: int) -> list[Flow]:
    """From every node of one leaf to the one opposite."""
    return [Flow(node, num + node) for node in range(num)]


def permutation(num: int, seed: int) -> list[Flow]:
    order = np.random.default_rng(seed).permutation(num)
    return [Flow(node, int(to)) for node, to in enumerate(order) if node != to]


def unequal(topology: Topology, seed: int) -> Topology:
    """Links between switches of very different speeds."""
    dice = np.random.default_rng(seed)
    cables = [
        one
        if one.lower.startswith("node")
        else Cable(one.lower, one.upper, float(dice.uniform(0.3, 2)), float(dice.uniform(0.3, 2)))
        for one in topology.cables
    ]
    return Topology(tuple(cables))


def three_tiers(seed: int) -> Topology:
    """Four pods of four leafs of eight nodes; every switch has a link to four above it."""
    cables = [Cable(node_name(node), f"leaf {node // 8}", 1, 1) for node in range(128)]
    for leaf in range(16):
        cables += [Cable(f"leaf {leaf}", f"pod {leaf // 4}.{one}", 1, 1) for one in range(4)]
    for pod in range(4):
        for one in range(4):
            cables += [Cable(f"pod {pod}.{one}", f"core {one}.{to}", 1, 1) for to in range(4)]
    return unequal(Topology(tuple(cables)), seed)


SMALL = clos(leafs=2, nodes_per_leaf=64, spines=64)
WIDE = clos(leafs=2, nodes_per_leaf=128, spines=64)
CASES = [
    pytest.param(SMALL, across(64), 0.25, id="64 flows over 64 uplinks"),
    pytest.param(WIDE, across(128), 0.34, id="128 flows over 64 uplinks"),
    pytest.param(SMALL.with_capacity(128, 0), across(64), 0.25, id="one uplink is down"),
    pytest.param(
        clos(leafs=4, nodes_per_leaf=32, spines=16), permutation(128, 0), 0.33, id="half as many"
    ),
    pytest.param(
        unequal(clos(leafs=4, nodes_per_leaf=32, spines=16), 1),
        permutation(128, 1),
        0.2,
        id="unequal links",
    ),
    pytest.param(three_tiers(2), permutation(128, 2), 0.25, id="three tiers, unequal links"),
]


@pytest.mark.parametrize(("topology", "flows", "chance"), CASES)
def test_the_slowest_flow_is_near_the_optimum(
    topology: Topology, flows: list[Flow], chance: float
) -> None:
    plan, best_s = planned(topology, flows), optimum_s(topology, flows)
    assert best_s / plan.longest_s >= 0.95
    assert plan.slowest <= best_s / plan.longest_s + 1e-6
    assert by_chance(topology, flows, seed=0) == pytest.approx(chance, abs=0.06)
    assert plan.moved == ()


@pytest.mark.parametrize("flows", [across(64), across(128)], ids=["64", "128"])
def test_nothing_is_cut_where_whole_flows_do(flows: list[Flow]) -> None:
    plan = planned(SMALL if len(flows) == 64 else WIDE, flows)
    assert all(len(parts) == 1 for parts in plan.shares.values())
    assert set(Counter(parts[0].way[1] for parts in plan.shares.values()).values()) == {
        len(flows) // 64
    }


@pytest.mark.parametrize(
    ("topology", "flows", "cable", "factor", "most"),
    [
        pytest.param(SMALL, across(64), 128, 0.0, 1, id="an uplink with one flow dies"),
        pytest.param(SMALL, across(64), 130, 0.5, 1, id="it runs at half its speed"),
        pytest.param(WIDE, across(128), 256, 0.0, 2, id="an uplink with two flows dies"),
        pytest.param(SMALL, across(64), 0, 0.5, 0, id="a node is slow: nothing helps"),
        pytest.param(three_tiers(2), permutation(128, 2), 150, 0.0, 12, id="in three tiers"),
    ],
)
def test_when_a_link_changes_few_flows_move(
    topology: Topology, flows: list[Flow], cable: int, factor: float, most: int
) -> None:
    before = planned(topology, flows)
    changed = topology.with_capacity(cable, factor)
    after = planned(changed, flows, before)
    assert optimum_s(changed, flows) / after.longest_s >= 0.95
    assert len(after.moved) <= most
    for flow in flows:
        if flow not in after.moved:
            assert after.shares[flow] == before.shares[flow]


def test_the_same_again_moves_nothing_and_a_new_flow_moves_nobody() -> None:
    before = planned(SMALL, across(64)[:-1])
    assert planned(SMALL, across(64)[:-1], before).moved == ()
    assert planned(SMALL, across(64), before).moved == ()


def test_flows_without_a_way_are_named() -> None:
    topology = clos(leafs=2, nodes_per_leaf=2, spines=1).with_capacity(4, 0.0)
    cut_off = POLICY.decide(TrafficView(topology, [Flow(0, 1), Flow(0, 2)]))
    assert isinstance(cut_off, NoWay)
    assert cut_off.flows == (Flow(0, 2),)
    assert "0 -> 2" in cut_off.reason


def test_flows_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="twice"):
        POLICY.decide(TrafficView(SMALL, [Flow(0, 1), Flow(0, 1)]))
    with pytest.raises(ValueError, match="node 999 is not in the topology"):
        POLICY.decide(TrafficView(SMALL, [Flow(0, 999)]))


def test_ways_go_up_no_farther_than_they_must() -> None:
    topology = three_tiers(0)
    assert {len(way) for way in topology.ways(0, 1)} == {2}
    assert {len(way) for way in topology.ways(0, 9)} == {4}
    assert len(topology.ways(0, 9)) == 4
    assert {len(way) for way in topology.ways(0, 127)} == {6}
    assert len(topology.ways(0, 127)) == 16
    assert Topology((*topology.cables, Cable("node 500", "alone", 1, 1))).ways(0, 500) == ()


@pytest.mark.parametrize(
    ("spines", "least"),
    [pytest.param(8, 31, id="full bandwidth"), pytest.param(4, 48, id="half as many uplinks")],
)
def test_all_to_all_in_rounds_oversubscribes_no_link(spines: int, least: int) -> None:
    """32 nodes in four leafs; over four uplinks the 24 x 8 flows that leave a leaf need 48."""
    topology = clos(leafs=4, nodes_per_leaf=8, spines=spines)
    flows = [Flow(one, other) for one in range(32) for other in range(32) if one != other]
    rounds = POLICY.rounds(TrafficView(topology, flows))
    assert least <= len(rounds) <= 1.1 * least
    assert Counter(flow for one in rounds for flow in one) == Counter(flows)
    for one in rounds:
        assert (
            len({flow.sender for flow in one}) == len({flow.receiver for flow in one}) == len(one)
        )
        assert longest_s(topology, {flow: (share,) for flow, share in one.items()}) <= 1.0


def test_a_round_without_any_way_is_an_error() -> None:
    topology = clos(leafs=2, nodes_per_leaf=1, spines=1).with_capacity(2, 0.0)
    with pytest.raises(ValueError, match="nothing leads from 0 to 1"):
        POLICY.rounds(TrafficView(topology, [Flow(0, 1)]))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 5), st.integers(1, 6), st.integers(1, 6))
def test_any_network_and_any_flows_come_near_the_optimum(
    seed: int, leafs: int, nodes_per_leaf: int, spines: int
) -> None:
    dice = np.random.default_rng(seed)
    topology = unequal(clos(leafs=leafs, nodes_per_leaf=nodes_per_leaf, spines=spines), seed)
    num = leafs * nodes_per_leaf
    pairs = {tuple(dice.integers(num, size=2).tolist()) for _ in range(2 * num)}
    flows = [Flow(a, b, float(dice.uniform(0.5, 4))) for a, b in sorted(pairs) if a != b]
    if not flows:
        return
    best_s, plan = optimum_s(topology, flows), planned(topology, flows)
    note(f"seed {seed}: {len(flows)} flows, {plan.reason}")
    assert best_s / plan.longest_s >= 0.95
    uplink = leafs * nodes_per_leaf + int(dice.integers(leafs * spines))
    slower = topology.with_capacity(uplink, 0.2)
    again = planned(slower, flows, plan)
    assert optimum_s(slower, flows) / again.longest_s >= 0.95


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 4), st.integers(1, 5), st.integers(1, 5))
def test_the_bound_holds(seed: int, leafs: int, nodes_per_leaf: int, spines: int) -> None:
    topology = unequal(clos(leafs=leafs, nodes_per_leaf=nodes_per_leaf, spines=spines), seed)
    flows = permutation(leafs * nodes_per_leaf, seed)
    if not flows:
        return
    ways = Ways.of([open_ways(topology, one) for one in flows], len(topology.capacities))
    found = spread(ways, np.ones(len(flows)), topology.capacities)
    best_s = optimum_s(topology, flows)
    note(f"seed {seed}: {found.bound_s} <= {best_s} <= {found.longest_s}")
    assert found.bound_s <= best_s * (1 + 1e-6)
    assert best_s <= found.longest_s * (1 + 1e-6)
    assert found.longest_s <= 1.02 * best_s
