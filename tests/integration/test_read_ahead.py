"""Examples whose data is read ahead from Parquet: who reads what, and when, changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import examples
from elastic.core.config import JobConfig, load_job
from elastic.driver import run_job
from tests.integration.support import TAG, outcome

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]


def example(name: str, num_workers: int, data: Path) -> JobConfig:
    path = Path(examples.__file__).parent / name / "job.yaml"
    workers = f"workers={{start: {num_workers}, spare: 0}}"
    settings = [f"name={name}{TAG}", f"task_args.data={data}", workers]
    return load_job(path, [*settings, "steps=20", "standby=false"])


@pytest.mark.parametrize("name", ["images", "padded_text"])
def test_one_worker_and_three_learn_the_same(name: str, tmp_path: Path) -> None:
    one, three = (
        run_job(example(name, num, tmp_path / "data.parquet"), run_dir=tmp_path / str(num))
        for num in (1, 3)
    )
    assert outcome(one) == outcome(three)
    assert three.metrics["loss"] < 0.8 * three.metrics["first_loss"]
