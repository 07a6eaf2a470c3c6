"""The run folder: where it is, what lies in it, and how lines are added to it.

Every process of a job may append; each line is one write, so lines never mix. Never imports Ray or
torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from elastic.core.errors import ConfigError

log = logging.getLogger(__name__)

MODELS = "models"
"""The folder in a run folder that holds a run folder of each of several models."""

_HERE = "runs"
_OF_JOBS = "~/ray_results"  # where Ray Train puts them
_COPY = ("runtime_resources", "working_dir_files")  # in Ray's temporary folder
_WAITING_BYTES = 64 << 20
_TAIL_BYTES = 4 << 20  # a line of 4096 micro-batches has about 300 KB
_STAMP = "%Y%m%d-%H%M%S"
_STAMP_PATTERN = r"-\d{8}-\d{6}(-\d+)?"


class RunFolder:
    """The folder of one run; cheap to make, safe to pickle, shared by the processes of a job."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._descriptors: dict[Path, int] = {}
        self._waiting: dict[Path, deque[bytes]] = {}
        self._lock = threading.Lock()  # a checkpoint is told of from a thread behind

    def __reduce__(self) -> tuple[type[RunFolder], tuple[Path]]:
        return RunFolder, (self.path,)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def job_json(self) -> Path:
        """The resolved job."""
        return self.path / "job.json"

    @property
    def ray_json(self) -> Path:
        """How to reach the running job; absent once it has ended."""
        return self.path / "ray.json"

    @property
    def events_jsonl(self) -> Path:
        """What happened."""
        return self.path / "events.jsonl"

    @property
    def metrics_jsonl(self) -> Path:
        """One line a committed step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations_jsonl(self) -> Path:
        """One line an evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def result_json(self) -> Path:
        """The outcome; absent until the job has ended."""
        return self.path / "result.json"

    @property
    def status_json(self) -> Path:
        """The running job's status of about a second ago; absent once it has ended."""
        return self.path / "status.json"

    @property
    def prometheus_json(self) -> Path:
        """Where Prometheus finds the running job: beside the folder, since a pattern of its
        discovery may match files of one folder only. Absent once the job has ended."""
        return self.path.with_name(f"{self.path.name}.prometheus.json")

    @property
    def checkpoints(self) -> Path:
        """Holds step-00000050/ and so on."""
        return self.path / "checkpoints"

    @property
    def report_png(self) -> Path:
        """Where `elastic report` draws."""
        return self.path / "report.png"

    @property
    def diagnosis_png(self) -> Path:
        """Where `elastic diagnose` draws."""
        return self.path / "diagnosis.png"

    @property
    def report_html(self) -> Path:
        """Where `elastic report --html` writes the page."""
        return self.path / "report.html"

    def of_model(self, model: int) -> RunFolder:
        """The run folder of one of several models: laid out like that of a job of its own."""
        return RunFolder(self.path / MODELS / str(model))

    def create(self) -> None:
        """Make the folder and checkpoints/ in it, where missing."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add one line to events.jsonl."""
        self._append(self.events_jsonl, event)

    def tell(
        self,
        kind: str,
        reason: str,
        *,
        step: int = 0,
        generation: int = 0,
        worker: int | None = None,
        **more: Any,
    ) -> None:
        """Add an event that happens now; `more` are fields that only its kind has."""
        event = make_event(kind, reason, step=step, generation=generation, worker=worker)
        self.append_event({**event, **more})

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one committed step to metrics.jsonl."""
        self._append(self.metrics_jsonl, metrics)

    def append_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Add one line to evaluations.jsonl."""
        self._append(self.evaluations_jsonl, evaluation)

    def read_events(self) -> list[dict[str, Any]]:
        """All events, in the order of their time."""
        return sorted(_read_lines(self.events_jsonl), key=lambda event: float(event["time_s"]))

    def read_metrics(self) -> list[dict[str, Any]]:
        """One entry a step, in the order of steps; of a step written twice the last line."""
        return _by_step(self.metrics_jsonl)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """One entry an evaluation, in the order of steps; of one written twice the last line."""
        return _by_step(self.evaluations_jsonl)

    def newest_metrics(self) -> dict[str, Any] | None:
        """The last line of metrics.jsonl that is whole, read from the end of the file."""
        if not self.metrics_jsonl.exists():
            return None
        with self.metrics_jsonl.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    return record
        return None

    def write_json(self, path: Path, value: Any) -> None:
        """Write one of the JSON files whole or not at all."""
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read one of the JSON files.

        Raises:
            ConfigError: it is missing or damaged.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; is {self.path} a run folder?") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: holds no JSON object")
        return value

    def is_running(self) -> bool:
        """Whether the process that runs the job lives, as far as this machine can tell."""
        try:
            record = self.read_json(self.ray_json)
            found = identity(int(record["pid"]))
            return found["started"] != 0 and found == {name: record[name] for name in found}
        except (ConfigError, KeyError, TypeError, ValueError):
            return False

    def close(self) -> None:
        """Close the files. A later append opens them again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Add a line. What a full disk refuses is kept, and added as soon as there is room."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            waiting = self._waiting.setdefault(path, deque())
            waiting.append(line)
            while waiting and self._write_line(path, waiting[0]):
                waiting.popleft()
            if len(waiting) == 1:
                log.warning("%s: the disk is full; lines are kept until there is room", path)
            if sum(map(len, waiting)) > _WAITING_BYTES:
                raise OSError(f"{path}: the disk is full, and {len(waiting)} lines wait for room")

    def _write(self, descriptor: int, line: bytes) -> int:
        return os.write(descriptor, line)

    def _write_line(self, path: Path, line: bytes) -> bool:
        """Whether there was room for it. A part of it may stay, torn."""
        try:
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                descriptor = self._descriptors[path] = os.open(path, flags, 0o644)
                if _ends_torn(path):  # left by a process that died; the line stays, alone
                    line = b"\n" + line
            if self._write(descriptor, line) == len(line):
                return True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        if path in self._descriptors:
            os.close(self._descriptors.pop(path))
        return False


def num_models(job: Mapping[str, Any]) -> int:
    """Of a job as in job.json; those of before did not say."""
    models = job.get("models", 1)
    return models if isinstance(models, int) else len(models)


def make_event(
    kind: str, reason: str, *, step: int, generation: int, worker: int | None
) -> dict[str, Any]:
    """A line of events.jsonl: it happens now."""
    return {
        "time_s": time.time(),
        "kind": kind,
        "step": step,
        "generation": generation,
        "worker": worker,
        "reason": reason,
    }


class Lines:
    """Reads a file of JSON objects that others append to, each line once.

    Args:
        from_end: skip what the file holds already.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._at = path.stat().st_size if from_end and path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """What was appended since; a line that is not complete yet waits."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._at += len(complete)
        return list(_objects(complete.splitlines()))


def runs_folder() -> Path:
    """Where run folders lie by default: in ./runs.

    A job that `ray job submit --working-dir` brought runs in a copy of that folder, which Ray
    deletes after a while: its runs lie in ~/ray_results.
    """
    return Path(_OF_JOBS).expanduser() if is_copy(Path.cwd()) else Path(_HERE)


def is_copy(path: Path) -> bool:
    """Whether `path` lies in a copy that Ray made of a job's working directory."""
    parts = path.absolute().parts
    return any(parts[at : at + len(_COPY)] == _COPY for at in range(len(parts)))


