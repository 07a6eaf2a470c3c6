"""What every process of a job is told, and what must be in its environment before torch loads."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from actors.setup import (
    NICE_BEHIND,
    NICE_START,
    JobSetup,
    compute_environment,
    nice_to_load,
    parse_actor_name,
)
from actors.worker import _Loader
from elastic.core.config import JobConfig
from elastic.core.errors import ConfigError
from elastic.core.faults import Fault
from elastic.core.fingerprint import CAP_VARIABLES
from elastic.core.runs import RunFolder
from elastic.core.store import ROOT

TASK_FILE = """
class Task:
    def __init__(self, size=1):
        self.size = size
    def model(self): ...
    def dataset(self): ...
    def loss(self, model, micro_batch): ...
    def optimizer(self, named_parameters): ...
class Half:
    def model(self): ...
"""


@pytest.fixture
def setup(tmp_path: Path, make_job: Callable[..., JobConfig]) -> Callable[..., JobSetup]:
    def make(*, job: dict[str, Any] = {}, **fields: Any) -> JobSetup:  # noqa: B006
        return JobSetup(
            job=make_job(name="lm", **job),
            run=RunFolder(tmp_path),
            run_id="12ab",
            secret=bytes(32),
            node=2,
            **fields,
        )

    return make


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module `elastic_test_task`, not importable yet."""
    (tmp_path / "elastic_test_task.py").write_text(TASK_FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "elastic_test_task", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def test_names_tell_runs_and_roles_apart(setup: Callable[..., JobSetup]) -> None:
    one = setup()
    assert one.coordinator_name == "lm/coordinator"
    assert one.actor_name("worker", 3) == "lm/12ab/worker-3@2"
    assert one.open_store().path == ROOT / "lm.12ab.2"


@pytest.mark.parametrize("name", ["lm", "a-b", "worker-3.x"])
@pytest.mark.parametrize("role", ["worker", "aggregator"])
def test_a_name_says_who_it_is(role: str, name: str, setup: Callable[..., JobSetup]) -> None:
    made = setup().actor_name(role, 13).replace("lm", name)
    assert parse_actor_name(made) == (role, 13, 2)


def test_a_setup_crosses_processes(setup: Callable[..., JobSetup], tmp_path: Path) -> None:
    one = setup(faults=(Fault(index=0, do="kill", target=1),), resume_from=tmp_path, task=b"x")
    again = pickle.loads(pickle.dumps(one))
    assert (again.job, again.faults, again.resume_from) == (one.job, one.faults, tmp_path)
    assert again.run.path == one.run.path


def test_the_task_is_imported_from_where_the_job_was_started(
    setup: Callable[..., JobSetup], task_folder: Path
) -> None:
    job = {"task": "elastic_test_task:Task", "task_args": {"size": 5}}
    with pytest.raises(ConfigError, match="cannot import"):
        setup(job=job).load_task()
    before = list(sys.path)
    task = setup(job=job, import_paths=(str(task_folder), *before)).load_task()
    assert task.size == 5  # type: ignore[attr-defined]
    assert sys.path == [str(task_folder), *before]  # first as it was first, nothing twice


def test_a_task_object_is_taken_as_it_was(
    setup: Callable[..., JobSetup], task_folder: Path
) -> None:
    task = setup(
        job={"task": "elastic_test_task:Task"}, import_paths=(str(task_folder),)
    ).load_task()
    task.size = 77  # type: ignore[attr-defined]
    again = setup(task=cloudpickle.dumps(task)).load_task()
    assert again.size == 77  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"task": "elastic_test_task:Half"}, "Half lacks dataset, loss, optimizer"),
        ({"task": "elastic_test_task:None_"}, "cannot import 'elastic_test_task:None_'"),
        ({"task": "no_such_module:Task"}, "cannot import 'no_such_module:Task'"),
        (
            {"task": "elastic_test_task:Task", "task_args": {"depth": 1}},
            r"task_args: {'depth': 1} do not fit elastic_test_task:Task",
        ),
    ],
    ids=["methods", "attribute", "module", "arguments"],
)
def test_a_task_that_does_not_fit_is_refused(
    job: dict[str, Any], message: str, setup: Callable[..., JobSetup], task_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        setup(job=job, import_paths=(str(task_folder),)).load_task()


def test_a_task_object_that_lacks_a_method_is_refused(setup: Callable[..., JobSetup]) -> None:
    with pytest.raises(ConfigError, match="int lacks model, dataset, loss, optimizer"):
        setup(task=cloudpickle.dumps(5)).load_task()


# --- environment -----------------------------------------------------------------------------


@pytest.fixture
def no_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CAP_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_caps")
def test_threads_and_instruction_sets_are_settled() -> None:
    environment = compute_environment(3)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert {name: environment[name] for name in CAP_VARIABLES} == {
        "MKL_CBWR": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    assert all(isinstance(value, str) for value in environment.values())


@pytest.mark.parametrize("name", CAP_VARIABLES)
def test_a_cap_that_is_set_already_stays(
    name: str, no_caps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "default")
    assert compute_environment(1)[name] == "default"


# --- priority --------------------------------------------------------------------------------


@pytest.mark.parametrize(("privileged", "nice"), [(True, NICE_START), (False, NICE_BEHIND)])
def test_a_worker_loads_behind_those_that_compute(
    privileged: bool, nice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [15]  # as Ray starts processes; without the privilege, computing stays there

    def set_priority(_which: int, _who: int, value: int) -> None:
        if value < values[-1] and not privileged:
            raise PermissionError
        values.append(value)

    monkeypatch.setattr(os, "setpriority", set_priority)
    loader = _Loader(lambda: None, NICE_START)
    loader.start()
    loader.join()
    assert loader.error is None
    assert values[-1] == nice


@pytest.mark.parametrize(("together", "nices"), [(False, [0, 5, 10, 10]), (True, [NICE_START] * 4)])
def test_workers_load_one_after_the_other_or_together_behind_the_steps(
    together: bool, nices: list[int]
) -> None:
    assert [nice_to_load(worker, together=together) for worker in range(4)] == nices
