"""Runs one job from here: checks what can be checked before Ray starts, launches, only watches."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.launch import end_coordinator, end_orphans, find_coordinator, launch_coordinator
from actors.setup import NAMESPACE, JobSetup
from elastic.cluster import auth_mode, local_cluster
from elastic.core import checkpoint
from elastic.core.config import JobConfig, Stragglers, check_resume
from elastic.core.device import check_device
from elastic.core.errors import ConfigError, FatalError, ProcessError
from elastic.core.faults import Fault
from elastic.core.ownership import Owner, owned
from elastic.core.protocol.handshake import SECRET_BYTES
from elastic.core.protocol.messages import step_of_job
from elastic.core.runs import RunFolder, identity, is_copy, num_models
from elastic.core.status import Status, write_status
from elastic.core.storage import open_storage
from elastic.core.store import Store, remove_leftovers
from elastic.core.task import Task, load_task
from elastic.core.weights import Initial, find_initial
from elastic.follower import Follower
from elastic.interrupts import Interrupts
from elastic.pickled import pickle_task

if TYPE_CHECKING:
    from elastic.callbacks import Callback
    from elastic.result import Result

log = logging.getLogger(__name__)

_POLL_S = 0.2
_WRITE_STATUS_S = 1.0
_COORDINATOR_ABSENT_S = 60.0
_ORPHANS_END_S = 30.0


def run_job(
    job: JobConfig,
    *,
    run_dir: Path,
    task: Task | None = None,
    faults: tuple[Fault, ...] = (),
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    max_failures: int = 0,
    on_status: Callable[[Status], None] | None = None,
) -> Result:
    """Run one job to its end and return its result.

    Args:
        resume: go on with the run in `run_dir`, from its newest good checkpoint, or from the
            beginning if it has none. If it has all its steps, nothing is computed.
        callbacks: told what happens, on this thread.
        max_failures: how often the job begins again at its newest checkpoint after its processes
            failed it (`ProcessError`); -1: without limit.
        on_status: called about five times a second.

    Raises:
        ConfigError: the job, task, data or machine cannot do what is asked.
        FatalError: the job failed; its run folder holds what there is.
        CallbackError: a callback raised; the job was stopped in good order.
    """
    run = RunFolder(run_dir)
    if is_copy(run.path):
        raise ConfigError(
            f"{run.path}: lies in the copy of the working directory that Ray deletes after the job;"
            " needs a folder elsewhere: --run-dir DIR or RunConfig.storage_path"
        )
    killed = _last_driver_was_killed(run)  # refuses a run that goes on
    if resume and _is_finished(run, job):
        if killed:
            with local_cluster():
                _clear_the_way(run, job.name)
            _forget_processes(run)
        return _read_result(run, faults=())
    setup = _make_setup(job, run, task, faults, resume=resume)
    follower, signals = Follower(callbacks, run), Interrupts()
    try:
        for number in itertools.count():
            try:
                _run_once(setup, follower, signals, on_status, resume=resume)
                break
            except ProcessError as error:
                if number == max_failures or signals.asked:
                    raise
                run.tell("job_failed", f"begins again: {error}")
                resume = True
                setup = _make_setup(job, run, task, faults, resume=resume)
        result = _read_result(run, faults)
    except BaseException:
        follower.end(None)
        raise
    follower.end(result)
    if follower.error is not None:
        raise follower.error
    return result


def _run_once(
    setup: JobSetup,
    follower: Follower,
    signals: Interrupts,
    on_status: Callable[[Status], None] | None,
    *,
    resume: bool,
) -> None:
    """Run the job until it ends or fails, on the cluster at hand or one of its own."""
    owner = Owner.here(setup.run_id, str(setup.run.path))
    with (
        _storages_owned(setup, owner),
        local_cluster() as address,
        signals.taken(),
    ):
        if _clear_the_way(setup.run, setup.job.name) and resume:
            # an orphan may have written another one meanwhile
            setup = _of_all(setup, _from_checkpoint)
        _begin_run(setup, address, follower)
        _launch_and_watch(setup, follower, signals, on_status)


@contextlib.contextmanager
def _storages_owned(setup: JobSetup, owner: Owner) -> Iterator[None]:
    """Those of all models."""
    with contextlib.ExitStack() as stack:
        for lane in setup.lanes:
            stack.enter_context(owned(open_storage(lane.checkpoints), owner))
        yield


def _clear_the_way(run: RunFolder, name: str) -> bool:
    """End what killed drivers have left. Whether this run's last one was."""
    killed = _last_driver_was_killed(run)
    _await_name(name, _ORPHANS_END_S if killed else 0.0)
    end_orphans(name)
    if killed:
        _await_writers(run)
    removed = remove_leftovers()
    if removed:
        log.warning("removed what dead jobs had left in shared memory: %s", ", ".join(removed))
    return killed


