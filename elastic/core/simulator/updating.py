"""What the process of a node does of a round: adds up, exchanges, updates what it keeps, receives.

Decides nothing that the protocol decides. Digests take the place of numbers: a chunk's parameters
and its state are right iff they have the digest of their version.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from elastic.core.protocol.events import Update, Updated
from elastic.core.simulator.invariants import Sum
from elastic.core.simulator.world import Block, Parameters

if TYPE_CHECKING:
    from elastic.core.simulator.aggregator_process import AggregatorProcess

Name = tuple[int, int]  # the term of a lead, and the number of a round


class Updating:
    """The rounds of one process. At most one is under way."""

    def __init__(self, process: AggregatorProcess) -> None:
        self._process = process
        self._sums: dict[Name, dict[int, Block]] = {}
        self._parameters: dict[Name, dict[int, Parameters]] = {}
        self._name: Name = (0, 0)
        self._update: Update | None = None
        self._sum: Sum | None = None
        self._model = 0

    def begin(self, name: Name, update: Update, model: int) -> None:
        """Begin a round; the process is busy until its slots are added."""
        process = self._process
        memory, job, clock = process.machine.memories[model], process.job, process.clock
        self._model = model
        observes = process.node in update.observers
        workers = set() if observes else process.machine.workers
        self._name, self._update = name, update
        self._sum = Sum(memory, job.truths[model], update, workers, observes=observes)
        seconds = clock.rng.uniform(0.004, 0.012)
        if observes:
            self._go_on()
            return
        process.busy = True
        job.point(process, "Update", "during", seconds)
        process.after(seconds, partial(self._summed, self._sum))

    def give_up(self, number: int) -> None:
        if self._update is not None and self._update.round == number:
            self._process.clock.seen["round given up"] += 1
            self._update = self._sum = None

    def heard(self, node: int, item: Block | Parameters) -> None:
        """Something of a round came from another node, maybe before the round began here."""
        name = item.term, item.round
        if isinstance(item, Block):
            self._sums.setdefault(name, {})[node] = item
        else:
            self._parameters.setdefault(name, {})[node] = item
        self._go_on()

    def _summed(self, running: Sum) -> None:
        """The own slots are added: the other nodes need the sum."""
        process, update = self._process, self._update
        process.busy = False
        if self._sum is running and update is not None:
            own = Block(*self._name, running.own())
            self._sums.setdefault(self._name, {})[process.node] = own
            if not update.skip:
                self._send({*update.nodes}, own)
            self._go_on()
        process.wake()

    def _send(self, nodes: set[int], item: Block | Parameters) -> None:
        for peer in sorted(nodes - {self._process.node}):
            if peer in self._process.links:
                self._process.links[peer].send(self._process, item)

    def _go_on(self) -> None:
        process, update, running = self._process, self._update, self._sum
        if running is None or update is None or process.busy:
            return
        if update.skip:
            running.carry()
            self._end(update)
            return
        sums = self._sums.get(self._name, {})
        if self._node in update.nodes and not running.is_updated:
            if not sums.keys() >= set(update.nodes):
                return
            running.add([sums[one].entries for one in update.nodes], self._node)
            self._release(update, running)
        received = self._parameters.get(self._name, {})
        owners = {nodes[0] for nodes in update.keepers} | {one.sender for one in update.moves}
        if received.keys() >= owners - {self._node}:
            running.receive([received[one] for one in sorted(owners - {self._node})], self._node)
            self._end(update)

    def _release(self, update: Update, running: Sum) -> None:
        """Send the parameters of own chunks to all, and the state of those that move."""
        owned = tuple(c for c, nodes in enumerate(update.keepers) if nodes[0] == self._node)
        for peer in {*update.nodes, *update.observers} - {self._node}:
            moved = [
                (one.chunk, running.states[one.chunk])
                for one in update.moves
                if one.sender == self._node and one.receiver == peer
            ]
            self._process.clock.seen["state moved"] += len(moved)
            item = Parameters(*self._name, running.digest, owned, tuple(moved))
            self._send({peer}, item)

    def _end(self, update: Update) -> None:
        self._update = self._sum = None
        self._process.hear(Updated(round=update.round), self._model)

    @property
    def _node(self) -> int:
        return self._process.node
