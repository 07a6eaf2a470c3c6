"""Checkpoints: one folder per step, complete and checked, or not there at all.

    FOLDER/step-00000050/
        model.safetensors    the weights, for plain PyTorch:
                             model.load_state_dict(safetensors.torch.load_file(path))
        state.safetensors    flat optimizer tensors, scalars, whatever else the caller keeps
        meta.json            the caller's values, sizes and checksums
        meta.json.sha256     the checksum of that, for `sha256sum --check`

A checkpoint is made under a hidden name beside the others, brought to disk, then renamed. This
module knows nothing of jobs or optimizers, never changes a checkpoint and never returns one of
which any byte differs from what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from elastic.core.errors import CheckpointError
from elastic.core.layout import Chunk

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
META_FILE = "meta.json"
SEAL_FILE = "meta.json.sha256"
FORMAT = 1
SUBFOLDER = "checkpoints"  # where a run folder keeps them
_NAME = re.compile(r"step-(\d{8,})")
_ADVICE = "Delete this folder and resume from an older checkpoint, or from the run folder"

JSON = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    step: int
    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    meta: JSON
    path: Path
    damaged: list[str] = field(default_factory=list)
    """What was wrong with newer checkpoints that `find_checkpoint` passed over."""


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    meta: JSON,
    chunks: Sequence[Chunk] = (),
    chunked: Collection[str] = (),
    keep_last: int,
) -> Path:
    """Write `folder/step-NNNNNNNN/`, replacing one of that step, and remove old ones.

    Returns once everything is on disk. The tensors must not change meanwhile.

    Args:
        weights: by the names of the model's `state_dict`; those that share memory are copied.
        state: further tensors, contiguous.
        meta: values that JSON can hold.
        chunks: the chunks of the flat space, without gaps.
        chunked: names in `state` of flat tensors, as long as the first some chunks, that get a
            checksum per chunk. Others are checksummed whole.
        keep_last: how many checkpoints stay, this one included. Newer ones than this, left by
            a run that went back, neither count nor are removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}, must be at least 1")
    if unknown := set(chunked) - state.keys():
        raise ValueError(f"chunked names {sorted(unknown)}, which state lacks")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder, "new")
    path = folder / f"step-{step:08d}"
    new = _hidden(path, "new")
    new.mkdir()
    try:
        body = {"format": FORMAT, "step": step, "meta": meta}
        _fill(new, body, weights, state, dict.fromkeys(chunked, chunks))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # on a full disk it would stay in the way
        raise
    _publish(new, path)
    _prune(path, keep_last)
    _remove_leftovers(folder, "old")
    return path


