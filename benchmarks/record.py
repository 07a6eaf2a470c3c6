"""What a benchmark hands over: figures with their spread and limit, and what they were measured on.

Only describes and writes; never measures and never decides what a limit is.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elastic.core.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "ray", "numpy", "pyarrow", "pydantic")
LOW, HIGH = 10, 90
"""Percentiles of the spread."""

_RESAMPLES = 1000
_RESAMPLE_SEED = 0

Statistic = Literal["median", "mean", "largest"]
_STATISTICS: dict[str, Callable[[Sequence[float]], Any]] = {
    "median": np.median,
    "mean": np.mean,
    "largest": np.max,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number. `ok` is None where there is no limit: the figure is only reported."""

    name: str
    value: float
    """What is held against the limit: `statistic` of the samples."""
    statistic: str
    n: int
    median: float
    spread: tuple[float, float]
    """The 10th and 90th percentile."""
    unit: str
    limit: float | None
    """`value` must not be greater."""
    ok: bool | None
    note: str = ""


def figure(
    name: str,
    samples: Sequence[float],
    *,
    unit: str,
    limit: float | None = None,
    statistic: Statistic = "median",
    note: str = "",
) -> Figure:
    """Sum up samples of one quantity.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError(f"{name}: there are no samples")
    value = float(_STATISTICS[statistic](samples))
    low, high = (float(one) for one in np.percentile(samples, (LOW, HIGH)))
    return Figure(
        name=name,
        value=value,
        statistic=statistic,
        n=len(samples),
        median=float(np.median(samples)),
        spread=(low, high),
        unit=unit,
        limit=limit,
        ok=None if limit is None else value <= limit,
        note=note,
    )


def ratio(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    limit: float | None = None,
    statistic: Statistic = "median",
    note: str = "",
) -> Figure:
    """`statistic` of one side over that of the other; the spread is that of resampled ratios.

    `n` is the smaller number of samples of the two. Resampling is seeded.

    Raises:
        ValueError: a side has no samples.
    """
    if not ours or not theirs:
        raise ValueError(f"{name}: {len(ours)} and {len(theirs)} samples; both sides need some")
    of = _STATISTICS[statistic]
    dice = np.random.default_rng(_RESAMPLE_SEED)
    drawn = [float(of(_again(dice, ours)) / of(_again(dice, theirs))) for _ in range(_RESAMPLES)]
    value = float(of(ours) / of(theirs))
    low, high = (float(one) for one in np.percentile(drawn, (LOW, HIGH)))
    return Figure(
        name=name,
        value=value,
        statistic=f"ratio of {statistic}s",
        n=min(len(ours), len(theirs)),
        median=float(np.median(drawn)),
        spread=(low, high),
        unit="x",
        limit=limit,
        ok=None if limit is None else value <= limit,
        note=note,
    )


def _again(dice: np.random.Generator, samples: Sequence[float]) -> list[float]:
    """As many samples, drawn with replacement."""
    drawn: list[float] = dice.choice(samples, len(samples)).tolist()
    return drawn


def hardware() -> dict[str, Any]:
    """The machine as this process may use it."""
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu_model": found.group(1).strip() if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def commit() -> str:
    """The commit measured, with '+' if files differ from it; empty outside a checkout."""
    root = Path(__file__).parent
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make_record(what: str, config: Mapping[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """The whole JSON of one benchmark."""
    return {
        "what": what,
        "date": datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "config": dict(config),
        "figures": [asdict(one) for one in figures],
    }


def file_name(record: Mapping[str, Any]) -> str:
    """what_hardware_date.json; a second run on the same day replaces the first."""
    machine = record["hardware"]
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu_model"].lower()).strip("-")
    day = record["date"][:10].replace("-", "")
    return f"{record['what']}_{slug}-{machine['cores']}-cores_{day}.json"


def write(record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record into `folder` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def read_newest(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The newest record of each benchmark, by what it measures.

    Raises:
        ConfigError: a file is damaged.
    """
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            what, date = record["what"], record["date"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: holds no record of a benchmark: {error}") from error
        if what not in newest or newest[what]["date"] < date:
            newest[what] = record
    return newest
