"""Starts the applications of a repository on Ray Serve, and keeps them as the repository is.

The ingress at `/`, and in distributed mode one application for each expert. Never touches
applications of others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from ray import serve
from ray.serve import Application, RunTarget

from elastic.core.errors import ElasticError
from elastic.core.experts.repository import Repository
from elastic.core.memory import available_bytes
from elastic.core.runs import RunFolder, runs_folder
from monitoring.exporter import discovery, reached_at
from policies.placing import Placed, PlacingView, decide
from policies.routing import All, Policy, TopK
from serve.proxy import controller_options
from serve.replicas import ExpertReplica, Ingress, application_of
from serve.settings import Placement, Serving
from serve.version import read_version

log = logging.getLogger(__name__)

_HOP_S = 0.006
"""A call of another replica by its handle: median on 2 cores with Ray Serve 2.60."""
_NUM_TIMED = 5
_SHARE_OF_MEMORY = 0.5


def place(settings: Serving) -> Placed:
    """How the experts are to be placed; `auto` measures a call of the first one."""
    mode = settings.placement.mode
    if mode != "auto":
        return Placed(mode, "placement.mode")
    version = read_version(settings.repository, settings.selection)
    repository, policy = version.repository, version.policy
    expert, inputs = repository.load_expert(version.names[0]), version.example()
    torch.set_num_threads(settings.placement.threads)
    seconds = []
    with torch.inference_mode():
        for _ in range(_NUM_TIMED):
            begin_s = time.perf_counter()
            expert(*inputs)
            seconds.append(time.perf_counter() - begin_s)
    return decide(
        PlacingView(
            call_s=min(seconds),
            num_asked=min(_most_asked(policy), len(version.names)),
            hop_s=_HOP_S,
            experts_bytes=sum(4 * one.num_parameters for one in version.manifest.experts),
            memory_bytes=int(_SHARE_OF_MEMORY * available_bytes()),
            num_cpus=len(os.sched_getaffinity(0)),
        )
    )


def _most_asked(policy: Policy) -> int:
    if isinstance(policy, TopK):
        return policy.k
    return sys.maxsize if isinstance(policy, All) else policy.at_most


def ingress(arguments: Mapping[str, Any]) -> Application:
    """The ingress, for `serve deploy`: `settings` as in a file, and `mode`."""
    settings = Serving.model_validate(arguments["settings"])
    own = settings.placement
    limit = 2 * settings.batching.max_queue_rows  # so that ours refuses, not Serve's
    deployment = serve.deployment(
        name="ingress",
        ray_actor_options={"num_cpus": own.num_cpus, "num_gpus": own.num_gpus},
        max_ongoing_requests=limit,
        max_queued_requests=limit,
        health_check_period_s=5,
        health_check_timeout_s=15,
        **_replicas(own.replicas, own.max_replicas),
    )
    bound = deployment(serve.ingress()(Ingress))
    return bound.bind(settings.model_dump(mode="json"), arguments["mode"])


def expert(arguments: Mapping[str, Any]) -> Application:
    """One expert, for `serve deploy`: `repository`, `name` and `placement`."""
    own = Placement.model_validate(arguments["placement"])
    deployment = serve.deployment(
        name="expert",
        ray_actor_options={"num_cpus": own.num_cpus, "num_gpus": own.num_gpus},
        max_ongoing_requests=32,
        health_check_period_s=5,
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=10,
        **_replicas(own.expert_replicas, own.max_expert_replicas),
    )
    return deployment(ExpertReplica).bind(
        str(arguments["repository"]), arguments["name"], own.threads
    )


def _replicas(num: int, most: int) -> dict[str, Any]:
    if most <= num:
        return {"num_replicas": num}
    return {"autoscaling_config": {"min_replicas": num, "max_replicas": most}}


def config(settings: Serving, mode: str) -> dict[str, Any]:
    """What `serve deploy` takes, for a cluster whose nodes all see the repository's folder."""
    names = Repository.open(settings.repository, verify=False)
    applications: list[dict[str, Any]] = []
    if mode == "distributed":
        applications = [
            {
                "name": application_of(names.manifest.name, one),
                "route_prefix": None,
                "import_path": "serve.launch:expert",
                "args": {"name": one, **_expert_arguments(settings)},
            }
            for one in names.names
        ]
    arguments = {"settings": settings.model_dump(mode="json"), "mode": mode}
    front = {"name": names.manifest.name, "route_prefix": "/"}
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(settings),
        "controller_options": controller_options(settings.limits.timeout_s),
        "applications": [
            *applications,
            {**front, "import_path": "serve.launch:ingress", "args": arguments},
        ],
    }