def _launch_and_watch(
    setup: JobSetup,
    follower: Follower,
    signals: Interrupts,
    on_status: Callable[[Status], None] | None,
) -> None:
    """From the coordinator's start to its end; nothing is left of the job, whatever happens."""
    run, name = setup.run, setup.job.name
    signals.job_runs()
    try:
        coordinator = launch_coordinator(setup)
    except ValueError:  # Ray: the name was taken meanwhile
        run.ray_json.unlink()
        raise _name_is_taken(name) from None
    try:
        _watch(coordinator, follower, signals, _written(run, on_status))
        failure = ray.get(coordinator.failure.remote())
    except KeyboardInterrupt:
        run.tell("job_interrupted", "interrupted twice: ended at once")
        raise
    finally:
        signals.tidy_up()
        _forget_processes(run)
        end_coordinator(name, coordinator)
        end_orphans(name)  # there are none unless an error brought us here
        setup.open_store().remove()
    if failure is not None:
        raise failure


def _forget_processes(run: RunFolder) -> None:
    for path in (run.ray_json, run.status_json, run.prometheus_json):
        path.unlink(missing_ok=True)


def _is_finished(run: RunFolder, job: JobConfig) -> bool:
    """Whether the run has all its steps.

    Raises:
        ConfigError: it was begun with other settings, or has more steps than the job.
    """
    if not run.result_json.exists():
        return False
    result = run.read_json(run.result_json)
    if result["outcome"] != "finished":
        return False
    check_resume(run.read_json(run.job_json), job)
    _check_steps(job, result["steps"], run)
    return bool(job.steps == result["steps"])


def _check_steps(job: JobConfig, num_done: int, run: RunFolder) -> None:
    if job.steps < num_done:
        raise ConfigError(
            f"steps: got {job.steps}, and {run.path} has {num_done} already; needs at least that"
            " many, or another run folder"
        )


def _read_result(run: RunFolder, faults: Sequence[Fault]) -> Result:
    """What the job left. Raises FatalError where it failed, or finished and a fault never fired."""
    from elastic.result import read_result  # Ray Train takes a second, which no start waits for

    result = read_result(run)
    missed = [fault for fault in faults if fault.index not in result.metrics["faults_fired"]]
    if missed and result.metrics["outcome"] == "finished":
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
    models = [job.of_model(one) for one in range(job.num_models)]
    if len(models) == 1:
        job = models[0]
    for one in models:
        if task is None:
            load_task(job.task, one.task_args)
        elif one.task_args != job.task_args:
            raise ConfigError(
                f"models: got task_args {one.task_args}, and a task object, which has its own"
                " already; name the task by package.module:Class"
            )
    check_device(job.device)
    if resume:
        _check_models(job, run)
    paths = tuple(dict.fromkeys(path or os.getcwd() for path in (os.getcwd(), *sys.path)))
    setup = JobSetup(
        job=job,
        run=run,
        run_id=secrets.token_hex(4),
        secret=secrets.token_bytes(SECRET_BYTES),
        import_paths=paths,
        folder=os.getcwd(),
        task=pickle_task(task) if task is not None else None,
        faults=faults,
    )
    if len(models) > 1:
        lanes = (
            replace(setup, job=one, run=run.of_model(number), model=number)
            for number, one in enumerate(models)
        )
        setup = replace(setup, models=tuple(lanes))
    return _of_all(setup, _from_checkpoint if resume else _begun)


