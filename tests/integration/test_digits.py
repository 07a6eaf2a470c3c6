"""The example with BatchNorm and dropout: buffers and random numbers on real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import examples
from elastic.core.config import JobConfig, load_job
from elastic.driver import run_job
from elastic.result import Result
from examples.digits.task import Digits
from tests.integration.support import TAG, outcome

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]

JOB = Path(examples.__file__).parent / "digits" / "job.yaml"


def digits(num_workers: int) -> JobConfig:
    workers = f"workers={{start: {num_workers}, spare: 0}}"
    return load_job(JOB, [f"name=digits{TAG}", workers, "steps=40", "standby=false"])


def accuracy(result: Result) -> float:
    """Share of the digits that the checkpoint's weights tell right."""
    assert result.checkpoint is not None
    task = Digits()
    model, rows = task.model(), task.dataset()
    weights = Path(result.checkpoint.path) / "model.safetensors"
    model.load_state_dict(safetensors.torch.load_file(weights))
    batch = rows.fetch(np.arange(len(rows)))
    with torch.inference_mode():
        found = model.eval()(batch["images"]).argmax(dim=1)
    return float((found == batch["labels"]).float().mean())


def test_one_worker_and_three_learn_the_same_digits(tmp_path: Path) -> None:
    one, three = (run_job(digits(num), run_dir=tmp_path / str(num)) for num in (1, 3))
    assert outcome(one) == outcome(three)
    assert three.metrics["loss"] < 0.5 * three.metrics["first_loss"]
    assert accuracy(three) > 0.85
