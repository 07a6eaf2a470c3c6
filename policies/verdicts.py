"""What the fault detector says: which kind of fault, who, since when, how sure, and why.

Plain values. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What is wrong; `docs/faults.md` says what to do about each."""

    HANG_OUTSIDE = "hang outside communication"
    HANG_IN_COMMUNICATION = "hang in communication"
    SLOW_COMPUTATION = "slow computation"
    SLOW_SENDER = "slow sender"
    SLOW_RECEIVER = "slow receiver"
    SLOW_LINK = "slow link"
    SILENT_CORRUPTION = "silent corruption"
    FLAPPING = "flapping"
    RESOURCE_PRESSURE = "resource pressure"


@dataclass(frozen=True, slots=True)
class Worker:
    number: int

    def __str__(self) -> str:
        return f"worker {self.number}"


@dataclass(frozen=True, slots=True)
class Node:
    """A node, its aggregator included."""

    number: int

    def __str__(self) -> str:
        return f"node {self.number}"


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between two nodes, in one direction."""

    sender: int
    receiver: int

    def __str__(self) -> str:
        return f"link {self.sender} -> {self.receiver}"


Culprit = Worker | Node | Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One fault. `confidence` is between 0 and 1; `evidence` names numbers with their units."""

    kind: Kind
    culprit: Culprit
    since_step: int
    confidence: float
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> tuple[Kind, Culprit]:
        """What stays the same as long as the fault lasts."""
        return self.kind, self.culprit
