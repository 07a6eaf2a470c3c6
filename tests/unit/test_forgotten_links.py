"""A slow link around which traffic is planned carries next to nothing, and stays known as slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from policies.fault_detection import Peers
from policies.signals import Computed, Fleet, StepView, Transfers
from policies.verdicts import Link

NODES = np.arange(3)
PAIRS = [(a, b) for a in range(3) for b in range(3) if a != b]
SLOW = [Link(1, 2), Link(2, 1)]
TOO_LITTLE = 20_000
"""Bytes that say nothing of a link's pace."""


def looked_at(
    step: int, num_bytes: int, slowness: float, *, others: float = 1.0, plan: int = 0
) -> StepView:
    """Among three nodes: what links 1 - 2 carry, and how many times as long a byte takes there, and
    from node 0 to the others."""
    is_odd = np.array([0 not in pair for pair in PAIRS])
    bytes_L = np.where(is_odd, num_bytes, 2 << 20)
    noise_L = 1 + 0.02 * np.random.default_rng(step).standard_normal(len(PAIRS))
    slowness_L = np.where(is_odd, slowness, [others if one == 0 else 1.0 for one, _ in PAIRS])
    waits_L = np.zeros(len(PAIRS))
    return StepView(
        step=step,
        fleet=Fleet(worker_W=NODES, role_W=np.zeros(3, np.int64), node_W=NODES),
        computed=Computed(
            worker_B=NODES,
            start_s_B=np.full(3, float(step)),
            end_s_B=np.full(3, step + 0.1),
            load_B=np.ones(3),
            done_B=np.ones(3, np.bool_),
        ),
        transfers=Transfers(
            sender_L=np.array([one for one, _ in PAIRS]),
            receiver_L=np.array([other for _, other in PAIRS]),
            kind_L=np.zeros(len(PAIRS), np.int64),
            bytes_L=bytes_L,
            took_s_L=bytes_L * 2e-8 * slowness_L * noise_L,
            send_wait_s_L=waits_L,
            receive_wait_s_L=waits_L,
        ),
        hosts=None,
        plan=plan,
    )


@pytest.mark.parametrize("is_planned", [True, False])
def test_nobody_is_blamed_for_what_a_plan_gives_it_to_do(is_planned: bool) -> None:
    """Around the link 1 - 2: node 0 owns all chunks, and sends each byte in four times the time."""
    policy = Peers()
    memory = policy.begin()

    def after(steps: range, num_bytes: int, others: float, slowness: float, plan: int) -> set[Any]:
        nonlocal memory
        found: set[Any] = set()
        for step in steps:
            view = looked_at(step, num_bytes, slowness, others=others, plan=plan * is_planned)
            memory = policy.decide_step(view, memory).memory
            found |= {one.culprit for one in memory.verdicts}
        return found

    slow = set(SLOW)
    assert after(range(40), 2 << 20, 1.0, 1.0, plan=0) == set()
    assert after(range(40, 60), 2 << 20, 1.0, 8.0, plan=0) == slow
    planned = after(range(60, 160), TOO_LITTLE, 4.0, 8.0, plan=1)
    assert (planned == slow) is is_planned
    undone = after(range(160, 200), 2 << 20, 1.0, 8.0, plan=2)
    assert (undone == slow) is is_planned


def test_a_slow_link_that_carries_too_little_to_be_judged_is_slow_until_it_carries_more() -> None:
    policy = Peers()
    memory = policy.begin()

    def after(steps: range, num_bytes: int, slowness: float) -> list[Link]:
        nonlocal memory
        for step in steps:
            memory = policy.decide_step(looked_at(step, num_bytes, slowness), memory).memory
        return [one.culprit for one in memory.verdicts if isinstance(one.culprit, Link)]

    assert after(range(40), 2 << 20, 1.0) == []
    assert after(range(40, 60), 2 << 20, 8.0) == SLOW
    assert after(range(60, 160), TOO_LITTLE, 8.0) == SLOW, "nobody saw that it is well"
    assert after(range(160, 200), 2 << 20, 8.0) == SLOW, "it is not learned as usual"
    assert after(range(200, 240), 2 << 20, 1.0) == [], "now it was seen"
