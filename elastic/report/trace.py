"""Who did what when, as rows: of a run of ours, or from a file that another framework wrote.

A trace file is Parquet or CSV with a header. Its columns, in any order:

| column | type | meaning |
|---|---|---|
| worker | integer >= 0 | who; alike in all rows of a process |
| role | integer or text; 0 if absent | pipeline stage, say: peers are compared within one |
| step | integer >= 0 | optimizer step |
| micro_batch | integer; -1 if absent | of the step; -1 for what belongs to none |
| operation | text | one of OPERATIONS |
| start, end | number | seconds of one clock for all workers; end >= start |

Only reads. Never imports matplotlib, Ray or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastic.core.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

COMPUTE = ("compute", "forward", "backward", "optimizer")
COMMUNICATE = ("send", "receive", "allreduce", "allgather", "reducescatter", "alltoall", "barrier")
OPERATIONS = (
    *COMPUTE,
    *COMMUNICATE,
    *("recompute", "wait", "evaluate", "checkpoint", "recover", "start"),
)
"""What a row may be. `recompute`: what did not count; `recover`: after a fault."""

_INTEGERS = ("worker", "step", "micro_batch")
_REQUIRED = ("worker", "step", "operation", "start", "end")


@dataclass(frozen=True, eq=False)
class Trace:
    """One row for each operation, in the order of their start; times in seconds from the first.

    `operation` is a place in OPERATIONS; `role_names` gives the text of each role.
    """

    worker: Ints
    role: Ints
    step: Ints
    micro_batch: Ints
    operation: Ints
    start_s: Floats
    end_s: Floats
    role_names: tuple[str, ...] = ("0",)

    def are(self, *operations: str) -> Bools:
        """Whether each row is one of these."""
        return np.isin(self.operation, [OPERATIONS.index(one) for one in operations])


def read_trace(path: Path) -> Trace:
    """Read a Parquet or CSV file of the schema above.

    Raises:
        ConfigError: the file cannot be read, or a column is missing or holds something else.
    """
    columns = _columns(path)
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise ConfigError(
            f"{path}: no column {', '.join(missing)}; there are: {', '.join(columns)}"
        )
    num = len(columns["worker"])
    if not num:
        raise ConfigError(f"{path}: has no rows")
    columns.setdefault("micro_batch", np.full(num, -1))
    columns.setdefault("role", np.zeros(num, np.int64))
    for name in _INTEGERS:
        columns[name] = _integers(path, name, columns[name], least=-1 if name[0] == "m" else 0)
    start_s, end_s = (_seconds(path, name, columns[name]) for name in ("start", "end"))
    if (end_s < start_s).any():
        row = int(np.argmax(end_s < start_s))
        raise ConfigError(
            f"{path}: row {row + 1}: end {end_s[row]:g} is before start {start_s[row]:g}"
        )
    role_names, role = np.unique(columns["role"].astype(str), return_inverse=True)
    order = np.argsort(start_s, kind="stable")
    return Trace(
        worker=columns["worker"][order],
        role=role.astype(np.int64)[order],
        step=columns["step"][order],
        micro_batch=columns["micro_batch"][order],
        operation=_operations(path, columns["operation"])[order],
        start_s=(start_s - start_s.min())[order],
        end_s=(end_s - start_s.min())[order],
        role_names=tuple(role_names.tolist()),
    )


def _columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path}: cannot be read as {path.suffix or 'Parquet'}: {error}"
        ) from None
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _integers(path: Path, name: str, values: npt.NDArray[Any], *, least: int) -> Ints:
    if not np.issubdtype(values.dtype, np.integer):
        raise ConfigError(f"{path}: column {name} holds {values.dtype}; needs integers")
    if (values < least).any():
        raise ConfigError(f"{path}: column {name} holds {values.min()}; needs >= {least}")
    return values.astype(np.int64)


def _seconds(path: Path, name: str, values: npt.NDArray[Any]) -> Floats:
    if not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
        raise ConfigError(f"{path}: column {name} must hold finite numbers of seconds")
    return values.astype(np.float64)


def _operations(path: Path, values: npt.NDArray[Any]) -> Ints:
    names, places = np.unique(values.astype(str), return_inverse=True)
    unknown = sorted(set(names.tolist()) - set(OPERATIONS))
    if unknown:
        raise ConfigError(
            f"{path}: operation {', '.join(unknown[:5])}; allowed: {', '.join(OPERATIONS)}"
        )
    codes = np.array([OPERATIONS.index(name) for name in names.tolist()], np.int64)
    return codes[places]
