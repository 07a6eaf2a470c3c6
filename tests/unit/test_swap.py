"""`elastic swap`: a job's newest checkpoint becomes a version of an expert or the router."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic.cli import main
from elastic.core.checkpoint import write_checkpoint
from elastic.core.experts.repository import Repository, Trained
from elastic.core.storage import LocalStorage
from tests.served import make_repository, trained


def checkpoint(folder: Path, model: Trained) -> Path:
    """A run folder, as a job leaves it."""
    storage = LocalStorage(folder / "checkpoints")
    weights = dict(model.weights)
    write_checkpoint(storage, step=7, weights=weights, state={}, meta={"job": {"task": ""}})
    return folder


def swap(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main(["swap", *map(str, arguments)])
    assert end.value.code == 0


def test_an_expert_and_the_router_are_replaced(tmp_path: Path) -> None:
    make_repository(tmp_path / "repo")
    expert, router = trained("flow", 70), trained("flow", 71, outputs=3)
    swap(tmp_path / "repo", "expert-1", checkpoint(tmp_path / "a", expert))
    swap(tmp_path / "repo", "router", checkpoint(tmp_path / "b", router))
    now = Repository.open(tmp_path / "repo")
    assert [one.version for one in now.manifest.experts] == ["1", "2", "1"]
    assert now.manifest.router.version == "2"
    for module, wanted in ((now.load_expert("expert-1"), expert), (now.load_router(), router)):
        for name, one in module.state_dict().items():
            assert torch.equal(one, wanted.weights[name])


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_repository(tmp_path / "repo")
    other = checkpoint(tmp_path / "a", trained("classifier", 1))
    with pytest.raises(SystemExit) as end:
        main(["swap", str(tmp_path / "repo"), "expert-1", str(other)])
    assert end.value.code == 1
    assert Repository.open(tmp_path / "repo").expert("expert-1").version == "1"
