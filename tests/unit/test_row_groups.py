"""The cache of row groups: what is kept, what is read ahead, and several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.core.data.columns import Column, decode
from elastic.core.data.files import File
from elastic.core.data.row_groups import RowGroups
from elastic.core.data.rows import Rows
from elastic.core.data.text import TextWindows
from elastic.core.errors import DataError

GROUP_BYTES = 80


class FakeFile:
    """Ten row groups of ten numbers, and which were read. `gate` holds up reading of `slow`."""

    name, is_local = "fake", True
    schema = pa.schema([("x", pa.int64())])

    def __init__(self, slow: int = -1) -> None:
        self.rows_G = [10] * 10
        self.reads: list[int] = []
        self.slow = slow
        self.began, self.gate = threading.Event(), threading.Event()

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        self.reads.append(group)
        if group == self.slow and not self.began.is_set():
            self.began.set()
            assert self.gate.wait(10)
        return pa.table({"x": np.arange(10) + 10 * group})


def make(file: File, num_cached: float) -> RowGroups[Column]:
    cache_bytes = int(num_cached * GROUP_BYTES)
    return RowGroups([file], ["x"], decode=decode, cache_bytes=cache_bytes)


def first(groups: RowGroups[Column], index: int) -> int:
    return int(groups[index]["x"][0])  # type: ignore[arg-type]


def test_the_last_used_are_kept() -> None:
    file = FakeFile()
    groups = make(file, 3)
    assert [first(groups, one) for one in (0, 1, 2, 0, 3, 0)] == [0, 10, 20, 0, 30, 0]
    assert file.reads == [0, 1, 2, 3]
    assert groups.cached_bytes == 3 * GROUP_BYTES
    first(groups, 1)
    assert file.reads[-1] == 1  # it was the oldest when 3 came


def test_what_was_read_ahead_is_not_read_again() -> None:
    file = FakeFile()
    groups = make(file, 10)
    groups.read_ahead([4, 5, 4])
    assert file.reads == [4, 5]
    assert [first(groups, 5), first(groups, 4)] == [50, 40]
    assert file.reads == [4, 5]


def test_reading_ahead_takes_half_of_the_cache_until_it_is_used() -> None:
    file = FakeFile()
    groups = make(file, 4)
    first(groups, 9)
    groups.read_ahead([0, 1, 2, 3])
    assert file.reads == [9, 0, 1]
    first(groups, 0)
    groups.read_ahead([0, 1, 2, 3])
    assert file.reads == [9, 0, 1, 2]
    assert first(groups, 9) == 90
    assert file.reads == [9, 0, 1, 2]  # what is in use was not driven out


def test_what_nobody_came_for_makes_room_again() -> None:
    file = FakeFile()
    groups = make(file, 4)
    groups.read_ahead([0, 1])
    for index in (5, 6, 7, 8):
        first(groups, index)
    groups.read_ahead([2])
    assert file.reads == [0, 1, 5, 6, 7, 8, 2]


def test_who_asks_never_waits_for_reading_ahead() -> None:
    file = FakeFile(slow=3)
    groups = make(file, 4)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(groups.read_ahead, [3])
        assert file.began.wait(10)
        assert first(groups, 3) == 30  # read a second time rather than waited for
        file.gate.set()
        ahead.result(10)
    assert file.reads == [3, 3]
    assert groups.cached_bytes == GROUP_BYTES
    assert first(groups, 3) == 30
    assert file.reads == [3, 3]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_threads_read_the_same_values(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"x": range(1000), "text": [str(number) * 20 for number in range(1000)]})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=20)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    data = Rows(path, cache_bytes=8000)

    def read(seed: int) -> None:
        dice = np.random.default_rng(seed)
        for _ in range(40):
            chosen: npt.NDArray[np.int64] = dice.integers(0, 1000, 5)
            data.prefetch(dice.integers(0, 1000, 5))
            rows = data.fetch(chosen)
            assert rows["x"].tolist() == chosen.tolist()
            assert rows["text"] == [str(number) * 20 for number in chosen.tolist()]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert data._groups.cached_bytes <= 8000


def test_rows_and_windows_bring_what_their_samples_need(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"x": range(100), "text": ["0123456789"] * 100})
    pq.write_table(table, path, row_group_size=10)
    rows = Rows(path, ["x"])
    rows.prefetch(np.array([99, 35, 31]))
    assert list(rows._groups._cached) == [3, 9]
    windows = TextWindows(path, context=50, cache_bytes=1000)
    for index in range(10):
        windows._groups._cached.pop(index)
    windows._groups.cached_bytes = 0
    windows.prefetch(np.array([1, 4]))  # bytes 50..100, of which the last is in the next row group
    assert list(windows._groups._cached) == [0, 1, 2]
    with pytest.raises(IndexError):
        rows.fetch(np.array([100]))


def test_an_error_of_reading_ahead_comes_again_when_the_data_is_needed() -> None:
    class Broken(FakeFile):
        def read(self, group: int, columns: Sequence[str]) -> pa.Table:
            raise OSError("the disk is gone")

    groups = make(Broken(), 3)
    for ask in (lambda: groups.read_ahead([1]), lambda: groups[1]):
        with pytest.raises(DataError, match=r"fake: row group 1: .*the disk is gone"):
            ask()
