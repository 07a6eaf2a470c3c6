"""Who owns and replicates which chunk, and how little moves: balance, distance, lower bound."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, kron, vstack

from policies.resharding import NOBODY, Interleaved, Lost, MembersView, Placement, Reshard

SEEDS = st.integers(0, 2**32 - 1)


def placed(num_chunks: int, nodes: Sequence[int], replicas: int) -> Placement:
    return Interleaved(replicas=replicas).place([1024] * num_chunks, nodes)


def decided(placement: Placement, nodes: Sequence[int], replicas: int) -> Reshard:
    decision = Interleaved(replicas=replicas).decide(MembersView(placement, nodes))
    assert isinstance(decision, Reshard), decision
    return decision


def rows(placement: Placement) -> list[list[int]]:
    return [[node for node in row if node != NOBODY] for row in placement.nodes_CR.tolist()]


def spread(names: Sequence[int] | np.ndarray, nodes: Sequence[int]) -> int:
    """How many more of the names the busiest node has than the idlest one."""
    counts = Counter(np.asarray(names).ravel().tolist())
    return max(counts[node] for node in nodes) - min(counts[node] for node in nodes)


def check_placement(placement: Placement, nodes: Sequence[int], replicas: int) -> None:
    copies = min(replicas, len(nodes))
    assert placement.nodes_CR.dtype == np.int32
    for row in rows(placement):
        assert len(row) == len(set(row)) == copies
        assert set(row) <= set(nodes)
    assert spread(placement.owners, nodes) <= 1
    assert spread(placement.nodes_CR, nodes) <= 1


def lower_bound(old: Placement, nodes: Sequence[int], replicas: int) -> int:
    """The formula of the module's docstring."""
    copies = min(replicas, len(nodes))
    left = [[node for node in row if node in nodes] for row in rows(old)]
    kept = Counter(node for row in left for node in row)
    least, num_more = divmod(len(left) * copies, len(nodes))
    by_nodes = sum(min(kept[node], least) for node in nodes)
    by_nodes += min(num_more, sum(kept[node] > least for node in nodes))
    by_chunks = sum(min(copies, len(row)) for row in left)
    return len(left) * copies - min(by_nodes, by_chunks)


def optimum(old: Placement, nodes: Sequence[int], replicas: int) -> int:
    """The fewest copies of any balanced placement: a flow, so its linear program is integral."""
    num_chunks, num_nodes = len(old.nodes_CR), len(nodes)
    copies = min(replicas, num_nodes)
    least, num_more = divmod(num_chunks * copies, num_nodes)
    is_left = np.array([[node in row for node in nodes] for row in rows(old)], float)
    of_chunk = csr_array(kron(eye_array(num_chunks), np.ones((1, num_nodes))))
    of_node = csr_array(kron(np.ones((1, num_chunks)), eye_array(num_nodes)))
    limits = [least + (num_more > 0)] * num_nodes + [-least] * num_nodes
    solved = linprog(
        -is_left.ravel(),
        A_eq=of_chunk,
        b_eq=[copies] * num_chunks,
        A_ub=vstack([of_node, -of_node]),
        b_ub=limits,
        bounds=(0, 1),
    )
    return num_chunks * copies + round(solved.fun)


def check_change(old: Placement, nodes: Sequence[int], replicas: int, change: Reshard) -> None:
    """All that must hold of any change, but for how much it sends."""
    check_placement(change.placement, nodes, replicas)
    before, at_once, after = rows(old), rows(change.recovered), rows(change.placement)
    for chunk, row in enumerate(at_once):  # nothing is copied: what is left, another owner perhaps
        assert sorted(row) == sorted(set(before[chunk]) & set(nodes))
    arrived = [(move.chunk, move.receiver) for move in change.moves]
    assert sorted(arrived) == sorted(
        (chunk, node)
        for chunk, row in enumerate(after)
        for node in row
        if node not in before[chunk]
    )
    assert all(move.sender in at_once[move.chunk] for move in change.moves)
    for pairs in change.rounds:
        busy = [node for move in pairs for node in (move.sender, move.receiver)]
        assert pairs
        assert len(busy) == len(set(busy))
    urgency = [len(at_once[move.chunk]) for move in change.rounds[0]] if change.rounds else []
    assert urgency == sorted(urgency)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 4096), min_size=1, max_size=60),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=12, unique=True),
    st.integers(1, 5),
)
def test_the_first_placement_is_balanced(sizes: list[int], nodes: list[int], replicas: int) -> None:
    placement = Interleaved(replicas=replicas).place(sizes, nodes)
    check_placement(placement, nodes, replicas)
    owned = [sum(np.array(sizes)[placement.owners == node]) for node in nodes]
    assert max(owned) - min(owned) <= max(sizes)
    again = Interleaved(replicas=replicas).place(sizes, nodes[::-1])
    assert np.array_equal(placement.nodes_CR, again.nodes_CR)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 120), st.integers(2, 12), st.integers(2, 5))
