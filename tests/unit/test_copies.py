"""What nodes keep of the same chunks is compared: who is odd, when, and who is left behind."""

from __future__ import annotations

from elastic.core.protocol.messages import CopiesDigest, Pulse
from monitoring.copies import PATIENCE_S, Copies
from policies.verdicts import Node

RIGHT, WRONG = ((0, 7), (1, 8)), ((0, 7), (1, 9))


def say(copies: Copies, step: int, now_s: float, **nodes: tuple[tuple[int, int], ...]) -> None:
    """What each node says again and again, in a shuffled order."""
    for _ in range(2):
        for name, digests in nodes.items():
            copies.take(Pulse(int(name[1:]), step, copies=CopiesDigest(step, digests)), now_s)


def culprits(copies: Copies, now_s: float) -> list[object]:
    return [one.culprit for one in copies.verdicts(now_s)]


def test_nobody_is_odd_where_all_keep_the_same() -> None:
    copies = Copies()
    copies.take(Pulse(0, 3), 0.0)
    say(copies, 50, 0.0, n0=RIGHT, n1=RIGHT, n2=RIGHT)
    assert copies.verdicts(PATIENCE_S) == []
    assert copies.outvoted == frozenset()


def test_who_most_contradict_is_told_once_all_had_time_and_left_behind() -> None:
    copies = Copies()
    say(copies, 50, 0.0, n0=WRONG, n1=RIGHT)
    assert copies.verdicts(0.9 * PATIENCE_S) == [], "the third may agree with either"
    say(copies, 50, 0.9 * PATIENCE_S, n2=RIGHT)
    assert culprits(copies, PATIENCE_S) == [Node(0)]
    assert copies.outvoted == {0}
    say(copies, 50, 2 * PATIENCE_S, n0=WRONG, n1=RIGHT, n2=RIGHT)
    assert culprits(copies, 4 * PATIENCE_S) == [Node(0)], "until there is something newer"
    say(copies, 100, 5 * PATIENCE_S, n1=RIGHT, n2=RIGHT)
    assert culprits(copies, 6 * PATIENCE_S) == []
    assert copies.outvoted == {0}, "its number is never used again"


def test_of_two_that_differ_nobody_is_left_behind() -> None:
    copies = Copies()
    say(copies, 50, 0.0, n0=WRONG, n1=RIGHT)
    assert culprits(copies, PATIENCE_S) == [Node(0), Node(1)]
    assert copies.outvoted == frozenset()


def test_the_next_step_ends_a_comparison_whatever_time_it_had() -> None:
    copies = Copies()
    say(copies, 50, 0.0, n0=RIGHT, n1=RIGHT, n2=WRONG)
    say(copies, 100, 0.1, n0=RIGHT)
    say(copies, 50, 0.1, n0=WRONG, n1=WRONG)
    assert culprits(copies, 0.1) == [Node(2)]


def test_one_node_at_a_time_is_left_behind() -> None:
    """Else a chunk might be gone of which both had a copy."""
    copies = Copies()
    say(copies, 50, 0.0, n0=((0, 1),), n1=((0, 2),), n2=((0, 3),), n3=((0, 1),))
    assert culprits(copies, PATIENCE_S) == [Node(1), Node(2)]
    assert copies.outvoted == {1}
    say(copies, 100, 9.0, n0=((0, 1),), n2=((0, 3),), n3=((0, 1),))
    assert culprits(copies, 9.0 + PATIENCE_S) == [Node(2)]
    assert copies.outvoted == {1, 2}
