"""Which senders, receivers and links are slow: where in the matrix of sender x receiver it is hot.

A row that is hot nearly everywhere is a slow sender, a column a slow receiver, a cell alone a slow
link. Compared is the time per byte in which there was something to send, so those are not blamed
who had to wait for their data. Where a node has one peer only, both ends look alike, and the waits
decide: if its receiver waits and it does not, the sender is slow; if the sender waits and its
receiver does not, the receiver, which does not read; if both wait, what lies between. Pure.

Letters: L links, N nodes, and E for either.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from policies.outliers import Finding, Judged, Outliers, healthy_of, sample
from policies.signals import Bools, Floats, Ints, StepView, Transfers
from policies.verdicts import Kind, Link, Node, Verdict
from policies.windows import CLIP, History, lookup, places_by

_SHIFT = 32  # a link's number: its sender above, its receiver below
_BELOW_TICK_S = 0.002  # what the kernel counts as nothing
_NUM_FORGOTTEN = 40
"""A link that has carried nothing in so many steps is forgotten, unless there is a verdict on it:
as traffic is planned around it, it may carry too little to be judged, and is not well for that."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rates:
    """What is remembered of links, and of nodes as senders and receivers: the mean of their links.

    `waits_L2` says how much of its time each end of a link waited, smoothed; `usual_L` how many
    seconds a byte took each in the healthy past, over `age_L` steps, while traffic followed the
    same `plan`; `expected_s_L` how long its last steps would have taken by that, smoothed.
    """

    links: History
    senders: History
    receivers: History
    seen_L: Ints
    kind_L: Ints
    waits_L2: Floats
    usual_L: Floats
    expected_s_L: Floats
    age_L: Ints
    plan: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowCommunication:
    """An end is blamed if at least `share` of its links are hot, and there are `min_links`."""

    outliers: Outliers = field(default_factory=Outliers)
    share: float = 0.6
    min_links: int = 2
    few_links: int = 12
    """So many or fewer are compared with their own past: of three nodes one has four of six."""
    few: Outliers = field(default_factory=lambda: Outliers(min_excess=1.2, steps=(10,)))
    """Their own past is another guide than many peers: hosts that are busy otherwise than then send
    and receive up to twice as slowly (measured, `benchmarks.detection_of_hosts`)."""
    few_clip: float = 100.0
    """So much counts of one step: what is slow may be very slow, where it was fast before."""
    few_alike: float = 0.4
    """Of few links those of a slow end are late alike: none by less than that share of another.
    Where one is slow alone, its ends wait for it, and their other links are somewhat slower."""
    few_s: float = 0.03
    """Few links are compared by what they took and so much more: the kernel counts in ticks of
    4 ms, and waits for whoever is to read."""
    few_quantile: float = 0.25
    """What became slower for so many of them became so for all."""
    warm_up: int = 10
    """A new link's first steps, where it is compared with its own past."""
    min_bytes: int = 1 << 16
    """Less says nothing: latency, not bandwidth."""
    wait: float = 0.25
    """Who waited for that share of the time of a transfer did wait."""
    memory: float = 0.2
    """Of one step in the smoothed waits."""

    def begin(self) -> Rates:
        """Nothing is remembered yet."""
        none, windows = np.empty(0, np.int64), self.outliers.steps
        return Rates(
            links=History.empty(windows),
            senders=History.empty(windows),
            receivers=History.empty(windows),
            seen_L=none,
            kind_L=none,
            waits_L2=np.empty((0, 2)),
            usual_L=np.empty(0),
            expected_s_L=np.empty(0),
            age_L=none,
        )

    def decide(self, view: StepView, before: Rates) -> tuple[list[Verdict], Rates]:
        """Which are slow now."""
        rates, ends = before, None
        if view.transfers is not None and not view.is_exempt:
            rates, ends = self._learn(view.transfers, before, view)
        if not len(rates.links.id_E):
            return [], rates
        ends, outliers = ends or _Ends(rates), self._outliers_of(rates)
        alike = self.few_alike if self._are_few(rates) else 0.0
        cells = outliers.judge(
            rates.links,
            places_by(rates.kind_L),
            is_sick_E=ends.is_sender_off_L | ends.is_receiver_off_L,
        )
        sender_L, receiver_L = ends.sender_L, ends.receiver_L
        is_hot_L = cells.is_off_E | self._are_hot(rates, cells)
        late_s_L = np.nan_to_num(cells.excess_E) * (rates.expected_s_L + self.few_s)
        senders, wide_senders_N = self._ends(
            rates.senders,
            ends.sender_place_L,
            is_hot_L & _are_alike(late_s_L, ends.sender_place_L, alike),
            ~ends.is_receiver_off_L,
            outliers,
        )
        receivers, wide_receivers_N = self._ends(
            rates.receivers,
            ends.receiver_place_L,
            is_hot_L & _are_alike(late_s_L, ends.receiver_place_L, alike),
            ~ends.is_sender_off_L,
            outliers,
        )
        if self._are_few(rates):
            senders, receivers = _unless_weaker(late_s_L, rates, ends, senders, receivers)
        explained_L = wide_senders_N[ends.sender_place_L] | wide_receivers_N[ends.receiver_place_L]
        ended_L = (rates.senders.is_open_E & ~senders.is_off_E)[ends.sender_place_L]
        ended_L |= (rates.receivers.is_open_E & ~receivers.is_off_E)[ends.receiver_place_L]
        if self._are_few(rates):
            explained_L, ended_L = ends.both_ways(explained_L), ends.both_ways(ended_L)
        is_alone_L = cells.is_off_E & ~explained_L & ~ended_L
        found = [
            _of_end(one, rates.senders, Kind.SLOW_SENDER)
            for one in outliers.findings(rates.senders, senders)
        ]
        found += [
            _of_end(one, rates.receivers, Kind.SLOW_RECEIVER)
            for one in outliers.findings(rates.receivers, receivers)
        ]
        alone = replace(cells, is_off_E=is_alone_L)
        for one in outliers.findings(rates.links, alone):
            found.append(self._of_link(one, rates, sender_L, receiver_L))
        rates = replace(
            rates,
            links=rates.links.marked(is_alone_L).without(ended_L & ~explained_L),
            senders=rates.senders.marked(senders.is_off_E),
            receivers=rates.receivers.marked(receivers.is_off_E),
        )
        return found, rates

    # ------------------------------------------------------------------ learning

    def _learn(self, transfers: Transfers, before: Rates, view: StepView) -> tuple[Rates, _Ends]:
        is_told_L = transfers.bytes_L >= self.min_bytes
        id_T = (transfers.sender_L << _SHIFT | transfers.receiver_L)[is_told_L]
        order = np.argsort(id_T, kind="stable")  # fast where it is in order
        id_T = id_T[order]
        took_s_T = transfers.took_s_L[is_told_L][order]
        took_s_T = np.where(took_s_T > 0, took_s_T, _BELOW_TICK_S)
        pace_T = took_s_T / transfers.bytes_L[is_told_L][order]
        kind_T = transfers.kind_L[is_told_L][order]
        waits_T2 = np.stack([transfers.send_wait_s_L, transfers.receive_wait_s_L], axis=1)
        waits_T2 = np.clip(waits_T2[is_told_L][order] / took_s_T[:, None], 0, 1)
        rates = _known(before, id_T, kind_T, view.step, _nodes(view, transfers))
        if view.plan != before.plan or not np.array_equal(rates.links.id_E, before.links.id_E):
            rates = replace(_begun_anew(rates), plan=view.plan)
        rates = self._on_their_scale(rates)
        place_T = np.arange(len(id_T))
        if len(id_T) < len(rates.links.id_E):
            place_T = np.searchsorted(rates.links.id_E, id_T)
        pace_L, took_s_L = np.full((2, len(rates.links.id_E)), np.nan)
        pace_L[place_T], took_s_L[place_T] = pace_T, took_s_T
        ends = _Ends(rates)
        is_sick_L = ends.is_sender_off_L | ends.is_receiver_off_L | rates.links.is_open_E
        excess_L = np.full(len(pace_L), np.nan)
        are_few = self._are_few(rates)
        if are_few:
            excess_L, rates = self._against_own_past(took_s_L, pace_L, rates)
        for places in places_by(rates.kind_L) if not are_few else ():
            usual = pace_L[sample(healthy_of(places, is_sick_L))]
            usual = usual[~np.isnan(usual)]
            if len(usual):
                excess_L[places] = pace_L[places] / np.median(usual) - 1
        # What the other end explains says nothing of this end.
        of_sender_L = np.where(ends.is_receiver_off_L, np.nan, excess_L)
        of_receiver_L = np.where(ends.is_sender_off_L, np.nan, excess_L)
        waits_L2 = rates.waits_L2.copy()
        drift_T2 = waits_L2[place_T] + self.memory * (waits_T2 - waits_L2[place_T])
        waits_L2[place_T] = np.where(np.isnan(drift_T2), waits_T2, drift_T2)
        seen_L = rates.seen_L.copy()
        seen_L[place_T] = view.step
        vote = self._outliers_of(rates).vote
        after = replace(
            rates,
            links=rates.links.added(excess_L, view.step, vote=vote),
            senders=_added(rates.senders, ends.sender_place_L, of_sender_L, view.step, vote),
            receivers=_added(
                rates.receivers, ends.receiver_place_L, of_receiver_L, view.step, vote
            ),
            waits_L2=waits_L2,
            seen_L=seen_L,
        )
        return after, ends

    def _on_their_scale(self, rates: Rates) -> Rates:
        """Nothing of before counts where few links become many, or many few."""
        clip = self.few_clip if self._are_few(rates) else CLIP
        if rates.links.clip == clip:
            return rates
        none = History.empty(self.outliers.steps, clip)
        return replace(
            rates,
            links=none.of(rates.links.id_E),
            senders=none.of(rates.senders.id_E),
            receivers=none.of(rates.receivers.id_E),
        )

    def _against_own_past(
        self, took_s_L: Floats, pace_L: Floats, rates: Rates
    ) -> tuple[Floats, Rates]:
        """How much longer than usual, less what became slower for all; and what is usual now."""
        is_known_L, is_old_L = ~np.isnan(pace_L), rates.age_L >= self.warm_up
        usual_s_L = np.where(is_old_L, took_s_L * rates.usual_L / pace_L, np.nan)
        own_L = (took_s_L + self.few_s) / (usual_s_L + self.few_s)
        excess_L = np.full(len(pace_L), np.nan)
        if 2 * np.count_nonzero(~np.isnan(own_L)) > np.count_nonzero(is_known_L):
            excess_L = own_L / np.nanquantile(own_L, self.few_quantile) - 1
        learns_L = is_known_L & (~is_old_L | (excess_L < self.few.vote))
        weight_L = np.fmax(1 / (rates.age_L + 1), self.memory / 10)
        before_L = np.where(rates.age_L > 0, rates.usual_L, 0.0)
        usual_L = np.where(learns_L, before_L + weight_L * (pace_L - before_L), rates.usual_L)
        drift_s_L = self.memory * np.nan_to_num(usual_s_L - rates.expected_s_L)
        return excess_L, replace(
            rates,
            usual_L=usual_L,
            expected_s_L=rates.expected_s_L + drift_s_L,
            age_L=rates.age_L + learns_L,
        )

    # ------------------------------------------------------------------ deciding

    def _outliers_of(self, rates: Rates) -> Outliers:
        return self.few if self._are_few(rates) else self.outliers

    def _are_hot(self, rates: Rates, cells: Judged) -> Bools:
        """Links. A few steps of much weigh much in a mean that is hardly clipped: of few links most
        of the last steps were bad."""
        vote = self._outliers_of(rates).vote
        is_hot_L: Bools = cells.excess_E > vote
        if self._are_few(rates):
            last_SL = rates.links.last(0, np.arange(len(is_hot_L)))
            num_L = np.count_nonzero(~np.isnan(last_SL), axis=0)
            is_hot_L &= 2 * np.count_nonzero(last_SL > vote, axis=0) > num_L
        return is_hot_L

    def _are_few(self, rates: Rates) -> bool:
        return len(rates.links.id_E) <= self.few_links

    def _ends(
        self,
        history: History,
        place_L: Ints,
        is_hot_L: Bools,
        counts_L: Bools,
        outliers: Outliers,
    ) -> tuple[Judged, Bools]:
        """Nodes of which nearly all links are hot in one direction; and those that begin to be."""
        judged = outliers.judge(history, [np.arange(len(history.id_E))])
        num = len(history.id_E)
        links_N = np.bincount(place_L[counts_L], minlength=num)
        hot_N = np.bincount(place_L[is_hot_L & counts_L], minlength=num)
        is_wide_N = (links_N >= self.min_links) & (hot_N >= self.share * links_N)
        is_off_N = judged.is_off_E & (is_wide_N | history.is_open_E)
        begins_N = is_wide_N & (judged.excess_E > outliers.vote)
        return replace(judged, is_off_E=is_off_N), is_off_N | begins_N

    def _of_link(self, found: Finding, rates: Rates, sender_L: Ints, receiver_L: Ints) -> Verdict:
        """Of a link that is hot alone: it, or the end of which it is the only one."""
        sender, receiver = int(sender_L[found.place]), int(receiver_L[found.place])
        send_wait, receive_wait = (bool(one > self.wait) for one in rates.waits_L2[found.place])
        only_of_sender = np.count_nonzero(sender_L == sender) < self.min_links
        only_of_receiver = np.count_nonzero(receiver_L == receiver) < self.min_links
        if only_of_sender and receive_wait and not send_wait:
            return _verdict(found, Kind.SLOW_SENDER, Node(sender))
        if only_of_receiver and send_wait and not receive_wait:
            return _verdict(found, Kind.SLOW_RECEIVER, Node(receiver))
        return _verdict(found, Kind.SLOW_LINK, Link(sender, receiver))


