"""Lets no host become a member whose links were not probed, and says which are unfit.

Part of the coordinator's turn. What a predecessor has measured is measured again, once somebody
joins; who was a member stays one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from actors.contacts import Contacts
from elastic.core.protocol.messages import Membership, ProbeLink, Report
from policies.preflight import LinkFitness, LinkProbe, Pair, next_pairs

PATIENCE_S = 10.0
"""Nobody is waited for longer than that, whose answer on a link does not come."""


class LinkPreflight:
    """Of one job.

    Args:
        limit: `workers.preflight`; None: every host is fit.
        min_nodes: `nodes.min`: so many take part in any case.
        told: of each host that is unfit, once: the node, and why.
    """

    def __init__(
        self,
        limit: float | None,
        min_nodes: int,
        contacts: Contacts,
        told: Callable[[int, str], None],
    ) -> None:
        self._policy = None if limit is None else LinkFitness(limit=limit)
        self._min_nodes, self._contacts, self._told = min_nodes, contacts, told
        self._known: dict[Pair, LinkProbe] = {}
        self._num: Counter[Pair] = Counter()
        self._asked: dict[Pair, float] = {}
        self._passed: set[int] = set()
        self.unfit: Mapping[int, str] = {}
        """Hosts that are left out, and why. Replaced, never changed."""
        self.held: frozenset[int] = frozenset()
        """Nodes that may not become members now."""

    def turn(
        self,
        there: Collection[int],
        report: Report | None,
        membership: Membership,
        *,
        first_step: int,
        now_s: float,
    ) -> None:
        """Take what was measured, ask for more, judge once nothing is missing.

        Args:
            there: nodes that the job may use. A job begins once all of them have been heard.
            report: of the node that leads.
        """
        if self._policy is None or report is None:
            return
        self._take(now_s)
        if report.membership.generation > membership.generation:
            membership = report.membership
        is_beginning = report.step == first_step and not membership.members
        if not is_beginning:
            self._passed |= {*membership.nodes, *membership.joining}
        heard = {one for one, said in self._contacts.reports.items() if said is not None}
        hosts = {*there} - {*membership.former, *self.unfit}
        new = hosts - self._passed
        if new and not (is_beginning and hosts - heard):
            team = hosts & heard
            if not self._is_missing(team, now_s):
                self._judge(team, new & heard)
        self.held = frozenset((hosts - self._passed) | {*self.unfit})

    def _take(self, now_s: float) -> None:
        while self._contacts.probed:
            one = self._contacts.probed.popleft()
            pair, probe = (one.node, one.peer), LinkProbe(one.round_trip_s, one.bytes_per_s)
            known = self._known.get(pair)
            self._known[pair] = probe if known is None else known.best(probe)
            if self._asked.pop(pair, None) is not None:
                self._num[pair] += 1
        for pair, asked_s in list(self._asked.items()):
            if now_s - asked_s > PATIENCE_S:
                del self._asked[pair]
                self._num[pair] = 2  # asked no more

    def _is_missing(self, team: Collection[int], now_s: float) -> bool:
        """Ask for what is missing: each link, and those that seem slow once more, since probes run
        while others load. Whether an answer is still to come."""
        assert self._policy is not None, "nobody is judged"
        if len(team) < self._policy.min_hosts:
            return False
        pairs = [(one, other) for one in team for other in team if one != other]
        self._asked = {one: at_s for one, at_s in self._asked.items() if one in pairs}
        wanted = [one for one in pairs if not self._num[one]]
        if not wanted and not self._asked:
            slow = self._policy.slow(self._of(team))
            wanted = [one for one in slow if self._num[one] < 2]
        wanted = [one for one in wanted if one not in self._asked]
        for sender, receiver in next_pairs(wanted, self._asked):
            self._asked[sender, receiver] = now_s
            self._contacts.send(sender, ProbeLink(receiver))
        return bool(self._asked or wanted)

    def _judge(self, team: Collection[int], new: Collection[int]) -> None:
        assert self._policy is not None, "nobody is judged"
        unfit = self._policy.decide(self._of(team), new)
        num_spare = max(0, len(team) - self._min_nodes)
        out = dict(list(unfit.items())[:num_spare])
        self._passed |= {*new} - out.keys()
        self.unfit = {**self.unfit, **out}
        for node, why in unfit.items():
            few = f"takes part, since there are too few (nodes.min {self._min_nodes})"
            self._told(node, f"node {node} {'left out' if node in out else few}: {why}")

    def _of(self, team: Collection[int]) -> dict[Pair, LinkProbe]:
        return {pair: one for pair, one in self._known.items() if {*pair} <= {*team}}
