"""Counters of links and hosts as nodes tell them, made into what came about since the last look.

A counter that went back began anew: its process was replaced. Decides nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastic.core.protocol.messages import GpuCount, HostCount, LinkCount, Pulse
from policies.signals import Hosts, Transfers

_MIN_S = 0.4
"""A look at a host sooner after the last one says little: its counters are read now and then."""


class LinkTotal(NamedTuple):
    """What went from one node to another: how long bytes were on their way, and how long the
    receiver waited for the rest of a message."""

    sender: int
    receiver: int
    sent: int
    busy_s: float
    wait_s: float


class Counters:
    """Of one job."""

    def __init__(self) -> None:
        self._links: dict[tuple[int, int], LinkCount] = {}
        self._links_before: dict[tuple[int, int], LinkCount] = {}
        self._hosts: dict[int, HostCount] = {}
        self._hosts_before: dict[int, HostCount] = {}
        self._gpus: dict[int, tuple[GpuCount, ...]] = {}
        self._gpus_before: dict[int, tuple[GpuCount, ...]] = {}
        self._throttled: dict[int, float] = {}

    def take(self, pulse: Pulse) -> None:
        """Take in what a node says."""
        for one in pulse.links:
            self._links[pulse.node, one.peer] = one
        if pulse.host is not None:
            self._hosts[pulse.node] = pulse.host
            self._hosts_before.setdefault(pulse.node, pulse.host)
        self._gpus[pulse.node] = pulse.gpus

    def links(self, num: int) -> list[LinkTotal]:
        """So many of them, since each was opened: those that take longest for a byte."""
        counts = dict(self._links)  # at one stroke: it may be asked by any thread
        found = [
            LinkTotal(
                sender,
                receiver,
                one.sent,
                one.busy_s,
                counts.get((receiver, sender), LinkCount(sender)).receive_wait_s,
            )
            for (sender, receiver), one in counts.items()
        ]
        found.sort(key=lambda one: one.busy_s / max(one.sent, 1), reverse=True)
        return sorted(found[:num])

    def transfers(self) -> Transfers | None:
        """What went over each link since the last call; None if nothing is known of any.

        Of a link both ends tell: who sends, how long it took, who receives, how long it waited.
        """
        rows = []
        for (sender, receiver), now in self._links.items():
            before = _since(now, self._links_before.get((sender, receiver)))
            back = self._links.get((receiver, sender))
            waited_s = 0.0
            if back is not None:
                then = _since(back, self._links_before.get((receiver, sender)))
                waited_s = back.receive_wait_s - then.receive_wait_s
            rows.append(
                (
                    sender,
                    receiver,
                    now.sent - before.sent,
                    now.busy_s - before.busy_s,
                    now.send_wait_s - before.send_wait_s,
                    waited_s,
                )
            )
        self._links_before = dict(self._links)
        if not rows:
            return None
        table = np.array(sorted(rows), np.float64).T
        return Transfers(
            sender_L=table[0].astype(np.int64),
            receiver_L=table[1].astype(np.int64),
            kind_L=np.zeros(len(rows), np.int64),
            bytes_L=table[2].astype(np.int64),
            took_s_L=table[3],
            send_wait_s_L=table[4],
            receive_wait_s_L=table[5],
        )

    def hosts(self) -> Hosts | None:
        """How much each host lacked since the last call; None if it was called just before."""
        rows = []
        for node, now in sorted(self._hosts.items()):
            before = self._hosts_before[node]
            took_s = now.at_s - before.at_s
            if took_s < 0:
                self._hosts_before[node] = now  # it is another host now
            if took_s < _MIN_S:
                continue
            self._hosts_before[node] = now
            shares = (
                (now.steal_s - before.steal_s) / took_s,
                (now.memory_s - before.memory_s) / took_s,
                (now.disk_s - before.disk_s) / took_s,
            )
            kills, (throttled, faults) = now.kills - before.kills, self._cards(node)
            of_time = (min(1.0, max(0.0, one)) for one in (*shares, throttled))
            rows.append((node, *of_time, kills, faults))
        if not rows:
            return None
        table = np.array(rows, np.float64).T
        return Hosts(
            node_N=table[0].astype(np.int64),
            steal_N=table[1],
            memory_N=table[2],
            disk_N=table[3],
            throttled_N=table[4],
            out_of_memory_kills_N=np.maximum(table[5], 0).astype(np.int64),
            card_faults_N=np.maximum(table[6], 0).astype(np.int64),
        )

    def _cards(self, node: int) -> tuple[float, int]:
        """Of a host's graphics cards, since the last look: the largest share of time in which one
        was held back, and faults of all. Where they were not read since, the share of before."""
        now = {one.number: one for one in self._gpus[node]}
        pairs = [
            (now[one.number], one) for one in self._gpus_before.get(node, ()) if one.number in now
        ]
        self._gpus_before[node] = self._gpus[node]
        shares = [
            ((one.throttled_s or 0.0) - (before.throttled_s or 0.0)) / (one.at_s - before.at_s)
            for one, before in pairs
            if one.at_s > before.at_s
        ]
        if shares or not now:
            self._throttled[node] = max(shares, default=0.0)
        faults = sum(
            max(0, (one.ecc_errors or 0) - (before.ecc_errors or 0))
            + max(0, one.faults - before.faults)
            for one, before in pairs
        )
        return self._throttled.get(node, 0.0), faults


def _since(now: LinkCount, before: LinkCount | None) -> LinkCount:
    """What to count from: nothing, if this connection is a new one."""
    if before is None or now.sent < before.sent or now.busy_s < before.busy_s:
        return LinkCount(now.peer)
    return before