class _Ends:
    """Of each link its ends, their places, and whether there is a verdict on them."""

    def __init__(self, rates: Rates) -> None:
        self.sender_L, self.receiver_L = ends_of(rates.links.id_E)
        self.sender_place_L, _ = lookup(rates.senders.id_E, self.sender_L)
        self.receiver_place_L, _ = lookup(rates.receivers.id_E, self.receiver_L)
        self.is_sender_off_L = rates.senders.is_open_E[self.sender_place_L]
        self.is_receiver_off_L = rates.receivers.is_open_E[self.receiver_place_L]
        back_L = self.receiver_L << _SHIFT | self.sender_L
        self._back_place_L, self._has_back_L = lookup(rates.links.id_E, back_L)

    def both_ways(self, is_it_L: Bools) -> Bools:
        """Links of which that is so, or of those back: there goes what acknowledges."""
        return is_it_L | (self._has_back_L & is_it_L[self._back_place_L])


def _are_alike(late_s_L: Floats, place_L: Ints, share: float) -> Bools:
    """Whether a link is late by that share at least of what the worst one of the same end is."""
    if not share:
        return np.ones(len(late_s_L), np.bool_)
    worst_N = np.zeros(int(place_L.max()) + 1)
    np.fmax.at(worst_N, place_L, late_s_L)
    return late_s_L >= share * worst_N[place_L]


