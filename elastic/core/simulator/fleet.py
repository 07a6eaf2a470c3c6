"""A made-up fleet, step by step: what ten thousand workers would report, with faults of our choice.

For the fault detector, whose views it makes; no protocol runs here. Healthy steps are made as hard
as real ones: stages of different lengths, micro-batches of different sizes, workers with more of
them than others, noise, pauses, congestion, newcomers that compile, evaluations. All is seeded.

Letters as in `policies.signals`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from policies.signals import Computed, Fleet, Floats, Hosts, Ints, StepView, Transfers
from policies.verdicts import Culprit, Kind, Link, Node, Worker

SLOW_KINDS = (
    Kind.SLOW_COMPUTATION,
    Kind.SLOW_SENDER,
    Kind.SLOW_RECEIVER,
    Kind.SLOW_LINK,
    Kind.RESOURCE_PRESSURE,
)
MEAN_COMPUTE_S, MEAN_COMMUNICATION_S = 600.0, 1440.0
"""How long a fail-slow lasts on average; from under a minute to ten hours (Greyhound)."""
SHORTEST_S, LONGEST_S = 30.0, 36_000.0
_SPREAD = 1.2  # sigma of the logarithm of a duration

_STAGES = (1.0, 1.7, 0.8, 2.3)  # how long a micro-batch takes in each role
_SPEED_BYTES_PER_S = (5e9, 2e9)  # within a leaf, and across
_NODES_PER_LEAF = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """A fault in steps `begin` to `end` - 1. `excess`: 0.5 for half as long again."""

    kind: Kind
    culprit: Culprit
    begin: int
    end: int
    excess: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """What kind of fleet. Noise is a sigma of the logarithm, pauses a chance per micro-batch."""

    num_workers: int
    seed: int
    step_s: float = 2.0
    num_roles: int = 4
    workers_per_node: int = 8
    links_per_node: int = 16
    micro_batches: int = 4
    noise: float = 0.06
    load_spread: float = 0.3
    load_error: float = 0.03
    hardware_spread: float = 0.02
    pause: float = 0.005
    link_noise: float = 0.12
    congestion: float = 0.01
    join: float = 2e-6
    """The chance that a worker is replaced in a step."""
    evaluate_every: int = 100
    faults: Sequence[Injected] = field(default=())

    @property
    def num_nodes(self) -> int:
        return -(-self.num_workers // self.workers_per_node)


def random_faults(
    plan: FleetPlan, *, num_steps: int, every_s: float, least_excess: float = 0.2
) -> tuple[Injected, ...]:
    """Faults that begin every so many seconds on average, of all kinds, also at the same time.

    No two of one kind strike the same culprit. Excesses are log-uniform, up to 3.
    """
    dice = np.random.default_rng((plan.seed, 1))
    faults: list[Injected] = []
    seen: set[tuple[Kind, Culprit]] = set()
    at_s = 20 * plan.step_s
    while (begin := int((at_s := at_s + dice.exponential(every_s)) / plan.step_s)) < num_steps - 20:
        kind = SLOW_KINDS[dice.integers(len(SLOW_KINDS))]
        culprit = _random_culprit(kind, plan, dice)
        if (kind, culprit) in seen:
            continue
        seen.add((kind, culprit))
        of_worker = kind in (Kind.SLOW_COMPUTATION, Kind.RESOURCE_PRESSURE)
        mean_s = MEAN_COMPUTE_S if of_worker else MEAN_COMMUNICATION_S
        lasts_s = np.exp(dice.normal(np.log(mean_s) - _SPREAD**2 / 2, _SPREAD))
        lasts_s = float(np.clip(lasts_s, SHORTEST_S, LONGEST_S))
        excess = float(np.exp(dice.uniform(np.log(least_excess), np.log(3.0))))
        if kind is Kind.RESOURCE_PRESSURE:
            excess = max(excess, 1 / 3)  # a quarter of the time is taken away
        end = begin + round(lasts_s / plan.step_s)
        faults.append(Injected(kind=kind, culprit=culprit, begin=begin, end=end, excess=excess))
    return tuple(faults)


def _random_culprit(kind: Kind, plan: FleetPlan, dice: np.random.Generator) -> Culprit:
    if kind is Kind.SLOW_COMPUTATION:
        return Worker(int(dice.integers(plan.num_workers)))
    node = int(dice.integers(plan.num_nodes))
    if kind is Kind.SLOW_LINK:
        return Link(node, (node + 1 + int(dice.integers(_degree(plan)))) % plan.num_nodes)
    return Node(node)


def _degree(plan: FleetPlan) -> int:
    return min(plan.links_per_node, plan.num_nodes - 1)


class MadeUpFleet:
    """Makes the steps of a plan, one after the other."""

    def __init__(self, plan: FleetPlan) -> None:
        self._plan = plan
        self._dice = np.random.default_rng((plan.seed, 2))
        num, dice = plan.num_workers, self._dice
        self._worker_W = np.arange(num)
        self._place_W = np.arange(num)  # of the worker's first predecessor: node, role, faults
        self._age_W = np.full(num, 100)
        self._next_worker = num
        self._role_W = np.arange(num) // plan.workers_per_node % plan.num_roles
        self._node_W = np.arange(num) // plan.workers_per_node
        self._pace_s_W = np.array(_STAGES)[
            np.arange(num) // plan.workers_per_node % plan.num_roles % 4
        ]
        self._pace_s_W = self._pace_s_W * plan.step_s / plan.micro_batches / 2
        self._pace_s_W *= np.exp(dice.normal(0, plan.hardware_spread, num))
        self._num_W = dice.integers(plan.micro_batches // 2, 2 * plan.micro_batches, num)
        self._heavy_W = np.where(dice.random(num) < 0.1, 1.6, 1.0)  # always larger micro-batches
        nodes, degree = np.arange(plan.num_nodes), _degree(plan)
        self._sender_L = np.repeat(nodes, degree)
        self._receiver_L = (
            self._sender_L + np.tile(np.arange(1, degree + 1), plan.num_nodes)
        ) % max(plan.num_nodes, 1)
        leaf_L = self._sender_L // _NODES_PER_LEAF, self._receiver_L // _NODES_PER_LEAF
        self._kind_L = (leaf_L[0] != leaf_L[1]).astype(np.int64)

    def steps(self, num: int) -> Iterator[StepView]:
        """The first `num` steps."""
        for step in range(num):
            self._join()
            active = [one for one in self._plan.faults if one.begin <= step < one.end]
            is_exempt = step % self._plan.evaluate_every == self._plan.evaluate_every - 1
            factor_W, steal_N = self._slowed(active)
            yield StepView(
                step=step,
                fleet=Fleet(worker_W=self._worker_W, role_W=self._role_W, node_W=self._node_W),
                computed=self._computed(factor_W * (3.0 if is_exempt else 1.0)),
                transfers=self._transfers(active),
                hosts=self._hosts(steal_N),
                is_exempt=is_exempt,
            )
            self._age_W = self._age_W + 1

    def _join(self) -> None:
        """Some are replaced; their successors compile first. Numbers stay ascending."""
        gone_W = self._dice.random(len(self._worker_W)) < self._plan.join
        if not gone_W.any():
            return
        order = np.argsort(gone_W, kind="stable")
        num_new = int(gone_W.sum())
        self._worker_W = self._worker_W[order]
        self._worker_W[-num_new:] = self._next_worker + np.arange(num_new)
        self._next_worker += num_new
        for name in ("_place_W", "_role_W", "_node_W", "_pace_s_W", "_num_W", "_heavy_W", "_age_W"):
            setattr(self, name, getattr(self, name)[order])
        self._age_W[-num_new:] = 0

    def _slowed(self, active: Sequence[Injected]) -> tuple[Floats, Floats]:
        """By how much each worker is slowed down, and the stolen share of each node."""
        factor_W, steal_N = np.ones(len(self._worker_W)), np.zeros(self._plan.num_nodes)
        for one in active:
            if isinstance(one.culprit, Worker):
                factor_W[self._worker_W == one.culprit.number] *= 1 + one.excess
            elif one.kind is Kind.RESOURCE_PRESSURE and isinstance(one.culprit, Node):
                factor_W[self._node_W == one.culprit.number] *= 1 + one.excess
                steal_N[one.culprit.number] = one.excess / (1 + one.excess)
        return factor_W, steal_N

    def _computed(self, factor_W: Floats) -> Computed:
        plan, dice = self._plan, self._dice
        place_B = np.repeat(np.arange(len(self._worker_W)), self._num_W)
        num = len(place_B)
        true_B = np.exp(dice.normal(0, plan.load_spread, num)) * self._heavy_W[place_B]
        took_s_B = true_B * (self._pace_s_W * factor_W)[place_B]
        took_s_B *= np.exp(dice.normal(0, plan.noise, num))
        took_s_B *= np.where(self._age_W[place_B] < 2, 5.0, 1.0)
        pauses_B = dice.random(num) < plan.pause
        took_s_B[pauses_B] *= dice.uniform(1, 10, int(pauses_B.sum()))
        end_s_B = np.cumsum(took_s_B)
        before_W = np.concatenate([[0.0], end_s_B])[
            np.concatenate([[0], np.cumsum(self._num_W)[:-1]])
        ]
        end_s_B = end_s_B - before_W[place_B]
        return Computed(
            worker_B=self._worker_W[place_B],
            start_s_B=end_s_B - took_s_B,
            end_s_B=end_s_B,
            load_B=true_B * np.exp(dice.normal(0, plan.load_error, num)),
            done_B=np.ones(num, np.bool_),
        )

    def _transfers(self, active: Sequence[Injected]) -> Transfers:
        plan, dice, num = self._plan, self._dice, len(self._sender_L)
        size_L = (64e6 * np.exp(dice.normal(0, 0.1, num))).astype(np.int64)
        took_s_L = size_L / np.array(_SPEED_BYTES_PER_S)[self._kind_L]
        took_s_L *= np.exp(dice.normal(0, plan.link_noise, num))
        is_congested_L = dice.random(num) < plan.congestion
        took_s_L[is_congested_L] *= dice.uniform(1, 5, int(is_congested_L.sum()))
        for one in active:
            took_s_L[self._hit(one)] *= 1 + one.excess
        # Whoever waits for data that is not there yet is a victim: its wait is in no transfer.
        victims_s_L = dice.exponential(plan.step_s / 10, num)
        return Transfers(
            sender_L=self._sender_L,
            receiver_L=self._receiver_L,
            kind_L=self._kind_L,
            bytes_L=size_L,
            took_s_L=took_s_L,
            send_wait_s_L=0.1 * took_s_L,
            receive_wait_s_L=0.1 * took_s_L + victims_s_L,
        )

    def _hit(self, fault: Injected) -> Ints:
        """The links that a fault slows down."""
        match fault.culprit:
            case Link(sender, receiver):
                is_hit_L = (self._sender_L == sender) & (self._receiver_L == receiver)
            case Node(number) if fault.kind is Kind.SLOW_SENDER:
                is_hit_L = self._sender_L == number
            case Node(number) if fault.kind is Kind.SLOW_RECEIVER:
                is_hit_L = self._receiver_L == number
            case _:
                return np.empty(0, np.int64)
        return np.flatnonzero(is_hit_L)

    def _hosts(self, steal_N: Floats) -> Hosts:
        num, dice = self._plan.num_nodes, self._dice
        return Hosts(
            node_N=np.arange(num),
            steal_N=np.clip(steal_N + np.abs(dice.normal(0, 0.02, num)), 0, 1),
            memory_N=np.abs(dice.normal(0, 0.02, num)),
            disk_N=np.abs(dice.normal(0, 0.05, num)),
            throttled_N=np.zeros(num),
            out_of_memory_kills_N=np.zeros(num, np.int64),
            card_faults_N=np.zeros(num, np.int64),
        )