def start(settings: Serving) -> None:
    """Start Ray Serve; where it runs already, it stays as it is."""
    options = controller_options(settings.limits.timeout_s)
    serve.start(http_options=http_options(settings), controller_options=options)


def http_options(settings: Serving) -> dict[str, Any]:
    """Of Serve's proxies; they wait a little longer than we do, to let us say why."""
    return {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": settings.limits.timeout_s + 10,
    }


def _expert_arguments(settings: Serving) -> dict[str, Any]:
    return {
        "repository": str(settings.repository.resolve()),
        "placement": settings.placement.model_dump(mode="json"),
    }


@contextlib.contextmanager
def told_prometheus(name: str, settings: Serving) -> Iterator[None]:
    """While this lasts, a file beside the run folders says where metrics are scraped, as those of
    jobs do. Not where keys are set: such a file cannot hold one, and a scrape needs it."""
    if settings.keys:
        yield
        return
    run = RunFolder(runs_folder() / f"serving-{name}")
    run.path.parent.mkdir(parents=True, exist_ok=True)
    targets = discovery((reached_at(settings.host), settings.port), {}, job=name, run=run.path.name)
    run.write_json(run.prometheus_json, targets)
    try:
        yield
    finally:
        run.prometheus_json.unlink(missing_ok=True)


class Applications(Protocol):
    """What `ray.serve` does with applications."""

    def run_many(self, targets: Sequence[RunTarget]) -> Any:
        """Start them; raises RuntimeError where one does not."""
        ...

    def delete(self, name: str) -> None:
        """End one."""
        ...


class Deployed:
    """The applications of one repository. `step` again and again follows the folder."""

    def __init__(
        self,
        settings: Serving,
        mode: str,
        clock: Callable[[], float] = time.monotonic,
        applications: Applications = serve,
    ) -> None:
        """Starts them, and returns once they answer. Raises RuntimeError where they cannot."""
        self._applications = applications
        resolved = settings.repository.resolve()
        self._settings = settings.model_copy(update={"repository": resolved})
        self._mode, self._clock = mode, clock
        self.name = Repository.open(resolved, verify=False).manifest.name
        self._experts: set[str] = set()
        self._gone_s: dict[str, float] = {}
        arguments = {"settings": self._settings.model_dump(mode="json"), "mode": mode}
        front = RunTarget(ingress(arguments), name=self.name, route_prefix="/")
        self._applications.run_many([*self._missing(self._named()), front])

    def step(self) -> None:
        """Start applications of new experts; end those that no request can need any more."""
        if self._mode != "distributed":
            return
        try:
            names = self._named()
        except ElasticError as error:  # who serves says so too, and goes on with what it has
            log.error("cannot look for new experts: %s", error)
            return
        self._start(names)
        now_s = self._clock()
        self._gone_s = {one: self._gone_s.get(one, now_s) for one in self._experts - names}
        for one, since_s in self._gone_s.items():
            if now_s - since_s > self._settings.limits.timeout_s:
                self._applications.delete(application_of(self.name, one))
                self._experts.discard(one)

    def _start(self, names: set[str]) -> None:
        """New experts; what does not start is ended and tried again, and ends nobody else."""
        before = set(self._experts)
        missing = self._missing(names)
        if not missing:
            return
        try:
            self._applications.run_many(missing)
        except RuntimeError as error:
            log.error("new experts do not start, and are tried again: %s", error)
            for one in self._experts - before:
                self._applications.delete(application_of(self.name, one))
            self._experts = before

    def _named(self) -> set[str]:
        return set(Repository.open(self._settings.repository, verify=False).names)

    def _missing(self, names: set[str]) -> list[RunTarget]:
        """Applications of experts that have none."""
        if self._mode != "distributed":
            return []
        fresh = sorted(names - self._experts)
        self._experts |= set(fresh)
        given = _expert_arguments(self._settings)
        return [
            RunTarget(
                expert({"name": one, **given}),
                name=application_of(self.name, one),
                route_prefix=None,
            )
            for one in fresh
        ]

    def stop(self) -> None:
        """End them all; requests in work are finished."""
        self._applications.delete(self.name)
        for one in self._experts:
            self._applications.delete(application_of(self.name, one))
