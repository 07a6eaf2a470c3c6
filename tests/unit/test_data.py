"""The data sets over Parquet, Arrow files and memory. What they refuse: test_data_mistakes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from elastic.core.data.memory import ArrayRows
from elastic.core.data.rows import Rows, pad
from elastic.core.data.text import TextWindows
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


LISTS = [[1, 2, 3], [], [4], [5, 6]]
IMAGES = [{"bytes": bytes([i] * i), "path": None} for i in range(4)]


@WRITERS
def test_rows_of_lists_texts_and_bytes(tmp_path: Path, write: Write, name: str) -> None:
    columns = {
        "lists": pa.array(LISTS, pa.list_(pa.int16())),
        "large": pa.array(LISTS, pa.large_list(pa.float32())),
        "text": pa.array(["a", "", "äö", "d"]),
        "kinds": pa.array(["x", "y", "x", "x"]).dictionary_encode(),
        "png": pa.array([b"\x89PNG", b"", b"1", b"2"], pa.large_binary()),
        "image": pa.array(IMAGES, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "hash": pa.array([b"ab", b"cd", b"ef", b"gh"], pa.binary(2)),
        "grid": pa.array([[[i, 1], [2, 3], [4, 5]] for i in range(4)]).cast(
            pa.list_(pa.list_(pa.int32(), 2), 3)
        ),
    }
    data = Rows(write(pa.table(columns), tmp_path / name))
    data.check()
    rows = data.fetch(np.array([2, 0, 1, 2]))
    assert [one.tolist() for one in rows["lists"]] == [[4], [1, 2, 3], [], [4]]
    assert {one.dtype for one in rows["lists"]} == {torch.int16}
    assert [one.tolist() for one in rows["large"]] == [[4.0], [1.0, 2.0, 3.0], [], [4.0]]
    assert rows["text"] == ["äö", "a", "", "äö"]
    assert rows["kinds"] == ["x", "x", "y", "x"]
    assert rows["png"] == [b"1", b"\x89PNG", b"", b"1"]
    assert rows["image"] == [bytes([2, 2]), b"", b"\1", bytes([2, 2])]
    assert rows["hash"] == [b"ef", b"ab", b"cd", b"ef"]
    assert rows["grid"].shape == (4, 3, 2)
    assert rows["grid"][:, 0, 0].tolist() == [2, 0, 1, 2]
    rows["lists"][0][0] = 9  # what a task does with its micro-batch is its own affair
    assert data.fetch(np.array([2]))["lists"][0].tolist() == [4]


def test_several_files_and_folders_come_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_parquet(pa.table({"y": [2, 3]}), tmp_path / "folder" / "1.parquet")
    write_arrow(pa.table({"y": [4]}), tmp_path / "folder" / "2.arrow")
    write_parquet(pa.table({"y": [9]}), tmp_path / "folder" / "_draft.parquet")
    last = write_parquet(pa.table({"y": [5]}), tmp_path / "0.parquet")
    first = write_arrow(pa.table({"y": [0, 1]}), tmp_path / "9.arrow")
    data = Rows([f"file://{first}", tmp_path / "folder", str(last)])
    assert data.fetch(np.arange(len(data)))["y"].tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_open_without_reading_and_check_reads_all(tmp_path: Path) -> None:
    path = write_parquet(pa.table({"x": [0.5] * 3}), tmp_path / "a.parquet", 1)
    damage(path, pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset - 4)
    data = Rows(path)
    assert data.fetch(np.array([0, 1]))["x"].tolist() == [0.5, 0.5]
    for read in (data.check, lambda: data.fetch(np.array([2]))):
        with pytest.raises(DataError, match=r"a\.parquet: row group 2: cannot be read"):
            read()


def test_padding_makes_one_tensor_and_weights() -> None:
    values, weights = pad([torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([]).long()], -1)
    assert values.tolist() == [[1, 2, 3], [4, -1, -1], [-1, -1, -1]]
    assert values.dtype == torch.int64
    assert weights.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert weights.sum(1).tolist() == [3, 1, 0]


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


def test_damaged_text_of_an_arrow_file_is_named_when_checked(tmp_path: Path) -> None:
    path = write_arrow(pa.table({"text": ["ä" * 1000, "ö" * 1000]}), tmp_path / "a.arrow", 1)
    damage(path, path.read_bytes().rindex("ö".encode()))
    with pytest.raises(DataError, match=r"a\.arrow: row group 1: .*UTF8"):
        TextWindows(path).check()


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
