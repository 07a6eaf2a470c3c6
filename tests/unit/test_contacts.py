"""Whom the coordinator talks to: greeted once, told of each other, and forgotten when gone."""

from __future__ import annotations

import os
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.channel import Channel, accept, listen
from actors.contacts import ManyContacts, OneContact
from actors.links import Link
from actors.listener import Listener
from actors.mesh import COORDINATOR, Address
from elastic.core.errors import ChannelClosed
from elastic.core.protocol.frames import Block
from elastic.core.protocol.handshake import Credentials
from elastic.core.protocol.messages import Admit, Membership, Message, Peers, Report, Scale, Stop
from elastic.core.protocol.orders import NodeMessage

HOST, SECRET = "127.0.0.1", bytes(32)
GREETING = Report(step=0, membership=Membership(), connected=())
REPORT = Report(step=3, membership=Membership(generation=2), connected=(1,))


# --- one node --------------------------------------------------------------------------------


@pytest.fixture
def one(tmp_path: Path) -> Iterator[OneContact]:
    contacts = OneContact(tmp_path / "socket")
    yield contacts
    contacts.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with listen(tmp_path / "socket") as listener:
        yield listener


@pytest.fixture
def channel(one: OneContact, listener: socket.socket) -> Iterator[Channel]:
    """The aggregator's end."""
    assert one.turn(0.0) == []
    channel = accept(listener)
    yield channel
    channel.close()


def test_before_the_aggregator_listens_there_is_nobody(one: OneContact) -> None:
    assert (one.turn(0.0), one.reports) == ([], {})
    one.send(0, Stop("nobody hears it"))


def test_the_aggregator_is_greeted_and_its_newest_report_counts(
    one: OneContact, channel: Channel
) -> None:
    assert channel.receive() == GREETING
    assert one.reports == {0: None}
    for message in (GREETING, Scale(2), REPORT, Scale(-1, 5)):
        channel.send(message)
    assert one.turn(1.0) == [Scale(2), Scale(-1, 5)]
    assert one.reports == {0: REPORT}
    one.send(0, Admit(Membership(generation=4)))
    one.send(1, Stop("to nobody"))
    assert channel.receive() == Admit(Membership(generation=4))
    assert channel.receive() is None


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process has so many that what it opens next is beyond what `select` can wait for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    with ExitStack() as opened:
        for _ in range(1024):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_may_have_many_files_open(
    many_files: None, one: OneContact, listener: socket.socket
) -> None:
    assert one.turn(0.0) == []
    with closing(accept(listener)) as channel:
        assert channel.fileno() > 1024
        channel.send(Scale(2))
        assert one.turn(10.0) == [Scale(2)]


@pytest.mark.parametrize("notices_by", ["reading", "sending"])
def test_an_aggregator_that_is_gone_is_forgotten_and_its_successor_greeted(
    notices_by: str, one: OneContact, listener: socket.socket, channel: Channel
) -> None:
    channel.send(REPORT)
    one.turn(1.0)
    channel.close()
    if notices_by == "reading":
        one.turn(1.0)
    else:
        one.send(0, Stop("nobody hears it"))
    assert one.reports == {}
    one.turn(0.0)
    successor = accept(listener)
    assert successor.receive() == GREETING
    assert one.reports == {0: None}
    successor.close()


# --- many nodes ------------------------------------------------------------------------------


@dataclass
class FakeNode:
    """The aggregator of a node, as far as the coordinator sees it."""

    listener: Listener
    link: Link | None = None
    said: list[Message | NodeMessage | Block] = field(default_factory=list)

    def turn(self) -> None:
        for made in self.listener.turn():
            assert isinstance(made, Link)
            assert made.node == COORDINATOR
            self.link = made
        try:
            while self.link is not None and (frame := self.link.receive(lambda _: None)):
                self.said.append(frame)
        except ChannelClosed:
            self.end_link()

    def end_link(self) -> None:
        assert self.link is not None
        self.link.close()
        self.link = None

    def say(self, message: Message) -> None:
        assert self.link is not None
        self.link.send(message)

    def close(self) -> None:
        if self.link is not None:
            self.end_link()
        self.listener.close()


