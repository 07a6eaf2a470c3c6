"""Which workers and hosts are not fit: those whose short probe takes far longer than the fleet's.

Before a worker becomes a member it multiplies two matrices and copies memory, a few times each; the
best counts, so that a neighbour that is busy for a moment spoils nothing. Before a host does, its
links to the others carry a few megabytes each way. Compared is with the fleet's median. Pure: what
was measured arrives in the view. Who is left out is not for here.

Twice the median is what DLRover's pre-flight takes for a bad host
(https://github.com/intelligent-machine-learning/dlrover, node check).
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Probe:
    """Seconds of the best of a few tries: a product of two matrices, a copy of memory.

    `is_right`: the product was what it must be.
    """

    multiply_s: float
    copy_s: float
    is_right: bool = True

    def best(self, other: Probe) -> Probe:
        """Of two probes of one worker the shorter times; both must be right."""
        return Probe(
            min(self.multiply_s, other.multiply_s),
            min(self.copy_s, other.copy_s),
            is_right=self.is_right and other.is_right,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitness:
    """Unfit: more than `limit` times the median of all that were probed, in either measure."""

    limit: float = 2.0
    kind: Literal["fitness"] = "fitness"

    def decide(self, probes: Mapping[int, Probe]) -> dict[int, str]:
        """Who is unfit, and why.

        Args:
            probes: of the workers that live.
        """
        if not probes:
            return {}
        # of an even number half are as good: the smaller one of the two in the middle
        multiply_s = statistics.median_low(one.multiply_s for one in probes.values())
        copy_s = statistics.median_low(one.copy_s for one in probes.values())
        unfit = {}
        for worker, probe in probes.items():
            reasons = []
            if not probe.is_right:
                reasons.append("a product of matrices comes out wrong")
            reasons += self._slow("multiplies matrices", probe.multiply_s, multiply_s)
            reasons += self._slow("copies memory", probe.copy_s, copy_s)
            if reasons:
                unfit[worker] = "; ".join(reasons)
        return unfit

    def _slow(self, what: str, took_s: float, usual_s: float) -> list[str]:
        if took_s <= self.limit * usual_s:
            return []
        times = f"{took_s / usual_s:.1f} times the fleet's median"
        return [f"{what} in {1000 * took_s:.2f} ms, {times} (workers.preflight {self.limit:g})"]


Pair = tuple[int, int]
"""A link in one direction: the node that sends, the one that receives."""


@dataclass(frozen=True, slots=True)
class LinkProbe:
    """What a link does in one direction, with nothing else to carry: how long a byte goes there and
    its answer back, and how much arrives in a second."""

    round_trip_s: float
    bytes_per_s: float

    def best(self, other: LinkProbe) -> LinkProbe:
        """Of two probes of one link the better figures."""
        return LinkProbe(
            min(self.round_trip_s, other.round_trip_s), max(self.bytes_per_s, other.bytes_per_s)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFitness:
    """A link is slow if it takes more than `limit` times the fleet's median, for a byte there and
    back, or for as many bytes. The median is that of the best link of each host: of three hosts a
    slow one has most of the links. A host is unfit if half of its links or more are slow, besides
    those to hosts that are unfit themselves.

    `least_s`: a round trip that is longer by less than that says more of processes than of links.
    """

    limit: float = 2.0
    least_s: float = 1e-3
    min_hosts: int = 3
    """Of two hosts nobody can say which one it is, nor what is usual."""
    kind: Literal["link_fitness"] = "link_fitness"

    def slow(self, probes: Mapping[Pair, LinkProbe]) -> dict[Pair, str]:
        """The links that are slow, and by how much."""
        best: dict[int, LinkProbe] = {}
        for pair, one in probes.items():
            best |= {host: one.best(best.get(host, one)) for host in pair}
        if len(best) < self.min_hosts:
            return {}
        trip_s = statistics.median_low(one.round_trip_s for one in best.values())
        rate = statistics.median_high(one.bytes_per_s for one in best.values())
        found = {}
        for (sender, receiver), one in probes.items():
            reasons = []
            if self.limit * one.bytes_per_s < rate:
                usual = f"the fleet's median is {rate / 1e6:.1f} MB/s"
                reasons.append(f"carries {one.bytes_per_s / 1e6:.1f} MB/s, {usual}")
            late_s = max(self.limit * trip_s, trip_s + self.least_s)
            if one.round_trip_s > late_s:
                usual = f"the fleet's median is {1e3 * trip_s:.2f} ms"
                reasons.append(f"takes {1e3 * one.round_trip_s:.2f} ms there and back, {usual}")
            if reasons:
                found[sender, receiver] = f"link {sender} -> {receiver} {'; '.join(reasons)}"
        return found

    def decide(self, probes: Mapping[Pair, LinkProbe], new: Collection[int]) -> dict[int, str]:
        """Which hosts are unfit, the worst first, and why.

        Args:
            new: those that are judged; of the others only links are compared with. Of two that are
                as bad it is the one of the greater number.
        """
        slow = self.slow(probes)
        hosts, unfit = {host for pair in probes for host in pair}, dict[int, str]()
        while len(hosts) >= self.min_hosts:
            shares = {
                host: _share({frozenset(one) for one in probes if {*one} <= hosts}, slow, host)
                for host in hosts & {*new}
            }
            worst = max(shares, key=lambda one: (shares[one], one), default=None)
            if worst is None or shares[worst] < 0.5:
                break
            pairs = sorted(slow, key=lambda one: (one[0] != worst, probes[one].bytes_per_s))
            of_it = [slow[one] for one in pairs if worst in one and {*one} <= hosts]
            limit = f"(workers.preflight {self.limit:g})"
            more = f", and {len(of_it) - 1} more of its links" if len(of_it) > 1 else ""
            unfit[worst] = f"{of_it[0]} {limit}{more}"
            hosts.remove(worst)
        return unfit


def _share(ends: Collection[frozenset[int]], slow: Collection[Pair], host: int) -> float:
    """Of the links of a host: how many are slow in some direction."""
    mine = [one for one in ends if host in one]
    bad = {frozenset(one) for one in slow}
    return sum(one in bad for one in mine) / len(mine) if mine else 0.0


def next_pairs(wanted: Collection[Pair], busy: Collection[Pair]) -> list[Pair]:
    """What to probe now besides what is probed already: each host sends to one and receives from
    one at a time, so that none waits for its own other links."""
    senders, receivers = {one for one, _ in busy}, {one for _, one in busy}
    num = 1 + max((max(pair) for pair in wanted), default=0)
    now = []
    for sender, receiver in sorted(wanted, key=lambda one: ((one[1] - one[0]) % num, one)):
        if sender not in senders and receiver not in receivers:
            now.append((sender, receiver))
            senders.add(sender)
            receivers.add(receiver)
    return now