def test_at_first_a_node_is_replicated_evenly_over_all_others(
    num_chunks: int, num_nodes: int, replicas: int
) -> None:
    placement = placed(num_chunks, range(num_nodes), replicas)
    for owner in range(num_nodes):
        others = [node for node in range(num_nodes) if node != owner]
        assert spread(placement.nodes_CR[placement.owners == owner, 1:], others) <= 1


def test_a_small_placement() -> None:
    assert placed(7, [4, 9, 2], 2).nodes_CR.tolist() == [
        *([2, 9], [4, 2], [9, 4]),
        *([2, 4], [4, 9], [9, 2]),
        [2, 4],
    ]


CHANGES = [
    pytest.param(10, 100, 2, 1, 0, id="one of ten is lost"),
    pytest.param(10, 100, 2, 0, 1, id="an eleventh joins"),
    pytest.param(10, 100, 2, 1, 1, id="one is replaced"),
    pytest.param(3, 100, 2, 1, 0, id="one of three is lost"),
    pytest.param(3, 100, 2, 0, 1, id="a fourth joins"),
    pytest.param(2, 41, 2, 0, 1, id="a third joins"),
    pytest.param(1, 41, 2, 0, 1, id="a second joins"),
    pytest.param(1, 41, 1, 0, 5, id="five join, no replicas"),
    pytest.param(9, 200, 3, 2, 0, id="two of nine are lost, three copies"),
    pytest.param(5, 3, 2, 1, 0, id="fewer chunks than nodes"),
    pytest.param(4, 40, 4, 1, 0, id="every node has every chunk, one is lost"),
    pytest.param(4, 40, 9, 0, 2, id="every node has every chunk, two join"),
    pytest.param(4, 40, 2, 0, 0, id="nothing changes"),
]


@pytest.mark.parametrize(("num", "num_chunks", "replicas", "lost", "joined"), CHANGES)
def test_a_change_sends_no_more_than_it_must(
    num: int, num_chunks: int, replicas: int, lost: int, joined: int
) -> None:
    old = placed(num_chunks, range(num), replicas)
    nodes = range(lost, num + joined)
    change = decided(old, nodes, replicas)
    check_change(old, nodes, replicas, change)
    assert len(change.moves) == lower_bound(old, nodes, replicas)
    if not lost:
        assert np.array_equal(change.recovered.nodes_CR, old.nodes_CR)


def random_change(
    placement: Placement, nodes: list[int], replicas: int, pick: random.Random
) -> list[int]:
    """The members after some are lost, fewer than there are copies, and some join."""
    copies = placement.nodes_CR.shape[1]
    num_lost = pick.randint(0, min(copies - 1, len(nodes) - 1))
    num_joined = pick.randint(0, 2) if len(nodes) < 9 else 0
    stay = pick.sample(nodes, len(nodes) - num_lost)
    return stay + list(range(max(nodes) + 1, max(nodes) + 1 + num_joined))


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 8), st.integers(1, 60), st.integers(1, 4))
def test_any_history_of_changes_stays_balanced_and_sends_little(
    seed: int, num_nodes: int, num_chunks: int, replicas: int
) -> None:
    """Nodes are lost and join, `replicas` changes. The seed is in what hypothesis prints."""
    pick = random.Random(seed)
    nodes, placement = list(range(num_nodes)), placed(num_chunks, range(num_nodes), replicas)
    for _ in range(6):
        wanted = pick.randint(1, 4) if pick.random() < 0.2 else replicas
        members = random_change(placement, nodes, replicas, pick)
        change = decided(placement, members, wanted)
        note(f"{nodes} -> {members}, replicas {replicas} -> {wanted}: {change.reason}")
        check_change(placement, members, wanted, change)
        bound = lower_bound(placement, members, wanted)
        if len(change.moves) > bound:
            event("the formula cannot be reached, or is missed")
            fewest = optimum(placement, members, wanted)
            assert len(change.moves) <= max(1.05 * fewest, fewest + 1)
        nodes, placement, replicas = members, change.placement, wanted


