"""A task travels by reference where workers can import it, and by value where they cannot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from elastic.core.errors import ConfigError
from elastic.pickled import pickle_task
from examples.digits.task import Digits

FILE = """
import abc
FACTOR = 3
class Base(abc.ABC):
    def model(self): return FACTOR
class Task(Base):
    def dataset(self): ...
    def loss(self, model, micro_batch): ...
    def optimizer(self, named_parameters): ...
"""


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    """A module loaded from a file that lies on no import path."""
    path = tmp_path / "loaded_by_hand.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("loaded_by_hand", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loaded_by_hand"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["loaded_by_hand"]


def load_elsewhere(data: bytes, folder: Path) -> str:
    """What `model()` of the task gives in another process, or the last line of its error."""
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).model())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=data,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
    )
    return (done.stdout or done.stderr).decode().splitlines()[-1]


def test_a_module_that_workers_cannot_import_travels_by_value(
    module: ModuleType, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load_elsewhere(pickle_task(module.Task()), elsewhere) == "3"
    by_reference = cloudpickle.dumps(module.Task())
    assert "No module named 'loaded_by_hand'" in load_elsewhere(by_reference, elsewhere)


def test_another_file_of_that_name_on_the_path_is_not_taken_for_it(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "loaded_by_hand.py").write_text("class Task: ...")
    monkeypatch.syspath_prepend(other)
    assert load_elsewhere(pickle_task(module.Task()), other) == "3"


def test_an_importable_one_travels_by_reference() -> None:
    assert len(pickle_task(Digits())) < 200


def test_what_cannot_travel_is_refused() -> None:
    class Holds:
        def __init__(self, held: Any) -> None:
            self.held = held

    with pytest.raises(ConfigError, match=r"task: Holds cannot be sent.*generator.*`dataset\(\)`"):
        pickle_task(Holds(iter(number for number in range(3))))  # type: ignore[arg-type]
