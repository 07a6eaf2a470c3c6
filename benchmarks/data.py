"""How long workers wait for their input, as a share of the step, 0.85M parameters.

    python -m benchmarks.data [--quick] [--out DIR]

    windows     TextWindows on Parquet, as in the example
    ahead       Rows on Parquet, many times the cache, read ahead
    behind      the same, read when needed

What a worker waits is what `fetch` takes, on the thread that trains.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks import jobs
from benchmarks.jobs import RUNS, Run, hand_over, make_job, run_elastic, timed
from benchmarks.record import figure
from elastic.core.data.order import Int64Array
from elastic.core.data.rows import Rows
from elastic.core.task import Dataset
from examples.stdlib_lm.task import StdlibLM

PARTS = ("windows", "ahead", "behind")
LIMIT_PERCENT = 2.0
GROUP_ROWS = 64
"""Windows of 129 bytes, which a shuffled row costs: 0.1 ms to read; with 8192 it were 18 ms."""
CACHE_BYTES = 4 * 2**20

Wait = tuple[float, float]  # unix time, seconds


class Timed:
    """A data set that writes down how long each `fetch` took, a file a process."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self._dataset = dataset
        self._path = folder / str(os.getpid())

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: Int64Array) -> Any:
        begin_s = time.perf_counter()
        micro_batch = self._dataset.fetch(indices)
        wait_s = time.perf_counter() - begin_s
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()} {wait_s}\n")
        return micro_batch


class TimedAhead(Timed):
    """Reads ahead, too."""

    def prefetch(self, indices: Int64Array) -> None:
        self._dataset.prefetch(indices)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TimedLM(StdlibLM):
    """The example's model on one of the `PARTS`."""

    part: str = "windows"
    waits: str = ""  # folder for what was written down
    rows: str = ""

    def dataset(self) -> Timed:  # type: ignore[override]
        if self.part == "windows":
            return TimedAhead(super().dataset(), Path(self.waits))
        data = Rows(self.rows, cache_bytes=CACHE_BYTES)
        kind = TimedAhead if self.part == "ahead" else Timed
        return kind(data, Path(self.waits))

    def loss(self, model: nn.Module, windows: Any) -> tuple[torch.Tensor, float]:
        if self.part != "windows":
            windows = windows["window"].long()
        return super().loss(model, windows)


def write_rows(path: Path) -> None:
    """The example's windows as rows of bytes."""
    windows = StdlibLM().dataset()
    values = pa.array(windows.fetch(np.arange(len(windows))).to(torch.uint8).flatten().numpy())
    column = pa.FixedSizeListArray.from_arrays(values, windows.fetch(np.arange(1)).shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"window": column}), path, row_group_size=GROUP_ROWS)


def shares_percent(metrics: Iterable[Mapping[str, Any]], waits: Iterable[Wait]) -> list[float]:
    """What one worker waited in each step, in percent of the step."""
    times_s, lengths_s = (np.array(column) for column in zip(*waits, strict=True))
    shares = []
    for one in metrics:
        begin_s = one["time_s"] - one["step_s"]
        within = (times_s > begin_s) & (times_s <= one["time_s"])
        shares.append(100 * float(lengths_s[within].sum()) / one["step_s"])
    return shares


def read_waits(folder: Path) -> list[list[Wait]]:
    """What each process wrote down."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())]
    lines = [[line.split() for line in text.splitlines()] for text in texts]
    return [[(float(at_s), float(wait_s)) for at_s, wait_s in one] for one in lines]


def computes(metrics: Sequence[Mapping[str, Any]], waits: Iterable[Wait]) -> bool:
    """Whether a process took part in most of the steps: the spare and the trials do not."""
    begin_s = metrics[0]["time_s"] - metrics[0]["step_s"]
    ends_s = [one["time_s"] for one in metrics]
    times_s = [at_s for at_s, _ in waits if begin_s < at_s <= ends_s[-1]]
    return 2 * len(set(np.searchsorted(ends_s, times_s))) > len(ends_s)


def measure(part: str, steps: int) -> tuple[Run, list[list[Wait]]]:
    """One run; what its workers waited in the steps that count."""
    folder, rows = (
        (RUNS / f"waits-{part}").absolute(),
        (RUNS / f"rows-{GROUP_ROWS}.parquet").absolute(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not rows.exists():
        write_rows(rows)
    arguments = {"part": part, "waits": folder, "rows": rows}
    settings = [f"task_args.{name}={value}" for name, value in arguments.items()]
    job = make_job(f"bench-data-{part}", "task=benchmarks.data:TimedLM", *settings)
    run = run_elastic(job.model_copy(update={"steps": jobs.ENDLESS}), stop_after=steps)
    waits = [one for one in read_waits(folder) if computes(run.settled, one)]
    return run, waits


def main() -> int:
    """Run the parts asked for, and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    jobs.add_options(parser, PARTS)
    options = parser.parse_args()
    figures = []
    for part in jobs.chosen(parser, options, PARTS):
        with timed(part):
            run, waits = measure(part, 10 if options.quick else 60)
        shares = [share for one in waits for share in shares_percent(run.settled, one)]
        limit = None if part == "behind" else LIMIT_PERCENT
        note = f"{len(waits)} workers, median step {1000 * run.median_s:.0f} ms"
        name = f"waiting for input, {part}"
        figures.append(figure(name, shares, unit="%", limit=limit, statistic="mean", note=note))
    config = {"group_rows": GROUP_ROWS, "cache_bytes": CACHE_BYTES, "job": "examples/stdlib_lm"}
    hand_over("data-wait", options, config, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
