"""Whom the coordinator talks to: the acting aggregator of each node, as far as it can be reached.

Only carries: what a report means is the protocol's business.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from actors.channel import Channel, connect
from actors.links import Link, Memory
from actors.listener import Listener
from actors.mesh import COORDINATOR, Address, Down, Mesh, Up
from elastic.core.errors import ChannelClosed, ProtocolError
from elastic.core.protocol.frames import Block
from elastic.core.protocol.handshake import Credentials
from elastic.core.protocol.messages import (
    Membership,
    Message,
    Peers,
    ProbedLink,
    Pulse,
    Report,
    Scale,
)

_GREETING = Report(step=0, membership=Membership(), connected=())


class Contacts(Protocol):
    """The nodes that can be reached. `reports` are the newest; None: it has said nothing yet.

    `pulses`: answers to `Look`, for whoever asked; `probed`: to `ProbeLink`.
    """

    reports: dict[int, Report | None]
    pulses: deque[Pulse]
    probed: deque[ProbedLink]

    def turn(self, wait_s: float) -> list[Scale]:
        """Take what is said, after at most `wait_s`; greet who is new. Returns what is asked."""
        ...

    def send(self, node: int, message: Message) -> None:
        """Say it to a node, if it can be reached."""
        ...

    def close(self) -> None: ...


class OneContact:
    """The node of the coordinator, where a job has no other: a socket in its store."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel: Channel | None = None
        self.reports: dict[int, Report | None] = {}
        self.pulses: deque[Pulse] = deque()
        self.probed: deque[ProbedLink] = deque()  # it has no links

    def turn(self, wait_s: float) -> list[Scale]:
        if self._channel is None:
            self._channel = connect(self._path)
            if self._channel is None:
                time.sleep(wait_s)
                return []
            self.reports[0] = None
            self.send(0, _GREETING)
        if self._channel is None:
            return []
        wait([self._channel.fileno()], wait_s)
        return self._read(self._channel)

    def _read(self, channel: Channel) -> list[Scale]:
        asked: list[Scale] = []
        try:
            while (message := channel.receive()) is not None:
                if isinstance(message, Report):
                    self.reports[0] = message
                elif isinstance(message, Scale):
                    asked.append(message)
                elif isinstance(message, Pulse):
                    self.pulses.append(message)
        except ChannelClosed:
            self.close()
        return asked

    def send(self, node: int, message: Message) -> None:
        if self._channel is None or node != 0:
            return
        try:
            self._channel.send(message)
        except ChannelClosed:
            self.close()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self.reports.clear()


class ManyContacts:
    """All nodes of a job, over links like those between them.

    Args:
        addresses: where the aggregators of all nodes listen, as far as that is known now.
    """

    def __init__(
        self, host: str, secret: bytes, addresses: Callable[[], Mapping[int, Address]]
    ) -> None:
        self._addresses = addresses
        self._told: Mapping[int, Address] = {}
        self._mesh = Mesh(COORDINATOR, Listener(host, Credentials(COORDINATOR, secret)))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._mesh.listener, selectors.EVENT_READ, lambda _: None)
        self._asked: list[Scale] = []
        self.reports: dict[int, Report | None] = {}
        self.pulses: deque[Pulse] = deque()
        self.probed: deque[ProbedLink] = deque()

    def turn(self, wait_s: float) -> list[Scale]:
        self._introduce()
        for key, mask in self._selector.select(wait_s):
            key.data(mask)
        for change in self._mesh.turn():
            match change:
                case Up(node, link):
                    link.attach(self._selector, partial(self._use, node, link))
                    self.reports[node] = None
                    self.send(node, self._peers())
                    self.send(node, _GREETING)
                case Down(node):
                    self.reports.pop(node, None)
        asked, self._asked = self._asked, []
        return asked

    def _introduce(self) -> None:
        """Tell all nodes of each other, whenever that changes."""
        known = dict(self._addresses())
        if known == self._told:
            return
        self._told = known
        self._mesh.tell(known)
        for node in list(self.reports):
            self.send(node, self._peers())

    def _peers(self) -> Peers:
        return Peers(tuple((node, *where) for node, where in sorted(self._told.items())))

    def send(self, node: int, message: Message) -> None:
        link = self._mesh.links.get(node)
        if link is None:
            return
        try:
            link.send(message)
        except ChannelClosed as error:
            self._drop(node, str(error))

    def _use(self, node: int, link: Link, mask: int) -> None:
        if self._mesh.links.get(node) is not link:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                link.flush()
            if mask & selectors.EVENT_READ:
                while (message := link.receive(_nowhere)) is not None:
                    if isinstance(message, Report):
                        self.reports[node] = message
                    elif isinstance(message, Scale):
                        self._asked.append(message)
                    elif isinstance(message, Pulse):
                        self.pulses.append(message)
                    elif isinstance(message, ProbedLink):
                        self.probed.append(message)
        except (ChannelClosed, ProtocolError) as error:
            self._drop(node, str(error))

    def _drop(self, node: int, reason: str) -> None:
        self._mesh.close(node, reason)
        self.reports.pop(node, None)

    def close(self) -> None:
        self._mesh.end()
        self._selector.close()
        self.reports.clear()


def _nowhere(_: Block) -> Memory:
    """No node sends blocks to the coordinator."""
    return None
