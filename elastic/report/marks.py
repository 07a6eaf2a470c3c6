"""The events of a run that are worth a mark, and the words for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic.report.clock import Clock

(
    KILL,
    STOP,
    SLOW,
    NAN,
    AGGREGATOR,
    COORDINATOR,
    JOIN,
    LEAVE,
    LOST,
    CHECKPOINT,
    JOB,
    VERDICT,
    EVALUATION,
    OTHER,
) = (
    "worker killed",
    "worker stopped or hung",
    "worker slowed",
    "NaN or overflow",
    "aggregator fault, takeover",
    "coordinator fault, restart",
    "worker joins",
    "worker leaves",
    "worker lost",
    "checkpoint",
    "job starts, resumes, ends",
    "verdict begins",
    "evaluation",
    "other",
)
UNMARKED = (EVALUATION, OTHER)
"""Worth a line in a table, not a mark in the picture."""

_OF_FAULT = {
    "kill": KILL,
    "stop": STOP,
    "resume": STOP,
    "slow": SLOW,
    "delays": SLOW,
    "add": JOIN,
    "remove": LEAVE,
    "nan": NAN,
}
_OF_KIND = {
    "job_resumed": JOB,
    "job_stopped": JOB,
    "job_failed": JOB,
    "preempted": JOB,
    "worker_joined": JOIN,
    "worker_left": LEAVE,
    "worker_lost": LOST,
    "worker_hung": STOP,
    "worker_lied": STOP,
    "worker_given_up": LOST,
    "uncoded": LOST,
    "aggregator_lost": AGGREGATOR,
    "aggregator_hung": AGGREGATOR,
    "aggregator_took_over": AGGREGATOR,
    "coordinator_restarted": COORDINATOR,
    "gcs_away": COORDINATOR,
    "no_workers": LOST,
    "nonfinite": NAN,
    "step_skipped": NAN,
    "overflow": NAN,
    "checkpoint_written": CHECKPOINT,
    "checkpoint_failed": CHECKPOINT,
    "checkpoint_damaged": CHECKPOINT,
    "checkpoint_not_removed": CHECKPOINT,
    "verdict": VERDICT,
    "evaluated": EVALUATION,
}


@dataclass(frozen=True)
class Mark:
    """An event; `time_s` in seconds since the start."""

    time_s: float
    step: int
    generation: int
    kind: str
    category: str
    worker: int | None
    is_fault: bool
    """Injected, not merely noticed."""
    text: str
    reason: str
    verdict: Mapping[str, Any] | None = None
    """What begins or ends with it: its kind and culprit, and since which step it holds."""


def mark_of(event: Mapping[str, Any], clock: Clock) -> Mark:
    """Read one line of events.jsonl."""
    kind, reason = str(event["kind"]), " ".join(str(event.get("reason") or "").split())
    is_fault = kind == "fault"
    worker = event.get("worker")
    if worker is None and is_fault and (named := re.search(r"worker-(\d+)", reason)):
        worker = int(named[1])
    who = "" if worker is None else f"worker-{worker}"
    text = reason if is_fault else _words(kind, who)
    return Mark(
        time_s=clock(float(event["time_s"])),
        step=int(event.get("step", 0)),
        generation=int(event.get("generation") or 0),
        kind=kind,
        category=_fault_category(reason) if is_fault else _OF_KIND.get(kind, OTHER),
        worker=None if worker is None else int(worker),
        is_fault=is_fault,
        text=text or kind,
        reason=reason,
        verdict=event.get("verdict"),
    )


def _words(kind: str, who: str) -> str:
    """`worker_joined`, `worker-3` as 'worker-3 joined'."""
    words = kind.replace("_", " ")
    if who and words.startswith("worker "):
        return words.replace("worker", who, 1)
    return f"{words} {who}".strip()


def _fault_category(reason: str) -> str:
    if "aggregator" in reason:
        return AGGREGATOR
    if "coordinator" in reason:
        return COORDINATOR
    first = re.split(r"[ _]", reason, maxsplit=1)[0]
    return _OF_FAULT.get(first, KILL)
