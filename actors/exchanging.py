"""One round of the exchange in memory and over links: carries out what the protocol decides.

Node sums are only read: they stay for the next round, should this one be given up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.links import WAIT, Link, Memory
from elastic.core.mapped import Sizes
from elastic.core.protocol.exchange import (
    Add,
    Arrived,
    ChunkComplete,
    Event,
    Exchange,
    RoundComplete,
    SendBlock,
    TotalComplete,
)
from elastic.core.protocol.frames import BEHIND, Block, Stage

# Legend: N elements of the flat space.


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """What a node exchanges. `tensors` are those of the next version; see `update.tensors_of`."""

    sums_N: npt.NDArray[np.int32]  # this node's
    totals_N: npt.NDArray[np.int32]
    tensors: Sequence[memoryview]


Left = TotalComplete | ChunkComplete | RoundComplete


class Round:
    """One round at this node. Over `links` that lose one on the way it never completes."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        sizes: Sizes,
        links: Mapping[int, Link],
        arrays: Arrays,
        observers: Sequence[int] = (),
    ) -> None:
        self.exchange = exchange
        self._sizes = sizes
        self.links = links
        self._observers = frozenset(observers)
        self._sums = arrays.sums_N.data.cast("B")
        self._totals = arrays.totals_N.data.cast("B")
        self._tensors = arrays.tensors
        self._received: dict[int, memoryview] = {}

    def place(self, node: int, block: Block) -> Memory:
        """Where the payload of a block from `node` belongs.

        Raises:
            ProtocolError: it is not the node's to send.
        """
        if block.round != self.exchange.number:
            return None if block.round < self.exchange.number else WAIT
        self.exchange.check(node, block)
        if block.stage is Stage.NODE_SUM:
            if node not in self._received:  # its link may be newer than this round
                self._received[node] = memoryview(bytearray(self.exchange.block_bytes))
            return self._received[node][: block.length]
        return self._part(self._memory_of(block), block)

    def handle(self, event: Event) -> list[Left]:
        """Carry out what follows from an event; what is left to the caller comes back."""
        left: list[Left] = []
        for action in self.exchange.handle(event):
            match action:
                case SendBlock(node, block):
                    link = self.links.get(node)
                    if link is not None:
                        part = self._part(self._memory_of(block), block)
                        if node in self._observers:  # nobody waits until it is sent
                            part = memoryview(bytes(part))
                        link.send_block(block, part)
                case Add():
                    self._add(action, event.node if isinstance(event, Arrived) else None)
                case _:
                    left.append(action)
        return left

    def give_up(self) -> None:
        """Nothing of it is written here from now on, and no more is sent than has begun."""

        def is_mine(block: Block) -> bool:
            return block.round == self.exchange.number and block.stage not in BEHIND

        for link in self.links.values():
            link.discard_blocks(is_mine)

    def _add(self, action: Add, node: int | None) -> None:
        """Integers: it does not matter in what order."""
        block = action.block
        total = _numbers(self._part(self._totals, block))
        terms = [] if action.fresh else [total]
        if action.own:
            terms.append(_numbers(self._part(self._sums, block)))
        if action.arrived:
            assert node is not None
            terms.append(_numbers(self._received[node][: block.length]))
        if len(terms) == 1:
            np.copyto(total, terms[0])
        else:
            np.add(terms[0], terms[1], out=total)

    def _memory_of(self, block: Block) -> memoryview:
        match block.stage:
            case Stage.NODE_SUM:
                return self._sums
            case Stage.TOTAL:
                return self._totals
            case _:
                return self._tensors[block.tensor]

    def _part(self, memory: memoryview, block: Block) -> memoryview:
        chunk = self._sizes.layout.chunks[block.chunk]
        start = self._sizes.start_byte(block.tensor, chunk) + block.offset
        return memory[start : start + block.length]


def _numbers(memory: memoryview) -> npt.NDArray[np.int32]:
    return np.frombuffer(memory, np.int32)
