"""What a job of several models leaves behind: in a run folder of each, and in that of the job.

The step of a model is a step of the job, too, see `step_of_job`: under that number,
and with the number of the model, its records lie in the job's run folder besides. Decides nothing.
"""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.recording import Notebook, Scribe
from actors.setup import JobSetup
from elastic.core.protocol.messages import step_of_job

_OF_ALL = ("name", "init_sha256", "versions")
"""What a result says alike of every model."""

_OF_ONE = (
    "outcome",
    "failure",
    "steps",
    "loss",
    "first_loss",
    "metrics",
    "evaluation",
    "params_sha256",
    "samples_sha256",
    "exact",
)
"""What the job's result repeats of each."""

Write = Callable[[dict[str, Any]], None]


class Part:
    """What one of several models tells a journal."""

    def __init__(self, journal: Notebook, model: int) -> None:
        self._journal, self._model = journal, model
        self.drain, self.check = journal.drain, journal.check

    def put(self, record: Mapping[str, Any]) -> None:
        self._journal.put({**record, "model": self._model})


class Scribes:
    """Writes the records of all models, and those of the job itself."""

    def __init__(self, setup: JobSetup) -> None:
        self._run, self._num = setup.run, len(setup.models)
        self._scribes = [Scribe(lane.run) for lane in setup.models]
        self._newest_s: float | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        line, model = record["line"], record.get("model")
        if model is None:
            self._run.append_event(line)
            return
        self._scribes[model]({**record, "line": None if line is None else dict(line)})
        if line is not None:
            step = step_of_job(model, line["step"], self._num)
            self._of_job(record["kind"], {**line, "step": step, "model": model})

    def write_as(self, model: int) -> Write:
        """Writes what one model tells."""
        return lambda record: self({**record, "model": model})

    def _of_job(self, kind: str, line: dict[str, Any]) -> None:
        match kind:
            case "event":
                told = line["kind"].replace("job_", "model_")  # the job itself may go on
                self._run.append_event({**line, "kind": told})
            case "evaluation":
                self._run.append_evaluation(line)
            case "committed":
                self._committed(line)
            case "take_over":
                known = self._run.read_metrics()
                self._newest_s = max((one["time_s"] for one in known), default=None)
                if all(one["step"] != line["step"] for one in known):  # not always in order
                    self._committed(line)

    def _committed(self, line: dict[str, Any]) -> None:
        """A step of the job lasts from the one before, of whichever model."""
        if self._newest_s is not None:
            line["step_s"] = max(0.0, line["time_s"] - self._newest_s)
        self._newest_s = line["time_s"]
        self._run.append_metrics(line)


class Results:
    """The job's result, out of those of its models, once all are written."""

    def __init__(self, setup: JobSetup, event: Callable[[str, str], None]) -> None:
        self._setup, self._event = setup, event
        self._lock = threading.Lock()
        self._is_written = False

    def complete(self) -> None:
        """From the thread that has written one. Doing it twice does no harm."""
        runs = [lane.run for lane in self._setup.models]
        with self._lock:
            if self._is_written or not all(run.result_json.exists() for run in runs):
                return
            self._is_written = True
            result = self._result([run.read_json(run.result_json) for run in runs])
            self._setup.run.write_json(self._setup.run.result_json, result)
            reason = result["failure"] or f"step {result['steps']} of {self._setup.job.steps}"
            self._event(f"job_{result['outcome']}", reason)

    def _result(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        run, metrics = self._setup.run, self._setup.run.read_metrics()
        started = min((one["time_s"] for one in run.read_events()), default=time.time())
        steps_s = [one["step_s"] for one in metrics[1:]]
        outcomes = {one["outcome"] for one in results}
        num = len(results)
        return {
            **{name: results[0][name] for name in _OF_ALL},
            "num_generations": max(one["num_generations"] for one in results),
            "faults_fired": sorted({one for found in results for one in found["faults_fired"]}),
            "outcome": next(one for one in ("failed", "stopped", "finished") if one in outcomes),
            "failure": _joined(results, "failure"),
            "steps": min(one["steps"] for one in results),
            "loss": None,
            "first_loss": None,
            "params_sha256": _digest(results, "params_sha256"),
            "samples_sha256": _digest(results, "samples_sha256"),
            "exact": all(one["exact"] for one in results),
            "dropped_micro_batches": sum(one["dropped_micro_batches"] for one in results),
            "wall_s": time.time() - started,
            "step_s_median": statistics.median(steps_s) if steps_s else None,
            "overflows": sum(one["overflows"] for one in results),
            "skipped_steps": sorted(
                step_of_job(model, step, num)
                for model, one in enumerate(results)
                for step in one["skipped_steps"]
            ),
            "metrics": {},
            "evaluation": None,
            "last_checkpoint_failure": _joined(results, "last_checkpoint_failure"),
            "models": [
                {
                    "run": str(lane.run.path),
                    "seed": lane.job.seed,
                    "task_args": lane.job.task_args,
                    **{name: one[name] for name in _OF_ONE},
                }
                for lane, one in zip(self._setup.models, results, strict=True)
            ],
        }


def _joined(results: Sequence[Mapping[str, Any]], name: str) -> str:
    """What went wrong, once if it is of all, else with the numbers of the models."""
    said = [one[name] for one in results]
    if len(set(said)) == 1:
        return str(said[0])
    return "; ".join(f"model {model}: {one}" for model, one in enumerate(said) if one)


def _digest(results: Sequence[Mapping[str, Any]], name: str) -> str:
    """Equal where those of all models are."""
    return hashlib.sha256("\n".join(one[name] for one in results).encode()).hexdigest()
