"""The job files of experts, router and monolith, and what each costs: all from one experts file.

Pure: starts nothing. The monolith gets as many operations as all experts and the router together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic.core.config import JobConfig, load_job
from elastic.core.experts.flops import count_flops
from elastic.core.experts.repository import construct, example_input
from elastic.core.task import Task, load_task
from elastic.experts.config import ExpertsConfig, Training
from elastic.experts.partition import subset_folders

TRAINING_FACTOR = 3
"""A forward and a backward pass take three times the operations of a forward pass."""
MONOLITH, ROUTER = "monolith", "router"
_SHIPPED = {
    "flow": ("Flow", "FlowRouter"),
    "language": ("Language", "LanguageRouter"),
    "classifier": ("Classify", "ClassifyRouter"),
}


@dataclass(frozen=True)
class Planned:
    """One job of the family.

    Attributes:
        role: expert-K, random-K, router or monolith.
        run: its run folder.
    """

    role: str
    seed: int
    job: JobConfig
    run: Path

    def task(self) -> Task:
        """The task as its job builds it."""
        return load_task(self.job.task, self.job.task_args)


@dataclass(frozen=True)
class Cost:
    """What a model takes, in floating-point operations."""

    flops_per_call: int
    num_samples: int

    @property
    def training_flops(self) -> int:
        return TRAINING_FACTOR * self.flops_per_call * self.num_samples


def expert_jobs(config: ExpertsConfig) -> list[Planned]:
    """All experts of all seeds; with what they are compared with, where that is asked for."""
    jobs = []
    for seed in config.seeds:
        jobs += [plan(config, name, seed) for name in config.subset_names]
        if config.monolith:
            jobs.append(plan(config, MONOLITH, seed))
        if config.random_partition:
            jobs += [plan(config, name, seed) for name in random_names(config)]
    return jobs


def router_jobs(config: ExpertsConfig) -> list[Planned]:
    """A router for each seed."""
    return [plan(config, ROUTER, seed) for seed in config.seeds]


def random_names(config: ExpertsConfig) -> list[str]:
    """Experts of subsets drawn by lot."""
    return [f"random-{k}" for k in range(config.partition.num_experts)]


def plan(config: ExpertsConfig, role: str, seed: int) -> Planned:
    """The job of one model."""
    training = config.router if role == ROUTER else config.expert
    folders, steps, size = subset_folders(config), training.steps, training.micro_batch_size
    arguments: dict[str, Any] = {"data": folders}
    if role == MONOLITH:
        size, steps = size * len(folders), monolith_steps(config)
    elif role.startswith("random-"):
        arguments["lot"] = [int(role.removeprefix("random-")), len(folders), seed]
    elif role != ROUTER:
        arguments["data"] = [folders[config.subset_names.index(role)]]
    name = f"{config.name}-{role}-{seed}"
    job = load_job(
        {
            "name": name,
            "task": _reference(config, training, is_router=role == ROUTER),
            "task_args": {**_arguments(config, training, role), **arguments, "steps": steps},
            "seed": _seed_of(name),
            "steps": steps,
            "batch": {"micro_batches": training.micro_batches, "micro_batch_size": size},
            "workers": _workers(config.islands.workers),
            "standby": config.islands.workers > 1,
            "clip_norm": config.clip_norm,
            "ema": _average(config, steps),
            "checkpoint": {"every": config.islands.checkpoint_every, "keep_last": 2},
        }
    )
    return Planned(role, seed, job, config.root.absolute() / "runs" / f"{role}-{seed}")


def _average(config: ExpertsConfig, steps: int) -> dict[str, float] | None:
    if config.ema_decay is None:
        return None
    decay = config.ema_decay
    return {"decay": max(0.5, 1 - 10 / steps) if decay == "auto" else decay}


def monolith_steps(config: ExpertsConfig) -> int:
    """So many that the monolith takes the operations of all experts and the router."""
    experts, router = cost(config, "expert-0"), cost(config, ROUTER)
    total = config.partition.num_experts * experts.training_flops
    return round(config.expert.steps * (1 + router.training_flops / total))


def cost(config: ExpertsConfig, role: str) -> Cost:
    """Counted on the model itself, of one sample."""
    training = config.router if role == ROUTER else config.expert
    samples = training.num_samples
    if role == MONOLITH:
        samples = monolith_steps(config) * training.micro_batches * training.micro_batch_size
        samples *= config.partition.num_experts
    reference = _reference(config, training, is_router=role == ROUTER)
    arguments = {
        **_arguments(config, training, role),
        "data": subset_folders(config),
        "steps": training.steps,
    }
    task: Any = load_task(reference, arguments)
    with torch.random.fork_rng(devices=()):
        module = construct(task.spec())
    return Cost(count_flops(module, *example_input(config.kind, config.data.shape)), samples)


def _reference(config: ExpertsConfig, training: Training, *, is_router: bool) -> str:
    return training.task or f"elastic.experts.tasks:{_SHIPPED[config.kind][is_router]}"


def _arguments(config: ExpertsConfig, training: Training, role: str) -> dict[str, Any]:
    if training.task is not None:
        return dict(training.task_args)
    arguments = {**config.arguments_of_data(), **training.task_args}
    if config.kind == "classifier" and role != ROUTER:
        arguments |= {"label": config.data.label, "num_classes": config.data.num_classes}
    return arguments


def _seed_of(name: str) -> int:
    """Every job begins elsewhere; the same file gives the same."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _workers(num: int) -> dict[str, int]:
    """An island of one worker starts no spare: it begins again where it dies."""
    return {"start": num, "min": 1, "max": max(num, 1), "spare": int(num > 1)}


def by_seed(jobs: list[Planned]) -> Iterator[tuple[int, list[Planned]]]:
    """The jobs of each seed."""
    for seed in dict.fromkeys(one.seed for one in jobs):
        yield seed, [one for one in jobs if one.seed == seed]
