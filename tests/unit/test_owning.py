"""Who owns which chunk where links are slow: less goes over them, and nothing else changes."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from policies.owning import Rows, SlowLink, carried, decide
from policies.resharding import Interleaved


def even(num_chunks: int, num_nodes: int, replicas: int) -> list[tuple[int, ...]]:
    """As a job begins."""
    placed = Interleaved(replicas=replicas).place([1] * num_chunks, range(num_nodes))
    return [tuple(row) for row in placed.nodes_CR.tolist()]


def slowest(rows: Rows, num_nodes: int, slow: list[SlowLink]) -> float:
    """How long the link takes that takes longest, in chunks."""
    factors = {frozenset((one, other)): factor for one, other, factor in slow}
    return max(
        factors.get(frozenset(pair), 1.0) * carried(rows, *pair)
        for pair in combinations(range(num_nodes), 2)
    )


def cost(rows: Rows, slow: list[SlowLink]) -> float:
    """What is made small, by its definition."""
    nodes = sorted({node for row in rows for node in row})
    factors = {frozenset(one[:2]): one.factor for one in slow}
    return sum(
        (factors.get(frozenset(pair), 1.0) * carried(rows, *pair)) ** 2
        for pair in combinations(nodes, 2)
    )


def test_where_no_link_is_slow_all_stays() -> None:
    rows = even(24, 3, 2)
    assert decide(rows, []) == rows
    assert decide(rows, [SlowLink(0, 1, 1.0), SlowLink(5, 1, 9.0)]) == rows


def test_with_a_copy_everywhere_a_dead_slow_link_carries_nearly_nothing() -> None:
    rows = decide(even(60, 3, 3), [SlowLink(1, 2, 10.0)])
    assert carried(even(60, 3, 3), 1, 2) == 40
    assert carried(rows, 1, 2) == 1, "or nobody would see that it is well again"
    assert sorted((carried(rows, 0, 1), carried(rows, 0, 2))) == [59, 60]


def test_with_two_copies_it_carries_what_nobody_else_keeps() -> None:
    rows = even(60, 3, 2)
    after = decide(rows, [SlowLink(1, 2, 10.0)])
    assert carried(after, 1, 2) == sum({*row} == {1, 2} for row in rows) == 20


def test_a_slow_node_owns_nothing() -> None:
    slow = [SlowLink(3, other, 8.0) for other in range(3)]
    rows = decide(even(60, 4, 2), slow)
    assert [row for row in rows if row[0] == 3] == []
    owned = [carried(rows, one, 3) for one in range(3)]
    assert max(owned) - min(owned) <= 3, "the others share alike"


def test_a_link_that_is_hardly_slow_is_hardly_relieved() -> None:
    before, slow = even(60, 3, 3), [SlowLink(1, 2, 1.2)]
    after = decide(before, slow)
    assert 20 < carried(after, 1, 2) < 40
    assert slowest(after, 3, slow) < slowest(before, 3, slow)


def test_of_two_nodes_each_has_only_the_other() -> None:
    rows = even(10, 2, 2)
    assert decide(rows, [SlowLink(0, 1, 10.0)]) == rows


@pytest.mark.parametrize("seed", range(30))
def test_only_the_owner_changes_and_nothing_gets_slower(seed: int) -> None:
    dice = random.Random(seed)
    num_nodes = dice.randint(2, 7)
    before = even(dice.randint(1, 80), num_nodes, dice.randint(1, num_nodes))
    pairs = dice.sample(list(combinations(range(num_nodes), 2)), k=1)
    slow = [SlowLink(*pair, dice.uniform(1.2, 20.0)) for pair in pairs]
    after = decide(before, slow)
    assert [sorted(row) for row in after] == [sorted(row) for row in before]
    assert after == decide(after, slow), "it is settled"
    ((one, other, _),) = slow
    assert carried(after, one, other) <= carried(before, one, other), seed
    assert slowest(after, num_nodes, slow) <= 1.05 * slowest(before, num_nodes, slow) + 1, seed


def test_owners_between_which_only_rounding_chooses_do_not_change_for_ever() -> None:
    """These rows made a search in fractions go to and fro, without end."""
    owned, half = {0: 16, 1: 28, 2: 28, 3: 28, 4: 18}, 2.0**2.5
    rows: list[tuple[int, ...]] = [(node,) for node, num in owned.items() for _ in range(num)]
    rows.append((2, 1))
    slow = [SlowLink(3, 2, half), SlowLink(1, 0, half), SlowLink(2, 0, half), SlowLink(3, 1, half)]
    assert decide(rows, slow) == decide(decide(rows, slow), slow)


@pytest.mark.parametrize("seed", range(200))
def test_with_many_slow_links_of_any_placement_it_is_soon_settled(seed: int) -> None:
    dice = random.Random(seed)
    nodes = range(dice.randint(3, 7))
    before = [
        tuple(dice.sample(nodes, k=dice.randint(1, min(3, len(nodes)))))
        for _ in range(dice.randint(1, 120))
    ]
    pairs = list(combinations(nodes, 2))
    slow = [
        SlowLink(*pair, 2 ** (dice.randint(1, 8) / 2))  # as a monitor tells them
        for pair in dice.sample(pairs, k=dice.randint(1, len(pairs)))
    ]
    after = decide(before, slow)
    assert after == decide(after, slow), seed
    assert [sorted(row) for row in after] == [sorted(row) for row in before]
    assert cost(after, slow) <= cost(before, slow) * (1 + 1e-9), seed
