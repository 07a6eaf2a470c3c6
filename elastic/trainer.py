"""The face of training: `ElasticTrainer` for scripts, `run_job` and `connect` for the command line.

Checks everything that can be checked before Ray starts; then only watches.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle
import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import Checkpoint, RunConfig, ScalingConfig

from actors.launch import end_orphans, find_coordinator, launch_coordinator
from actors.setup import NAMESPACE, JobSetup
from elastic.core import checkpoint
from elastic.core.config import JobConfig, check_resume, load_job
from elastic.core.errors import ConfigError, FatalError
from elastic.core.faults import Fault
from elastic.core.runs import RunFolder, find_run, new_run_dir
from elastic.core.status import Status
from elastic.core.store import Store, remove_leftovers
from elastic.core.task import Task, check_task, load_task

log = logging.getLogger(__name__)

_POLL_S = 0.2
_COORDINATOR_ABSENT_S = 60.0
_ORPHANS_END_S = 30.0
_OBJECT_STORE_BYTES = 100 * 2**20  # tensors never go through Ray


@dataclass
class Result(ray.train.Result):
    """What a run gave: Ray Train's result, and what makes runs comparable.

    `metrics` holds what result.json holds; `events` what happened, in order.
    """

    metrics: dict[str, Any]
    params_sha256: str = ""
    samples_sha256: str = ""
    exact: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)


class ElasticTrainer:
    """Train a task on workers that may come, go, slow down and die.

    Args:
        task: a `Task`; not needed if the job file names one.
        job: path of a job file, a mapping with the same keys, or a `JobConfig`.
        scaling_config: `num_workers` overrides `workers.start`.
        run_config: `name` and `storage_path` decide the run folder, `storage_path/name`.
        faults: a schedule of faults, for tests and demonstrations.

    Raises:
        ConfigError: from the constructor or `fit`, before anything is started.
    """

    def __init__(
        self,
        task: Task | None = None,
        *,
        job: str | Path | Mapping[str, Any] | JobConfig,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        faults: tuple[Fault, ...] = (),
    ) -> None:
        self._job = _scaled(job if isinstance(job, JobConfig) else load_job(job), scaling_config)
        self._task = task
        self._faults = faults
        self._run_dir = _run_dir(self._job, run_config)
        if task is not None:
            check_task(task)
        elif not self._job.task:
            raise ConfigError("task: neither ElasticTrainer(task=...) nor the job file gives one")

    def fit(self) -> Result:
        """Run the job to its end; continue it if its run folder holds a checkpoint."""
        resume = checkpoint.latest_checkpoint(RunFolder(self._run_dir).checkpoints) is not None
        return run_job(
            self._job, run_dir=self._run_dir, task=self._task, faults=self._faults, resume=resume
        )


def _scaled(job: JobConfig, scaling: ScalingConfig | None) -> JobConfig:
    """The job with the number of workers that Ray Train's config asks for."""
    if scaling is None or scaling.num_workers is None:
        return job
    num = scaling.num_workers
    if not isinstance(num, int):
        raise ConfigError(
            f"ScalingConfig.num_workers is {num!r}, must be an int; set workers.min and"
            " workers.max in the job file for a range"
        )
    workers = job.workers.model_dump()
    workers |= {"start": num, "max": max(num, job.workers.max), "min": min(num, job.workers.min)}
    return load_job({**job.model_dump(), "workers": workers})


def _run_dir(job: JobConfig, run: RunConfig | None) -> Path:
    if run is None or run.storage_path is None:
        return new_run_dir(job.name)
    if "://" in str(run.storage_path):
        raise ConfigError(f"RunConfig.storage_path is {run.storage_path!r}, must be a local folder")
    base = Path(str(run.storage_path))
    return base / run.name if run.name else new_run_dir(job.name, base)


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
    setup = _make_setup(job, run, task, faults, resume=resume)
    with local_cluster() as address:
        killed = _last_driver_was_killed(run)
        _await_name(job.name, _ORPHANS_END_S if killed else 0.0)
        end_orphans(job.name)
        if killed:
            _await_writers(run)
        if killed and resume:  # it may have written another checkpoint meanwhile
            setup = replace(setup, resume_from=checkpoint.find_checkpoint(run.path).path)
        removed = remove_leftovers()
        if removed:
            log.warning("removed what dead jobs had left in shared memory: %s", ", ".join(removed))
        _begin_run(run, job, address, setup)
        coordinator = launch_coordinator(setup)
        try:
            status = _watch_or_stop(coordinator, on_status)
            failure = ray.get(coordinator.failure.remote())
        finally:
            run.ray_json.unlink(missing_ok=True)
            ray.kill(coordinator, no_restart=True)
            end_orphans(job.name)  # there are none unless an error brought us here
            setup.open_store().remove()
    if failure is not None:
        raise failure
    result = _result(run, status)
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
    newest = None
    if resume:
        found = checkpoint.find_checkpoint(run.path)
        check_resume(found.meta["job"], job)
        newest = found.path
    paths = tuple(dict.fromkeys(path or os.getcwd() for path in (os.getcwd(), *sys.path)))
    return JobSetup(
        job=job,
        run=run,
        run_id=secrets.token_hex(4),
        node="local",
        import_paths=paths,
        task=cloudpickle.dumps(task) if task is not None else None,
        faults=faults,
        resume_from=newest,
    )


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
    resumed = setup.resume_from
    run.append_event(
        {
            "time_s": time.time(),
            "kind": "job_started" if resumed is None else "job_resumed",
            "step": 0,
            "generation": 0,
            "worker": None,
            "reason": f"{job.steps} steps" if resumed is None else f"from {resumed}",
        }
    )


