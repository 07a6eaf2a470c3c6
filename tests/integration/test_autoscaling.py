"""A job asks Ray's autoscaler for the hosts that it lacks, and takes them when they come.

Ray's own autoscaler, with its fake cloud: a host is one more raylet on this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions

from elastic.core.runs import RunFolder
from tests.integration.heads import Head, started_head
from tests.integration.support import make_job, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_MORE = 1


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster of one host, which can become two."""
    with started_head(tmp_path_factory.mktemp("scaled") / "home", num_more=NUM_MORE) as made:
        yield made


def waiting(head: Head) -> list[int]:
    """For how many hosts the jobs of the cluster ask: the bundles of each pending group."""
    state = GlobalState()  # type: ignore[no-untyped-call]
    options = GcsClientOptions.create(
        head.gcs, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
    )
    state._initialize_global_state(options)  # type: ignore[no-untyped-call]
    groups = state.placement_group_table().values()  # type: ignore[no-untyped-call]
    return [len(one["bundles"]) for one in groups if one["state"] != "REMOVED"]


def elastic(head: Head, *words: str | Path) -> list[str]:
    return [sys.executable, "-m", "elastic", *map(str, words)]


def run(head: Head, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**head.environment, "RAY_ADDRESS": head.gcs}
    return subprocess.run(
        elastic(head, *words), env=environment, capture_output=True, text=True, timeout=60
    )


def seen(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [one for one in folder.read_events() if one["kind"] == kind]


def test_a_job_asks_for_hosts_and_takes_them(head: Head, tmp_path: Path) -> None:
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "driver.log"
    job = make_job(
        "asks", workers=2, steps=100_000, nodes={"min": 1, "max": 3}, evaluate={"every": 0}
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    with log.open("w") as file:
        driver = subprocess.Popen(
            elastic(head, "train", tmp_path / "job.yaml", "--run-dir", folder.path),
            env={**head.environment, "RAY_ADDRESS": head.gcs},
            stdout=file,
            stderr=file,
        )
    try:
        wait_until(lambda: seen(folder, "node_joined"), f"a host comes: {log}", timeout_s=100)
        assert "asks for 1 more: 1 of 2 hosts" in seen(folder, "nodes_asked")[0]["reason"]
        wait_until(lambda: waiting(head) == [], "two workers have a host each", timeout_s=20)
        scaled = run(head, "scale", folder.path, "--nodes", "3", "--workers", "3")
        assert scaled.returncode == 0, scaled.stderr
        wait_until(lambda: waiting(head) == [1], "the cloud has no third one", timeout_s=20)
        _kill_coordinator()
        wait_until(lambda: seen(folder, "coordinator_restarted"), "it is back", timeout_s=60)
        wait_until(lambda: waiting(head) == [1], "it still asks for one", timeout_s=20)
        assert run(head, "stop", folder.path).returncode == 0
        assert driver.wait(timeout=60) == 0, log.read_text()
        assert waiting(head) == []
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _kill_coordinator() -> None:
    (pid,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.read_bytes().startswith(b"ray::CoordinatorActor") and _is_ours(path.parent)
    ]
    os.kill(pid, signal.SIGKILL)


def _is_ours(process: Path) -> bool:
    """Not one of another cluster on this machine."""
    return b"RAY_FAKE_CLUSTER=1" in (process / "environ").read_bytes()
