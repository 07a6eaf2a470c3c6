"""Messages over a Unix socket of the node. A datagram is a message; end-of-file is a death.

Only carries: what a message means is the protocols' business. Never pickles.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from pathlib import Path

from elastic.core.errors import ChannelClosed, ProtocolError
from elastic.core.protocol.messages import (
    MAX_MESSAGE_BYTES,
    Message,
    decode_message,
    encode_message,
)

_BUFFER_BYTES = 4 << 20
_PIDFD_THREAD = os.O_EXCL  # of Linux 6.9
_FLAGS, _EXITING = 6, 4  # PF_EXITING; places of fields in /proc/PID/stat, after the name
_PENDING, _KILLED = 28, 1 << signal.SIGKILL - 1  # of the main thread, which did not run since


class Channel:
    """One connection. Sending never blocks: a peer that does not read is as good as gone."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        connection.setblocking(False)
        self._socket = connection

    @property
    def peer_pid(self) -> int:
        """The process at the other end, as the kernel knows it."""
        data = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid: int = struct.unpack("iii", data)[0]
        return pid

    def open_death(self) -> int | None:
        """A descriptor that is readable once a thread of the other end has ended, as all do at once
        where the process dies; None where the kernel has none.

        End-of-file comes when the last one has, which on a busy machine takes a second or two: it
        frees the process's memory first. What tells of the main thread waits for that, too.
        """
        try:
            main, *others = sorted(int(one) for one in os.listdir(f"/proc/{self.peer_pid}/task"))
            return os.pidfd_open(others[0] if others else main, _PIDFD_THREAD)
        except OSError:  # an older kernel, a process of another container, or one that is gone
            return None

    @property
    def is_dying(self) -> bool:
        """Whether the process at the other end is known to execute nothing any more."""
        try:
            stat = Path(f"/proc/{self.peer_pid}/stat").read_text()
        except OSError:
            return self.peer_pid > 0  # gone; 0 is a process of another container
        fields = stat.rpartition(")")[2].split()
        return bool(int(fields[_FLAGS]) & _EXITING or int(fields[_PENDING]) & _KILLED)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises ChannelClosed if the peer is gone or reads nothing."""
        data = encode_message(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"{type(message).__name__} of {len(data)} bytes is too long")
        try:
            self._socket.send(data)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError) as error:
            raise ChannelClosed(f"cannot send {type(message).__name__}: {error}") from error

    def receive(self) -> Message | None:
        """The next message, or None if there is none yet. Raises ChannelClosed at end-of-file."""
        try:
            data = self._socket.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            raise ChannelClosed("reset by peer") from error
        if not data:
            raise ChannelClosed("end of file")
        return decode_message(data)

    def close(self) -> None:
        self._socket.close()


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, in place of a dead process's one."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(256)
    listener.setblocking(False)
    return listener


def accept(listener: socket.socket) -> Channel:
    connection, _ = listener.accept()
    return Channel(connection)


def connect(path: Path) -> Channel | None:
    """A channel to whoever listens at `path`, or None if nobody does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return Channel(connection)
