"""What the lines of a run folder add up to, as numbers: steps, times, faults, verdicts, paces.

Knows nothing of who asks, and reads nothing itself: `take` is given the lines. So what is exported,
what `elastic top` shows, and what a coordinator that was restarted goes on with, is the same.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic.core.runs import num_models
from elastic.core.status import Status
from monitoring.account import BEGINS, GONE, Ledger, done_of
from monitoring.metrics import SECONDS

VERDICT, VERDICT_ENDED = "verdict", "verdict_ended"
"""Kinds of the events that tell of a verdict; the field `verdict` holds its kind and culprit."""

_NUM_STEPS = 64
_OF_CHECKPOINT = re.compile(r"(?:the last one, )?step (\d+): ")
_ENDS = ("job_finished", "job_stopped", "job_failed", "job_interrupted")
_NEWEST = 0.1
"""Weight of the newest step in a worker's pace."""

Line = Mapping[str, Any]
What = Literal["event", "evaluation", "step"]


def in_order(
    *, steps: Iterable[Line], events: Iterable[Line], evaluations: Iterable[Line]
) -> list[tuple[What, Line]]:
    """What was written to the three files, in the order of its time."""
    told: list[tuple[What, Line]] = [("event", one) for one in events]
    told += [("evaluation", one) for one in evaluations]
    told += [("step", one) for one in steps]
    return sorted(told, key=lambda one: float(one[1]["time_s"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """How a job stands, as its coordinator knows it: of each worker the node, and how many copies
    there are, and should be, of the chunk that has fewest. `num_joining`: nodes that only receive
    the parameters yet. `spares`: workers that are ready to compute. `machine_of`: of each node that
    there is or was the address of its host, which may come back as another node. `exporters`: where
    those of nodes are scraped."""

    status: Status
    node_of: Mapping[int, int]
    replicas: int
    replicas_wanted: int
    num_joining: int = 0
    spares: tuple[int, ...] = ()
    machine_of: Mapping[int, str] = field(default_factory=dict)
    exporters: Mapping[int, tuple[str, int]] = field(default_factory=dict)


class Histogram:
    """Durations in the buckets of SECONDS, and one more for what is longer."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum_s = 0.0

    def add(self, took_s: float) -> None:
        self.counts[bisect_left(SECONDS, took_s)] += 1
        self.sum_s += took_s


class Tally:
    """Of one run, from its first line on.

    Args:
        job: as in job.json.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._num_models = num_models(job)
        every = int((job.get("checkpoint") or {}).get("every") or 0)
        self.ledger = Ledger(every, self._num_models)
        self.num_steps = self.num_samples = self.num_duplicates = self.num_unaudited = 0
        self.num_dropped = self.num_overflows = self.num_nonfinite = self.num_skipped = 0
        self.step_s = Histogram()
        self.checkpoint_s = Histogram()
        self.newest_checkpoint_s: float | None = None
        self.newest: Line | None = None
        self.is_over = False
        self.departures: list[Line] = []
        self.members: set[int] = set()
        self._gone: set[int] = set()
        self.verdicts: dict[tuple[str, str], Line] = {}
        self.num_verdicts: Counter[str] = Counter()
        self.done: dict[int, int] = {}
        """Micro-batches of each worker that counted, in the last step."""
        self._pace_s: dict[int, float] = {}
        self._committed_s: deque[tuple[tuple[int, int], float]] = deque(
            maxlen=_NUM_STEPS * self._num_models
        )
        """When each model had so many steps."""

    def take(
        self, *, steps: Iterable[Line], events: Iterable[Line], evaluations: Iterable[Line]
    ) -> None:
        """Add lines that were written since the last call, in the order of their time."""
        for what, line in in_order(steps=steps, events=events, evaluations=evaluations):
            self.add(what, line)

    def add(self, what: What, line: Line) -> None:
        """Add one line of the run's records."""
        match what:
            case "event":
                self._event(line)
            case "evaluation":
                self.ledger.add_evaluation(line)
            case "step":
                self._step(line)

    @property
    def paces(self) -> dict[int, float]:
        """How long each worker takes for a micro-batch, over the median of all."""
        known = {one: pace_s for one, pace_s in self._pace_s.items() if one in self.members}
        usual_s = statistics.median(known.values()) if known else 0.0
        return {one: pace_s / usual_s for one, pace_s in known.items()} if usual_s else {}

    def slowest(self, num: int) -> list[tuple[int, float]]:
        """So many workers and their paces, the slowest first."""
        return sorted(self.paces.items(), key=lambda one: (-one[1], one[0]))[:num]

    def _step(self, line: Line) -> None:
        self.ledger.add_step(line)
        self.newest = line
        self.num_steps += 1
        self.num_samples += int(line["samples"])
        self.num_duplicates += int(line["num_duplicates"])
        self.num_unaudited += int(line.get("num_unaudited", 0))  # runs of before do not say
        self.num_dropped += int(line.get("num_dropped", 0))
        self.step_s.add(float(line["step_s"]))
        step, model = divmod(int(line["step"]), self._num_models)
        self._committed_s.append(((model, step + 1), float(line["time_s"])))
        took_s: dict[int, list[float]] = {}
        for one in done_of(line):
            if one.granted:
                took_s.setdefault(one.worker, []).append(one.end_s - one.start_s)
        self.done = {worker: len(own) for worker, own in took_s.items()}
        for worker, own in took_s.items():
            if worker in self._gone:
                continue  # it died in the step: what it had done counts, it does not come back
            now_s = statistics.median(own)
            before_s = self._pace_s.get(worker, now_s)
            self._pace_s[worker] = before_s + _NEWEST * (now_s - before_s)
            self.members.add(worker)

    def _event(self, event: Line) -> None:
        self.ledger.add_event(event)
        kind, worker = str(event["kind"]), event.get("worker")
        if kind == "overflow":
            self.num_overflows += 1
        elif kind == "nonfinite":
            self.num_nonfinite += 1
        elif kind == "step_skipped":
            self.num_skipped += 1
        elif kind == "checkpoint_written":
            self._checkpoint(event)
        elif kind in (VERDICT, VERDICT_ENDED):
            self._verdict(event)
        elif kind in BEGINS:
            self._begin()
        elif kind in _ENDS:
            self.is_over = True
        elif kind == "worker_joined" and worker is not None:
            self._gone.discard(int(worker))
            self.members.add(int(worker))
        elif kind in GONE and worker is not None:
            self._gone.add(int(worker))
            self.members.discard(int(worker))
            self._pace_s.pop(int(worker), None)
            if kind == "worker_lost":
                self.departures.append(event)

    def _begin(self) -> None:
        """Workers' numbers begin at 0 again."""
        self.is_over = False
        self.members.clear()
        self._gone.clear()
        self.verdicts.clear()
        self._pace_s.clear()

    def _checkpoint(self, event: Line) -> None:
        self.newest_checkpoint_s = float(event["time_s"])
        match = _OF_CHECKPOINT.match(str(event["reason"]))
        model = int(event.get("model", 0))
        committed_s = dict(self._committed_s).get((model, int(match[1]))) if match else None
        if committed_s is not None:
            self.checkpoint_s.add(max(0.0, self.newest_checkpoint_s - committed_s))

    def _verdict(self, event: Line) -> None:
        name = (str(event["verdict"]["kind"]), str(event["verdict"]["culprit"]))
        if event["kind"] == VERDICT_ENDED:
            self.verdicts.pop(name, None)
            return
        if name not in self.verdicts:
            self.num_verdicts[name[0]] += 1
        self.verdicts[name] = event
