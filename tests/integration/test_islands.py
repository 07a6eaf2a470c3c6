"""Where islands run: on nodes with their labels, or nowhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray

from actors.launch import RemoteIsland
from tests.integration.support import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

SCRIPT = "import os; print(os.environ['WORD'])"


@contextlib.contextmanager
def island(labels: Mapping[str, str], log: Path) -> Iterator[RemoteIsland]:
    """One that writes a word into its log."""
    command = [sys.executable, "-c", SCRIPT]
    where = {"environment": {"WORD": "here"}, "folder": str(log.parent), "log": str(log)}
    made = RemoteIsland(0.01, labels, command, **where)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.usefixtures("cluster")
def test_an_island_runs_where_its_labels_are_and_waits_where_they_are_not(tmp_path: Path) -> None:
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # each node has this one
    with (
        island({"place": "nowhere"}, tmp_path / "nowhere.log") as waiting,
        island({**here, "place": "nowhere"}, tmp_path / "half.log") as half,
        island(here, tmp_path / "here.log") as running,
    ):
        wait_until(lambda: running.poll() is not None, "the island has ended", timeout_s=60)
        assert running.poll() == ""
        assert (tmp_path / "here.log").read_text() == "here\n"
        assert (waiting.poll(), half.poll()) == (None, None)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["here.log"]
