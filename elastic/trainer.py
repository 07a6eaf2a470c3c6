"""The face of training for scripts: `ElasticTrainer`, in Ray Train's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig

from elastic.core import checkpoint
from elastic.core.config import JobConfig, load_job
from elastic.core.errors import ConfigError
from elastic.core.faults import Fault
from elastic.core.runs import new_run_dir
from elastic.core.task import Task, check_task
from elastic.driver import run_job
from elastic.result import Result


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
        where = checkpoint.checkpoints_of(self._run_dir, self._job.checkpoint.storage)
        resume = checkpoint.latest_checkpoint(where) is not None
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
