"""What a run leaves behind to read: events, metrics, evaluations, the result. Decides nothing.

Made on the aggregator's loop, which never waits for the run folder's disk; a journal in the memory
of the node keeps it until its thread has written it down. So the death of the aggregator loses
nothing: its successor on the node writes what is left, before its own. Only a host that dies while
the disk stalls takes lines with it; the successor says which.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from actors.setup import JobSetup
from elastic.core.fingerprint import fingerprint, parameters_sha256
from elastic.core.mapped import Version
from elastic.core.model import ModelSpec
from elastic.core.protocol import events
from elastic.core.protocol.messages import Membership, State
from elastic.core.runs import RunFolder, make_event
from elastic.core.task import Task


class Notebook(Protocol):
    """Where records wait: a journal, or the part of it that is one model's."""

    def put(self, record: Mapping[str, Any]) -> None: ...

    def drain(self) -> None: ...

    def check(self) -> None: ...


class EventLog:
    """Tells the run's events; from any thread. Through the journal, while one is open.

    Args:
        write: writes a record at once, see `Scribe`.
        where: the step and the generation at hand.
    """

    def __init__(
        self, write: Callable[[dict[str, Any]], None], where: Callable[[], tuple[int, int]]
    ) -> None:
        self._write, self._where = write, where
        self.journal: Notebook | None = None

    def __call__(self, kind: str, reason: str, worker: int | None = None) -> None:
        step, generation = self._where()
        event = make_event(kind, reason, step=step, generation=generation, worker=worker)
        record = {"kind": "event", "line": event}
        if self.journal is None:
            self._write(record)
        else:
            self.journal.put(record)