def _unless_weaker(
    late_s_L: Floats, rates: Rates, ends: _Ends, senders: Judged, receivers: Judged
) -> tuple[Judged, Judged]:
    """Without nodes that begin to seem slow in one direction and are later in the other one: what
    acknowledges the one goes the other way."""
    of_sender_N = _means(late_s_L, ends.sender_place_L)
    of_receiver_N = _means(late_s_L, ends.receiver_place_L)
    sends, is_sender_N = lookup(rates.senders.id_E, rates.receivers.id_E)
    receives, is_receiver_N = lookup(rates.receivers.id_E, rates.senders.id_E)
    weak_senders_N = is_receiver_N & (of_sender_N < of_receiver_N[receives])
    weak_receivers_N = is_sender_N & (of_receiver_N < of_sender_N[sends])
    return (
        replace(senders, is_off_E=senders.is_off_E & (rates.senders.is_open_E | ~weak_senders_N)),
        replace(
            receivers,
            is_off_E=receivers.is_off_E & (rates.receivers.is_open_E | ~weak_receivers_N),
        ),
    )


def _means(value_L: Floats, place_L: Ints) -> Floats:
    """Of the links of each end."""
    means_N: Floats = np.bincount(place_L, value_L) / np.bincount(place_L)
    return means_N


