"""What goes into the page of a run: everything of a short run, the right things of a long one."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from elastic.core.errors import ConfigError
from elastic.report import thinning
from elastic.report.diagnosis import diagnose
from elastic.report.packed import Packed, pack
from elastic.report.page import SCRIPTS, write_page
from elastic.report.page_data import (
    DUPLICATE,
    EVALUATION,
    GRANTED,
    duration,
    page_data,
)
from elastic.report.story import Story, read_story
from elastic.report.thinning import Limits, choose_events, choose_steps, choose_work, smoothed
from tests.fake_run import FAULTS, MICRO_BATCHES, START_S, FakeRun

PAGE_FILES = Path(thinning.__file__).parent / "page_files"


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """A finished run of 120 steps with faults and evaluations."""
    fake = FakeRun(tmp_path, num_steps=120)
    fake.run(FAULTS)
    fake.finish()
    return read_story(tmp_path)


@pytest.fixture
def long_story(tmp_path: Path) -> Story:
    """3000 steps with two faults and one step whose loss is not finite."""
    fake = FakeRun(tmp_path, num_steps=3000, is_watched=True)
    fake.event("checkpoint_failed", 0, reason="no space left on device")
    fake.run({1234: "kill", 2345: "aggregator"})
    return read_story(tmp_path)


def unpack(packed: Packed) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(packed["data"]), dtype="<" + packed["type"])


def chart(data: dict[str, Any], title: str) -> dict[str, npt.NDArray[Any]]:
    """The curves of a chart by name."""
    (found,) = (one for one in data["charts"] if one["title"] == title)
    return {curve["name"]: unpack(curve["y"]) for curve in found["curves"]}


def test_a_short_run_is_whole(story: Story) -> None:
    data = page_data(story, is_running=False)
    assert unpack(data["steps"]["step"]).tolist() == list(range(120))
    assert unpack(data["steps"]["time_s"]).tolist() == story.time_s.tolist()
    assert chart(data, "Loss")["each step"].tolist() == story.loss.tolist()
    assert chart(data, "Step time")["each step"] == pytest.approx(story.step_s * 1000)
    assert chart(data, "Workers")["in the step"].tolist() == story.num_workers.tolist()
    assert len(data["events"]) == len(story.events)
    assert not [note for note in data["notes"] if " of " in note]


def test_metrics_and_evaluations_have_their_curves(story: Story) -> None:
    data = page_data(story, is_running=False)
    assert chart(data, "accuracy")["each step"][0] == pytest.approx(0.5)
    assert chart(data, "accuracy")["evaluation"].tolist() == [0.5] * 3
    assert chart(data, "Loss")["evaluation"].tolist() == pytest.approx(
        [1.95, 1.825, 1.7 + 10 / 120]
    )
    assert ["evaluation loss", "1.7833", "at step 120"] in data["summary"]


def test_every_micro_batch_is_on_the_timeline_with_its_outcome(story: Story) -> None:
    data = page_data(story, is_running=False)
    flags = unpack(data["bars"]["flags"])
    trained = flags & EVALUATION == 0
    assert int(trained.sum()) == len(story.work.step) > 120 * MICRO_BATCHES
    assert int((~trained).sum()) == len(story.evaluation_work.step)
    assert int((flags[trained] & GRANTED == 0).sum()) == int((~story.work.granted).sum()) > 0
    again = (flags & DUPLICATE > 0) & trained
    assert int(again.sum()) == len(story.work.step) - 120 * MICRO_BATCHES
    rows = unpack(data["bars"]["row"])
    assert {data["workers"][row] for row in rows} == set(story.workers.tolist())
    ((from_s, to_s),) = data["bars"]["spans_s"]
    assert (from_s, to_s) == (story.first_step_s, story.time_s[-1])


def test_faults_are_told_apart_from_what_was_noticed(story: Story) -> None:
    events = page_data(story, is_running=False)["events"]
    assert [event["step"] for event in events if event["fault"]] == list(FAULTS)
    lost = [event for event in events if event["kind"] == "worker lost"]
    assert [event["fault"] for event in lost] == [False] * 2


def test_the_state_of_a_run(story: Story, tmp_path: Path) -> None:
    assert page_data(story, is_running=False)["exact"] is True
    running = page_data(story, is_running=True)
    assert (running["state"], running["exact"], running["result"]) == ("running", None, None)
    (tmp_path / "result.json").unlink()
    assert page_data(read_story(tmp_path), is_running=False)["state"] == "interrupted"


def test_records_that_died_with_an_aggregator_are_told_of(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=3)
    fake.run({})
    (line,) = (one for one in fake.folder.read_metrics() if one["step"] == 2)
    fake.folder.append_metrics({**line, "work": line["work"][:5]})
    notes = page_data(read_story(tmp_path), is_running=False)["notes"]
    assert [note for note in notes if "died: 2." in note]


def test_a_long_run_keeps_extremes_faults_and_what_is_not_finite(long_story: Story) -> None:
    loss = long_story.loss.copy()
    loss[777] = np.nan
    step_s = long_story.step_s.copy()
    step_s[1500] = 99.0
    chosen = choose_steps(long_story, [loss, step_s], most=300)
    assert len(chosen) < 330
    assert {0, 777, 778, 1234, 1500, 2345, 2999} <= set(chosen.tolist())
    assert {int(np.nanargmin(loss)), int(np.nanargmax(loss))} <= set(chosen.tolist())
    beside = np.isin(np.arange(3000), np.arange(600, 700))
    fewer = choose_steps(long_story, [loss], most=400)
    more = choose_steps(long_story, [loss], most=400, beside=beside)
    assert set(fewer.tolist()) < set(more.tolist())
    assert len(fewer) < len(more) <= 400
    assert choose_steps(long_story, [loss], most=3000).tolist() == list(range(3000))


def test_micro_batches_are_kept_in_whole_steps_and_around_faults(long_story: Story) -> None:
    most = 4000
    keep = choose_work(long_story, most=most)
    assert most * 0.8 < keep.sum() <= most
    kept = set(long_story.work.step[keep].tolist())
    assert set(long_story.work.step[~keep].tolist()).isdisjoint(kept)
    assert {0, 1233, 1234, 1235, 2344, 2345, 2346, 2999} <= kept
    assert int(np.argmax(long_story.step_s)) in kept
    quiet = [step for step in kept if 400 < step < 1100]
    assert len(quiet) > 10  # samples of what is usual
    assert choose_work(long_story, most=len(keep)).all()


def test_only_routine_events_are_left_out(long_story: Story) -> None:
    events = choose_events(long_story, most=5)
    assert len(events) < len(long_story.events)
    for kind in ("fault", "worker_lost", "aggregator_took_over", "checkpoint_failed"):
        assert [one for one in events if one.kind == kind] == [
            one for one in long_story.events if one.kind == kind
        ]
    assert sum(one.kind == "checkpoint_written" for one in events) == 5


def test_a_long_run_says_what_it_left_out(long_story: Story) -> None:
    whole = len(json.dumps(page_data(long_story, is_running=False)))
    limits = Limits(steps=200, micro_batches=2000, routine_events=5)
    data = page_data(long_story, is_running=False, limits=limits)
    assert len(data["notes"]) == 3
    assert f"of {len(long_story.work.step):,} micro-batches" in " ".join(data["notes"])
    assert len(json.dumps(data)) < whole / 3
    assert len(data["bars"]["spans_s"]) > 10


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_runs_of_a_few_steps_have_a_page(tmp_path: Path, num_steps: int) -> None:
    FakeRun(tmp_path, num_steps=num_steps).run({})
    assert write_page(tmp_path) == tmp_path / "report.html"


def test_the_page_is_one_file_that_asks_for_nothing(story: Story, tmp_path: Path) -> None:
    text = write_page(tmp_path, tmp_path / "deep" / "x.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|@import|url\(|\bfetch\(""", text)
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, never asked for
    assert "default-src 'none'" in text
    assert not re.search(r"{{\w+}}", text)


