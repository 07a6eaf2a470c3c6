"""Which workers compute slowly: more so than peers of their role, in most of the last steps.

Only the time is looked at in which a worker computes, per unit of work. So nobody is blamed who
waits for others, who has more to do, or whose stage is a long one. Pure.

Letters: W workers, B micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from policies.outliers import Finding, Outliers, healthy_of
from policies.signals import Bools, Computed, Fleet, Floats, Ints, StepView
from policies.verdicts import Kind, Verdict, Worker
from policies.windows import History, lookup, places_by


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paces:
    """What is remembered: `usual_W` is each worker's own pace in seconds per load, over `past_W`
    healthy steps; `age_W` counts the steps in which it has computed, `num_W` is its micro-batches
    in a step, smoothed."""

    history: History
    usual_W: Floats
    past_W: Ints
    age_W: Ints
    num_W: Floats

    def of(self, worker_W: Ints) -> Paces:
        """Of exactly these workers; newcomers begin. Those that were there share their processors
        with others from now on, so that their own past begins anew, but where there is a verdict on
        one."""
        if np.array_equal(worker_W, self.history.id_E):
            return self
        zeros_W, is_old_W = np.zeros(len(worker_W)), np.isin(worker_W, self.history.id_E)
        place = np.searchsorted(self.history.id_E, worker_W[is_old_W])

        def moved(old: Floats | Ints) -> Floats:
            values_W = zeros_W.copy()
            values_W[is_old_W] = old[place]
            return values_W

        history = self.history.of(worker_W)
        return Paces(
            history=history,
            usual_W=moved(self.usual_W),
            past_W=np.where(history.is_open_E, moved(self.past_W), 0).astype(np.int64),
            age_W=moved(self.age_W).astype(np.int64),
            num_W=moved(self.num_W),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowComputation:
    """Compared with peers of the role; where there are fewer than `min_peers` of them, with its own
    past, less what became slower for everybody. Two workers that share processors with others run
    unevenly for seconds: there only the longest window of steps counts.
    """

    outliers: Outliers = field(default_factory=Outliers)
    min_peers: int = 3
    warm_up: int = 3
    """A newcomer's first steps, in which it compiles and loads."""
    least_past: int = 10
    """With fewer steps its own past says nothing."""
    memory: float = 0.02
    """Of one step in a worker's usual pace and number of micro-batches."""

    def begin(self) -> Paces:
        """Nothing is remembered yet."""
        return Paces(
            history=History.empty(self.outliers.steps),
            usual_W=np.empty(0),
            past_W=np.empty(0, np.int64),
            age_W=np.empty(0, np.int64),
            num_W=np.empty(0),
        )

    def decide(
        self, view: StepView, before: Paces, excused_W: Bools
    ) -> tuple[list[Verdict], Paces]:
        """Who is slow now. Nothing is learned of `excused_W`: something else is wrong there."""
        fleet = view.fleet
        paces = before.of(fleet.worker_W)
        roles = places_by(fleet.role_W)
        if not view.is_exempt:
            paces = self._learn(view, paces, roles, excused_W)
        scatter_W = _scatter(paces.num_W, roles)
        are_few = len(fleet.worker_W) < self.min_peers
        judged = self.outliers.judge(paces.history, roles, scatter_E=scatter_W, patient=are_few)
        found = self.outliers.findings(paces.history, judged)
        paces = replace(paces, history=paces.history.marked(judged.is_off_E))
        return [_verdict(one, fleet) for one in found], paces

    def _learn(
        self, view: StepView, paces: Paces, roles: Sequence[Ints], excused_W: Bools
    ) -> Paces:
        pace_W, num_W = pace_of(view.computed, view.fleet.worker_W)
        excess_W = self._excess(pace_W, paces, roles)
        has_worked_W = ~np.isnan(pace_W)
        is_new_W = paces.age_W < self.warm_up
        unknown_W = is_new_W | excused_W
        history = paces.history.added(
            np.where(unknown_W, np.nan, excess_W), view.step, vote=self.outliers.vote
        )
        is_past_W = paces.past_W >= self.least_past
        learns_W = has_worked_W & ~unknown_W & (~is_past_W | (excess_W < self.outliers.vote))
        weight_W = np.fmax(1 / (paces.past_W + 1), self.memory)
        before_W = np.where(paces.past_W > 0, paces.usual_W, 0.0)
        return Paces(
            history=history,
            usual_W=np.where(learns_W, before_W + weight_W * (pace_W - before_W), paces.usual_W),
            past_W=paces.past_W + learns_W,
            age_W=paces.age_W + has_worked_W,
            num_W=np.where(
                paces.age_W > 0, paces.num_W + self.memory * (num_W - paces.num_W), num_W
            ),
        )

    def _excess(self, pace_W: Floats, paces: Paces, roles: Sequence[Ints]) -> Floats:
        """How much longer than usual each worker takes: 0.5 for half as long again."""
        has_worked_W = ~np.isnan(pace_W)
        is_past_W = paces.past_W >= self.least_past
        own_W = np.full(len(pace_W), np.nan)
        np.divide(pace_W, paces.usual_W, out=own_W, where=is_past_W)
        num_known = np.count_nonzero(~np.isnan(own_W))
        # who did not become faster, as others did, is not slow by that
        common = max(1.0, float(np.nanmedian(own_W))) if num_known else 1.0
        excess_W = own_W / common - 1
        if 2 * num_known <= np.count_nonzero(has_worked_W):
            excess_W[:] = np.nan  # what became slower for everybody is not known
        for places in roles:
            usual = pace_W[healthy_of(places, paces.history.is_open_E)]
            usual = usual[~np.isnan(usual)]
            if len(usual) and np.count_nonzero(has_worked_W[places]) >= self.min_peers:
                excess_W[places] = pace_W[places] / np.median(usual) - 1
        return excess_W


