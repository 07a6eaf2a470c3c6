"""Parquet and Arrow files, here or on any `pyarrow.fs` file system, read one row group at a time.

Opening reads what lies around the rows only: footers, or the headers of a stream. Never keeps what
it has read, and any number of threads may read at once.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from elastic.core.errors import DataError

Source = str | Path | Sequence[str | Path]
"""A file, a folder or a URI, or several of them, which are read one after the other."""

SUFFIXES = (".parquet", ".arrow")
ADDRESSES = "a local path, file://, s3://, gs://, or what else pyarrow.fs reads"

_HIDDEN = (".", "_")  # begin the names of files that writers leave beside the data
_FILE_MAGIC = b"ARROW1"  # begins an Arrow file; a stream begins otherwise
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file lies. `name` is for messages, without the secrets that a URI may hold."""

    filesystem: fs.FileSystem
    path: str
    name: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def below(self, name: str) -> Place:
        """A file of this folder."""
        path, shown = f"{self.path.rstrip('/')}/{name}", f"{self.name.rstrip('/')}/{name}"
        return Place(self.filesystem, path, shown)


class File(Protocol):
    """One open file. `rows_G` is the number of rows of each row group."""

    name: str
    schema: pa.Schema
    rows_G: list[int]
    is_local: bool

    def read(self, group: int, columns: Sequence[str]) -> pa.Table: ...


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Turn an error of the reader into a `DataError` that begins with `place`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read: {error}") from error


# --- finding ---------------------------------------------------------------------------------


def find_files(source: Source) -> list[Place]:
    """The files that `source` names; those of a folder in the order of their names.

    Raises:
        DataError: something is not there, is no data file, or is named twice.
    """
    given = [source] if isinstance(source, str | Path) else source
    if not isinstance(given, Sequence) or not all(isinstance(one, str | Path) for one in given):
        raise DataError(f"path is {source!r}, must be {ADDRESSES}, or a list of those")
    if not given:
        raise DataError(f"path is an empty list, must name at least one of: {ADDRESSES}")
    found = [place for one in given for place in _expand(_locate(one))]
    seen = set()
    for place in found:
        if place.path in seen:
            raise DataError(
                f"{place.name}: path names this file twice, and each sample comes once an epoch"
            )
        seen.add(place.path)
    return found


def _locate(one: str | Path) -> Place:
    if isinstance(one, Path) or "://" not in one:
        path = str(Path(one).expanduser())
        return Place(fs.LocalFileSystem(), path, path)
    name = re.sub(r"//[^/@]*@", "//", one.partition("?")[0])
    try:
        filesystem, path = fs.FileSystem.from_uri(one)
    except (pa.ArrowException, OSError, ImportError, ValueError) as error:
        raise DataError(f"{name}: cannot be opened: {error}; allowed: {ADDRESSES}") from error
    return Place(filesystem, path, name)


def _expand(place: Place) -> list[Place]:
    """The files of a folder, or the one file."""
    with naming(place.name):
        kind = place.filesystem.get_file_info(place.path).type
    if kind is fs.FileType.Directory:
        return _folder_files(place)
    if kind is not fs.FileType.File:
        where = f" (working folder {Path.cwd()})" if place.is_local else ""
        hint = "; a pattern is not expanded: name the folder" if "*" in place.path else ""
        raise DataError(f"{place.name}: there is no such file or folder{where}{hint}")
    if not place.path.endswith(SUFFIXES):
        raise DataError(f"{place.name}: the name ends in none of {', '.join(SUFFIXES)}")
    return [place]


def _folder_files(folder: Place) -> list[Place]:
    with naming(folder.name):
        infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path))
    names = sorted(info.base_name for info in infos if info.type is fs.FileType.File)
    if "dataset_dict.json" in names:
        splits = _read_json(folder.below("dataset_dict.json")).get("splits") or ["train"]
        raise DataError(
            f"{folder.name}: holds the splits {', '.join(splits)}; name one,"
            f" as in {folder.name}/{splits[0]}"
        )
    if "state.json" in names and (listed := _listed_files(folder)):
        return listed
    found = [one for one in names if one.endswith(SUFFIXES) and not one.startswith(_HIDDEN)]
    if not found:
        raise DataError(
            f"{folder.name}: the folder holds no file named *{' or *'.join(SUFFIXES)};"
            " folders in it are not searched"
        )
    return [folder.below(name) for name in found]


