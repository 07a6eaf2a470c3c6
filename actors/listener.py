"""How links between nodes come about: this node listens at its address, or calls another.

Both ends prove that they know the job's secret before anything else is read or said. Whoever cannot
is refused, counted and closed; it neither blocks the loop nor makes it take memory.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import selectors
import socket
import time
from dataclasses import dataclass

from actors.links import Clock, Link
from elastic.core.errors import ConfigError, ProtocolError
from elastic.core.protocol.handshake import NONCE_BYTES, Answerer, Caller, Credentials

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""An end that has not proven who it is by then is refused."""

MAX_STRANGERS = 64
"""Connections that have proven nothing yet. One more pushes the oldest out."""

_BACKLOG = 256


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A call to a node came to nothing; the caller decides whether to call again.

    `refused`: its host says that nobody listens there.
    """

    node: int
    reason: str
    refused: bool = False


@dataclass(slots=True, eq=False)
class _Stranger:
    """A connection whose other end has not proven who it is."""

    connection: socket.socket
    handshake: Caller | Answerer
    deadline_s: float
    where: str
    received: bytes = b""
    is_connected: bool = True
    is_probe: bool = False


class Listener:
    """Where links come from: other nodes call this one, or `call` calls them.

    One descriptor stands for the listening socket and every connection in its handshake: when it
    is readable, and several times a second, `turn` takes each a step further and waits for none.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        clock: Clock = time.monotonic,
        *,
        port: int = 0,
        inherited: socket.socket | None = None,
    ) -> None:
        """Listen at `address`, or go on with the socket of a predecessor.

        Raises:
            ConfigError: `address` is not one of this node, or stands for several.
        """
        self._credentials, self._clock = credentials, clock
        self._socket = _listen(address, port) if inherited is None else inherited
        self._selector = selectors.EpollSelector()
        self._selector.register(self._socket, selectors.EVENT_READ, None)
        self._strangers: dict[_Stranger, None] = {}  # oldest first
        self._unreachable: list[Unreachable] = []
        self.num_refused = 0

    @property
    def address(self) -> tuple[str, int]:
        """The address and port that other nodes call."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    @property
    def socket(self) -> socket.socket:
        """For a successor: while one process holds it, callers are not refused."""
        return self._socket

    def fileno(self) -> int:
        return self._selector.fileno()

    def close(self) -> None:
        """End it and every handshake. Links live on."""
        for stranger in list(self._strangers):
            self._forget(stranger)
            stranger.connection.close()
        self._selector.close()
        self._socket.close()

    def probe(self, node: int, address: tuple[str, int]) -> None:
        """Find out whether anybody listens there: `turn` says so if not, and nothing if so."""
        self._begin(node, address, is_probe=True)

    def call(self, node: int, address: tuple[str, int]) -> None:
        """Begin to call a node: `turn` gives the link, or says that it is unreachable."""
        self._begin(node, address, is_probe=False)

    def _begin(self, node: int, address: tuple[str, int], *, is_probe: bool) -> None:
        connection = _make_socket(address[0])
        nonce = os.urandom(NONCE_BYTES)
        stranger = _Stranger(
            connection,
            Caller(self._credentials, node, nonce),
            self._clock() + HANDSHAKE_S,
            f"node {node} at {address[0]} port {address[1]}",
            is_connected=False,
            is_probe=is_probe,
        )
        self._strangers[stranger] = None
        self._selector.register(connection, selectors.EVENT_WRITE, stranger)
        try:
            connection.connect(address)
        except BlockingIOError:
            pass  # its end is seen in `turn`
        except OSError as error:
            self._give_up(stranger, error)

    def turn(self) -> list[Link | Unreachable]:
        """The links that were made, and the calls that failed, since the last time."""
        made: list[Link | Unreachable] = []
        for key, _ in self._selector.select(0):
            if key.data is None:
                self._accept()
            elif key.data in self._strangers:
                link = self._go_on(key.data)
                if link is not None:
                    made.append(link)
        now_s = self._clock()
        for stranger in [one for one in self._strangers if one.deadline_s <= now_s]:
            self._give_up(stranger, TimeoutError(f"no proof within {HANDSHAKE_S:g} s"))
        made += self._unreachable
        self._unreachable = []
        return made

    def _accept(self) -> None:
        try:
            connection, address = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        connection.setblocking(False)
        accepted = [one for one in self._strangers if isinstance(one.handshake, Answerer)]
        if len(accepted) == MAX_STRANGERS:
            self._give_up(accepted[0], TimeoutError(f"{MAX_STRANGERS} strangers at once"))
        handshake = Answerer(self._credentials, os.urandom(NONCE_BYTES))
        where = f"{address[0]} port {address[1]}"
        stranger = _Stranger(connection, handshake, self._clock() + HANDSHAKE_S, where)
        self._strangers[stranger] = None
        self._selector.register(connection, selectors.EVENT_READ, stranger)

    def _go_on(self, stranger: _Stranger) -> Link | None:
        """Take one step of a handshake; the link if that was the last one."""
        try:
            if stranger.is_connected:
                _read(stranger)
            else:
                self._connected(stranger)
        except BlockingIOError:
            return None
        except (OSError, ProtocolError) as error:
            self._give_up(stranger, error)
            return None
        if stranger.is_probe:
            self._forget(stranger)
            stranger.connection.close()
            return None
        if stranger.handshake.num_expected:
            return None
        self._forget(stranger)
        return Link(stranger.connection, stranger.handshake.peer, self._clock)

    def _connected(self, stranger: _Stranger) -> None:
        assert isinstance(stranger.handshake, Caller)
        number = stranger.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        stranger.is_connected = True
        if stranger.is_probe:
            return
        _send(stranger.connection, stranger.handshake.hello)
        self._selector.modify(stranger.connection, selectors.EVENT_READ, stranger)

    def _give_up(self, stranger: _Stranger, error: Exception) -> None:
        level = logging.WARNING if isinstance(stranger.handshake, Answerer) else logging.DEBUG
        log.log(level, "no link with %s: %s", stranger.where, error)
        self._forget(stranger)
        stranger.connection.close()
        if isinstance(stranger.handshake, Caller):
            refused = isinstance(error, ConnectionRefusedError)
            self._unreachable.append(Unreachable(stranger.handshake.peer, str(error), refused))
        if isinstance(stranger.handshake, Answerer) or isinstance(error, ProtocolError):
            self.num_refused += 1

    def _forget(self, stranger: _Stranger) -> None:
        del self._strangers[stranger]
        self._selector.unregister(stranger.connection)


def _read(stranger: _Stranger) -> None:
    """Read what the handshake expects, not a byte more: what follows belongs to the link."""
    handshake = stranger.handshake
    data = stranger.connection.recv(handshake.num_expected - len(stranger.received))
    if not data:
        raise ConnectionResetError("end of file before any proof")
    stranger.received += data
    if len(stranger.received) == handshake.num_expected:
        answer = handshake.handle(stranger.received)
        stranger.received = b""
        _send(stranger.connection, answer)


def _send(connection: socket.socket, data: bytes) -> None:
    """A few bytes always fit into the buffer of a new connection."""
    if connection.send(data) != len(data):
        raise ConnectionResetError("takes no bytes")


def _listen(address: str, port: int) -> socket.socket:
    try:
        host = ipaddress.ip_address(address)
    except ValueError as error:
        raise ConfigError(f"links listen at an IP address, not at {address!r}") from error
    if host.is_unspecified or host.is_multicast:
        raise ConfigError(f"links listen at the address of one node only, not at {address}")
    listener = _make_socket(address)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"links cannot listen at {address} port {port}: {error}") from error
    return listener


def _make_socket(address: str) -> socket.socket:
    """Its buffers are the kernel's to size: those set by hand are smaller on most machines."""
    version = ipaddress.ip_address(address).version
    made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
    made.setblocking(False)
    return made
