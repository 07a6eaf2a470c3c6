"""Ray Train's configs as settings of a job: what is given counts, what we cannot do is refused.

A field counts as given where it differs from its default. Pure: reads nothing but its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from elastic.core.config import Workers
from elastic.core.errors import ConfigError
from elastic.core.storage import below, is_uri
from elastic.core.yaml_file import Document, Key, with_values

_AUTOMATIC_NAME = re.compile(r"ray_train_run-\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")

_ONE_MACHINE = "workers share one machine's memory; `workers: {max: ...}` says how many at most"
_NOTICES = "`preemption: {source: auto}` of the job file heeds a cloud's notice; leave it out"
_NEVER_FAILS = "workers that end never fail a job here, and cost no restart; leave it out"
_ALTERNATIVES: dict[tuple[type, str], str] = {
    (ScalingConfig, "resources_per_worker"): (
        "workers reserve nothing from Ray; `workers: {threads: N}` sets the processors of one"
    ),
    (ScalingConfig, "placement_strategy"): _ONE_MACHINE,
    (ScalingConfig, "accelerator_type"): _ONE_MACHINE,
    (ScalingConfig, "label_selector"): _ONE_MACHINE,
    (ScalingConfig, "use_tpu"): "`device:` of the job file says where workers compute",
    (ScalingConfig, "topology"): _ONE_MACHINE,
    (ScalingConfig, "elastic_resize_monitor_interval_s"): (
        "workers join and leave between two steps, without waiting; `elastic scale` asks for it"
    ),
    (ScalingConfig, "trainer_resources"): "the driver and the coordinator reserve nothing from Ray",
    (CheckpointConfig, "checkpoint_frequency"): "`checkpoint: {every: N}` of the job file",
    (CheckpointConfig, "checkpoint_at_end"): "there always is one at the end; leave it out",
    (FailureConfig, "fail_fast"): "max_failures=0 begins again never",
    **{
        (RunConfig, name): "it is of Ray Tune; leave it out"
        for name in ("sync_config", "verbose", "stop", "progress_reporter", "log_to_file")
    },
    (RunConfig, "storage_filesystem"): "give a local folder as RunConfig.storage_path",
    (RunConfig, "worker_runtime_env"): (
        "workers run in the driver's folder, import path and environment; install packages there"
    ),
    (RunConfig, "logging_config"): "set the level of the logger 'elastic' with `logging`",
    (FailureConfig, "controller_failure_limit"): (
        "Ray restarts the coordinator without limit, and steps go on meanwhile; leave it out"
    ),
    (FailureConfig, "max_preemption_failures"): _NOTICES,
    (FailureConfig, "relax_collectives_on_preemption"): _NEVER_FAILS,
    (FailureConfig, "preemption_grace_s"): _NOTICES,
}
_TRANSLATED = {
    ScalingConfig: {"num_workers", "use_gpu"},
    RunConfig: {"name", "storage_path", "failure_config", "checkpoint_config", "callbacks"},
    CheckpointConfig: {"num_to_keep", "checkpoint_score_attribute", "checkpoint_score_order"},
    FailureConfig: {"max_failures"},
}


@dataclass(frozen=True)
class Given:
    """What Ray Train's configs say, in our words."""

    document: Document
    """The job, with their settings over it; unchecked."""
    name: str | None = None
    """Of the run folder."""
    storage: Path | None = None
    """The folder of this machine that holds run folders."""
    callbacks: tuple[Any, ...] = ()
    max_failures: int = 0


