"""What runs in replicas of Ray Serve: the ingress with its service, and an expert on its own.

Thin shells. The ingress holds all experts in co-located mode, and asks their applications in
distributed mode. Every wait for another process has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from torch import Tensor, nn

from elastic.core.experts.manifest import ExpertEntry
from elastic.core.experts.repository import Repository
from serve.app import App
from serve.pool import Inputs, LocalPool, Slow
from serve.service import Service
from serve.settings import Serving
from serve.version import Version, comparable, fault_of

log = logging.getLogger(__name__)

_START_S = 60.0
"""An application of a new expert may take so long to appear."""
_RETRY_S = 0.2
_NUM_KEPT = 4
_MAY_COME = (RayActorError, RayServeException)
"""A replica has died, or there is none yet: another one may answer."""


def application_of(repository: str, expert: str) -> str:
    """The name of an expert's Serve application."""
    return f"{repository}-{expert}"


def start_service(settings: Serving, mode: str) -> Service:
    """A running service; needs a thread without an event loop, as Serve's handles do."""
    torch.set_num_threads(settings.placement.threads)
    service = Service(
        settings, RemotePool() if mode == "distributed" else LocalPool(time.monotonic)
    )
    service.start()
    return service


class Ingress:
    """Takes requests. Serve calls `check_health`, and ends a replica in which it raises."""

    async def __init__(self, settings: Mapping[str, Any], mode: str) -> None:  # type: ignore[misc]
        given = Serving.model_validate(settings)
        self._service = await asyncio.to_thread(start_service, given, mode)
        self._mode = mode

    def __serve_build_asgi_app__(self) -> Starlette:
        return App(self._service, self._mode, tells_id=False).build()

    def check_health(self) -> None:
        """Raises where the engine does not move."""
        if not self._service.is_live():
            raise RuntimeError("the engine does not move")

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.stop()


class ExpertReplica:
    """One expert, in the versions that were asked for last."""

    def __init__(self, repository: str, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._path, self._name = Path(repository), name
        self._modules: dict[str, nn.Module] = {}
        self._lock = threading.Lock()
        now = Repository.open(self._path, verify=False)
        self._manifest = now.manifest
        self._load(now.expert(name))

    async def ask(self, entry: str, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        """A comparable answer of the version that `entry`, of a manifest, names."""
        wanted = ExpertEntry.model_validate_json(entry)
        module = self._modules.get(wanted.sha256)
        if module is None:  # others are answered while it is read
            module = await asyncio.to_thread(self._load, wanted)
        with torch.inference_mode():
            answer = module(*(torch.from_numpy(one.copy()) for one in arrays))
            return comparable(self._manifest.task, answer).numpy()

    def _load(self, entry: ExpertEntry) -> nn.Module:
        with self._lock:
            module = self._modules.get(entry.sha256)
            if module is None:
                alone = self._manifest.model_copy(update={"experts": (entry,)})
                module = Repository(self._path, alone).load_expert(self._name)
                kept = [*self._modules.items()][1 - _NUM_KEPT :]
                self._modules = {**dict(kept), entry.sha256: module}
        return module


class RemotePool:
    """Experts in applications of their own. A call is repeated once where its replica died: it
    changes nothing there, so that is safe."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        find: Callable[[str], Any] = serve.get_app_handle,
    ) -> None:
        """`find`: the handle of an application; raises RayServeException where there is none."""
        self._clock, self._find = clock, find
        self._tried: set[str] = set()
        self._handles: dict[str, Any] = {}

    def prepare(self, version: Version) -> dict[str, str]:
        """Have every replica load what is new, so that no request waits for that, and try it there.

        What was tried before is not: an expert that is lost now would hold up the others.
        """
        wrong: dict[str, str] = {}
        for k, (name, key) in enumerate(zip(version.names, version.keys, strict=True)):
            if key in self._tried:
                continue
            for answer in self._everywhere(version, k):
                fault = fault_of(version, answer, 1) if isinstance(answer, Tensor) else str(answer)
                if fault is not None:
                    wrong[name] = fault
            if name not in wrong:
                self._tried.add(key)
        return wrong

    def ask(
        self, version: Version, calls: Mapping[int, Inputs], timeout_s: float
    ) -> dict[int, Tensor | Exception]:
        deadline_s = self._clock() + timeout_s
        sent = {k: self._send(version, k, inputs) for k, inputs in calls.items()}
        answers: dict[int, Tensor | Exception] = {}
        for k, response in sent.items():
            answer = self._receive(response, deadline_s)
            if isinstance(answer, _MAY_COME):
                log.warning("expert %s is asked again: %s", version.names[k], _line(answer))
                answer = self._receive(self._send(version, k, calls[k]), deadline_s)
            answers[k] = answer
        return answers

    def keep(self, versions: Iterable[Version]) -> None:
        versions = list(versions)
        self._tried &= {key for version in versions for key in version.keys}
        names = {
            application_of(version.manifest.name, one)
            for version in versions
            for one in version.names
        }
        self._handles = {name: one for name, one in self._handles.items() if name in names}

    def _everywhere(self, version: Version, k: int) -> list[Tensor | Exception]:
        """What each replica says; one that has died says nothing. Waits for the application too,
        which may only be starting."""
        deadline_s = self._clock() + _START_S
        while True:
            answers = self._broadcast(version, k, deadline_s)
            there = [one for one in answers if not isinstance(one, _MAY_COME)]
            if there or self._clock() > deadline_s:
                return there or answers
            time.sleep(_RETRY_S)

    def _broadcast(self, version: Version, k: int, deadline_s: float) -> list[Tensor | Exception]:
        entry, arrays = _arguments(version, k, version.example())
        left_s = max(deadline_s - self._clock(), 0.001)
        try:
            response = self._handle(version, k).broadcast("ask", entry, arrays)
            answers = response.results(timeout_s=left_s, return_exceptions=True)
        except Exception as error:  # whatever it is, nobody has answered
            return [error]
        return [
            one if isinstance(one, Exception) else torch.from_numpy(np.array(one))
            for one in answers
        ]

    def _handle(self, version: Version, k: int) -> Any:
        name = application_of(version.manifest.name, version.names[k])
        if name not in self._handles:
            self._handles[name] = self._find(name)
        return self._handles[name]

    def _send(self, version: Version, k: int, inputs: Inputs) -> Any:
        """A response to wait for, or why there is none."""
        try:
            return self._handle(version, k).ask.remote(*_arguments(version, k, inputs))
        except RayServeException as error:
            return error

    def _receive(self, response: Any, deadline_s: float) -> Tensor | Exception:
        if isinstance(response, Exception):
            return response
        try:
            answer = response.result(timeout_s=max(deadline_s - self._clock(), 0.001))
        except TimeoutError:
            response.cancel()
            return Slow("no answer within failing.expert_timeout_s")
        except Exception as error:  # whatever it is, this call of this expert failed
            return error
        return torch.from_numpy(np.array(answer))


def _arguments(version: Version, k: int, inputs: Inputs) -> tuple[str, tuple[np.ndarray, ...]]:
    """Of `ExpertReplica.ask`."""
    entry = version.manifest.experts[k].model_dump_json()
    return entry, tuple(one.numpy() for one in inputs)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
