"""A node, and what a test says to it, for the rules of a job's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from elastic.core.protocol import aggregator as agg
from elastic.core.protocol import coordinator as coord
from elastic.core.protocol import events as ev
from elastic.core.protocol import node as nodes
from elastic.core.protocol import orders
from elastic.core.protocol.messages import (
    Commit,
    Hello,
    Lease,
    Manifest,
    Membership,
    Outcome,
    Report,
    State,
)

T = TypeVar("T")
STATE = State(step=3, attempt=0, exponents=(10,))
NEXT = replace(STATE, step=4)
MEMBERS = Membership(generation=1, members=(0, 1), next_worker=2, nodes=(0, 1, 2))
RULES = agg.Rules(num_steps=5, num_micro_batches=2, num_chunks=1)
EVERY = range(RULES.num_chunks)


def only(kind: type[T], actions: Sequence[Any]) -> list[T]:
    return [one for one in actions if isinstance(one, kind)]


def said(actions: Sequence[Any], node: int) -> list[orders.NodeMessage]:
    """What is sent to a node."""
    return [one.message for one in only(nodes.SendNode, actions) if one.node == node]


def ordered(actions: Sequence[Any], node: int) -> list[ev.Action]:
    return [one.action for one in only(orders.Order, said(actions, node))]


class Host:
    """A node, and a clock that the test turns."""

    def __init__(
        self,
        node: int,
        membership: Membership = MEMBERS,
        *,
        state: State = STATE,
        prepared: int = 0,
        kept: Sequence[int] = EVERY,
        linked: Sequence[int] = (0, 1, 2),
        checksum: int = 0,
    ) -> None:
        own = {node: frozenset(kept)}
        recovered = agg.Recovered(state, membership, kept=own, checksum=checksum)
        self.now_s = 0.0
        self.node = nodes.Node(node, RULES, recovered, term=10 + node, prepared=prepared)
        self.begun = self.do(ev.Started())
        self.do(ev.Received(None, Report(0, Membership(), ())))
        for one in linked:
            if one != node:
                self.begun += self.do(nodes.Reached(one))

    def do(self, event: nodes.NodeEvent) -> list[nodes.NodeAction]:
        return self.node.handle(event, self.now_s)

    def hear(self, node: int, message: orders.NodeMessage) -> list[nodes.NodeAction]:
        return self.do(nodes.FromNode(node, message))

    def holds(
        self,
        node: int,
        state: State = STATE,
        prepared: int = 0,
        *,
        kept: Sequence[int] = EVERY,
        checksum: int = 0,
        **manifests: Manifest,
    ) -> list[nodes.NodeAction]:
        """The answer of another node to this one, which leads; `manifests` are of workers w1..."""
        by_worker = {int(name[1:]): one for name, one in manifests.items()}
        term, own = 10 + self.node.node, frozenset(kept)
        held = orders.Holds(term, state, prepared, by_worker, own, checksum=checksum)
        return self.hear(node, held)

    def told(self) -> Report:
        """What the coordinator hears when it asks."""
        return only(ev.Tell, self.do(ev.Received(None, Report(0, Membership(), ()))))[-1].report


def leading(**more: Any) -> Host:
    """Node 0, which leads two others; worker 0 is here, worker 1 on node 1."""
    host = Host(0, **more)
    host.holds(1)
    host.holds(2)
    host.do(ev.Received(0, Hello(0, 0)))
    host.hear(1, orders.Relayed(10, 1, Hello(1, 1)))
    return host


def relaying(node: int = 1, membership: Membership = MEMBERS) -> Host:
    """A node that node 0 leads."""
    host = Host(node, membership)
    host.hear(0, orders.Ask(10, membership))
    return host


def commit(micro_batch: int) -> Commit:
    result = Outcome(micro_batch, 1.0, 1.0, bytes(16), bytes(8), np.array([1.0], np.float32))
    return Commit(Lease(STATE.key, (micro_batch,)), 0, 0, (result,))


def updating() -> tuple[Host, ev.Update]:
    """All micro-batches are granted, one on each of two nodes."""
    host = leading()
    host.do(ev.Received(0, commit(0)))
    (update,) = only(ev.Update, host.hear(1, orders.Relayed(10, 1, commit(1))))
    return host, update


def view(report: Report | None, *others: Report, **more: Any) -> coord.View:
    homes = {0: 0, 1: 1, 2: 2}
    living = dict.fromkeys(homes, coord.Life.ALIVE)
    by_node = {one.node: one for one in others}
    known = {0: 2, 1: 2, 2: 2} | more.pop("aggregators", {})
    return coord.View(0.0, report, living, known, others=by_node, homes=homes)


def says(node: int, *gone: int, leads: bool = False, **more: Any) -> Report:
    membership = more.pop("membership", replace(MEMBERS, members=(0, 1, 2), target=3))
    return Report(3, membership, more.pop("connected", ()), node=node, leads=leads, gone=gone)


def decide(seen: coord.View) -> list[coord.Action]:
    limits = coord.Limits(min_workers=1, max_workers=4)
    return coord.Coordinator(limits, target=3).decide(seen)
