"""How fast flows could be at best, if each were spread over all of its ways: a bound, and near it.

The linear program of the maximum concurrent flow, solved by mirror descent on a smooth maximum.
Every answer carries its own proof: link prices give a load below which no spreading gets (weak
duality), so one knows how far from the best it is. Pure.

Letters: F flows, W ways of a flow (padded), H links of a way (padded), L links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies.topology import Way

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

GAP = 0.01
"""Good enough: within that share of the bound."""

_MOST_ROUNDS = 3000


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """The ways of all flows as one array; unused places hold link number L, which is free."""

    links_FWH: Ints
    is_way_FW: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, ways: Sequence[Sequence[Way]], num_links: int) -> Ways:
        """Pad them."""
        width = max(map(len, ways), default=0)
        length = max((len(way) for own in ways for way in own), default=0)
        links_FWH = np.full((len(ways), width, length), num_links)
        is_way_FW = np.zeros((len(ways), width), np.bool_)
        for flow, own in enumerate(ways):
            for place, way in enumerate(own):
                links_FWH[flow, place, : len(way)] = way
                is_way_FW[flow, place] = True
        return cls(links_FWH, is_way_FW)

    def loads(self, bytes_FW: Floats, num_links: int) -> Floats:
        """Bytes over each link."""
        spread_FWH = np.broadcast_to(bytes_FW[:, :, None], self.links_FWH.shape)
        flat = spread_FWH.ravel().astype(np.float64)
        loads = np.bincount(self.links_FWH.ravel(), flat, minlength=num_links + 1)
        return np.asarray(loads[:num_links], np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """`longest_s`: how long the slowest flow takes; nobody's plan takes less than `bound_s`."""

    shares_FW: Floats
    longest_s: float
    bound_s: float


def spread(ways: Ways, size_F: Floats, capacity_L: Floats) -> Spread:
    """Spread flows so that the busiest link is done as early as possible.

    Every flow needs a way over links that are up. Sizes in bytes, capacities in bytes per second.
    """
    num_links = len(capacity_L)
    with np.errstate(divide="ignore"):
        slowness_L = np.append(np.where(capacity_L > 0, 1 / capacity_L, np.inf), 0.0)
    is_up_FW = ways.is_way_FW & np.isfinite(slowness_L[ways.links_FWH].max(axis=2, initial=0))
    slowness_L[~np.isfinite(slowness_L)] = 0.0
    # The first guess is right where all is symmetric: in proportion to the narrowest link.
    narrow_FW = np.where(is_up_FW, slowness_L[ways.links_FWH].max(axis=2, initial=0), np.inf)
    narrow_FW = np.where(is_up_FW, 1 / np.fmax(narrow_FW, 1e-300), 0.0)
    shares_FW = narrow_FW / narrow_FW.sum(axis=1, keepdims=True)
    best = Spread(shares_FW, np.inf, 0.0)
    bound_s, pace = 0.0, 4.0
    for _ in range(_MOST_ROUNDS):
        time_L = ways.loads(shares_FW * size_F[:, None], num_links) * slowness_L[:-1]
        longest_s = float(time_L.max(initial=0.0))
        if longest_s < best.longest_s:
            best = Spread(shares_FW, longest_s, 0.0)
        if longest_s == 0.0:
            break
        price_L = np.exp((time_L / longest_s - 1) * np.log(max(num_links, 2)) / GAP)
        price_L = np.append(price_L / price_L.sum(), 0.0) * slowness_L
        price_FW = np.where(is_up_FW, price_L[ways.links_FWH].sum(axis=2), np.inf)
        cheapest_F = price_FW.min(axis=1)
        bound_s = max(bound_s, float(cheapest_F @ size_F))
        if best.longest_s * (1 - GAP) <= bound_s:
            break
        dear_FW = np.where(is_up_FW, (price_FW - cheapest_F[:, None]) * size_F[:, None], 0.0)
        pace = pace * 1.02 if longest_s <= best.longest_s else max(pace * 0.7, 0.05)
        scale = dear_FW.max(initial=0.0)
        if scale == 0.0:
            break
        shares_FW = shares_FW * np.exp(-pace * GAP * dear_FW / scale)
        shares_FW = shares_FW / shares_FW.sum(axis=1, keepdims=True)
    return Spread(best.shares_FW, best.longest_s, bound_s)
