"""Runs one job from here: checks what can be checked before Ray starts, launches, only watches."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import ray
from ray.exceptions import RayActorError

from actors.launch import end_orphans, find_coordinator, launch_coordinator
from actors.setup import NAMESPACE, JobSetup
from elastic.cluster import local_cluster
from elastic.core import checkpoint
from elastic.core.config import JobConfig, check_resume
from elastic.core.device import check_device
from elastic.core.errors import ConfigError, FatalError
from elastic.core.faults import Fault
from elastic.core.ownership import Owner, owned
from elastic.core.runs import RunFolder
from elastic.core.status import Status
from elastic.core.storage import open_storage
from elastic.core.store import Store, remove_leftovers
from elastic.core.task import Task, load_task
from elastic.core.weights import Initial, find_initial
from elastic.result import Result, read_result

log = logging.getLogger(__name__)

_POLL_S = 0.2
_COORDINATOR_ABSENT_S = 60.0
_ORPHANS_END_S = 30.0


def run_job(
    job: JobConfig,
    *,
    run_dir: Path,
    task: Task | None = None,
    faults: tuple[Fault, ...] = (),
    resume: bool = False,
    on_status: Callable[[Status], None] | None = None,
) -> Result:
    """Run one job to its end and return its result.

    Args:
        resume: continue from the newest good checkpoint of `run_dir`.
        on_status: called about five times a second.

    Raises:
        ConfigError: the job, task, data or machine cannot do what is asked.
        FatalError: the job failed; its run folder holds what there is.
    """
    run = RunFolder(run_dir)
    killed = _last_driver_was_killed(run)
    setup = _make_setup(job, run, task, faults, resume=resume)
    owner = Owner.here(setup.run_id, str(run.path))
    with owned(open_storage(setup.checkpoints), owner), local_cluster() as address:
        _await_name(job.name, _ORPHANS_END_S if killed else 0.0)
        end_orphans(job.name)
        if killed:
            _await_writers(run)
        if killed and resume:  # it may have written another checkpoint meanwhile
            setup = _resumed(setup)
        removed = remove_leftovers()
        if removed:
            log.warning("removed what dead jobs had left in shared memory: %s", ", ".join(removed))
        _begin_run(run, job, address, setup)
        coordinator = launch_coordinator(setup)
        try:
            _watch_or_stop(coordinator, on_status)
            failure = ray.get(coordinator.failure.remote())
        finally:
            run.ray_json.unlink(missing_ok=True)
            ray.kill(coordinator, no_restart=True)
            end_orphans(job.name)  # there are none unless an error brought us here
            setup.open_store().remove()
    if failure is not None:
        raise failure
    result = read_result(run)
    missed = [fault for fault in faults if fault.index not in result.metrics["faults_fired"]]
    if missed:
        raise FatalError(
            "faults that never fired: " + "; ".join(f"{one.index}: {one}" for one in missed)
        )
    return result


def _make_setup(
    job: JobConfig, run: RunFolder, task: Task | None, faults: tuple[Fault, ...], *, resume: bool
) -> JobSetup:
    """Check what can be checked here, before anything is started."""
    if task is None and not job.task:
        raise ConfigError("task: the job file names none; write 'task: package.module:Class'")
    if task is None:
        load_task(job.task, job.task_args)
    check_device(job.device)
    paths = tuple(dict.fromkeys(path or os.getcwd() for path in (os.getcwd(), *sys.path)))
    setup = JobSetup(
        job=job,
        run=run,
        run_id=secrets.token_hex(4),
        node="local",
        import_paths=paths,
        task=cloudpickle.dumps(task) if task is not None else None,
        faults=faults,
    )
    return _resumed(setup) if resume else _begun(setup)


def _resumed(setup: JobSetup) -> JobSetup:
    """Go on from the newest good checkpoint."""
    found = checkpoint.find_checkpoint(
        checkpoint.checkpoints_of(setup.run.path, setup.job.checkpoint.storage)
    )
    check_resume(found.meta["job"], setup.job)
    initial = found.meta.get("initial")
    return replace(
        setup,
        resume_from=found.path,
        damaged=tuple(found.damaged),
        initial=Initial(**initial) if initial else None,
    )


def _begun(setup: JobSetup) -> JobSetup:
    """Begin anew, perhaps with weights; not among the checkpoints of another run."""
    job = setup.job
    if job.checkpoint.storage is not None:
        newest = checkpoint.latest_checkpoint(job.checkpoint.storage)
        if newest is not None:
            raise ConfigError(
                f"checkpoint.storage: {job.checkpoint.storage} holds checkpoints already, the"
                f" newest {newest}; needs an empty folder for a new run; `elastic resume` goes on"
                " with an old one"
            )
    return replace(setup, initial=find_initial(job.init_from) if job.init_from else None)


def _last_driver_was_killed(run: RunFolder) -> bool:
    """Whether the run folder's last job ended without its driver, so that parts may live on."""
    if run.is_running():
        raise ConfigError(f"{run.path}: this job is running; end it with `elastic stop`")
    return run.ray_json.exists()


