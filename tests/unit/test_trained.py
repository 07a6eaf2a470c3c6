"""`elastic.load_model`: what was trained, from wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from torch import nn

import elastic
from elastic.core.checkpoint import write_checkpoint
from elastic.core.errors import CheckpointError, ConfigError
from elastic.core.runs import RunFolder
from elastic.core.storage import LocalStorage
from examples.digits.task import Digits

JOB = {"task": "examples.digits.task:Digits", "task_args": {"width": 4}}


def write(folder: Path, model: nn.Module, *, step: int = 7, **job: Any) -> Path:
    """A run folder with one checkpoint."""
    path = write_checkpoint(
        LocalStorage(folder / "checkpoints"),
        step=step,
        weights=model.state_dict(),
        state={},
        meta={"job": {**JOB, **job}},
    )
    return Path(path)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return Digits(width=4).model()


def check(loaded: nn.Module, model: nn.Module) -> None:
    assert not loaded.training
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(images), model.eval()(images))


def test_a_model_comes_back_through_its_task(tmp_path: Path, model: nn.Module) -> None:
    path = write(tmp_path, model)
    sources = (tmp_path, str(tmp_path), path, path.parent, f"file://{path}")
    for source in (*sources, ray.train.Checkpoint(str(path))):
        check(elastic.load_model(source), model)


def test_a_model_comes_back_through_what_is_given(tmp_path: Path, model: nn.Module) -> None:
    path = write(tmp_path, model, task="")
    check(elastic.load_model(path, Digits(width=4)), model)
    mine = Digits(width=4).model()
    assert elastic.load_model(path, task=mine) is mine
    check(mine, model)
    with pytest.raises(ConfigError, match=r"load_model\(path, task=\.\.\.\)"):
        elastic.load_model(path)


def test_the_generators_are_left_as_they_were(tmp_path: Path, model: nn.Module) -> None:
    path = write(tmp_path, model)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    elastic.load_model(path)
    assert torch.equal(torch.rand(1), expected)


def test_a_model_that_does_not_fit_is_refused_with_every_name(
    tmp_path: Path, model: nn.Module
) -> None:
    path = write(tmp_path, model)
    with pytest.raises(ConfigError) as caught:
        elastic.load_model(path, Digits(width=8))
    assert str(caught.value).startswith(f"{path} does not fit the model of this task:")
    assert "0.weight: shape (4, 1, 3, 3), the model has (8, 1, 3, 3)" in str(caught.value)
    assert "8.weight" in str(caught.value)


def test_a_task_that_cannot_be_imported_and_a_folder_of_nothing(
    tmp_path: Path, model: nn.Module
) -> None:
    with pytest.raises(ConfigError, match=r"cannot import 'nowhere\.task:Mine'"):
        elastic.load_model(write(tmp_path, model, task="nowhere.task:Mine"))
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        elastic.load_model(tmp_path / "nothing")


def test_a_run_folder_says_where_its_checkpoints_lie(tmp_path: Path, model: nn.Module) -> None:
    write(tmp_path / "elsewhere", model)
    run = RunFolder(tmp_path / "run")
    run.create()
    storage = str(tmp_path / "elsewhere" / "checkpoints")
    run.write_json(run.job_json, {"checkpoint": {"storage": storage}})
    check(elastic.load_model(run.path), model)


def test_the_average_comes_back_where_there_is_one(tmp_path: Path, model: nn.Module) -> None:
    plain = write(tmp_path / "plain", model)
    with pytest.raises(ConfigError, match=r"averaged no weights; set ema\.decay"):
        elastic.load_model(plain, averaged=True)
    torch.manual_seed(4)
    average = Digits(width=4).model()
    path = write_checkpoint(
        LocalStorage(tmp_path / "checkpoints"),
        step=7,
        weights=model.state_dict(),
        averaged=average.state_dict(),
        state={},
        meta={"job": JOB},
    )
    check(elastic.load_model(path), model)
    check(elastic.load_model(path, averaged=True), average)
    (Path(path) / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        elastic.load_model(path)


def test_a_compiled_model_takes_the_names_of_the_plain_one(
    tmp_path: Path, model: nn.Module
) -> None:
    path = write(tmp_path, model, task="")
    compiled: Any = torch.compile(Digits(width=4).model(), backend="aot_eager")
    check(elastic.load_model(path, task=compiled), model)
