"""Which way each flow takes, in which rounds pairs exchange, and what moves when a link fails.

The role of C4P (Alibaba, arXiv 2406.04594): few large flows, hashed onto uplinks as ECMP does,
collide; so each is placed on the emptiest ways instead. A flow keeps to one way where it can, and
is cut into shares where the best that is possible asks for it; on TCP a share is a connection with
a source port of its own. When a link slows down or dies, only flows move that must. Pure.

Letters: F flows, W ways of a flow, L links.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from policies.spreading import Spread, Ways, spread
from policies.topology import Topology, Way

Floats = npt.NDArray[np.float64]

_LEAST = 1e-9
"""A smaller share of a flow is none."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What one node sends to another at a time."""

    sender: int
    receiver: int
    size_bytes: float = 1.0


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a flow, 0 to 1, and its way."""

    way: Way
    share: float


Shares = Mapping[Flow, tuple[Share, ...]]


@dataclass(frozen=True, slots=True)
class TrafficView:
    """`before`: the shares that hold now, of a topology that was perhaps a better one."""

    topology: Topology
    flows: Sequence[Flow]
    before: Shares = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """`slowest`: the slowest flow has at least that share of the rate that any spreading gives it.

    `moved`: flows that go on other ways than before; new ones are not among them.
    """

    shares: Shares
    longest_s: float
    slowest: float
    moved: tuple[Flow, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class NoWay:
    """Nothing leads from the sender to the receiver any more."""

    flows: tuple[Flow, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastLoaded:
    """`within` of the best that is possible is good enough: nothing more is moved or cut for it."""

    within: float = 0.97
    kind: Literal["least_loaded"] = "least_loaded"

    def decide(self, view: TrafficView) -> Plan | NoWay:
        """Place flows that run at the same time.

        Raises:
            ValueError: a node is not in the topology, or a flow is named twice.
        """
        flows = list(view.flows)
        if len(set(flows)) < len(flows):
            raise ValueError("a flow is named twice")
        capacity_L = view.topology.capacities
        ways = [
            [way for way in view.topology.ways(one.sender, one.receiver) if min(capacity_L[[*way]])]
            for one in flows
        ]
        cut_off = tuple(one for one, own in zip(flows, ways, strict=True) if not own)
        if cut_off:
            pairs = ", ".join(f"{one.sender} -> {one.receiver}" for one in cut_off[:8])
            return NoWay(cut_off, f"every way is down of {len(cut_off)} flows: {pairs}")
        size_F = np.array([one.size_bytes for one in flows])
        best = spread(Ways.of(ways, len(capacity_L)), size_F, capacity_L)
        placing = _Placing(flows, ways, capacity_L, best.longest_s / self.within)
        kept = {one: view.before[one] for one in flows if one in view.before}
        placing.keep(kept)
        placing.shed()
        placing.place_whole()
        placing.place_parts()
        placing.even_out(len(flows))
        if placing.longest_s > 1.01 * best.longest_s / self.within:
            placing.adopt(best)
        shares = placing.shares()
        moved = tuple(one for one in kept if not _is_same(kept[one], shares[one]))
        slowest = best.bound_s / placing.longest_s if placing.longest_s else 1.0
        num_cut = sum(len(parts) > 1 for parts in shares.values())
        return Plan(
            shares,
            placing.longest_s,
            slowest,
            moved,
            f"{len(flows)} flows, {num_cut} of them cut, {len(moved)} moved: the slowest has at"
            f" least {slowest:.0%} of the best possible rate",
        )

    def rounds(self, view: TrafficView) -> list[dict[Flow, Share]]:
        """Order flows into rounds in which no link carries more than it can.

        In a round a node sends to one and receives from one, each flow goes one way, at the full
        rate of its node. Largest first; ties go to the next node on, as all do at first.

        Raises:
            ValueError: nothing leads from a sender to its receiver.
        """
        capacity_L = view.topology.capacities
        num_nodes = 1 + max((max(one.sender, one.receiver) for one in view.flows), default=0)
        left = sorted(
            view.flows,
            key=lambda one: (-one.size_bytes, (one.receiver - one.sender) % num_nodes, one.sender),
        )
        rounds: list[dict[Flow, Share]] = []
        while left:
            room_L, busy, now, later = capacity_L.copy(), set[tuple[str, int]](), {}, []
            for one in left:
                ends = {("sends", one.sender), ("receives", one.receiver)}
                way = None if ends & busy else _roomiest(view.topology, one, room_L, capacity_L)
                if way is None:
                    later.append(one)
                    continue
                busy |= ends
                room_L[[*way]] -= _rate(way, capacity_L)
                now[one] = Share(way, 1.0)
            if not now:
                raise ValueError(f"nothing leads from {left[0].sender} to {left[0].receiver}")
            rounds.append(now)
            left = later
        return rounds


def _rate(way: Way, capacity_L: Floats) -> float:
    """What the ends of a way can send and receive."""
    return float(min(capacity_L[way[0]], capacity_L[way[-1]]))


def _roomiest(topology: Topology, flow: Flow, room_L: Floats, capacity_L: Floats) -> Way | None:
    """The way with most room, if it has enough for the full rate."""
    ways = topology.ways(flow.sender, flow.receiver)
    way = max(ways, key=lambda one: min(room_L[[*one]]), default=None)
    if way is None or capacity_L[[*way]].min() <= 0:
        return None
    needs = min(_rate(way, capacity_L), float(capacity_L[[*way]].min()))
    return way if room_L[[*way]].min() >= needs * (1 - _LEAST) else None


def _is_same(before: Iterable[Share], after: Iterable[Share]) -> bool:
    old = {one.way: one.share for one in before}
    new = {one.way: one.share for one in after}
    ways = {*old, *new}
    return all(abs(old.get(way, 0.0) - new.get(way, 0.0)) < 1e-6 for way in ways)


class _Placing:
    """Shares in the making; `level_s`: no link should be busy for longer."""

    def __init__(
        self,
        flows: Sequence[Flow],
        ways: Sequence[Sequence[Way]],
        capacity_L: Floats,
        level_s: float,
    ) -> None:
        self._flows, self._ways, self._level_s = flows, ways, level_s
        self._size_F = np.array([one.size_bytes for one in flows])
        self._capacity_L = capacity_L
        self._load_L = np.zeros(len(capacity_L))
        self._shares: list[dict[int, float]] = [{} for _ in flows]
        self._missing_F = np.ones(len(flows))

    @property
    def longest_s(self) -> float:
        """How long the busiest link is busy."""
        return float(self._times().max(initial=0.0))

    def shares(self) -> dict[Flow, tuple[Share, ...]]:
        """Of every flow, the largest first."""
        return {
            flow: tuple(
                Share(self._ways[number][way], share)
                for way, share in sorted(self._shares[number].items(), key=lambda one: -one[1])
            )
            for number, flow in enumerate(self._flows)
        }

    def keep(self, before: Shares) -> None:
        """Begin with what held before, as far as its links are up."""
        for number, flow in enumerate(self._flows):
            places = {way: place for place, way in enumerate(self._ways[number])}
            for part in before.get(flow, ()):
                if part.way in places:
                    self._add(number, places[part.way], part.share)

    def shed(self) -> None:
        """Take what is too much from links that are too busy; from few flows, cut ones first."""
        for link in np.argsort(-self._times()).tolist():
            over = self._load_L[link] - self._level_s * self._capacity_L[link]
            if over <= _LEAST * self._load_L[link]:
                continue
            users = sorted(self._users(link), key=lambda one: (len(self._shares[one[0]]) < 2, one))
            for number, place in users:
                over = self._load_L[link] - self._level_s * self._capacity_L[link]
                if over <= _LEAST * self._load_L[link]:
                    break
                part = min(self._shares[number][place], over / self._size_F[number])
                self._add(number, place, -part)

    def place_whole(self) -> None:
        """Flows that have no way yet: the largest first, each on its emptiest way, if it fits."""
        for number in self._largest_first():
            if self._missing_F[number] > 1 - _LEAST:
                rooms = self._rooms(number)
                place = int(np.argmax(rooms))
                if rooms[place] >= self._size_F[number] * (1 - _LEAST):
                    self._add(number, place, 1.0)

    def place_parts(self) -> None:
        """What is missing: on as few ways as there is room for; the rest where it hurts least."""
        for number in self._largest_first():
            for _ in self._ways[number]:
                rooms = self._rooms(number)
                place = int(np.argmax(rooms))
                part = min(self._missing_F[number], rooms[place] / self._size_F[number])
                if part <= _LEAST:
                    break
                self._add(number, place, part)
            self._pour(number)

    def even_out(self, num_flows: int) -> None:
        """Place flows of the busiest link anew, cut ones first, as long as that helps."""
        for _ in range(num_flows):
            before_s = self.longest_s
            if before_s <= self._level_s * (1 + _LEAST):
                return
            link = int(np.argmax(self._times()))
            users = sorted(self._users(link), key=lambda one: (-len(self._shares[one[0]]), one))
            for number, _ in users:
                old = dict(self._shares[number])
                self._remove(number)
                self._pour(number)
                if self.longest_s < before_s * (1 - 1e-6):
                    break
                self._remove(number)
                for place, share in old.items():
                    self._add(number, place, share)
            else:
                return

    def adopt(self, best: Spread) -> None:
        """Nothing simpler comes near: spread everything as the bound does."""
        for number in range(len(self._flows)):
            self._remove(number)
            shares = best.shares_FW[number]
            shares = np.where(shares > 1e-3, shares, 0.0)
            for place in np.flatnonzero(shares).tolist():
                self._add(number, place, float(shares[place] / shares.sum()))

    # ------------------------------------------------------------------------

    def _times(self) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            time_L: Floats = np.where(self._load_L > 0, self._load_L / self._capacity_L, 0.0)
        return time_L

    def _largest_first(self) -> list[int]:
        missing = np.flatnonzero(self._missing_F > _LEAST)
        order = np.argsort(-self._size_F[missing], kind="stable")
        return [int(one) for one in missing[order]]

    def _users(self, link: int) -> list[tuple[int, int]]:
        return [
            (number, place)
            for number, parts in enumerate(self._shares)
            for place in parts
            if link in self._ways[number][place]
        ]

    def _rooms(self, number: int) -> Floats:
        """Bytes that each way has room for below the level."""
        room_L = self._level_s * self._capacity_L - self._load_L
        return np.array([room_L[[*way]].min() for way in self._ways[number]])

    def _pour(self, number: int) -> None:
        """Place what is missing so that the busiest link is as little busy as can be."""
        missing = self._missing_F[number]
        if missing <= _LEAST:
            return
        num_parts = 64
        for _ in range(num_parts):
            with np.errstate(divide="ignore"):
                after_L = (self._load_L + missing / num_parts * self._size_F[number]) / np.where(
                    self._capacity_L > 0, self._capacity_L, np.nan
                )
            ends_s = [after_L[[*way]].max() for way in self._ways[number]]
            self._add(number, int(np.argmin(ends_s)), missing / num_parts)

    def _add(self, number: int, place: int, share: float) -> None:
        parts = self._shares[number]
        parts[place] = parts.get(place, 0.0) + share
        if parts[place] <= _LEAST:
            del parts[place]
        self._missing_F[number] -= share
        self._load_L[[*self._ways[number][place]]] += share * self._size_F[number]

    def _remove(self, number: int) -> None:
        for place, share in list(self._shares[number].items()):
            self._add(number, place, -share)