@pytest.mark.parametrize("num_nodes", [3, 4, 6, 12])
def test_no_node_is_hot_when_one_is_lost(num_nodes: int) -> None:
    nodes = range(num_nodes)
    old = placed(20 * num_nodes, nodes, 2)
    for gone in nodes:
        members = [node for node in nodes if node != gone]
        change = decided(old, members, 2)
        assert spread([move.sender for move in change.moves], members) <= 1
        assert spread([move.receiver for move in change.moves], members) <= 1
        assert spread(change.recovered.owners, members) <= 1


def test_no_node_is_hot_after_many_changes() -> None:
    pick = random.Random(5)
    nodes, placement, beyond = list(range(6)), placed(120, range(6), 2), []
    for number in range(6, 46):
        joins = pick.random() < 0.5 if 4 < len(nodes) < 8 else len(nodes) == 4
        nodes = [*nodes, number] if joins else pick.sample(nodes, len(nodes) - 1)
        placement = decided(placement, nodes, 2).placement
        members = nodes[1:]
        change = decided(placement, members, 2)
        sent = Counter(move.sender for move in change.moves)
        beyond.append(max(sent.values()) - -(-len(change.moves) // len(members)))
        assert spread(change.recovered.owners, members) <= 1
    assert max(beyond) <= 4
    assert np.mean(beyond) < 1


def test_a_newcomer_is_sent_to_by_everybody_one_chunk_at_a_time() -> None:
    change = decided(placed(100, range(4), 2), range(5), 2)
    assert len(change.rounds) == len(change.moves) == 40
    assert Counter(move.sender for move in change.moves) == dict.fromkeys(range(4), 10)


def test_many_newcomers_are_sent_to_in_parallel() -> None:
    change = decided(placed(400, range(8), 2), range(16), 2)
    assert len(change.moves) == 400
    assert len(change.rounds) <= 60  # 50 to each newcomer


def test_chunks_with_one_copy_left_are_sent_first() -> None:
    old = placed(120, range(6), 3)
    change = decided(old, range(2, 6), 3)
    left = [sum(node >= 2 for node in row) for row in rows(old)]
    assert {left[move.chunk] for move in change.rounds[0]} == {1}
    means = [np.mean([left[move.chunk] for move in pairs]) for pairs in change.rounds]
    assert means[-1] == 2
    assert sum(after < before for before, after in pairwise(means)) <= len(means) // 3


def test_a_replica_becomes_the_owner_before_anything_is_copied() -> None:
    old = placed(90, range(3), 2)
    change = decided(old, [0, 2], 2)
    for before, at_once in zip(rows(old), rows(change.recovered), strict=True):
        assert at_once[0] == (before[0] if before[0] != 1 else before[1])


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_a_decision_is_the_same_everywhere(seed: int) -> None:
    pick = random.Random(seed)
    old, members = placed(60, range(7), 3), [*pick.sample(range(7), 5), 7, 8, 9]
    first, other = decided(old, members, 3), decided(old, pick.sample(members, 8), 3)
    assert first.rounds == other.rounds
    assert np.array_equal(first.placement.nodes_CR, other.placement.nodes_CR)
    assert np.array_equal(first.recovered.nodes_CR, other.recovered.nodes_CR)


def test_chunks_without_a_copy_are_named_and_what_would_have_kept_them() -> None:
    old = placed(30, range(5), 2)
    lost = Interleaved(replicas=2).decide(MembersView(old, [0, 2, 4]))
    assert isinstance(lost, Lost)
    assert lost.chunks == tuple(i for i, row in enumerate(rows(old)) if set(row) == {1, 3})
    assert lost.chunks
    assert lost.replicas == 3
    assert "replicas: 3" in lost.reason
    assert "[1, 3]" in lost.reason
    decided(placed(30, range(5), lost.replicas), [0, 2, 4], lost.replicas)


def test_no_number_of_replicas_keeps_what_all_nodes_held() -> None:
    lost = Interleaved().decide(MembersView(placed(4, [0, 1], 2), [2]))
    assert isinstance(lost, Lost)
    assert lost.replicas is None
    assert lost.chunks == (0, 1, 2, 3)


@pytest.mark.parametrize("nodes", [[], [1, 1], [-1, 2]], ids=["none", "twice", "negative"])
def test_members_that_cannot_be(nodes: list[int]) -> None:
    with pytest.raises(ValueError, match="different numbers"):
        Interleaved().place([1], nodes)
    with pytest.raises(ValueError, match="different numbers"):
        Interleaved().decide(MembersView(placed(1, [0], 1), nodes))


@pytest.mark.parametrize(
    "nodes", [range(1, 10_000), range(10_001), range(1, 10_001)], ids=["lost", "joined", "both"]
)
def test_ten_thousand_nodes_are_decided_on_without_searching_far(nodes: range) -> None:
    """0.3 s in a process of its own; 1.5 s was seen amid all other tests, hence the wide limit."""
    old = placed(30_000, range(10_000), 2)
    start_s = time.thread_time()
    change = decided(old, nodes, 2)
    assert time.thread_time() - start_s < 5.0
    assert len(change.moves) == lower_bound(old, nodes, 2)
    assert spread(change.placement.owners, nodes) <= 1
    assert spread(change.placement.nodes_CR, nodes) <= 1


# --- nodes that leave as planned -------------------------------------------------------------


leavings = st.tuples(
    st.integers(2, 7), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2), SEEDS
)


@settings(max_examples=300, deadline=None)
@given(leavings)
def test_what_leaving_nodes_hold_is_sent_to_those_that_stay(
    drawn: tuple[int, int, int, int, int],
) -> None:
    """Nothing is placed on them, and no more is sent than if their copies were gone already."""
    num_nodes, replicas, num_chunks, num_joined, seed = drawn
    dice = random.Random(seed)
    before = list(range(num_nodes))
    leaving = dice.sample(before, dice.randrange(1, num_nodes))
    members = [*before, *range(10, 10 + num_joined)]
    stay = [node for node in members if node not in leaving]
    old = placed(num_chunks, before, replicas)
    decision = Interleaved(replicas=replicas).decide(MembersView(old, members, leaving))
    assert isinstance(decision, Reshard), "nothing is lost while they have a copy"
    check_placement(decision.placement, stay, replicas)
    bound = lower_bound(old, stay, replicas)
    assert bound <= len(decision.moves) <= bound + 2
    holders = [set(row) for row in rows(old)]
    for move in decision.moves:
        assert move.sender in holders[move.chunk]
        assert move.receiver in stay
        assert move.receiver not in holders[move.chunk]
    for row, kept, move_to in zip(
        rows(decision.placement),
        holders,
        [{m.receiver for m in decision.moves if m.chunk == c} for c in range(num_chunks)],
        strict=True,
    ):
        assert set(row) <= kept | move_to, "every copy is there or on its way"


def test_a_leaving_node_sends_what_it_alone_holds() -> None:
    old = placed(8, [0, 1], 1)
    decision = Interleaved(replicas=1).decide(MembersView(old, [0, 1], [1]))
    assert isinstance(decision, Reshard)
    assert {(move.sender, move.receiver) for move in decision.moves} == {(1, 0)}
    assert sorted(move.chunk for move in decision.moves) == [
        chunk for chunk, row in enumerate(rows(old)) if row == [1]
    ]


def test_recovered_names_leaving_nodes_too() -> None:
    """They still own and update what they hold: no copy was made yet."""
    old = placed(6, [0, 1, 2], 2)
    decision = Interleaved(replicas=2).decide(MembersView(old, [0, 1, 2], [2]))
    assert isinstance(decision, Reshard)
    assert [set(row) for row in rows(decision.recovered)] == [set(row) for row in rows(old)]


def test_a_leaving_node_that_is_lost_is_lost() -> None:
    old = placed(6, [0, 1, 2], 1)
    decision = Interleaved(replicas=1).decide(MembersView(old, [0, 1], [1]))
    assert isinstance(decision, Lost)
    assert decision.replicas == 2


def test_one_node_has_to_stay() -> None:
    with pytest.raises(ValueError, match=r"nodes \[0, 1\] are all leaving: one has to stay"):
        Interleaved().decide(MembersView(placed(4, [0, 1], 2), [0, 1], [1, 0]))
