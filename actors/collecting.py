"""The state of chunks on its way to a checkpoint: from those who keep them to the node that writes.

Everybody sends out of a snapshot, and the node that writes receives into one: training goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from actors.links import WAIT, Link, Memory
from elastic.core.errors import ProtocolError
from elastic.core.mapped import Sizes, Version
from elastic.core.protocol.events import Copy
from elastic.core.protocol.exchange import BLOCK_BYTES
from elastic.core.protocol.frames import Block, Stage
from elastic.core.update import Snapshot, Updater, tensors_of


class Sender:
    """Sends this node's share of the state to whoever writes a checkpoint.

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
        mine = [chunk for chunk, sender in enumerate(copy.senders) if sender == self._me]
        if link is None or not mine:
            return
        link.discard_blocks(lambda block: block.stage is Stage.STATE)
        index = copy.step % 2
        snapshot = Snapshot(self._sizes, index, self._versions[index], mine, self._wake)
        assert not snapshot.missing, f"chunks {sorted(snapshot.missing)[:8]} are not kept here"
        self._updater.held.append(snapshot)
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
                memories = tensors_of(snapshot)
                for block in _blocks(self._sizes, number, copy, self._me):
                    start = _start(self._sizes, block)
                    link.send_block(block, memories[block.tensor][start : start + block.length])

    def _end(self, node: int) -> None:
        if node in self._copying:
            self._updater.held.remove(self._copying.pop(node)[2])

    def close(self) -> None:
        """Wait until nothing is copied any more."""
        self._thread.shutdown()


@dataclass(slots=True)
class Receiver:
    """Takes what is missing from a snapshot, at the node that writes the checkpoint.

    What still comes of a copy that has failed is dropped.
    """

    sizes: Sizes
    _number: int = 0
    _missing: dict[int, set[Block]] = field(default_factory=dict)
    _left: Counter[int] = field(default_factory=Counter)
    _into: tuple[Snapshot, list[memoryview]] | None = None

    def begin(self, number: int, copy: Copy, snapshot: Snapshot, links: Mapping[int, Link]) -> None:
        """Expect copy `number`, and nothing of an earlier one."""
        self.fail("another checkpoint was begun")
        self._number, self._into = number, (snapshot, tensors_of(snapshot))
        self._missing = {
            node: set(_blocks(self.sizes, number, copy, node))
            for node in {*copy.senders} - {copy.node}
        }
        self._left = Counter(block.chunk for blocks in self._missing.values() for block in blocks)
        for node in self._missing.keys() - links.keys():
            self.lost(node)

    def lost(self, node: int) -> None:
        """The link to that node broke: what it has not sent will not come."""
        if self._missing.get(node):
            self.fail(f"node {node} was lost")

    def fail(self, problem: str) -> None:
        """Expect nothing any more, if anything was expected."""
        if self._into is not None:
            self._into[0].fail(problem)
            self._into = None

    def place(self, node: int, block: Block) -> Memory:
        """Where the payload of a block belongs; see `Memory`.

        Raises:
            ProtocolError: it is not the node's to send.
        """
        if block.round != self._number:
            return WAIT if block.round > self._number else None
        if block not in self._missing.get(node, ()):
            raise ProtocolError(f"node {node} sends {block}, which is not its to send")
        if self._into is None:
            return None
        start = _start(self.sizes, block)
        return self._into[1][block.tensor][start : start + block.length]

    def arrived(self, node: int, block: Block) -> None:
        """A block is in its place."""
        if block.round != self._number or self._into is None:
            return
        self._missing[node].discard(block)
        self._left[block.chunk] -= 1
        if not self._left[block.chunk]:
            del self._left[block.chunk]
            self._into[0].received(block.chunk)
        if not self._left:
            self._into = None


def _blocks(sizes: Sizes, number: int, copy: Copy, sender: int) -> Iterator[Block]:
    """What `sender` contributes: the state of its chunks, not their parameters."""
    for chunk in sizes.layout.chunks:
        if copy.senders[chunk.index] != sender:
            continue
        for tensor, size in enumerate(sizes.lengths(chunk)):
            for offset in range(0, size if tensor else 0, BLOCK_BYTES):
                length = min(BLOCK_BYTES, size - offset)
                yield Block(number, Stage.STATE, tensor, chunk.index, offset, length)


def _start(sizes: Sizes, block: Block) -> int:
    """Where a block lies within its tensor, in bytes."""
    return sizes.start_byte(block.tensor, sizes.layout.chunks[block.chunk]) + block.offset
