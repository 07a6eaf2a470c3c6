"""A task object on its way to the workers: by reference where they can import it, else by value."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cloudpickle

from elastic.core.errors import ConfigError
from elastic.core.task import Task


def pickle_task(task: Task) -> bytes:
    """The task, with the code of its classes where only this process has it.

    That is so for `__main__` (a script, a notebook; cloudpickle sees to it) and for modules that
    lie on no import path.

    Raises:
        ConfigError: it holds something that cannot travel.
    """
    with contextlib.ExitStack() as registered:
        for module in _unknown_elsewhere(task):
            cloudpickle.register_pickle_by_value(module)
            registered.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            return bytes(cloudpickle.dumps(task))
        except Exception as error:  # whatever the __reduce__ of what it holds may raise
            raise ConfigError(
                f"task: {type(task).__name__} cannot be sent to the workers:"
                f" {type(error).__name__}: {error}; make what it holds in `dataset()` or `model()`,"
                " which run there"
            ) from error


def _unknown_elsewhere(task: Task) -> Iterator[ModuleType]:
    """The modules of the task's classes that workers could not import."""
    for name in sorted({kind.__module__ for kind in type(task).__mro__}):
        module = sys.modules.get(name)
        known = name == "__main__" or name.partition(".")[0] in sys.stdlib_module_names
        if module is not None and not known and not _is_importable(name, module):
            yield module


def _is_importable(name: str, module: ModuleType) -> bool:
    """Whether importing `name` afresh, on the import path of now, would load that same module."""
    spec, parts = None, name.split(".")
    for number in range(1, len(parts) + 1):
        path = spec.submodule_search_locations if spec is not None else None
        spec = _find(".".join(parts[:number]), path)
        if spec is None:
            return False
    file, origin = getattr(module, "__file__", None), spec.origin if spec is not None else None
    if file is None or origin is None:
        return False
    return Path(origin).resolve() == Path(file).resolve()


def _find(name: str, path: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path, None)
        if spec is not None:
            return spec
    return None
