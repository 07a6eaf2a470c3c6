"""Whatever bytes a link brings, in whatever pieces: the frames that were sent, or an error.

ELASTIC_FUZZ_EXAMPLES=100000 tries that many inputs instead of a few thousand.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.errors import ProtocolError
from elastic.core.protocol.frames import (
    HEADER_BYTES,
    MAX_BLOCK_BYTES,
    MAX_OFFSET_BYTES,
    PING,
    Block,
    Frame,
    Parser,
    Stage,
    block_header,
    message_frame,
)
from elastic.core.protocol.messages import MAX_MESSAGE_BYTES

NUM_EXAMPLES = int(os.environ.get("ELASTIC_FUZZ_EXAMPLES", "2000"))
BLOCK = Block(round=3, stage=Stage.TOTAL, tensor=1, chunk=7, offset=4096, length=8)


def parse(data: bytes, cuts: list[int]) -> Iterator[tuple[Frame, bytes]]:
    """The frames in `data`, each with its payload, when it comes in pieces of these sizes."""
    parser, at, payload = Parser(), 0, bytearray()
    sizes = iter(cuts)
    while at < len(data):
        if (block := parser.pending) is not None:
            payload = bytearray(block.length)
            parser.begin_payload(memoryview(payload))
        assert len(parser.free) > 0
        size = min(next(sizes, len(data)), len(parser.free), len(data) - at)
        parser.free[:size] = data[at : at + size]
        at += size
        frame = parser.advance(size)
        if frame is not None:
            yield frame, bytes(payload) if isinstance(frame, Block) else b""


def at_once(data: bytes) -> list[tuple[Frame, bytes]]:
    return list(parse(data, []))


def header(
    *, magic: int = 0x7E1A, kind: int = 2, stage: int = 0, length: int = 8, offset: int = 0
) -> bytes:
    """A header as nobody should write it."""
    return struct.pack("<HBBIIIQQ", magic, kind, stage, 0, 0, length, 0, offset)


words = st.integers(0, 2**32 - 1)
messages = st.binary(min_size=1, max_size=300).map(lambda body: (message_frame(body), body, b""))
blocks = st.builds(
    lambda payload, fields: (
        block_header(Block(*fields, len(payload))) + payload,
        Block(*fields, len(payload)),
        payload,
    ),
    st.binary(min_size=1, max_size=300),
    st.tuples(
        st.integers(0, 2**64 - 1),
        st.sampled_from(Stage),
        words,
        words,
        st.integers(0, MAX_OFFSET_BYTES),
    ),
)
pings = st.just((PING, None, b""))
cuts = st.lists(st.integers(1, 400))


@settings(max_examples=300, deadline=None)
@given(st.lists(messages | blocks | pings, max_size=8), cuts)
def test_frames_come_out_as_they_went_in(
    sent: list[tuple[bytes, Frame | None, bytes]], sizes: list[int]
) -> None:
    data = b"".join(one[0] for one in sent)
    expected = [(frame, payload) for _, frame, payload in sent if frame is not None]
    assert list(parse(data, sizes)) == expected


def test_a_frame_may_come_byte_by_byte() -> None:
    data = message_frame(b"abc") + block_header(BLOCK) + b"01234567" + PING + message_frame(b"d")
    expected = [(b"abc", b""), (BLOCK, b"01234567"), (b"d", b"")]
    assert list(parse(data, [1] * len(data))) == expected
    assert at_once(data) == expected


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(st.data())
def test_no_bytes_do_harm(data: st.DataObject) -> None:
    """Noise, noise behind a good frame, and good frames with a few bytes changed."""
    good = data.draw(st.lists(messages | blocks | pings, max_size=4))
    stream = bytearray(b"".join(one[0] for one in good))
    for _ in range(data.draw(st.integers(0, 3)) if stream else 0):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    stream += data.draw(st.binary(max_size=100))
    total = 0
    try:
        for frame, payload in parse(bytes(stream), data.draw(cuts)):
            total += HEADER_BYTES + len(payload if isinstance(frame, Block) else frame)
    except ProtocolError:
        pass
    assert total <= len(stream)  # nothing came from nowhere


@pytest.mark.parametrize(
    "data",
    [
        header(magic=0x7E1B),
        header(kind=0),
        header(kind=4),
        header(stage=5),
        header(length=0),
        header(length=MAX_BLOCK_BYTES + 1),
        header(length=2**32 - 1),
        header(offset=MAX_OFFSET_BYTES + 1),
        header(kind=1, length=0),
        header(kind=1, length=MAX_MESSAGE_BYTES + 1),
        header(kind=1, offset=1),
        header(kind=1, stage=1),
        header(kind=3, length=1),
        header(kind=3, length=0, offset=1),
    ],
    ids=lambda data: data.hex()[:24] + data.hex()[-16:],
)
def test_what_no_node_sends_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        at_once(data)


@pytest.mark.parametrize("kind", [1, 2])
def test_a_length_is_refused_before_memory_is_taken(kind: int) -> None:
    parser = Parser()
    parser.free[:] = header(kind=kind, length=2**32 - 1)
    with pytest.raises(ProtocolError, match=r"4294967295 bytes; allowed are 1 to"):
        parser.advance(HEADER_BYTES)
    assert parser.pending is None
    assert len(parser.free) == 0


def test_what_would_be_refused_is_not_sent() -> None:
    assert len(message_frame(b"x" * MAX_MESSAGE_BYTES)) == HEADER_BYTES + MAX_MESSAGE_BYTES
    for body in (b"", b"x" * (MAX_MESSAGE_BYTES + 1)):
        with pytest.raises(ProtocolError, match="a message of"):
            message_frame(body)
    assert len(block_header(BLOCK._replace(length=MAX_BLOCK_BYTES))) == HEADER_BYTES
    for change in ({"length": 0}, {"length": MAX_BLOCK_BYTES + 1}, {"offset": 2**41}):
        with pytest.raises(ProtocolError, match="a block "):
            block_header(BLOCK._replace(**change))


def test_a_block_waits_for_its_memory() -> None:
    parser = Parser()
    assert parser.is_between_frames
    parser.free[:] = block_header(BLOCK)
    assert parser.advance(HEADER_BYTES) is None
    assert (parser.pending, len(parser.free)) == (BLOCK, 0)
    assert not parser.is_between_frames
    with pytest.raises(ValueError, match="9 bytes for the payload"):
        parser.begin_payload(memoryview(bytearray(9)))
    memory = bytearray(8)
    parser.begin_payload(memoryview(memory))
    assert parser.pending is None
    parser.free[:] = b"01234567"
    assert parser.advance(8) == BLOCK
    assert memory == b"01234567"
    assert parser.is_between_frames
