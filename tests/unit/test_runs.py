"""The run folder: lines never mix or get lost, files are whole, runs are found by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants

from elastic.core import runs
from elastic.core.errors import ConfigError
from elastic.core.runs import (
    RunFolder,
    find_run,
    identity,
    is_copy,
    new_run_dir,
    runs_folder,
)

DEAD_PID = 2**22 + 5  # larger than any pid of Linux


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def make_run(base: Path, name: str, *, pid: int | None = None, age_s: float = 0) -> RunFolder:
    """A run; with a pid it says that it runs."""
    folder = RunFolder(base / name)
    folder.create()
    folder.write_json(folder.job_json, {"name": name})
    if pid is not None:
        folder.write_json(folder.ray_json, identity(pid))
    then_s = folder.job_json.stat().st_mtime - age_s
    os.utime(folder.job_json, (then_s, then_s))
    return folder


# --- lines -----------------------------------------------------------------------------------


def test_where_things_are(run: RunFolder) -> None:
    assert run.checkpoints.is_dir()
    names = ["job.json", "ray.json", "events.jsonl", "metrics.jsonl", "result.json", "report.png"]
    paths = [
        run.job_json,
        run.ray_json,
        run.events_jsonl,
        run.metrics_jsonl,
        run.result_json,
        run.report_png,
    ]
    assert paths == [run.path / name for name in names]
    run.create()  # again: nothing happens


def test_events_are_read_in_the_order_of_their_time(run: RunFolder) -> None:
    for time_s, kind in ((2.0, "b"), (1.0, "a"), (3.0, "c")):
        run.append_event({"time_s": time_s, "kind": kind})
    assert [event["kind"] for event in run.read_events()] == ["a", "b", "c"]


def test_the_last_line_of_a_step_counts(run: RunFolder) -> None:
    for step, loss in ((0, 9.0), (1, 8.0), (2, 7.0), (1, 6.0)):
        run.append_metrics({"step": step, "loss": loss})
    assert [line["loss"] for line in run.read_metrics()] == [9.0, 6.0, 7.0]


def test_nothing_written_yet(run: RunFolder) -> None:
    assert run.read_events() == run.read_metrics() == []


@pytest.mark.parametrize("torn", [b'{"step": 1, "lo', b"\xff\xfe", b"[1]\n", b"\n", b"3"])
def test_a_torn_line_costs_only_itself(torn: bytes, run: RunFolder) -> None:
    run.append_metrics({"step": 0})
    run.close()
    with run.metrics_jsonl.open("ab") as file:
        file.write(torn)  # by a process that died
    successor = RunFolder(run.path)
    successor.append_metrics({"step": 2})
    successor.append_metrics({"step": 3})
    assert [line["step"] for line in successor.read_metrics()] == [0, 2, 3]
    successor.close()


def test_lines_of_many_writers_never_mix(run: RunFolder) -> None:
    writers = [RunFolder(run.path) for _ in range(4)]
    long = "x" * 20_000

    def write(number: int) -> None:
        for step in range(20):
            writers[number].append_metrics({"step": 100 * number + step, "text": long})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # a writer that opens the file in the middle of another's write adds an empty line
    lines = [line for line in run.metrics_jsonl.read_bytes().splitlines() if line]
    assert len(lines) == 80
    assert all(json.loads(line)["text"] == long for line in lines)
    assert len(run.read_metrics()) == 80
    for writer in writers:
        writer.close()


def test_a_folder_crosses_processes_without_its_open_files(run: RunFolder) -> None:
    run.append_event({"time_s": 1.0})
    again = pickle.loads(pickle.dumps(run))
    assert again.path == run.path
    again.append_event({"time_s": 2.0})
    assert len(run.read_events()) == 2
    again.close()
    run.close()
    run.append_event({"time_s": 3.0})  # opened again
    assert len(run.read_events()) == 3
    run.close()


def test_the_path_does_not_depend_on_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder("here")
    monkeypatch.chdir("/")
    assert run.path == tmp_path / "here"
    assert repr(run) == f"RunFolder('{tmp_path / 'here'}')"


# --- JSON files ------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(run: RunFolder) -> None:
    run.write_json(run.result_json, {"steps": 1})
    with pytest.raises(TypeError):
        run.write_json(run.result_json, {"steps": object()})
    assert run.read_json(run.result_json) == {"steps": 1}
    run.write_json(run.result_json, {"steps": 2})
    assert run.read_json(run.result_json) == {"steps": 2}
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "result.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; is .* a run folder"),
        (b"{", "cannot be read"),
        (b"\xff\xff", "cannot be read"),
        (b"[1, 2]", "holds no JSON object"),
    ],
    ids=["missing", "torn", "not text", "a list"],
)
def test_a_file_that_cannot_be_read_is_named(
    content: bytes | None, message: str, run: RunFolder
) -> None:
    if content is not None:
        run.result_json.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"result.json: {message}"):
        run.read_json(run.result_json)


# --- running ---------------------------------------------------------------------------------


def test_a_run_runs_while_its_process_lives(
    tmp_path: Path, fork: Callable[[Callable[[], None]], Any]
) -> None:
    child = fork(lambda: None)
    run = make_run(tmp_path, "a", pid=child.pid)
    assert run.is_running()
    child.kill()
    assert not run.is_running()


HERE = identity(os.getpid())


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {**HERE, "pid": "x"},
        {**HERE, "pid": None},
        identity(DEAD_PID),
        {**HERE, "host": f"not-{HERE['host']}"},
        {**HERE, "started": HERE["started"] + 1},
    ],
    ids=["none", "empty", "text", "null", "dead", "another machine's", "a later process"],
)
def test_a_run_does_not_run(content: dict[str, Any] | None, run: RunFolder) -> None:
    if content is not None:
        run.write_json(run.ray_json, content)
    assert not run.is_running()


# --- names -----------------------------------------------------------------------------------


class Noon(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Noon:
        return cls(2026, 3, 1, 12, 0, 0)


def test_new_folders_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "datetime", Noon)
    made = [new_run_dir("lm", tmp_path / "runs") for _ in range(3)]
    assert [path.name for path in made] == [
        "lm-20260301-120000",
        "lm-20260301-120000-2",
        "lm-20260301-120000-3",
    ]
    assert all(path.is_dir() for path in made)


def test_a_run_is_found_by_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path, "x", pid=os.getpid())
    assert find_run(run.path).path == run.path
    assert find_run(str(run.path), running=False).path == run.path
    over = make_run(tmp_path, "over")
    assert find_run(over.path, running=False).path == over.path
    with pytest.raises(ConfigError, match=r"this job is not running \(any more\)"):
        find_run(over.path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        pytest.param("lm", "lm-20260102-000000", id="the newest of the job"),
        pytest.param("lm-20260101-000000", "lm-20260101-000000", id="one by its whole name"),
        pytest.param("lm-big", "lm-big-20260103-000000", id="a longer name"),
        pytest.param("lm-b", "lm-big-20260103-000000", id="its beginning"),
        pytest.param("plain", "plain", id="a folder without a date"),
    ],
)
def test_a_run_is_found_by_name(name: str, found: str, tmp_path: Path) -> None:
    make_run(tmp_path, "lm-20260101-000000", age_s=30)
    make_run(tmp_path, "lm-20260102-000000", age_s=20)
    make_run(tmp_path, "lm-big-20260103-000000", age_s=10)
    make_run(tmp_path, "plain")
    assert find_run(name, base=tmp_path, running=False).path.name == found


def test_only_running_jobs_count_where_asked(tmp_path: Path) -> None:
    make_run(tmp_path, "lm-20260101-000000", age_s=30, pid=os.getpid())
    make_run(tmp_path, "lm-20260102-000000", age_s=20, pid=DEAD_PID)
    assert find_run("lm", base=tmp_path).path.name == "lm-20260101-000000"
    assert find_run("lm", base=tmp_path, running=False).path.name == "lm-20260102-000000"


def test_an_unknown_name_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run at all"):
        find_run("x", base=tmp_path, running=False)
    make_run(tmp_path, "lm", pid=os.getpid())
    make_run(tmp_path, "done")
    with pytest.raises(ConfigError, match=r"x: no such running job in .*; there are: lm$"):
        find_run("x", base=tmp_path)
    with pytest.raises(ConfigError, match=r"no such run .*there are: done, lm$|lm, done$"):
        find_run("x", base=tmp_path, running=False)
    with pytest.raises(ConfigError):
        find_run("", base=tmp_path, running=False)


class SmallDisk(RunFolder):
    """Has room for so many more bytes."""

    room = 0

    def _write(self, descriptor: int, line: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super()._write(descriptor, line[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 5])
def test_what_a_full_disk_refuses_is_written_once_there_is_room(
    room: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SmallDisk(tmp_path)
    disk.room = 1000
    disk.append_event({"time_s": 1})
    disk.room = room
    disk.append_event({"time_s": 2})
    disk.append_event({"time_s": 3})
    assert [event["time_s"] for event in disk.read_events()] == [1]
    assert caplog.text.count("the disk is full") == 1
    disk.room = 1000
    disk.append_event({"time_s": 4})
    assert [event["time_s"] for event in disk.read_events()] == [1, 2, 3, 4]


def test_not_everything_can_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_WAITING_BYTES", 100)
    disk = SmallDisk(tmp_path)
    disk.append_event({"time_s": 1})
    with pytest.raises(OSError, match="the disk is full, and 2 lines wait"):
        disk.append_event({"text": "x" * 100})


def test_another_refusal_is_no_full_disk(run: RunFolder) -> None:
    run.events_jsonl.mkdir()
    with pytest.raises(IsADirectoryError):
        run.append_event({"time_s": 1})


# --- jobs that Ray runs in a copy of their working directory ------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A working directory where Ray puts those of jobs."""
    names = ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME, "working_dir_files", "_ray_pkg_1a2b"
    path = tmp_path.joinpath(*names)
    path.mkdir(parents=True)
    return path


def test_runs_lie_here_or_in_a_copy_where_they_survive_it(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert runs_folder() == Path("runs")
    assert new_run_dir("tiny").parent == Path("runs")
    monkeypatch.chdir(copy)
    assert runs_folder() == tmp_path / "home" / "ray_results"
    made = make_run(runs_folder(), new_run_dir("tiny").name)
    assert find_run("tiny", running=False).path == made.path


def test_a_copy_is_known_by_where_it_lies(copy: Path, tmp_path: Path) -> None:
    assert is_copy(copy)
    assert is_copy(copy / "runs" / "one")
    assert not is_copy(tmp_path)
    assert not is_copy(copy.parents[1] / "working_dir")
