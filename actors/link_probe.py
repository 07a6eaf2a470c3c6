"""Measures the links of a node that carry nothing yet, and answers where others measure.

Over the very links of the exchange, behind all that a step waits for. Judges nothing:
`policies.preflight`. Blocks of a probe hold nothing that anybody reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actors.links import Clock, Link
from elastic.core.protocol.frames import Block, Stage
from policies.preflight import LinkProbe

NUM_ROUND_TRIPS = 5
"""Of a byte each; the shortest counts."""
LEAST_BYTES, MOST_BYTES = 1 << 16, 1 << 20
"""What goes at a time: twice as much as before, up to the size of the exchange's own blocks."""
BUDGET_S = 0.05
"""Of the larger blocks: nothing more is sent once they took so long."""
BUDGET_BYTES = 5 << 20
"""Nor once so much was sent."""
_ASK, _ANSWER = 0, 1  # the tensor of a block


@dataclass(slots=True)
class _Trial:
    """One link. `number` is that of the block that is on its way."""

    link: Link
    number: int = -1
    size: int = 1
    sent_s: float = 0.0
    spent_s: float = 0.0
    spent_bytes: int = 0
    trips_s: list[float] = field(default_factory=list)
    blocks_s: list[tuple[int, float]] = field(default_factory=list)

    @property
    def result(self) -> LinkProbe:
        """The best of the largest blocks: smaller ones may fit into a buffer on the way. A round
        trip is taken off, but never more than half of the time."""
        trip_s, largest = min(self.trips_s), max(size for size, _ in self.blocks_s)
        took_s = min(took_s for size, took_s in self.blocks_s if size == largest)
        return LinkProbe(trip_s, largest / max(took_s - trip_s, took_s / 2))


class LinkProber:
    """Of one node.

    Args:
        links: those that there are now, by node.
        tell: takes what was measured of the link to a node.
    """

    def __init__(
        self,
        links: Mapping[int, Link],
        tell: Callable[[int, LinkProbe], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self._links, self._tell, self._clock = links, tell, clock
        self._wanted: set[int] = set()
        self._trials: dict[int, _Trial] = {}
        self._scratch = memoryview(bytearray())

    def begin(self, peer: int) -> None:
        """Measure the link to a node once there is one."""
        self._wanted.add(peer)
        self._trials.pop(peer, None)

    def turn(self) -> None:
        """Begin what can begin; anew where a link was replaced."""
        for peer in list(self._wanted):
            link, trial = self._links.get(peer), self._trials.get(peer)
            if link is not None and (trial is None or trial.link is not link):
                self._trials[peer] = _Trial(link)
                self._send(self._trials[peer])

    def place(self, block: Block) -> memoryview:
        """Where its payload goes: nobody reads it."""
        return self._memory(block.length)

    def arrived(self, peer: int, block: Block) -> None:
        """A block is here: answer it, or it is the answer to one."""
        link, trial = self._links.get(peer), self._trials.get(peer)
        if block.tensor == _ASK and link is not None:
            answer = Block(0, Stage.PROBE, _ANSWER, block.chunk, 0, 1)
            link.send_block(answer, self._memory(1))
        elif trial is not None and trial.link is link and block.chunk == trial.number:
            self._answered(peer, trial)

    def _answered(self, peer: int, trial: _Trial) -> None:
        took_s = max(self._clock() - trial.sent_s, 1e-9)
        if trial.size == 1:
            trial.trips_s.append(took_s)
            trial.size = 1 if len(trial.trips_s) < NUM_ROUND_TRIPS else LEAST_BYTES
        else:
            trial.blocks_s.append((trial.size, took_s))
            trial.spent_s += took_s
            trial.spent_bytes += trial.size
            trial.size = min(2 * trial.size, MOST_BYTES)
        if trial.spent_s < BUDGET_S and trial.spent_bytes + trial.size <= BUDGET_BYTES:
            self._send(trial)
            return
        self._wanted.discard(peer)
        del self._trials[peer]
        self._tell(peer, trial.result)

    def _send(self, trial: _Trial) -> None:
        trial.number += 1
        trial.sent_s = self._clock()
        block = Block(0, Stage.PROBE, _ASK, trial.number, 0, trial.size)
        trial.link.send_block(block, self._memory(trial.size))

    def _memory(self, size: int) -> memoryview:
        """Memory that all share, since nobody reads it; a larger one does not touch what is on its
        way."""
        if len(self._scratch) < size:
            self._scratch = memoryview(bytearray(max(size, MOST_BYTES)))
        return self._scratch[:size]
