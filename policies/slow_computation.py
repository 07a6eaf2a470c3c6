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
    """What is remembered: `usual_W` is each worker's own pace in seconds per load, over the healthy
    past; `age_W` counts the steps in which it has computed, `num_W` is its micro-batches in a step,
    smoothed."""

    history: History
    usual_W: Floats
    age_W: Ints
    num_W: Floats

    def of(self, worker_W: Ints) -> Paces:
        """Of exactly these workers; newcomers begin."""
        if np.array_equal(worker_W, self.history.id_E):
            return self
        usual_W, age_W = np.full(len(worker_W), np.nan), np.zeros(len(worker_W), np.int64)
        num_W = np.zeros(len(worker_W))
        is_old_W = np.isin(worker_W, self.history.id_E)
        place = np.searchsorted(self.history.id_E, worker_W[is_old_W])
        usual_W[is_old_W], age_W[is_old_W] = self.usual_W[place], self.age_W[place]
        num_W[is_old_W] = self.num_W[place]
        history = self.history.of(worker_W)
        return Paces(history=history, usual_W=usual_W, age_W=age_W, num_W=num_W)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowComputation:
    """Compared with peers of the role; where there are fewer than `min_peers` of them, with its own
    past, less what became slower for everybody."""

    outliers: Outliers = field(default_factory=Outliers)
    min_peers: int = 3
    warm_up: int = 3
    """A newcomer's first steps, in which it compiles and loads."""
    memory: float = 0.02
    """Of one step in a worker's usual pace and number of micro-batches."""

    def begin(self) -> Paces:
        """Nothing is remembered yet."""
        return Paces(
            history=History.empty(self.outliers.steps),
            usual_W=np.empty(0),
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
        judged = self.outliers.judge(paces.history, roles, scatter_E=scatter_W)
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
        is_usual_W = has_worked_W & ~unknown_W & (excess_W < self.outliers.vote)
        begins_W = has_worked_W & ~unknown_W & np.isnan(paces.usual_W)
        drift_W = paces.usual_W + self.memory * (pace_W - paces.usual_W)
        usual_W = np.where(is_usual_W, drift_W, paces.usual_W)
        return Paces(
            history=history,
            usual_W=np.where(begins_W, pace_W, usual_W),
            age_W=paces.age_W + has_worked_W,
            num_W=np.where(
                paces.age_W > 0, paces.num_W + self.memory * (num_W - paces.num_W), num_W
            ),
        )

    def _excess(self, pace_W: Floats, paces: Paces, roles: Sequence[Ints]) -> Floats:
        """How much longer than usual each worker takes: 0.5 for half as long again."""
        has_worked_W = ~np.isnan(pace_W)
        with np.errstate(invalid="ignore", divide="ignore"):
            own_W = pace_W / paces.usual_W
        common = float(np.nanmedian(own_W)) if np.isfinite(own_W).any() else 1.0
        excess_W = own_W / common - 1
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