def _listed_files(folder: Place) -> list[Place]:
    """The files that Hugging Face's `save_to_disk` listed; none if another wrote the list."""
    state = _read_json(folder.below("state.json"))
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder.name}: rows are chosen by a list of indices, which is not read;"
            " call flatten_indices() before save_to_disk()"
        )
    return [folder.below(one["filename"]) for one in state.get("_data_files") or []]


def _read_json(place: Place) -> dict[str, Any]:
    with naming(place.name), place.filesystem.open_input_stream(place.path) as stream:
        found = json.loads(stream.read())
    return found if isinstance(found, dict) else {}


# --- reading ---------------------------------------------------------------------------------


def open_file(place: Place) -> File:
    """Open a file; a local one is mapped into memory. Raises `DataError` with its name."""
    with naming(place.name):
        if place.is_local:
            source = pa.memory_map(place.path)
        else:
            source = place.filesystem.open_input_file(place.path)
        if place.path.endswith(".parquet"):
            return _ParquetFile(place, source)
        if source.read_at(len(_FILE_MAGIC), 0) == _FILE_MAGIC:
            return _ArrowFile(place, source)
        if place.is_local:
            return _ArrowStream(place, source)
    raise DataError(
        f"{place.name}: is an Arrow stream, which does not say where its row groups begin: read it"
        " from a local disk, or write Parquet"
    )


class _ParquetFile:
    def __init__(self, place: Place, source: pa.NativeFile) -> None:
        self.name, self.is_local = place.name, place.is_local
        self._source = source
        self._metadata = pq.read_metadata(source)
        self.schema = self._metadata.schema.to_arrow_schema()
        groups = range(self._metadata.num_row_groups)
        self.rows_G = [self._metadata.row_group(group).num_rows for group in groups]

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        reader = pq.ParquetFile(  # one a call: a reader is not for several threads
            self._source,
            metadata=self._metadata,
            pre_buffer=not self.is_local,
            page_checksum_verification=True,  # where the writer left them: write_page_checksum=True
        )
        return reader.read_row_group(group, columns=list(columns), use_threads=False)


class _ArrowFile:
    def __init__(self, place: Place, source: pa.NativeFile) -> None:
        self.name, self.is_local = place.name, place.is_local
        self._source = source
        self.schema = pa.ipc.open_file(source).schema
        narrow = [field.name for field in self.schema if pa.types.is_primitive(field.type)]
        counter = self._reader(narrow[:1] or self.schema.names[:1])
        groups = range(counter.num_record_batches)
        self.rows_G = [counter.get_batch(group).num_rows for group in groups]

    def _reader(self, columns: Sequence[str]) -> pa.RecordBatchFileReader:
        """One a call: a reader is not for several threads."""
        fields = [self.schema.get_field_index(name) for name in columns]
        wanted = [] if self.is_local else fields  # what is chosen is copied; [] maps everything
        options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
        return pa.ipc.open_file(self._source, options=options)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        batch = self._reader(columns).get_batch(group)
        return pa.Table.from_batches([batch]).select(list(columns))


class _ArrowStream:
    """A mapped stream: its row groups are views of the map, found by walking along it once."""

    def __init__(self, place: Place, source: pa.NativeFile) -> None:
        self.name, self.is_local = place.name, place.is_local
        size_bytes = source.size()
        end = source.read_at(len(_STREAM_END), max(0, size_bytes - len(_STREAM_END)))
        if end != _STREAM_END:
            raise ValueError("it is no Arrow file, or a stream that was cut off")
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        self.schema = reader.schema
        self._batches = list(reader)
        self.rows_G = [batch.num_rows for batch in self._batches]

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        return pa.Table.from_batches([self._batches[group]]).select(list(columns))


def check_columns(files: Sequence[File], columns: Sequence[str]) -> None:
    """Refuse a file that lacks a column or gives it another type than the first file."""
    first = files[0]
    for file in files:
        for name in columns:
            if file.schema.names.count(name) != 1:
                listed = ", ".join(file.schema.names) or "none"
                raise DataError(f"{file.name}: there is no one column {name!r}; columns: {listed}")
            here, there = file.schema.field(name).type, first.schema.field(name).type
            if here != there:
                raise DataError(
                    f"{file.name}: column {name!r} is {here}, but {there} in {first.name}"
                )
