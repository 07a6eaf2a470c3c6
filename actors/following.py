"""A node that joins follows the others: it keeps the totals of their rounds and applies them.

Nobody waits for it. Part of the loop that owns the links, as `rounds` is for a member.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from actors.exchanging import Arrays, Round
from actors.links import Memory
from actors.rounds import COUNTERS, GivenUp, owners, round_number
from elastic.core.errors import ProtocolError
from elastic.core.layout import Layout
from elastic.core.protocol import events
from elastic.core.protocol.exchange import Arrived, Exchange
from elastic.core.protocol.frames import Block
from elastic.core.update import Plan, Updater


@dataclass(slots=True, eq=False)
class _Kept:
    """A round whose totals come in. Without a `round` there is nothing to come."""

    update: events.Update
    plan: Plan
    totals_N: torch.Tensor
    counters: torch.Tensor
    round: Round | None
    needs_counters: bool
    dropped: threading.Event = field(default_factory=threading.Event)

    @property
    def is_complete(self) -> bool:
        return self.round is None or (self.round.exchange.has_totals and not self.needs_counters)


class Following:
    """The rounds that this node observes.

    Args:
        wake: called by the thread that applies, when `turn` has something to take.
    """

    def __init__(
        self,
        updater: Updater,
        layout: Layout,
        me: int,
        wake: Callable[[], None],
    ) -> None:
        self._updater, self._layout, self._me, self._wake = updater, layout, me, wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="follow")
        self._kept: dict[int, _Kept] = {}
        self._wanted: int | None = None
        self._applying: tuple[int, Future[float]] | None = None
        self.newest_dropped = 0  # the name of a round: blocks of it are of no use

    def close(self) -> None:
        """Wait until no thread writes any more."""
        self.drop()
        self._thread.shutdown()

    def keep(self, term: int, update: events.Update, plan: Plan) -> None:
        """Take in the totals of a round from now on."""
        number, layout = round_number(term, update.round), self._layout
        kept = _Kept(
            update,
            plan,
            totals_N=torch.zeros(0 if update.skip else layout.num_elements, dtype=torch.int32),
            counters=torch.zeros(layout.counters_bytes, dtype=torch.uint8),
            round=None,
            needs_counters=layout.counters_bytes > 0,
        )
        if not update.skip:
            exchange = Exchange(
                number,
                me=self._me,
                nodes=update.nodes,
                nodes_CR=owners(layout, update.nodes),
                chunks=layout.chunks,
                observers=update.observers,
            )
            nothing = np.zeros(1, np.int32)
            arrays = Arrays(nothing, kept.totals_N.numpy(), np.zeros(1, np.float32))
            kept.round = Round(exchange, chunks=layout.chunks, links={}, arrays=arrays)
        self._kept[number] = kept

    def observes(self, number: int) -> bool:
        """Whether the blocks of a round belong here."""
        return number in self._kept

    def place(self, node: int, block: Block) -> Memory:
        """Where the payload of a block belongs. Raises ProtocolError: not the node's to send."""
        kept = self._kept[block.round]
        if block.tensor == COUNTERS and block.length == self._layout.counters_bytes:
            return kept.counters.numpy().data.cast("B")
        if kept.round is None:
            raise ProtocolError(f"node {node} sends {block} of a step without totals")
        return kept.round.place(node, block)

    def arrived(self, node: int, block: Block) -> None:
        """A block is in its place."""
        kept = self._kept.get(block.round)
        if kept is None or kept.round is None:
            return
        if block.tensor == COUNTERS:
            kept.needs_counters = False
        else:
            kept.round.handle(Arrived(node, block))
        self._apply_if_complete()

    def drop(self, number: int | None = None) -> None:
        """The round of that number, as in `Update`, was given up; None: all were.

        Nothing is written by it any more once this returns.
        """
        for name, kept in list(self._kept.items()):
            if number in (None, kept.update.round):
                kept.dropped.set()
                self.newest_dropped = max(self.newest_dropped, name)
                del self._kept[name]
        if number in (None, self._wanted):
            self._wanted = None
        if self._applying is not None and number in (None, self._applying[0]):
            self._applying[1].exception()
            self._applying = None

    def apply(self, number: int) -> None:
        """Compute the next version by that round, once its totals are complete."""
        self._wanted = number
        self._apply_if_complete()

    def turn(self) -> events.Updated | None:
        """What has been applied since. Raises whatever ended the thread."""
        if self._applying is None or not self._applying[1].done():
            return None
        (number, job), self._applying = self._applying, None
        norm = job.result()
        self._kept = {name: one for name, one in self._kept.items() if one.update.round != number}
        return events.Updated(norm, number)

    def _apply_if_complete(self) -> None:
        if self._wanted is None or self._applying is not None:
            return
        kept = next((one for one in self._kept.values() if one.update.round == self._wanted), None)
        if kept is None or not kept.is_complete:
            return
        self._wanted = None
        job = self._thread.submit(self._apply, kept)
        job.add_done_callback(lambda _: self._wake())
        self._applying = kept.update.round, job

    def _apply(self, kept: _Kept) -> float:
        """On the thread."""

        def beat(_: int) -> None:
            if kept.dropped.is_set():
                raise GivenUp

        try:
            if kept.update.skip:
                return self._updater.run(kept.plan, beat)
            return self._updater.finish(kept.plan, kept.totals_N, kept.counters, beat)
        except GivenUp:
            return 0.0
