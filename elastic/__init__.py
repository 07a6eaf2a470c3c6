"""Elastic training on Ray: faults change when a step finishes, never what it computes."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.callbacks import Callback, CSVLogger, TensorBoardLogger
    from elastic.core.data.map_style import MapDataset
    from elastic.core.data.memory import ArrayRows
    from elastic.core.data.rows import Rows, pad
    from elastic.core.data.text import TextWindows
    from elastic.core.task import Dataset, Task
    from elastic.core.trained import load_model
    from elastic.result import Result
    from elastic.trainer import ElasticTrainer

__all__ = [
    "ArrayRows",
    "CSVLogger",
    "Callback",
    "Dataset",
    "ElasticTrainer",
    "MapDataset",
    "Result",
    "Rows",
    "Task",
    "TensorBoardLogger",
    "TextWindows",
    "load_model",
    "pad",
]

_HOMES = {
    "ArrayRows": "elastic.core.data.memory",
    "CSVLogger": "elastic.callbacks",
    "Callback": "elastic.callbacks",
    "Dataset": "elastic.core.task",
    "ElasticTrainer": "elastic.trainer",
    "MapDataset": "elastic.core.data.map_style",
    "Result": "elastic.result",
    "Rows": "elastic.core.data.rows",
    "Task": "elastic.core.task",
    "TensorBoardLogger": "elastic.callbacks",
    "TextWindows": "elastic.core.data.text",
    "load_model": "elastic.core.trained",
    "pad": "elastic.core.data.rows",
}


def __getattr__(name: str) -> Any:
    """Load a public name at first use, so that `import elastic.core` loads no Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
