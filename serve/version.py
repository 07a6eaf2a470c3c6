"""One version of a repository as it is served: its manifest, its router, how it selects.

A version is checked whole before the first request meets it: every module must give finite numbers
of the right shape on an example. Versions never change; a new manifest is a new version.

Letters: B rows, K experts, V outcomes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.core.errors import ConfigError
from elastic.core.experts.manifest import Manifest
from elastic.core.experts.repository import Repository
from policies.routing import Cascade, Core, Policy, policy_from

NUM_BYTES = 256


@dataclass(frozen=True, eq=False)
class Version:
    """`identity`: a digest of the manifest; the same in every replica."""

    identity: str
    repository: Repository
    router: nn.Module
    policy: Policy
    names: tuple[str, ...]
    keys: tuple[str, ...]
    """Of each expert, what changes when its weights or its model do."""
    index: Mapping[str, int] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        return self.repository.manifest

    @property
    def task(self) -> str:
        return self.manifest.task

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.manifest.input.shape)

    def example(self, rows: int = 1) -> tuple[Tensor, ...]:
        """Inputs as requests have them, always the same."""
        generator = torch.Generator().manual_seed(0)
        if self.task == "language":
            context = self.sample_shape[0]
            return (torch.randint(0, NUM_BYTES, (rows, context), generator=generator),)
        x = torch.randn((rows, *self.sample_shape), generator=generator)
        return (x, torch.rand(rows, generator=generator)) if self.task == "flow" else (x,)

    def answer_shape(self) -> tuple[int, ...]:
        """Of what the experts say of one row, as combined."""
        if self.task == "flow":
            return self.sample_shape
        return (NUM_BYTES,) if self.task == "language" else (int(self.manifest.num_classes or 0),)


def identity_of(manifest: Manifest) -> str:
    """What the version of a manifest is called."""
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:12]


def read_version(root: Path, selection: Mapping[str, Any] | None) -> Version:
    """What the folder holds now, with its router loaded and checked.

    Raises:
        ConfigError: the manifest or a file of the router is missing, damaged, or does not fit.
    """
    repository = Repository.open(root)
    manifest = repository.manifest
    try:
        policy = policy_from(dict(selection or manifest.selection))
    except ValueError as error:
        raise ConfigError(f"{root}: {error}") from None
    check_policy(policy, manifest.task)
    names = tuple(one.name for one in manifest.experts)
    version = Version(
        identity=identity_of(manifest),
        repository=repository,
        router=repository.load_router(),
        policy=policy,
        names=names,
        keys=tuple(f"{one.name}-{one.version}-{one.sha256[:16]}" for one in manifest.experts),
        index={name: k for k, name in enumerate(names)},
    )
    check_router(version)
    return version


def check_policy(policy: Policy, task: str) -> None:
    """Raises ConfigError where a policy makes no sense for a task."""
    if isinstance(policy, Cascade) and task != "classifier":
        raise ConfigError(f"selection cascade is for classifiers; the task is {task}")
    if isinstance(policy, Core) and task == "flow":
        raise ConfigError("selection core is for probabilities; the task is flow")


@torch.inference_mode()
def check_router(version: Version) -> None:
    try:
        logits = version.router(*version.example(2))
    except Exception as error:  # whatever a model raises is a router that does not work
        raise ConfigError(f"router {version.manifest.router.version}: {error}") from error
    fits = tuple(logits.shape) == (2, len(version.names))
    if not fits or not torch.isfinite(logits.softmax(dim=1)).all():
        raise ConfigError(
            f"router {version.manifest.router.version}: gives {tuple(logits.shape)} on 2 rows, or"
            f" numbers that are not finite; needs (2, {len(version.names)})"
        )


def comparable(task: str, answer: Tensor) -> Tensor:
    """What an expert said, as it can be averaged: velocities, or probabilities (B, V)."""
    if task == "flow":
        return answer
    logits = answer[:, -1] if task == "language" else answer
    return logits.softmax(dim=-1)


def fault_of(version: Version, answer: Tensor, rows: int) -> str | None:
    """What is wrong with an expert's comparable answer, None if nothing."""
    wanted = (rows, *version.answer_shape())
    if tuple(answer.shape) != wanted:
        return f"answered with shape {tuple(answer.shape)}; needs {wanted}"
    if not bool(torch.isfinite(answer).all()):
        return "answered with numbers that are not finite"
    return None
