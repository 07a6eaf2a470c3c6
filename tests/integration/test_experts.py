"""From a data set to a model repository on real processes; an island is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from elastic.core.experts.repository import Repository
from elastic.core.runs import RunFolder
from elastic.core.yaml_file import Document, validate
from elastic.experts.config import ExpertsConfig
from elastic.experts.evaluation import evaluate
from elastic.experts.jobs import expert_jobs, router_jobs
from elastic.experts.packing import pack
from elastic.experts.partition import partition
from elastic.experts.pictures import draw
from elastic.experts.table import render
from elastic.experts.training import is_finished, train
from tests.integration.support import TAG, hosts_of, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

STEPS = 1000


@pytest.fixture
def config(tmp_path: Path) -> ExpertsConfig:
    """Images of two kinds, light and dark."""
    random = np.random.default_rng(0)
    kind_N = random.integers(0, 2, 400)
    images = np.where(kind_N, 0.8, -0.8)[:, None] + 0.1 * random.normal(size=(400, 16))
    column = pa.FixedSizeListArray.from_arrays(pa.array(images.astype(np.float32).ravel()), 16)
    pq.write_table(pa.table({"image": column, "kind": kind_N}), tmp_path / "images.parquet")
    training = {
        "steps": STEPS,
        "micro_batch_size": 8,
        "task_args": {"lr": 0.01, "model_args": {"width": 16, "depth": 1}},
    }
    document = {
        "name": f"islands{TAG}",
        "kind": "flow",
        "folder": str(tmp_path / "out"),
        "data": {
            "path": str(tmp_path / "images.parquet"),
            "column": "image",
            "shape": [1, 4, 4],
            "label": "kind",
        },
        "partition": {"num_experts": 2},
        "expert": training,
        "router": {**training, "steps": 60},
        "monolith": False,
        "ema_decay": 0.95,
        "islands": {"cpus": 0.5, "checkpoint_every": 100},
        "evaluation": {"num_samples": 60, "num_steps": 5},
    }
    return validate(ExpertsConfig, Document(document, "test"))


def kill_island(run: RunFolder) -> None:
    """SIGKILL all processes of a job that has a checkpoint."""
    wait_until(lambda: any(run.checkpoints.glob("step-*")), "a checkpoint", timeout_s=240)
    driver = int(run.read_json(run.ray_json)["pid"])
    for pid in (driver, *hosts_of(run)):
        os.kill(pid, signal.SIGKILL)


def test_a_data_set_becomes_a_repository_though_an_island_is_lost(
    cluster: str, config: ExpertsConfig
) -> None:
    partition(config)
    jobs, told = expert_jobs(config), list[str]()
    killer = threading.Thread(target=kill_island, args=(RunFolder(jobs[0].run),))
    killer.start()
    train(jobs, config.islands, told.append)
    killer.join(timeout=10)
    assert [line for line in told if "begins again" in line] == [
        f"{jobs[0].job.name}: lost (its driver ended with status -9),"
        " begins again at its newest checkpoint"
    ]
    events = [event["kind"] for event in RunFolder(jobs[0].run).read_events()]
    assert "job_resumed" in events
    assert "job_resumed" not in [event["kind"] for event in RunFolder(jobs[1].run).read_events()], (
        "a lost island delays nobody else"
    )

    train(router_jobs(config), config.islands, told.append)
    assert all(map(is_finished, (*jobs, *router_jobs(config))))
    found = evaluate(config, told.append)
    assert found["arms"]["chosen"]["measures"]["fid"]["mean"] > 0
    assert all(path.stat().st_size > 1000 for path in draw(config, found))
    assert "| shuffled (null) |" in render(found)

    repository = Repository.open(pack(config, seed=0).path)
    assert repository.manifest.selection == found["selection"]
    near = torch.stack([torch.full((1, 4, 4), -0.8), torch.full((1, 4, 4), 0.8)])
    guess = repository.load_router()(near, torch.full((2,), 0.05)).argmax(1)
    assert guess[0] != guess[1]
    assert repository.load_expert("expert-1")(near, torch.rand(2)).shape == near.shape
    assert pack(config, seed=0).expert("expert-0").version == "2"
