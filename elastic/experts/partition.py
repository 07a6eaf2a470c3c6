"""Cuts a data set into one of Parquet for each expert, and one that nobody trains on.

    FOLDER/partition/partition.json      what was done, and how many rows each subset has
    FOLDER/partition/centres.safetensors in the space of the features
    FOLDER/partition/expert-0/...        rows as they were, in their order
    FOLDER/partition/validation/...      likewise; a column says which subset each would be in

The data is read twice, one batch at a time: once for a random sample that decides the centres, once
to write. Memory grows with the sample and the number of subsets, never with the data. Written whole
or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

from elastic.core.data.files import File, find_files, open_file
from elastic.core.errors import ConfigError, DataError
from elastic.core.experts.kmeans import even_prices, squares, two_step
from elastic.experts.config import ExpertsConfig, Partition
from elastic.experts.features import Extractor

MANIFEST_FILE = "partition.json"
CENTRES_FILE = "centres.safetensors"
VALIDATION = "validation"
SUBSET_COLUMN = "subset"
GROUP_ROWS = 64  # a shuffled row costs its row group
_FLUSH_ROWS = 4096
_FLUSH_BYTES = 16 << 20

Integers = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Centres:
    """Which subset a row belongs to: that of the nearest centre, its price added."""

    centres_KF: Floats
    prices_K: Floats

    def assign(self, points_NF: Floats) -> Integers:
        """Numbers of subsets, shape (N,)."""
        nearest: Integers = (squares(points_NF, self.centres_KF) + self.prices_K).argmin(1)
        return nearest


def partition(config: ExpertsConfig) -> dict[str, Any]:
    """Write the subsets; returns the manifest. Does nothing where they are written already.

    Raises:
        ConfigError: they were written under other settings.
        DataError: the data cannot be read, or a subset got no row.
    """
    target = config.root / "partition"
    wanted = {"data": config.data.model_dump(), "partition": config.partition.model_dump()}
    if (target / MANIFEST_FILE).exists():
        found = read_partition(config)
        if {name: found[name] for name in wanted} != wanted:
            raise ConfigError(
                f"{target}: was made with {found['data']} and {found['partition']}, now {wanted};"
                " remove that folder, or name another in `folder`"
            )
        return found
    draft = target.with_name("partition.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    manifest = {**wanted, **_write(config, draft)}
    (draft / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    draft.rename(target)
    return manifest


def read_partition(config: ExpertsConfig) -> dict[str, Any]:
    """The manifest.

    Raises:
        ConfigError: there is none.
    """
    file = config.root / "partition" / MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `elastic experts partition` makes it") from None
    return manifest


def subset_folders(config: ExpertsConfig) -> list[str]:
    """The data set of each expert, in order."""
    return [str(config.root / "partition" / name) for name in config.subset_names]


def validation_folder(config: ExpertsConfig) -> Path:
    """The rows that nobody trains on."""
    return config.root / "partition" / VALIDATION


def subsets_of(config: ExpertsConfig, table: pa.Table) -> Integers:
    """The subset that each of other rows would be in, shape (N,)."""
    settings = config.partition
    extractor = Extractor(settings.features, config.data.column)
    file = config.root / "partition" / CENTRES_FILE
    if not file.exists():
        return _assign(extractor, None, table, settings.num_experts)
    arrays = safetensors.numpy.load_file(file)
    extractor.rarity = arrays.get("rarity")
    centres = Centres(arrays["centres"], arrays["prices"])
    return _assign(extractor, centres, table, settings.num_experts)


def batches(files: list[File], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """All rows, one row group at a time, in their order."""
    for file in files:
        for group in range(len(file.rows_G)):
            yield file.read(group, columns or list(file.schema.names))


def _write(config: ExpertsConfig, folder: Path) -> dict[str, Any]:
    settings = config.partition
    files = [open_file(place) for place in find_files(config.data.path)]
    num_rows = sum(sum(file.rows_G) for file in files)
    held_out_N = np.random.default_rng(settings.seed).random(num_rows) < settings.held_out
    extractor = Extractor(settings.features, config.data.column)
    centres = _find_centres(settings, extractor, files, held_out_N)
    if centres is not None:
        arrays = {"centres": centres.centres_KF, "prices": centres.prices_K}
        if extractor.rarity is not None:
            arrays["rarity"] = extractor.rarity
        safetensors.numpy.save_file(arrays, folder / CENTRES_FILE)
    names = [*config.subset_names, VALIDATION]
    writers = {name: _Writer(folder / name) for name in names}
    at = 0
    for table in batches(files):
        subset_N = _assign(extractor, centres, table, settings.num_experts)
        out_N = held_out_N[at : at + len(table)]
        at += len(table)
        for k, name in enumerate(config.subset_names):
            writers[name].add(table.filter(pa.array((subset_N == k) & ~out_N)))
        kept = table.append_column(SUBSET_COLUMN, pa.array(subset_N))
        writers[VALIDATION].add(kept.filter(pa.array(out_N)))
    rows = {name: writer.close() for name, writer in writers.items()}
    empty = [name for name, num in rows.items() if not num]
    if empty:
        raise DataError(
            f"{config.data.path}: no rows for {', '.join(empty)}; needs fewer"
            f" partition.num_experts than {settings.num_experts}, or more rows than {num_rows}"
        )
    return {"format": 1, "rows": rows}


def _find_centres(
    settings: Partition, extractor: Extractor, files: list[File], held_out_N: NDArray[np.bool_]
) -> Centres | None:
    """None where a column names the subsets."""
    sample_NF = _sample(settings, extractor, files, held_out_N)
    if settings.features.kind == "column" and sample_NF.shape[1] == 1:
        return None
    extractor.fit(sample_NF)
    points_NF = extractor.finish(sample_NF)
    if len(points_NF) < settings.num_experts:
        raise DataError(
            f"{len(points_NF)} rows for partition.num_experts {settings.num_experts}; needs as many"
        )
    centres_KF = two_step(
        points_NF, settings.num_experts, num_fine=settings.num_fine, seed=settings.seed
    )
    prices_K: Floats = np.zeros(len(centres_KF))
    if settings.balanced:
        prices_K = even_prices(squares(points_NF, centres_KF))
    return Centres(centres_KF, prices_K)


def _sample(
    settings: Partition, extractor: Extractor, files: list[File], held_out_N: NDArray[np.bool_]
) -> Floats:
    """Raw points of random rows that are trained on, in the order of the data."""
    trained = np.flatnonzero(~held_out_N)
    random = np.random.default_rng((settings.seed, 1))
    num = min(settings.sample_rows, len(trained))
    chosen = np.zeros(len(held_out_N), bool)
    chosen[random.choice(trained, num, replace=False)] = True
    parts, at = [], 0
    columns = None if extractor.columns is None else list(extractor.columns)
    for table in batches(files, columns):
        mask = chosen[at : at + len(table)]
        at += len(table)
        if mask.any():
            parts.append(extractor.raw(table.filter(pa.array(mask))))
    return np.concatenate(parts)


def _assign(
    extractor: Extractor, centres: Centres | None, table: pa.Table, num_experts: int
) -> Integers:
    raw_NF = extractor.raw(table)
    if centres is not None:
        return centres.assign(extractor.finish(raw_NF))
    subset_N = raw_NF[:, 0].astype(np.int64)
    wrong = subset_N[(subset_N < 0) | (subset_N >= num_experts) | (subset_N != raw_NF[:, 0])]
    if len(wrong):
        raise DataError(
            f"partition.features.column: holds {wrong[0]}; needs whole numbers from 0 to"
            f" partition.num_experts - 1 = {num_experts - 1}, or lists of numbers"
        )
    return subset_N


class _Writer:
    """One data set of Parquet, written as rows come."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._path = folder / "part-0.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._num_waiting = self._num_bytes = self._num_rows = 0

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._num_waiting += len(table)
        self._num_bytes += table.nbytes
        if self._num_waiting >= _FLUSH_ROWS or self._num_bytes >= _FLUSH_BYTES:
            self._flush()

    def close(self) -> int:
        """How many rows were written."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
        return self._num_rows

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else None
        self._waiting, self._num_waiting, self._num_bytes = [], 0, 0
        if table is None or not len(table):
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, write_page_checksum=True)
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._num_rows += len(table)