def test_text_of_the_user_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=2)
    job = {**fake.folder.read_json(fake.folder.job_json), "name": "</script><b>x", "note": "{{x}}"}
    fake.folder.write_json(fake.folder.job_json, job)
    fake.run({})
    text = write_page(tmp_path).read_text()
    assert "<b>x" not in text
    (data,) = re.findall(r'<script type="application/json" id="run">(.*)</script>', text)
    assert json.loads(data)["name"] == "</script><b>x"
    assert json.loads(data)["job"]["note"] == "{{x}}"


def test_the_account_the_causes_and_the_heatmap_are_on_the_page(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=120, is_watched=True)
    fake.run(FAULTS)
    found = page_data(read_story(tmp_path), is_running=False)["diagnosis"]
    seconds = {name: took_s for name, took_s, _ in found["account"]["parts"]}
    assert sum(seconds.values()) == pytest.approx(found["account"]["wall_s"], rel=0.01)
    assert "worker killed" in {one["what"] for one in found["causes"]}
    cells = unpack(found["heat"]["cells"]).reshape(found["heat"]["rows"], -1)
    assert cells.shape == (7, len(unpack(found["heat"]["edges_s"])) - 1)
    slow, before = cells[2, 70:], cells[2, :60]  # three times as long since step 60
    assert slow[slow > 0].mean() > 230
    assert 90 < before[before > 0].mean() < 150


def test_verdicts_of_a_watched_run_are_those_that_its_events_tell(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=120, is_watched=True)
    fake.run({60: "slow"})
    name = {"kind": "slow computation", "culprit": "worker 2"}
    more = {"since_step": 61, "confidence": 0.9, "evidence": {}}
    told = "slow computation: worker 2 is slow"
    at_s = fake.folder.read_metrics()[70]["time_s"]
    fake.event("verdict", 70, worker=2, reason=told, time_s=at_s, verdict={**name, **more})
    ended_s = fake.folder.read_metrics()[90]["time_s"]
    fake.event("verdict_ended", 90, reason="no longer", time_s=ended_s, verdict=name)
    (cause,) = (
        one for one in diagnose(read_story(tmp_path)).causes if one.what == "slow computation"
    )
    assert (cause.step, cause.who, cause.worker) == (61, "worker 2", 2)
    assert cause.reason == "worker 2 is slow"
    assert cause.end_s == pytest.approx(ended_s - START_S)
    assert cause.cost_s > 0


def test_all_files_of_the_page_are_used() -> None:
    wanted = {"page.html", "page.css", *(f"{name}.js" for name in SCRIPTS)}
    assert {path.name for path in PAGE_FILES.iterdir()} == wanted


def test_a_run_without_a_step_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match="no step has been committed"):
        write_page(tmp_path)


def test_a_mean_ignores_what_is_not_finite_and_narrows_at_the_ends() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    assert smoothed(values, half=1).tolist() == [1.0, 1.5, 3.0, 6.5, 9.0]
    assert np.isnan(smoothed(np.array([np.nan]), half=1)).all()


def test_arrays_are_packed_little_endian() -> None:
    assert pack(np.array([1, 258]), "<u2") == {"type": "u2", "data": "AQACAQ=="}


@pytest.mark.parametrize(
    ("time_s", "words"), [(3.14, "3.1 s"), (320, "5 min 20 s"), (7980, "2 h 13 min")]
)
def test_durations_in_words(time_s: float, words: str) -> None:
    assert duration(time_s) == words
