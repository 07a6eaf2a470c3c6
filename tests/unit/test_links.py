"""Links over real sockets: who is let in, what arrives, and that nobody ever blocks."""

from __future__ import annotations

import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from actors.links import (
    MAX_QUEUED_BYTES,
    PING_S,
    WAIT,
    Link,
    Place,
)
from actors.listener import HANDSHAKE_S, MAX_STRANGERS, Listener, Unreachable
from elastic.core.errors import ChannelClosed, ConfigError, ProtocolError
from elastic.core.protocol.frames import HEADER_BYTES, Block, Stage, block_header, message_frame
from elastic.core.protocol.handshake import NONCE_BYTES, Answerer, Caller, Credentials
from elastic.core.protocol.messages import Dismiss, Message, Stop, encode_message

SECRET, OTHER_SECRET = bytes(range(32)), bytes(32)
HOST = "127.0.0.1"
BLOCK = Block(round=1, stage=Stage.NODE_SUM, tensor=0, chunk=2, offset=0, length=8)


@dataclass
class FakeClock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Job:
    """Listeners of one job, closed at the end, and what their turns made."""

    clock: FakeClock = field(default_factory=FakeClock)
    listeners: dict[int, Listener] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    unreachable: list[Unreachable] = field(default_factory=list)

    def listen(self, node: int, secret: bytes = SECRET) -> Listener:
        made = Listener(HOST, Credentials(node, secret), clock=self.clock)
        self.listeners[node] = made
        return made

    def turn(self) -> None:
        for listener in self.listeners.values():
            for one in listener.turn():
                if isinstance(one, Link):
                    self.links.append(one)
                else:
                    self.unreachable.append(one)

    def until(self, condition: Callable[[], bool]) -> None:
        """Let all listeners take turns until it is so; ten seconds at most."""
        with selectors.DefaultSelector() as selector:
            for listener in self.listeners.values():
                selector.register(listener, selectors.EVENT_READ)
            deadline_s = time.monotonic() + 10
            self.turn()
            while not condition():
                assert time.monotonic() < deadline_s, "it does not happen"
                selector.select(1)
                self.turn()

    def link(self, caller: int, answerer: int) -> tuple[Link, Link]:
        """A link between two nodes: the caller's end, the answerer's end."""
        for node in (caller, answerer):
            if node not in self.listeners:
                self.listen(node)
        before = len(self.links)
        self.listeners[caller].call(answerer, self.listeners[answerer].address)
        self.until(lambda: len(self.links) == before + 2)
        ours, theirs = self.links[before:]
        return (ours, theirs) if ours.node == answerer else (theirs, ours)

    def close(self) -> None:
        for one in (*self.links, *self.listeners.values()):
            one.close()


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job()
    yield job
    job.close()


@pytest.fixture
def pair(job: Job) -> tuple[Link, Link]:
    return job.link(1, 0)


@pytest.fixture
def raw() -> Iterator[Callable[[Listener], socket.socket]]:
    """A connection to a listener of somebody who may be anybody."""
    made = []

    def connect(listener: Listener) -> socket.socket:
        made.append(socket.create_connection(listener.address, timeout=10))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def nowhere(block: Block) -> None:
    """Every payload is dropped."""


def into(memory: bytearray | memoryview) -> Place:
    return lambda block: memoryview(memory)[block.offset : block.offset + block.length]


