"""A link between two nodes: an authenticated TCP connection, for one selector loop.

Never blocks and never pickles; payloads are written and read in place. `actors.listener` makes
links. What a message or a block means is the protocols' business.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, Literal

from elastic.core.errors import ChannelClosed
from elastic.core.protocol.frames import BEHIND, PING, Block, Parser, block_header, message_frame
from elastic.core.protocol.messages import LinkCount, Message
from elastic.core.protocol.orders import NodeMessage
from elastic.core.protocol.wire import decode, encode

PING_S = 0.25
"""A link that sends nothing for so long sends a ping: silence is no quiet."""

MAX_QUEUED_BYTES = 64 << 20
"""Messages that a peer may leave unread before it counts as gone. Blocks lie where they are."""

_TURN_BYTES = 1 << 20  # handed to the kernel before the loop looks at anything else
_MAX_BUFFERS = 64  # of one sendmsg
_ESTABLISHED = 1  # the first byte of TCP_INFO
_UNACKED, _UNACKED_AT = struct.Struct("I"), 24  # tcpi_unacked, in segments
_INFO_BYTES = 256
_ACKED, _ACKED_AT = struct.Struct("Q"), 120  # tcpi_bytes_acked of Linux 4.1
_BUSY, _BUSY_AT = struct.Struct("Q"), 168  # tcpi_busy_time of Linux 4.10, in microseconds

Clock = Callable[[], float]


class Wait(Enum):
    """The only answer of its kind; see `Memory`."""

    WAIT = auto()


WAIT: Final = Wait.WAIT
Memory = memoryview | Literal[Wait.WAIT] | None
"""Where the payload of a block belongs. None: nowhere, drop it. WAIT: not known yet, read nothing
more from this link until `receive` is called again."""

Place = Callable[[Block], Memory]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What went over a link until now; times are of its clock.

    `write_stalled_s`: the peer, or what lies between, did not take what was there to be sent.
    `read_stalled_s`: a frame had begun and its next bytes did not come.
    """

    bytes_in: int
    bytes_out: int
    blocks_in: int
    blocks_out: int
    write_stalled_s: float
    read_stalled_s: float
    sending_s: float
    last_in_s: float


