"""How many hosts to ask for, which give workers to a new one, whether a lost one may come again.

Pure: hosts, losses, refusals and the time arrive in the view; what is asked for now is passed in
and returned. Never asks anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from policies.pauses import pause_s

NEVER_S = float("-inf")


@dataclass(frozen=True, slots=True)
class Asked:
    """For how many hosts more, and what came of it.

    `changed_s`: when the number changed. `since_s`: how long nobody has come. `unanswered`: how
    often in a row nobody came for so long that fewer were asked for. `there`: how many there were.
    """

    num: int = 0
    changed_s: float = NEVER_S
    since_s: float = NEVER_S
    unanswered: int = 0
    there: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowingView:
    """`there` are the hosts that the job has and keeps; with less than `least` it cannot begin.

    A host more than `num_workers` would compute nothing. `refusals_s`: when hosts came that the job
    cannot use, oldest first.
    """

    now_s: float
    wanted: int
    least: int
    there: int
    num_workers: int
    asked: Asked = Asked()
    lost_s: float = NEVER_S
    refusals_s: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Growth:
    """`gave_up`: hosts are missing, and nobody is asked."""

    asked: Asked
    reason: str
    gave_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing:
    """Ask for all that is missing: less at once, more only `cooldown_s` after a change or a loss.

    A cluster gives the hosts of one request all together, or none of them where it cannot have so
    many. So if nobody comes for `patience_s`, half as many are asked for, and so on; after one, all
    again. After `refusal_limit` hosts of no use within `window_s` nobody is asked any more.
    """

    cooldown_s: float = 10.0
    patience_s: float = 300.0
    refusal_limit: int = 3
    window_s: float = 3600.0
    kind: Literal["growing"] = "growing"

    def decide(self, view: GrowingView) -> Growth:
        now_s, before = view.now_s, view.asked
        goal = max(view.least, min(view.wanted, view.num_workers))
        missing = goal - view.there
        if missing <= 0:
            return self._ask(view, 0, 0, now_s, f"{view.there} hosts are there, {goal} wanted")
        refused = [at_s for at_s in view.refusals_s if now_s - at_s < self.window_s]
        if len(refused) >= self.refusal_limit:
            reason = (
                f"{len(refused)} hosts were of no use within {self.window_s:.0f} s (limit"
                f" {self.refusal_limit}): asks for no more; `elastic scale` tries again"
            )
            return replace(self._ask(view, 0, 0, now_s, reason), gave_up=True)
        since_s, unanswered = before.since_s, before.unanswered
        if view.there > before.there or before.num == 0:
            since_s, unanswered = now_s, 0
        elif now_s - since_s >= self.patience_s:
            since_s, unanswered = now_s, unanswered + 1 if before.num > 1 else 0
        num = max(1, missing >> unanswered)
        why = f"{view.there} of {goal} hosts are there"
        if unanswered:
            why += f"; none came within {self.patience_s:.0f} s"
        wait_s = max(before.changed_s, view.lost_s) + self.cooldown_s - now_s
        if num > before.num and wait_s > 0 and view.there >= view.least:
            num = before.num
            why += f"; cooling down for {wait_s:.1f} s"
        return self._ask(view, num, unanswered, since_s, f"asks for {num} more: {why}")

    def _ask(
        self, view: GrowingView, num: int, unanswered: int, since_s: float, reason: str
    ) -> Growth:
        changed_s = view.now_s if num != view.asked.num else view.asked.changed_s
        return Growth(Asked(num, changed_s, since_s, unanswered, view.there), reason)


def giver(loads: Mapping[int, int], node: int) -> int | None:
    """Which node should give a worker to `node`: that with the most, if it has two more.

    Args:
        loads: how many workers each node has.
    """
    most = max(loads, key=lambda one: (loads[one], one))
    return most if loads[most] - loads[node] >= 2 else None


def moves(loads: Mapping[int, int]) -> list[tuple[int, int]]:
    """Which node should give a worker to which, one after the other, until all have alike."""
    after = dict(loads)
    made: list[tuple[int, int]] = []
    while after:
        taker = min(after, key=lambda one: (after[one], one))
        node = giver(after, taker)
        if node is None:
            break
        made.append((node, taker))
        after[node] -= 1
        after[taker] += 1
    return made


@dataclass(frozen=True, slots=True)
class HostView:
    """When the job lost the host, or its processes there, without being asked to; oldest first."""

    now_s: float
    losses_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class Take:
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Readmission:
    """Take a lost host back at once, `free` times within `window_s`; then wait twice as long after
    each loss, then never. Each time the others send it the parameters and a share of the state."""

    free: int = 2
    limit: int = 8
    window_s: float = 3600.0
    base_s: float = 10.0
    cap_s: float = 300.0
    kind: Literal["readmission"] = "readmission"

    def decide(self, view: HostView) -> Take | Wait | Refuse:
        recent = [at_s for at_s in view.losses_s if view.now_s - at_s < self.window_s]
        lost = f"lost {len(recent)} times within {self.window_s:.0f} s"
        if len(recent) >= self.limit:
            return Refuse(f"{lost} (limit {self.limit}): not taken again")
        if len(recent) > self.free:
            wait_s = pause_s(len(recent) - self.free - 1, base_s=self.base_s, cap_s=self.cap_s)
            if view.now_s < recent[-1] + wait_s:
                return Wait(recent[-1] + wait_s, f"{lost}: taken again after {wait_s:.0f} s")
        return Take(lost)
