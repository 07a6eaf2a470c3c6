"""A node's part in the updates that all nodes compute together: one round at a time.

    add up the slots ──▶ exchange the sums ──▶ the gradient of the chunks that this node keeps
     (threads)            (the loop)                 (threads)        │
                                                          norms go to all nodes
                                                                      ▼
    the next version ◀── the parameters of all other chunks ◀── update those chunks
                          (the loop)                             (threads)

The loop that owns the links owns this, too; threads tell it by `wake` that there is something to
take. There is one thread: what it still writes of a round that was given up is overwritten by the
next one. A node that joins observes: all that it does is receive.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from actors.exchanging import Arrays, Left, Round
from actors.links import WAIT, Link, Memory, Traffic
from elastic.core.errors import ProtocolError
from elastic.core.mapped import Sizes, Version, bytes_of
from elastic.core.protocol import events
from elastic.core.protocol.exchange import Arrived, Exchange, RoundComplete, SumReady, Updated
from elastic.core.protocol.frames import BEHIND, MAX_BLOCK_BYTES, Block, Stage
from elastic.core.update import Plan, Updater, tensors_of

T = TypeVar("T")

MAX_COUNTERS_BYTES = MAX_BLOCK_BYTES
"""Of a model's integer buffers: they go to the other nodes in one block."""

COUNTERS = 1
"""In place of the tensor of a block: it holds the integer buffers, not a total."""

SQUARES = 2
"""It holds the squares of the norms of the sender's own chunks, in their order, as float64."""

_ROUND_BITS = 22
_LEAST_BYTES = 1 << 20  # with less a link's speed is not known


def round_number(term: int, number: int) -> int:
    """A number for the blocks of a round: no two are alike, and later ones are greater."""
    return (term << _ROUND_BITS) + number


@dataclass(slots=True, eq=False)
class _Running:
    """The round that is under way. `squares` are of the nodes that own chunks, this one's too."""

    number: int
    update: events.Update
    plan: Plan
    round: Round
    counters: torch.Tensor
    needs_counters: bool
    squares: dict[int, torch.Tensor]
    needs_squares: set[int]
    given_up: threading.Event = field(default_factory=threading.Event)
    taking: Future[dict[int, float]] | None = None
    has_told: bool = False
    stepping: Future[float] | None = None
    is_complete: bool = False
    before: dict[int, Traffic] = field(default_factory=dict)


