"""Links on which nothing came: which of them are broken, and which nodes say nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from elastic.core.protocol.messages import CutCount, Pulse
from monitoring.cuts import TOLD_S, Cuts
from policies.cuts import SILENT_S, Cut, decide
from policies.verdicts import Culprit, Kind, Link, Node

NOW, LONG_AGO = 0.1, 1.2


@pytest.mark.parametrize(
    ("cuts", "culprits"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([Cut(1, 2, 7, NOW), Cut(2, 1, 7, NOW)], [Link(1, 2)], id="both ends say so"),
        pytest.param([Cut(2, 1, 7, NOW)], [Link(1, 2)], id="one end says so"),
        pytest.param(
            [Cut(2, 0, 7, LONG_AGO), Cut(2, 1, 7, LONG_AGO)], [], id="others may still hear it"
        ),
        pytest.param([Cut(2, 0, 7, NOW), Cut(2, 1, 7, NOW)], [Node(2)], id="the end they share"),
        pytest.param(
            [Cut(0, 1, 7, NOW), Cut(2, 3, 7, NOW)], [Link(0, 1), Link(2, 3)], id="two links"
        ),
    ],
)
def test_what_is_broken_lies_between_nodes_that_live(
    cuts: Sequence[Cut], culprits: Sequence[Culprit]
) -> None:
    found = decide(cuts, [0, 1, 3])
    assert [one.culprit for one in found] == culprits
    assert {one.kind for one in found} <= {Kind.HANG_IN_COMMUNICATION}
    assert all(0.4 < one.confidence < 1 for one in found)
    assert all(one.since_step == 7 for one in found)


@pytest.mark.parametrize(
    ("answered", "kind", "why"),
    [
        pytest.param([True] * 3, Kind.HANG_OUTSIDE, "though its kernel answers", id="it froze"),
        pytest.param(
            [True, True, False], Kind.HANG_OUTSIDE, "answers", id="most say that it froze"
        ),
        pytest.param([False] * 3, Kind.HANG_IN_COMMUNICATION, "cut off", id="its cable is cut"),
    ],
)
def test_a_node_that_says_nothing_to_anybody_froze_or_is_cut_off(
    answered: Sequence[bool], kind: Kind, why: str
) -> None:
    told = zip((0, 1, 3), answered, strict=True)
    cuts = [Cut(2, one, 7, LONG_AGO, is_answered) for one, is_answered in told]
    assert decide(cuts, [0, 1, 2, 3, 4]) == [], "node 4 may still hear it"
    (found,) = decide(cuts, [0, 1, 2, 3])
    assert (found.kind, found.culprit, found.since_step) == (kind, Node(2), 7)
    assert found.reason.startswith("node 2 has said nothing to any of 3 nodes for 1 s, ")
    assert found.reason.endswith(why)


def test_two_that_froze_together_are_both_named() -> None:
    cuts = [Cut(one, other, 7, LONG_AGO, True) for one in (2, 3) for other in (0, 1)]
    assert [one.culprit for one in decide(cuts, [0, 1, 2, 3])] == [Node(2), Node(3)]


class Nodes:
    """Three nodes that are asked every 0.1 s, and say how often they gave which link up."""

    def __init__(self) -> None:
        self.cuts, self.now_s = Cuts(), 100.0
        self.counts: dict[int, dict[int, int]] = {0: {}, 1: {}, 2: {}}

    def look(self, num: int = 1, *, but: Sequence[int] = ()) -> list[Culprit]:
        for _ in range(num):
            self.now_s += 0.1
            for node in self.counts.keys() - set(but):
                cuts = tuple(CutCount(*one) for one in self.counts[node].items())
                self.cuts.take(Pulse(node, 7, cuts=cuts), self.now_s)
        return [one.culprit for one in self.cuts.verdicts(self.now_s)]


def test_a_link_that_is_given_up_is_told_for_a_while() -> None:
    nodes = Nodes()
    assert nodes.look(20) == []
    nodes.counts[1][2] = 1
    assert nodes.look() == [Link(1, 2)]
    nodes.counts[2][1] = 1
    assert nodes.look(20) == [Link(1, 2)]
    assert nodes.look(int(10 * TOLD_S)) == []
    nodes.counts[2][1] = 2
    assert nodes.look() == [Link(1, 2)], "it is cut again"


def test_a_coordinator_that_hears_nobody_for_a_while_takes_nobody_for_dead() -> None:
    """It asks for the next generation, say, which is what a link that is given up leads to."""
    nodes = Nodes()
    nodes.look(20)
    nodes.now_s += 3.0
    nodes.counts[2][1] = 1
    nodes.cuts.take(Pulse(2, 7, cuts=(CutCount(1, 1),)), nodes.now_s)
    assert nodes.look(but=[1]) == [Link(1, 2)]


def test_a_node_that_says_nothing_to_anybody_is_no_broken_link() -> None:
    nodes = Nodes()
    nodes.look(20)
    nodes.look(int(10 * SILENT_S), but=[2])
    nodes.counts[0][2] = nodes.counts[1][2] = 1
    assert nodes.look(but=[2]) == [Node(2)]
    assert nodes.look(int(10 * TOLD_S) + 1, but=[2]) == []
    assert nodes.look(20) == [], "nor when it is back"


def test_what_was_given_up_before_anybody_watched_is_over() -> None:
    nodes = Nodes()
    nodes.counts[0][1] = 3
    assert nodes.look(5) == []


def test_a_link_in_pieces_is_told_with_its_step_and_why() -> None:
    (verdict,) = decide([Cut(2, 1, 7, NOW)], [0, 1, 2])
    assert verdict.reason == (
        "link 1 -> 2 carries nothing: not even a ping came for 1 s, though both ends live"
    )
