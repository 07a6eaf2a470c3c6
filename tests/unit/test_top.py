"""The live view: who computes, how fast, what is wrong, where the time goes."""

from __future__ import annotations

import io
import subprocess
import threading
from pathlib import Path

import pytest
from rich.console import Console

from elastic.cli import main
from elastic.core.runs import identity
from elastic.top import MOST_WORKERS, STYLES, View, bar_of, pace_style, spark, stacked
from monitoring.account import PARTS
from tests.fake_run import FAULTS, FakeRun


def shown(view: View, width: int = 110) -> str:
    """The screen as text."""
    view.read()
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view.frame())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def fake(tmp_path: Path) -> FakeRun:
    fake = FakeRun(tmp_path, num_steps=120)
    fake.run({**FAULTS, 90: "slow"})
    return fake


def test_it_shows_workers_their_paces_and_where_the_time_went(fake: FakeRun) -> None:
    text = shown(View(fake.folder))
    assert "120/120 steps" in text
    assert "workers 5" in text
    (slow,) = (line for line in text.splitlines() if line.startswith("│    2 "))
    assert "2." in slow  # its pace; three times that of a fast one
    assert "goodput" in text
    assert "productive" in text
    assert "job finished" in text
    assert "none: nobody is slow" in text


def test_a_verdict_is_shown_with_its_reason_until_it_ends(fake: FakeRun) -> None:
    name = {"kind": "slow computation", "culprit": "worker 2"}
    view = View(fake.folder)
    fake.event("verdict", 100, worker=2, reason="slow computation: very slow", verdict=name)
    text = shown(view)
    assert "verdicts 1, 1 so far" in text
    assert "◆ slow computation: very slow" in text
    assert "│    2 ◆" in text
    fake.event("verdict_ended", 110, reason="no longer", verdict=name)
    assert "verdicts 0, 1 so far" in shown(view)


def test_of_many_workers_the_slowest_are_shown(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=40)
    fake.workers = dict.fromkeys(range(40), 1.0) | {17: 2.0}
    for worker in fake.workers:
        fake.event("worker_joined", 0, worker=worker)
    fake.run({})
    text = shown(View(fake.folder))
    assert f"workers 40, the {MOST_WORKERS} slowest" in text


def test_before_the_first_step_there_is_little_to_show(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=40)
    text = shown(View(fake.folder))
    assert "0/40 steps" in text
    assert "worker-3 joined" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_the_terminal(fake: FakeRun, width: int) -> None:
    lines = shown(View(fake.folder), width).splitlines()
    assert max(map(len, lines)) <= width


def test_from_the_command_line(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["top", str(fake.folder.path)])
    assert end.value.code == 0
    assert "120/120 steps" in capsys.readouterr().out


def test_a_running_job_is_watched_until_it_ends(
    fake: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(["sleep", "0.7"]) as driver:
        ended = threading.Thread(target=driver.wait)
        ended.start()
        fake.folder.write_json(fake.folder.ray_json, identity(driver.pid))
        with pytest.raises(SystemExit) as end:
            main(["top", str(fake.folder.path)])
        ended.join()
    assert end.value.code == 0
    assert "120/120 steps" in capsys.readouterr().out


def test_bars_and_curves() -> None:
    assert bar_of(0.5, 4) == "██  "
    assert bar_of(1 / 32, 4) == "▏   "
    assert bar_of(7.0, 2) == "██"
    assert spark([1, 2, 3]) == "▁▅█"
    assert spark([2, 2]) == "▁▁"
    assert spark([]) == ""
    assert len(spark(list(range(1000)), width=60)) <= 60
    assert (pace_style(None), pace_style(1.0), pace_style(1.2), pace_style(9.0)) == (
        "dim", "green", "yellow", "red",
    )  # fmt: skip


def test_the_bar_of_parts_is_as_long_as_they_are() -> None:
    shares = {**dict.fromkeys(PARTS, 0.0), "productive": 0.5, "waiting": 0.49, "other": 0.01}
    line = stacked(shares, 40)
    assert len(line.plain) == 40
    assert {str(span.style) for span in line.spans if span.end > span.start} == {
        STYLES["productive"], STYLES["waiting"], STYLES["other"],
    }  # fmt: skip
    assert set(STYLES) == set(PARTS)
