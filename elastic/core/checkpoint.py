"""Checkpoints: one folder per step, complete and checked, or not there at all.

    STORAGE/step-00000050/
        model.safetensors    the weights, for plain PyTorch:
                             model.load_state_dict(safetensors.torch.load_file(path))
        ema.safetensors      likewise their average over the steps, if the job keeps one
        state.safetensors    flat optimizer tensors, scalars, whatever else the caller keeps
        meta.json            the caller's values, sizes and checksums
        meta.json.sha256     the checksum of that, for `sha256sum --check`

STORAGE is a folder or a URI: see `elastic.core.storage`, which makes them appear whole. This module
knows nothing of optimizers, never changes a checkpoint and never returns one of which any byte
differs from what was written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from elastic.core.errors import CheckpointError, StorageError
from elastic.core.layout import Chunk
from elastic.core.storage import SEAL_FILE, Storage, below, is_uri, open_storage, split

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.safetensors"
META_FILE = "meta.json"
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
    path: str
    """A path, or a URI."""
    averaged: dict[str, torch.Tensor] | None = None
    """The weights' average over the steps, if the job kept one."""
    damaged: list[str] = field(default_factory=list)
    """What was wrong with newer checkpoints that `find_checkpoint` passed over."""


def write_checkpoint(
    storage: Storage,
    *,
    step: int,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    meta: JSON,
    averaged: Mapping[str, torch.Tensor] | None = None,
    chunks: Sequence[Chunk] = (),
    chunked: Collection[str] = (),
) -> str:
    """Write `step-NNNNNNNN`, replacing one of that step; return its path or URI.

    Returns once everything is on disk, or in the bucket. The tensors must not change meanwhile.

    Args:
        weights: by the names of the model's `state_dict`; those that share memory are copied.
        state: further tensors, contiguous.
        meta: values that JSON can hold.
        averaged: the weights' average, by the same names.
        chunks: the chunks of the flat space, without gaps.
        chunked: names in `state` of flat tensors, as long as the first some chunks, that get a
            checksum per chunk. Others are checksummed whole.

    Raises:
        StorageError: the disk is full, an upload is refused. What was there before still is.
    """
    if unknown := set(chunked) - state.keys():
        raise ValueError(f"chunked names {sorted(unknown)}, which state lacks")
    name = f"step-{step:08d}"
    new = storage.stage(name)
    try:
        body = {"format": FORMAT, "step": step, "meta": meta}
        files = {MODEL_FILE: weights} | ({EMA_FILE: averaged} if averaged is not None else {})
        _fill(new, body, files, state, dict.fromkeys(chunked, chunks))
        storage.publish(new, name)
    except SafetensorError as error:
        raise StorageError(f"{new}: {error}") from error  # its words for a full disk
    except OSError as error:
        raise StorageError(f"{error.filename or new}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)  # on a full disk it would stay in the way
    return below(storage.location, name)


def _fill(
    new: Path,
    body: JSON,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, torch.Tensor],
    chunks: Mapping[str, Sequence[Chunk]],
) -> None:
    """Write the files of `weights` and the others, the one that vouches for all of them last."""
    for name, tensors in {**weights, STATE_FILE: state}.items():
        safetensors.torch.save_file(_separate(tensors), new / name)
    body["files"] = {name: {"size": (new / name).stat().st_size} for name in (*weights, STATE_FILE)}
    for name in weights:
        body["files"][name]["sha256"] = _file_sha256(new / name)
    body["tensors"] = {
        name: _describe(name, tensor, chunks.get(name, ())) for name, tensor in state.items()
    }
    text = json.dumps(body, indent=1).encode()
    (new / META_FILE).write_bytes(text)
    (new / SEAL_FILE).write_text(f"{hashlib.sha256(text).hexdigest()}  {META_FILE}\n")


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


def checkpoint_steps(storage: Storage) -> dict[int, str]:
    """The names of the checkpoints in a storage by step, unverified."""
    return {step_of(name): name for name in storage.names() if _NAME.fullmatch(name)}


def remove_checkpoint(storage: Storage, step: int) -> None:
    """Remove the checkpoint of a step. It disappears at once, whole."""
    storage.remove(f"step-{step:08d}")


