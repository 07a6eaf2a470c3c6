"""Four hosts whose links became slow: who was named, with times as the kernel counted them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from policies.signals import Computed, Fleet, StepView, Transfers
from policies.slow_communication import SlowCommunication
from policies.verdicts import Kind, Link, Node, Verdict

Matrix = list[list[int]]

# Milliseconds of a step, by sender and receiver, on four hosts with two cores together; medians.
USUAL = [[0, 60, 64, 60], [28, 0, 8, 4], [32, 6, 0, 4], [32, 4, 4, 0]]
INTO_2 = [[0, 60, 724, 56], [20, 0, 676, 4], [420, 340, 0, 236], [36, 4, 576, 0]]
INTO_3 = [[0, 48, 48, 446], [16, 0, 4, 272], [20, 4, 0, 414], [200, 116, 130, 0]]
OUT_OF_3 = [[0, 56, 60, 204], [24, 0, 8, 152], [28, 8, 0, 148], [536, 488, 504, 0]]
BETWEEN_1_AND_2 = [[0, 68, 72, 64], [36, 0, 312, 8], [32, 308, 0, 4], [20, 4, 8, 0]]
NUM_BYTES = 2 << 20
NODES = np.arange(4)
TICK_S = 0.004


def step_view(
    step: int, times: Matrix, dice: np.random.Generator, *, num_bytes: int = NUM_BYTES
) -> StepView:
    """With noise, and times that are counted in ticks. The last host has no worker."""
    sender_L, receiver_L = np.nonzero(~np.eye(4, dtype=np.bool_))
    took_s_L: npt.NDArray[np.float64] = np.array(times)[sender_L, receiver_L] / 1000
    took_s_L = took_s_L * np.exp(dice.normal(0, 0.4, len(took_s_L)))
    none_L = np.zeros(len(took_s_L))
    return StepView(
        step=step,
        fleet=Fleet(worker_W=NODES, role_W=np.zeros(4, np.int64), node_W=np.array([0, 1, 2, 2])),
        computed=Computed(
            worker_B=NODES,
            start_s_B=np.full(4, float(step)),
            end_s_B=np.full(4, step + 0.1),
            load_B=np.ones(4),
            done_B=np.ones(4, np.bool_),
        ),
        transfers=Transfers(
            sender_L=sender_L,
            receiver_L=receiver_L,
            kind_L=np.zeros(len(took_s_L), np.int64),
            bytes_L=np.full(len(took_s_L), num_bytes),
            took_s_L=TICK_S * np.floor(took_s_L / TICK_S + dice.random(len(took_s_L))),
            send_wait_s_L=none_L,
            receive_wait_s_L=none_L,
        ),
        hosts=None,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("times", "culprits"),
    [
        pytest.param(INTO_2, {(Kind.SLOW_RECEIVER, Node(2))}, id="into 2"),
        pytest.param(INTO_3, {(Kind.SLOW_RECEIVER, Node(3))}, id="into 3"),
        pytest.param(OUT_OF_3, {(Kind.SLOW_SENDER, Node(3))}, id="out of 3"),
        pytest.param(
            BETWEEN_1_AND_2,
            {(Kind.SLOW_LINK, Link(1, 2)), (Kind.SLOW_LINK, Link(2, 1))},
            id="between 1 and 2",
        ),
        pytest.param(USUAL, set(), id="nothing"),
    ],
)
def test_who_is_slow_is_named_within_ten_steps_and_nobody_else_when_it_is_over(
    times: Matrix, culprits: set[tuple[Kind, Node | Link]], seed: int
) -> None:
    """What is sent to a slow receiver is slow, and so is what it sends: its acknowledgements of
    both go the same way. Now and then only pings went, between two looks."""
    policy, dice = SlowCommunication(), np.random.default_rng(seed)
    rates = policy.begin()
    told: dict[tuple[Kind, object], int] = {}
    found: list[Verdict] = []
    for step in range(160):
        is_slow, num_bytes = 60 <= step < 95, 64 if step % 8 == 7 else NUM_BYTES
        view = step_view(step, times if is_slow else USUAL, dice, num_bytes=num_bytes)
        found, rates = policy.decide(view, rates)
        for one in found:
            told.setdefault((one.kind, one.culprit), step)
    assert set(told) == culprits
    assert all(step < 70 for step in told.values())
    assert found == []