def new_run_dir(name: str, base: str | Path | None = None) -> Path:
    """Make the folder `base`/NAME-YYYYmmdd-HHMMSS, with -2, -3 ... added where it is taken.

    Without a `base` it lies in `runs_folder()`.
    """
    base = runs_folder() if base is None else base
    stem = f"{name}-{datetime.now().strftime(_STAMP)}"
    Path(base).mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        path = Path(base) / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise ConfigError(f"{base}: 999 runs named {stem}")


def find_run(
    name_or_path: str | Path, *, base: str | Path | None = None, running: bool = True
) -> RunFolder:
    """Find a run by the path of its folder, or the newest by the name of its job.

    Without a `base` names are looked for in `runs_folder()`. A name matches `base`/NAME and
    `base`/NAME-YYYYmmdd-HHMMSS, else any folder that begins with it.
    With `running`, only jobs whose process lives count.

    Raises:
        ConfigError: there is none, naming those that could have been meant.
    """
    base = runs_folder() if base is None else base
    given = RunFolder(name_or_path)
    if given.job_json.exists():
        if running and not given.is_running():
            raise ConfigError(f"{name_or_path}: this job is not running (any more)")
        return given
    name, runs = str(name_or_path), list(_runs(Path(base)))
    exact = re.compile(re.escape(name) + f"({_STAMP_PATTERN})?")
    for matches in (
        [run for run in runs if exact.fullmatch(run.path.name)],
        [run for run in runs if name and run.path.name.startswith(name)],
    ):
        for run in matches:
            if not running or run.is_running():
                return run
    known = [run.path.name for run in runs if not running or run.is_running()]
    what = "running job" if running else "run"
    raise ConfigError(
        f"{name}: no such {what} in {Path(base).absolute()}, and no folder of a run; "
        + (f"there are: {', '.join(known[:8])}" if known else f"there is no {what} at all")
    )


def _runs(base: Path) -> Iterator[RunFolder]:
    """The runs in `base`, newest first."""
    files = [path for path in base.glob("*/job.json") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.stat().st_mtime, path), reverse=True):
        yield RunFolder(path.parent)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines."""
    if path.exists():
        with path.open("rb") as lines:
            yield from _objects(lines)


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines; one torn by a crash is left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _by_step(path: Path) -> list[dict[str, Any]]:
    newest = {int(line["step"]): line for line in _read_lines(path)}
    return [newest[step] for step in sorted(newest)]


def _ends_torn(path: Path) -> bool:
    """Whether the last line has no end."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def identity(pid: int) -> dict[str, Any]:
    """A process of this machine, not to be mistaken for a later one of that number, nor for one of
    another machine or container. `started`: when, in ticks since boot; 0 if it is gone."""
    started = 0
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        started = int(stat.rpartition(")")[2].split()[19])
    return {"host": socket.gethostname(), "pid": pid, "started": started}
