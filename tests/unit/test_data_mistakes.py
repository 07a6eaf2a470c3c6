"""Wrong data: each mistake is refused with what was given, what is allowed, and the setting.

All of it is found when the data set is opened, or by the check before training starts.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from elastic.core.data.map_style import MapDataset, as_dataset
from elastic.core.data.memory import ArrayRows
from elastic.core.data.order import SampleStream
from elastic.core.data.rows import Rows
from elastic.core.data.text import TextWindows
from elastic.core.errors import DataError


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def checked(column: pa.Array) -> Callable[[Path], None]:
    """Rows of this column, opened and checked."""
    return lambda folder: Rows(write(folder / "x.parquet", x=column)).check()


def file(name: str, content: bytes = b"") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def two_types(folder: Path) -> Rows:
    write(folder / "d" / "1.parquet", x=[1])
    write(folder / "d" / "2.parquet", x=["a"])
    return Rows(folder / "d")


def two_columns(folder: Path) -> Rows:
    write(folder / "d" / "1.parquet", x=[1], y=[2])
    write(folder / "d" / "2.parquet", x=[1])
    return Rows(folder / "d")


def named_twice(folder: Path) -> Rows:
    path = write(folder / "d" / "1.parquet", x=[1])
    return Rows([folder / "d", path])


def cut_off(folder: Path) -> Rows:
    path = write(folder / "x.parquet", x=list(range(100)))
    path.write_bytes(path.read_bytes()[:-50])
    return Rows(path)


def cut_off_stream(folder: Path) -> Rows:
    table = pa.table({"x": list(range(100))})
    with pa.ipc.new_stream(folder / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    content = (folder / "x.arrow").read_bytes()
    (folder / "x.arrow").write_bytes(content[:-8])  # only the mark of the end is missing
    return Rows(folder / "x.arrow")


def splits(folder: Path) -> Rows:
    file("d/dataset_dict.json", b'{"splits": ["train", "test"]}')(folder)
    return Rows(folder / "d")


def chosen_rows(folder: Path) -> Rows:
    state = (
        b'{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i"}]}'
    )
    file("d/state.json", state)(folder)
    return Rows(folder / "d")


class Forever(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class Unsized(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Blocks:
    """As `ray.data` names its data sets."""

    __module__ = "ray.data.dataset"

    def __len__(self) -> int:
        return 1


def stream(held_out: int) -> Callable[[Path], SampleStream]:
    return lambda _: SampleStream(num_samples=10, held_out=held_out, seed=0, split_seed=0)


POINTS = TensorDataset(torch.zeros(3))
STRUCT = pa.array([{"path": "a.png"}])
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda at: Rows(at / "no.parquet"), "no.parquet: there is no such file or folder"),
    "pattern": (lambda at: Rows(at / "*.parquet"), "a pattern is not expanded: name the folder"),
    "empty folder": (
        lambda at: Rows(at),
        r"the folder holds no file named \*.parquet or \*.arrow; folders in it are not searched",
    ),
    "other file": (
        lambda at: Rows(file("a.csv")(at)),
        "a.csv: the name ends in none of .parquet, .arrow",
    ),
    "no path": (lambda _: Rows([]), "path is an empty list, must name at least one of: a local"),
    "path of no type": (lambda _: Rows(7), "path is 7, must be a local path, file://, s3://, gs:"),  # type: ignore[arg-type]
    "unknown address": (
        lambda _: Rows("ftp://secret@host/a.parquet"),
        r"^ftp://host/a.parquet: cannot be opened: .*allowed: a local path, file://, s3://, gs://",
    ),
    "file named twice": (named_twice, "1.parquet: path names this file twice, and each sample"),
    "no Parquet": (lambda at: Rows(file("a.parquet", b"x" * 99)(at)), "a.parquet: cannot be read"),
    "no Arrow": (
        lambda at: Rows(file("a.arrow", b"x" * 99)(at)),
        "a.arrow: cannot be read: it is no Arrow file, or a stream that was cut off",
    ),
    "cut off": (cut_off, "x.parquet: cannot be read"),
    "stream cut off": (cut_off_stream, "x.arrow: cannot be read: .*a stream that was cut off"),
    "splits": (splits, "holds the splits train, test; name one, as in .*/d/train"),
    "chosen rows": (chosen_rows, r"call flatten_indices\(\) before save_to_disk\(\)"),
    "damaged list": (
        lambda at: Rows(file("d/state.json", b"{")(at).parent),
        "state.json: cannot be read",
    ),
    "column missing": (
        lambda at: Rows(write(at / "x.parquet", a=[1], b=[2]), columns=["x"]),
        "there is no one column 'x'; columns: a, b",
    ),
    "columns no list": (
        lambda at: Rows(write(at / "x.parquet", x=[1]), columns="x"),
        r"columns is 'x', must be a list: \['x'\]",
    ),
    "no columns": (
        lambda at: Rows(write(at / "x.parquet", x=[1]), columns=[]),
        "no columns to read; `columns` must name at least one",
    ),
    "columns of two types": (two_types, "2.parquet: column 'x' is string, but int64 in .*1.parq"),
    "columns of one file": (two_columns, "2.parquet: there is no one column 'y'; columns: x"),
    "no rows": (lambda at: Rows(write(at / "x.parquet", x=pa.array([], pa.int8()))), "no rows"),
    "null": (checked(pa.array([1, 2, 3, None])), "row group 1: column 'x'.* 1 of 2 rows are null"),
    "null text": (checked(pa.array(["a", None])), "1 of 2 rows are null; fill or drop them"),
    "null in a list": (
        checked(pa.array([[1], [2, None]])),
        "row group 0: column 'x'.* 1 of 3 list elements are null; fill or drop them",
    ),
    "null in a list of a fixed size": (
        checked(pa.array([[1]] * 3 + [[None]], pa.list_(pa.int8(), 1))),
        "row group 1: column 'x'.* 1 of 2 list elements are null",
    ),
    "image without bytes": (
        checked(pa.array([{"bytes": None, "path": "a.png"}], IMAGE)),
        r"1 of 1 'bytes' \(only a path was saved\?\) are null",
    ),
    "dates": (
        checked(pa.array([0], pa.timestamp("s"))),
        r"x.parquet: column 'x' is timestamp.*, allowed: numbers, booleans, strings, .*; cast it",
    ),
    "decimals": (checked(pa.array([1]).cast(pa.decimal128(30, 2))), "column 'x' is decimal128"),
    "lists of lists": (checked(pa.array([[[1]]])), "column 'x' is list<.*list<.*, allowed: num"),
    "lists of texts": (checked(pa.array([["a"]])), "column 'x' is list<.*string>, allowed: num"),
    "struct": (checked(STRUCT), "column 'x' is struct.*structs with a binary field 'bytes'"),
    "text is numbers": (
        lambda at: TextWindows(write(at / "x.parquet", text=[1])),
        "column 'text' is int64, allowed: string, binary; other types are for Rows",
    ),
    "text column missing": (
        lambda at: TextWindows(write(at / "x.parquet", body=["x"])),
        "there is no one column 'text'; columns: body",
    ),
    "short text": (
        lambda at: TextWindows(write(at / "x.parquet", text=["short"])),
        r"column 'text' holds 5 bytes, one window needs 129; shorten context \(128\)",
    ),
    "context": (
        lambda at: TextWindows(write(at / "x.parquet", text=["short"]), context=0),
        "context is 0, must be at least 1",
    ),
    "tensors of two lengths": (
        lambda _: ArrayRows(x=torch.zeros(2), y=torch.zeros(3)),
        "tensors must be equally long and not empty, got {'x': 2, 'y': 3}",
    ),
    "no samples": (lambda _: MapDataset([]), "builtins.list holds no samples, must hold at least"),
    "iterable": (
        lambda _: as_dataset(Forever()),
        r"Forever cannot be read by number.*__len__ and __getitem__.*use elastic.Rows",
    ),
    "generator": (lambda _: as_dataset(iter([1])), "list_iterator cannot be read by number"),
    "loader": (
        lambda _: as_dataset(DataLoader(POINTS)),
        r"return MapDataset\(loader.dataset, loader.collate_fn\); batch and seed of the job file",
    ),
    "unsized": (lambda _: as_dataset(Unsized()), "Unsized has no __len__, and an epoch must hold"),
    "mapping": (
        lambda _: as_dataset({"x": torch.zeros(3)}),
        r"builtins.dict is no data set: .* for elastic.ArrayRows\(name=tensor, ...\)",
    ),
    "nothing returned": (lambda _: as_dataset(None), "NoneType cannot be read by number.*allowed"),
    "ray.data": (
        lambda _: as_dataset(Blocks()),
        r"^ray.data.dataset.Blocks .* `ds.write_parquet\(path\)` and return elastic.Rows\(path\)",
    ),
    "collate_fn": (
        lambda _: MapDataset(POINTS, 3),  # type: ignore[arg-type]
        "collate_fn is 3, must be a function of a list of samples",
    ),
    "all held out": (stream(10), "held_out is 10, must be .* less than the 10 samples"),
    "held_out below 0": (stream(-1), "held_out is -1, must be at least 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, tmp_path: Path) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(DataError, match=message):
        make(tmp_path)


def test_what_was_refused_works_when_it_is_right(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", x=[1, 2])
    assert len(Rows(path, columns=["x"])) == 2
    assert len(as_dataset(POINTS)) == 3
    assert as_dataset([3, 4]).fetch(np.array([1])).tolist() == [4]
