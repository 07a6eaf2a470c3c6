"""`init_from`: weights out of our checkpoints and of plain files; every mismatch named at once."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from elastic.core.checkpoint import MODEL_FILE, write_checkpoint
from elastic.core.errors import ConfigError
from elastic.core.storage import LocalStorage
from elastic.core.weights import Initial, find_initial, initialize, read_weights


def make_model() -> nn.Module:
    """Parameters, a buffer and a counter."""
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return make_model().state_dict()


def load(source: Path | str, skip: list[str] | None = None) -> dict[str, torch.Tensor]:
    """A fresh model's state_dict after `init_from: source`."""
    torch.manual_seed(2)
    model = make_model()
    initialize(model.state_dict(keep_vars=True), find_initial(str(source)), skip or [])
    return model.state_dict()


def check_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


Save = Callable[[Path, dict[str, torch.Tensor]], Path]


def save_safetensors(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_torch(folder: Path, content: Any, name: str = "model.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def save_checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    return Path(
        write_checkpoint(LocalStorage(folder / "run/c"), step=3, weights=state, state={}, meta={})
    )


SOURCES: dict[str, Save] = {
    "safetensors": save_safetensors,
    "pt": save_torch,
    "pth": lambda f, s: save_torch(f, s, "model.pth"),
    "bin": lambda f, s: save_torch(f, s, "pytorch_model.bin"),
    "under state_dict": lambda f, s: save_torch(f, {"state_dict": s, "epoch": 3}),
    "under model": lambda f, s: save_torch(f, {"model": s, "lr": 0.1}),
    "DDP": lambda f, s: save_torch(f, {f"module.{name}": one for name, one in s.items()}),
    "compiled DDP": lambda f, s: save_safetensors(
        f, {f"module._orig_mod.{name}": one for name, one in s.items()}
    ),
    "checkpoint": save_checkpoint,
    "folder of checkpoints": lambda f, s: save_checkpoint(f, s).parent,
    "its weights": lambda f, s: save_checkpoint(f, s) / MODEL_FILE,
}


@pytest.mark.parametrize("save", SOURCES.values(), ids=SOURCES)
def test_weights_come_from(save: Save, tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    check_equal(load(save(tmp_path, trained)), trained)


def test_what_is_skipped_stays_as_the_task_made_it(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    head = {"2.weight": torch.zeros(9, 3), "2.extra": torch.zeros(1)}
    given = {name: one for name, one in trained.items() if name != "2.bias"} | head
    loaded = load(save_safetensors(tmp_path, given), ["2.*"])
    torch.manual_seed(2)
    fresh = make_model().state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, (fresh if name.startswith("2.") else trained)[name])


def test_half_precision_is_taken_as_float32(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    given = {**trained, "0.weight": trained["0.weight"].bfloat16()}
    loaded = load(save_safetensors(tmp_path, given))
    assert loaded["0.weight"].dtype == torch.float32
    assert torch.equal(loaded["0.weight"], given["0.weight"].float())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_one_of_two_tied_names_is_enough_and_both_must_agree(tmp_path: Path) -> None:
    model, weight = Tied(), torch.randn(5, 3)
    targets = model.state_dict(keep_vars=True)
    path = save_safetensors(tmp_path, {"embed.weight": weight})
    initialize(targets, find_initial(str(path)), [])
    assert torch.equal(model.head.weight, weight)
    save_safetensors(tmp_path, {"embed.weight": weight, "head.weight": weight + 1})
    with pytest.raises(ConfigError, match=r"head\.weight: tied to embed\.weight in the model"):
        initialize(targets, find_initial(str(path)), [])


def test_a_relative_path_is_that_of_whoever_starts_the_job(
    tmp_path: Path, trained: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_safetensors(tmp_path, trained)
    monkeypatch.chdir(tmp_path)
    assert find_initial(path.name).file == str(path)


def test_the_file_is_known_by_its_bytes(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    path = save_safetensors(tmp_path, trained)
    initial = find_initial(str(path))
    save_safetensors(tmp_path, {**trained, "0.bias": torch.ones(3)})
    with pytest.raises(ConfigError, match=f"(?s){initial.sha256}.*start again"):
        read_weights(initial)
    assert find_initial(str(path)) != initial


class Harmful:
    """Would run code in whoever unpickled it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('code out of a file was run')",)


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _damaged_checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    path = save_checkpoint(folder, state)
    (path / MODEL_FILE).write_bytes((path / MODEL_FILE).read_bytes()[:-1])
    return path


def _without_seal(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    path = save_checkpoint(folder, state)
    (path / "meta.json.sha256").unlink()
    return path


def _cut(path: Path) -> Path:
    return _write(path, path.read_bytes()[:-100])


def _without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: one for key, one in state.items() if key != name}


WRONG: dict[str, tuple[Save, list[str]]] = {
    "no such file": (lambda f, s: f / "none.pt", ["none.pt: no such file", "run folder"]),
    "no such folder": (lambda f, s: f / "none", ["none", "needs a checkpoint, a run folder"]),
    "empty folder": (lambda f, s: f, ["no checkpoint found", ".safetensors"]),
    "unknown ending": (lambda f, s: _write(f / "a.h5", b"x"), ["a.h5'; needs", ".safetensors"]),
    "damaged checkpoint": (_damaged_checkpoint, [MODEL_FILE, "bytes where", "needs a checkpoint"]),
    "half-written checkpoint": (_without_seal, ["meta.json.sha256: No such file"]),
    "empty safetensors": (
        lambda f, s: _write(f / "a.safetensors", b""),
        ["a.safetensors is no whole safetensors file"],
    ),
    "truncated safetensors": (
        lambda f, s: _cut(save_safetensors(f, s)),
        ["model.safetensors is no whole safetensors file"],
    ),
    "truncated pt": (lambda f, s: _cut(save_torch(f, s)), ["model.pt is no whole PyTorch file"]),
    "text as pt": (lambda f, s: _write(f / "a.pt", b"hello"), ["a.pt"]),
    "a whole model": (
        lambda f, s: save_torch(f, make_model()),
        ["model.pt holds more than tensors", "torch.save(model.state_dict(), path)"],
    ),
    "code": (
        lambda f, s: _write(f / "a.pt", pickle.dumps(Harmful(), protocol=2)),
        ["a.pt holds more than tensors"],
    ),
    "a list": (
        lambda f, s: save_torch(f, [torch.ones(2)]),
        ["holds a list; needs a mapping", "'state_dict' or 'model'"],
    ),
    "a tensor": (lambda f, s: save_torch(f, torch.ones(2)), ["holds a Tensor; needs a mapping"]),
    "an optimizer": (
        lambda f, s: save_torch(f, {"state": {}, "param_groups": []}),
        ["state, param_groups holds no tensor"],
    ),
    "an empty mapping": (lambda f, s: save_torch(f, {}), ["the mapping holds no tensor"]),
    "a missing name": (
        lambda f, s: save_torch(f, _without(s, "2.bias")),
        ["2.bias: missing; the model has it with shape (2,)", "init_skip"],
    ),
    "an unexpected name": (
        lambda f, s: save_torch(f, {**s, "3.weight": torch.ones(7)}),
        ["3.weight: unexpected; the model has no such name (shape (7,))", "init_skip"],
    ),
    "another shape": (
        lambda f, s: save_torch(f, {**s, "2.weight": torch.ones(9, 3)}),
        ["2.weight: shape (9, 3), the model has (2, 3)", "init_skip"],
    ),
    "another dtype": (
        lambda f, s: save_torch(f, {**s, "2.weight": torch.ones(2, 3, dtype=torch.int64)}),
        ["2.weight: torch.int64, the model has torch.float32"],
    ),
    "all at once": (
        lambda f, s: save_torch(
            f, {**_without(s, "2.bias"), "0.bias": torch.ones(9), "x": torch.ones(1)}
        ),
        ["2.bias: missing", "0.bias: shape (9,)", "x: unexpected"],
    ),
}


@pytest.mark.parametrize(("make", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_weights_are_refused_in_words(
    make: Save, expected: list[str], tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(make(tmp_path, trained))
    assert str(caught.value).startswith("init_from: ")
    for words in expected:
        assert words in str(caught.value)


def test_a_skipped_name_that_nobody_has_is_a_mistake(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ConfigError, match=r"haed\.\*: in init_skip, but neither"):
        load(save_torch(tmp_path, trained), ["haed.*"])


def test_what_was_found_is_picklable() -> None:
    initial = Initial("/a.pt", "00")
    assert pickle.loads(pickle.dumps(initial)) == initial
