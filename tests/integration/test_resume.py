"""A run that ended, by order or by SIGKILL, goes on as if it had not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.core import checkpoint
from elastic.core.config import JobConfig, load_job
from elastic.core.errors import ConfigError
from elastic.core.faults import Fault
from elastic.core.runs import RunFolder
from elastic.core.store import ROOT, Store
from elastic.handle import connect
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import (
    TAG,
    Once,
    Outcome,
    kinds,
    make_job,
    outcome,
    run_job,
    wait_until,
    write_faults,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]

SLEEP_S = 0.1  # of every worker in each step, so that a step can be hit
STOP_STEP = 5


def slow_job(name: str = "resumed", *, workers: int = 2, **settings: Any) -> JobConfig:
    return make_job(name, workers=workers, steps=NUM_STEPS, **settings)


def slowly(folder: Path, *, workers: int) -> tuple[Fault, ...]:
    return write_faults(
        folder / "slow.yaml",
        [
            {"do": "slow", "at": {"step": 0}, "target": f"worker-{worker}", "sleep_s": SLEEP_S}
            for worker in range(workers)
        ],
    )


@pytest.fixture(scope="module")
def stopped_run(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was asked to stop on its way."""
    folder = tmp_path_factory.mktemp("stopped")
    stop = Once(STOP_STEP, lambda status: connect(status.run_dir).stop())
    result = run_job(
        slow_job(workers=1),
        run_dir=folder / "run",
        faults=slowly(folder, workers=1),
        on_status=stop,
    )
    assert result.metrics["outcome"] == "stopped"
    assert STOP_STEP <= result.metrics["steps"] < NUM_STEPS
    assert kinds(result)[-1] == "job_stopped"
    return folder / "run"


@pytest.fixture
def run_dir(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def test_a_stopped_run_goes_on_with_another_number_of_workers(
    undisturbed: Outcome, run_dir: Path
) -> None:
    result = run_job(slow_job(workers=2), run_dir=run_dir, resume=True)
    assert outcome(result) == undisturbed
    assert "job_resumed" in kinds(result)
    assert result.metrics["exact"] is True


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "batch": {"batch": {"micro_batches": 16, "micro_batch_size": 8}},
    "task_args": {"task_args": {"lr": 0.1}},
    "held_out": {"held_out": 8},
    "precision": {"precision": "bfloat16"},
    "init_from": {"init_from": "/elsewhere/model.safetensors"},
    "clip_norm": {"clip_norm": 1.0},
    "chunk_elements": {"chunk_elements": 32768},
}
"""What may not change in a resumed run, by the key that the message must name."""


@pytest.mark.parametrize("key", CHANGES)
def test_resume_refuses_what_changes_the_computation(key: str, run_dir: Path) -> None:
    before = RunFolder(run_dir).job_json.read_bytes()
    changed = load_job({**slow_job().model_dump(mode="json"), **CHANGES[key]})
    with pytest.raises(ConfigError, match=key):
        run_job(changed, run_dir=run_dir, resume=True)
    assert RunFolder(run_dir).job_json.read_bytes() == before


def test_resume_refuses_to_begin_anew_where_the_checkpoints_are_gone(run_dir: Path) -> None:
    folder = RunFolder(run_dir)
    shutil.rmtree(folder.checkpoints)
    before = folder.metrics_jsonl.read_bytes()
    with pytest.raises(ConfigError, match=f"holds none now.*elastic train {folder.job_json}"):
        run_job(slow_job(), run_dir=run_dir, resume=True)
    assert folder.metrics_jsonl.read_bytes() == before


_DRIVER = """
import sys
from pathlib import Path
from elastic.core.config import load_job
from elastic.core.faults import load_faults
from elastic.driver import run_job
job, faults, run_dir = sys.argv[1:]
run_job(load_job(job), run_dir=Path(run_dir), faults=load_faults(faults))
"""


@pytest.fixture
def killed_run(request: pytest.FixtureRequest, cluster: str, tmp_path: Path) -> Path:
    """The folder of a run whose driver was killed behind a checkpoint.

    With the parameter `shared` it ran on the cluster of the tests, which lives on.
    """
    return kill_driver(tmp_path, cluster if request.param == "shared" else None)


def kill_driver(tmp_path: Path, address: str | None) -> Path:
    """Begin a run with a driver of its own, on the cluster at `address` or one of its own, and kill
    the driver once a step is done behind a checkpoint."""
    job = slow_job("killed", checkpoint={"every": STOP_STEP})
    run = RunFolder(tmp_path / "run")
    run.create()
    run.write_json(tmp_path / "job.json", job.model_dump(mode="json"))
    slowly(tmp_path, workers=2)
    environment = dict(os.environ)
    if address is not None:
        environment["RAY_ADDRESS"] = address
    arguments = [str(tmp_path / "job.json"), str(tmp_path / "slow.yaml"), str(run.path)]
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, *arguments], env=environment, stdout=log, stderr=log
        )
    try:

        def is_behind_a_checkpoint() -> bool:
            assert driver.poll() is None, (tmp_path / "driver.log").read_text()
            newest = checkpoint.latest_checkpoint(run.checkpoints)
            return newest is not None and len(run.read_metrics()) > int(Path(newest).name[5:]) + 1

        wait_until(is_behind_a_checkpoint, "a step is done behind a checkpoint", timeout_s=150)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert list(ROOT.glob(f"killed{TAG}.*")), "nothing cleaned up, since nobody could"
    return run.path


@pytest.fixture
def living_store() -> Iterator[Path]:
    """A store that another living job holds."""
    store = Store.named(f"living{os.getpid()}", "run", "local")
    store.create()
    yield store.path
    store.close()
    store.remove()


@pytest.mark.parametrize("killed_run", ["own", "shared"], indirect=True)
def test_a_run_whose_driver_was_killed_goes_on(
    undisturbed: Outcome, killed_run: Path, living_store: Path
) -> None:
    """What the dead job left is removed, what belongs to the living is not."""
    before = set(ROOT.glob(f"killed{TAG}.*"))
    job = slow_job("killed", workers=1)
    result = run_job(job, run_dir=killed_run, resume=True)
    assert outcome(result) == undisturbed
    assert kinds(result).count("job_started") == kinds(result).count("job_resumed") == 1
    assert not before & set(ROOT.glob("*"))
    assert living_store.exists()


def test_what_finished_without_its_driver_is_cleared_away(
    undisturbed: Outcome, cluster: str, tmp_path: Path
) -> None:
    run = RunFolder(kill_driver(tmp_path, cluster))
    wait_until(run.result_json.exists, "the orphans have taken the last step")
    result = run_job(slow_job("killed"), run_dir=run.path, resume=True)
    assert outcome(result) == undisturbed
    assert "job_resumed" not in kinds(result)
    assert not list(ROOT.glob(f"killed{TAG}.*"))
    assert not run.ray_json.exists()
