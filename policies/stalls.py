"""Who hangs, and who only waits for them: the earliest that is blocked in the order of dependency.

    operation k = the newest that anybody in the group has started
    behind   = {started < k}        in flight = {started = k, done < k}
    those in flight wait for those behind; if nobody is behind, the communication stands still

A silent process that waits for another one is a victim. So blamed are: silent processes that wait
for nobody (a hang outside communication), and groups in flight with nobody behind (a hang in
communication: the links without bytes, or the end that these have in common). Pure.

Letters as in `signals`: P processes, G memberships in groups, L transfers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from policies.signals import Bools, Groups, Ints, OpenTransfers, PollView, Processes
from policies.verdicts import Culprit, Kind, Link, Node, Verdict, Worker

_OUTSIDE = "waits for nobody and has made no progress"
_INSIDE = "is in an operation that all have begun, and has made no progress"
_BYTES = "has moved no byte of an operation that all have begun"
_CIRCLE = "waits in a circle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """What is remembered: what holds; in how many polls in a row each suspect was one; when the
    last poll was, and until when nothing new can be said, since the observer stood still itself."""

    verdicts: tuple[Verdict, ...] = ()
    polls: Mapping[tuple[Kind, Culprit], int] = field(default_factory=dict)
    since_step: Mapping[tuple[Kind, Culprit], int] = field(default_factory=dict)
    polled_s: float | None = None
    blind_until_s: float = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalls:
    """Silent for `factor` usual steps and at least `floor_s`, in `polls` polls in a row.

    What has not completed anything yet may be compiling or loading: `patience` as long.
    """

    factor: float = 2.0
    floor_s: float = 0.5
    patience: float = 30.0
    polls: int = 3

    def begin(self) -> Suspects:
        """Nothing is remembered yet."""
        return Suspects()

    def decide(self, view: PollView, before: Suspects) -> tuple[list[Verdict], Suspects]:
        """Whoever hangs now."""
        limit_s = max(self.floor_s, self.factor * view.usual_step_s)
        blind_until_s = before.blind_until_s
        if before.polled_s is not None and view.now_s - before.polled_s > limit_s / 2:
            blind_until_s = view.now_s + limit_s
        if view.is_exempt or view.now_s < blind_until_s:
            held = tuple(one for one in before.verdicts if _may_hold(view, one, limit_s))
            return list(held), replace(
                before, verdicts=held, polls={}, polled_s=view.now_s, blind_until_s=blind_until_s
            )
        found = self._blamed(view, limit_s)
        known = {one.name for one in before.verdicts}
        polls = {one.name: before.polls.get(one.name, 0) + 1 for one in found}
        since = {name: before.since_step.get(name, view.step) for name in polls}
        verdicts = [
            replace(one, since_step=since[one.name])
            for one in found
            if polls[one.name] >= self.polls or one.name in known
        ]
        after = Suspects(
            verdicts=tuple(verdicts),
            polls=polls,
            since_step=since,
            polled_s=view.now_s,
            blind_until_s=blind_until_s,
        )
        return verdicts, after

    def _blamed(self, view: PollView, limit_s: float) -> list[Verdict]:
        processes = view.processes
        limit_s_P = np.where(processes.has_done_P, limit_s, self.patience * limit_s)
        is_silent_P = processes.is_busy_P & (processes.silent_s_P > limit_s_P)
        if not is_silent_P.any():
            return []
        is_behind_G, is_in_flight_G = _state(view.groups)
        waits_P = np.zeros(len(is_silent_P), np.bool_)
        waits_P[view.groups.process_G[is_in_flight_G]] = True
        waits_P[view.waits_WQ[:, 0]] = True
        verdicts = [
            _of_process(view, place, limit_s_P[place])
            for place in np.flatnonzero(is_silent_P & ~waits_P).tolist()
        ]
        for group in _stuck(view.groups, is_behind_G, is_in_flight_G, is_silent_P):
            verdicts += _of_group(view, group, limit_s)
        return verdicts or _of_circle(view, is_silent_P, limit_s)


def _may_hold(view: PollView, verdict: Verdict, limit_s: float) -> bool:
    """Whether nothing speaks against a verdict: of a process, that it moves or is not there."""
    if isinstance(verdict.culprit, Link):
        return True
    processes = view.processes
    is_it_P = processes.number_P == verdict.culprit.number
    is_it_P &= processes.is_node_P == isinstance(verdict.culprit, Node)
    return bool((processes.silent_s_P[is_it_P] > limit_s).any())


def _state(groups: Groups) -> tuple[Bools, Bools]:
    """Who is behind in its group, and who is in flight."""
    if not len(groups.group_G):
        return np.empty(0, np.bool_), np.empty(0, np.bool_)
    _, group_G = np.unique(groups.group_G, return_inverse=True)
    newest = np.full(group_G.max() + 1, np.iinfo(np.int64).min)
    np.maximum.at(newest, group_G, groups.started_G)
    newest_G = newest[group_G]
    is_behind_G = groups.started_G < newest_G
    return is_behind_G, ~is_behind_G & (groups.done_G < newest_G)


def _stuck(
    groups: Groups, is_behind_G: Bools, is_in_flight_G: Bools, is_silent_P: Bools
) -> list[int]:
    """Groups in flight with nobody behind, of which all that are in flight are silent."""
    stuck = set(groups.group_G[is_in_flight_G].tolist())
    stuck -= set(groups.group_G[is_behind_G].tolist())
    moves_G = is_in_flight_G & ~is_silent_P[groups.process_G]
    return sorted(stuck - set(groups.group_G[moves_G].tolist()))


def _culprit(processes: Processes, place: int) -> Worker | Node:
    number = int(processes.number_P[place])
    return Node(number) if processes.is_node_P[place] else Worker(number)


def _of_process(view: PollView, place: int, limit_s: float) -> Verdict:
    culprit = _culprit(view.processes, place)
    silent_s = float(view.processes.silent_s_P[place])
    return _verdict(view, culprit, _OUTSIDE, silent_s=silent_s, limit_s=limit_s, share=1)


def _of_group(view: PollView, group: int, limit_s: float) -> list[Verdict]:
    """The links without bytes; their common end if there is one; all, if no link says anything."""
    open_L = view.open_transfers
    is_still_L = (open_L.group_L == group) & (open_L.silent_s_L > limit_s)
    places = np.flatnonzero(is_still_L)
    silent_s = float(open_L.silent_s_L[places].max()) if len(places) else limit_s
    culprits, what = _ends_in_common(view.processes, open_L, places), _BYTES
    if not culprits:
        what = _INSIDE
        own_G = view.groups.group_G == group
        culprits = [_culprit(view.processes, int(one)) for one in view.groups.process_G[own_G]]
        silent_s = float(view.processes.silent_s_P[view.groups.process_G[own_G]].min())
    num = len(culprits)
    return [
        _verdict(view, one, what, silent_s=silent_s, limit_s=limit_s, share=num) for one in culprits
    ]


def _ends_in_common(processes: Processes, open_L: OpenTransfers, places: Ints) -> list[Culprit]:
    """Of links that stand still: the end that all share; else each of the links."""
    pairs = sorted(
        {(int(open_L.sender_L[place]), int(open_L.receiver_L[place])) for place in places}
    )
    if len({tuple(sorted(pair)) for pair in pairs}) > 1:
        shared = set.intersection(*(set(pair) for pair in pairs))
        if shared:
            return [_culprit(processes, end) for end in sorted(shared)]
    numbers = processes.number_P
    return [Link(int(numbers[sender]), int(numbers[receiver])) for sender, receiver in pairs]


def _of_circle(view: PollView, is_silent_P: Bools, limit_s: float) -> list[Verdict]:
    """Silent processes that wait for each other in a circle: all of them, none sooner."""
    waits = {
        waiter: awaited
        for waiter, awaited in view.waits_WQ.tolist()
        if is_silent_P[waiter] and is_silent_P[awaited]
    }
    for first in sorted(waits):
        way = [first]
        while (after := waits.get(way[-1])) is not None and after not in way:
            way.append(after)
        if after is not None:
            circle = way[way.index(after) :]
            return [_in_circle(view, one, limit_s, len(circle)) for one in sorted(circle)]
    return []


def _in_circle(view: PollView, place: int, limit_s: float, num: int) -> Verdict:
    culprit = _culprit(view.processes, place)
    silent_s = float(view.processes.silent_s_P[place])
    return _verdict(view, culprit, _CIRCLE, silent_s=silent_s, limit_s=limit_s, share=num)


def _verdict(
    view: PollView, culprit: Culprit, what: str, *, silent_s: float, limit_s: float, share: int
) -> Verdict:
    """The longer it is silent, the surer: for twice the limit 0.75; shared among the accused."""
    confidence = (1 - 0.5 ** (silent_s / limit_s)) / share
    among = f", as one of {share} that do" if share > 1 else ""
    return Verdict(
        kind=Kind.HANG_OUTSIDE if what is _OUTSIDE else Kind.HANG_IN_COMMUNICATION,
        culprit=culprit,
        since_step=view.step,
        confidence=confidence,
        reason=f"{culprit} {what} for {silent_s:.2f} s (limit {limit_s:.2f} s){among}",
        evidence={"silent_s": silent_s, "limit_s": float(limit_s), "accused": share},
    )
