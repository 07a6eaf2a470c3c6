"""Tells callbacks what the run folder says, each line once and in order.

Reads the files that the processes of the job append to, so nothing is missed while a callback is
slow. Never touches the job: who follows decides what an error of a callback means.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from elastic.core.errors import CallbackError
from elastic.core.runs import Lines, RunFolder

if TYPE_CHECKING:
    from elastic.callbacks import Callback
    from elastic.core.config import JobConfig
    from elastic.result import Result

log = logging.getLogger(__name__)

_WRITTEN = re.compile(r"(the last one, )?step \d+: (?P<path>.+)")


class Follower:
    """Follows one run.

    `error` is the first one that a callback raised.
    """

    def __init__(self, callbacks: Sequence[Callback], run: RunFolder) -> None:
        self.error: CallbackError | None = None
        self.is_started = False
        self._callbacks = list(callbacks)
        self._run = run
        self._next_step: dict[int, int] = {}
        self._next_evaluation: dict[int, int] = {}
        self._untold: deque[tuple[str, Any]] = deque()

    def start(self, job: JobConfig, step: int) -> None:
        """Say that the job begins with `step`. What the run folder holds is not told."""
        self.is_started = True
        self._evaluations = Lines(self._run.evaluations_jsonl, from_end=True)
        self._events = Lines(self._run.events_jsonl, from_end=True)
        self._metrics = Lines(self._run.metrics_jsonl, from_end=True)
        self._tell("on_start", job, self._run.path, step)

    def poll(self) -> None:
        """Tell what has been written since."""
        if not self._callbacks:
            return
        # What a line tells of was written before it: so files are read in the opposite order.
        evaluations = self._evaluations.read()
        events = self._events.read()
        self._untold.extend(("on_step", one) for one in self._metrics.read())
        self._untold.extend(("on_evaluation", one) for one in evaluations)
        self._untold.extend(("on_event", one) for one in events)
        while self._untold:
            self._deliver(*self._untold.popleft())

    def end(self, result: Result | None) -> None:
        """Tell the rest, and that the job is over, if it ever began."""
        if not self.is_started:
            return
        self.poll()
        self._tell("on_end", result)

    def _deliver(self, kind: str, record: dict[str, Any]) -> None:
        told = {"on_step": self._next_step, "on_evaluation": self._next_evaluation}.get(kind)
        if told is not None:
            step, model = record["step"], record.get("model", 0)  # models may overtake each other
            if step < told.get(model, 0):
                return  # told before the job had to begin again at a checkpoint
            told[model] = step + 1
        self._tell(kind, record)
        if record.get("kind") == "checkpoint_written":
            match = _WRITTEN.fullmatch(record["reason"])
            assert match is not None, record
            self._tell("on_checkpoint", match["path"])

    def _tell(self, method: str, *arguments: Any) -> None:
        """Call all; who raises is told nothing more, and the first error is kept."""
        for one in list(self._callbacks):
            call: Callable[..., None] = getattr(one, method)
            try:
                call(*arguments)
            except Exception as error:
                self._callbacks.remove(one)
                name = f"{type(one).__name__}.{method}"
                log.exception("%s raised; the job is stopped", name)
                if self.error is None:
                    self.error = CallbackError(f"{name}: {type(error).__name__}: {error}")
                    self.error.__cause__ = error