class Rounds:
    """The rounds of one node, in memory of its own beside the store.

    Args:
        wake: called by threads when `turn` has something to take.
    """

    def __init__(
        self,
        updater: Updater,
        versions: tuple[Version, Version],
        sizes: Sizes,
        me: int,
        wake: Callable[[], None],
    ) -> None:
        self._updater, self._versions, self._sizes = updater, versions, sizes
        self._me, self._wake = me, wake
        num = sizes.layout.num_elements
        self._sums_N = torch.zeros(num, dtype=torch.int32)
        self._totals_N = torch.zeros(num, dtype=torch.int32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="round")
        self._ready: deque[tuple[_Running, SumReady | Updated]] = deque()
        self._job: Future[None] | None = None
        self._running: _Running | None = None
        self._speeds: dict[int, float] = {}
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
        term: int,
        update: events.Update,
        plan: Plan,
        *,
        links: Mapping[int, Link],
        counters: torch.Tensor | None,
    ) -> None:
        """Begin a round, as a member or as one that observes.

        Args:
            plan: its slots are those of this node.
            counters: the model's integer buffers after the step, if this node is the one that
                tells the others.
        """
        self.give_up()
        number, sizes = round_number(term, update.round), self._sizes
        layout = sizes.layout
        exchange = Exchange(
            number,
            me=self._me,
            nodes=update.nodes,
            keepers=update.keepers,
            lengths=[sizes.lengths(chunk) for chunk in layout.chunks],
            moves=update.moves,
            observers=update.observers,
        )
        missing = {*exchange.kept} - self._versions[plan.source].kept_chunks
        assert not missing, f"chunks {sorted(missing)[:8]} are to be updated without their state"
        others = {*update.nodes, *update.observers} - {self._me}
        present = {node: links[node] for node in others if node in links}
        for node in present.keys() & set(update.observers):
            present[node].discard_blocks(lambda block: _is_older(block, number))
        tensors = tensors_of(self._versions[1 - plan.source])
        arrays = Arrays(self._sums_N.numpy(), self._totals_N.numpy(), tensors)
        owned = {node: len(chunks) for node, chunks in exchange.owned.items()}
        self._running = running = _Running(
            number,
            update,
            plan,
            Round(exchange, sizes=sizes, links=present, arrays=arrays, observers=update.observers),
            counters=torch.zeros(layout.counters_bytes, dtype=torch.uint8)
            if counters is None
            else counters.clone(),
            needs_counters=counters is None and layout.counters_bytes > 0,
            squares={one: torch.zeros(num, dtype=torch.float64) for one, num in owned.items()},
            needs_squares={one for one, num in owned.items() if num and one != self._me},
            before={node: link.traffic for node, link in present.items()},
        )
        if counters is not None and layout.counters_bytes:
            self._send_all(running, COUNTERS, running.counters)
        if self._me not in update.observers:
            self._job = self._submit(self._add_up, running, exchange.order(self._speeds))
        self._go_on(running)

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
        if block.stage is Stage.TOTAL and block.tensor:
            return self._place_small(running, node, block)
        version = 1 - running.plan.source
        if block.stage is Stage.PARAMETERS and self._updater.is_held(version, block.chunk):
            return WAIT
        return running.round.place(node, block)

    def _place_small(self, running: _Running, node: int, block: Block) -> Memory:
        """What all nodes know of a step."""
        memory = memoryview(b"")
        if block.tensor == COUNTERS and running.needs_counters:
            memory = bytes_of(running.counters)
        elif block.tensor == SQUARES and node in running.needs_squares:
            memory = bytes_of(running.squares[node])
        if not memory or block != self._small(running, block.tensor, len(memory)):
            raise ProtocolError(f"node {node} sends {block}, which is not its to send")
        return memory

    def _small(self, running: _Running, tensor: int, length: int) -> Block:
        return Block(running.number, Stage.TOTAL, tensor, 0, 0, length)

    def _send_all(self, running: _Running, tensor: int, numbers: torch.Tensor) -> None:
        payload = bytes_of(numbers)
        for node, link in running.round.links.items():
            if tensor == COUNTERS or node in running.update.nodes:
                link.send_block(self._small(running, tensor, len(payload)), payload)

    def arrived(self, node: int, block: Block) -> None:
        """A block is in its place."""
        running = self._running
        if running is None or block.round != running.number:
            return
        if block.stage is not Stage.TOTAL or not block.tensor:
            self._handle(running, Arrived(node, block))
        elif block.tensor == COUNTERS:
            running.needs_counters = False
        else:
            running.needs_squares.discard(node)
        self._go_on(running)

    def turn(self) -> float | None:
        """Take what the threads have done; the norm of the gradient if the round is complete.

        Raises whatever ended a thread.
        """
        if self._job is not None and self._job.done():
            self._job.result()
            self._job = None
        while self._ready:
            begun, event = self._ready.popleft()
            if begun is self._running:
                self._handle(begun, event)
        running = self._running
        if running is None:
            return None
        self._go_on(running)
        if not running.is_complete or running.needs_counters:
            return None
        norm = 0.0
        if self._me not in running.update.observers:
            if running.stepping is None or not running.stepping.done():
                return None
            norm = running.stepping.result()
        self._updater.seal(running.plan, running.update.kept_by(self._me), running.counters)
        self._last, self._running = running.number, None
        self._measure(running)
        return norm

    def _measure(self, running: _Running) -> None:
        """How fast the links took what was sent: the next round begins with the slow ones."""
        speeds = {}
        for node, link in running.round.links.items():
            before, now = running.before[node], link.traffic
            num_bytes, sending_s = (
                now.bytes_out - before.bytes_out,
                now.sending_s - before.sending_s,
            )
            if num_bytes > _LEAST_BYTES and sending_s > 0:
                speeds[node] = num_bytes / sending_s
        self._speeds = {**self._speeds, **speeds}

    def give_up(self) -> None:
        """Stop the round that is under way, if one is."""
        running, self._running = self._running, None
        if running is None:
            return
        running.given_up.set()
        running.round.give_up()
        self._last = running.number
        self._ready.clear()

    def _handle(self, running: _Running, event: Arrived | SumReady | Updated) -> None:
        left: list[Left] = running.round.handle(event)
        running.is_complete |= any(isinstance(one, RoundComplete) for one in left)

    def _go_on(self, running: _Running) -> None:
        """Begin what can be begun on the thread now."""
        exchange = running.round.exchange
        if self._me in running.update.observers:
            return
        if running.taking is None:
            if exchange.has_totals:
                running.taking = self._submit(self._take, running, exchange.kept)
            return
        if running.stepping is not None or not running.taking.done():
            return
        if not running.has_told:
            running.has_told = True
            taken, own = running.taking.result(), running.squares[self._me]
            for at, chunk in enumerate(exchange.owned[self._me]):
                own[at] = taken.get(chunk, 0.0)
            if len(own):
                self._send_all(running, SQUARES, own)
        if not running.needs_squares:
            running.stepping = self._submit(self._step, running)

    def _submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        """Do it on the thread, and wake the loop once it is done."""
        future = self._thread.submit(work, *args)
        future.add_done_callback(lambda _: self._wake())
        return future

    # ------------------------------------------------------------- on threads

    def _tell(self, running: _Running, event: SumReady | Updated) -> None:
        if running.given_up.is_set():
            raise _GivenUp
        self._ready.append((running, event))
        self._wake()

    def _add_up(self, running: _Running, order: Sequence[int]) -> None:
        def ready(chunk: int) -> None:
            self._tell(running, SumReady(chunk))

        try:
            self._updater.add_up(running.plan, self._sums_N, order, ready)
        except _GivenUp:
            return

    def _take(self, running: _Running, chunks: Sequence[int]) -> dict[int, float]:
        def beat(_: int) -> None:
            if running.given_up.is_set():
                raise _GivenUp

        try:
            return self._updater.take(running.plan, self._totals_N, chunks, beat)
        except _GivenUp:
            return {}

    def _step(self, running: _Running) -> float:
        exchange = running.round.exchange
        squares = {
            chunk: square
            for node, theirs in running.squares.items()
            for chunk, square in zip(exchange.owned[node], theirs.tolist(), strict=True)
        }
        owned = exchange.owned[self._me]  # others wait for them
        chunks = [*owned, *sorted(set(exchange.kept) - set(owned))]

        def done(chunk: int) -> None:
            self._tell(running, Updated(chunk))

        try:
            return self._updater.step(running.plan, squares, chunks, done)
        except _GivenUp:
            return 0.0


def _is_older(block: Block, number: int) -> bool:
    """Whether it is of an earlier round: whoever has not got it yet needs it no more."""
    return block.stage not in BEHIND and block.round < number


def _nothing() -> None:
    """Done once all that the thread was given before is."""


class _GivenUp(Exception):
    """Leaves the work of a round that nobody waits for."""
