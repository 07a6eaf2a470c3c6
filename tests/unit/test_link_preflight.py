"""Which hosts are fit by their links: what is measured, in which order, and who is left out."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.link_preflight import PATIENCE_S, LinkPreflight
from actors.link_probe import BUDGET_BYTES, LEAST_BYTES, MOST_BYTES, NUM_ROUND_TRIPS, LinkProber
from actors.links import Link
from actors.listener import Listener
from elastic.core.protocol.frames import Block, Stage
from elastic.core.protocol.handshake import Credentials
from elastic.core.protocol.messages import (
    Membership,
    Message,
    ProbedLink,
    ProbeLink,
    Pulse,
    Report,
    Scale,
)
from policies.preflight import LinkFitness, LinkProbe, Pair, next_pairs

GOOD = LinkProbe(0.0002, 1e9)
SLOW = LinkProbe(0.0002, 2.4e6)
FAR = LinkProbe(0.041, 1e9)


def links(hosts: int, **others: LinkProbe) -> dict[Pair, LinkProbe]:
    """All that there are, alike but for those named `l12`, of node 1 to node 2, and so on."""
    named = {(int(name[1]), int(name[2])): one for name, one in others.items()}
    return dict.fromkeys(permutations(range(hosts), 2), GOOD) | named


def both(one: int, other: int, probe: LinkProbe) -> dict[str, LinkProbe]:
    return {f"l{one}{other}": probe, f"l{other}{one}": probe}


@pytest.mark.parametrize(
    ("probes", "unfit"),
    [
        pytest.param({}, [], id="nothing is known"),
        pytest.param(links(3), [], id="all alike"),
        pytest.param(links(2, l01=SLOW), [], id="of two nobody knows which"),
        pytest.param(links(3, **both(0, 2, SLOW), **both(1, 2, SLOW)), [2], id="a slow host"),
        pytest.param(links(3, l20=SLOW, l21=SLOW), [2], id="a slow sender"),
        pytest.param(links(3, l01=FAR, l21=FAR), [1], id="answers late"),
        pytest.param(links(3, **both(0, 1, SLOW), **both(0, 2, SLOW)), [0], id="the first is"),
        pytest.param(links(3, l12=SLOW), [2], id="one link of three hosts: the newer end"),
        pytest.param(links(4, l12=SLOW), [], id="one link of four hosts is no host's fault"),
        pytest.param(links(5, **both(3, 0, SLOW), **both(3, 1, SLOW), **both(3, 2, SLOW),
                           **both(3, 4, SLOW), l40=SLOW, l41=SLOW), [3, 4], id="two, worst first"),
        pytest.param(links(3, l20=LinkProbe(0.0002, 5e8), l21=LinkProbe(0.0002, 5e8)), [],
                     id="at the limit"),
        pytest.param(links(3, l20=LinkProbe(0.0009, 1e9), l21=LinkProbe(0.0009, 1e9)), [],
                     id="less than a millisecond later"),
    ],
)  # fmt: skip
def test_unfit_is_whose_links_are_far_slower_than_the_median(
    probes: Mapping[Pair, LinkProbe], unfit: list[int]
) -> None:
    assert list(LinkFitness().decide(probes, range(5))) == unfit


def test_what_is_said_has_the_numbers_and_the_setting() -> None:
    unfit = LinkFitness().decide(links(3, l20=SLOW, l21=LinkProbe(0.041, 2e6)), (1, 2))
    assert unfit == {
        2: "link 2 -> 1 carries 2.0 MB/s, the fleet's median is 1000.0 MB/s;"
        " takes 41.00 ms there and back, the fleet's median is 0.20 ms"
        " (workers.preflight 2), and 1 more of its links"
    }


def test_members_are_not_judged() -> None:
    probes = links(4, **both(1, 0, SLOW), **both(1, 2, SLOW), **both(1, 3, SLOW))
    assert list(LinkFitness().decide(probes, (1,))) == [1]
    assert LinkFitness().decide(probes, (3,)) == {}, "it is not to blame for one slow link"


def test_where_all_links_are_slow_nobody_is_unfit() -> None:
    assert LinkFitness().decide(dict.fromkeys(links(4), SLOW), range(4)) == {}


PAIRS = st.sets(
    st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda one: one[0] != one[1])
)


@given(PAIRS, PAIRS)
def test_no_host_sends_or_receives_twice_at_a_time(wanted: set[Pair], busy: set[Pair]) -> None:
    now = next_pairs(wanted, busy)
    assert {*now} <= wanted
    for end in (0, 1):
        ends = [pair[end] for pair in now]
        assert len(ends) == len({*ends})
        assert not {*ends} & {pair[end] for pair in busy}
    if wanted and not busy:
        assert now


def test_all_pairs_take_as_many_rounds_as_each_host_has_others() -> None:
    wanted, num = {*permutations(range(8), 2)}, 0
    while wanted:
        wanted -= {*next_pairs(wanted, ())}
        num += 1
    assert num == 7


# ------------------------------------------------------------------ the coordinator's turns


class FakeContacts:
    """Nodes that answer when the test lets them, as the links are."""

    def __init__(self, probes: Mapping[Pair, LinkProbe], heard: Iterable[int]) -> None:
        self.probes, self.asked = dict(probes), list[Pair]()
        self.reports: dict[int, Report | None] = {}
        self.pulses: deque[Pulse] = deque()
        self.probed: deque[ProbedLink] = deque()
        self.hear(heard)

    def hear(self, nodes: Iterable[int]) -> None:
        self.reports |= {one: Report(0, Membership(), (), node=one) for one in nodes}

    def turn(self, wait_s: float) -> list[Scale]:
        return []

    def send(self, node: int, message: Message) -> None:
        assert isinstance(message, ProbeLink)
        self.asked.append((node, message.peer))

    def close(self) -> None: ...

    def answer(self) -> None:
        for pair in self.asked:
            if pair in self.probes:
                one = self.probes[pair]
                self.probed.append(ProbedLink(*pair, one.round_trip_s, one.bytes_per_s))
        self.asked = []


class Turns:
    """A job that begins on the hosts that the test names."""

    def __init__(self, probes: Mapping[Pair, LinkProbe], *, limit: float | None = 2.0,
                 min_nodes: int = 1, heard: Iterable[int] = range(3)) -> None:  # fmt: skip
        self.contacts = FakeContacts(probes, heard)
        self.told: list[str] = []
        self.links = LinkPreflight(
            limit, min_nodes, self.contacts, lambda _, why: self.told.append(why)
        )
        self.membership, self.step, self.now_s = Membership(), 0, 0.0
        self.num_asked = 0

    def turn(self, there: Iterable[int] = range(3)) -> frozenset[int]:
        self.links.turn(
            list(there),
            Report(self.step, self.membership, ()),
            self.membership,
            first_step=0,
            now_s=self.now_s,
        )
        return self.links.held

    def settle(self, there: Iterable[int] = range(3)) -> frozenset[int]:
        """Until nobody is asked any more."""
        there = list(there)
        while True:
            held = self.turn(there)
            if not self.contacts.asked:
                return held
            self.num_asked += len(self.contacts.asked)
            self.contacts.answer()


def test_a_job_begins_once_all_links_are_probed() -> None:
    turns = Turns(links(3), heard=(0, 1))
    assert turns.turn() == {0, 1, 2}
    assert turns.contacts.asked == [], "one of them is not there yet"
    turns.contacts.hear([2])
    assert turns.turn() == {0, 1, 2}
    assert sorted(turns.contacts.asked) == [(0, 1), (1, 2), (2, 0)]
    assert turns.settle() == frozenset()
    assert (turns.links.unfit, turns.told) == ({}, [])
    assert turns.num_asked == 6, "each once"


SLOW_2 = both(2, 0, SLOW) | both(2, 1, SLOW)


def test_who_seems_unfit_is_probed_once_more_and_left_out() -> None:
    turns = Turns(links(3, **SLOW_2))
    assert turns.settle() == {2}
    assert turns.num_asked == 6 + 4
    (why,) = turns.told
    assert why.startswith("node 2 left out: link 2 -> 0 carries 2.4 MB/s")
    assert {*turns.links.unfit} == {2}
    assert turns.settle() == {2}
    assert len(turns.told) == 1


def test_who_was_slow_since_others_loaded_takes_part() -> None:
    turns = Turns(links(3, **SLOW_2))
    while turns.num_asked < 6:
        turns.turn()
        turns.num_asked += len(turns.contacts.asked)
        turns.contacts.answer()
    turns.contacts.probes = links(3)
    assert turns.settle() == frozenset()
    assert turns.told == []


def test_never_fewer_than_nodes_min_are_left() -> None:
    turns = Turns(links(3, **SLOW_2), min_nodes=3)
    assert turns.settle() == frozenset()
    (why,) = turns.told
    assert why.startswith("node 2 takes part, since there are too few (nodes.min 3): link 2 -> 0")
    assert turns.links.unfit == {}


def test_a_joiner_is_judged_before_it_joins_and_members_stay() -> None:
    turns = Turns(links(4, **{f"l{one}3": SLOW for one in range(3)}))
    assert turns.settle() == frozenset()
    turns.membership, turns.step = Membership(generation=1, members=(0, 1), nodes=(0, 1, 2)), 9
    turns.contacts.hear([3])
    before = turns.num_asked
    assert turns.settle(range(4)) == {3}
    assert turns.num_asked - before == 6 + 3, "only what is not known"
    assert {*turns.links.unfit} == {3}


def test_a_successor_measures_all_again_once_somebody_joins() -> None:
    turns = Turns(links(4))
    turns.membership, turns.step = Membership(generation=1, members=(0, 1), nodes=(0, 1, 2)), 9
    assert turns.settle() == frozenset()
    assert turns.num_asked == 0
    turns.contacts.hear([3])
    assert turns.turn(range(4)) == {3}
    assert turns.settle(range(4)) == frozenset()
    assert turns.links.unfit == {}


def test_nobody_waits_for_an_answer_that_does_not_come() -> None:
    probes = links(3)
    del probes[1, 0]
    turns = Turns(probes)
    assert turns.turn() == {0, 1, 2}
    for _ in range(20):
        turns.contacts.answer()
        held = turns.turn()
        turns.now_s += PATIENCE_S / 8
    assert held == frozenset()


def test_two_hosts_and_a_job_without_the_setting_probe_nothing() -> None:
    for turns in (Turns(links(2, l01=SLOW)), Turns(links(2), limit=None)):
        assert turns.settle(range(2)) == frozenset()
        assert turns.num_asked == 0


# ------------------------------------------------------------------------------ on real links


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    """A link between nodes 0 and 1: the end of each."""
    listeners = [Listener("127.0.0.1", Credentials(node, bytes(32))) for node in (0, 1)]
    listeners[1].call(0, listeners[0].address)
    made: dict[int, Link] = {}
    deadline_s = time.monotonic() + 10
    with selectors.DefaultSelector() as selector:
        for one in listeners:
            selector.register(one, selectors.EVENT_READ)
        while len(made) < 2:
            assert time.monotonic() < deadline_s
            selector.select(0.1)
            for one in listeners:
                for link in one.turn():
                    assert isinstance(link, Link)
                    made[1 - link.node] = link
    yield made[0], made[1]
    for one in (*made.values(), *listeners):
        one.close()


def test_a_link_is_measured_and_both_ends_carry_on(ends: tuple[Link, Link]) -> None:
    found: list[tuple[int, LinkProbe]] = []
    probers = [
        LinkProber({1 - me: link}, lambda peer, one: found.append((peer, one)))
        for me, link in enumerate(ends)
    ]
    seen: list[Block] = []

    def use(me: int, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            ends[me].flush()
        while (block := ends[me].receive(probers[me].place)) is not None:
            assert isinstance(block, Block)
            seen.append(block)
            probers[me].arrived(1 - me, block)

    probers[0].begin(1)
    deadline_s = time.monotonic() + 10
    with selectors.DefaultSelector() as selector:
        for me, link in enumerate(ends):
            link.attach(selector, me)
        while not found:
            assert time.monotonic() < deadline_s
            probers[0].turn()
            for key, mask in selector.select(0.1):
                use(key.data, mask)
        for link in ends:
            link.detach()
    ((peer, probe),) = found
    assert peer == 1
    assert 0 < probe.round_trip_s < 1
    assert probe.bytes_per_s > 1e6
    asked = [one for one in seen if one.tensor == 0]
    assert {one.stage for one in seen} == {Stage.PROBE}
    assert [one.length for one in asked[:NUM_ROUND_TRIPS]] == [1] * NUM_ROUND_TRIPS
    assert asked[NUM_ROUND_TRIPS].length == LEAST_BYTES
    assert max(one.length for one in asked) <= MOST_BYTES
    assert sum(one.length for one in asked) <= BUDGET_BYTES + NUM_ROUND_TRIPS
    assert not any(link.has_unsent for link in ends)
