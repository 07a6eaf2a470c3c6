"""A checkpoint is there complete and correct, or it is refused and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from elastic.core.checkpoint import (
    META_FILE,
    MODEL_FILE,
    STATE_FILE,
    Checkpoint,
    checkpoint_steps,
    find_checkpoint,
    job_of,
    latest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from elastic.core.errors import CheckpointError
from elastic.core.layout import make_layout
from elastic.core.storage import SEAL_FILE, LocalStorage

LAYOUT = make_layout(
    [[("weight", (20, 10)), ("bias", (20,))]], buffers=[("mean", (5,))], chunk_elements=64
)
META = {"exponents": [3, -4], "loss": 0.1, "job": {"name": "x", "clip": None}, "skipped": []}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


def make_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "exp_avg": torch.randn(LAYOUT.num_parameter_elements, generator=generator),
        "values": torch.randn(LAYOUT.num_elements, generator=generator),
        "scalars": torch.arange(6, dtype=torch.float64).reshape(2, 3),
        "counters": torch.arange(64, dtype=torch.uint8),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "number": torch.tensor(7),
    }


def write(folder: Path, step: int, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "weights": {"weight": torch.full((200, 30), float(step))},
        "state": make_state(),
        "meta": META,
        "chunks": LAYOUT.chunks,
        "chunked": ("exp_avg", "values"),
    }
    return Path(write_checkpoint(LocalStorage(folder), step=step, **{**arguments, **changes}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "b", 12)
    assert path == tmp_path / "a" / "b" / "step-00000012"
    assert names(path) == [META_FILE, SEAL_FILE, MODEL_FILE, STATE_FILE]
    read = read_checkpoint(path)
    assert (read.step, read.meta, read.path, read.damaged) == (12, META, str(path), [])
    assert torch.equal(read.weights["weight"], torch.full((200, 30), 12.0))
    assert read.state.keys() == make_state().keys()
    for name, tensor in make_state().items():
        assert torch.equal(read.state[name], tensor)
        assert read.state[name].dtype == tensor.dtype


def test_weights_load_in_plain_torch_in_one_line(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    path = write(tmp_path, 1, weights=model.state_dict())
    other.load_state_dict(safetensors.torch.load_file(path / MODEL_FILE))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_views_of_one_flat_space_and_strided_tensors_are_weights_too(tmp_path: Path) -> None:
    flat = torch.randn(64)
    weights = {
        "a": flat[:20].view(4, 5),
        "b": flat[32:42],
        "tied": flat[32:42],
        "overlapping": flat[40:50],
        "transposed": flat[:20].view(4, 5).t(),
    }
    read = read_checkpoint(write(tmp_path, 1, weights=weights))
    for name, tensor in weights.items():
        assert torch.equal(read.weights[name], tensor)


def test_the_seal_is_what_sha256sum_checks(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    digest, name = (path / SEAL_FILE).read_text().split()
    assert digest == hashlib.sha256((path / name).read_bytes()).hexdigest()
    model = hashlib.sha256((path / MODEL_FILE).read_bytes()).hexdigest()
    assert json.loads((path / META_FILE).read_text())["files"][MODEL_FILE]["sha256"] == model


def test_leftovers_go_and_what_belongs_to_others_stays(tmp_path: Path) -> None:
    (tmp_path / ".step-00000099.new").mkdir(parents=True)
    (tmp_path / ".step-00000098.old").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-00000001.mine").mkdir()
    write(tmp_path, 2)
    write(tmp_path, 3)
    assert names(tmp_path) == ["notes", "step-00000001.mine", "step-00000002", "step-00000003"]
    assert checkpoint_steps(LocalStorage(tmp_path)) == {2: "step-00000002", 3: "step-00000003"}
    remove_checkpoint(LocalStorage(tmp_path), 2)
    assert names(tmp_path) == ["notes", "step-00000001.mine", "step-00000003"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 5)
    path = write(tmp_path, 5, meta={"second": True})
    assert names(tmp_path) == [path.name]
    assert read_checkpoint(path).meta == {"second": True}


def test_the_job_is_that_of_the_newest_good_checkpoint(tmp_path: Path) -> None:
    for step in (3, 5, 4):
        write(tmp_path, step, meta={"job": {"steps": step}})
    assert job_of(tmp_path) == {"steps": 5}
    (tmp_path / "step-00000005" / META_FILE).write_text("{}")
    assert job_of(tmp_path) == {"steps": 4}
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        job_of(tmp_path / "none")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(tmp_path, 5, meta={"bad": object()})
    assert names(tmp_path) == [path.name]
    assert read_checkpoint(path).meta == META


def test_a_caller_mistake_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        write(tmp_path, 1, chunked=("missing",))
    with pytest.raises(ValueError, match=r"scalars of shape \[2, 3\] does not end"):
        write(tmp_path, 1, chunked=("scalars",))
    with pytest.raises(ValueError, match="gaps remain"):
        write(tmp_path, 1, chunks=LAYOUT.chunks[1:])


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def flip_state(path: Path, name: str, byte: int) -> None:
    """Change one byte of one tensor in the state file."""
    content = (path / STATE_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    flip(path / STATE_FILE, 8 + length + start + byte)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def save_state(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the state file with another content of the same size."""
    state = make_state()
    change(state)
    safetensors.torch.save_file(state, path / STATE_FILE)


