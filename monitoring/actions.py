"""What steering has done, as it lies in events: it outlives a coordinator, and can be undone.

Decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.steering import Remedy, Taken
from policies.verdicts import Culprit, Kind, Link, Node, Worker

STEERED, UNDONE = "steered", "undone"
"""Kinds of events; the field `action` of the first holds what was done, `culprit` of the second to
whom it is not done any more."""


def action_fields(taken: Taken) -> dict[str, Any]:
    """An action as it lies in an event."""
    culprit = taken.culprit
    numbers = [culprit.sender, culprit.receiver] if isinstance(culprit, Link) else [culprit.number]
    return {
        "remedy": taken.remedy.name.lower(),
        "kind": taken.kind.value,
        "culprit": [type(culprit).__name__.lower(), *numbers],
        "num_workers": taken.num_workers,
    }


def taken_of(event: Mapping[str, Any]) -> Taken:
    """The action that an event tells of."""
    action = event["action"]
    return Taken(
        float(event["time_s"]),
        Remedy[str(action["remedy"]).upper()],
        _culprit(*action["culprit"]),
        Kind(action["kind"]),
        num_workers=int(action["num_workers"]),
    )


def _culprit(what: str, *numbers: int) -> Culprit:
    if what == "link":
        return Link(*numbers)
    return Worker(*numbers) if what == "worker" else Node(*numbers)
