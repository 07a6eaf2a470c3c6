"""Experts that live in this process: the co-located mode.

A call cannot be ended from outside, so one that took too long is told of once it is over, and
the replica's health check ends a process in which a call hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from serve.version import Version, comparable, fault_of

Inputs = tuple[Tensor, ...]


class Slow(Exception):
    """An expert took longer than it may."""


class Pool(Protocol):
    """Whom the engine asks. Calls come from one thread, probes from others."""

    def prepare(self, version: Version) -> dict[str, str]:
        """Make a version's experts ready; what is wrong with whom is told by name."""
        ...

    def ask(
        self, version: Version, calls: Mapping[int, Inputs], timeout_s: float
    ) -> dict[int, Tensor | Exception]:
        """Ask experts, by their index; comparable answers, or why there is none."""
        ...

    def keep(self, versions: Iterable[Version]) -> None:
        """Forget what only other versions need."""
        ...


class LocalPool:
    """Modules in this process, shared by versions that have them in common."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._modules: dict[str, nn.Module] = {}
        self._lock = threading.Lock()

    def prepare(self, version: Version) -> dict[str, str]:
        wrong: dict[str, str] = {}
        for k, (name, key) in enumerate(zip(version.names, version.keys, strict=True)):
            try:
                self._load(version, k)
                answer = self._call(key, version, version.example())
                fault = fault_of(version, answer, 1)
            except Exception as error:  # whatever a model raises is its expert's failure
                fault = str(error) or type(error).__name__
            if fault is not None:
                wrong[name] = fault
        return wrong

    def ask(
        self, version: Version, calls: Mapping[int, Inputs], timeout_s: float
    ) -> dict[int, Tensor | Exception]:
        answers: dict[int, Tensor | Exception] = {}
        for k, inputs in calls.items():
            begin_s = self._clock()
            try:
                answers[k] = self._call(version.keys[k], version, inputs)
            except Exception as error:  # whatever a model raises is its expert's failure
                answers[k] = error
            took_s = self._clock() - begin_s
            if took_s > timeout_s:
                answers[k] = Slow(f"took {took_s:.2f} s; failing.expert_timeout_s {timeout_s:g}")
        return answers

    def keep(self, versions: Iterable[Version]) -> None:
        wanted = {key for version in versions for key in version.keys}
        with self._lock:
            self._modules = {key: one for key, one in self._modules.items() if key in wanted}

    def _load(self, version: Version, k: int) -> None:
        if version.keys[k] not in self._modules:
            module = version.repository.load_expert(version.names[k])
            with self._lock:
                self._modules[version.keys[k]] = module

    def _call(self, key: str, version: Version, inputs: Inputs) -> Tensor:
        module = self._modules.get(key)
        if module is None:
            raise LookupError("the expert is not loaded")
        with torch.inference_mode():
            return comparable(version.task, module(*inputs))