class _Stall:
    """Adds up how long something did not go on."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._since_s: float | None = None

    def begin(self, now_s: float) -> None:
        if self._since_s is None:
            self._since_s = now_s

    def end(self, now_s: float) -> None:
        if self._since_s is not None:
            self._total_s += now_s - self._since_s
            self._since_s = None

    def total_s(self, now_s: float) -> float:
        return self._total_s + (0.0 if self._since_s is None else now_s - self._since_s)


class Link:
    """One connection to a node that has proven to be `node`.

    Messages arrive in order and overtake blocks that have not begun; no block overtakes a message.
    """

    def __init__(self, connection: socket.socket, node: int, clock: Clock = time.monotonic) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.node = node
        self._socket, self._clock = connection, clock
        self._parser = Parser()
        self._is_dropping = False
        self._trash = bytearray()
        self._messages: deque[bytes] = deque()
        self._blocks: deque[tuple[Block, memoryview]] = deque()
        self._behind: deque[tuple[Block, memoryview]] = deque()  # what no step waits for
        self._outgoing: deque[memoryview] = deque()  # in the order of the wire
        self._queued_bytes = self._outgoing_bytes = 0
        self._bytes_in = self._bytes_out = self._blocks_in = self._blocks_out = 0
        self._reading, self._writing, self._sending = _Stall(), _Stall(), _Stall()
        self._last_in_s = self._last_out_s = clock()
        self._selector: selectors.BaseSelector | None = None
        self._interest = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Twice does no harm."""
        self.detach()
        self._socket.close()

    def attach(self, selector: selectors.BaseSelector, data: Any) -> None:
        """Be watched for what can be done next: `receive` when readable, `flush` when writable."""
        self._selector, self._data = selector, data
        self._update_interest()

    def detach(self) -> None:
        """Be watched no more."""
        self._show_interest(0)
        self._selector = None

    @property
    def waits(self) -> bool:
        """Whether `place` said WAIT: nothing is read, so silence means nothing."""
        return self._parser.pending is not None

    @property
    def is_answered(self) -> bool:
        """Whether the peer's kernel has acknowledged all that it was sent, read or not. Where its
        host froze it has; where the host is off or cut off it has not."""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        return _UNACKED.unpack_from(info, _UNACKED_AT) == (0,)

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing or self._messages or self._blocks or self._behind)

    @property
    def traffic(self) -> Traffic:
        now_s = self._clock()
        return Traffic(
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            blocks_in=self._blocks_in,
            blocks_out=self._blocks_out,
            write_stalled_s=self._writing.total_s(now_s),
            read_stalled_s=self._reading.total_s(now_s),
            sending_s=self._sending.total_s(now_s),
            last_in_s=self._last_in_s,
        )

    @property
    def count(self) -> LinkCount:
        """For whoever watches. The kernel knows what has arrived, `traffic` what it took."""
        now_s = self._clock()
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        known = len(info) >= _BUSY.size + _BUSY_AT
        (acked,), (busy_us,) = (
            (_ACKED.unpack_from(info, _ACKED_AT), _BUSY.unpack_from(info, _BUSY_AT))
            if known
            else ((self._bytes_out,), (int(1e6 * self._sending.total_s(now_s)),))
        )
        return LinkCount(
            self.node,
            acked,
            busy_us / 1e6,
            self._writing.total_s(now_s),
            self._reading.total_s(now_s),
        )

    # ---------------------------------------------------------------- sending

    def send(self, message: Message | NodeMessage) -> None:
        """Raises ChannelClosed if the peer is gone or reads nothing."""
        frame = message_frame(encode(message))
        if self._queued_bytes + len(frame) > MAX_QUEUED_BYTES:
            raise ChannelClosed(
                f"node {self.node} leaves {self._queued_bytes} bytes of messages unread"
            )
        self._queue_message(frame)
        self.flush()

    def send_block(self, block: Block, payload: memoryview) -> None:
        """Queue a block; `flush` sends it. `payload` must stay as it is until then.

        Those that no step waits for go behind all others.
        """
        body = payload.cast("B")
        if len(body) != block.length:
            raise ValueError(f"{len(body)} bytes for the payload of {block}")
        (self._behind if block.stage in BEHIND else self._blocks).append((block, body))
        self._sending.begin(self._clock())
        self._update_interest()

    def discard_blocks(self, unwanted: Callable[[Block], bool]) -> None:
        """Forget such blocks: those that have not begun to go out, and one that is coming in, of
        which nothing more is written to its place."""
        self._blocks = deque(one for one in self._blocks if not unwanted(one[0]))
        self._behind = deque(one for one in self._behind if not unwanted(one[0]))
        incoming = self._parser.incoming
        if incoming is not None and unwanted(incoming):
            self._parser.redirect_payload(self._drop(incoming))
        if not self.has_unsent:
            self._sending.end(self._clock())
        self._update_interest()

    def flush(self) -> None:
        """Hand to the kernel what it takes. Raises ChannelClosed if the peer is gone."""
        budget = _TURN_BYTES
        while budget > 0 and self._next_buffers():
            try:
                num_bytes = self._socket.sendmsg(self._outgoing)
            except BlockingIOError:
                self._writing.begin(self._clock())
                break
            except OSError as error:
                raise ChannelClosed(f"cannot send to node {self.node}: {error}") from error
            budget -= num_bytes
            self._sent(num_bytes)
        self._update_interest()

    def tick(self) -> None:
        """Call this several times a second: sends a ping if the link is idle.

        Raises:
            ChannelClosed: the peer is gone, which nobody reads while the link waits.
        """
        if self.waits:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            if info[0] != _ESTABLISHED:
                raise ChannelClosed(f"node {self.node} is gone")
        if not self.has_unsent and self._clock() - self._last_out_s >= PING_S:
            self._queue_message(PING)
            self.flush()

    def _queue_message(self, frame: bytes) -> None:
        self._messages.append(frame)
        self._queued_bytes += len(frame)
        self._sending.begin(self._clock())

    def _next_buffers(self) -> bool:
        """Decide what goes out next, as late as possible."""
        while self._outgoing_bytes < _TURN_BYTES and len(self._outgoing) < _MAX_BUFFERS - 1:
            if self._messages:
                frame = self._messages.popleft()
                self._queued_bytes -= len(frame)
                self._put_out(frame)
            elif self._blocks or self._behind:
                block, body = (self._blocks or self._behind).popleft()
                self._put_out(block_header(block))
                self._put_out(body)
                self._blocks_out += 1
            else:
                break
        return bool(self._outgoing)

    def _put_out(self, data: bytes | memoryview) -> None:
        self._outgoing.append(memoryview(data))
        self._outgoing_bytes += len(data)

    def _sent(self, num_bytes: int) -> None:
        now_s = self._clock()
        self._writing.end(now_s)
        self._last_out_s = now_s
        self._bytes_out += num_bytes
        self._outgoing_bytes -= num_bytes
        while num_bytes:
            first = self._outgoing[0]
            if num_bytes < len(first):
                self._outgoing[0] = first[num_bytes:]
                return
            num_bytes -= len(first)
            self._outgoing.popleft()
        if not self.has_unsent:
            self._sending.end(now_s)

    # -------------------------------------------------------------- receiving

    def receive(self, place: Place) -> Message | NodeMessage | Block | None:
        """The next message, or block that is in its place; None if there is none yet.

        Raises:
            ChannelClosed: the peer is gone.
            ProtocolError: it is not what we take it for; close the link.
        """
        while self._find_place(place):
            try:
                num_bytes = self._socket.recv_into(self._parser.free)
            except BlockingIOError:
                if not self._parser.is_between_frames:
                    self._reading.begin(self._clock())
                # or the kernel does so 40 ms later, which would count as time on the way
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                break
            except OSError as error:
                raise ChannelClosed(f"node {self.node}: {error}") from error
            if not num_bytes:
                raise ChannelClosed(f"node {self.node}: end of file")
            frame = self._arrived(num_bytes)
            if frame is not None:
                return frame
        self._update_interest()
        return None

    def _find_place(self, place: Place) -> bool:
        """Find out where the pending block belongs, if one is pending. False: wait."""
        block = self._parser.pending
        if block is None:
            return True
        memory = place(block)
        if isinstance(memory, Wait):
            return False
        self._parser.begin_payload(self._drop(block) if memory is None else memory)
        self._update_interest()
        return True

    def _drop(self, block: Block) -> memoryview:
        """Memory for what nobody wants."""
        self._is_dropping = True
        if len(self._trash) < block.length:
            self._trash = bytearray(block.length)
        return memoryview(self._trash)[: block.length]

    def _arrived(self, num_bytes: int) -> Message | NodeMessage | Block | None:
        self._last_in_s = self._clock()
        self._reading.end(self._last_in_s)
        self._bytes_in += num_bytes
        frame = self._parser.advance(num_bytes)
        if not isinstance(frame, Block):
            return None if frame is None else decode(frame)
        self._blocks_in += 1
        dropped, self._is_dropping = self._is_dropping, False
        return None if dropped else frame

    # --------------------------------------------------------------- selector

    def _update_interest(self) -> None:
        read = 0 if self.waits else selectors.EVENT_READ
        self._show_interest(read | (selectors.EVENT_WRITE if self.has_unsent else 0))

    def _show_interest(self, interest: int) -> None:
        if self._selector is None or interest == self._interest:
            return
        if not self._interest:
            self._selector.register(self, interest, self._data)
        elif interest:
            self._selector.modify(self, interest, self._data)
        else:
            self._selector.unregister(self)
        self._interest = interest
