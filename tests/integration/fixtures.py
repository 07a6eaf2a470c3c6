"""Fixtures of the tests on real processes: one Ray cluster, the run to compare with, tidiness."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from elastic.cluster import local_cluster
from elastic.driver import run_job
from tests.integration.support import Outcome, hosts_below, leftovers, make_job, outcome, wait_until
from tests.s3 import CREDENTIALS

NUM_STEPS = 40
"""Of the job that disturbed runs are compared with."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A Ray cluster on this machine, shared by the jobs of all tests. Its address."""
    os.environ.update(CREDENTIALS)  # its processes read and write buckets
    with local_cluster() as address:
        yield address


_UNDISTURBED: list[Outcome] = []  # each folder that imports a fixture sets it up once


@pytest.fixture(scope="session")
def undisturbed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What `NUM_STEPS` steps of the tiny job give on one worker that nothing happens to."""
    if not _UNDISTURBED:
        job = make_job("undisturbed", steps=NUM_STEPS)
        run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
        _UNDISTURBED.append(outcome(run_job(job, run_dir=run_dir)))
    return _UNDISTURBED[0]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """After each test no store, no mapping of one, no worker and no aggregator of ours is left."""
    yield
    try:
        wait_until(lambda: not leftovers(), "everything is cleaned up", timeout_s=20)
    except AssertionError:
        found = leftovers()
        for pid in hosts_below(os.getpid()):
            os.kill(pid, signal.SIGKILL)  # so that the next test starts clean
        raise AssertionError(f"left behind: {', '.join(found)}") from None
