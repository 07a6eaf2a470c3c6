"""A running job, seen from another process: find it, ask it, scale it, stop it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray

from actors.launch import find_coordinator
from elastic.cluster import join_cluster
from elastic.core.errors import ConfigError
from elastic.core.runs import find_run
from elastic.core.status import Status


@dataclass(frozen=True)
class JobHandle:
    """A running job, seen from another process."""

    _coordinator: Any

    def status(self) -> Status:
        status: Status = ray.get(self._coordinator.status.remote(), timeout=30)
        return status

    def scale(self, num_workers: int | None = None, num_nodes: int | None = None) -> None:
        """Want that many workers, on that many hosts, from now on; None: as many as before.

        Raises:
            ConfigError: outside workers.min and workers.max, or nodes.min and nodes.max.
        """
        refusal = ray.get(self._coordinator.scale.remote(num_workers, num_nodes), timeout=30)
        if refusal:
            raise ConfigError(refusal)

    def undo(self, culprit: str = "all") -> list[str]:
        """Take back what was done about a culprit of a verdict, such as "worker 3", and do it no
        more by itself. Returns what that was.

        Raises:
            ConfigError: nothing was done about it.
        """
        undone: list[str] = ray.get(self._coordinator.undo.remote(culprit), timeout=30)
        if not undone:
            raise ConfigError(f"{culprit}: nothing was done about it that could be undone")
        return undone

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
        join_cluster(where["address"], where.get("auth_mode"))
    coordinator = find_coordinator(str(where["coordinator"]).removesuffix("/coordinator"))
    if coordinator is None:
        raise ConfigError(f"{name_or_run}: its Ray cluster runs no such job")
    return JobHandle(coordinator)


def _find_by_actor(name: str) -> Any | None:
    try:
        if not ray.is_initialized():
            join_cluster(os.environ.get("RAY_ADDRESS", "auto"))
    except ConfigError:
        return None
    return find_coordinator(name)