def _fill(
    new: Path,
    body: JSON,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    chunks: Mapping[str, Sequence[Chunk]],
) -> None:
    """Write the four files, the one that vouches for the others last, and wait for the disk."""
    safetensors.torch.save_file(_separate(weights), new / MODEL_FILE)
    safetensors.torch.save_file(_separate(state), new / STATE_FILE)
    body["files"] = {
        name: {"size": (new / name).stat().st_size} for name in (MODEL_FILE, STATE_FILE)
    }
    body["files"][MODEL_FILE]["sha256"] = _file_sha256(new / MODEL_FILE)
    body["tensors"] = {
        name: _describe(name, tensor, chunks.get(name, ())) for name, tensor in state.items()
    }
    text = json.dumps(body, indent=1).encode()
    (new / META_FILE).write_bytes(text)
    (new / SEAL_FILE).write_text(f"{hashlib.sha256(text).hexdigest()}  {META_FILE}\n")
    for name in (MODEL_FILE, STATE_FILE, META_FILE, SEAL_FILE):
        _sync(new / name)
    _sync(new)


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no byte: tied ones are copied, views of one space are not."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    free_from = 0
    for name, tensor in sorted(contiguous.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < free_from:
            contiguous[name] = tensor.clone()
        free_from = max(free_from, tensor.data_ptr() + tensor.nbytes)
    return contiguous


def _describe(name: str, tensor: torch.Tensor, chunks: Sequence[Chunk]) -> JSON:
    shape = list(tensor.shape)
    described: JSON = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
    if not chunks:
        return {**described, "sha256": _tensor_sha256(tensor)}
    ranges = [[chunk.start, chunk.stop] for chunk in chunks if chunk.start < tensor.numel()]
    borders = [0, *(stop for _, stop in ranges)]
    if borders != [*(start for start, _ in ranges), tensor.numel()]:
        raise ValueError(f"{name} of shape {shape} does not end where a chunk ends, or gaps remain")
    flat = tensor.reshape(-1)
    digests = [[*ends, _tensor_sha256(flat[slice(*ends)])] for ends in ranges]
    return {**described, "chunks": digests}


def _tensor_sha256(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _publish(new: Path, path: Path) -> None:
    """Rename; a checkpoint in the way steps aside, and can be read there if we die in between."""
    if path.exists():
        _set_aside(path)
    new.rename(path)
    _sync(path.parent)


def _set_aside(path: Path) -> None:
    old = _hidden(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)


def _prune(written: Path, keep_last: int) -> None:
    older = [path for path in _checkpoints(written.parent) if _step(path) < _step(written)]
    for path in older[: max(0, len(older) - (keep_last - 1))]:
        _set_aside(path)  # a folder half removed must not look like a damaged checkpoint


def _remove_leftovers(folder: Path, suffix: str) -> None:
    for path in folder.glob(f".step-*.{suffix}"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder by step, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    match = _NAME.search(path.name)
    assert match is not None, path
    return int(match[1])


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every byte of it.

    Raises:
        CheckpointError: something is missing or differs; names the file and the chunk or tensor.
    """
    body = _read_meta(path)
    for name, expected in body["files"].items():
        _check_file(path / name, expected)
    weights = _load(path / MODEL_FILE)
    state = _load(path / STATE_FILE)
    for name in sorted(body["tensors"].keys() ^ state.keys()):
        raise _damaged(path / STATE_FILE, f"tensor {name} is not in both it and {META_FILE}")
    for name, tensor in state.items():
        for problem in _problems(tensor, body["tensors"][name]):
            raise _damaged(path / STATE_FILE, f"tensor {name}{problem}")
    return Checkpoint(body["step"], weights, state, body["meta"], path)


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file}: {problem}. {_ADVICE}")


def _read_meta(path: Path) -> JSON:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        text = (path / META_FILE).read_bytes()
        seal = (path / SEAL_FILE).read_bytes()
    except OSError as error:
        raise _damaged(Path(error.filename), error.strerror or str(error)) from error
    if not seal.startswith(hashlib.sha256(text).hexdigest().encode()):
        raise _damaged(path / META_FILE, f"its sha256 is not the one in {SEAL_FILE}")
    body: JSON = json.loads(text)
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {body['format']}, and this version reads format {FORMAT}:"
            " use the version that wrote it"
        )
    return body


def _check_file(file: Path, expected: JSON) -> None:
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            raise _damaged(file, f"{size} bytes where {expected['size']} were written")
        if "sha256" in expected and _file_sha256(file) != expected["sha256"]:
            raise _damaged(file, f"its sha256 is not the one in {META_FILE}")
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, f"unreadable: {error}") from error


def _problems(tensor: torch.Tensor, expected: JSON) -> Iterator[str]:
    """What is wrong with a tensor: at most all of its chunks."""
    described = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    for key, value in described.items():
        if value != expected[key]:
            yield f": {key} is {value}, written was {expected[key]}"
            return
    if "chunks" not in expected:
        if _tensor_sha256(tensor) != expected["sha256"]:
            yield f": its sha256 is not the one in {META_FILE}"
        return
    flat = tensor.reshape(-1)
    for index, (start, stop, digest) in enumerate(expected["chunks"]):
        if _tensor_sha256(flat[start:stop]) != digest:
            yield f", chunk {index} (elements {start} to {stop}): its sha256 differs"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, unverified, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def find_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the newest good one of a run folder or a folder of checkpoints.

    A checkpoint that is named itself must verify; in a folder, damaged ones are passed over and
    listed in the result.

    Raises:
        CheckpointError: there is none, or none that verifies.
    """
    if (path / META_FILE).exists() or _NAME.fullmatch(path.name):
        return read_checkpoint(path)
    folder = path / SUBFOLDER if (path / SUBFOLDER).is_dir() else path
    aside = [old for old in folder.glob(".step-*.old") if _NAME.search(old.name)]
    candidates = sorted((*aside, *_checkpoints(folder)), key=_step, reverse=True)
    damaged: list[str] = []
    for candidate in candidates:
        try:
            return replace(read_checkpoint(candidate), damaged=damaged)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"{folder}: every checkpoint is damaged: " + "; ".join(damaged))
    raise CheckpointError(f"{folder}: no checkpoint found")
