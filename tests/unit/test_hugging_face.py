"""Folders that the `datasets` package's `save_to_disk` wrote, read without that package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elastic.core.data.rows import Rows
from elastic.core.data.text import TextWindows
from elastic.core.errors import DataError

WRITE = """
import sys
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
rows = {
    "text": [f"document {i}" for i in range(2500)],
    "label": [i % 2 for i in range(2500)],
    "tokens": [list(range(i % 5)) for i in range(2500)],
    "point": [[i, i + 1] for i in range(2500)],
    "image": [{"bytes": bytes([i % 256]), "path": None} for i in range(2500)],
}
features = Features({
    "text": Value("string"), "label": ClassLabel(names=["no", "yes"]),
    "tokens": List(Value("int32")), "point": List(Value("float32"), length=2),
    "image": Image(decode=False),
})
data = Dataset.from_dict(rows, features=features)
data.save_to_disk(sys.argv[1] + "/plain", num_shards=3)
data.shuffle(seed=0).select(range(100)).save_to_disk(sys.argv[1] + "/shuffled")
DatasetDict({"train": data, "test": data}).save_to_disk(sys.argv[1] + "/dict")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In another process: the package warns and leaves files open."""
    folder = tmp_path_factory.mktemp("saved")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-W", "ignore", "-c", WRITE, str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", ["plain", "dict/test"])
def test_rows_are_those_that_were_saved(saved: Path, name: str) -> None:
    data = Rows(saved / name)
    data.check()
    assert len(data) == 2500
    rows = data.fetch(np.array([2499, 0, 1003]))
    assert rows["text"] == ["document 2499", "document 0", "document 1003"]
    assert rows["label"].tolist() == [1, 0, 1]
    assert [one.tolist() for one in rows["tokens"]] == [[0, 1, 2, 3], [], [0, 1, 2]]
    assert rows["point"].tolist() == [[2499, 2500], [0, 1], [1003, 1004]]
    assert rows["image"] == [bytes([2499 % 256]), b"\0", bytes([1003 % 256])]


def test_chosen_rows_come_in_the_order_that_was_chosen(saved: Path) -> None:
    data = Rows(saved / "shuffled", ["text"])
    assert len(data) == 100
    numbers = [int(text.split()[1]) for text in data.fetch(np.arange(100))["text"]]
    assert len(set(numbers)) == 100
    assert max(numbers) > 100


def test_text_windows_of_a_saved_column(saved: Path) -> None:
    windows = TextWindows(saved / "plain", context=11).fetch(np.array([0]))
    assert bytes(windows[0].tolist()) == b"document 0do"


def test_several_splits_are_refused(saved: Path) -> None:
    with pytest.raises(DataError, match=r"holds the splits train, test; name one, as in .*train"):
        Rows(saved / "dict")