@dataclass
class World:
    contacts: ManyContacts
    addresses: dict[int, Address]
    nodes: dict[int, FakeNode] = field(default_factory=dict)
    asked: list[Scale] = field(default_factory=list)

    def begin(self, node: int) -> FakeNode:
        """A node's aggregator listens, and the coordinator learns where."""
        self.nodes[node] = made = FakeNode(Listener(HOST, Credentials(node, SECRET)))
        self.addresses[node] = made.listener.address
        return made

    @property
    def peers(self) -> Peers:
        return Peers(tuple((node, *where) for node, where in sorted(self.addresses.items())))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline_s, "it does not happen"
            for node in self.nodes.values():
                node.turn()
            self.asked += self.contacts.turn(0.001)


@pytest.fixture
def world() -> Iterator[World]:
    addresses: dict[int, Address] = {}
    world = World(ManyContacts(HOST, SECRET, lambda: addresses), addresses)
    yield world
    world.contacts.close()
    for node in world.nodes.values():
        node.close()


def test_each_node_is_told_of_all_before_it_is_greeted(world: World) -> None:
    """It remembers them for its successor, whatever comes next."""
    nodes = [world.begin(0), world.begin(1)]
    world.until(lambda: all(len(node.said) == 2 for node in nodes))
    assert [node.said for node in nodes] == [[world.peers, GREETING]] * 2
    assert world.contacts.reports == {0: None, 1: None}


def test_all_are_told_when_another_node_is_there(world: World) -> None:
    first = world.begin(0)
    world.until(lambda: len(first.said) == 2)
    second = world.begin(1)
    world.until(lambda: len(second.said) == 2 and len(first.said) == 3)
    assert first.said[2] == second.said[0] == world.peers
    world.until(lambda: True)
    assert len(first.said) == 3  # nothing has changed since


def test_reports_and_requests_are_kept_by_who_said_them(world: World) -> None:
    nodes = [world.begin(0), world.begin(1)]
    world.until(lambda: len(world.contacts.reports) == 2 and all(node.link for node in nodes))
    nodes[0].say(REPORT)
    nodes[1].say(GREETING)
    nodes[1].say(Scale(1))
    world.until(lambda: world.contacts.reports == {0: REPORT, 1: GREETING} and bool(world.asked))
    assert world.asked == [Scale(1)]
    assert world.contacts.turn(0.0) == []  # asked once
    world.contacts.send(1, Stop("only you"))
    world.contacts.send(7, Stop("nobody"))
    world.until(lambda: Stop("only you") in nodes[1].said)
    assert Stop("only you") not in nodes[0].said


def test_a_node_that_is_lost_has_no_report_until_it_speaks_again(world: World) -> None:
    lost, other = world.begin(0), world.begin(1)
    world.until(lambda: len(world.contacts.reports) == 2 and bool(lost.link and other.link))
    for node in (lost, other):
        node.say(REPORT)
    world.until(lambda: world.contacts.reports == {0: REPORT, 1: REPORT})
    lost.said.clear()
    lost.end_link()
    world.until(lambda: 0 not in world.contacts.reports)
    world.until(lambda: len(lost.said) == 2)
    assert lost.said == [world.peers, GREETING]
    assert world.contacts.reports == {0: None, 1: REPORT}


def test_a_node_that_cannot_be_told_is_lost(world: World) -> None:
    node = world.begin(0)
    world.until(lambda: 0 in world.contacts.reports)
    world.contacts._mesh.links[0]._socket.shutdown(socket.SHUT_RDWR)
    world.contacts.send(0, Stop("nobody hears it"))
    assert world.contacts.reports == {}
    world.until(lambda: 0 in world.contacts.reports and node.link is not None)


def test_at_the_end_every_node_is_left(world: World) -> None:
    node = world.begin(0)
    world.until(lambda: len(node.said) == 2)
    world.contacts.close()
    assert world.contacts.reports == {}
    assert node.link is not None
    with selectors.DefaultSelector() as selector:
        selector.register(node.link.fileno(), selectors.EVENT_READ)
        assert selector.select(10)
    node.turn()
    assert node.link is None