def step_of(location: str) -> int:
    """The step of a checkpoint, by its name, path or URI."""
    match = _NAME.search(split(location)[1])
    assert match is not None, location
    return int(match[1])


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint, at a path or URI, and verify every byte of it.

    Raises:
        CheckpointError: something is missing or differs; names the file and the chunk or tensor.
        StorageError: the storage cannot be read now; nothing is known of the checkpoint.
    """
    folder, name = split(path)
    return read_entry(open_storage(folder), name)


def read_entry(storage: Storage, name: str) -> Checkpoint:
    """The same for an entry of an open storage."""
    shown = below(storage.location, name)
    with storage.fetch(name) as folder:
        try:
            return _verified(folder, shown)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), shown)) from error


def _verified(path: Path, shown: str) -> Checkpoint:
    body = _read_meta(path)
    for name, expected in body["files"].items():
        _check_file(path / name, expected)
    weights = _load(path / MODEL_FILE)
    averaged = _load(path / EMA_FILE) if EMA_FILE in body["files"] else None
    state = _load(path / STATE_FILE)
    for name in sorted(body["tensors"].keys() ^ state.keys()):
        raise _damaged(path / STATE_FILE, f"tensor {name} is not in both it and {META_FILE}")
    for name, tensor in state.items():
        for problem in _problems(tensor, body["tensors"][name]):
            raise _damaged(path / STATE_FILE, f"tensor {name}{problem}")
    return Checkpoint(body["step"], weights, state, body["meta"], shown, averaged)


def read_meta(storage: Storage, step: int) -> JSON | None:
    """The values kept with a checkpoint, without reading it. None where they are damaged."""
    name = f"step-{step:08d}"
    text, seal = storage.read(f"{name}/{META_FILE}"), storage.read(f"{name}/{SEAL_FILE}")
    if text is None or seal is None or not _is_sealed(text, seal):
        return None
    meta: JSON = json.loads(text)["meta"]
    return meta


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
    if not _is_sealed(text, seal):
        raise _damaged(path / META_FILE, f"its sha256 is not the one in {SEAL_FILE}")
    body: JSON = json.loads(text)
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {body['format']}, and this version reads format {FORMAT}:"
            " use the version that wrote it"
        )
    return body


def _is_sealed(text: bytes, seal: bytes) -> bool:
    return seal.startswith(hashlib.sha256(text).hexdigest().encode())


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


def checkpoints_of(run: str | Path, storage: str | None = None) -> str:
    """Where the checkpoints of a run folder lie, as its job says: the path or URI of a folder.

    Args:
        storage: `checkpoint.storage` of the job to begin, where the folder does not know it yet.
    """
    job = Path(run) / "job.json"
    if job.is_file():
        storage = json.loads(job.read_text())["checkpoint"].get("storage")
    return storage if storage is not None else str(Path(run) / SUBFOLDER)


def latest_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step in a folder or at a URI, unverified, or None."""
    storage = open_storage(folder)
    found = checkpoint_steps(storage)
    return below(storage.location, found[max(found)]) if found else None


def job_of(folder: str | Path) -> JSON:
    """The job that wrote the newest good checkpoint in a folder or at a URI, as JSON values.

    Raises:
        CheckpointError: there is none.
        StorageError: the storage cannot be read now.
    """
    storage = open_storage(folder)
    for step in sorted(checkpoint_steps(storage), reverse=True):
        meta = read_meta(storage, step)
        if meta is not None:
            job: JSON = meta["job"]
            return job
    raise CheckpointError(f"{folder}: no checkpoint found")


def find_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the newest good one of a run folder or a folder of checkpoints.

    A checkpoint that is named itself must verify; in a folder, damaged ones are passed over and
    listed in the result.

    Raises:
        CheckpointError: there is none, or none that verifies.
        StorageError: the storage cannot be read now.
    """
    if _NAME.fullmatch(split(path)[1]) or _holds_meta(path):
        return read_checkpoint(path)
    if not is_uri(path) and (
        (Path(path) / "job.json").is_file() or (Path(path) / SUBFOLDER).is_dir()
    ):
        path = checkpoints_of(path)
    storage = open_storage(path)
    names = [name for name in (*storage.leftovers(), *storage.names()) if _NAME.search(name)]
    damaged: list[str] = []
    for name in sorted(names, key=step_of, reverse=True):
        try:
            return replace(read_entry(storage, name), damaged=damaged)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"{path}: every checkpoint is damaged: " + "; ".join(damaged))
    raise CheckpointError(f"{path}: no checkpoint found")


def _holds_meta(path: str | Path) -> bool:
    return open_storage(path).read(META_FILE) is not None
