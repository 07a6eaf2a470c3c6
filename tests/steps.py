"""Steps made up for the fault detector: who took how long, and what else was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from policies.signals import Computed, Fleet, Hosts, StepView, Transfers

NUM_MICRO_BATCHES = 4


def fleet(roles: Sequence[int], nodes: Sequence[int] | None = None) -> Fleet:
    return Fleet(
        worker_W=np.arange(len(roles)),
        role_W=np.array(roles),
        node_W=np.array(nodes if nodes is not None else [0] * len(roles)),
    )


def step_view(
    step: int,
    who: Fleet,
    pace_s: Mapping[int, float],
    *,
    dice: np.random.Generator,
    noise: float = 0.04,
    load: Mapping[int, float] | None = None,
    is_exempt: bool = False,
    transfers: Transfers | None = None,
    hosts: Hosts | None = None,
) -> StepView:
    """Every worker computes four micro-batches, at its pace (1 s if not said) per unit of load."""
    worker_B = np.repeat(who.worker_W, NUM_MICRO_BATCHES)
    load_B = np.array([(load or {}).get(int(one), 1.0) for one in worker_B])
    took_s_B = load_B * [pace_s.get(int(one), 1.0) for one in worker_B]
    took_s_B = took_s_B * np.exp(dice.normal(0, noise, len(worker_B)))
    return StepView(
        step=step,
        fleet=who,
        computed=Computed(
            worker_B=worker_B,
            start_s_B=np.zeros(len(worker_B)),
            end_s_B=took_s_B,
            load_B=load_B,
            done_B=np.ones(len(worker_B), np.bool_),
        ),
        transfers=transfers,
        hosts=hosts,
        is_exempt=is_exempt,
    )


def transfers(
    num_nodes: int,
    slow: Mapping[tuple[int | None, int | None], float],
    *,
    dice: np.random.Generator,
    noise: float = 0.05,
    waits: tuple[float, float] = (0.1, 0.1),
) -> Transfers:
    """Everybody to everybody; `slow` says how many times as long, by (sender, receiver), None: any.

    `waits`: the shares of the time in which sender and receiver wait.
    """
    pairs = [(s, r) for s in range(num_nodes) for r in range(num_nodes) if s != r]
    took_s_L = 0.02 * np.exp(dice.normal(0, noise, len(pairs)))
    for place, (sender, receiver) in enumerate(pairs):
        for (from_one, to_one), factor in slow.items():
            if from_one in (None, sender) and to_one in (None, receiver):
                took_s_L[place] *= factor
    return Transfers(
        sender_L=np.array([one for one, _ in pairs]),
        receiver_L=np.array([one for _, one in pairs]),
        kind_L=np.zeros(len(pairs), np.int64),
        bytes_L=np.full(len(pairs), 10_000_000),
        took_s_L=took_s_L,
        send_wait_s_L=waits[0] * took_s_L,
        receive_wait_s_L=waits[1] * took_s_L,
    )


def hosts(
    num_nodes: int,
    *,
    steal: Mapping[int, float] | None = None,
    throttled: Mapping[int, float] | None = None,
    kills: Sequence[int] = (),
    faults: Sequence[int] = (),
) -> Hosts:
    """All at ease, but for what is said."""
    quiet_N = np.full(num_nodes, 0.01)
    return Hosts(
        node_N=np.arange(num_nodes),
        steal_N=np.array([(steal or {}).get(node, 0.01) for node in range(num_nodes)]),
        memory_N=quiet_N,
        disk_N=quiet_N,
        throttled_N=np.array([(throttled or {}).get(node, 0.0) for node in range(num_nodes)]),
        out_of_memory_kills_N=np.array([int(node in kills) for node in range(num_nodes)]),
        card_faults_N=np.array([int(node in faults) for node in range(num_nodes)]),
    )
