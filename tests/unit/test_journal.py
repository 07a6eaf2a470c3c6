"""Records on their way to a disk that stalls, fills up or fails, and processes that are killed."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.journal import SIZE_BYTES, Journal

DEADLINE_S = 20.0


class Disk:
    """Takes records; while it is stalled, nothing ends."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.moves = threading.Event()
        self.moves.set()
        self.begun = threading.Event()
        self.fails: OSError | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        self.begun.set()
        assert self.moves.wait(DEADLINE_S)
        if self.fails is not None:
            raise self.fails
        self.written.append(record["n"])


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.fails = OSError("the process was killed")  # of a test that has left it stalled
    disk.moves.set()


def open_at(folder: Path, disk: Disk, **more: Any) -> Journal:
    return Journal(folder / "journal", disk, **{"beat": lambda: None, **more})


def put(journal: Journal, numbers: range) -> None:
    for number in numbers:
        journal.put({"n": number})


def test_nobody_waits_for_a_disk_that_stalls_and_the_order_stays(
    tmp_path: Path, disk: Disk
) -> None:
    journal = open_at(tmp_path, disk)
    disk.moves.clear()
    put(journal, range(1000))
    assert disk.written == []
    disk.moves.set()
    journal.drain()
    assert disk.written == list(range(1000))
    journal.close()


def test_what_a_killed_process_had_not_written_its_successor_writes_first(
    tmp_path: Path, disk: Disk
) -> None:
    killed = open_at(tmp_path, disk)
    put(killed, range(3))
    killed.drain()
    disk.moves.clear()
    disk.begun.clear()
    put(killed, range(3, 9))
    assert disk.begun.wait(DEADLINE_S)  # it is killed in the middle of a write
    other = Disk()
    successor = open_at(tmp_path, other)
    put(successor, range(9, 12))
    successor.drain()
    assert other.written == list(range(3, 12))
    successor.close()


def test_a_record_that_was_not_told_to_its_end_is_none(tmp_path: Path, disk: Disk) -> None:
    """Killed before the place of its end was moved."""
    journal = open_at(tmp_path, disk)
    put(journal, range(1))
    journal.close()
    with (tmp_path / "journal").open("r+b") as file, mmap.mmap(file.fileno(), SIZE_BYTES) as memory:
        memory[16:20] = b'{"n"'
    again = open_at(tmp_path, disk)
    put(again, range(5, 6))
    again.close()
    assert disk.written == [0, 5]


def test_who_is_killed_while_the_places_are_reset_leaves_nothing(
    tmp_path: Path, disk: Disk
) -> None:
    """The end is moved first: it then lies before the beginning."""
    journal = open_at(tmp_path, disk)
    put(journal, range(1))
    journal.drain()
    journal._places[0] = 400
    again = open_at(tmp_path, disk)
    put(again, range(7, 8))
    again.drain()
    assert disk.written == [0, 7]
    journal.close()
    again.close()


def test_memory_is_used_again(tmp_path: Path, disk: Disk) -> None:
    journal = open_at(tmp_path, disk, size_bytes=4096)
    put(journal, range(5000))
    journal.close()
    assert disk.written == list(range(5000))
    assert (tmp_path / "journal").stat().st_size == 4096


def test_where_there_is_no_room_it_waits_and_shows_that_it_lives(
    tmp_path: Path, disk: Disk
) -> None:
    beats: list[int] = []

    def beat() -> None:
        beats.append(len(beats))
        if len(beats) == 3:
            disk.moves.set()

    journal = open_at(tmp_path, disk, size_bytes=256, beat=beat)
    disk.moves.clear()
    put(journal, range(40))
    assert len(beats) >= 3
    journal.close()
    assert disk.written == list(range(40))


def test_what_is_larger_than_all_its_room_is_written_in_its_turn(
    tmp_path: Path, disk: Disk
) -> None:
    journal = open_at(tmp_path, disk, size_bytes=256)
    put(journal, range(3))
    journal.put({"n": "x" * 1000})
    put(journal, range(3, 4))
    journal.close()
    assert disk.written == [0, 1, 2, "x" * 1000, 3]


def test_all_is_written_before_it_is_closed(tmp_path: Path, disk: Disk) -> None:
    journal = open_at(tmp_path, disk)
    disk.moves.clear()
    put(journal, range(9))
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(journal.close)
        assert disk.begun.wait(DEADLINE_S)
        assert not closing.done()
        disk.moves.set()
        closing.result(DEADLINE_S)
    assert disk.written == list(range(9))


@pytest.mark.parametrize(
    "ask",
    [lambda one: one.put({"n": 1}), Journal.drain, Journal.check],
    ids=["put", "drain", "check"],
)
def test_whoever_asks_hears_that_the_disk_fails(
    ask: Callable[[Journal], None], tmp_path: Path, disk: Disk
) -> None:
    """And the record stays, for a successor with a better disk."""
    disk.fails = OSError(5, "Input/output error")
    journal = open_at(tmp_path, disk)
    journal.put({"n": 0})
    begun_s = time.monotonic()
    while journal._thread.is_alive():
        assert time.monotonic() - begun_s < DEADLINE_S
        journal._thread.join(0.01)
    with pytest.raises(OSError, match="Input/output error"):
        ask(journal)
    journal.close()
    other = Disk()
    open_at(tmp_path, other).close()
    assert other.written == [0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=60), st.integers(128, 2048))
def test_many_threads_tell_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size_bytes: int
) -> None:
    disk = Disk()
    folder = tmp_path_factory.mktemp("journal")
    journal = open_at(folder, disk, size_bytes=size_bytes)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda text: journal.put({"n": text}), texts))
    journal.close()
    assert sorted(disk.written) == sorted(texts)
