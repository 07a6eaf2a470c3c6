"""What one run is: the model, the batch, how many workers. Every trainer reads it from a file.

Standard library only: each trainer runs in its own virtual environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SIZES: Mapping[str, float] = {"small": 0.85e6, "10m": 10.8e6, "100m": 101e6}
"""Size -> parameters."""
BATCH: Mapping[str, int] = {"small": 32, "10m": 16, "100m": 8}
"""Size -> samples in a step."""
WORKERS = (1, 2, 4, 8)
"""How many share the batch, where that is what is measured."""
THREADS = 1
"""Threads of one worker, of every system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of one system."""

    system: str
    size: str
    """A key of SIZES."""
    batch: int
    """Samples in one step, over all workers."""
    num_workers: int
    folder: str
    """Where the run's logs, checkpoints and records go; absolute."""
    checkpoint_every: int = 0
    """Steps between checkpoints, of systems that start again from one."""
    micro_batches: int = 0
    """Parts of a step, ours only; 0: one a worker."""
    variables: Mapping[str, str]
    """Environment of the run's processes, besides the one at hand."""

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def log(self) -> Path:
        """Where trainers write their lines."""
        return self.path / "log.jsonl"

    @property
    def file(self) -> Path:
        return self.path / "settings.json"

    def write(self) -> Path:
        """Write the settings into the run's folder, for the trainers; returns the file."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return self.file


def read_settings(file: str | Path) -> Settings:
    """What `Settings.write` wrote."""
    return Settings(**json.loads(Path(file).read_text(encoding="utf-8")))
