"""A slow link around which traffic is planned carries next to nothing, and stays known as slow."""

from __future__ import annotations

import numpy as np

from policies.fault_detection import Peers
from policies.signals import Computed, Fleet, StepView, Transfers
from policies.verdicts import Link

NODES = np.arange(3)
PAIRS = [(a, b) for a in range(3) for b in range(3) if a != b]
SLOW = [Link(1, 2), Link(2, 1)]
TOO_LITTLE = 20_000
"""Bytes that say nothing of a link's pace."""


def looked_at(step: int, num_bytes: int, slowness: float) -> StepView:
    """Among three nodes: what links 1 - 2 carry, and how many times as long a byte takes there."""
    is_odd = np.array([0 not in pair for pair in PAIRS])
    bytes_L = np.where(is_odd, num_bytes, 2 << 20)
    noise_L = 1 + 0.02 * np.random.default_rng(step).standard_normal(len(PAIRS))
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
            took_s_L=bytes_L * 1e-9 * np.where(is_odd, slowness, 1.0) * noise_L,
            send_wait_s_L=waits_L,
            receive_wait_s_L=waits_L,
        ),
        hosts=None,
    )


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
