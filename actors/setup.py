"""What every process of a job is told at its start. Light to import: no torch, no Ray."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic.core.runs import RunFolder

if TYPE_CHECKING:
    from elastic.core.config import JobConfig
    from elastic.core.faults import Fault
    from elastic.core.store import Store
    from elastic.core.task import Dataset, Task
    from elastic.core.weights import Initial

log = logging.getLogger(__name__)

NAMESPACE = "elastic"

NICE_STEP = 0  # what a step or a verdict waits for: computing, acting aggregator, coordinator
NICE_START = 10  # a worker on its way, where the step is at 0
_NICE_FIRST = 5  # times its number: a worker that a job begins with
NICE_BEHIND = 19  # checkpoints


@dataclass(frozen=True, slots=True)
class JobSetup:
    """One job on one node. `task` is a pickled task object; None: the job file names it.

    Of a job of several models each has a setup, too: with its own job, run folder and memory.
    """

    job: JobConfig
    run: RunFolder
    run_id: str
    secret: bytes = field(repr=False)
    """What links between the nodes of the job prove to know."""
    node: int = 0
    address: str = ""
    """The IP address of this node, for its links to others; each process sets its own."""
    import_paths: tuple[str, ...] = ()
    folder: str = ""
    """Where the job was started: the task's own paths may be relative to it. "": stay."""
    task: bytes | None = None
    faults: tuple[Fault, ...] = ()
    resume_from: str | None = None
    first_step: int = 0
    """That of the checkpoint."""
    damaged: tuple[str, ...] = ()
    """What is wrong with newer checkpoints than `resume_from`."""
    initial: Initial | None = None
    """The weights that the run began with, if `init_from` gave any."""
    models: tuple[JobSetup, ...] = ()
    """The setups of several models; none: this is the one of the only model."""
    model: int | None = None
    """Which of several models this is the setup of."""

    @property
    def lanes(self) -> tuple[JobSetup, ...]:
        """The setup of each model."""
        return self.models or (self,)

    @property
    def checkpoints(self) -> str:
        """Where they are written: the path or URI of a folder."""
        return self.job.checkpoint.storage or str(self.run.checkpoints)

    @property
    def has_nodes(self) -> bool:
        """Whether the job may take part on several nodes."""
        return self.job.nodes.max > 1

    @property
    def coordinator_name(self) -> str:
        return f"{self.job.name}/coordinator"

    def actor_name(self, role: str, number: int) -> str:
        """The name of a worker's or aggregator's actor, unique among all runs."""
        return f"{self.job.name}/{self.run_id}/{role}-{number}@{self.node}"

    def open_store(self) -> Store:
        from elastic.core.store import Store

        store = Store.named(self.job.name, self.run_id, str(self.node))
        return store if self.model is None else store.of_model(self.model)

    def load_task(self) -> Task:
        """The user's code, in the folder and with the import path of where the job was started."""
        import cloudpickle

        from elastic.core.task import check_task, load_task

        if self.folder:
            os.chdir(self.folder)
        for path in reversed(self.import_paths):
            if path not in sys.path:
                sys.path.insert(0, path)
        if self.task is None:
            return load_task(self.job.task, self.job.task_args)
        task: Task = cloudpickle.loads(self.task)
        check_task(task)
        return task


def load_tasks(setup: JobSetup) -> list[Task]:
    """The task of each model; one object for those that differ in nothing but the seed."""
    known: dict[str, Task] = {}
    tasks = []
    for lane in setup.lanes:
        arguments = json.dumps(lane.job.task_args, sort_keys=True)
        if arguments not in known:
            known[arguments] = lane.load_task()
        tasks.append(known[arguments])
    return tasks


def datasets_of(tasks: Iterable[Task]) -> Iterator[Dataset]:
    """What each task reads; made once for those that are one object."""
    from elastic.core.data.map_style import as_dataset

    known: dict[int, Dataset] = {}
    for task in tasks:
        if id(task) not in known:
            known[id(task)] = as_dataset(task.dataset())
        yield known[id(task)]


def parse_actor_name(name: str) -> tuple[str, int, int]:
    """Role, number and node of a worker's or aggregator's actor."""
    role, _, rest = name.rpartition("/")[2].partition("-")
    number, _, node = rest.partition("@")
    return role, int(number), int(node)


def set_nice(value: int) -> None:
    """Set the nice value of this thread and of the threads that it makes later.

    Ray starts processes at 15. What a step waits for runs at 0, so that a process that starts
    beside it takes little from it. To lower the value needs a privilege that containers usually
    have; without it the value stays, and the log says so.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), value)
    except PermissionError:
        log.warning("not allowed to lower the nice value to %d; a start slows others more", value)


def hurry() -> None:
    """Give this thread, and all of Ray's in this process, the priority that a step has.

    Whichever of them holds Python's lock is waited for by all: at Ray's 15 it is seldom run where
    cores are few, and nodes that said nothing for a second were taken to be lost.
    """
    rays = os.getpriority(os.PRIO_PROCESS, os.getpid())  # that of the main thread, which is Ray's
    set_nice(NICE_STEP)
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended; told already
            if os.getpriority(os.PRIO_PROCESS, thread) == rays:
                os.setpriority(os.PRIO_PROCESS, thread, NICE_STEP)


def nice_to_load(worker: int, *, together: bool) -> int:
    """Together and behind the steps, or one worker after the other.

    Before the first step the latter lets it begin, where cores are few, before all have loaded.
    """
    return NICE_START if together else min(NICE_START, _NICE_FIRST * worker)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Do not look for garbage meanwhile: modules stay, and torch's cost a tenth more with it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def compute_environment(threads: int) -> dict[str, str]:
    """Environment that must be set before torch loads, so that all processes round alike."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "MKL_CBWR": os.environ.get("MKL_CBWR", "AVX2"),
        "ATEN_CPU_CAPABILITY": os.environ.get("ATEN_CPU_CAPABILITY", "avx2"),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX2"),
        "TORCHINDUCTOR_DETERMINISTIC": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without, its sums may differ between calls
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray hides the GPUs from our actors
        # temporaries stay mapped: giving them back costs a page fault for every 4 KiB
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }
