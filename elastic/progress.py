"""What `elastic train` shows: a live display on a terminal, one line per 10 % elsewhere.

Only shows; never decides and never touches the job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from elastic.core.status import Status

MAX_REASON_CHARS = 100
NUM_REPORTS = 10
"""Lines of progress where there is no terminal."""

_BAD = (
    "worker_lost",
    "worker_hung",
    "worker_lied",
    "audited_anew",
    "audit_undecided",
    "uncoded",
    "inexact",
    "worker_given_up",
    "aggregator_lost",
    "aggregator_hung",
    "no_workers",
    "gcs_away",
    "metrics_missing",
    "preempted",
    "preemption_possible",
    "preemption_unwatched",
    "monitoring_failed",
    "verdict",
)
_WORST = ("job_failed", "checkpoint_failed", "nonfinite", "step_skipped")
_GOOD = (
    "worker_joined",
    "aggregator_took_over",
    "coordinator_restarted",
    "job_finished",
    "verdict_ended",
)
_QUIET = ("worker_started", "worker_ready", "checkpoint_written")


def make_progress(console: Console, name: str) -> LiveProgress | PlainProgress:
    """Choose the display that fits where `console` writes to."""
    return LiveProgress(console, name) if console.is_terminal else PlainProgress(console, name)


class _Events:
    """Prints each event once, above whatever else is shown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: Mapping[str, Any] | None = None
        self._start_s: float | None = None

    def show(self, events: Sequence[Mapping[str, Any]]) -> None:
        fresh = list(events)
        if self._last in fresh:
            fresh = fresh[len(fresh) - fresh[::-1].index(self._last) :]
        for event in fresh:
            if self._start_s is None:
                self._start_s = float(event["time_s"])
            self._last = event
            self._console.print(event_line(event, self._start_s), soft_wrap=True)


def event_line(event: Mapping[str, Any], start_s: float) -> Text:
    """One short line: time since the start, what happened to whom, why."""
    kind = str(event["kind"])
    line = Text(f"{float(event['time_s']) - start_s:8.1f} s  ", style="dim")
    words = kind.replace("_", " ")
    if event.get("worker") is not None:
        words = words.replace("worker", f"worker-{event['worker']}", 1)
        if "worker" not in kind and kind != "fault":
            words += f" worker-{event['worker']}"
    if event.get("model") is not None:
        words = words.replace("model", f"model-{event['model']}", 1)
        if "model" not in kind:
            words += f" model-{event['model']}"
    line.append(f"{words:<22}", style=event_style(kind))
    line.append(f" step {event.get('step', 0)}", style="dim")
    reason = " ".join(str(event.get("reason") or "").split())
    if reason:
        line.append(f"  {reason[:MAX_REASON_CHARS]}")
    return line


def event_style(kind: str) -> str:
    """The colour of an event."""
    if kind in _WORST:
        return "bold red"
    if kind == "fault":
        return "magenta"
    if kind in _BAD:
        return "yellow"
    if kind in _GOOD:
        return "green"
    return "dim" if kind in _QUIET else "cyan"


class LiveProgress:
    """A bar, a line of numbers, and the events above them."""

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._live = Live(console=console, refresh_per_second=8, transient=False)
        self._events = _Events(console)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show(self, status: Status) -> None:
        """Print what is new and redraw."""
        self._events.show(status.events)
        self._live.update(_panel(self._name, status))


def _panel(name: str, status: Status) -> RenderableType:
    if status.phase == "starting":
        return Spinner("dots", Text(f"{name}: starting workers (they import torch) ..."))
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    left_s = _left_s(status)
    bar.add_row(
        Text(name, style="bold"),
        ProgressBar(total=status.num_steps, completed=status.step),
        f"{status.step}/{status.num_steps} steps"
        + (f", {_duration(left_s)} left" if left_s is not None else ""),
    )
    return Group(bar, numbers_line(status))


