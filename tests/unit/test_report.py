"""The run report: the story read from a run folder, and a picture of runs of every size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from elastic.core.errors import ConfigError
from elastic.report.marks import AGGREGATOR, JOIN, KILL, LOST, STOP
from elastic.report.picture import draw_picture
from elastic.report.story import busy_share, read_story
from tests.fake_run import FAULTS, MICRO_BATCHES, FakeRun


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    """A finished run of 120 steps with faults."""
    fake = FakeRun(tmp_path / "run", num_steps=120)
    fake.run(FAULTS)
    fake.finish()
    return fake


def test_the_story_holds_every_step_and_every_fault(run: FakeRun) -> None:
    story = read_story(run.folder.path)
    assert story.step.tolist() == list(range(120))
    assert len(story.work.worker) >= 120 * MICRO_BATCHES
    categories = [mark.category for mark in story.marks if mark.is_fault]
    assert categories[:4] == [KILL, STOP, AGGREGATOR, JOIN]
    assert story.workers.tolist() == [0, 1, 2, 3, 4, 5, 6]
    lost = [mark for mark in story.marks if mark.category == LOST]
    assert [life[2] for life in story.lives if life[0] == 3] == [lost[0].time_s]


def test_the_zoom_shows_the_faults(run: FakeRun) -> None:
    story = read_story(run.folder.path)
    zoom = story.zoom()
    assert zoom is not None
    inside = {mark.category for mark in story.marks if zoom[0] <= mark.time_s <= zoom[1]}
    assert {KILL, STOP, AGGREGATOR, JOIN} <= inside


def test_a_quiet_run_is_zoomed_at_its_slowest_step(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=200)
    fake.run({})
    zoom = read_story(tmp_path).zoom()
    assert zoom is not None
    story = read_story(tmp_path)
    assert zoom[0] <= story.time_s[np.argmax(story.step_s)] <= zoom[1]


def test_the_pause_before_a_resume_is_cut_out(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=5)
    fake.run({})
    fake.now_s += 5000
    fake.event("job_resumed", 5)
    fake.now_s += 0.1
    fake.num_steps = 6
    fake._step(5, None)
    story = read_story(tmp_path)
    assert story.time_s[-1] - story.time_s[-2] < 3


def test_busy_share_counts_no_second_twice(run: FakeRun) -> None:
    story = read_story(run.folder.path)
    share = busy_share(story.work, 0, np.linspace(story.first_step_s, story.end_s, 50))
    assert share.shape == (49,)
    assert 0.6 < share.mean() <= 1.0
    assert (busy_share(story.work, 999, np.linspace(0, 1, 5)) == 0).all()


@pytest.mark.parametrize("num_steps", [1, 20, 3000])
def test_runs_of_every_size_are_drawn(tmp_path: Path, num_steps: int) -> None:
    fake = FakeRun(tmp_path, num_steps=num_steps)
    fake.run({} if num_steps == 1 else {5: "kill", 9: "aggregator"})
    path = draw_picture(tmp_path)
    assert path == tmp_path / "report.png"
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_torn_or_empty_run_is_drawn_or_refused_in_words(tmp_path: Path, run: FakeRun) -> None:
    with run.folder.metrics_jsonl.open("a") as file:
        file.write('{"step": 120, "time')
    assert draw_picture(run.folder.path, tmp_path / "deep" / "x.png").exists()
    with pytest.raises(ConfigError, match=r"is .* a run folder"):
        draw_picture(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "job.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(ConfigError, match="no step has been committed"):
        draw_picture(tmp_path / "empty")
