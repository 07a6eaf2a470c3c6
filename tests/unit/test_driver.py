"""What the driver does around a job, on a cluster that only pretends: no Ray, no processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.setup import JobSetup
from elastic import Callback, driver
from elastic.core.config import JobConfig
from elastic.core.errors import CallbackError, ConfigError, FatalError, ProcessError
from elastic.core.faults import load_faults
from elastic.core.runs import RunFolder
from elastic.core.status import PhaseName, Status

STEPS = 10


class Call:
    """A method of an actor: `remote` calls it at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class FakeCluster:
    """Runs jobs in an instant. `failures` end the first ones; `act` is done while a job runs."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.act: Callable[[], None] = lambda: None
        self.is_taken = False
        self.setups: list[JobSetup] = []
        self.stops: list[str] = []
        self._phase: PhaseName = "starting"
        self.status = Call(self._status)
        self.failure = Call(lambda: self.failures.pop(0) if self.failures else None)
        self.stop = Call(self.stops.append)

    def launch(self, setup: JobSetup) -> FakeCluster:
        if self.is_taken:
            raise ValueError("the name is taken")
        self.setups.append(setup)
        self._phase = "training"
        return self

    def _status(self) -> Status:
        """Training first; then, unless it fails, all steps or those until it was stopped."""
        run = self.setups[-1].run
        if self._phase == "training":
            self._phase = "done"
            self.act()
            raise RayActorError  # it is away for a moment
        outcome = "failed" if self.failures else "stopped" if self.stops else "finished"
        steps = 4 if self.stops else STEPS
        result = {"outcome": outcome, "failure": "", "steps": steps, "faults_fired": []}
        hashes = {"params_sha256": "ab", "samples_sha256": "cd", "exact": True}
        run.write_json(run.result_json, {**result, **hashes})
        return Status(phase="done", num_steps=STEPS, run_dir=str(run.path))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster()

    class FakeRay:
        @staticmethod
        def get(value: Any, timeout: float | None = None) -> Any:
            return value

    @contextlib.contextmanager
    def local_cluster() -> Iterator[str]:
        yield "here:1"

    monkeypatch.setattr(driver, "ray", FakeRay)
    monkeypatch.setattr(driver, "_POLL_S", 0.0)
    monkeypatch.setattr(driver, "local_cluster", local_cluster)
    monkeypatch.setattr(driver, "find_coordinator", lambda name: None)
    monkeypatch.setattr(driver, "launch_coordinator", fake.launch)
    monkeypatch.setattr(driver, "end_coordinator", lambda name, coordinator: None)
    monkeypatch.setattr(driver, "end_orphans", lambda name: None)
    monkeypatch.setattr(driver, "remove_leftovers", list)
    return fake


@pytest.fixture
def fit(
    cluster: FakeCluster,
    tmp_path: Path,
    make_job: Callable[..., JobConfig],
    tiny_task: Callable[[], Any],
) -> Callable[..., Any]:
    def run(*callbacks: Callback, steps: int = STEPS, **more: Any) -> Any:
        job = make_job(steps=steps)
        return driver.run_job(
            job,
            run_dir=tmp_path / "run",
            task=tiny_task(),
            resume=True,
            callbacks=callbacks,
            **more,
        )

    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def kinds(run: RunFolder) -> list[str]:
    return [event["kind"] for event in run.read_events()]


def left_behind(run: RunFolder) -> list[Path]:
    """What must not be there once the driver is done: the job's address, the owner's mark."""
    owners = [path for path in run.checkpoints.iterdir() if not path.name.startswith("step-")]
    return [*owners, *([run.ray_json] if run.ray_json.exists() else [])]


def test_a_finished_run_is_not_run_again(
    fit: Callable[..., Any], cluster: FakeCluster, run: RunFolder
) -> None:
    assert fit().metrics["steps"] == STEPS
    assert fit().metrics["steps"] == STEPS
    assert (len(cluster.setups), kinds(run)) == (1, ["job_started"])
    assert left_behind(run) == []
    fit(steps=STEPS + 1)
    assert len(cluster.setups) == 2


@pytest.mark.parametrize(("max_failures", "num_begun"), [(0, 1), (1, 2), (2, 3), (-1, 3)])
def test_failures_are_counted(
    fit: Callable[..., Any],
    cluster: FakeCluster,
    run: RunFolder,
    max_failures: int,
    num_begun: int,
) -> None:
    cluster.failures = [ProcessError("first"), ProcessError("second")]
    expected = pytest.raises(ProcessError) if num_begun < 3 else contextlib.nullcontext()
    with expected:
        fit(max_failures=max_failures)
    assert len({setup.run_id for setup in cluster.setups}) == num_begun
    assert kinds(run).count("job_failed") == num_begun - 1
    assert left_behind(run) == []


def test_other_failures_are_final(fit: Callable[..., Any], cluster: FakeCluster) -> None:
    cluster.failures = [ConfigError("the loss is wrong"), ProcessError("never seen")]
    with pytest.raises(ConfigError, match="the loss is wrong"):
        fit(max_failures=-1)
    assert len(cluster.setups) == 1


def test_a_name_taken_meanwhile_is_refused(
    fit: Callable[..., Any], cluster: FakeCluster, run: RunFolder
) -> None:
    cluster.is_taken = True
    with pytest.raises(ConfigError, match="name: a job 't' runs on this cluster"):
        fit()
    assert left_behind(run) == []


def test_one_interrupt_asks_for_an_end(
    fit: Callable[..., Any], cluster: FakeCluster, run: RunFolder
) -> None:
    cluster.act = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert fit().metrics["outcome"] == "stopped"
    assert set(cluster.stops) == {"interrupted"}
    cluster.stops.clear()
    cluster.act = lambda: None
    assert fit().metrics["outcome"] == "finished"


def test_a_second_one_ends_at_once(
    fit: Callable[..., Any], cluster: FakeCluster, run: RunFolder
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    cluster.act = twice
    told = Ends()
    with pytest.raises(KeyboardInterrupt):
        fit(told, max_failures=-1)
    assert (kinds(run), told.ends) == (["job_started", "job_interrupted"], [None])
    assert left_behind(run) == []


def test_an_interrupted_job_that_fails_does_not_begin_again(
    fit: Callable[..., Any], cluster: FakeCluster
) -> None:
    cluster.act = lambda: os.kill(os.getpid(), signal.SIGINT)
    cluster.failures = [ProcessError("first")]
    with pytest.raises(ProcessError):
        fit(max_failures=-1)


class Ends(Callback):
    def __init__(self) -> None:
        self.ends: list[Any] = []

    def on_end(self, result: Any) -> None:
        self.ends.append(result)


class Wrong(Callback):
    def __init__(self, method: str) -> None:
        def call(*_: Any) -> None:
            raise ValueError("wrong")

        setattr(self, method, call)


def test_a_wrong_callback_stops_the_job(
    fit: Callable[..., Any], cluster: FakeCluster, run: RunFolder
) -> None:
    told = Ends()
    with pytest.raises(CallbackError, match=r"Wrong\.on_event: ValueError: wrong"):
        fit(Wrong("on_event"), told)
    assert told.ends[0].metrics["outcome"] in ("stopped", "finished")
    assert left_behind(run) == []


def test_one_that_is_wrong_at_the_start_starts_nothing(
    fit: Callable[..., Any], cluster: FakeCluster, run: RunFolder
) -> None:
    told = Ends()
    with pytest.raises(CallbackError, match=r"Wrong\.on_start"):
        fit(told, Wrong("on_start"))
    assert (cluster.setups, told.ends) == ([], [None])
    assert left_behind(run) == []


def test_a_fault_that_never_fired_is_an_error(
    fit: Callable[..., Any], cluster: FakeCluster, tmp_path: Path
) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text("- {do: kill, at: {step: 3}, target: worker-0}\n")
    cluster.act = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert fit(faults=load_faults(path)).metrics["outcome"] == "stopped"  # it may come yet
    cluster.stops.clear()
    cluster.act = lambda: None
    with pytest.raises(FatalError, match="faults that never fired"):
        fit(faults=load_faults(path))


def test_a_run_folder_in_a_copy_that_ray_deletes_is_refused(
    cluster: FakeCluster, make_job: Callable[..., JobConfig], tiny_task: Any, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1a2b" / "run"
    with pytest.raises(ConfigError, match=r"_ray_pkg_1a2b/run: lies in the copy .*--run-dir"):
        driver.run_job(make_job(), run_dir=run_dir, task=tiny_task())
    assert cluster.setups == []
    assert not run_dir.exists()
