"""How nodes are wired: leafs, spines, cores, and which ways lead from one node to another.

Plain data and the ways through it; pure. A way goes up as far as it must and down again, as in
every Clos network; nothing here decides which one to take.

Letters: L directed links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Way = tuple[int, ...]
"""Links in the order in which they are passed."""


@dataclass(frozen=True, slots=True)
class Cable:
    """Between two switches, or a node and its leaf, by name; `lower` is nearer to the nodes.

    Several with the same ends are parallel. Bytes per second in each direction; 0: it is down.
    """

    lower: str
    upper: str
    up_bytes_per_s: float
    down_bytes_per_s: float


@dataclass(frozen=True)
class Topology:
    """Cables; `node_name(n)` is the end of node n. Link 2i is cable i upwards, 2i + 1 downwards."""

    cables: tuple[Cable, ...]

    @cached_property
    def capacities(self) -> Floats:
        """Bytes per second of each link, both directions of all cables."""
        both = [(one.up_bytes_per_s, one.down_bytes_per_s) for one in self.cables]
        return np.array(both, np.float64).reshape(-1)

    @cached_property
    def _above(self) -> Mapping[str, Sequence[tuple[int, str]]]:
        above: dict[str, list[tuple[int, str]]] = {}
        for number, cable in enumerate(self.cables):
            above.setdefault(cable.lower, []).append((number, cable.upper))
        return above

    @cached_property
    def _known(self) -> dict[tuple[str, str], tuple[tuple[int, ...], ...]]:
        return {}

    def ways(self, sender: int, receiver: int) -> tuple[Way, ...]:
        """All of the fewest links, those that are down included; none if nothing leads there.

        Raises:
            ValueError: a node is not wired at all.
        """
        for node in (sender, receiver):
            if node_name(node) not in self._above:
                raise ValueError(f"node {node} is not in the topology")
        ends = node_name(sender), node_name(receiver)
        if ends not in self._known:
            self._known[ends] = self._find(*ends)
        return self._known[ends]

    def _find(self, sender: str, receiver: str) -> tuple[Way, ...]:
        """Rise from both until something is common, one layer at a time."""
        rising: list[tuple[str, Way]] = [(sender, ())]
        falling: list[tuple[str, Way]] = [(receiver, ())]
        while rising and falling:
            rising = [
                (upper, (*way, 2 * number))
                for at, way in rising
                for number, upper in self._above.get(at, ())
            ]
            falling = [
                (upper, (2 * number + 1, *way))
                for at, way in falling
                for number, upper in self._above.get(at, ())
            ]
            tops: dict[str, list[Way]] = {}
            for top, way in falling:
                tops.setdefault(top, []).append(way)
            ways = [(*up, *down) for top, up in rising for down in tops.get(top, ())]
            if ways:
                return tuple(ways)
        return ()

    def with_capacity(self, cable: int, factor: float) -> Topology:
        """The same with one cable slower in both directions; 0: down."""
        old = self.cables[cable]
        new = Cable(
            old.lower, old.upper, old.up_bytes_per_s * factor, old.down_bytes_per_s * factor
        )
        return Topology((*self.cables[:cable], new, *self.cables[cable + 1 :]))


def node_name(node: int) -> str:
    """What a node is called as an end of a cable."""
    return f"node {node}"


def clos(
    *,
    leafs: int,
    nodes_per_leaf: int,
    spines: int,
    node_bytes_per_s: float = 1.0,
    uplink_bytes_per_s: float = 1.0,
) -> Topology:
    """Two layers: every leaf has one uplink to every spine. Nodes are numbered leaf by leaf."""
    cables = [
        Cable(node_name(node), f"leaf {node // nodes_per_leaf}", node_bytes_per_s, node_bytes_per_s)
        for node in range(leafs * nodes_per_leaf)
    ]
    cables += [
        Cable(f"leaf {leaf}", f"spine {spine}", uplink_bytes_per_s, uplink_bytes_per_s)
        for leaf in range(leafs)
        for spine in range(spines)
    ]
    return Topology(tuple(cables))
