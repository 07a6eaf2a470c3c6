"""What `elastic top` shows: who computes, how fast, what is wrong, where the time goes, live.

Drawn from the records in the run folder, so it asks no process, and a run that has ended can be
looked at, too. Only shows.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elastic.core.runs import Lines, RunFolder, num_models
from elastic.core.status import Status, read_status
from elastic.progress import event_line, numbers_line
from monitoring.account import PARTS
from monitoring.tally import Line, Tally

NUM_EVENTS = 8
MOST_WORKERS = 16
"""Rows of workers; of more, the slowest are shown."""
STYLES: Mapping[str, str] = {
    "productive": "green",
    "recomputed": "dark_orange",
    "waiting": "yellow",
    "coordination": "blue",
    "recovery": "red",
    "checkpoint": "magenta",
    "evaluation": "cyan",
    "start-up": "bright_black",
    "other": "white",
}
"""A colour for each part of the goodput account."""

_NUM_STEPS = 240
_WIDE = 34
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_SLOW, _VERY_SLOW = 1.15, 1.5


class View:
    """One run, read again and again."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.job = run.read_json(run.job_json)
        self.tally = Tally(self.job)
        self.steps: deque[Line] = deque(maxlen=_NUM_STEPS)
        self.events: deque[Line] = deque(maxlen=NUM_EVENTS)
        self.start_s: float | None = None
        self._lines = [Lines(one) for one in (run.evaluations_jsonl, run.events_jsonl)]
        self._metrics = Lines(run.metrics_jsonl)

    def read(self) -> None:
        """Take in what was written since."""
        evaluations, events = (one.read() for one in self._lines)
        steps = self._metrics.read()
        self.tally.take(steps=steps, events=events, evaluations=evaluations)
        self.steps.extend(steps)
        self.events.extend(events)
        if self.start_s is None and events:
            self.start_s = float(events[0]["time_s"])

    def frame(self) -> RenderableType:
        """The whole screen."""
        middle = Table.grid(expand=True, padding=(0, 1, 0, 0))
        middle.add_column(ratio=5)
        middle.add_column(ratio=4)
        middle.add_row(self._workers(), Group(self._time(), self._verdicts()))
        return Group(self._head(), middle, self._last_events())

    def _head(self) -> Panel:
        status = read_status(self.run) or self._status()
        name = str(self.job["name"])
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            Text(status.phase, style="bold green" if status.phase == "training" else "bold"),
            ProgressBar(total=status.num_steps, completed=status.step),
            f"{status.step:,}/{status.num_steps:,} steps",
        )
        curves = Table.grid(padding=(0, 2))
        loss = [one["loss"] for one in self.steps if one["loss"] is not None]
        took_s = [float(one["step_s"]) for one in self.steps]
        for label, values, style in (("loss", loss, "cyan"), ("step time", took_s, "green")):
            curves.add_row(Text(f"   {label:<9}", style="dim"), Text(spark(values), style=style))
        rest = numbers_line(status)
        return Panel(
            Group(bar, rest, curves), title=f"[bold]{name}", title_align="left", border_style="dim"
        )

    def _status(self) -> Status:
        """Of a run that has ended, or whose driver is busy."""
        newest, tally = self.tally.newest, self.tally
        usual_s = statistics.median(float(one["step_s"]) for one in self.steps) if newest else None
        return Status(
            phase="training" if self.run.is_running() else "done",
            num_steps=int(self.job["steps"]) * num_models(self.job),
            run_dir=str(self.run.path),
            step=int(newest["step"]) + 1 if newest else 0,
            loss=newest["loss"] if newest else None,
            samples_per_s=newest["samples"] / usual_s if newest and usual_s else None,
            step_s_median=usual_s,
            num_workers=len(tally.members),
            target_workers=len(tally.members),
        )

    def _workers(self) -> Panel:
        table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim")
        table.add_column("worker", no_wrap=True)
        table.add_column("micro-batches", no_wrap=True)
        table.add_column("pace", no_wrap=True, justify="right")
        table.add_column("against the median", no_wrap=True)
        paces, done = self.tally.paces, self.tally.done
        most = max(done.values(), default=1)
        verdicts = {str(one["worker"]): one for one in self.tally.verdicts.values()}
        members = sorted(self.tally.members)
        shown = members
        if len(members) > MOST_WORKERS:
            slowest = sorted(members, key=lambda one: -paces.get(one, 0.0))[:MOST_WORKERS]
            shown = sorted(slowest)
        for worker in shown:
            pace, num = paces.get(worker), done.get(worker, 0)
            style = pace_style(pace)
            flag = " ◆" if str(worker) in verdicts else ""
            table.add_row(
                Text.assemble((f"{worker:>4}", "bold"), (flag, "bold red")),
                Text.assemble((bar_of(num / most, 10), "blue"), f" {num:>3}"),
                Text("-" if pace is None else f"{pace:.2f}x", style=style),
                Text(bar_of(0.0 if pace is None else min(pace / 3, 1.0), 18), style=style),
            )
        left = len(members) - len(shown)
        title = f"[bold]workers[/] {len(members)}" + (f", the {len(shown)} slowest" if left else "")
        return Panel(table, title=title, title_align="left", border_style="dim")

    def _time(self) -> Panel:
        seconds = self.tally.ledger.seconds
        total_s = sum(seconds.values())
        shares = {part: seconds[part] / total_s if total_s > 0 else 0.0 for part in PARTS}
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, justify="right")
        for part in sorted(PARTS, key=lambda one: -shares[one]):
            if shares[part] >= 0.0005:
                table.add_row(
                    Text.assemble(("■ ", STYLES[part]), part),
                    f"{shares[part]:.1%}",
                    Text(f"{seconds[part]:,.1f} s", style="dim"),
                )
        title = f"[bold]goodput[/] {shares['productive']:.1%}"
        return Panel(
            Group(stacked(shares, _WIDE), table),
            title=title,
            title_align="left",
            border_style="dim",
        )

    def _verdicts(self) -> Panel:
        held = list(self.tally.verdicts.values())
        lines: list[Text] = [
            Text.assemble(("◆ ", "bold red"), str(one["reason"])) for one in held
        ] or [Text("none: nobody is slow, nobody hangs", style="dim green")]
        began = sum(self.tally.num_verdicts.values())
        title = f"[bold]verdicts[/] {len(held)}" + (f", {began} so far" if began else "")
        border = "red" if held else "dim"
        return Panel(Group(*lines), title=title, title_align="left", border_style=border)

    def _last_events(self) -> Panel:
        start_s = self.start_s or 0.0
        lines = [event_line(one, start_s) for one in self.events]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Panel(
            Group(*lines), title="[bold]last events", title_align="left", border_style="dim"
        )


