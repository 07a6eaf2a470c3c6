"""Data that makes a gradient jump, or NaN, or the user's code raise: the same for any workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.core.config import JobConfig
from elastic.core.data.order import SampleStream
from elastic.core.errors import FatalError
from elastic.core.runs import RunFolder
from tests.integration.support import (
    BATCH,
    HELD_OUT,
    kinds,
    make_job,
    outcome,
    run_job,
)
from tests.integration.tasks import NUM_ROWS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]

LOUD_STEP, BROKEN_STEP, MICRO_BATCH, NUM_STEPS = 4, 7, 2, 12


def row_of(step: int) -> int:
    """A row of the data that only this step's micro-batch `MICRO_BATCH` holds."""
    stream = SampleStream(num_samples=NUM_ROWS, held_out=HELD_OUT, seed=0, split_seed=0)
    return int(stream.micro_batch(step, MICRO_BATCH, *BATCH.values())[0])


def bad_job(name: str, workers: int, action: str, **settings: Any) -> JobConfig:
    return make_job(
        name,
        **settings,
        workers=workers,
        steps=NUM_STEPS,
        task_args={"loud": [row_of(LOUD_STEP)], "broken": [row_of(BROKEN_STEP)]},
        nonfinite={"action": action},
    )


def test_an_overflow_and_a_skipped_step_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    one, three = (
        run_job(bad_job(f"bad{num}", num, "skip"), run_dir=tmp_path / str(num)) for num in (1, 3)
    )
    assert outcome(one) == outcome(three)
    assert three.metrics["overflows"] == 1
    assert three.metrics["skipped_steps"] == [BROKEN_STEP]
    attempts = {step["step"]: step["attempt"] for step in RunFolder(three.path).read_metrics()}
    assert attempts == {step: int(step in (0, LOUD_STEP)) for step in range(NUM_STEPS)}
    for result in (one, three):
        assert kinds(result).count("overflow") == 1
        assert kinds(result).count("step_skipped") == 1
        assert kinds(result).count("nonfinite") == 2


def test_a_nan_of_the_model_stops_the_job_and_says_where(tmp_path: Path) -> None:
    where = f"step {BROKEN_STEP}, micro-batch {MICRO_BATCH}: .* not finite on two tries"
    with pytest.raises(FatalError, match=f"{where}; nonfinite.action: skip would skip the step"):
        run_job(bad_job("stops", 2, "stop"), run_dir=tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.read_json(run.result_json)["outcome"] == "failed"
    assert run.read_json(run.result_json)["steps"] == BROKEN_STEP
    assert run.read_events()[-1]["kind"] == "job_failed"
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{BROKEN_STEP:08d}"]


def test_an_error_of_the_users_code_stops_the_job_and_is_shown(tmp_path: Path) -> None:
    """The worker that takes the place of the first one fails alike: it is not the machine."""
    job = bad_job("raises", 1, "stop", task="tests.fault.tasks:FailsOnBroken")
    with pytest.raises(FatalError, match="LookupError: no label for this row") as caught:
        run_job(job, run_dir=tmp_path / "run")
    assert "tasks.py" in str(caught.value), "the traceback leads to the line"
    run = RunFolder(tmp_path / "run")
    assert run.read_events()[-1]["kind"] == "job_failed"
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{BROKEN_STEP:08d}"]