def _of_end(found: Finding, history: History, kind: Kind) -> Verdict:
    return _verdict(found, kind, Node(int(history.id_E[found.place])))


def ends_of(id_L: Ints) -> tuple[Ints, Ints]:
    """Sender and receiver of each link."""
    return id_L >> _SHIFT, id_L & ((1 << _SHIFT) - 1)


def _nodes(view: StepView, transfers: Transfers) -> Ints:
    """Those with workers, and those that have none and take part all the same."""
    is_used_L = transfers.bytes_L > 0
    return np.union1d(
        view.fleet.node_W,
        np.union1d(transfers.sender_L[is_used_L], transfers.receiver_L[is_used_L]),
    )


def _known(before: Rates, id_T: Ints, kind_T: Ints, step: int, node_N: Ints) -> Rates:
    """With links that are new, without those that have long carried nothing."""
    if np.array_equal(id_T, before.links.id_E) and np.array_equal(kind_T, before.kind_L):
        return before
    sender_L, receiver_L = ends_of(before.links.id_E)
    is_kept_L = (step - before.seen_L <= _NUM_FORGOTTEN) | _have_verdict(before)
    is_kept_L &= np.isin(sender_L, node_N) & np.isin(receiver_L, node_N)
    id_L = np.union1d(before.links.id_E[is_kept_L], id_T)
    old = np.isin(id_L, before.links.id_E)
    from_old = np.searchsorted(before.links.id_E, id_L[old])
    kind_L, seen_L = np.zeros(len(id_L), np.int64), np.zeros(len(id_L), np.int64)
    waits_L2 = np.full((len(id_L), 2), np.nan)
    usual_L, age_L = np.full(len(id_L), np.nan), np.zeros(len(id_L), np.int64)
    usual_L[old], age_L[old] = before.usual_L[from_old], before.age_L[from_old]
    expected_s_L = np.zeros(len(id_L))
    expected_s_L[old] = before.expected_s_L[from_old]
    kind_L[old], seen_L[old] = before.kind_L[from_old], before.seen_L[from_old]
    waits_L2[old] = before.waits_L2[from_old]
    kind_L[np.searchsorted(id_L, id_T)] = kind_T
    sender_L, receiver_L = ends_of(id_L)
    return Rates(
        links=before.links.of(id_L),
        senders=before.senders.of(np.unique(sender_L)),
        receivers=before.receivers.of(np.unique(receiver_L)),
        seen_L=seen_L,
        kind_L=kind_L,
        waits_L2=waits_L2,
        usual_L=usual_L,
        expected_s_L=expected_s_L,
        age_L=age_L,
        plan=before.plan,
    )


