"""What a notice means that a machine will be taken away: leave, leave at once, or stay.

Pure: the notice and the time arrive in the view. Never asks anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Notice:
    """What a cloud or Ray says of a node. Times are in seconds since the epoch."""

    reason: str
    deadline_s: float | None = None
    """When the node ends; None: nobody says."""
    certain: bool = True
    """False: it may be taken away, and often is not."""


@dataclass(frozen=True, slots=True)
class PreemptionView:
    """`step_s`: a usual step; None while there was none."""

    now_s: float
    notice: Notice | None
    step_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stay:
    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Finish the step, hand over what only this node has, go."""

    reason: str
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class TooLate:
    """No time is left for the step: save what is committed, at once."""

    reason: str
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveInTime:
    """Leave as soon as it is certain, if `num_steps` usual steps and `save_s` fit before the end.

    Waiting for the deadline wins nothing that is worth the risk: the next node computes the same.
    """

    num_steps: float = 2.0
    save_s: float = 2.0
    kind: Literal["leave_in_time"] = "leave_in_time"

    def decide(self, view: PreemptionView) -> Stay | Leave | TooLate:
        notice = view.notice
        if notice is None:
            return Stay("nobody takes this node away")
        if not notice.certain:
            return Stay(f"{notice.reason}: it may come, or not")
        if notice.deadline_s is None:
            return Leave(f"{notice.reason}, at an unknown time", None)
        left_s = notice.deadline_s - view.now_s
        needed_s = self.num_steps * (view.step_s or 0.0) + self.save_s
        if left_s < needed_s:
            reason = f"{notice.reason} in {max(0.0, left_s):.1f} s; a step needs {needed_s:.1f} s"
            return TooLate(reason, notice.deadline_s)
        return Leave(f"{notice.reason} in {left_s:.0f} s", notice.deadline_s)
