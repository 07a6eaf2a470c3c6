"""A node among the others: its links, what is said over them, and the updates computed together.

Part of an aggregator's loop: what arrives becomes an event of the protocol, in order. Nothing is
handled while an action is carried out; what that brings about is taken in the next `turn`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from actors.channel import listen
from actors.collecting import Receiver, Sender
from actors.link_probe import LinkProber
from actors.links import WAIT, Link, Memory
from actors.listener import Listener
from actors.mesh import COORDINATOR, Down, Mesh, Up
from actors.rounds import Rounds, round_number
from actors.setup import JobSetup
from elastic.core.errors import ChannelClosed, ConfigError, ProtocolError
from elastic.core.protocol import events, node
from elastic.core.protocol.frames import Block, Stage
from elastic.core.protocol.handshake import Credentials
from elastic.core.protocol.messages import CutCount, LinkCount, Message, Peers, ProbedLink
from elastic.core.protocol.orders import NodeMessage, Order
from elastic.core.update import Plan, Snapshot
from policies.preflight import LinkProbe

_INHERIT_S = 0.5


@dataclass(frozen=True, slots=True)
class Parts:
    """What takes part in the job over links, besides messages."""

    rounds: Rounds
    sender: Sender
    receiver: Receiver


class Neighbours:
    """The other nodes and the coordinator, as one node sees them.

    Args:
        folder: of the store; a successor finds there where it has to listen, and the others.
        handle: takes what happens, for the protocol.
        term: of whoever leads, as far as this node knows.
        hear: takes what the coordinator says; None: it is gone.
        parts: makes what goes over links as blocks; given `wake`.
        inherited: the socket on which a predecessor listened, see `inherit`.
    """

    def __init__(
        self,
        setup: JobSetup,
        folder: Path,
        selector: selectors.BaseSelector,
        *,
        handle: Callable[[node.NodeEvent], None],
        term: Callable[[], int | None],
        hear: Callable[[Message | None], None],
        parts: Callable[[Callable[[], None]], Parts],
        inherited: socket.socket | None = None,
    ) -> None:
        self._me, self._folder, self._selector = setup.node, folder, selector
        self._handle, self._hear, self._term = handle, hear, term
        credentials = Credentials(setup.node, setup.secret)
        listener = _listen(setup.address, credentials, folder / "port", inherited)
        self._mesh = Mesh(setup.node, listener)
        self._prober = LinkProber(self._mesh.links, self._probed)
        selector.register(listener, selectors.EVENT_READ, _nothing)
        self._heirs = listen(folder / "heirs")
        selector.register(self._heirs, selectors.EVENT_READ, self._bequeath)
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        selector.register(self._woken, selectors.EVENT_READ, self._drain)
        self._broken: dict[int, str] = {}
        self._parts = parts(self.wake)
        self._update: events.Update | None = None
        with contextlib.suppress(FileNotFoundError):
            known = json.loads((folder / "peers").read_text())
            self._mesh.tell({one: (host, port) for one, host, port in known})

    @property
    def hears_coordinator(self) -> bool:
        return COORDINATOR in self._mesh.links

    @property
    def is_alone(self) -> bool:
        """Whether there is no link to anybody."""
        return not self._mesh.links

    @property
    def counts(self) -> tuple[LinkCount, ...]:
        """What is counted of the links to other nodes."""
        links = self._mesh.links.items()
        return tuple(link.count for other, link in links if other != COORDINATOR)

    @property
    def cuts(self) -> tuple[CutCount, ...]:
        """How often the link to each other node was given up since nothing was heard of it."""
        return tuple(
            CutCount(other, num, self._mesh.unanswered[other])
            for other, num in self._mesh.cuts.items()
            if other != COORDINATOR
        )

    def wake(self) -> None:
        """Let `turn` be called soon; from any thread."""
        os.eventfd_write(self._woken, 1)

    def close(self) -> None:
        """Close every link, and wait until no thread of a round writes any more."""
        self._parts.rounds.close()
        self._parts.sender.close()
        self._mesh.end()
        self._heirs.close()
        os.close(self._woken)

    # ---------------------------------------------------------------- saying

    def tell(self, message: Message) -> None:
        """Say it to the coordinator, if it is there."""
        self.send(COORDINATOR, message)

    def send(self, to: int, message: Message | NodeMessage) -> None:
        """Say it to another node, if there is a link to it."""
        link = self._mesh.links.get(to)
        if link is None or to in self._broken:
            return
        try:
            link.send(message)
        except ChannelClosed as error:
            self._broken[to] = str(error)
            self.wake()

    def probe(self, peer: int) -> None:
        """Measure the link to another node, and tell the coordinator."""
        self._prober.begin(peer)
        self.wake()

    def _probed(self, peer: int, found: LinkProbe) -> None:
        self.tell(ProbedLink(self._me, peer, found.round_trip_s, found.bytes_per_s))

    # --------------------------------------------------------------- updating

    def begin(
        self, update: events.Update, plan: Plan, *, term: int, counters: torch.Tensor | None
    ) -> None:
        """Begin a round; `Updated` comes once it is complete here. See `Rounds.begin`."""
        self._update = update
        self._parts.rounds.begin(term, update, plan, links=self._mesh.links, counters=counters)
        self.wake()

    def give_up(self, number: int) -> None:
        """Stop the round of that number, if it is under way."""
        if self._update is not None and self._update.round == number:
            self._update = None
            self._parts.rounds.give_up()

    def send_state(self, copy: events.Copy, *, term: int) -> None:
        """Send this node's share of a checkpoint to the one that writes it."""
        number = round_number(term, copy.number)
        self._parts.sender.begin(number, copy, self._mesh.links.get(copy.node))

    def collect(self, copy: events.Copy, snapshot: Snapshot, *, term: int) -> None:
        """Take what is missing from a snapshot out of the memory of others."""
        number = round_number(term, copy.number)
        self._parts.receiver.begin(number, copy, snapshot, self._mesh.links)
        self.wake()

    def stop_collecting(self) -> None:
        """Nobody is to wait for a checkpoint's state any more."""
        self._parts.receiver.fail("the aggregator ends")

    def settle(self) -> None:
        """Give up any round, and wait until nothing of one is written any more."""
        self._update = None
        self._parts.rounds.settle()

    # ------------------------------------------------------------------- turn

    def turn(self) -> None:
        """Take what has happened, in order."""
        for to, reason in list(self._broken.items()):
            self._drop(to, reason)
        for change in self._mesh.turn():
            match change:
                case Up(other, link):
                    self._came(other, link)
                case Down(other, _, for_good):
                    self._gone(other, for_good=for_good)
        for other, link in list(self._mesh.links.items()):
            if link.waits:
                self._use(other, link, selectors.EVENT_READ)
        self._prober.turn()
        self._end_round()

    def _end_round(self) -> None:
        self._parts.sender.turn(self._mesh.links)
        norm, update = self._parts.rounds.turn(), self._update
        if norm is not None and update is not None:
            self._update = None
            self._handle(events.Updated(norm, update.round))

    def _came(self, other: int, link: Link) -> None:
        link.attach(self._selector, partial(self._use, other, link))
        if other != COORDINATOR:
            self._handle(node.Reached(other))

    def _gone(self, other: int, *, for_good: bool = False) -> None:
        self._broken.pop(other, None)
        if other == COORDINATOR:
            self._hear(None)
        else:
            self._parts.receiver.lost(other)
            self._handle(node.Lost(other, for_good))

    def _drop(self, other: int, reason: str) -> None:
        self._broken.pop(other, None)
        if other in self._mesh.links:
            self._gone(self._mesh.close(other, reason).node)

    def _use(self, other: int, link: Link, mask: int) -> None:
        """Send and receive what can be."""
        if self._mesh.links.get(other) is not link:
            return  # it was replaced since
        if mask & selectors.EVENT_WRITE:
            try:
                link.flush()
            except ChannelClosed as error:
                self._drop(other, str(error))
                return
        if mask & selectors.EVENT_READ:
            self._receive(other, link)

    def _receive(self, other: int, link: Link) -> None:
        """Only what the link itself brings may close it: errors of the protocol are ours."""
        place = partial(self._place, other)
        while True:
            try:
                frame = link.receive(place)
            except (ChannelClosed, ProtocolError) as error:
                self._drop(other, str(error))
                return
            if frame is None:
                break
            if isinstance(frame, Block):
                self._arrived(other, frame)
            elif isinstance(frame, Peers):
                self._meet(frame)
            elif other == COORDINATOR:
                self._hear(frame)  # type: ignore[arg-type]
            else:
                self._handle(node.FromNode(other, frame))  # type: ignore[arg-type]
                self._pass_over(frame)
            if self._mesh.links.get(other) is not link:
                return
        self._end_round()

    def _pass_over(self, frame: object) -> None:
        """Nobody waits for the blocks of an update that this node did not begin."""
        match frame:
            case Order(term, events.Update() as update) if term == self._term():
                self._parts.rounds.pass_over(round_number(term, update.round))

    def _place(self, other: int, block: Block) -> Memory:
        """Where the payload of a block belongs.

        Only what the lead is about to order is worth waiting for: of another lead nothing is, and
        the next one's question may lie behind such a block.
        """
        memory, term = self._find_place(other, block), self._term()
        is_stale = term is None or block.round < round_number(term, 0)
        return None if memory is WAIT and is_stale else memory

    def _find_place(self, other: int, block: Block) -> Memory:
        if block.stage is Stage.STATE:
            return self._parts.receiver.place(other, block)
        if block.stage is Stage.PROBE:
            return self._prober.place(block)
        return self._parts.rounds.place(other, block)

    def _arrived(self, other: int, block: Block) -> None:
        """A block is in its place."""
        if block.stage is Stage.STATE:
            self._parts.receiver.arrived(other, block)
        elif block.stage is Stage.PROBE:
            self._prober.arrived(other, block)
        else:
            self._parts.rounds.arrived(other, block)

    def _meet(self, peers: Peers) -> None:
        """Remember where the others are, for a successor, too."""
        partial_path = self._folder / "peers.partial"
        partial_path.write_text(json.dumps(peers.addresses))
        partial_path.rename(self._folder / "peers")
        self._mesh.tell({one: (host, port) for one, host, port in peers.addresses})

    def _bequeath(self, _: int) -> None:
        """Give whoever stands by the socket that others call."""
        connection, _address = self._heirs.accept()
        with connection, contextlib.suppress(OSError):  # it died meanwhile
            socket.send_fds(connection, [b"."], [self._mesh.listener.socket.fileno()])

    def _drain(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._woken)


def inherit(folder: Path) -> socket.socket | None:
    """The socket on which the acting aggregator of the store in `folder` listens, if there is one.

    While its heir holds it, too, callers are not refused between the death of one and the first
    turn of the other: so a refusal means that there is no heir.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_INHERIT_S)
        try:
            connection.connect(str(folder / "heirs"))
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        except OSError:
            return None  # nobody acts yet, or hangs: asked again
    return socket.socket(fileno=descriptors[0]) if descriptors else None


def _listen(
    address: str, credentials: Credentials, path: Path, inherited: socket.socket | None
) -> Listener:
    """Listen where the predecessor did, if that is possible: others know that place."""
    if inherited is not None:
        return Listener(address, credentials, inherited=inherited)
    port = int(path.read_text()) if path.exists() else 0
    try:
        listener = Listener(address, credentials, port=port)
    except ConfigError:
        if not port:
            raise
        listener = Listener(address, credentials)  # somebody else took the port meanwhile
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(str(listener.address[1]))
    partial_path.rename(path)
    return listener


def _nothing(_: int) -> None:
    """Its turn comes in every round of the loop."""
