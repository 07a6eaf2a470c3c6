"""Model repositories: what is written comes back, changes are whole, damage is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic.core.errors import RepositoryError
from elastic.core.experts.manifest import ModelSpec
from elastic.core.experts.repository import Repository, Trained
from elastic.experts.packing import _check_same

EXPERT = ModelSpec(target="torch.nn:Linear", arguments={"in_features": 3, "out_features": 2})


def linear(spec: ModelSpec, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Linear(**spec.arguments)


def trained(seed: int, *, outputs: int = 2) -> Trained:
    arguments = {"in_features": 3, "out_features": outputs}
    spec = ModelSpec(target="torch.nn:Linear", arguments=arguments)
    return Trained(spec, linear(spec, seed).state_dict())


FIELDS: dict[str, Any] = {
    "name": "threes",
    "task": "classifier",
    "input": {"shape": [3], "dtype": "FP32"},
    "num_classes": 2,
    "selection": {"kind": "top_k", "k": 1},
}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    experts = {f"expert-{k}": trained(k) for k in range(3)}
    return Repository.create(tmp_path / "repo", experts, trained(9, outputs=3), **FIELDS)


def test_what_was_stored_comes_back(repository: Repository) -> None:
    again = Repository.open(repository.path)
    x = torch.randn(4, 3)
    for k, name in enumerate(again.names):
        module = again.load_expert(name)
        assert not module.training
        assert torch.equal(module(x), linear(EXPERT, k)(x))
        entry = again.expert(name)
        assert (entry.version, entry.num_parameters, entry.flops_per_call) == ("1", 8, 12)
    assert again.load_router()(x).shape == (4, 3)


def test_a_new_version_counts_at_once_and_the_old_one_stays(repository: Repository) -> None:
    old, x = Repository.open(repository.path), torch.randn(4, 3)
    new = repository.replace_expert("expert-1", trained(7).weights)
    assert new.expert("expert-1").version == "2"
    assert torch.equal(new.load_expert("expert-1")(x), linear(EXPERT, 7)(x))
    assert torch.equal(old.load_expert("expert-1")(x), linear(EXPERT, 1)(x))
    assert [path.relative_to(new.path).as_posix() for path in new.prune()] == ["experts/expert-1/1"]
    assert torch.equal(new.load_expert("expert-1")(x), linear(EXPERT, 7)(x))
    with pytest.raises(RepositoryError, match=r"experts/expert-1/1/model\.safetensors"):
        old.load_expert("expert-1")
    assert new.replace_expert("expert-1", trained(8).weights).expert("expert-1").version == "3"


def test_an_expert_that_the_router_does_not_know_gets_nothing(repository: Repository) -> None:
    x = torch.randn(4, 3)
    before = repository.load_router()(x)
    now = repository.add_expert("late", trained(5)).load_router()(x)
    assert torch.equal(now[:, :3], before)
    assert torch.isneginf(now[:, 3]).all()


def test_an_expert_comes_with_its_router(repository: Repository) -> None:
    now = repository.add_expert("late", trained(5), router=trained(6, outputs=4))
    assert now.names == ("expert-0", "expert-1", "expert-2", "late")
    assert now.load_router()(torch.randn(4, 3)).isfinite().all()
    assert now.manifest.router.version == "2"


def test_a_removed_expert_leaves_the_others_in_order(repository: Repository) -> None:
    x = torch.randn(4, 3)
    before = repository.load_router()(x)
    now = repository.remove_expert("expert-0")
    assert now.names == ("expert-1", "expert-2")
    assert torch.equal(now.load_router()(x), before[:, 1:])


def test_all_may_be_replaced_in_one_change_or_not_at_all(repository: Repository) -> None:
    fewer, policy = {f"expert-{k}": trained(20 + k) for k in (0, 3)}, {"kind": "all"}
    with pytest.raises(RepositoryError, match="does not fit"):
        repository.replace_all(fewer, Trained(EXPERT, {}), selection=policy)
    assert Repository.open(repository.path).manifest == repository.manifest
    now = repository.replace_all(fewer, trained(29), selection=policy)
    assert [(one.name, one.version) for one in now.manifest.experts] == [
        ("expert-0", "3"),
        ("expert-3", "2"),
    ]
    assert now.manifest.router.outputs == ("expert-0", "expert-3")
    assert now.manifest.selection == policy
    x = torch.randn(4, 3)
    assert torch.equal(Repository.open(now.path).load_expert("expert-3")(x), linear(EXPERT, 23)(x))


def test_another_repository_is_not_packed_over(repository: Repository) -> None:
    _check_same(repository, {"name": "threes", "num_classes": 2})
    with pytest.raises(RepositoryError, match="its task is classifier, now flow"):
        _check_same(repository, {"name": "threes", "task": "flow"})


def test_changes_of_two_writers_both_count(repository: Repository) -> None:
    other = Repository.open(repository.path)
    repository.replace_expert("expert-0", trained(10).weights)
    now = other.replace_expert("expert-2", trained(12).weights)
    assert [now.expert(name).version for name in now.names] == ["2", "1", "2"]


def edit(**changes: Any) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        file = root / "repository.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def edit_expert(**changes: Any) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        experts = json.loads((root / "repository.json").read_text())["experts"]
        edit(experts=[{**experts[0], **changes}, *experts[1:]])(root)

    return damage


def truncate(root: Path) -> None:
    file = root / "experts/expert-2/1/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda root: (root / "repository.json").unlink(), "repository.json.*No such file"),
    "torn": (lambda root: (root / "repository.json").write_text('{"fo') and None, "no manifest"),
    "weights": (truncate, "experts/expert-2/1/model.safetensors: has the sha256"),
    "format": (edit(format=2), "format: "),
    "unknown": (edit(extra=1), "extra: "),
    "selection": (edit(selection={}), "selection: needs a kind"),
    "classes": (edit(num_classes=None), "num_classes: is None"),
    "labels": (edit(labels=["one"]), "labels: 1 for num_classes 2"),
    "twice": (edit_expert(name="expert-1"), "names repeat"),
    "name": (edit_expert(name="../x"), "experts.0.name"),
    "version": (edit_expert(version="../1"), "experts.0.version"),
    "outside": (edit_expert(weights="../../etc/passwd"), "below the repository's folder"),
    "absolute": (edit_expert(weights="/etc/passwd"), "below the repository's folder"),
    "nowhere": (edit_expert(weights="experts/x"), "experts/x: no such file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_by_name(
    repository: Repository, damage: Callable[[Path], None], message: str
) -> None:
    damage(repository.path)
    with pytest.raises(RepositoryError, match=message) as caught:
        Repository.open(repository.path)
    assert str(repository.path) in str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os:getcwd", "os:getcwd is no nn.Module"),
        ("torch.nn:Conv7d", "cannot build torch.nn:Conv7d"),
        ("nowhere.at_all:Model", "No module named 'nowhere'"),
        ("torch.nn:BatchNorm1d", "unexpected keyword argument"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(
    repository: Repository, target: str, message: str
) -> None:
    edit_expert(model={"target": target, "arguments": {"in_features": 3}})(repository.path)
    with pytest.raises(RepositoryError, match=message):
        Repository.open(repository.path).load_expert("expert-0")


def test_weights_of_another_model_change_nothing(repository: Repository) -> None:
    with pytest.raises(RepositoryError, match=re.escape("weight: shape (5, 3), the model has")):
        repository.replace_expert("expert-0", trained(1, outputs=5).weights)
    assert repository.reread().manifest == repository.manifest


@pytest.mark.parametrize("change", ["expert", "remove", "replace", "create", "add"])
def test_what_cannot_be_is_refused(repository: Repository, change: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "expert": lambda: repository.load_expert("nobody"),
        "remove": lambda: repository.remove_expert("nobody"),
        "replace": lambda: repository.replace_expert("nobody", trained(1).weights),
        "create": lambda: Repository.create(
            repository.path, {"a": trained(1)}, trained(2, outputs=1), **FIELDS
        ),
        "add": lambda: repository.add_expert("expert-1", trained(1)),
    }
    message = {"create": "holds a repository already", "add": "replace it"}.get(change, "no expert")
    with pytest.raises(RepositoryError, match=message):
        calls[change]()
    assert repository.reread().manifest == repository.manifest


def test_the_last_expert_cannot_be_removed(repository: Repository) -> None:
    now = repository.remove_expert("expert-0").remove_expert("expert-1")
    with pytest.raises(RepositoryError, match=r"experts: .*at least 1"):
        now.remove_expert("expert-2")
    assert now.reread().names == ("expert-2",)


def test_a_manifest_is_put_back_only_instead_of_the_one_that_was_wrong(
    repository: Repository,
) -> None:
    old = repository.manifest
    second = repository.replace_expert("expert-1", trained(5).weights)
    third = second.replace_expert("expert-2", trained(6).weights)
    assert not repository.put_back(second.manifest)
    assert repository.reread().manifest == third.manifest
    assert repository.put_back(third.manifest)
    assert repository.reread().manifest == old
    again = repository.replace_expert("expert-1", trained(7).weights)
    assert again.expert("expert-1").version == "3"  # what was written stays as it was
    again.prune()
    with pytest.raises(RepositoryError, match="experts/expert-1/1"):
        repository.put_back(again.manifest)
    assert repository.reread().manifest == again.manifest
