"""The order of samples, and the data sets over Parquet, Arrow IPC and memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.core.data import ArrayRows, Rows, SampleStream, TextWindows, digest
from elastic.core.errors import DataError
from elastic.core.task import Dataset

DOCUMENTS = ["first document", "", "zweites Dokument: äöü", None, "x" * 100, "the end of it all"]
TEXT = b"".join((document or "").encode() for document in DOCUMENTS)


def write_parquet(table: pa.Table, path: Path, group_rows: int = 2) -> Path:
    pq.write_table(table, path, row_group_size=group_rows, write_page_checksum=True)
    return path


def write_arrow(table: pa.Table, path: Path, group_rows: int = 2) -> Path:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=group_rows)
    return path


WRITERS = pytest.mark.parametrize(
    ("write", "name"), [(write_parquet, "a.parquet"), (write_arrow, "a.arrow")], ids=["pq", "ipc"]
)
Write = Callable[..., Path]


# --- order -----------------------------------------------------------------------------------


@given(
    num_samples=st.integers(1, 200),
    held_out_share=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 50),
)
def test_each_sample_comes_once_an_epoch_however_it_is_cut(
    num_samples: int, held_out_share: float, seed: int, batch: int
) -> None:
    held_out = int(num_samples * held_out_share)
    stream = SampleStream(num_samples=num_samples, held_out=held_out, seed=seed, split_seed=3)
    length = stream.num_training
    num_batches = -(-3 * length // batch)
    seen = np.concatenate([stream.micro_batch(step, 0, 1, batch) for step in range(num_batches)])
    held = set(stream.held_out_samples().tolist())
    assert len(held) == held_out
    for epoch in range(3):
        in_epoch = seen[epoch * length : (epoch + 1) * length].tolist()
        assert sorted([*in_epoch, *held]) == list(range(num_samples))


def test_micro_batches_cut_the_stream_in_order() -> None:
    stream = SampleStream(num_samples=50, held_out=7, seed=1, split_seed=2)
    whole = stream.training(np.arange(6 * 4 * 3))
    parts = [stream.micro_batch(step, m, 4, 3) for step in range(6) for m in range(4)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_seeds_change_the_order_and_only_the_split_seed_the_split() -> None:
    def stream(seed: int, split_seed: int) -> SampleStream:
        return SampleStream(num_samples=1000, held_out=100, seed=seed, split_seed=split_seed)

    first = np.arange(900)
    order = stream(0, 0).training(first).tolist()
    assert order != stream(1, 0).training(first).tolist()
    assert order != stream(0, 0).training(first + 900).tolist()  # the next epoch
    held = stream(0, 0).held_out_samples().tolist()
    assert held == stream(1, 0).held_out_samples().tolist()
    assert held != stream(0, 1).held_out_samples().tolist()


def test_a_set_of_10_to_the_12_needs_no_index() -> None:
    stream = SampleStream(num_samples=10**12, held_out=10**6, seed=0, split_seed=0)
    indices = stream.micro_batch(10**9, 3, 16, 8)
    assert len(set(indices.tolist())) == 8
    assert 0 <= indices.min() <= indices.max() < 10**12


def test_the_order_never_changes() -> None:
    stream = SampleStream(num_samples=100, held_out=10, seed=7, split_seed=1)
    assert stream.micro_batch(2, 1, 4, 5).tolist() == [27, 66, 22, 52, 30]
    assert stream.held_out_samples().tolist() == [62, 11, 46, 45, 94, 24, 83, 28, 25, 79]


@pytest.mark.parametrize("held_out", [10, 11, -1])
def test_a_split_that_leaves_nothing_is_refused(held_out: int) -> None:
    with pytest.raises(DataError, match=f"held_out is {held_out}"):
        SampleStream(num_samples=10, held_out=held_out, seed=0, split_seed=0)


def test_digest_names_a_sequence() -> None:
    assert digest(np.array([1, 2, 3])).hex() == "abccad42d03c940bc2b249bf5a4e1e3d"
    assert digest(np.array([1, 2, 3], dtype=">i8")) == digest(np.array([1, 2, 3]))
    assert digest(np.arange(6)[::2]) == digest(np.array([0, 2, 4]))
    assert digest(np.array([2, 1, 3])) != digest(np.array([1, 2, 3]))


# --- text ------------------------------------------------------------------------------------


@WRITERS
@pytest.mark.parametrize("text_type", [pa.string(), pa.binary(), pa.large_string()], ids=str)
@pytest.mark.parametrize("context", [1, 7, 50, len(TEXT) - 1])
def test_windows_are_the_bytes_of_all_documents(
    tmp_path: Path, write: Write, name: str, text_type: pa.DataType, context: int
) -> None:
    table = pa.table({"other": range(6), "text": pa.array(DOCUMENTS).cast(text_type)})
    data = TextWindows(write(table, tmp_path / name), context=context)
    assert isinstance(data, Dataset)
    assert len(data) == (len(TEXT) - 1) // context
    windows = data.fetch(np.arange(len(data)))
    assert windows.dtype == torch.int64
    expected = [list(TEXT[i * context : (i + 1) * context + 1]) for i in range(len(data))]
    assert windows.tolist() == expected
    assert data.fetch(np.array([len(data) - 1, 0])).tolist() == [expected[-1], expected[0]]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_arrow(pa.table({"text": ["cd", "ef"]}), tmp_path / "2.arrow", 1)
    write_parquet(pa.table({"text": ["ab"]}), tmp_path / "1.parquet")
    write_parquet(pa.table({"text": ["gh"]}), tmp_path / "3.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    window = TextWindows(tmp_path, context=7).fetch(np.array([0]))
    assert bytes(window[0].tolist()) == b"abcdefgh"


def test_the_cache_stays_below_its_bound(tmp_path: Path) -> None:
    table = pa.table({"text": [chr(97 + i) * 1000 for i in range(20)]})
    path = write_parquet(table, tmp_path / "a.parquet", 1)
    data = TextWindows(path, context=10, cache_bytes=3500)
    for index in [0, 1998, 700, 1234, 5]:
        assert set(data.fetch(np.array([index]))[0, :-1].tolist()) == {97 + index // 100}
        assert 0 < data._groups.cached_bytes <= 3500
    assert list(data._groups._cached) == [7, 12, 0]  # the last used, oldest first


def test_one_row_group_above_the_bound_still_works(tmp_path: Path) -> None:
    path = write_parquet(pa.table({"text": ["a" * 100, "b" * 100]}), tmp_path / "a.parquet", 1)
    window = TextWindows(path, context=199, cache_bytes=10).fetch(np.array([0]))
    assert bytes(window[0].tolist()) == b"a" * 100 + b"b" * 100


def test_arrow_text_is_not_copied(tmp_path: Path) -> None:
    path = write_arrow(pa.table({"text": ["a" * 10**6] * 8}), tmp_path / "a.arrow")
    before = pa.total_allocated_bytes()
    data = TextWindows(path)
    data.fetch(np.arange(100))
    assert pa.total_allocated_bytes() - before < 10**5
    assert not data._groups[0]["text"].flags.owndata


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sample_that_is_not_there_is_refused(tmp_path: Path, index: int) -> None:
    path = write_parquet(pa.table({"text": ["a" * 31]}), tmp_path / "a.parquet")
    with pytest.raises(IndexError, match=r"range\(3\)"):
        TextWindows(path, context=10).fetch(np.array([0, index]))


# --- rows ------------------------------------------------------------------------------------


@WRITERS
def test_rows_come_back_by_number(tmp_path: Path, write: Write, name: str) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(21, dtype=np.float32)), 3)
    table = pa.table({"x": vectors, "y": range(7), "ok": [True, False] * 3 + [True]})
    data = Rows(write(table, tmp_path / name))
    assert isinstance(data, Dataset)
    assert len(data) == 7
    rows = data.fetch(np.array([6, 0, 3, 0]))
    assert rows["y"].tolist() == [6, 0, 3, 0]
    assert rows["ok"].tolist() == [True, True, False, True]
    assert rows["x"].dtype == torch.float32
    assert rows["x"].tolist() == [[18, 19, 20], [0, 1, 2], [9, 10, 11], [0, 1, 2]]


def test_rows_of_chosen_columns_and_several_files(tmp_path: Path) -> None:
    write_parquet(pa.table({"y": [0, 1, 2], "name": ["a", "b", "c"]}), tmp_path / "1.parquet")
    write_parquet(pa.table({"y": pa.array([], pa.int64())}), tmp_path / "2.parquet")
    write_arrow(pa.table({"y": [3, 4]}), tmp_path / "3.arrow", 1)
    data = Rows(tmp_path, columns=["y"])
    assert data.fetch(np.array([4, 2, 3]))["y"].tolist() == [4, 2, 3]
    assert list(data.fetch(np.array([0]))) == ["y"]


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (pa.array([1, 2, 3, None]), "row group 1: column 'x'.*1 of 2 rows are null"),
        (pa.array(["a"] * 4), "row group 0: column 'x'.*numbers.*not string"),
        (pa.array([[1], [2], [3], [4]]), "row group 0: column 'x'.*numbers.*not list"),
        (pa.array([[1]] * 3 + [[None]], pa.list_(pa.int8(), 1)), "row group 1.*elements are null"),
    ],
    ids=["null", "text", "list", "null in list"],
)
@WRITERS
def test_columns_that_are_no_numbers_are_refused(
    tmp_path: Path, write: Write, name: str, column: pa.Array, problem: str
) -> None:
    path = write(pa.table({"x": column}), tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: {problem}"):
        Rows(path)


def test_array_rows() -> None:
    data = ArrayRows(x=torch.arange(8).view(4, 2), y=torch.arange(4))
    assert isinstance(data, Dataset)
    assert len(data) == 4
    rows = data.fetch(np.array([2, 0]))
    assert rows["x"].tolist() == [[4, 5], [0, 1]]
    assert rows["y"].tolist() == [2, 0]
    with pytest.raises(IndexError):
        data.fetch(np.array([-1]))


@pytest.mark.parametrize("lengths", [[], [3, 4], [0, 0]], ids=str)
def test_array_rows_of_unequal_or_no_length_are_refused(lengths: list[int]) -> None:
    with pytest.raises(DataError, match="equally long"):
        ArrayRows(**{f"t{i}": torch.zeros(length) for i, length in enumerate(lengths)})


# --- damage ----------------------------------------------------------------------------------


def test_a_damaged_row_group_is_named_when_opened(tmp_path: Path) -> None:
    random_text = np.random.default_rng(0).bytes(4000).hex()
    path = write_parquet(pa.table({"text": [random_text] * 3}), tmp_path / "a.parquet", 1)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    damage(path, chunk.data_page_offset - 20)
    with pytest.raises(DataError, match=r"a\.parquet: row group 1: cannot be read"):
        TextWindows(path)


def test_damaged_text_of_an_arrow_file_is_named_when_opened(tmp_path: Path) -> None:
    path = write_arrow(pa.table({"text": ["ä" * 1000, "ö" * 1000]}), tmp_path / "a.arrow", 1)
    damage(path, path.read_bytes().rindex("ö".encode()))
    with pytest.raises(DataError, match=r"a\.arrow: row group 1: .*UTF8"):
        TextWindows(path)


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


@WRITERS
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.98])
def test_a_truncated_file_is_named_when_opened(
    tmp_path: Path, write: Write, name: str, share: float
) -> None:
    path = write(pa.table({"text": ["some text"] * 100}), tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        TextWindows(path)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing.parquet", "missing.parquet: there is no such file"),
        ("empty", "empty: the folder holds no file"),
        ("data.csv", "data.csv: the name ends in none of .parquet, .arrow"),
        ("short.parquet", "short.parquet: column 'text' holds 5 bytes, one window needs 129"),
        ("other.parquet", "other.parquet: there is no one column 'text'; columns: body, id"),
        ("number.parquet", "number.parquet: row group 0: column 'text'.*not int64"),
        ("mixed", "2.arrow: column 'text' is binary, but string in .*1.parquet"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, path: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "data.csv").write_text("a,b")
    write_parquet(pa.table({"text": ["short"]}), tmp_path / "short.parquet")
    write_parquet(pa.table({"body": ["x"], "id": [1]}), tmp_path / "other.parquet")
    write_parquet(pa.table({"text": [1]}), tmp_path / "number.parquet")
    write_parquet(pa.table({"text": ["x"]}), tmp_path / "mixed" / "1.parquet")
    write_arrow(pa.table({"text": [b"x"]}), tmp_path / "mixed" / "2.arrow")
    with pytest.raises(DataError, match=problem):
        TextWindows(tmp_path / path)
