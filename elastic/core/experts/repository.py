"""A model repository: a folder with the weights of experts and router, and what they are.

    REPO/repository.json                          the manifest: what counts now
    REPO/experts/NAME/VERSION/model.safetensors   versions "1", "2", ...
    REPO/router/VERSION/model.safetensors

The manifest is replaced by a rename, last: whoever reads sees the old or the new, whole, and
what it names is there until `prune`. A version is never written twice. Building a module imports
what the manifest names, as a job file does: open only repositories that you trust as code.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from elastic.core.errors import ConfigError, RepositoryError
from elastic.core.experts.flops import count_flops
from elastic.core.experts.manifest import ExpertEntry, Input, Manifest, ModelSpec, Weights
from elastic.core.weights import place_weights

MANIFEST_FILE = "repository.json"
WEIGHTS_FILE = "model.safetensors"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained module, to be stored: how to build it, and the tensors of its state_dict."""

    spec: ModelSpec
    weights: Tensors


class Repository:
    """A model repository as it was when it was opened; changes give a new one.

    `Repository.open` and `Repository.create` make it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Repository:
        """Read and check a repository.

        Args:
            verify: read every file of weights and compare its digest.

        Raises:
            RepositoryError: there is none, or it is damaged; names the file and all problems.
        """
        file = Path(path) / MANIFEST_FILE
        try:
            manifest = Manifest.model_validate_json(file.read_bytes())
        except OSError as error:
            raise RepositoryError(f"{file}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise RepositoryError("\n  ".join((f"{file}: is no manifest:", *lines))) from error
        found = cls(Path(path), manifest)
        problems = list(found._problems(verify))
        if problems:
            raise RepositoryError("\n  ".join((f"{file}: names what is not there:", *problems)))
        return found

    @classmethod
    def create(
        cls,
        path: str | Path,
        experts: Mapping[str, Trained],
        router: Trained,
        **fields: Any,
    ) -> Repository:
        """Write a repository.

        Args:
            path: a folder without a repository.
            experts: by name; the outputs of the router are in this order.
            fields: name, task, input, selection, and others of the manifest.

        Raises:
            RepositoryError: there is one already, or something does not fit.
        """
        root = Path(path)
        if (root / MANIFEST_FILE).exists():
            raise RepositoryError(f"{root}: holds a repository already; needs another folder")
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            task, shape = fields["task"], Input.model_validate(fields["input"]).shape
            stored = [
                {"name": name, **_store(root, f"experts/{name}", one, example_input(task, shape))}
                for name, one in experts.items()
            ]
            kept = _store(root, "router", router, example_input(task, shape))
            kept["outputs"] = list(experts)
            _write_manifest(root, {**fields, "experts": stored, "router": kept})
        return cls.open(root)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the order of the router's outputs."""
        return tuple(one.name for one in self.manifest.experts)

    def expert(self, name: str) -> ExpertEntry:
        """What the manifest says of an expert.

        Raises:
            RepositoryError: there is none of that name.
        """
        for one in self.manifest.experts:
            if one.name == name:
                return one
        raise RepositoryError(f"{self.path}: no expert {name!r}; there are {', '.join(self.names)}")

    def load_expert(self, name: str) -> nn.Module:
        """An expert on the CPU, in eval mode.

        Raises:
            RepositoryError: its weights are damaged or are not of its model.
        """
        return self._load(self.expert(name))

    def load_router(self) -> nn.Module:
        """The router, likewise; its outputs are in the order of the manifest's experts.

        An expert that the router does not know has the logit -inf.
        """
        router, outputs = self._load(self.manifest.router), self.manifest.router.outputs
        return router if outputs == self.names else Reordered(router, outputs, self.names)

    def add_expert(
        self, name: str, expert: Trained, *, router: Trained | None = None
    ) -> Repository:
        """Add an expert as the last. Without a new router, whose last output is the new expert, the
        old one goes on and gives it no weight."""

        def change(now: dict[str, Any]) -> None:
            if name in [one["name"] for one in now["experts"]]:
                raise RepositoryError(f"{self.path}: has an expert {name!r} already; replace it")
            now["experts"].append({"name": name, **self._put(f"experts/{name}", expert)})
            if router is not None:
                outputs = [one["name"] for one in now["experts"]]
                now["router"] = {**self._put("router", router), "outputs": outputs}

        return self._change(change)

    def replace_expert(
        self, name: str, weights: Tensors, *, spec: ModelSpec | None = None
    ) -> Repository:
        """Give an expert new weights, and with `spec` another model."""

        def change(now: dict[str, Any]) -> None:
            old = _entry_of(now, name, self.path)
            trained = Trained(spec or ModelSpec.model_validate(old["model"]), weights)
            old.update(self._put(f"experts/{name}", trained))

        return self._change(change)

    def remove_expert(self, name: str) -> Repository:
        """Remove an expert; what the router gives it goes to the others."""

        def change(now: dict[str, Any]) -> None:
            now["experts"].remove(_entry_of(now, name, self.path))

        return self._change(change)

    def replace_router(
        self, weights: Tensors, *, spec: ModelSpec | None = None, outputs: Sequence[str] = ()
    ) -> Repository:
        """Give the router new weights; with `outputs` other experts than the old one's."""

        def change(now: dict[str, Any]) -> None:
            old = now["router"]
            trained = Trained(spec or ModelSpec.model_validate(old["model"]), weights)
            old.update(self._put("router", trained))
            if outputs:
                old["outputs"] = list(outputs)

        return self._change(change)

    def replace_all(
        self, experts: Mapping[str, Trained], router: Trained, **fields: Any
    ) -> Repository:
        """Give it these experts and no other, this router, and other `fields` of the manifest, in
        one change: who serves it never sees new experts under an old router."""

        def change(now: dict[str, Any]) -> None:
            now["experts"] = [
                {"name": name, **self._put(f"experts/{name}", one)} for name, one in experts.items()
            ]
            now["router"] = {**self._put("router", router), "outputs": list(experts)}
            now.update(fields)

        return self._change(change)

    def replace_selection(self, selection: Mapping[str, Any]) -> Repository:
        """Choose experts by another policy from now on."""
        return self._change(lambda now: now.update(selection=dict(selection)))

    def put_back(self, wrong: Manifest) -> bool:
        """Let this manifest count again instead of `wrong`. False: another one counts by now.

        Raises:
            RepositoryError: weights that it names are there no more.
        """
        with locked(self.path):
            if self.reread().manifest != wrong:
                return False
            if problems := list(self._problems(verify=False)):
                raise RepositoryError("\n  ".join((f"{self.path}: was pruned:", *problems)))
            _write_manifest(self.path, self.manifest.model_dump(mode="json"))
        return True

    def prune(self) -> list[Path]:
        """Remove the versions that the manifest does not name; returns their folders."""
        with locked(self.path):
            named = {self.path / Path(one.weights).parent for one in _entries(self.reread())}
            found = [*self.path.glob("experts/*/*"), *self.path.glob("router/*")]
            unused = [path for path in found if path.is_dir() and path not in named]
            for path in unused:
                shutil.rmtree(path)
        return unused

    def reread(self) -> Repository:
        """The repository as it is now, without reading its weights."""
        return Repository.open(self.path, verify=False)

    def _change(self, change: Callable[[dict[str, Any]], None]) -> Repository:
        with locked(self.path):
            now = self.reread().manifest.model_dump(mode="json")
            change(now)
            _write_manifest(self.path, now)
        return self.reread()

    def _put(self, folder: str, trained: Trained) -> dict[str, Any]:
        given = self.manifest
        return _store(self.path, folder, trained, example_input(given.task, given.input.shape))

    def _load(self, entry: Weights) -> nn.Module:
        file = self.path / entry.weights
        try:
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise RepositoryError(f"{file}: has not the sha256 of the manifest, {entry.sha256}")
            return build(Trained(entry.model, safetensors.torch.load(data)), str(file))
        except (OSError, SafetensorError) as error:
            raise RepositoryError(f"{file}: cannot be read: {error}") from error

    def _problems(self, verify: bool) -> Iterator[str]:
        for entry in _entries(self):
            file = self.path / entry.weights
            if not file.is_file():
                yield f"{entry.weights}: no such file"
            elif verify and (digest := _digest(file)) != entry.sha256:
                yield f"{entry.weights}: has the sha256 {digest}, the manifest says {entry.sha256}"


