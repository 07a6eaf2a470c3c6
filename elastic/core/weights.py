"""Weights to begin with, out of a checkpoint of ours or a file of plain PyTorch or safetensors.

Reads tensors only: no pickled code is ever run. Says everything that does not fit at once.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from elastic.core.checkpoint import MODEL_FILE, find_checkpoint
from elastic.core.errors import CheckpointError, ConfigError
from elastic.core.layout import COMPILED
from elastic.core.storage import below, is_uri, open_storage, split

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
ALLOWED = f"a checkpoint, a run folder, or a file that ends in {', '.join(SUFFIXES)}"
WRAPPERS = ("state_dict", "model")
"""Keys under which training scripts put the state_dict."""
PREFIXES = ("module.", COMPILED)
"""Put before every name by DistributedDataParallel and torch.compile."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Initial:
    """A file of weights: its absolute path or URI, and the sha256 of its bytes."""

    file: str
    sha256: str


def find_initial(source: str) -> Initial:
    """The file that `init_from` means. A checkpoint is verified first.

    Raises:
        ConfigError: there is none.
    """
    file = source if is_uri(source) else str(Path(source).expanduser().absolute())
    if not source.endswith(SUFFIXES):
        try:
            file = below(find_checkpoint(file).path, MODEL_FILE)
        except CheckpointError as error:
            raise ConfigError(f"init_from: got {source!r}; needs {ALLOWED}: {error}") from error
    return Initial(file, hashlib.sha256(_content(file)).hexdigest())


def _content(file: str) -> bytes:
    folder, name = split(file)
    data = open_storage(folder).read(name)
    if data is None:
        raise ConfigError(f"init_from: {file}: no such file; needs {ALLOWED}")
    return data


def read_weights(initial: Initial) -> Tensors:
    """The tensors of a file by name, without the wrapping that training scripts add.

    Raises:
        ConfigError: it changed since it was found, is damaged, or holds something else.
    """
    data = _content(initial.file)
    digest = hashlib.sha256(data).hexdigest()
    if digest != initial.sha256:
        raise ConfigError(
            f"init_from: {initial.file} has the sha256 {digest}, and had {initial.sha256} when the"
            " job was started: start again when nobody writes it any more"
        )
    if initial.file.endswith(".safetensors"):
        try:
            return _unprefixed(safetensors.torch.load(data))
        except SafetensorError as error:
            raise ConfigError(
                f"init_from: {initial.file} is no whole safetensors file: {error}"
            ) from error
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"init_from: {initial.file} holds more than tensors, and code out of a file is not run:"
            " needs what torch.save(model.state_dict(), path) writes"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"init_from: {initial.file} is no whole PyTorch file: {error}") from error
    return _unprefixed(_state_dict(content, initial.file))


def _state_dict(content: Any, file: str) -> Tensors:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"init_from: {file} holds a {type(content).__name__}; needs a mapping from names to"
            f" tensors, itself or under {' or '.join(map(repr, WRAPPERS))}"
        )
    strange = [str(key) for key, one in content.items() if not isinstance(one, torch.Tensor)]
    if strange or not content:
        raise ConfigError(
            f"init_from: {file}: {', '.join(strange[:8]) or 'the mapping'} holds no tensor; needs a"
            f" mapping from names to tensors, itself or under {' or '.join(map(repr, WRAPPERS))}"
        )
    return content


def _unprefixed(tensors: Tensors) -> Tensors:
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): one for name, one in tensors.items()}
    return tensors


def initialize(targets: Tensors, initial: Initial, skip: Sequence[str]) -> None:
    """Fill a model's tensors as `init_from` and `init_skip` say.

    Raises:
        ConfigError: the file does not hold what the model needs; lists every name.
    """
    refusal = (
        f"init_from: {initial.file} does not fit the model; rename what it holds, or name in"
        " init_skip what shall stay as the task makes it, such as [head.*]:"
    )
    place_weights(read_weights(initial), targets, refusal=refusal, skip=skip)


def place_weights(
    weights: Tensors, targets: Tensors, *, refusal: str, skip: Sequence[str] = ()
) -> None:
    """Copy `weights` into `targets`, both by the names of the model's state_dict.

    Args:
        targets: names that are tied hold the same tensor; one of them is enough.
        refusal: begins the message of an error: whose weights, and what can be done.
        skip: names, or patterns with *, that are left as they are in `targets`.

    Raises:
        ConfigError: names that are missing, unexpected, or of another shape; lists them all.
    """
    problems = [
        f"{pattern}: in init_skip, but neither the model nor the file has such a name"
        for pattern in skip
        if not any(fnmatchcase(name, pattern) for name in (*targets, *weights))
    ]
    wanted = {name: one for name, one in targets.items() if not _matches(name, skip)}
    given = {name: one for name, one in weights.items() if not _matches(name, skip)}
    problems += _mismatches(given, wanted)
    if problems:
        raise ConfigError("\n  ".join((refusal, *problems)))
    with torch.no_grad():
        for name, one in given.items():
            wanted[name].copy_(one)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _mismatches(given: Tensors, wanted: Tensors) -> Iterator[str]:
    held = {id(wanted[name]) for name in given.keys() & wanted.keys()}
    for name, target in wanted.items():
        if name not in given and id(target) not in held:
            yield f"{name}: missing; the model has it with shape {tuple(target.shape)}"
    first: dict[int, str] = {}
    for name, one in sorted(given.items()):  # safetensors gives them in no order
        if name not in wanted:
            yield f"{name}: unexpected; the model has no such name (shape {tuple(one.shape)})"
            continue
        target = wanted[name]
        if target.shape != one.shape:
            yield f"{name}: shape {tuple(one.shape)}, the model has {tuple(target.shape)}"
        elif target.dtype.is_floating_point != one.dtype.is_floating_point:
            yield f"{name}: {one.dtype}, the model has {target.dtype}"
        else:
            twin = first.setdefault(id(target), name)
            if not torch.equal(given[twin], one):
                yield f"{name}: tied to {twin} in the model, and not equal to it in the file"