class Scribe:
    """Writes the records of a journal into the run folder, on the journal's thread."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._away_s = 0.0  # what a change of the lead adds to its first step

    def __call__(self, record: dict[str, Any]) -> None:
        line = record["line"]
        match record["kind"]:
            case "event":
                self._run.append_event(line)
            case "evaluation":
                self._run.append_evaluation(line)
            case "committed":
                self._committed(line)
            case "take_over":
                self._take_over(line, record["time_s"])

    def _committed(self, line: dict[str, Any]) -> None:
        line["step_s"] += self._away_s
        self._away_s = 0.0
        self._run.append_metrics(line)

    def _take_over(self, line: dict[str, Any] | None, time_s: float) -> None:
        """Add the step that a predecessor had no time to write."""
        newest = self._run.newest_metrics()
        if newest is not None:
            self._away_s = max(0.0, time_s - newest["time_s"])
        if line is None or (newest is not None and newest["step"] >= line["step"]):
            return
        self._committed(line)
        if newest is not None and newest["step"] < line["step"] - 1:
            missing = f"steps {newest['step'] + 1} to {line['step'] - 1}"
            reason = f"{missing}: whoever led before has committed, and not written them down"
            self._run.tell("metrics_missing", reason, step=line["step"] + 1)


class Recorder:
    """Puts into the journal what the lead commits."""

    def __init__(
        self, setup: JobSetup, spec: ModelSpec, task: Task, event: EventLog, journal: Notebook
    ) -> None:
        self._setup, self._spec, self._event = setup, spec, event
        self._journal = journal
        self._schedule = getattr(task, "schedule", None)
        self._later: list[events.Note | events.Committed] = []
        self._commit_s = time.monotonic()
        self.update_s = 0.0  # how long the newest update took

    def factor(self, step: int) -> float:
        """What the task's schedule multiplies the learning rate of `step` by."""
        return 1.0 if self._schedule is None else float(self._schedule(step))

    def take_over(self, state: State) -> None:
        """Go on where a predecessor's metrics end; add the step that it had no time to write."""
        self._commit_s = time.monotonic()
        line, step = None, state.step - 1
        if step >= 0:
            skipped = step in state.skipped
            loss = math.nan if skipped or state.loss is None else state.loss
            metrics = () if skipped else state.metrics
            made = events.Committed(step, 0, loss, math.nan, skipped, 0, 0, 0, (), metrics)
            line = self._line(made)
        self._journal.put({"kind": "take_over", "line": line, "time_s": time.time()})

    def later(self, action: events.Note | events.Committed) -> None:
        """Tell it in `flush`: nobody waits for it."""
        self._later.append(action)

    def flush(self) -> None:
        """Raises OSError where the run folder cannot be written to."""
        for action in self._later:
            if isinstance(action, events.Note):
                self._event(action.kind, action.reason, action.worker)
            else:
                self._journal.put({"kind": "committed", "line": self._line(action)})
        self._later.clear()
        self._journal.check()

    def _line(self, action: events.Committed) -> dict[str, Any]:
        """Of metrics.jsonl; its `step_s` ends now."""
        now_s, batch = time.monotonic(), self._setup.job.batch
        step_s, self._commit_s = now_s - self._commit_s, now_s
        groups = self._spec.optimizer.groups
        return {
            "step": action.step,
            "time_s": time.time(),
            "step_s": step_s,
            "loss": _finite(action.loss),
            "metrics": by_name(self._spec.metrics, action.metrics),
            "grad_norm": _finite(action.grad_norm),
            "lr": groups[0].options["lr"] * self.factor(action.step),
            "samples": (batch.micro_batches - action.num_dropped) * batch.micro_batch_size,
            "num_workers": action.num_workers,
            "num_duplicates": action.num_duplicates,
            "num_unaudited": action.num_unaudited,
            "num_dropped": action.num_dropped,
            "attempt": action.attempt,
            "update_s": self.update_s,
            "work": _unix_times(action.work),
        }

    def evaluated(self, action: events.Evaluated) -> None:
        """At once: a successor may come to it again, but never after the next step."""
        metrics = by_name(self._spec.evaluated_metrics, action.metrics)
        line = {
            "step": action.step,
            "time_s": time.time(),
            "loss": _finite(action.loss),
            "metrics": metrics,
            "work": _unix_times(action.work),
        }
        self._journal.put({"kind": "evaluation", "line": line})
        shown = {"loss": _finite(action.loss), **metrics}
        text = ", ".join(
            f"{name} {'not finite' if value is None else format(value, '.4g')}"
            for name, value in shown.items()
        )
        self._event("evaluated", text)

    def result(
        self,
        state: State,
        version: Version,
        membership: Membership,
        *,
        failure: str,
        unwritten: str,
        faults_fired: Sequence[int],
    ) -> None:
        """Write the result, behind all that was told. Doing it twice does no harm.

        Waits for the disk.

        Args:
            unwritten: why the last checkpoint could not be written, if it could not.
        """
        job, run = self._setup.job, self._setup.run
        self._journal.drain()
        metrics = run.read_metrics()
        started = min((one["time_s"] for one in run.read_events()), default=time.time())
        steps_s = [one["step_s"] for one in metrics[1:]]
        kind = "job_failed" if failure else "job_finished"
        if not failure and state.step < job.steps:
            kind = "job_stopped"
        initial = self._setup.initial
        run.write_json(
            run.result_json,
            {
                "name": job.name,
                "outcome": kind.removeprefix("job_"),
                "failure": failure,
                "steps": state.step,
                "loss": state.loss,
                "first_loss": state.first_loss,
                "params_sha256": parameters_sha256(self._spec.layout, version.values),
                "samples_sha256": state.samples,
                "exact": state.exact and job.stragglers.is_exact and not state.dropped,
                "dropped_micro_batches": state.dropped,
                "wall_s": time.time() - started,
                "step_s_median": statistics.median(steps_s) if steps_s else None,
                "num_generations": membership.generation,
                "overflows": state.overflows,
                "skipped_steps": list(state.skipped),
                "metrics": by_name(self._spec.metrics, state.metrics),
                "evaluation": self._last_evaluation(),
                "last_checkpoint_failure": unwritten,
                "init_sha256": initial.sha256 if initial else None,
                "faults_fired": sorted(faults_fired),
                "versions": fingerprint(job.workers.threads, job.device),
            },
        )
        self._event(kind, failure or f"step {state.step} of {job.steps}")
        self._journal.drain()

    def _last_evaluation(self) -> dict[str, Any] | None:
        """The newest one, without who computed it."""
        evaluations = self._setup.run.read_evaluations()
        if not evaluations:
            return None
        return {name: evaluations[-1][name] for name in ("step", "loss", "metrics")}


def by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    """Metrics for JSON; all of a step that was skipped have no value."""
    known = values or [math.nan] * len(names)
    return {name: _finite(value) for name, value in zip(names, known, strict=True)}


def _finite(value: float) -> float | None:
    """JSON knows no NaN: a skipped step has no loss."""
    return value if math.isfinite(value) else None


def _unix_times(work: Iterable[tuple[int, int, float, float, str]]) -> list[list[Any]]:
    """Who computed what when, for JSON, in seconds since the epoch."""
    ahead_s = time.time() - time.monotonic()
    return [
        [worker, one, start_s + ahead_s, end_s + ahead_s, outcome]
        for worker, one, start_s, end_s, outcome in work
    ]
