"""Lets nobody become a member who was not probed, and says who is unfit.

Part of the coordinator's turn. Remembers nothing that processes do not say again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import replace

from elastic.core.protocol.messages import Report
from policies.preflight import Fitness, Probe

PATIENCE_S = 10.0
"""Nobody is waited for longer, whose probe, or whose peers', does not come."""


class Preflight:
    """Of one job.

    Args:
        limit: `workers.preflight`; None: everybody is fit.
        told: of each worker that is unfit when it comes, once: the worker, and why. A turn later:
            where there are too few without it, it is a member by then.
        probe_again: a worker. Probes run while others still load: where they lack processors equal
            workers differ, and who is unfit is not believed to be before a second one.
    """

    def __init__(
        self,
        limit: float | None,
        told: Callable[[int, str], None],
        probe_again: Callable[[int], None],
    ) -> None:
        self._policy = None if limit is None else Fitness(limit=limit)
        self._told, self._probe_again = told, probe_again
        self._doubted: dict[int, Probe] = {}
        self._since_s: dict[int, float] = {}
        self._found: Set[int] = frozenset()
        self._named: set[int] = set()
        self.unfit: frozenset[int] = frozenset()
        """Replaced, never changed."""

    def judge(
        self,
        report: Report | None,
        probes: Mapping[int, Probe],
        living: Set[int],
        *,
        members: Collection[int],
        target: int,
        now_s: float,
    ) -> Report | None:
        """The report without those who connect, but are not judged yet.

        The job begins once `target` workers are probed, or all that live: a median needs others.
        Later whoever comes is compared with the members: after a restart their probes come anew.
        """
        if self._policy is None or report is None:
            return report
        members = {*members, *report.membership.members, *report.membership.leaving}
        known = {worker: probe for worker, probe in probes.items() if worker in living}
        unfit = self._policy.decide(known)
        self.unfit = frozenset(unfit)
        if members:
            is_early = not known.keys() >= members & living
        else:
            is_early = len(known) < target and not known.keys() >= living
        self._since_s = {one: self._since_s.get(one, now_s) for one in report.connected}
        patient = {
            worker
            for worker, since_s in self._since_s.items()
            if worker not in members and now_s - since_s < PATIENCE_S
        }
        waiting = patient if is_early else patient - known.keys()
        unsure = patient & self._doubt(known, {*report.connected} - waiting - members)
        if unsure:
            waiting = waiting | unsure if members else patient
        for worker in sorted(self.unfit & self._found - self._named):
            self._named.add(worker)
            what = "computes, since there are too few" if worker in members else "left out"
            self._told(worker, f"{what}: {unfit[worker]}")
        self._found = self.unfit & {*report.connected} - waiting - members
        connected = tuple(one for one in report.connected if one not in waiting)
        return replace(report, connected=connected)

    def _doubt(self, known: Mapping[int, Probe], new: Set[int]) -> set[int]:
        """Have each that is unfit probed once more; those of whom that is not known yet."""
        for worker in sorted(self.unfit & new - self._doubted.keys()):
            self._doubted[worker] = known[worker]
            self._probe_again(worker)
        return {worker for worker, probe in self._doubted.items() if known.get(worker) is probe}