def _check_models(job: JobConfig, run: RunFolder) -> None:
    """Refuse to go on with other models: those that have no checkpoint would begin anew."""
    if run.job_json.exists():
        begun = run.read_json(run.job_json)
        if max(job.num_models, num_models(begun)) > 1:
            check_resume(begun, job)


def _of_all(setup: JobSetup, begin: Callable[[JobSetup], JobSetup]) -> JobSetup:
    """How each model begins, and the job with them."""
    if not setup.models:
        return begin(setup)
    models = tuple(begin(one) for one in setup.models)
    resumed = [
        f"model {number}: {one.resume_from or 'from the beginning'}"
        for number, one in enumerate(models)
    ]
    return replace(
        setup,
        models=models,
        resume_from=", ".join(resumed) if any(one.resume_from for one in models) else None,
        first_step=sum(one.first_step for one in models),
        damaged=tuple(problem for one in models for problem in one.damaged),
        initial=models[0].initial,
    )


def _from_checkpoint(setup: JobSetup) -> JobSetup:
    """Go on from the newest good checkpoint; from the beginning if none was written yet.

    Raises:
        ConfigError: it was written under other settings, or has more steps than the job; or all
            are gone.
    """
    where = checkpoint.checkpoints_of(setup.run.path, setup.job.checkpoint.storage)
    if checkpoint.latest_checkpoint(where) is None:
        _check_none_was_written(setup.run, where)
        return _begun(setup)
    found = checkpoint.find_checkpoint(where)
    check_resume(found.meta["job"], setup.job)
    _check_steps(setup.job, found.step, setup.run)
    initial = found.meta.get("initial")
    return replace(
        setup,
        resume_from=found.path,
        first_step=found.step,
        damaged=tuple(found.damaged),
        initial=Initial(**initial) if initial else None,
    )


def _check_none_was_written(run: RunFolder, where: str) -> None:
    """Refuse to begin anew where checkpoints are out of reach: its records would be lost, too."""
    written = [one["reason"] for one in run.read_events() if one["kind"] == "checkpoint_written"]
    if written:
        raise ConfigError(
            f"{run.path}: a checkpoint was written ({written[-1]}), and {where} holds none now;"
            f" bring it back, or begin anew by: elastic train {run.job_json}"
        )