def _await_name(name: str, timeout_s: float) -> None:
    """Refuse a second job of this name. Ray takes a while to end a killed driver's coordinator."""
    deadline_s = time.monotonic() + timeout_s
    while find_coordinator(name) is not None:
        if time.monotonic() >= deadline_s:
            raise ConfigError(
                f"name: a job {name!r} runs on this cluster; stop it with"
                f" `elastic stop {name}` or choose another name"
            )
        time.sleep(_POLL_S)


def _await_writers(run: RunFolder) -> None:
    """Wait until nobody writes to the run folder any more, after its driver was killed."""
    store = Store(Path(run.read_json(run.ray_json).get("store", "/nonexistent")))
    if not store.await_end(_ORPHANS_END_S):
        raise ConfigError(
            f"{run.path}: processes of its last job live on and hold {store.path}"
            f" {_ORPHANS_END_S:.0f} s after its driver died; end them first"
        )


def _begin_run(run: RunFolder, job: JobConfig, address: str, setup: JobSetup) -> None:
    run.create()
    run.result_json.unlink(missing_ok=True)
    run.write_json(run.job_json, job.model_dump(mode="json"))
    run.write_json(
        run.ray_json,
        {
            "address": address,
            "namespace": NAMESPACE,
            "coordinator": setup.coordinator_name,
            "pid": os.getpid(),
            "store": str(setup.open_store().path),
        },
    )
    for problem in setup.damaged:
        _event(run, "checkpoint_damaged", problem)
    if setup.resume_from is not None:
        _event(run, "job_resumed", f"from {setup.resume_from}")
        return
    _event(run, "job_started", f"{job.steps} steps")
    if setup.initial is not None:
        _event(run, "initialized", f"from {setup.initial.file}, sha256 {setup.initial.sha256}")


def _event(run: RunFolder, kind: str, reason: str) -> None:
    run.append_event(
        {
            "time_s": time.time(),
            "kind": kind,
            "step": 0,
            "generation": 0,
            "worker": None,
            "reason": reason,
        }
    )


def _watch_or_stop(coordinator: Any, on_status: Callable[[Status], None] | None) -> None:
    """Follow the job until it ends; an interrupt ends it in good order, a second one at once."""
    with _sigterm_interrupts():
        try:
            _watch(coordinator, on_status)
        except KeyboardInterrupt:
            log.warning("stopping: finishes the step, writes a checkpoint; again to abandon")
            coordinator.stop.remote("interrupted")
            _watch(coordinator, on_status)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Take SIGTERM, as `ray job stop` sends it, for an interrupt. Ray's own handler aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _watch(coordinator: Any, on_status: Callable[[Status], None] | None) -> None:
    """Follow the job until it ends. The coordinator may be away for a while."""
    seen_s = time.monotonic()
    while True:
        try:
            status: Status = ray.get(coordinator.status.remote(), timeout=_COORDINATOR_ABSENT_S)
            seen_s = time.monotonic()
        except RayActorError:
            if time.monotonic() - seen_s > _COORDINATOR_ABSENT_S:
                raise FatalError(
                    f"the coordinator has been away for {_COORDINATOR_ABSENT_S:.0f} s"
                ) from None
            time.sleep(_POLL_S)
            continue
        if on_status is not None:
            on_status(status)
        if status.phase in ("done", "failed"):
            return
        time.sleep(_POLL_S)