def rename_tensor(state: dict[str, torch.Tensor]) -> None:
    state["exp_axg"] = state.pop("exp_avg")


def reshape_tensor(state: dict[str, torch.Tensor]) -> None:
    state["scalars"] = state["scalars"].reshape(3, 2)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "model byte": (lambda p: flip(p / MODEL_FILE, -5), f"{MODEL_FILE}: its sha256"),
    "model truncated": (lambda p: truncate(p / MODEL_FILE), f"{MODEL_FILE}: .* bytes where"),
    "model missing": (lambda p: (p / MODEL_FILE).unlink(), f"{MODEL_FILE}: No such file"),
    "state missing": (lambda p: (p / STATE_FILE).unlink(), f"{STATE_FILE}: No such file"),
    "state truncated": (lambda p: truncate(p / STATE_FILE), f"{STATE_FILE}: .* bytes where"),
    "state header": (lambda p: flip(p / STATE_FILE, 3), f"{STATE_FILE}: unreadable"),
    "chunk": (
        lambda p: flip_state(p, "exp_avg", 4 * 64 + 3),
        rf"{STATE_FILE}: tensor exp_avg, chunk 1 \(elements 64 to 128\)",
    ),
    "buffer chunk": (
        lambda p: flip_state(p, "values", 4 * (LAYOUT.num_elements - 1)),
        f"tensor values, chunk {len(LAYOUT.chunks) - 1} ",
    ),
    "whole tensor": (lambda p: flip_state(p, "number", 0), "tensor number: its sha256"),
    "tensor name": (lambda p: save_state(p, rename_tensor), "tensor exp_avg is not in both"),
    "shape": (lambda p: save_state(p, reshape_tensor), r"tensor scalars: shape is \[3, 2\]"),
    "meta byte": (lambda p: flip(p / META_FILE, 40), f"{META_FILE}: its sha256"),
    "meta missing": (lambda p: (p / META_FILE).unlink(), f"{META_FILE}: No such file"),
    "seal missing": (lambda p: (p / SEAL_FILE).unlink(), f"{SEAL_FILE}: No such file"),
    "seal empty": (lambda p: (p / SEAL_FILE).write_bytes(b""), f"{META_FILE}: its sha256"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_an_older_checkpoint_found(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "checkpoints"
    good, bad = write(folder, 1), write(folder, 2)
    damage(bad)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(bad)
    assert str(bad) in str(caught.value)
    assert "older checkpoint" in str(caught.value)
    found = find_checkpoint(tmp_path)
    assert (found.path, found.step, len(found.damaged)) == (str(good), 1, 1)
    assert found.damaged == [str(caught.value)]
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(bad)


def test_find_takes_a_run_a_folder_or_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = write(folder, 7), write(folder, 100_000_000)
    assert latest_checkpoint(folder) == str(second)

    def found(path: Path) -> Checkpoint:
        return find_checkpoint(path)

    expected = [str(path) for path in (second, second, first)]
    assert [found(path).path for path in (tmp_path, folder, first)] == expected
    assert found(folder).damaged == []


def test_a_checkpoint_that_stepped_aside_is_found(tmp_path: Path) -> None:
    """The writer died between the two renames that replace a checkpoint."""
    path = write(tmp_path, 5)
    path.rename(tmp_path / ".step-00000005.old")
    assert find_checkpoint(tmp_path).step == 5


def test_nothing_to_find_is_an_error(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find_checkpoint(tmp_path / "step-00000001")
    flip(write(tmp_path, 1) / MODEL_FILE, -1)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: .*sha256"):
        find_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    text = (path / META_FILE).read_text().replace('"format": 1', '"format": 9').encode()
    (path / META_FILE).write_bytes(text)
    (path / SEAL_FILE).write_text(hashlib.sha256(text).hexdigest())
    with pytest.raises(CheckpointError, match="format 9, and this version reads format 1"):
        read_checkpoint(path)