@contextlib.contextmanager
def local_cluster() -> Iterator[str]:
    """The Ray cluster at hand, or one on this machine until the end of the block. Its address.

    Several jobs run in one block share the cluster, which takes seconds to start.
    """
    started = not ray.is_initialized()
    if started:
        _connect(os.environ.get("RAY_ADDRESS"))
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        if started:
            ray.shutdown()


def _connect(address: str | None) -> None:
    """Connect to a cluster, or start one on this machine."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # left unset, two processes may disagree
    settings: dict[str, Any] = {"address": address}
    if address is None:
        settings = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **settings)
    _silence_raylet()


def _silence_raylet() -> None:
    """Stop Ray from printing a paragraph on each worker's death: our events say it in a line."""
    driver: Any = ray._private.worker.global_worker
    driver.threads_stopped.set()
    driver.gcs_error_subscriber.close()


def _watch_or_stop(coordinator: Any, on_status: Callable[[Status], None] | None) -> Status:
    """Follow the job until it ends; an interrupt ends it in good order, a second one at once."""
    with _sigterm_interrupts():
        try:
            return _watch(coordinator, on_status)
        except KeyboardInterrupt:
            log.warning("stopping: finishes the step, writes a checkpoint; again to abandon")
            coordinator.stop.remote("interrupted")
            return _watch(coordinator, on_status)


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


def _watch(coordinator: Any, on_status: Callable[[Status], None] | None) -> Status:
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
            return status
        time.sleep(_POLL_S)


def _result(run: RunFolder, status: Status) -> Result:
    metrics = run.read_json(run.result_json)
    if metrics["failure"]:
        raise FatalError(f"{metrics['failure']} (run folder: {run.path})")
    newest = checkpoint.latest_checkpoint(run.checkpoints)
    return Result(
        metrics=metrics,
        checkpoint=Checkpoint(newest) if newest is not None else None,
        error=None,
        path=str(run.path),
        metrics_dataframe=None,
        best_checkpoints=[],
        params_sha256=metrics["params_sha256"],
        samples_sha256=metrics["samples_sha256"],
        exact=metrics["exact"],
        events=run.read_events(),
    )


@dataclass(frozen=True)
class JobHandle:
    """A running job, seen from another process."""

    _coordinator: Any

    def status(self) -> Status:
        status: Status = ray.get(self._coordinator.status.remote(), timeout=30)
        return status

    def scale(self, num_workers: int) -> None:
        """Want that many workers from now on.

        Raises:
            ConfigError: outside workers.min and workers.max.
        """
        refusal = ray.get(self._coordinator.scale.remote(num_workers), timeout=30)
        if refusal:
            raise ConfigError(refusal)

    def stop(self) -> None:
        """Let the job finish its step, write a checkpoint and end."""
        ray.get(self._coordinator.stop.remote("asked by a person"), timeout=30)


def connect(name_or_run: str) -> JobHandle:
    """Find a running job by its run folder, or by its name: through its newest run folder here,
    else through its actor on the cluster of RAY_ADDRESS or of this machine.

    Raises:
        ConfigError: no such job runs.
    """
    try:
        run = find_run(name_or_run)
    except ConfigError:
        coordinator = _find_by_actor(name_or_run)
        if coordinator is None:
            raise
        return JobHandle(coordinator)
    where = run.read_json(run.ray_json)
    if not ray.is_initialized():
        _connect(where["address"])
    coordinator = find_coordinator(str(where["coordinator"]).removesuffix("/coordinator"))
    if coordinator is None:
        raise ConfigError(f"{name_or_run}: its Ray cluster runs no such job")
    return JobHandle(coordinator)


def _find_by_actor(name: str) -> Any | None:
    try:
        if not ray.is_initialized():
            _connect(os.environ.get("RAY_ADDRESS", "auto"))
    except ConnectionError:
        return None
    return find_coordinator(name)
