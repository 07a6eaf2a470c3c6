"""What goes over a link between two nodes, as bytes: a header of fixed size, then a body.

    MESSAGE   the bytes of `wire.encode`
    BLOCK     a part of a chunk of one tensor; read where it belongs, never through this module
    PING      nothing: the sender lives

No I/O and no pickle. A length is checked before memory is taken for it; bytes that no sender of
ours writes are a ProtocolError, after which the link can only be closed.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum, auto
from typing import NamedTuple

from elastic.core.errors import ProtocolError
from elastic.core.protocol.messages import MAX_MESSAGE_BYTES

MAX_BLOCK_BYTES = 4 << 20
MAX_OFFSET_BYTES = 1 << 40  # in one chunk: far more than one can hold


class Kind(IntEnum):
    """What the body of a frame is."""

    MESSAGE = 1
    BLOCK = 2
    PING = 3


class Stage(IntEnum):
    """What the numbers of a block are."""

    NODE_SUM = 0  # int32, what one node contributes to the total
    TOTAL = 1  # int32, summed over all nodes
    PARAMETERS = 2  # of the next version
    STATE = 3  # of the optimizer, on its way to a checkpoint
    PROBE = 4  # no numbers: how fast they arrive is measured


BEHIND = frozenset({Stage.STATE, Stage.PROBE})
"""What no step waits for, and no round: it goes behind all others."""


class Block(NamedTuple):
    """The header of a block. `offset` and `length` count bytes within the chunk.

    `tensor` tells tensors of one stage apart, such as those of an optimizer.
    """

    round: int
    stage: Stage
    tensor: int
    chunk: int
    offset: int
    length: int


_HEADER = struct.Struct("<HBBIIIQQ")  # magic, kind, stage, tensor, chunk, length, round, offset
_MAGIC = 0x7E1A
HEADER_BYTES = _HEADER.size
PING = _HEADER.pack(_MAGIC, Kind.PING, 0, 0, 0, 0, 0, 0)

Frame = bytes | Block
"""The bytes of a message, or a block whose payload is in its place."""


def message_frame(body: bytes) -> bytes:
    """A whole frame.

    Raises:
        ProtocolError: the message is empty or too long.
    """
    _check_length("message", len(body), MAX_MESSAGE_BYTES)
    return _HEADER.pack(_MAGIC, Kind.MESSAGE, 0, 0, 0, len(body), 0, 0) + body


def block_header(block: Block) -> bytes:
    """What goes before the payload of `block`.

    Raises:
        ProtocolError: the block is empty or too long, or lies nowhere.
    """
    _check_length("block", block.length, MAX_BLOCK_BYTES)
    _check_offset(block.offset)
    return _HEADER.pack(
        _MAGIC,
        Kind.BLOCK,
        block.stage,
        block.tensor,
        block.chunk,
        block.length,
        block.round,
        block.offset,
    )


def _parse_header(data: memoryview) -> int | Block:
    """The length of the message that follows (0: a ping), or the block that follows."""
    magic, kind, stage, tensor, chunk, length, number, offset = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise ProtocolError(f"not a frame: {bytes(data)!r}")
    if kind == Kind.BLOCK:
        _check_length("block", length, MAX_BLOCK_BYTES)
        _check_offset(offset)
        if stage > Stage.PROBE:
            raise ProtocolError(f"a block of stage {stage}; the last one is {Stage.PROBE:d}")
        return Block(number, Stage(stage), tensor, chunk, offset, length)
    if stage or tensor or chunk or number or offset:
        raise ProtocolError(f"a frame of kind {kind} that looks like a block: {bytes(data)!r}")
    if kind == Kind.MESSAGE:
        _check_length("message", length, MAX_MESSAGE_BYTES)
    elif kind != Kind.PING or length:
        raise ProtocolError(f"a frame of kind {kind} and {length} bytes")
    return int(length)


class _Phase(Enum):
    HEADER = auto()
    MESSAGE = auto()
    PLACING = auto()  # a block has no memory for its payload yet
    PAYLOAD = auto()


class Parser:
    """Says where the next bytes of a link belong, and what they are once they are complete.

    Bytes go to the beginning of `free`, as many as are there; `advance` is told how many. Once
    there is a `pending` block, `begin_payload` must be given the memory for its payload.
    """

    def __init__(self) -> None:
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._block: Block | None = None
        self._expect(_Phase.HEADER, self._header)

    def _expect(self, phase: _Phase, memory: memoryview) -> None:
        self._phase, self._free = phase, memory

    @property
    def free(self) -> memoryview:
        """Where the next bytes belong; empty only while a block is pending."""
        return self._free

    @property
    def pending(self) -> Block | None:
        """The block that waits for `begin_payload`."""
        return self._block if self._phase is _Phase.PLACING else None

    @property
    def is_between_frames(self) -> bool:
        """Whether nothing of the next frame is there yet."""
        return self._phase is _Phase.HEADER and len(self._free) == HEADER_BYTES

    def begin_payload(self, memory: memoryview) -> None:
        """Let the payload of the pending block be written to `memory`, which has its length."""
        assert self._phase is _Phase.PLACING, "no block is pending"
        assert self._block is not None
        place = memory.cast("B")
        if len(place) != self._block.length:
            raise ValueError(f"{len(place)} bytes for the payload of {self._block}")
        self._expect(_Phase.PAYLOAD, place)

    @property
    def incoming(self) -> Block | None:
        """The block whose payload is being written."""
        return self._block if self._phase is _Phase.PAYLOAD else None

    def redirect_payload(self, memory: memoryview) -> None:
        """Let what is still to come of the payload be written to `memory`, as long as all of it."""
        assert self._phase is _Phase.PAYLOAD, "no payload is being written"
        self._free = memory.cast("B")[: len(self._free)]

    def advance(self, num_bytes: int) -> Frame | None:
        """The frame that is complete now that `num_bytes` more are in `free`, if one is.

        Raises:
            ProtocolError: this is no frame of ours.
        """
        self._free = self._free[num_bytes:]
        if self._free:
            return None
        match self._phase:
            case _Phase.HEADER:
                self._begin_body(_parse_header(self._header))
                return None
            case _Phase.MESSAGE:
                self._expect(_Phase.HEADER, self._header)
                return bytes(self._message)
            case _Phase.PAYLOAD:
                self._expect(_Phase.HEADER, self._header)
                return self._block
            case _Phase.PLACING:
                return None

    def _begin_body(self, header: int | Block) -> None:
        if isinstance(header, Block):
            self._block = header
            self._expect(_Phase.PLACING, self._header[:0])
        elif header:
            self._message = bytearray(header)
            self._expect(_Phase.MESSAGE, memoryview(self._message))
        else:
            self._expect(_Phase.HEADER, self._header)


def _check_length(what: str, length: int, limit: int) -> None:
    if not 0 < length <= limit:
        raise ProtocolError(f"a {what} of {length} bytes; allowed are 1 to {limit}")


def _check_offset(offset: int) -> None:
    if offset > MAX_OFFSET_BYTES:
        raise ProtocolError(
            f"a block at byte {offset} of a chunk; allowed are 0 to {MAX_OFFSET_BYTES}"
        )