def numbers_line(status: Status) -> Text:
    """Loss, speed, step time, workers and generation, as far as they are known."""
    parts: list[tuple[str, str]] = []
    if status.phase != "training":
        parts.append(("phase", status.phase))
    if status.models:
        parts.append(("losses", " ".join(_loss(one.loss) for one in status.models)))
    elif status.loss is not None:
        came = "" if status.first_loss is None else f" (from {status.first_loss:.4f})"
        parts.append(("loss", f"{status.loss:.4f}{came}"))
    if status.samples_per_s is not None:
        parts.append(("samples/s", f"{status.samples_per_s:,.0f}"))
    if status.step_s_median is not None:
        parts.append(("step", f"{status.step_s_median * 1000:.0f} ms"))
    spare = f" + {status.num_spare} spare" if status.num_spare else ""
    unfit = f", {status.num_unfit} unfit" if status.num_unfit else ""
    parts.append(("workers", f"{status.num_workers}/{status.target_workers}{spare}{unfit}"))
    if status.target_nodes > 1:
        parts.append(("nodes", f"{status.num_nodes}/{status.target_nodes}"))
    parts.append(("generation", str(status.generation)))
    line = Text("  ")
    for index, (label, value) in enumerate(parts):
        line.append(f"{'  · ' if index else ''} {label} ", style="dim")
        line.append(value)
    return line


class PlainProgress:
    """One line per 10 % and one per event, for logs."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._events = _Events(console)
        self._reported = 0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def show(self, status: Status) -> None:
        """Print what is new, if there is something."""
        self._events.show(status.events)
        tenths = status.step * NUM_REPORTS // status.num_steps
        if tenths > self._reported:
            self._reported = tenths
            head = Text(f"{self._name}: step {status.step}/{status.num_steps}")
            self._console.print(head.append_text(numbers_line(status)), soft_wrap=True)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def print_summary(
    console: Console, run_dir: Path, metrics: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> None:
    """What came of a run: `metrics` as in result.json, `events` as in events.jsonl."""
    rows: dict[str, str | Text] = {"run folder": str(run_dir), "steps": _steps(metrics)}
    first, last = metrics.get("first_loss"), metrics.get("loss")
    if last is not None:
        rows["loss"] = f"{last:.4f}" if first is None else f"{first:.4f} → {last:.4f}"
    if metrics.get("evaluation"):
        rows["evaluation"] = _evaluation(metrics["evaluation"])
    rows["params_sha256"] = str(metrics.get("params_sha256", "unknown"))
    rows["samples_sha256"] = str(metrics.get("samples_sha256", "unknown"))
    rows["exact"] = (
        Text("yes: no fault changed the result", style="green")
        if metrics.get("exact")
        else Text("no: see result.json and events.jsonl", style="yellow")
    )
    for number, one in enumerate(metrics.get("models", ())):
        own = ", ".join(f"{name} {value}" for name, value in one["task_args"].items())
        seed = f"seed {one['seed']}" + (f", {own}" if own else "")
        ends = f"loss {_loss(one['loss'])}, {one['params_sha256'][:12]}"
        rows[f"model {number}"] = f"{seed}: {one['outcome']}, {ends}, {one['run']}"
    counts = Counter(str(event["kind"]) for event in events)
    told = [f"{num} {kind.replace('_', ' ')}" for kind, num in sorted(counts.items())]
    rows["events"] = ", ".join(told) or "none"
    if metrics.get("outcome") == "stopped":
        rows["go on by"] = f"elastic resume {run_dir}"
    console.rule(str(metrics.get("outcome", "done")), align="left", style="dim")
    for name, value in rows.items():  # a hash and its name fit 80 columns
        console.print(Text.assemble((f"{name:<15}", "dim"), value), soft_wrap=True)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    values = {"loss": evaluation["loss"], **evaluation["metrics"]}
    shown = (
        f"{name} {'not finite' if value is None else format(value, '.4f')}"
        for name, value in values.items()
    )
    return f"{', '.join(shown)} at step {evaluation['step']}"


def _steps(metrics: Mapping[str, Any]) -> str:
    words = str(metrics.get("steps", "unknown"))
    if metrics.get("wall_s") is not None:
        words += f" in {_duration(float(metrics['wall_s']))}"
    if metrics.get("step_s_median") is not None:
        words += f", median {float(metrics['step_s_median']) * 1000:.1f} ms"
    return words


def _left_s(status: Status) -> float | None:
    if status.step_s_median is None:
        return None
    return (status.num_steps - status.step) * status.step_s_median


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
