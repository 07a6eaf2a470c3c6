"""A node's part in the updates that all nodes compute together: one round at a time.

    add up the slots ──▶ exchange the sums ──▶ totals of all chunks ──▶ the next version
     (threads)            (the loop)                                     (threads)

The loop that owns the links owns this, too; threads tell it by `wake` that there is something to
take. There is one thread: what it still writes of a round that was given up is overwritten by the
next one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from actors.exchanging import Arrays, Left, Round
from actors.links import WAIT, Link, Memory
from elastic.core.layout import Layout
from elastic.core.mapped import Version
from elastic.core.protocol.exchange import Arrived, Exchange, RoundComplete, SumReady, Updated
from elastic.core.protocol.frames import MAX_BLOCK_BYTES, Block, Stage
from elastic.core.update import Plan, Updater

T = TypeVar("T")

MAX_COUNTERS_BYTES = MAX_BLOCK_BYTES
"""Of a model's integer buffers: they go to the other nodes in one block."""

COUNTERS = 1
"""In place of the tensor of a block: it holds the integer buffers, not a total."""

_ROUND_BITS = 22


def round_number(term: int, number: int) -> int:
    """A number for the blocks of a round: no two are alike, and later ones are greater."""
    return (term << _ROUND_BITS) + number


def owners(layout: Layout, nodes: Sequence[int]) -> npt.NDArray[np.integer]:
    """The owner of each chunk, and behind it all other nodes: (chunks, nodes)."""
    at = np.arange(len(layout.chunks))[:, None] + np.arange(len(nodes))
    return np.take(np.array(nodes), at % len(nodes))


@dataclass(slots=True, eq=False)
class _Running:
    """The round that is under way."""

    number: int
    plan: Plan
    round: Round
    counters: torch.Tensor
    needs_counters: bool
    given_up: threading.Event = field(default_factory=threading.Event)
    is_finishing: bool = False