def pace_style(pace: float | None) -> str:
    """Green as the others, yellow a little slower, red by half."""
    if pace is None:
        return "dim"
    return "red" if pace >= _VERY_SLOW else "yellow" if pace >= _SLOW else "green"


def bar_of(share: float, width: int) -> str:
    """A bar of at most `width` characters, to the eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def stacked(shares: Mapping[str, float], width: int) -> Text:
    """One bar of all parts; one that is seen at all has a character, the largest has the rest."""
    seen = {part: max(1, round(share * width)) for part, share in shares.items() if share >= 0.005}
    if seen:
        largest = max(seen, key=lambda part: seen[part])
        seen[largest] += width - sum(seen.values())
    return Text.assemble(*(("█" * num, STYLES[part]) for part, num in seen.items()))


def spark(values: Sequence[Any], width: int = 60) -> str:
    """The last values as a curve of `width` characters; each stands for a mean."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    first = len(values) % size
    groups = [values[:first]] if first else []
    groups += [values[at : at + size] for at in range(first, len(values), size)]
    means = [statistics.fmean(map(float, one)) for one in groups]
    low, high = min(means), max(means)
    span = high - low
    if span <= 0:
        return _HEIGHTS[0] * len(means)
    return "".join(_HEIGHTS[min(7, int((one - low) / span * 8))] for one in means)
