"""Jobs beside each other on one cluster, in one process and in several, as if each were alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ray.train import RunConfig

from elastic import ElasticTrainer, Result
from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import TAG, Outcome, kinds, make_job, outcome, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

DRIVER = """
import sys
from elastic import ElasticTrainer
from ray.train import RunConfig
job, folder, name = sys.argv[1:]
ElasticTrainer(job=job, run_config=RunConfig(name=name, storage_path=folder)).fit()
"""


def start_driver(folder: Path, name: str, cluster: str, *, steps: int) -> subprocess.Popen[bytes]:
    """Another process that fits the tiny job."""
    run = RunFolder(folder)
    job = make_job(name, steps=steps)
    run.write_json(folder / f"{name}.json", job.model_dump(mode="json"))
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder / f"{name}.json"), str(folder), name + TAG],
            env={**os.environ, "RAY_ADDRESS": cluster},
            stdout=log,
            stderr=log,
        )


def test_jobs_do_not_disturb_each_other(undisturbed: Outcome, cluster: str, tmp_path: Path) -> None:
    """Two on threads, one in another process, and one whose driver is killed on the way."""
    results: dict[str, Result] = {}
    killed_run = RunFolder(tmp_path / f"killed{TAG}")

    def fit(name: str) -> None:
        config = RunConfig(name=name + TAG, storage_path=str(tmp_path))
        job = make_job(name, steps=NUM_STEPS)
        results[name] = ElasticTrainer(job=job, run_config=config).fit()

    other = start_driver(tmp_path, "other", cluster, steps=NUM_STEPS)
    killed = start_driver(tmp_path, "killed", cluster, steps=100_000)
    threads = [threading.Thread(target=fit, args=(name,)) for name in ("one", "two")]
    try:
        wait_until(killed_run.newest_metrics, "the one to be killed trains", timeout_s=120)
        for thread in threads:
            thread.start()
        with pytest.raises(ConfigError, match="this job is running"):
            fit("killed")
        killed.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(timeout=150)
        assert other.wait(timeout=150) == 0, (tmp_path / "other.log").read_text()
    finally:
        for process in (other, killed):
            process.kill()
            process.wait()
    assert outcome(results["one"]) == undisturbed
    assert outcome(results["two"]) == undisturbed
    told = RunFolder(tmp_path / f"other{TAG}")
    assert told.read_json(told.result_json)["params_sha256"] == undisturbed.params_sha256
    fit("killed")  # ends what its driver left, and begins again: it had no checkpoint
    assert outcome(results["killed"]) == undisturbed
    for result in (results["one"], results["two"]):
        assert not {"worker_lost", "aggregator_lost"} & set(kinds(result))