class Rounds:
    """The rounds of one node, in memory of its own beside the store.

    Args:
        wake: called by threads when `turn` has something to take.
    """

    def __init__(
        self,
        updater: Updater,
        versions: tuple[Version, Version],
        layout: Layout,
        me: int,
        wake: Callable[[], None],
    ) -> None:
        self._updater, self._versions, self._layout = updater, versions, layout
        self._me, self._wake = me, wake
        num = layout.num_elements
        self._sums_N = torch.zeros(num, dtype=torch.int32)
        self._totals_N = torch.zeros(num, dtype=torch.int32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="round")
        self._ready: deque[tuple[_Running, int]] = deque()
        self._job: Future[None] | None = None
        self._end: Future[float] | None = None
        self._running: _Running | None = None
        self._last = 0

    def close(self) -> None:
        """Wait until no thread writes any more."""
        self.give_up()
        self._thread.shutdown()

    def settle(self) -> None:
        """Give up, and wait until nothing of any round is written any more."""
        self.give_up()
        self._thread.submit(_nothing).result()

    def begin(
        self,
        number: int,
        plan: Plan,
        *,
        nodes: Sequence[int],
        observers: Sequence[int],
        links: Mapping[int, Link],
        counters: torch.Tensor | None,
    ) -> None:
        """Begin round `number`.

        Args:
            plan: its slots are those of this node.
            nodes: all that take part, in the order of the membership.
            observers: who gets the totals besides.
            counters: the model's integer buffers after the step, if this node is the one that
                tells the others.
        """
        self.give_up()
        layout = self._layout
        exchange = Exchange(
            number,
            me=self._me,
            nodes=nodes,
            nodes_CR=owners(layout, nodes),
            chunks=layout.chunks,
            observers=observers,
        )
        others = {*nodes, *observers} - {self._me}
        present = {node: links[node] for node in others if node in links}
        values_N = self._versions[1 - plan.source].values
        arrays = Arrays(self._sums_N.numpy(), self._totals_N.numpy(), values_N.numpy())
        round = Round(
            exchange, chunks=layout.chunks, links=present, arrays=arrays, observers=observers
        )
        self._running = running = _Running(
            number,
            plan,
            round,
            counters=torch.zeros(layout.counters_bytes, dtype=torch.uint8)
            if counters is None
            else counters.clone(),
            needs_counters=counters is None and layout.counters_bytes > 0,
        )
        if counters is not None and layout.counters_bytes:
            block = self._counters_block(number)
            for link in present.values():
                link.send_block(block, running.counters.numpy().data)
        self._job = self._submit(self._add_up, running, exchange.order())

    def pass_over(self, number: int) -> None:
        """Blocks of that round, and of older ones, are of no use any more."""
        self._last = max(self._last, number)

    def place(self, node: int, block: Block) -> Memory:
        """Where the payload of a block belongs; see `Memory`.

        Raises:
            ProtocolError: it is not the node's to send.
        """
        running = self._running
        if running is None or block.round != running.number:
            newest = self._last if running is None else running.number
            return WAIT if block.round > newest else None
        if block == self._counters_block(running.number) and running.needs_counters:
            return running.counters.numpy().data.cast("B")
        return running.round.place(node, block)

    def _counters_block(self, number: int) -> Block:
        return Block(number, Stage.TOTAL, COUNTERS, 0, 0, self._layout.counters_bytes)

    def arrived(self, node: int, block: Block) -> None:
        """A block is in its place."""
        running = self._running
        if running is None or block.round != running.number:
            return
        if block.tensor == COUNTERS:
            running.needs_counters = False
        else:
            running.round.handle(Arrived(node, block))
        self._finish_if_complete(running)

    def turn(self) -> float | None:
        """Take what the threads have done; the norm of the gradient if the round is complete.

        Raises whatever ended a thread.
        """
        if self._job is not None and self._job.done():
            self._job.result()
            self._job = None
        while self._ready:
            begun, index = self._ready.popleft()
            if begun is self._running:
                begun.round.handle(SumReady(index))
                self._finish_if_complete(begun)
        running, end = self._running, self._end
        if running is None or end is None or not end.done():
            return None
        self._end = None
        left: list[Left] = []
        for chunk in self._layout.chunks:
            left += running.round.handle(Updated(chunk.index))
        assert isinstance(left[-1], RoundComplete), "every chunk is updated on every node"
        self._last, self._running = running.number, None
        return end.result()

    def give_up(self) -> None:
        """Stop the round that is under way, if one is."""
        running, self._running = self._running, None
        if running is None:
            return
        running.given_up.set()
        running.round.give_up()
        self._last = running.number
        self._end = None
        self._ready.clear()

    def _finish_if_complete(self, running: _Running) -> None:
        complete = running.round.exchange.has_totals and not running.needs_counters
        if complete and not running.is_finishing:
            running.is_finishing = True
            self._end = self._submit(self._finish, running)

    def _submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        """Do it on the thread, and wake the loop once it is done."""
        future = self._thread.submit(work, *args)
        future.add_done_callback(lambda _: self._wake())
        return future

    # ------------------------------------------------------------- on threads

    def _add_up(self, running: _Running, order: Sequence[int]) -> None:
        def ready(chunk: int) -> None:
            if running.given_up.is_set():
                raise GivenUp
            self._ready.append((running, chunk))
            self._wake()

        try:
            self._updater.add_up(running.plan, self._sums_N, order, ready)
        except GivenUp:
            return

    def _finish(self, running: _Running) -> float:
        def beat(_: int) -> None:
            if running.given_up.is_set():
                raise GivenUp

        try:
            return self._updater.finish(running.plan, self._totals_N, running.counters, beat)
        except GivenUp:
            return 0.0


def _nothing() -> None:
    """Done once all that the thread was given before is."""


class GivenUp(Exception):
    """Leaves the work of a round that nobody waits for."""