def _begun(setup: JobSetup) -> JobSetup:
    """Begin anew, perhaps with weights; not among the checkpoints of another run."""
    job = setup.job
    if job.checkpoint.storage is not None:
        newest = checkpoint.latest_checkpoint(job.checkpoint.storage)
        if newest is not None:
            where = job.checkpoint.storage if setup.model is None else "RUN"
            raise ConfigError(
                f"checkpoint.storage: {job.checkpoint.storage} holds checkpoints already, the"
                f" newest {newest}; needs an empty folder for a new run; `elastic resume {where}`"
                " goes on with them"
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
            raise _name_is_taken(name)
        time.sleep(_POLL_S)


def _name_is_taken(name: str) -> ConfigError:
    return ConfigError(
        f"name: a job {name!r} runs on this cluster; stop it with `elastic stop {name}` or choose"
        " another name"
    )


def _await_writers(run: RunFolder) -> None:
    """Wait until nobody writes to the run folder any more, after its driver was killed."""
    store = Store(Path(run.read_json(run.ray_json).get("store", "/nonexistent")))
    if not store.await_end(_ORPHANS_END_S):
        raise ConfigError(
            f"{run.path}: processes of its last job live on and hold {store.path}"
            f" {_ORPHANS_END_S:.0f} s after its driver died; end them first"
        )


def _inexact(stragglers: Stragglers) -> str:
    """What is lost, in words."""
    late = "at a deadline"
    if stragglers.kind == "erasure_head":
        late = f"after {stragglers.wait_for} workers"
    return (
        f"stragglers.kind {stragglers.kind} ends steps {late} and drops what is not done: the"
        " result depends on who is slow; result.json says exact: false"
    )


def _first_step(setup: JobSetup) -> int:
    """The first step of the job that is computed: of several models some may be ahead."""
    num = len(setup.lanes)
    return min(step_of_job(one.model or 0, one.first_step, num) for one in setup.lanes)


def _begin_run(setup: JobSetup, address: str, follower: Follower) -> None:
    """Write down who runs this; from here on the run folder is ours."""
    run, job, resumed = setup.run, setup.job, setup.resume_from
    run.create()
    if not follower.is_started:
        _clear_records(setup)
        follower.start(job, _first_step(setup))
        if follower.error is not None:
            raise follower.error
    for lane in setup.models:
        _begin_model(lane)
    run.result_json.unlink(missing_ok=True)
    run.write_json(run.job_json, job.model_dump(mode="json"))
    run.write_json(
        run.ray_json,
        {
            "address": address,
            "auth_mode": auth_mode(),
            "namespace": NAMESPACE,
            "coordinator": setup.coordinator_name,
            **identity(os.getpid()),
            "store": str(setup.open_store().path),
        },
    )
    for problem in setup.damaged:
        run.tell("checkpoint_damaged", problem)
    _tell_begun(setup)
    if not job.stragglers.is_exact:
        reason = _inexact(job.stragglers)
        log.warning("%s: %s", job.name, reason)
        run.tell("inexact", reason)
    if resumed is None and setup.initial is not None:
        reason = f"from {setup.initial.file}, sha256 {setup.initial.sha256}"
        run.tell("initialized", reason)


def _begin_model(setup: JobSetup) -> None:
    """The run folder of one of several models."""
    run = setup.run
    run.create()
    _clear_records(setup)
    run.result_json.unlink(missing_ok=True)
    run.write_json(run.job_json, setup.job.model_dump(mode="json"))
    _tell_begun(setup)


def _clear_records(setup: JobSetup) -> None:
    """Where it begins anew: another job may have ended here before its first checkpoint."""
    if setup.resume_from is None:
        setup.run.metrics_jsonl.unlink(missing_ok=True)
        setup.run.evaluations_jsonl.unlink(missing_ok=True)


def _tell_begun(setup: JobSetup) -> None:
    if setup.resume_from is None:
        setup.run.tell("job_started", f"{setup.job.steps} steps")
    else:
        setup.run.tell("job_resumed", f"from {setup.resume_from}")


def _written(
    run: RunFolder, on_status: Callable[[Status], None] | None
) -> Callable[[Status], None]:
    """Write a status down every second, for `elastic status`, and pass each one on."""
    written_s = float("-inf")

    def show(status: Status) -> None:
        nonlocal written_s
        if time.monotonic() - written_s >= _WRITE_STATUS_S:
            written_s = time.monotonic()
            try:
                write_status(run, status)
            except OSError as error:  # the job itself can still be asked
                log.warning("cannot write %s: %s", run.status_json, error)
        if on_status is not None:
            on_status(status)

    return show


def _watch(
    coordinator: Any,
    follower: Follower,
    signals: Interrupts,
    on_status: Callable[[Status], None],
) -> None:
    """Follow the job until it ends. The coordinator may be away for a while."""
    seen_s, stop = time.monotonic(), ""
    while True:
        if not stop and (stop := _reason_to_stop(follower, signals)):
            log.warning("%s: finishes the step, writes a checkpoint; Ctrl-C ends it at once", stop)
        if stop:
            coordinator.stop.remote(stop)  # said again, in case that it is away
        try:
            status: Status = ray.get(coordinator.status.remote(), timeout=_COORDINATOR_ABSENT_S)
            seen_s = time.monotonic()
        except (RayActorError, GetTimeoutError):
            if time.monotonic() - seen_s > _COORDINATOR_ABSENT_S:
                raise ProcessError(
                    f"the coordinator has been away for {_COORDINATOR_ABSENT_S:.0f} s"
                ) from None
            time.sleep(_POLL_S)
            continue
        on_status(status)
        follower.poll()
        if status.phase in ("done", "failed"):
            return
        time.sleep(_POLL_S)


def _reason_to_stop(follower: Follower, signals: Interrupts) -> str:
    if signals.asked:
        return "interrupted"
    return str(follower.error) if follower.error is not None else ""