def _verdict(found: Finding, fleet: Fleet) -> Verdict:
    worker, role = int(fleet.worker_W[found.place]), int(fleet.role_W[found.place])
    num_peers = int(np.count_nonzero(fleet.role_W == role)) - 1
    return Verdict(
        kind=Kind.SLOW_COMPUTATION,
        culprit=Worker(worker),
        since_step=found.since_step,
        confidence=found.confidence,
        reason=(
            f"worker {worker} computes {found.excess:.0%} longer than its {num_peers} peers of"
            f" role {role} {found}"
        ),
        evidence={**found.evidence, "peers": num_peers},
    )


def _scatter(num_W: Floats, roles: Sequence[Ints]) -> Floats:
    """The pace of a worker with few micro-batches varies more than that of its peers."""
    scatter_W = np.ones(len(num_W))
    for places in roles:
        usual = max(float(np.median(num_W[places])), 1.0)
        scatter_W[places] = np.sqrt(np.fmax(usual / np.fmax(num_W[places], 1.0), 1.0))
    return scatter_W


def pace_of(computed: Computed, worker_W: Ints) -> tuple[Floats, Ints]:
    """Seconds per load of each worker, NaN if it computed nothing; and how many micro-batches.

    A micro-batch that was given up counts only if it took longer than usual already: nobody knows
    how long it would have taken.
    """
    took_s_B = computed.end_s_B - computed.start_s_B
    place_B, counts_B = lookup(worker_W, computed.worker_B)
    counts_B &= computed.load_B > 0
    if not computed.done_B.all():
        done_B = counts_B & computed.done_B
        pace_B = took_s_B[done_B] / computed.load_B[done_B]
        usual = np.median(pace_B) if len(pace_B) else 0.0
        counts_B &= computed.done_B | (took_s_B > usual * computed.load_B)
    num = len(worker_W)
    load_W = np.bincount(place_B, np.where(counts_B, computed.load_B, 0.0), minlength=num)
    total_s_W = np.bincount(place_B, np.where(counts_B, took_s_B, 0.0), minlength=num)
    with np.errstate(invalid="ignore", divide="ignore"):
        pace_W: Floats = np.where(load_W > 0, total_s_W / load_W, np.nan)
    return pace_W, np.bincount(place_B[counts_B], minlength=num)
