"""The lead's audits: who is asked instead of whom, and what happens where somebody is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from elastic.core.protocol import events as ev
from elastic.core.protocol.aggregator import Aggregator, Recovered, Rules
from elastic.core.protocol.messages import (
    Admit,
    Commit,
    Hello,
    Lease,
    Leases,
    Membership,
    Message,
    Outcome,
    State,
)
from policies.auditing import Audits

STATE = State(step=3, attempt=0, exponents=(10,))


class Lead:
    """Of one micro-batch a step, which is audited: worker -> node in `homes`, all of them members.

    Args:
        connected: who says Hello; all of them if it is not given.
    """

    def __init__(
        self,
        homes: dict[int, int],
        *,
        probability: float = 1.0,
        connected: Sequence[int] | None = None,
    ) -> None:
        nodes = tuple(sorted({*homes.values()}))
        self.homes, self.now_s = homes, 0.0
        self.leases: dict[int, Lease] = {}
        self.failure = ""
        self.membership = Membership(1, tuple(homes), next_worker=len(homes), nodes=nodes)
        audits = Audits(seed=0, probability=probability)
        rules = Rules(num_steps=9, num_micro_batches=1, num_chunks=1, audits=audits)
        self.aggregator = Aggregator(rules, Recovered(STATE, self.membership))
        self.do(ev.Started())
        for worker in homes if connected is None else connected:
            self.hear(worker, Hello(worker, worker))

    def do(self, event: ev.Event) -> list[ev.Action]:
        actions = self.aggregator.handle(event, self.now_s)
        for one in actions:
            if isinstance(one, ev.Send) and isinstance(one.message, Leases):
                (self.leases[one.worker],) = one.message.leases
            if isinstance(one, ev.Finish):
                self.failure = one.failure
        return actions

    def hear(self, worker: int, message: Message) -> list[ev.Action]:
        return self.do(ev.Received(worker, message, self.homes[worker]))

    def auditor(self) -> int:
        """Who has been asked for an opinion."""
        (worker,) = [one for one, lease in self.leases.items() if lease.audits]
        return worker

    def updated(self) -> list[ev.Action]:
        return self.do(ev.Updated(round=1, grad_norm=1.0, node=0))

    def answer(self, worker: int, digest: bytes = b"right") -> list[ev.Action]:
        right = Outcome(0, 1.0, 1.0, bytes(16), bytes(8), np.ones(1, np.float32))
        outcome = replace(right, digest=digest.ljust(16))
        return self.hear(worker, Commit(self.leases.pop(worker), 0, 0, (outcome,)))


def liars(actions: Sequence[ev.Action]) -> list[int | None]:
    return [one.worker for one in actions if isinstance(one, ev.Note) and one.kind == "worker_lied"]


def test_a_liar_whose_host_is_lost_is_outvoted_all_the_same() -> None:
    lead = Lead({0: 0, 1: 0, 2: 1})
    (holder,) = lead.leases
    assert holder == 0
    lead.answer(0)
    assert lead.auditor() == 2, "of another node than who answered"
    lead.answer(2, b"wrong")
    members = replace(lead.membership, generation=2, members=(0, 1), nodes=(0,), former=(1,))
    lead.do(ev.NodeGone(1))
    lead.do(ev.Received(None, Admit(members)))
    assert lead.auditor() == 1
    actions = lead.answer(1)
    assert liars(actions) == [2]
    assert any(isinstance(one, ev.Update) for one in actions), "nothing else is missing"


def test_another_one_is_asked_where_an_auditor_stands_still() -> None:
    lead = Lead({0: 0, 1: 0, 2: 0})
    lead.answer(0)
    first = lead.auditor()
    lead.do(ev.Tick({first: 1}))
    del lead.leases[first]
    lead.now_s = 0.01
    lead.do(ev.Tick({first: 2}))
    assert not lead.leases, "it gets on"
    lead.now_s = 9.0
    lead.do(ev.Tick({first: 3}))
    assert not lead.leases, "slowly, but it gets on"
    lead.now_s = 18.0
    lead.do(ev.Tick({first: 3}))
    assert lead.auditor() == 3 - first
    assert any(isinstance(one, ev.Update) for one in lead.answer(3 - first))


@pytest.mark.parametrize("absent", [[], [1, 2]], ids=["alone", "others are absent"])
def test_an_audit_that_nobody_can_take_is_dropped_and_counted(absent: list[int]) -> None:
    lead = Lead(dict.fromkeys([0, *absent], 0), probability=0.999, connected=[0])
    assert any(isinstance(one, ev.Update) for one in lead.answer(0)), "at once, not with a tick"
    (committed,) = [one for one in lead.updated() if isinstance(one, ev.Committed)]
    assert committed.num_unaudited == 1


def test_where_all_is_audited_a_step_waits_for_who_is_absent() -> None:
    lead = Lead({0: 0, 1: 0}, connected=[0])
    assert not any(isinstance(one, ev.Update) for one in lead.answer(0))
    lead.hear(1, Hello(1, 1))
    assert any(isinstance(one, ev.Update) for one in lead.answer(lead.auditor()))
    (committed,) = [one for one in lead.updated() if isinstance(one, ev.Committed)]
    assert committed.num_unaudited == 0


def test_a_step_does_not_wait_for_an_auditor_that_stands_still_without_another_one() -> None:
    lead = Lead({0: 0, 1: 0}, probability=0.999)
    lead.answer(0)
    assert lead.auditor() == 1
    lead.do(ev.Tick({0: 1, 1: 1}))
    lead.now_s = 9.0
    assert any(isinstance(one, ev.Update) for one in lead.do(ev.Tick({0: 2, 1: 1})))


def test_a_task_that_never_says_the_same_twice_ends_with_an_error() -> None:
    lead = Lead(dict.fromkeys(range(7), 0))
    for number in range(100):
        lead.do(ev.Tick({}))
        if lead.failure:
            break
        for worker in sorted(lead.leases):
            for one in lead.answer(worker, str(number).encode()):
                if isinstance(one, ev.HangUp):
                    lead.hear(one.worker, Hello(one.worker, one.worker, has_slot=True))
    assert "5 answers to micro-batch 0 of step 3 differ, 4 times" in lead.failure
    assert "not deterministic" in lead.failure
    assert number > 4 * 5 - 2, "five are asked, four times"
