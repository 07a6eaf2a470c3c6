"""Elastic training on Ray: faults change when a step finishes, never what it computes."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.core.task import Dataset, Task
    from elastic.result import Result
    from elastic.trainer import ElasticTrainer

__all__ = ["Dataset", "ElasticTrainer", "Result", "Task"]

_HOMES = {
    "Dataset": "elastic.core.task",
    "ElasticTrainer": "elastic.trainer",
    "Result": "elastic.result",
    "Task": "elastic.core.task",
}


def __getattr__(name: str) -> Any:
    """Load a public name at first use, so that `import elastic.core` loads no Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
