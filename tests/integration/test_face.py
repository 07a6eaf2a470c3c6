"""`ElasticTrainer` as a Ray Train user meets it, and the precisions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import safetensors.torch
import torch
from ray.train import RunConfig, ScalingConfig
from torch import nn

import elastic
from elastic.core.errors import ConfigError
from tests.integration.support import kinds, outcome

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]

JOB = {
    "steps": 15,
    "batch": {"micro_batches": 4, "micro_batch_size": 8},
    "workers": {"spare": 0},
    "standby": False,
    "precision": "bfloat16",
    "clip_norm": 0.1,
    "checkpoint": {"every": 0},
}


def make_task() -> elastic.Task:
    """A task that no module holds, so that it travels to the workers by value."""

    class Squares:
        def __len__(self) -> int:
            return 500

        def fetch(self, indices: np.ndarray[Any, Any]) -> torch.Tensor:
            return torch.from_numpy(indices).float()[:, None] / 500

    class Parabola:
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

        def dataset(self) -> Squares:
            return Squares()

        def loss(self, model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, float]:
            return (model(x).float() - x**2).square().sum(), float(len(x))

        def optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
            return torch.optim.Adam([parameter for _, parameter in named], lr=0.03)

    return Parabola()


def fit(num_workers: int, folder: Path) -> elastic.Result:
    return elastic.ElasticTrainer(
        task=make_task(),
        job={"name": f"parabola{num_workers}", **JOB},
        scaling_config=ScalingConfig(num_workers=num_workers),
        run_config=RunConfig(storage_path=str(folder), name=f"by-{num_workers}"),
    ).fit()


def test_the_trainer_gives_what_a_ray_train_user_expects(tmp_path: Path) -> None:
    """In bfloat16 and with clipping, on one worker and on two."""
    one, result = fit(1, tmp_path), fit(2, tmp_path)
    assert outcome(one) == outcome(result)
    assert isinstance(result, ray.train.Result)
    assert result.path == str(tmp_path / "by-2")
    assert result.error is None
    assert result.metrics["steps"] == 15
    assert result.metrics["loss"] < result.metrics["first_loss"]
    assert result.params_sha256 == result.metrics["params_sha256"]
    assert result.samples_sha256 == result.metrics["samples_sha256"]
    assert result.exact
    assert kinds(result)[0] == "job_started"
    assert kinds(result)[-1] == "job_finished"

    model = make_task().model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert isinstance(result.checkpoint, ray.train.Checkpoint)
    weights = Path(result.checkpoint.path) / "model.safetensors"
    model.load_state_dict(safetensors.torch.load_file(weights))
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.dtype == torch.float32
        assert not torch.equal(old, new)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"job": {"name": "x", **JOB}}, "neither ElasticTrainer.* nor the job file"),
        ({"job": {"name": "x", "steps": 0}, "task": make_task()}, "steps.*\n.*batch"),
        ({"job": {"name": "x", **JOB}, "task": object()}, "lacks model, dataset, loss, optimizer"),
        (
            {
                "job": {"name": "x", **JOB},
                "task": make_task(),
                "run_config": RunConfig(storage_path="s3://bucket/runs"),
            },
            "storage_path",
        ),
    ],
    ids=["no task", "wrong job", "no methods", "storage"],
)
def test_the_trainer_refuses_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        elastic.ElasticTrainer(**arguments)
