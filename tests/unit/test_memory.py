"""A model that leaves no room for its workers is refused before they start."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.core.errors import TaskError
from elastic.core.layout import make_layout
from elastic.core.memory import check_memory

LAYOUT = make_layout([[("weight", (1024, 1024))]], chunk_elements=2**20)  # 4 MiB


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {16 * 1024} kB\n")
    return path


def test_workers_that_fit_pass(meminfo: Path, tmp_path: Path) -> None:
    check_memory(LAYOUT, 4, meminfo=meminfo, cgroup=tmp_path / "none")
    check_memory(LAYOUT, 1)


def test_too_many_are_refused_with_need_and_setting(meminfo: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        check_memory(LAYOUT, 5, meminfo=meminfo, cgroup=tmp_path / "none")
    message = str(caught.value)
    assert "5 workers need 20 MiB (4 MiB each) and 16 MiB of memory are available" in message
    assert "workers.start" in message


@pytest.mark.parametrize(("limit", "fits"), [("max", True), (str(12 * 2**20), False)])
def test_the_limit_of_a_container_counts(
    limit: str, fits: bool, meminfo: Path, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{2**20}\n")
    if fits:
        check_memory(LAYOUT, 4, meminfo=meminfo, cgroup=tmp_path)
        return
    with pytest.raises(TaskError, match="11 MiB of memory are available"):
        check_memory(LAYOUT, 4, meminfo=meminfo, cgroup=tmp_path)