class Reordered(nn.Module):
    """A router whose outputs are put into the order of `names`; -inf for what it does not know."""

    def __init__(self, router: nn.Module, outputs: Sequence[str], names: Sequence[str]) -> None:
        super().__init__()
        self.router = router
        self._columns = [outputs.index(name) if name in outputs else -1 for name in names]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits, shape (B, number of names)."""
        logits_BK: torch.Tensor = self.router(*inputs)
        unknown_B1 = logits_BK.new_full((len(logits_BK), 1), -torch.inf)
        return torch.cat([logits_BK, unknown_B1], 1)[:, self._columns]


def build(trained: Trained, source: str) -> nn.Module:
    """The module in eval mode.

    Raises:
        RepositoryError: it cannot be built, or the weights are not of it; begins with `source`.
    """
    try:
        with torch.random.fork_rng(devices=()):  # its first weights are of no interest
            module = construct(trained.spec)
        place_weights(
            trained.weights,
            module.state_dict(keep_vars=True),
            refusal=f"does not fit {trained.spec.target}:",
        )
    except ConfigError as error:
        raise RepositoryError(f"{source}: {error}") from error
    return module.eval()


def construct(spec: ModelSpec) -> nn.Module:
    """The module with its first weights.

    Raises:
        ConfigError: it cannot be imported, is no module, or the arguments are not of it.
    """
    module_name, _, attribute = spec.target.partition(":")
    try:
        kind = getattr(importlib.import_module(module_name), attribute)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind(**spec.arguments)
    except Exception as error:  # whatever a module raises, it cannot be built
        raise ConfigError(f"cannot build {spec.target}: {error}") from error
    raise ConfigError(f"{spec.target} is no nn.Module")


def example_input(task: str, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """What a module of the task is called with, for one sample; zeros."""
    if task == "language":
        return (torch.zeros(1, *shape, dtype=torch.int64),)
    x = torch.zeros(1, *shape)
    return (x, torch.full((1,), 0.5)) if task == "flow" else (x,)


def _entries(repository: Repository) -> tuple[Weights, ...]:
    return (*repository.manifest.experts, repository.manifest.router)


def _entry_of(manifest: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    for one in manifest["experts"]:
        if one["name"] == name:
            entry: dict[str, Any] = one
            return entry
    names = ", ".join(one["name"] for one in manifest["experts"])
    raise RepositoryError(f"{path}: no expert {name!r}; there are {names}")


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _store(
    root: Path, folder: str, trained: Trained, example: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
    """Write a new version below `folder`; the entry for the manifest."""
    module = build(trained, f"new weights of {folder}")
    flops = count_flops(module, *example)
    data = safetensors.torch.save(
        {name: one.detach().cpu().clone().contiguous() for name, one in trained.weights.items()}
    )
    version = _new_version(root / folder)
    file = root / folder / version / WEIGHTS_FILE
    with file.open("wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    return {
        "version": version,
        "weights": f"{folder}/{version}/{WEIGHTS_FILE}",
        "sha256": hashlib.sha256(data).hexdigest(),
        "model": trained.spec.model_dump(mode="json"),
        "num_parameters": sum(one.numel() for one in module.parameters()),
        "flops_per_call": flops,
    }


def _new_version(folder: Path) -> str:
    """Make the folder of a version that was never there."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(one.name) for one in folder.iterdir() if one.name.isdecimal()]
    version = str(max(taken, default=0) + 1)
    (folder / version).mkdir()
    return version


def _write_manifest(root: Path, fields: Mapping[str, Any]) -> None:
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RepositoryError("\n  ".join((f"{root}: would not fit together:", *lines))) from error
    draft = root / f"{MANIFEST_FILE}.{os.getpid()}.partial"
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(root / MANIFEST_FILE)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """One writer at a time of what is in a repository's folder; readers need no lock."""
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
