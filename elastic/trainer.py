"""The face of training for scripts: `ElasticTrainer`, in Ray Train's words.

Light to import: torch, Ray, Ray Train and pydantic are loaded when they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.core.errors import ConfigError
from elastic.core.runs import new_run_dir, runs_folder
from elastic.core.task import Task, check_task

if TYPE_CHECKING:
    from ray.train import RunConfig, ScalingConfig

    from elastic.callbacks import Callback
    from elastic.core.config import JobConfig
    from elastic.core.faults import Fault
    from elastic.core.yaml_file import Document, Key
    from elastic.result import Result

_ARGUMENTS_OF_RAY = {
    "train_loop_per_worker": "a step is a task's `loss`; see elastic.Task",
    "train_loop_config": "give the task arguments of its own, or `task_args` in the job file",
    "datasets": "a task opens its data in `dataset()`",
    "dataset_config": "a task opens its data in `dataset()`",
    "torch_config": "workers form no process group; leave it out",
    "backend_config": "workers form no process group; leave it out",
    "resume_from_checkpoint": "the same RunConfig.name and storage_path go on where a run ended",
    "metadata": "write it beside the run",
}
"""Arguments of Ray Train's trainers that `ElasticTrainer` lacks, and what to do."""


class ElasticTrainer:
    """Train a task on workers that may come, go, slow down and die.

    What is given later in this list wins over what is given before.

    Args:
        task: a `Task`; not needed if the job file names one.
        job: path of a job file, a mapping with the same keys, or a `JobConfig`.
        settings: keys of the job file, such as `steps=100, batch={"micro_batches": 8, ...}`.
        scaling_config: `num_workers` is `workers.start`, or (`workers.min`, `workers.max`).
        run_config: `name` and `storage_path` decide the run folder, `storage_path/name`: fitting
            under the same name again goes on with the run that lies there. Without a name each
            run has a folder of its own; without a storage path all lie in ./runs (in a job of
            `ray job submit --working-dir` in ~/ray_results). With a URI the checkpoints lie in
            `storage_path/name`, and the run folder as without one. `name` is the
            job's name too. `checkpoint_config` gives `checkpoint.keep_last`, or with a metric
            `checkpoint.keep_best`; `failure_config.max_failures` how often the job may begin
            again at its newest checkpoint after it failed itself; faults of workers never count.
            -1: without limit.
        callbacks: told what happens, in this process, before those of `run_config`.
        faults: a schedule of faults, for tests and demonstrations.

    Raises:
        ConfigError: from the constructor or `fit`, before anything is started.
    """

    def __init__(
        self,
        task: Task | None = None,
        *,
        job: str | Path | Mapping[str, Any] | JobConfig | None = None,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        callbacks: Sequence[Callback] = (),
        faults: tuple[Fault, ...] = (),
        **settings: Any,
    ) -> None:
        from elastic.core.config import JobConfig
        from elastic.core.yaml_file import validate, with_values

        _check_arguments(settings)
        document = with_values(_read(job, task), dict(_leaves((), settings)))
        self._storage = runs_folder()
        self._run_dir: Path | None = None
        self._callbacks, self._max_failures = tuple(callbacks), 0
        if scaling_config is not None or run_config is not None:
            from elastic.ray_config import read_configs

            given = read_configs(document, scaling_config, run_config)
            document, self._max_failures = given.document, given.max_failures
            self._storage = given.storage or self._storage
            self._run_dir = self._storage / given.name if given.name is not None else None
            self._callbacks += given.callbacks
        if self._callbacks:
            from elastic.callbacks import check_callbacks

            check_callbacks(self._callbacks)
        self._job = validate(JobConfig, document)
        self._task, self._faults = task, faults
        if task is not None:
            check_task(task)
        elif not self._job.task:
            raise ConfigError("task: neither ElasticTrainer(task=...) nor the job file gives one")

    def fit(self) -> Result:
        """Run the job to its end, and return its result.

        Goes on from the newest checkpoint if the run folder holds one. A run that has all its
        steps gives its result again, and computes nothing.

        Raises:
            ConfigError: the task, the data or the machine cannot do what is asked, or the run
                folder holds a run of other settings, which it names.
            FatalError: the job failed.
            CallbackError: a callback raised; the job was stopped in good order.
        """
        from elastic.driver import run_job

        if self._run_dir is None:
            self._run_dir = new_run_dir(self._job.name, self._storage)
        return run_job(
            self._job,
            run_dir=self._run_dir,
            task=self._task,
            faults=self._faults,
            resume=True,
            callbacks=self._callbacks,
            max_failures=self._max_failures,
        )


def _check_arguments(settings: Mapping[str, Any]) -> None:
    """Teach who comes from Ray Train."""
    problems = [
        f"ElasticTrainer({name}=...): not supported; {_ARGUMENTS_OF_RAY[name]}"
        for name in settings
        if name in _ARGUMENTS_OF_RAY
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _read(job: str | Path | Mapping[str, Any] | JobConfig | None, task: Task | None) -> Document:
    """The job as given; one that is a mapping without a name has that of its task."""
    from elastic.core.config import JobConfig, read_job
    from elastic.core.yaml_file import Document

    if isinstance(job, JobConfig):
        return Document(job.model_dump(), "job")
    if job is not None and not isinstance(job, str | Path | Mapping):
        raise ConfigError(f"job: got {job!r}; needs a path, a mapping or a JobConfig")
    if isinstance(job, str | Path):
        return read_job(job)
    name = {} if task is None else {"name": type(task).__name__}
    return Document({**name, **(job or {})}, "ElasticTrainer" if job is None else "job")


def _leaves(above: Key, settings: Mapping[str, Any]) -> Iterator[tuple[Key, tuple[Any, str]]]:
    """Each single setting with its key: sections given in part leave the rest as it is."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves((*above, name), value)
        else:
            yield (*above, name), (value, "ElasticTrainer")


__all__ = ["ElasticTrainer"]
