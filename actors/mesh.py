"""The links of one node to all others: called, called again, ticked, and given up when silent.

Of two nodes the greater calls the lesser; the coordinator calls all. What is said over a link is
not read here. For one selector loop; never blocks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from actors.links import Clock, Link
from actors.listener import Listener, Unreachable
from elastic.core.errors import ChannelClosed
from policies.cuts import SILENT_S

COORDINATOR = 2**32 - 1
"""Stands for the coordinator where a node would be named: it calls every node, and nobody it."""

_RETRY_S = 0.05

Address = tuple[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Up:
    """There is a link to that node now; one that there was before is down."""

    node: int
    link: Link


@dataclass(frozen=True, slots=True)
class Down:
    """The link to that node is closed.

    `for_good`: no successor of its aggregator is about to come; its host froze, was cut off, or
    says that nobody listens any more.
    """

    node: int
    reason: str
    for_good: bool = False


class Mesh:
    """Keeps a link open to each node that it is told of, as far as that is this end's to do."""

    def __init__(self, me: int, listener: Listener, clock: Clock = time.monotonic) -> None:
        self._me, self._listener, self._clock = me, listener, clock
        self._addresses: dict[int, Address] = {}
        self._calling: set[int] = set()
        self._retry_s: dict[int, float] = {}
        self._turned_s = clock()
        self.links: dict[int, Link] = {}
        self.cuts: Counter[int] = Counter()
        """How often the link to each node was given up since nothing was heard."""
        self.unanswered: Counter[int] = Counter()
        """How often, of these, its kernel had not answered either."""

    @property
    def listener(self) -> Listener:
        """To be watched: `turn` is due when it is readable, and several times a second."""
        return self._listener

    def tell(self, addresses: Mapping[int, Address]) -> None:
        """Where the nodes are; who is not named any more is called no more."""
        self._addresses = {node: address for node, address in addresses.items() if node != self._me}
        self._retry_s.clear()

    def turn(self) -> list[Up | Down]:
        """What has come and gone since the last time, in order."""
        now_s = self._clock()
        changes = self._tick(now_s)
        self._call(now_s)
        for made in self._listener.turn():
            if isinstance(made, Unreachable):
                self._calling.discard(made.node)
                self._retry_s[made.node] = now_s + _RETRY_S
                if made.refused and made.node not in self.links:
                    changes.append(Down(made.node, made.reason, for_good=True))
                continue
            self._calling.discard(made.node)
            if made.node in self.links:
                changes.append(self.close(made.node, "it calls again"))
            self.links[made.node] = made
            changes.append(Up(made.node, made))
        return changes

    def close(self, node: int, reason: str) -> Down:
        """Close the link to a node. It is called again."""
        self.links.pop(node).close()
        self._retry_s.pop(node, None)
        if node > self._me and node in self._addresses:
            self._listener.probe(node, self._addresses[node])
        return Down(node, reason)

    def end(self) -> None:
        """Close everything."""
        for link in self.links.values():
            link.close()
        self.links.clear()
        self._listener.close()

    def _tick(self, now_s: float) -> list[Up | Down]:
        """Ping, and give up the links that nothing was heard on.

        If this process was away itself, others' pings wait to be read: it judges nobody then.
        """
        was_away = now_s - self._turned_s > SILENT_S / 2
        self._turned_s = now_s
        changes: list[Up | Down] = []
        for node, link in list(self.links.items()):
            silent_s = now_s - link.traffic.last_in_s
            try:
                link.tick()
            except ChannelClosed as error:
                changes.append(self.close(node, str(error)))
                continue
            if silent_s > SILENT_S and not was_away and not link.waits:
                self.cuts[node] += 1
                self.unanswered[node] += not link.is_answered
                down = self.close(node, f"nothing was heard for {silent_s:.1f} s")
                changes.append(replace(down, for_good=True))
        return changes

    def _call(self, now_s: float) -> None:
        for node, address in self._addresses.items():
            if node >= self._me or node in self.links or node in self._calling:
                continue
            if now_s >= self._retry_s.get(node, 0.0):
                self._calling.add(node)
                self._listener.call(node, address)


def find_address(folder: Path, host: str, name: str = "port") -> Address | None:
    """Where the acting aggregator of the store in `folder` listens, if one has begun to; or
    something else of it, by the name of its file there."""
    try:
        return host, int((folder / name).read_text())
    except FileNotFoundError:
        return None
