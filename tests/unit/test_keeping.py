"""Which nodes keep which state: copies are made first, and dropped once they are not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.protocol.keeping import SHARE, Keeping
from policies.owning import SlowLink


def begun(
    kept: Mapping[int, Sequence[int]],
    *,
    replicas: int = 2,
    num_chunks: int = 4,
    departing: Sequence[int] = (),
) -> Keeping:
    """Some nodes, with what they keep."""
    keeping = Keeping(replicas, num_chunks)
    assert keeping.begin(kept, list(kept), departing) == ""
    return keeping


def settle(keeping: Keeping) -> int:
    """Commit rounds until nothing is missing; how many there were."""
    num = 0
    while keeping.is_moving:
        keeping.moved(keeping.moves())
        num += 1
        assert num < 1000, "it has no end"
    keeping.moved(())
    return num


EVERY = range(4)


def test_where_all_keep_everything_replicas_are_left_and_nothing_moves() -> None:
    keeping = begun(dict.fromkeys(range(3), EVERY))
    assert not keeping.is_moving
    assert keeping.moves() == ()
    assert all(len(row) == 2 for row in keeping.keepers)
    owners = [row[0] for row in keeping.keepers]
    assert sorted(owners.count(node) for node in range(3)) == [1, 1, 2]


def test_over_a_slow_link_goes_less_and_the_same_nodes_keep_the_same() -> None:
    keeping = begun(dict.fromkeys(range(3), range(24)), num_chunks=24)
    before = keeping.keepers
    assert keeping.route(()) == ""
    assert keeping.route([SlowLink(1, 2, 8.0)]) == "8 of 24 chunks go over link 1 - 2, 16 before"
    assert keeping.route([SlowLink(1, 2, 8.0)]) == "", "it is said again and again"
    after = keeping.keepers
    assert sum(row[0] in (1, 2) for row in after) == 8
    assert [sorted(row) for row in after] == [sorted(row) for row in before]
    keeping.moved(())
    assert keeping.keepers == after
    assert "owned by node 2, 0 before" not in keeping.route([SlowLink(2, None, 8.0)])
    assert not [row for row in keeping.keepers if row[0] == 2]
    assert keeping.route(()) == "no link is slow any more: all nodes own as many chunks again"
    assert keeping.keepers == before


def test_who_owns_what_follows_members_that_come_and_go_around_a_slow_link() -> None:
    keeping = begun({0: range(24), 1: range(24), 2: range(24), 3: ()}, num_chunks=24)
    keeping.route([SlowLink(1, 2, 8.0)])
    settle(keeping)
    assert any(3 in row for row in keeping.keepers)
    between = [row for row in keeping.keepers if row[0] in (1, 2)]
    assert all({*row} == {1, 2} for row in between[2:]), "but what balances nodes 1 and 2"
    assert keeping.admit((0, 1, 2), ()) == ""
    settle(keeping)
    assert sum(row[0] in (1, 2) for row in keeping.keepers) < 16


def test_a_copy_that_is_dropped_exists_until_a_round_is_committed_without_it() -> None:
    keeping = begun(dict.fromkeys(range(3), EVERY))
    assert all(len(row) == 3 for row in keeping.holders), "who has it in this version"
    keeping.moved(())
    assert keeping.holders == keeping.keepers
    assert all(len(row) == 2 for row in keeping.holders)


def test_what_is_missing_moves_from_those_that_have_it() -> None:
    keeping = begun({0: EVERY, 1: ()})
    assert keeping.is_moving
    assert all(row == (0,) for row in keeping.keepers)
    seen = []
    while moves := keeping.moves():
        assert keeping.moves() == moves, "until they are committed"
        assert {(one.sender, one.receiver) for one in moves} == {(0, 1)}
        keeping.moved(moves)
        seen += [one.chunk for one in moves]
        for one in moves:
            assert set(keeping.keepers[one.chunk]) == {0, 1}
    assert sorted(seen) == [0, 1, 2, 3]
    assert not keeping.is_moving
    assert sorted(row[0] for row in keeping.keepers) == [0, 0, 1, 1]


@pytest.mark.parametrize(("num_chunks", "most"), [(4, 1), (64, 64 // (2 * SHARE))])
def test_only_so_much_moves_in_a_step(num_chunks: int, most: int) -> None:
    keeping = begun({0: range(num_chunks), 1: ()}, num_chunks=num_chunks)
    assert len(keeping.moves()) == most
    assert settle(keeping) == num_chunks // most


def test_no_copy_is_dropped_before_those_that_are_wanted_exist() -> None:
    """Of one replica: the chunk is on both nodes, then on the other one."""
    keeping = begun({0: EVERY, 1: ()}, replicas=1)
    (move, *_) = moves = keeping.moves()
    assert keeping.keepers[move.chunk] == (0,)
    keeping.moved(moves)
    assert set(keeping.holders[move.chunk]) == {0, 1}
    assert keeping.keepers[move.chunk] == (1,)
    keeping.moved(keeping.moves())
    assert keeping.holders[move.chunk] == (1,)


def test_a_departing_node_keeps_its_copies_for_as_long_as_it_stays() -> None:
    """Another one may be lost meanwhile."""
    keeping = begun({0: EVERY, 1: EVERY, 2: ()}, departing=(1,))
    assert keeping.is_moving
    settle(keeping)
    for row in keeping.keepers:
        assert set(row) == {0, 1, 2}
        assert row[0] != 1
    assert keeping.admit((1, 2), (1,)) == "", "0 is lost: nothing of it is"
    assert keeping.admit((2,), ()) == "", "1 has left"
    assert keeping.keepers == ((2,),) * 4


def test_a_node_that_is_lost_is_replaced_from_the_other_replicas() -> None:
    keeping = begun(dict.fromkeys(range(3), EVERY))
    keeping.moved(())
    assert keeping.admit((0, 2), ()) == ""
    assert keeping.is_moving
    settle(keeping)
    assert all(set(row) == {0, 2} for row in keeping.keepers)


def test_a_new_member_keeps_nothing_at_first_and_gets_its_share() -> None:
    keeping = begun({0: EVERY, 1: EVERY})
    assert keeping.admit((0, 1, 2), ()) == ""
    assert all(2 not in row for row in keeping.keepers)
    settle(keeping)
    counts = [sum(node in row for row in keeping.keepers) for node in range(3)]
    assert sorted(counts) == [2, 3, 3]


def test_a_member_that_says_what_is_known_changes_nothing() -> None:
    keeping = begun({0: EVERY, 1: ()})
    keeping.moved(keeping.moves())
    before = keeping.keepers, keeping.moves(), keeping.is_moving
    mine = [chunk for chunk, row in enumerate(keeping.holders) if 1 in row]
    assert keeping.there(1, mine) == ""
    assert (keeping.keepers, keeping.moves(), keeping.is_moving) == before


def test_a_member_that_keeps_less_than_was_known_gets_it_again() -> None:
    keeping = begun({0: EVERY, 1: EVERY})
    assert not keeping.is_moving
    assert keeping.there(1, [2]) == ""
    assert keeping.is_moving
    settle(keeping)
    assert all(set(row) == {0, 1} for row in keeping.keepers)


def test_a_member_that_keeps_more_than_was_known_need_not_get_it() -> None:
    keeping = begun({0: EVERY, 1: ()})
    assert keeping.there(1, EVERY) == ""
    assert not keeping.is_moving
    assert all(set(row) == {0, 1} for row in keeping.keepers)


def test_what_is_lost_is_told_with_the_replicas_that_would_have_kept_it() -> None:
    keeping = begun({0: [0], 1: [0, 1], 2: [1, 2, 3], 3: [2, 3]})
    reason = keeping.admit((0, 3), ())
    assert reason.startswith("no copy of 1 of 4 chunks is left: nodes [1, 2] are lost")
    assert reason.endswith("replicas: 3 would have kept them")
    assert keeping.moves() == ()


def test_where_nobody_holds_anything_no_replicas_would_have_helped() -> None:
    keeping = begun({0: EVERY, 1: ()})
    reason = keeping.admit((1,), ())
    assert reason.startswith("no copy of 4 of 4 chunks is left: nodes [0] are lost")
    assert "replicas" not in reason


def test_what_is_not_there_at_the_start_is_told() -> None:
    reason = Keeping(2, 4).begin({0: [0], 1: [3]}, (0, 1), ())
    assert reason == (
        "no copy of 2 of 4 chunks is left: too many of those that held them were lost at once"
    )


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 12))
def test_whatever_happens_a_chunk_has_as_many_copies_as_before_or_as_wanted(
    data: st.DataObject, replicas: int, num_chunks: int
) -> None:
    """Nodes join and leave while copies move; no node is lost."""
    keeping = begun({0: range(num_chunks)}, replicas=replicas, num_chunks=num_chunks)
    nodes, departing, newest = [0], list[int](), 0
    for what in data.draw(st.lists(st.sampled_from(["join", "depart", "leave", "step"]))):
        copies = [len(set(row) - set(departing)) for row in keeping.holders]
        if what == "join" and len(nodes) < 5:
            newest += 1
            nodes.append(newest)
        elif what == "depart" and len(nodes) > len(departing) + 1:
            departing.append(data.draw(st.sampled_from([n for n in nodes if n not in departing])))
            copies = []
        elif what == "leave" and departing and not keeping.is_moving:
            keeping.moved(())
            nodes.remove(departing[0])
            del departing[0]
        else:
            keeping.moved(keeping.moves())
        assert keeping.admit(tuple(nodes), tuple(departing)) == ""
        wanted = min(replicas, len(nodes) - len(departing))
        for row, before in zip(keeping.holders, copies, strict=False):
            assert len(row) == len(set(row))
            assert set(row) <= set(nodes)
            assert len(set(row) - set(departing)) >= min(before, wanted)
    settle(keeping)
    stay = set(nodes) - set(departing)
    for row in keeping.holders:
        assert len(set(row) & stay) == min(replicas, len(stay))
