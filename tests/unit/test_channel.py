"""A datagram is a message, end-of-file is a death, and nobody ever blocks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.channel import Channel, accept, connect, listen
from elastic.core.errors import ChannelClosed, ProtocolError
from elastic.core.protocol.messages import (
    Commit,
    Dismiss,
    Key,
    Lease,
    Message,
    Outcome,
    Revoke,
    Stop,
)

LEASE = Lease(Key(0, 3, 0), (1, 2))


@pytest.fixture
def path() -> Iterator[Path]:
    """Short: the name of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "socket"


@pytest.fixture
def pair(path: Path) -> Iterator[tuple[Channel, Channel]]:
    """The side that connected and the side that accepted."""
    with listen(path) as listener:
        ours = connect(path)
        assert ours is not None
        theirs = accept(listener)
        yield ours, theirs
        ours.close()
        theirs.close()


def ready(channel: Channel) -> Message | None:
    """The next message, waited for."""
    assert wait([channel], 10), "nothing arrives"
    return channel.receive()


def test_messages_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    sent: list[Message] = [Revoke(LEASE), Stop("asked"), Stop(""), Dismiss("x" * 5000)]
    for here, there in (pair, pair[::-1]):
        for message in sent:
            here.send(message)
        assert [ready(there) for _ in sent] == sent
        assert there.receive() is None


def test_an_empty_channel_does_not_block(pair: tuple[Channel, Channel]) -> None:
    assert pair[0].receive() is None
    assert pair[1].receive() is None


def test_a_large_message_is_one_datagram(pair: tuple[Channel, Channel]) -> None:
    maxima = np.arange(20_000, dtype=np.float32)
    outcome = Outcome(1, 0.5, 1.0, b"s" * 16, b"c" * 8, maxima)
    pair[0].send(Commit(Lease(LEASE.key, (1,)), 0, 0, (outcome,)))
    message = ready(pair[1])
    assert isinstance(message, Commit)
    assert (message.outcomes[0].maxima_C == maxima).all()
    assert pair[1].receive() is None


def test_the_end_of_file_comes_after_what_was_sent(pair: tuple[Channel, Channel]) -> None:
    pair[0].send(Stop("last words"))
    pair[0].close()
    assert ready(pair[1]) == Stop("last words")
    for _ in range(2):
        with pytest.raises(ChannelClosed, match="end of file"):
            ready(pair[1])


def test_sending_to_a_closed_end_is_said(pair: tuple[Channel, Channel]) -> None:
    pair[1].close()
    with pytest.raises(ChannelClosed, match="cannot send Stop"):
        pair[0].send(Stop("hello?"))


def test_a_peer_that_reads_nothing_counts_as_gone(pair: tuple[Channel, Channel]) -> None:
    sent = 0

    def flood() -> None:
        nonlocal sent
        while True:
            pair[0].send(Dismiss("x" * 5000))
            sent += 1

    with pytest.raises(ChannelClosed, match="cannot send Dismiss"):
        flood()
    assert sent > 10
    received = 0
    while pair[1].receive() is not None:
        received += 1
    assert received == sent  # what was accepted is not lost
    pair[0].send(Stop("again"))
    assert ready(pair[1]) == Stop("again")


def test_the_death_of_the_peer_is_an_end_of_file(
    path: Path, fork: Callable[[Callable[[], None]], Any]
) -> None:
    kept = []

    def call() -> None:
        channel = connect(path)
        assert channel is not None
        channel.send(Stop("from the child"))
        kept.append(channel)

    with listen(path) as listener:
        child = fork(call)
        assert child.is_ready
        channel = accept(listener)
        assert channel.peer_pid == child.pid
        assert ready(channel) == Stop("from the child")
        assert channel.receive() is None
        child.kill()
        with pytest.raises(ChannelClosed):
            ready(channel)
        channel.close()


def test_the_peer_of_the_one_that_connects_is_the_one_that_listens(
    pair: tuple[Channel, Channel],
) -> None:
    assert pair[0].peer_pid == pair[1].peer_pid == os.getpid()


def test_nobody_listens(path: Path) -> None:
    assert connect(path) is None
    listen(path).close()  # as a process that died: the file stays
    assert path.exists()
    assert connect(path) is None


def test_a_successor_listens_in_the_place_of_a_dead_process(path: Path) -> None:
    listen(path).close()
    with listen(path) as listener:
        channel = connect(path)
        assert channel is not None
        accept(listener).close()
        channel.close()


def test_a_connection_waits_to_be_accepted(path: Path) -> None:
    """So a worker may connect while the aggregator is busy."""
    with listen(path) as listener:
        channel = connect(path)
        assert channel is not None
        channel.send(Stop("early"))
        theirs = accept(listener)
        assert ready(theirs) == Stop("early")
        theirs.close()
        channel.close()


def test_bytes_that_are_no_message_are_an_error(pair: tuple[Channel, Channel]) -> None:
    pair[0]._socket.send(b"\x63nonsense")
    with pytest.raises(ProtocolError, match="not a message"):
        ready(pair[1])


def test_a_closed_channel_has_no_descriptor(pair: tuple[Channel, Channel]) -> None:
    pair[0].close()
    pair[0].close()
    assert pair[0].fileno() == -1


_PEER = """
import socket, sys, threading
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
thread = threading.Thread(target=sys.stdin.readline)
thread.start()
connection.send(b"both threads live")
thread.join()
sys.stdin.readline()
"""


_BUSY_PEER = """
import os, socket, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
connection.send(b"busy from now on")
while True:
    pass
"""


def test_a_process_that_was_killed_and_has_not_run_since_is_dying(path: Path) -> None:
    """On busy cores another thread of it may end before the main one does."""
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})  # this one runs, so that one does not
        with (
            listen(path) as listener,
            subprocess.Popen([sys.executable, "-c", _BUSY_PEER, path]) as process,
        ):
            assert wait([listener], 30), "it comes"
            channel = accept(listener)
            assert wait([channel], 30), "it is busy"
            assert not channel.is_dying
            process.kill()
            assert channel.is_dying
            channel.close()
    finally:
        os.sched_setaffinity(0, cores)


def test_a_process_that_dies_shows_it_before_its_end_of_file(path: Path) -> None:
    """The end of one of its threads is no death."""
    with (
        listen(path) as listener,
        subprocess.Popen([sys.executable, "-c", _PEER, path], stdin=subprocess.PIPE) as process,
    ):
        assert wait([listener], 30), "it comes"
        channel = accept(listener)
        assert wait([channel], 30), "it says something"
        for is_death in (False, True):
            death = channel.open_death()
            if death is None:
                pytest.skip("Linux 6.9 tells of threads")
            assert wait([death], 0) == []
            assert not channel.is_dying
            if is_death:
                process.kill()
            else:
                assert process.stdin is not None
                process.stdin.write(b"\n")
                process.stdin.flush()
            assert wait([death], 30), "a thread has ended"
            assert channel.is_dying is is_death
            os.close(death)
        process.wait()
        assert channel.open_death() is None
        assert channel.is_dying
        channel.close()
