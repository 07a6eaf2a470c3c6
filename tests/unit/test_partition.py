"""Partitions: every row in one place, in order, by whatever features; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from elastic.core.data.rows import Rows
from elastic.core.errors import ConfigError, DataError
from elastic.core.yaml_file import Document, validate
from elastic.experts.config import ExpertsConfig
from elastic.experts.partition import partition, read_partition, subset_folders, validation_folder

NUM_ROWS = 1200


def write_rows(path: Path) -> None:
    """Three clouds of 600, 400 and 200 points, texts that go with them, and what cloud it is."""
    random = np.random.default_rng(5)
    cloud_N = random.permutation(np.repeat([0, 1, 2], [600, 400, 200]))
    points = np.eye(4)[cloud_N] * 8 + random.normal(size=(NUM_ROWS, 4))
    topics = ["import numpy array matrix", "socket listen packet", "widget button window"]
    table = pa.table(
        {
            "number": np.arange(NUM_ROWS),
            "x": pa.FixedSizeListArray.from_arrays(pa.array(points.ravel()), 4),
            "text": [f"{topics[k]} {topics[k]} word{n % 5}" for n, k in enumerate(cloud_N)],
            "cloud": cloud_N,
        }
    )
    pq.write_table(table, path, row_group_size=100)


def clouds(table: pa.Table) -> Any:
    """A user's model of features."""
    return np.eye(3)[table.column("cloud").to_numpy()]


def narrow(table: pa.Table) -> Any:
    return np.zeros(len(table))


@pytest.fixture
def make(tmp_path: Path) -> Any:
    write_rows(tmp_path / "rows.parquet")

    def config(column: str = "x", **settings: Any) -> ExpertsConfig:
        training = {"steps": 1, "micro_batch_size": 1}
        document = {
            "name": "clouds",
            "kind": "classifier",
            "folder": str(tmp_path / "out"),
            "data": {
                "path": str(tmp_path / "rows.parquet"),
                "column": column,
                "shape": [4],
                "label": "cloud",
                "num_classes": 3,
            },
            "partition": {"num_experts": 3, "held_out": 0.2, **settings},
            "expert": training,
            "router": training,
        }
        return validate(ExpertsConfig, Document(document, "test"))

    return config


def read(folder: str | Path, *columns: str) -> pa.Table:
    return pq.read_table(folder, columns=list(columns) or None)


def test_every_row_is_in_one_subset_or_held_out_in_its_order(make: Any) -> None:
    config = make()
    manifest = partition(config)
    parts = [read(one) for one in (*subset_folders(config), validation_folder(config))]
    numbers = [part.column("number").to_numpy() for part in parts]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(NUM_ROWS))
    assert all((np.diff(one) > 0).all() for one in numbers)
    assert list(manifest["rows"].values()) == [len(one) for one in numbers]
    assert 0.15 * NUM_ROWS < len(numbers[-1]) < 0.25 * NUM_ROWS
    source = read(config.data.path)
    assert parts[0].select(source.column_names).equals(source.take(numbers[0]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_fine": 30},
        {"sample_rows": 90},
        {"column": "text", "features": {"kind": "words"}},
        {"features": {"kind": "column", "column": "cloud"}},
        {"features": {"kind": "column", "column": "x"}, "column": "text"},
        {"features": {"kind": "model", "function": f"{__name__}:clouds"}},
    ],
    ids=["pixels", "two steps", "sample", "words", "labels", "column", "model"],
)
def test_features_decide_the_subsets(make: Any, settings: dict[str, Any]) -> None:
    config = make(**settings)
    partition(config)
    of_subset = [set(read(one, "cloud")["cloud"].to_pylist()) for one in subset_folders(config)]
    assert sorted(len(one) for one in of_subset) == [1, 1, 1]
    assert set.union(*of_subset) == {0, 1, 2}
    held = read(validation_folder(config), "cloud", "subset")
    for cloud, subset in zip(held["cloud"].to_pylist(), held["subset"].to_pylist(), strict=True):
        assert cloud in of_subset[subset]


def test_a_balanced_partition_is_even(make: Any) -> None:
    rows = partition(make(balanced=True))["rows"]
    sizes = [rows[f"expert-{k}"] for k in range(3)]
    assert max(sizes) <= 1.1 * min(sizes)


def test_a_partition_is_what_tasks_read(make: Any) -> None:
    config = make()
    manifest = partition(config)
    rows = Rows(subset_folders(config), ["x"])
    assert len(rows) == sum(manifest["rows"].values()) - manifest["rows"]["validation"]
    assert rows.fetch(np.array([5, 0]))["x"].shape == (2, 4)


def test_it_is_made_once_and_under_other_settings_refused(make: Any) -> None:
    config = make()
    made = partition(config)
    centres = config.root / "partition" / "centres.safetensors"
    before = centres.stat().st_mtime_ns
    assert partition(config) == made == read_partition(config)
    assert centres.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="remove that folder"):
        partition(make(balanced=True))


def test_one_that_was_cut_short_is_made_anew(make: Any) -> None:
    config = make()
    draft = config.root / "partition.partial" / "expert-0"
    draft.mkdir(parents=True)
    (draft / "part-0.parquet").write_text("torn")
    partition(config)
    assert not draft.exists()
    assert safetensors.numpy.load_file(config.root / "partition" / "centres.safetensors")[
        "centres"
    ].shape == (3, 4)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"num_experts": 200, "sample_rows": 90}, DataError, "90 rows for partition.num_experts"),
        ({"num_experts": 2, "features": {"kind": "column", "column": "cloud"}}, DataError, "holds"),
        (
            {"num_experts": 4, "features": {"kind": "column", "column": "cloud"}},
            DataError,
            "no row",
        ),
        ({"column": "text"}, DataError, "holds text or bytes"),
        ({"features": {"kind": "words"}}, DataError, "holds no text"),
        ({"features": {"kind": "model", "function": "nowhere:f"}}, ConfigError, "cannot import"),
        (
            {"features": {"kind": "model", "function": f"{__name__}:narrow"}},
            DataError,
            "returned shape",
        ),
        ({"features": {"kind": "column"}}, ConfigError, "column is None"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    make: Any, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        partition(make(**settings))


def test_memory_does_not_grow_with_the_data(make: Any) -> None:
    config = make(features={"kind": "column", "column": "cloud"})
    peaks = []
    for num in (600, 1200):
        rows = [bytes([n % 251]) * 100_000 for n in range(num)]
        table = pa.table({"cloud": np.arange(num) % 3, "x": pa.array(rows, pa.binary())})
        pq.write_table(table, config.data.path, row_group_size=20)
        del table
        with arrow_memory() as pool:
            partition(config.model_copy(update={"folder": f"{config.folder}-{num}"}))
        peaks.append(pool.max_memory())
    assert peaks[1] < 1.2 * peaks[0]


@contextmanager
def arrow_memory() -> Iterator[pa.MemoryPool]:
    """What Arrow takes meanwhile."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(before)


def test_the_manifest_can_be_read_by_people(make: Any) -> None:
    config = make()
    partition(config)
    text = (config.root / "partition" / "partition.json").read_text()
    assert json.loads(text)["partition"]["num_experts"] == 3
