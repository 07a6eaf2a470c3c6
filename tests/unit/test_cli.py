"""The command line against a fake trainer: what is called, printed, and returned to the shell."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from elastic.cli import main
from elastic.core.checkpoint import write_checkpoint
from elastic.core.config import load_job
from elastic.core.errors import ConfigError
from elastic.core.runs import RunFolder, find_run, identity, new_run_dir
from elastic.core.status import Status, write_status
from elastic.core.storage import LocalStorage
from elastic.progress import LiveProgress, PlainProgress

JOB = """\
name: tiny
task: some.module:Task
steps: 20
batch: {micro_batches: 4, micro_batch_size: 1}
"""

EVENTS = (
    {"time_s": 10.0, "kind": "job_started", "step": 0, "worker": None, "reason": ""},
    {"time_s": 12.0, "kind": "worker_joined", "step": 0, "worker": 1, "reason": "start"},
    {"time_s": 12.5, "kind": "fault", "step": 3, "worker": 1, "reason": "kill worker-1 at x"},
)


def a_status(step: int, events: Any = (), run_dir: str = "runs/tiny") -> Status:
    """A status of a job that trains."""
    return Status(
        phase="training",
        num_steps=20,
        run_dir=run_dir,
        step=step,
        loss=2.5,
        first_loss=5.0,
        samples_per_s=1234.0,
        step_s_median=0.02,
        num_workers=3,
        num_spare=1,
        num_nodes=2,
        target_nodes=3,
        target_workers=4,
        generation=7,
        aggregator="pid 42 + standby",
        events=events,
    )


class FakeTrainer(types.ModuleType):
    """Stands where `elastic.driver` and `elastic.handle` would be; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__("elastic.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def run_job(self, job: Any, *, on_status: Callable[[Status], None], **more: Any) -> Any:
        """Pretend to train."""
        self.calls.append(("run_job", job, more))
        if self.error is not None:
            raise self.error
        for step in (1, 5, 10, 20):
            on_status(a_status(step, EVENTS[: 2 + step // 10 * 2]))
        metrics = {
            "steps": 20,
            "loss": 2.5,
            "first_loss": 5.0,
            "exact": True,
            "params_sha256": "ab" * 32,
            "samples_sha256": "cd" * 32,
            "wall_s": 75.0,
            "step_s_median": 0.02,
            "evaluation": {"step": 20, "loss": None, "metrics": {"accuracy": 0.75}},
        }
        return types.SimpleNamespace(metrics=metrics, events=EVENTS)

    def connect(self, name: str) -> Any:
        """Pretend to find a running job."""
        return types.SimpleNamespace(
            status=lambda: a_status(5, EVENTS),
            scale=lambda *wanted: self.calls.append(("scale", name, *wanted)),
            stop=lambda: self.calls.append(("stop", name)),
            undo=lambda culprit: self.calls.append(("undo", culprit)) or ["restart worker 3"],
        )


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrainer:
    """A fake trainer, and an empty current directory with a job file."""
    fake = FakeTrainer()
    monkeypatch.setitem(sys.modules, "elastic.driver", fake)
    monkeypatch.setitem(sys.modules, "elastic.handle", fake)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "job.yaml").write_text(JOB)
    return fake


def run(*arguments: str) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_train_passes_on_what_was_asked(
    trainer: FakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faults.yaml").write_text("- {do: add_worker, at: {step: 3}}\n")
    assert run("train", "job.yaml", "seed=3", "workers.start=2", "--faults", "faults.yaml") == 0
    ((_, job, more),) = trainer.calls
    assert (job.seed, job.workers.start, job.steps) == (3, 2, 20)
    assert [fault.do for fault in more["faults"]] == ["add_worker"]
    assert more["run_dir"].parent == Path("runs")
    assert more["run_dir"].name.startswith("tiny-")
    assert not more["resume"]
    assert os.getcwd() in sys.path


def test_train_without_a_terminal_prints_lines(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "job.yaml", "--run-dir", "here") == 0
    out = capsys.readouterr().out
    assert out.count("tiny: step ") == 3
    assert "loss 2.5000 (from 5.0000)" in out
    assert "workers 3/4 + 1 spare" in out
    assert "nodes 2/3" in out
    assert out.count("kill worker-1 at x") == 1
    assert "ab" * 32 in out
    assert "1:15 min" in out
    assert "loss not finite, accuracy 0.7500 at step 20" in out
    assert "1 fault" in out
    assert "yes: no fault changed the result" in out


def test_a_log_has_a_line_for_each_thing_however_long(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A path that is cut in two cannot be copied out of the log of a cluster's job."""
    far = tmp_path / ("x" * 90)
    assert run("train", "job.yaml", "--run-dir", far) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert f"run folder     {far}" in lines
    console = Console(file=io.StringIO(), force_terminal=False)
    event = {"time_s": 0.0, "kind": "checkpoint_written", "reason": "y" * 95}
    PlainProgress(console, "tiny").show(a_status(1, [event]))
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 1


def test_the_live_display_prints_each_event_once() -> None:
    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    with LiveProgress(console, "tiny") as progress:
        progress.show(Status(phase="starting", num_steps=20, run_dir="x"))
        progress.show(a_status(1, EVENTS[:2]))
        progress.show(a_status(2, EVENTS[:3]))
        progress.show(a_status(20, EVENTS[1:]))
    text = console.export_text()
    assert text.count("worker-1 joined") == 1
    assert text.count("kill worker-1") == 1
    assert "20/20 steps" in text


def test_wrong_files_give_every_error_and_code_1(
    trainer: FakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\nstepps: 3\n")
    assert run("train", "bad.yaml", "seed=x") == 1
    error = capsys.readouterr().err
    for words in ("bad.yaml:2: stepps: unknown", "batch: missing", "command line: seed: got 'x'"):
        assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()
    assert not trainer.calls


def test_a_failure_of_the_job_gives_code_1(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.error = ConfigError("shared memory: needs 3 GB [free: 1 GB]")
    assert run("train", "job.yaml") == 1
    assert "error: shared memory: needs 3 GB [free: 1 GB]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("scale", "tiny"),
        ("scale", "tiny", "--workers", "0"),
        ("scale", "tiny", "--nodes", "0"),
        ("nonsense",),
        ("simulate", "nonsense"),
    ],
)
def test_commands_that_make_no_sense_give_code_2(
    trainer: FakeTrainer, arguments: tuple[str, ...]
) -> None:
    assert run(*arguments) == 2


def test_a_task_is_needed(trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "job.yaml", "task=") == 1
    assert "task: got null" in capsys.readouterr().err
    assert run("train", "job.yaml", "task=''") == 1
    assert "task: missing; needs package.module:Class" in capsys.readouterr().err


def test_a_used_run_folder_is_refused(
    trainer: FakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "job.json").write_text("{}")
    assert run("train", "job.yaml", "--run-dir", "used") == 1
    assert "elastic resume used" in capsys.readouterr().err


def test_resume_takes_the_job_from_the_run(
    trainer: FakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "runs" / "tiny-20250131-120000")
    folder.create()
    job = {"name": "tiny", "task": "a:B", "steps": 9}
    job["batch"] = {"micro_batches": 4, "micro_batch_size": 1}  # type: ignore[assignment]
    folder.write_json(folder.job_json, job)
    assert run("resume", "tiny", "workers.start=2") == 0
    ((_, config, more),) = trainer.calls
    assert (config.steps, config.workers.start) == (9, 2)
    assert more == {"run_dir": folder.path, "faults": (), "resume": True}
    folder.write_json(folder.ray_json, identity(os.getpid()))
    assert run("resume", "tiny") == 1
    assert "still running" in capsys.readouterr().err


def test_resume_takes_the_job_from_its_checkpoints_where_the_run_is_lost(
    trainer: FakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "bucket"
    job = load_job(yaml.safe_load(JOB)).model_dump(mode="json")
    for step in (10, 20):
        one = torch.zeros(1)
        meta = {"job": {**job, "steps": step + 100}}
        write_checkpoint(LocalStorage(stored), step=step, weights={"w": one}, state={}, meta=meta)
    assert run("resume", str(stored), "workers.start=2") == 0
    ((_, config, more),) = trainer.calls
    assert (config.steps, config.workers.start) == (120, 2)
    assert config.checkpoint.storage == str(stored)
    assert more["resume"]
    assert more["run_dir"].name.startswith("tiny-")
    assert run("resume", str(tmp_path / "nothing")) == 1
    assert "no such run" in capsys.readouterr().err
    assert run("resume", f"file://{tmp_path}/nothing") == 1
    assert "no checkpoint found" in capsys.readouterr().err


def test_a_running_job_is_asked_scaled_and_stopped(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("status", "tiny") == 0
    out = capsys.readouterr().out
    assert "training, step 5 of 20" in out
    assert "pid 42 + standby" in out
    assert run("scale", "tiny", "--workers", "6") == 0
    assert "tiny: 4 → 6 workers\n" in capsys.readouterr().out
    assert run("scale", "tiny", "--nodes", "2", "-w", "5") == 0
    assert "tiny: 4 → 5 workers, 3 → 2 nodes\n" in capsys.readouterr().out
    assert run("undo", "tiny", "worker 3") == 0
    assert "not any more: restart worker 3" in capsys.readouterr().out
    assert run("stop", "tiny") == 0
    assert "elastic resume runs/tiny" in capsys.readouterr().out
    scaled = [("scale", "tiny", 6, None), ("scale", "tiny", 5, 2)]
    assert trainer.calls == [*scaled, ("undo", "worker 3"), ("stop", "tiny")]


def test_a_running_job_here_is_not_even_asked(
    trainer: FakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder("runs/tiny")
    folder.create()
    folder.write_json(folder.job_json, {})
    folder.write_json(folder.ray_json, identity(os.getpid()))
    write_status(folder, a_status(7))
    assert run("status", "tiny") == 0
    assert "training, step 7 of 20" in capsys.readouterr().out
    folder.ray_json.unlink()
    assert run("status", "tiny") == 0
    assert "step 5 of 20" in capsys.readouterr().out, "it has ended here: the job is asked"


class AFailure(types.SimpleNamespace):
    """Stands where a shrunk failure would be."""

    def __init__(self, schedule: Any) -> None:
        super().__init__(schedule=schedule)

    def __str__(self) -> str:
        return "the shrunk schedule [as text]"


@pytest.mark.parametrize(
    ("violating", "arguments", "code", "words"),
    [
        (None, ("--seeds", "5"), 0, "5 schedules"),
        (3, ("--seeds", "5"), 1, "seed 3 breaks the protocol"),
        (4711, ("--seed", "4711"), 1, "the shrunk schedule [as text]"),
        (7, ("--minutes", "1"), 1, "seed 7 breaks"),
    ],
)
def test_simulate_stops_at_the_first_violation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    violating: int | None,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    def search(seeds: Iterable[int], *, found: Callable[[int], None], **how: Any) -> Any:
        tried = types.SimpleNamespace(num_schedules=0, num_faults=30, failure=None)
        assert (how["deadline_s"] is None) == ("--minutes" not in arguments)
        for seed in seeds:
            tried.num_schedules += 1
            found(tried.num_schedules)
            if seed == violating:
                tried.failure = AFailure(types.SimpleNamespace(seed=seed))
                break
        return tried

    fake = types.ModuleType("elastic.core.simulator.search")
    fake.search = search  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elastic.core.simulator.search", fake)
    assert run("simulate", "protocol", *arguments) == code
    assert words in capsys.readouterr().out


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom elastic.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'matplotlib', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "Train PyTorch models" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        *("train", "resume", "status", "scale", "undo", "stop", "report", "diagnose"),
        *("simulate protocol", "simulate stragglers"),
    ],
)
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"elastic {command}" in out


# The run folder.


def test_the_last_line_of_a_step_counts_and_torn_lines_do_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, loss in ((0, 5.0), (1, 4.0), (1, 3.0)):
        folder.append_metrics({"step": step, "loss": loss})
    folder.close()
    with folder.metrics_jsonl.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["loss"] for line in folder.read_metrics()] == [5.0, 3.0]
    successor = RunFolder(tmp_path)
    successor.append_metrics({"step": 2, "loss": 2.0})
    successor.close()
    assert [line["loss"] for line in folder.read_metrics()] == [5.0, 3.0, 2.0]


def test_events_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_events() == []
    folder.append_event({"time_s": 2.0, "kind": "b"})
    folder.append_event({"time_s": 1.0, "kind": "a"})
    folder.close()
    assert [event["kind"] for event in folder.read_events()] == ["a", "b"]


def test_runs_are_found_by_name_or_path(tmp_path: Path) -> None:
    def make(name: str, pid: int | None, age: int) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        folder.create()
        folder.write_json(folder.job_json, {"name": "tiny"})
        os.utime(folder.job_json, (1000 - age, 1000 - age))
        if pid is not None:
            folder.write_json(folder.ray_json, identity(pid))
        return folder

    ended = make("tiny-20250101-000000", None, age=1)
    alive = make("tiny-20240101-000000", os.getpid(), age=5)
    other = make("tiny-big-20250101-000000", os.getpid(), age=0)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    make("tiny", dead.pid, age=0)

    assert find_run("tiny", base=tmp_path).path == alive.path
    assert find_run("tiny-20", base=tmp_path, running=False).path == ended.path
    assert find_run("tiny-b", base=tmp_path).path == other.path
    assert find_run(ended.path, running=False).path == ended.path
    with pytest.raises(ConfigError, match="not running"):
        find_run(ended.path)
    with pytest.raises(ConfigError, match=r"no such running job in .*there are: tiny-big"):
        find_run("huge", base=tmp_path)
    with pytest.raises(ConfigError, match="there is no run at all"):
        find_run("huge", base=tmp_path / "none", running=False)


def test_two_runs_in_one_second_have_two_folders(tmp_path: Path) -> None:
    made = [new_run_dir("tiny", tmp_path) for _ in range(3)]
    assert len(set(made)) == 3
    assert all(path.is_dir() for path in made)


def test_json_files_are_whole_or_named_as_damaged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.result_json, {"loss": 1.5})
    assert folder.read_json(folder.result_json) == {"loss": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    folder.result_json.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        folder.read_json(folder.result_json)
    folder.result_json.write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="holds no JSON object"):
        folder.read_json(folder.result_json)
