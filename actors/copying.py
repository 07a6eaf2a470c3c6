"""The state of a version on its way to a node that joins: each member sends a share of the chunks.

A member sends out of a snapshot, so that training goes on; the node that joins receives into the
version itself, in place, and says nothing of it until all of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from actors.links import WAIT, Link, Memory
from elastic.core.errors import ProtocolError
from elastic.core.layout import BUFFERS
from elastic.core.mapped import Sizes, Version
from elastic.core.protocol.events import Copy
from elastic.core.protocol.exchange import BLOCK_BYTES
from elastic.core.protocol.frames import Block, Stage
from elastic.core.update import Snapshot, Updater

_ELEMENT_BYTES = 4


class Sender:
    """Sends this node's share of a version to nodes that join.

    Args:
        wake: called by the thread that copies, when `turn` has something to send.
    """

    def __init__(
        self,
        me: int,
        sizes: Sizes,
        updater: Updater,
        versions: tuple[Version, Version],
        wake: Callable[[], None],
    ) -> None:
        self._me, self._sizes, self._updater, self._versions = me, sizes, updater, versions
        self._wake = wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._copying: dict[int, tuple[int, Copy, Snapshot, Future[None], Link]] = {}

    def begin(self, number: int, copy: Copy, link: Link | None) -> None:
        """Begin copy `number`; an earlier one to that node ends.

        Args:
            link: to the node, if there is one; without it there is nothing to do.
        """
        self._end(copy.node)
        if link is None:
            return
        link.discard_blocks(lambda block: block.stage is Stage.STATE)
        index = copy.state.step % 2
        num_chunks = len(self._sizes.layout.chunks)
        mine = range(copy.nodes.index(self._me), num_chunks, len(copy.nodes))
        snapshot = Snapshot(self._sizes, index, self._versions[index], mine)
        self._updater.snapshots.append(snapshot)
        job = self._thread.submit(snapshot.copy)
        job.add_done_callback(lambda _: self._wake())
        self._copying[copy.node] = number, copy, snapshot, job, link

    def turn(self, links: Mapping[int, Link]) -> None:
        """Send what has been copied. Raises whatever ended the thread."""
        for node, (number, copy, snapshot, job, link) in list(self._copying.items()):
            if not job.done():
                continue
            job.result()
            self._end(node)
            if links.get(node) is link:  # what was begun over another one is void
                memories = _memories(snapshot)
                for block in _blocks(self._sizes, number, copy.nodes, self._me):
                    start, stop = _range(self._sizes, block)
                    link.send_block(block, memories[block.tensor][start:stop])

    def _end(self, node: int) -> None:
        if node in self._copying:
            self._updater.snapshots.remove(self._copying.pop(node)[2])

    def close(self) -> None:
        """Wait until nothing is copied any more."""
        self._thread.shutdown()


@dataclass(slots=True)
class Receiver:
    """Takes a version, at a node that joins."""

    sizes: Sizes
    versions: tuple[Version, Version]
    _number: int = 0
    _memories: list[memoryview] = field(default_factory=list)
    _missing: set[tuple[int, Block]] = field(default_factory=set)
    _copy: Copy | None = None

    def begin(self, number: int, copy: Copy) -> None:
        """Expect copy `number`, and nothing of an earlier one."""
        self._number, self._copy = number, copy
        self._memories = _memories(self.versions[copy.state.step % 2])
        self._missing = {
            (node, block)
            for node in copy.nodes
            for block in _blocks(self.sizes, number, copy.nodes, node)
        }

    def place(self, node: int, block: Block) -> Memory:
        """Where the payload of a block belongs; see `Memory`.

        Raises:
            ProtocolError: it is not the node's to send.
        """
        if block.round != self._number:
            return WAIT if block.round > self._number else None
        if (node, block) not in self._missing:
            raise ProtocolError(f"node {node} sends {block}, which is not its to send")
        start, stop = _range(self.sizes, block)
        return self._memories[block.tensor][start:stop]

    def arrived(self, node: int, block: Block) -> int | None:
        """A block is in its place. The number of the copy, as in `Copy`, once that was the last."""
        if block.round != self._number or self._copy is None:
            return None
        self._missing.discard((node, block))
        if self._missing:
            return None
        number, self._copy = self._copy.number, None
        return number


def _memories(source: Version | Snapshot) -> list[memoryview]:
    """The bytes of every tensor of a version, in the same order on every node: those of the flat
    space first, then what is small."""
    small = [*source.scalars.values(), source.counters]
    return [_bytes(one) for one in (source.values, *source.states.values(), *small)]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")


def _blocks(sizes: Sizes, number: int, nodes: Sequence[int], sender: int) -> Iterator[Block]:
    """What `sender` contributes. The first node sends what is small, each in one block."""
    layout, num_large = sizes.layout, 1 + len(sizes.optimizer_keys)
    for chunk in layout.chunks[nodes.index(sender) :: len(nodes)]:
        size = _ELEMENT_BYTES * chunk.size
        for tensor in range(1 if chunk.group == BUFFERS else num_large):
            for offset in range(0, size, BLOCK_BYTES):
                length = min(BLOCK_BYTES, size - offset)
                yield Block(number, Stage.STATE, tensor, chunk.index, offset, length)
    if sender == nodes[0]:
        small = [8 * len(layout.chunks)] * len(sizes.scalar_keys) + [layout.counters_bytes]
        for tensor, length in enumerate(small, num_large):
            if length:
                yield Block(number, Stage.STATE, tensor, 0, 0, length)


def _range(sizes: Sizes, block: Block) -> tuple[int, int]:
    """Where a block lies within its tensor, in bytes."""
    start = block.offset
    if block.tensor <= len(sizes.optimizer_keys):
        start += _ELEMENT_BYTES * sizes.layout.chunks[block.chunk].start
    return start, start + block.length
