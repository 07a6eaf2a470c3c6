"""What a user is told of a run while it goes on: `Callback`, and two that log.

Callbacks run in the process that called `fit`, never in a worker: however slow one is, the job does
not wait for it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ray.train import UserCallback

from elastic.core.errors import ConfigError

if TYPE_CHECKING:
    from elastic.core.config import JobConfig
    from elastic.result import Result


class Callback(UserCallback):
    """Override what you need; the rest does nothing.

    Each step, evaluation, checkpoint and event is told once and in order, faults and restarts or
    not. An error raised here stops the job in good order, with a checkpoint, and is raised by `fit`
    as a `CallbackError`; this callback is told nothing more.
    """

    def on_start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        """The job begins with `step`: 0, or where a run is gone on with."""

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """A step is committed. `metrics` is its line of metrics.jsonl: step, loss (None for a step
        skipped as not finite), lr, grad_norm, step_s, samples, num_workers, ..."""

    def on_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """The model was evaluated after `step` steps: step, loss, metrics."""

    def on_checkpoint(self, path: str) -> None:
        """A checkpoint is complete; path or URI of its folder. It may be removed later."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Something happened: time_s, kind, step, generation, worker (or None), reason."""

    def on_end(self, result: Result | None) -> None:
        """The job is over, and nothing comes after this. None if it failed."""


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Refuse what cannot be told anything. Raises ConfigError."""
    for one in callbacks:
        if not isinstance(one, Callback):
            hint = f"; needs an object: {one.__name__}(...)" if isinstance(one, type) else ""
            raise ConfigError(
                f"callbacks: got {one!r}, which is no elastic.Callback{hint or '; derive from it'}"
            )


class CSVLogger(Callback):
    """Writes a table of the steps: one line each, to `path` or RUN_FOLDER/steps.csv.

    A run that goes on goes on in its table; lines of steps that are computed again go first, of
    several models those of each.
    """

    COLUMNS = ("step", "loss", "lr", "grad_norm", "step_s", "samples", "num_workers")
    """Those of every job; the task's own metrics follow."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._given = path

    def on_start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        self._path, self._num_models = Path(self._given or run_dir / "steps.csv"), job.num_models
        self._file: TextIO | None = None
        self._goes_on: set[int] = set()

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        model = metrics["step"] % self._num_models
        if model not in self._goes_on:
            self._goes_on.add(model)
            self._begin(metrics)
        assert self._file is not None, "the first step of a model opens it"
        self._table.writerow({**metrics, **metrics["metrics"]})
        self._file.flush()

    def _begin(self, metrics: Mapping[str, Any]) -> None:
        """A model goes on with this step: the lines of its later ones go."""
        if self._file is not None:
            self._file.close()
        kept = _read_table(self._path, metrics["step"], self._num_models)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", newline="", encoding="utf-8")
        columns = [*self.COLUMNS, *metrics["metrics"]]
        self._table = csv.DictWriter(self._file, columns, extrasaction="ignore")
        self._table.writeheader()
        self._table.writerows(kept)

    def on_end(self, result: Result | None) -> None:
        if self._file is not None:
            self._file.close()


def _read_table(path: Path, end: int, num_models: int) -> list[dict[str, str]]:
    """The lines of the steps before `end`, and of all steps of other models than that one's."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [one for one in lines if int(one["step"]) < end or (int(one["step"]) - end) % num_models]


class TensorBoardLogger(Callback):
    """Writes loss, learning rate, speed and evaluations for `tensorboard --logdir FOLDER`.

    Args:
        folder: where to; RUN_FOLDER/tensorboard if not given.

    Raises:
        ConfigError: the package tensorboard is missing.
    """

    SCALARS = ("loss", "lr", "grad_norm", "step_s", "num_workers")

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"TensorBoardLogger needs the package tensorboard ({error});"
                " pip install 'elastic[tensorboard]'"
            ) from error
        self._make_writer = SummaryWriter

    def on_start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        folder = os.fspath(self._folder or run_dir / "tensorboard")
        self._writer = self._make_writer(folder, purge_step=step or None)

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._add(
            "train",
            {**{name: metrics[name] for name in self.SCALARS}, **metrics["metrics"]},
            metrics,
        )

    def on_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self._add("eval", {"loss": evaluation["loss"], **evaluation["metrics"]}, evaluation)

    def on_event(self, event: Mapping[str, Any]) -> None:
        self._writer.add_text(event["kind"], event["reason"], event["step"], event["time_s"])

    def on_end(self, result: Result | None) -> None:
        self._writer.close()

    def _add(self, group: str, values: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is not None:  # not finite
                self._writer.add_scalar(f"{group}/{name}", value, line["step"], line["time_s"])


__all__ = ["CSVLogger", "Callback", "TensorBoardLogger", "check_callbacks"]