def ready(link: Link, place: Place = nowhere, sender: Link | None = None) -> Message | Block:
    """The next frame, waited for; `sender` goes on writing meanwhile."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        if sender is not None:
            sender.flush()
        frame = link.receive(place)
        if frame is not None:
            return frame
        with selectors.DefaultSelector() as selector:
            selector.register(link.fileno(), selectors.EVENT_READ)
            selector.select(0.01 if sender is not None and sender.has_unsent else 1)
    raise AssertionError("nothing arrives")


def closed(link: Link) -> str:
    """Why the link ends, waited for."""
    with pytest.raises(ChannelClosed) as caught:
        ready(link)
    return str(caught.value)


# --- who is let in ---------------------------------------------------------------------------


def test_both_ends_know_who_the_other_is(job: Job) -> None:
    ours, theirs = job.link(7, 3)
    assert (ours.node, theirs.node) == (3, 7)
    assert [one.num_refused for one in job.listeners.values()] == [0, 0]


@pytest.mark.parametrize(
    ("caller", "answerer"),
    [(SECRET, OTHER_SECRET), (OTHER_SECRET, SECRET)],
    ids=["called", "calling"],
)
def test_a_wrong_secret_is_refused_by_both_ends(job: Job, caller: bytes, answerer: bytes) -> None:
    called = job.listen(0, answerer)
    calling = job.listen(1, caller)
    calling.call(0, called.address)
    job.until(lambda: bool(job.unreachable) and called.num_refused == 1)
    assert job.unreachable == [
        Unreachable(0, "the other end does not know the job's secret"),
    ]
    assert (called.num_refused, calling.num_refused, job.links) == (1, 1, [])


def test_a_caller_without_the_secret_learns_nothing_that_helps(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    listener = job.listen(0)
    stranger = raw(listener)
    caller = Caller(Credentials(1, OTHER_SECRET), 0, os.urandom(NONCE_BYTES))
    stranger.sendall(caller.hello)
    job.until(lambda: readable(stranger))
    answer = stranger.recv(1000)
    stranger.sendall(answer[-32:])  # its own proof, given back
    job.until(lambda: listener.num_refused == 1)
    assert stranger.recv(1000) == b""
    assert job.links == []


def readable(connection: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


def test_what_was_said_on_another_connection_proves_nothing(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    """An eavesdropper says again what a good caller said."""
    listener = job.listen(0)
    good = Caller(Credentials(1, SECRET), 0, os.urandom(NONCE_BYTES))
    first = raw(listener)
    first.sendall(good.hello)
    job.until(lambda: readable(first))
    proof = good.handle(first.recv(1000))
    first.sendall(proof)
    job.until(lambda: len(job.links) == 1)
    again = raw(listener)
    again.sendall(good.hello + proof)
    job.until(lambda: listener.num_refused == 1)
    assert len(job.links) == 1


def test_a_challenge_cannot_be_reflected(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    """Node 1 calls an impostor of node 0, who asks node 1 and node 0 to answer in its place."""
    here, there = job.listen(1), job.listen(0)
    victim = Caller(Credentials(1, SECRET), 0, os.urandom(NONCE_BYTES))
    nonce = victim.hello[-NONCE_BYTES:]
    for listener, caller, answerer in ((here, 0, 1), (there, 2, 0)):
        oracle = raw(listener)
        oracle.sendall(struct.pack("<8sII32s", b"elastic1", caller, answerer, nonce))
        job.until(lambda oracle=oracle: readable(oracle))  # type: ignore[misc]
        with pytest.raises(ProtocolError, match="secret"):
            victim.handle(oracle.recv(1000))
    assert victim.num_expected > 0


def test_an_answer_to_an_earlier_call_proves_nothing() -> None:
    """An impostor says again what the good node once said."""
    earlier, now = (Caller(Credentials(1, SECRET), 0, os.urandom(NONCE_BYTES)) for _ in range(2))
    answer = Answerer(Credentials(0, SECRET), os.urandom(NONCE_BYTES)).handle(earlier.hello)
    earlier.handle(answer)
    with pytest.raises(ProtocolError, match="secret"):
        now.handle(answer)


def test_proofs_of_the_two_roles_differ() -> None:
    nonce = os.urandom(NONCE_BYTES)
    caller = Caller(Credentials(1, SECRET), 0, nonce)
    answerer = Answerer(Credentials(0, SECRET), nonce)  # even with one nonce
    answer = answerer.handle(caller.hello)
    assert answer[-32:] != caller.handle(answer)


@pytest.mark.parametrize(
    ("caller", "answerer", "reason"),
    [(1, 2, "node 1 calls node 2; this is node 0"), (0, 0, "node 0 calls node 0")],
)
def test_a_call_for_another_node_is_refused(caller: int, answerer: int, reason: str) -> None:
    here = Answerer(Credentials(0, SECRET), os.urandom(NONCE_BYTES))
    other = Caller(Credentials(caller, SECRET), answerer, os.urandom(NONCE_BYTES))
    with pytest.raises(ProtocolError, match=reason):
        here.handle(other.hello)


def test_a_secret_is_long_and_is_not_shown() -> None:
    with pytest.raises(ValueError, match="a secret of 3 bytes, not 32"):
        Credentials(0, b"abc")
    assert SECRET.hex() not in repr(Credentials(0, SECRET))
    assert str(SECRET) not in repr(Credentials(0, SECRET))


def test_who_says_nothing_is_refused_in_time_and_nobody_waits(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    listener = job.listen(0)
    silent, slow = raw(listener), raw(listener)
    slow.sendall(b"elast")
    ours, theirs = job.link(1, 0)
    ours.send(Stop("meanwhile"))
    assert ready(theirs) == Stop("meanwhile")
    assert listener.num_refused == 0
    job.clock.now_s += HANDSHAKE_S - 0.1
    slow.sendall(b"ic")  # does not buy time
    job.turn()
    assert listener.num_refused == 0
    job.clock.now_s += 0.1
    job.turn()
    assert listener.num_refused == 2
    assert silent.recv(1) == b""
    ours.send(Stop("still there"))
    assert ready(theirs) == Stop("still there")


def test_many_strangers_push_each_other_out(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    listener = job.listen(0)
    first = raw(listener)
    job.turn()
    strangers = []
    for _ in range(MAX_STRANGERS + 9):
        strangers.append(raw(listener))
        job.turn()
    job.until(lambda: listener.num_refused == 10)
    assert first.recv(1) == b""
    assert not readable(strangers[-1])
    ours, _ = job.link(1, 0)  # a node with a proof comes through
    assert ours.node == 0
    assert listener.num_refused == 11


def test_noise_is_refused_while_a_link_goes_on(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    ours, theirs = job.link(1, 0)
    listener, dice = job.listeners[0], np.random.default_rng(0)
    for number in range(50):
        noisy = raw(listener)
        noisy.sendall(dice.bytes(int(dice.integers(1, 3000))))
        noisy.shutdown(socket.SHUT_WR)
        ours.send(Stop(str(number)))
        assert ready(theirs) == Stop(str(number))
        job.until(lambda number=number: listener.num_refused == number + 1)  # type: ignore[misc]


def test_who_hangs_up_before_any_proof_is_counted(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    listener = job.listen(0)
    raw(listener).close()
    job.until(lambda: listener.num_refused == 1)


def test_a_node_that_is_not_there_is_unreachable(job: Job) -> None:
    gone = job.listen(5)
    address = gone.address
    gone.close()
    del job.listeners[5]
    job.listen(0).call(5, address)
    job.until(lambda: bool(job.unreachable))
    assert job.unreachable[0].node == 5
    assert "refused" in job.unreachable[0].reason
    assert job.listeners[0].num_refused == 0


def test_a_node_that_never_answers_is_unreachable_in_time(job: Job) -> None:
    with socket.create_server((HOST, 0)) as silent:
        job.listen(0).call(5, silent.getsockname())
        job.turn()
        assert job.unreachable == []
        job.clock.now_s += HANDSHAKE_S
        job.turn()
    assert job.unreachable == [Unreachable(5, f"no proof within {HANDSHAKE_S:g} s")]


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "224.0.0.1", "localhost", "", "192.0.2.1"])
def test_a_listener_has_one_address_of_this_node(address: str) -> None:
    with pytest.raises(ConfigError, match="links"):
        Listener(address, Credentials(0, SECRET))


def test_nobody_reaches_it_at_another_address(job: Job) -> None:
    _, port = job.listen(0).address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=10)


# --- what arrives ----------------------------------------------------------------------------


def test_messages_and_blocks_arrive(pair: tuple[Link, Link]) -> None:
    for here, there in (pair, pair[::-1]):
        memory = bytearray(8)
        here.send(Stop("first"))
        here.send_block(BLOCK, memoryview(b"01234567"))
        here.flush()
        here.send(Dismiss("x" * 5000))
        assert ready(there, into(memory)) == Stop("first")
        assert ready(there, into(memory)) == BLOCK
        assert memory == b"01234567"
        assert ready(there) == Dismiss("x" * 5000)
        assert there.receive(nowhere) is None
        assert not here.has_unsent


def test_a_large_block_goes_in_parts_and_is_never_copied_together(pair: tuple[Link, Link]) -> None:
    here, there = pair
    numbers = np.arange(1 << 20, dtype=np.int32)
    arrived = np.zeros_like(numbers)
    sent = [
        Block(9, Stage.TOTAL, 0, 0, at * numbers.nbytes // 4, numbers.nbytes // 4)
        for at in range(4)
    ]
    for block in sent * 3:
        at = block.offset // 4
        here.send_block(block, memoryview(numbers[at : at + block.length // 4]))
    place = into(memoryview(arrived).cast("B"))
    assert [ready(there, place, here) for _ in sent * 3] == sent * 3
    assert (arrived == numbers).all()
    assert there.traffic.bytes_in == here.traffic.bytes_out
    assert here.traffic.bytes_out == 3 * numbers.nbytes + 12 * HEADER_BYTES
    assert (here.traffic.blocks_out, there.traffic.blocks_in) == (12, 12)


def test_a_message_overtakes_blocks_that_have_not_begun(pair: tuple[Link, Link]) -> None:
    here, there = pair
    payload = memoryview(bytearray(1 << 20))
    blocks = [BLOCK._replace(length=1 << 20, chunk=chunk) for chunk in range(40)]
    memory = bytearray(1 << 20)
    for block in blocks:
        here.send_block(block, payload)
    here.flush()
    here.send(Stop("urgent"))
    frames = [ready(there, into(memory), here) for _ in range(41)]
    assert 0 < frames.index(Stop("urgent")) < 40
    assert [one for one in frames if isinstance(one, Block)] == blocks


def test_blocks_of_a_round_given_up_are_not_sent(pair: tuple[Link, Link]) -> None:
    here, there = pair
    payload = memoryview(bytearray(1 << 20))
    for chunk in range(40):
        here.send_block(BLOCK._replace(length=1 << 20, chunk=chunk), payload)
    here.flush()
    here.discard_blocks(lambda block: block.chunk != 39)
    here.send(Stop("next"))
    memory, num_blocks = bytearray(1 << 20), 0
    while isinstance(ready(there, into(memory), here), Block):
        num_blocks += 1
    assert 0 < num_blocks < 39
    assert ready(there, into(memory), here) == BLOCK._replace(length=1 << 20, chunk=39)
    assert there.receive(nowhere) is None


def test_a_payload_may_be_dropped(pair: tuple[Link, Link]) -> None:
    here, there = pair
    here.send_block(BLOCK, memoryview(b"01234567"))
    here.send_block(BLOCK._replace(chunk=3), memoryview(b"76543210"))
    here.flush()
    memory = bytearray(8)

    def place(block: Block) -> memoryview | None:
        return memoryview(memory) if block.chunk == 3 else None

    arrived = ready(there, place)
    assert isinstance(arrived, Block)
    assert (arrived.chunk, bytes(memory)) == (3, b"76543210")
    assert there.traffic.blocks_in == 2


def test_a_link_that_waits_reads_nothing_until_it_is_asked_again(pair: tuple[Link, Link]) -> None:
    here, there = pair
    with selectors.DefaultSelector() as selector:
        there.attach(selector, "there")
        here.send_block(BLOCK, memoryview(b"01234567"))
        here.flush()
        here.send(Stop("behind it"))
        assert selector.select(10)
        assert there.receive(lambda block: WAIT) is None
        assert there.waits
        assert selector.select(0) == []  # it is readable, and nobody wants to hear so
        assert there.receive(lambda block: WAIT) is None
        memory = bytearray(8)
        assert there.receive(into(memory)) == BLOCK
        assert memory == b"01234567"
        assert not there.waits
        assert there.receive(nowhere) == Stop("behind it")
        here.send(Stop("again"))
        assert [key.data for key, _ in selector.select(10)] == ["there"]
        there.close()


def test_the_end_of_a_link_that_waits_is_seen(pair: tuple[Link, Link]) -> None:
    here, there = pair
    here.send_block(BLOCK, memoryview(b"01234567"))
    here.flush()
    deadline_s = time.monotonic() + 10
    while not there.waits:
        assert there.receive(lambda block: WAIT) is None
        assert time.monotonic() < deadline_s
    there.tick()
    here.close()

    def tick() -> None:
        while time.monotonic() < deadline_s:
            there.tick()

    with pytest.raises(ChannelClosed, match="node 1 is gone"):
        tick()


def test_an_error_in_placing_is_ours(pair: tuple[Link, Link]) -> None:
    pair[0].send_block(BLOCK, memoryview(b"01234567"))
    pair[0].flush()
    with pytest.raises(ValueError, match="7 bytes for the payload"):
        ready(pair[1], lambda block: memoryview(bytearray(7)))
    with pytest.raises(ValueError, match="7 bytes for the payload"):
        pair[0].send_block(BLOCK, memoryview(b"0123456"))


# --- bytes at any border ---------------------------------------------------------------------


def test_reading_and_writing_go_on_at_any_byte(
    job: Job, raw: Callable[[Listener], socket.socket]
) -> None:
    """A peer whose kernel hands over a byte at a time."""
    listener = job.listen(0)
    caller = Caller(Credentials(1, SECRET), 0, os.urandom(NONCE_BYTES))
    peer = raw(listener)
    for byte in caller.hello:
        peer.sendall(bytes([byte]))
        job.turn()
    job.until(lambda: readable(peer))
    data = caller.handle(peer.recv(1000))
    data += message_frame(encode_message(Stop("one"))) + block_header(BLOCK) + b"01234567"
    frames: list[Message | Block] = []
    memory = bytearray(8)
    for byte in data:
        peer.sendall(bytes([byte]))
        job.turn()
        for link in job.links:
            frame = link.receive(into(memory))
            frames += [] if frame is None else [frame]
    job.until(lambda: bool(job.links))
    while len(frames) < 2:
        frames.append(ready(job.links[0], into(memory)))
    assert frames == [Stop("one"), BLOCK]
    assert memory == b"01234567"


def test_a_slow_reader_gets_every_byte(pair: tuple[Link, Link]) -> None:
    here, there = pair
    here._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
    dice = np.random.default_rng(1)
    payloads = [dice.bytes(int(size)) for size in dice.integers(1, 40_000, 60)]
    arrived = []
    memory = bytearray(40_000)
    blocks = [
        BLOCK._replace(chunk=chunk, length=len(payload)) for chunk, payload in enumerate(payloads)
    ]
    for block, payload in zip(blocks, payloads, strict=True):
        here.send_block(block, memoryview(payload))
    for block in blocks:
        assert ready(there, into(memory), here) == block
        arrived.append(bytes(memory[: block.length]))
    assert arrived == payloads


# --- ends, and silence -----------------------------------------------------------------------


def test_the_end_of_file_comes_after_what_was_sent(pair: tuple[Link, Link]) -> None:
    pair[0].send(Stop("last words"))
    pair[0].close()
    assert ready(pair[1]) == Stop("last words")
    assert closed(pair[1]) == "node 1: end of file"
    assert closed(pair[1]) == "node 1: end of file"


def test_sending_to_a_closed_end_is_said(pair: tuple[Link, Link]) -> None:
    pair[1].close()

    def insist() -> None:
        for _ in range(1000):
            pair[0].send(Stop("hello?"))

    with pytest.raises(ChannelClosed, match="cannot send to node 0"):
        insist()


def test_a_peer_that_reads_nothing_counts_as_gone(pair: tuple[Link, Link]) -> None:
    def flood() -> None:
        for _ in range(2 * MAX_QUEUED_BYTES // 500_000):
            pair[0].send(Dismiss("x" * 500_000))

    with pytest.raises(ChannelClosed, match="bytes of messages unread"):
        flood()


def test_the_death_of_the_peer_is_an_end_of_file(
    job: Job, fork: Callable[[Callable[[], None]], object]
) -> None:
    ours, theirs = job.link(1, 0)
    child = fork(lambda: ours.send(Stop("from the child")))
    ours.close()
    assert ready(theirs) == Stop("from the child")
    assert theirs.receive(nowhere) is None
    child.kill()  # type: ignore[attr-defined]
    assert "node 1" in closed(theirs)


def test_noise_on_a_link_is_an_error(pair: tuple[Link, Link]) -> None:
    pair[0]._socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with pytest.raises(ProtocolError, match="not a frame"):
        ready(pair[1])


def test_an_idle_link_pings_and_a_busy_one_does_not(job: Job, pair: tuple[Link, Link]) -> None:
    here, there = pair
    begin_s = job.clock.now_s
    here.tick()
    job.clock.now_s += PING_S / 2
    here.send(Stop(""))
    assert ready(there) == Stop("")
    num_bytes = here.traffic.bytes_out
    job.clock.now_s += PING_S / 2
    here.tick()
    assert here.traffic.bytes_out == num_bytes
    assert there.traffic.last_in_s == begin_s + PING_S / 2
    job.clock.now_s += PING_S / 2
    here.tick()
    assert here.traffic.bytes_out == num_bytes + HEADER_BYTES
    here.tick()
    assert here.traffic.bytes_out == num_bytes + HEADER_BYTES
    with selectors.DefaultSelector() as selector:
        there.attach(selector, None)
        assert selector.select(10)
        assert there.receive(nowhere) is None  # a ping is nothing but a sign of life
        there.close()
    assert there.traffic.last_in_s == begin_s + 1.5 * PING_S


def test_stalls_are_counted_while_they_last(job: Job, pair: tuple[Link, Link]) -> None:
    here, there = pair
    block, memory = BLOCK._replace(length=4 << 20), bytearray(4 << 20)
    for _ in range(8):
        here.send_block(block, memoryview(memory))
    before = -1
    while before < here.traffic.bytes_out:  # until the kernel takes no more
        before = here.traffic.bytes_out
        here.flush()
    assert here.has_unsent
    job.clock.now_s += 3
    assert here.traffic.write_stalled_s == 3
    assert here.traffic.read_stalled_s == 0
    for _ in range(8):
        assert ready(there, into(memory), here) == block
    job.clock.now_s += 2
    assert here.traffic.write_stalled_s == 3
    assert not here.has_unsent


def test_half_a_frame_is_a_stall_and_silence_is_none(job: Job, pair: tuple[Link, Link]) -> None:
    here, there = pair
    job.clock.now_s += 10
    assert there.receive(nowhere) is None
    job.clock.now_s += 10
    assert there.traffic.read_stalled_s == 0
    here._socket.sendall(block_header(BLOCK) + b"0123")
    memory = bytearray(8)
    with selectors.DefaultSelector() as selector:
        there.attach(selector, None)
        assert selector.select(10)
        while memory[:4] != b"0123":
            assert there.receive(into(memory)) is None
        job.clock.now_s += 4
        assert there.traffic.read_stalled_s == 4
        here._socket.sendall(b"4567")
        assert selector.select(10)
        assert there.receive(into(memory)) == BLOCK
        there.close()
    job.clock.now_s += 4
    assert there.traffic.read_stalled_s == 4
