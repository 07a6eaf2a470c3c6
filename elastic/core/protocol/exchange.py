"""One round of the exchange, as one node sees it: node sums become totals, totals become results.

    every node     its sum of a chunk        -> the chunk's owner, who adds it to the total
    the owner      the total                 -> the chunk's replicas, who update as it does
    the owner      the updated parameters    -> all other nodes

Every other node gets a chunk's result once and owners get every sum once: with N nodes and chunks
shared out evenly, a node sends 2(N-1)/N of the flat space, and no scheme sends less (Patarasuk and
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Chunks go in
blocks, each on as soon as it can: nothing waits for a whole chunk but its update.

A node that joins observes: owners send it the parameters of all chunks. It adds nothing, and nobody
waits for it. A node that is to keep a chunk from the next version on gets its state besides, as
further tensors of its parameters, from one that has just computed it.

No I/O, no time, no numbers: only who has what. Integers add in any order, so blocks may, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from elastic.core.errors import ProtocolError
from elastic.core.protocol.frames import MAX_BLOCK_BYTES, Block, Stage
from policies.resharding import Move

BLOCK_BYTES = 1 << 20
"""How chunks are cut, the same on every node: a received block is added while in the cache."""

assert BLOCK_BYTES <= MAX_BLOCK_BYTES

# Events


@dataclass(frozen=True, slots=True)
class SumReady:
    """This node's sum of a chunk is in memory and stays as it is for the rest of the round."""

    chunk: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A block from `node`, let in by `Exchange.check`, is in memory."""

    node: int
    block: Block


@dataclass(frozen=True, slots=True)
class Updated:
    """This node has computed the parameters of a chunk that it keeps the state of."""

    chunk: int


Event = SumReady | Arrived | Updated

# Actions, to be carried out in order


@dataclass(frozen=True, slots=True)
class SendBlock:
    """Send what this node has of it; it does not change any more in this round."""

    node: int
    block: Block


@dataclass(frozen=True, slots=True)
class Add:
    """Add to the total of `block`, which begins as zeros if `fresh`: this node's own sum, what has
    just arrived, or both."""

    block: Block
    fresh: bool
    own: bool
    arrived: bool


@dataclass(frozen=True, slots=True)
class TotalComplete:
    """The total of a chunk that this node keeps is in memory: it can be updated."""

    chunk: int


@dataclass(frozen=True, slots=True)
class ChunkComplete:
    """The parameters of a chunk are in memory, computed here or received."""

    chunk: int


@dataclass(frozen=True, slots=True)
class RoundComplete:
    """Those of all chunks."""


Action = SendBlock | Add | TotalComplete | ChunkComplete | RoundComplete


class Exchange:
    """One round at node `me`, which takes part or observes. Not used any more once it is given up
    or complete."""

    def __init__(
        self,
        number: int,
        *,
        me: int,
        nodes: Sequence[int],
        keepers: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]],
        moves: Sequence[Move] = (),
        observers: Sequence[int] = (),
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Begin round `number`.

        Args:
            nodes: all that take part, in the order of the membership.
            keepers: who keeps the state of each chunk; its owner is the first.
            lengths: of each chunk, in bytes: of its parameters, then of each tensor of its state.
            moves: who gets the state of which chunk besides, and from whom.
            observers: who gets all parameters besides.
        """
        self._observes = me in observers
        at = len(nodes) if self._observes else nodes.index(me)
        self.number = number
        self._me = me
        self._others = (*nodes[at + 1 :], *nodes[:at])  # so that not all send to the same one first
        self._observers = tuple(observers)
        self._keepers = keepers
        assert len(keepers) == len(lengths)
        self._lengths = lengths
        self._moves: dict[int, list[Move]] = {}
        for move in moves:
            self._moves.setdefault(move.chunk, []).append(move)
        self.block_bytes = block_bytes
        self.kept = [chunk for chunk in range(len(keepers)) if me in keepers[chunk]]
        self.owned: dict[int, list[int]] = {node: [] for node in nodes}
        """The chunks that each node owns, in order."""
        for chunk, (owner, *_) in enumerate(keepers):
            self.owned[owner].append(chunk)
        self._ready: set[int] = set()
        self._arrived: set[tuple[int, Block]] = set()
        self._num_added: dict[tuple[int, int], int] = {}  # sums of others, by chunk and offset
        self._missing = [self._num_blocks(chunk) for chunk in range(len(keepers))]
        self._without_total = set(self.kept)
        self._incomplete = set(range(len(keepers)))

    def _num_blocks(self, chunk: int) -> int:
        """How many are missing until this node has all that it is to have of a chunk."""
        gains = any(move.receiver == self._me for move in self._moves.get(chunk, ()))
        wanted = self._lengths[chunk] if gains else self._lengths[chunk][:1]
        return sum(-(-length // self.block_bytes) for length in wanted)

    @property
    def has_totals(self) -> bool:
        """Whether the totals of all chunks that this node keeps are complete."""
        return not self._without_total

    def _keeps(self, chunk: int) -> bool:
        """Whether this node updates a chunk by its total."""
        return self._me in self._keepers[chunk]

    def order(self, speeds: Mapping[int, float] | None = None) -> list[int]:
        """All chunks, in the order in which this node's sums are best made ready.

        In turn one for each other owner, so that at any time each owner receives from few; but the
        more time a link needs for what is still to go over it, the sooner it is its turn. So all
        links come to their end together, and a slow one does not begin late.

        Args:
            speeds: of the links to other nodes, in bytes per second, as far as they are known.
        """
        turns: dict[int, list[int]] = {node: [] for node in (*self._others, self._me)}
        for chunk, (owner, *_) in enumerate(self._keepers):
            turns[owner].append(chunk)
        paces = _paces(speeds or {})
        needs = {node: paces.get(node, 1.0) * len(chunks) for node, chunks in turns.items()}
        last = max(needs.values(), default=0.0) - max(paces.values(), default=1.0)
        entries: list[tuple[float, int, int]] = []
        for turn, (node, chunks) in enumerate(turns.items()):
            begin = max(0.0, last - needs[node])
            entries += [
                (begin + at * paces.get(node, 1.0), turn, chunk) for at, chunk in enumerate(chunks)
            ]
        return [chunk for _, _, chunk in sorted(entries)]

    def check(self, node: int, block: Block) -> None:
        """Let a block of this round in, before it has a place.

        Raises:
            ProtocolError: `node` has no business to send it, or has sent it before.
        """
        assert block.round == self.number
        if not self._is_expected(node, block):
            raise ProtocolError(f"node {node} sends {block}, which is not its to send")
        if (node, block) in self._arrived:
            raise ProtocolError(f"node {node} sends {block} twice")

    def _is_expected(self, node: int, block: Block) -> bool:
        if node not in self._others or block.chunk >= len(self._keepers):
            return False
        if block.tensor >= len(self._lengths[block.chunk]):
            return False
        left_bytes = self._lengths[block.chunk][block.tensor] - block.offset
        if block.offset % self.block_bytes or block.length != min(self.block_bytes, left_bytes):
            return False
        if block.tensor:
            is_state = block.stage is Stage.PARAMETERS
            return is_state and Move(block.chunk, node, self._me) in self._moves.get(
                block.chunk, ()
            )
        keepers = self._keepers[block.chunk]
        match block.stage:
            case Stage.NODE_SUM:
                return keepers[0] == self._me
            case Stage.TOTAL:
                return keepers[0] == node and self._keeps(block.chunk)
            case Stage.PARAMETERS:
                return keepers[0] == node and not self._keeps(block.chunk)
            case _:
                return False

    def handle(self, event: Event) -> list[Action]:
        """What to do now, in order."""
        match event:
            case SumReady(chunk):
                return list(self._sum_ready(chunk))
            case Arrived(node, block):
                self.check(node, block)
                self._arrived.add((node, block))
                if block.stage is Stage.NODE_SUM:
                    return list(self._add(block))
                return list(self._has_one_more(block))
            case Updated(chunk):
                return list(self._updated(chunk))

    def _sum_ready(self, chunk: int) -> Iterator[Action]:
        assert not self._observes, f"an observer has no sum of chunk {chunk}"
        assert chunk not in self._ready, f"the sum of chunk {chunk} is ready twice"
        self._ready.add(chunk)
        owner = self._keepers[chunk][0]
        for block in self._blocks(chunk, Stage.NODE_SUM):
            if owner != self._me:
                yield SendBlock(owner, block)
                continue
            num_added = self._num_added.get((chunk, block.offset), 0)
            if num_added or not self._others:
                yield Add(block, fresh=not num_added, own=True, arrived=False)
                yield from self._total_grew(block)

    def _add(self, block: Block) -> Iterator[Action]:
        num_added = self._num_added.get((block.chunk, block.offset), 0)
        self._num_added[block.chunk, block.offset] = num_added + 1
        own = not num_added and block.chunk in self._ready
        yield Add(block, fresh=not num_added, own=own, arrived=True)
        yield from self._total_grew(block)

    def _total_grew(self, block: Block) -> Iterator[Action]:
        """Pass the total of a block on once every node's sum is in it."""
        num_added = self._num_added.get((block.chunk, block.offset), 0)
        if num_added < len(self._others) or block.chunk not in self._ready:
            return
        total = block._replace(stage=Stage.TOTAL)
        keepers = self._keepers[block.chunk]
        yield from (SendBlock(node, total) for node in self._others if node in keepers)
        yield from self._has_one_more(total)

    def _has_one_more(self, block: Block) -> Iterator[Action]:
        """A total or parameters are complete here once all blocks are."""
        chunk = block.chunk
        self._missing[chunk] -= 1
        if self._missing[chunk]:
            return
        if block.stage is Stage.PARAMETERS:
            yield from self._complete(chunk)
            return
        self._without_total.remove(chunk)
        yield TotalComplete(chunk)

    def _updated(self, chunk: int) -> Iterator[Action]:
        keepers = self._keepers[chunk]
        assert self._keeps(chunk), f"chunk {chunk} is not kept here"
        assert chunk not in self._without_total, f"chunk {chunk} has no total yet"
        if keepers[0] == self._me:
            receivers = [one for one in self._others if one not in keepers]
            for block in self._blocks(chunk, Stage.PARAMETERS):
                yield from (SendBlock(one, block) for one in (*receivers, *self._observers))
        for move in self._moves.get(chunk, ()):
            if move.sender == self._me:
                for tensor in range(1, len(self._lengths[chunk])):
                    blocks = self._blocks(chunk, Stage.PARAMETERS, tensor)
                    yield from (SendBlock(move.receiver, block) for block in blocks)
        yield from self._complete(chunk)

    def _complete(self, chunk: int) -> Iterator[Action]:
        yield ChunkComplete(chunk)
        self._incomplete.remove(chunk)
        if not self._incomplete:
            yield RoundComplete()

    def _blocks(self, chunk: int, stage: Stage, tensor: int = 0) -> Iterator[Block]:
        size = self._lengths[chunk][tensor]
        for offset in range(0, size, self.block_bytes):
            length = min(self.block_bytes, size - offset)
            yield Block(self.number, stage, tensor, chunk, offset, length)


def _paces(speeds: Mapping[int, float]) -> dict[int, float]:
    """How long each link needs for one chunk, where the fastest needs 1: in powers of two, since
    what is measured of like links differs a little in each step."""
    fastest = max(speeds.values(), default=0.0)
    return {
        node: 2.0 ** round(math.log2(fastest / speed))
        for node, speed in speeds.items()
        if speed > 0
    }