def read_configs(document: Document, scaling: Any, run: Any) -> Given:
    """Lay a `ScalingConfig` and a `RunConfig`, or None, over a job.

    Raises:
        ConfigError: one line for every given field that has no meaning here: its name, the value,
            what to do instead.
    """
    problems = [*_unsupported(scaling, ScalingConfig), *_unsupported(run, RunConfig)]
    if isinstance(run, RunConfig):
        problems += _unsupported(run.failure_config, FailureConfig)
        problems += _unsupported(run.checkpoint_config, CheckpointConfig)
        problems += _wrong_values(run)
    if problems:
        raise ConfigError("\n".join(problems))
    values: dict[Key, tuple[Any, str]] = {}
    if scaling is not None:
        values |= _scaling_values(scaling, document)
    if run is None:
        return Given(with_values(document, values))
    name = None if _AUTOMATIC_NAME.fullmatch(str(run.name)) else run.name
    if name is not None:
        values[("name",)] = name, "RunConfig.name"
    values |= _checkpoint_values(run.checkpoint_config)
    storage = None if _is_default(run, "storage_path") else str(run.storage_path)
    if storage is not None and is_uri(storage):
        values["checkpoint", "storage"] = below(storage, str(name)), "RunConfig.storage_path"
        storage = None
    return Given(
        with_values(document, values),
        name=name,
        storage=Path(storage).expanduser() if storage is not None else None,
        callbacks=tuple(run.callbacks),
        max_failures=run.failure_config.max_failures,
    )


def _unsupported(config: Any, kind: type) -> Iterator[str]:
    """One line for each field that was given and is not translated."""
    if config is None:
        return
    if not isinstance(config, kind):
        yield f"{kind.__name__}: got {config!r}; needs a ray.train.{kind.__name__}"
        return
    for field in fields(kind):
        if field.name in _TRANSLATED[kind] or _is_default(config, field.name):
            continue
        value, alternative = getattr(config, field.name), _ALTERNATIVES[kind, field.name]
        yield f"{kind.__name__}.{field.name}: got {value!r}, which is not supported; {alternative}"


def _is_default(config: Any, name: str) -> bool:
    """Whether the field holds what it holds where nobody gave it."""
    return bool(getattr(config, name) == getattr(type(config)(), name))


def _wrong_values(run: Any) -> Iterator[str]:
    """What Ray Train's own checks let pass."""
    num = run.failure_config.max_failures
    if type(num) is not int or num < -1:
        yield (
            f"FailureConfig.max_failures: got {num!r}; needs a whole number, at least 0, or -1 for"
            " no limit"
        )
    metric = run.checkpoint_config.checkpoint_score_attribute
    if metric is not None and run.checkpoint_config.num_to_keep is None:
        yield (
            f"CheckpointConfig.checkpoint_score_attribute: got {metric!r}, which alone keeps none;"
            " needs num_to_keep too, so many of the best stay"
        )
    if is_uri(run.storage_path) and _AUTOMATIC_NAME.fullmatch(run.name):
        yield (
            f"RunConfig.storage_path: got {run.storage_path!r}; a URI needs RunConfig.name too,"
            " which names the folder of checkpoints there"
        )


def _checkpoint_values(config: Any) -> dict[Key, tuple[Any, str]]:
    """The newest stay, or with a metric the best beside them."""
    num, metric = config.num_to_keep, config.checkpoint_score_attribute
    given = {
        "keep_last" if metric is None else "keep_best": (num, "num_to_keep"),
        "metric": (metric, "checkpoint_score_attribute"),
        "mode": (config.checkpoint_score_order if metric else None, "checkpoint_score_order"),
    }
    return {
        ("checkpoint", key): (value, f"CheckpointConfig.{field}")
        for key, (value, field) in given.items()
        if value is not None
    }


def _scaling_values(scaling: Any, document: Document) -> dict[Key, tuple[Any, str]]:
    """`workers` for an exact number, with room for it, or for a range, which begins within it."""
    section = document.value.get("workers") if isinstance(document.value, Mapping) else None
    now = {key: field.default for key, field in Workers.model_fields.items()}
    if isinstance(section, Mapping):
        now |= {key: value for key, value in section.items() if type(value) is int}
    num = scaling.num_workers
    if isinstance(num, tuple):
        low, high = num
        workers = {"start": min(max(now["start"], low), high), "min": low, "max": high}
    else:
        workers = {"start": num, "min": min(num, now["min"]), "max": max(num, now["max"])}
    values: dict[Key, tuple[Any, str]] = {
        ("workers", key): (value, "ScalingConfig.num_workers") for key, value in workers.items()
    }
    if scaling.use_gpu:
        values[("device",)] = "cuda", "ScalingConfig.use_gpu"
    return values