def _begun_anew(rates: Rates) -> Rates:
    """Where nodes come or go each shares its card with others, and where they own other chunks each
    sends at other times: no pace of before is usual any more, but for that of links on which there
    is a verdict."""
    return replace(rates, age_L=np.where(_have_verdict(rates), rates.age_L, 0))


def _have_verdict(rates: Rates) -> Bools:
    """Links on which there is one, or on one of whose ends."""
    ends = _Ends(rates)
    return rates.links.is_open_E | ends.is_sender_off_L | ends.is_receiver_off_L


def _added(nodes: History, place_L: Ints, excess_L: Floats, step: int, vote: float) -> History:
    """One more step of nodes: the mean of their links, clipped like all."""
    is_known_L = ~np.isnan(excess_L)
    clipped_L = np.where(is_known_L, np.clip(excess_L, -nodes.clip, nodes.clip), 0.0)
    num_N = np.bincount(place_L, is_known_L, minlength=len(nodes.id_E))
    total_N = np.bincount(place_L, clipped_L, minlength=len(nodes.id_E))
    mean_N = np.where(num_N > 0, total_N / np.maximum(num_N, 1), np.nan)
    return nodes.added(mean_N, step, vote=vote)


_VERBS = {
    Kind.SLOW_SENDER: "sends",
    Kind.SLOW_RECEIVER: "receives",
    Kind.SLOW_LINK: "carries",
}


def _verdict(found: Finding, kind: Kind, culprit: Node | Link) -> Verdict:
    return Verdict(
        kind=kind,
        culprit=culprit,
        since_step=found.since_step,
        confidence=found.confidence,
        reason=(
            f"{culprit} {_VERBS[kind]} a byte in {found.excess:.0%} more time than is usual among"
            f" its like {found}"
        ),
        evidence=found.evidence,
    )
