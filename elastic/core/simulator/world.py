"""Virtual time: one queue of events, processes that die and stop, sockets that lose messages.

Nothing here knows the protocol. A stopped process defers what happens to it until it is resumed;
a dead one drops it. Everything random comes from one seeded generator.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from elastic.core.protocol.messages import Message
from elastic.core.protocol.orders import NodeMessage

Call = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Block:
    """The sum of one node's slots, for the exchange of one round of one lead's term."""

    term: int
    round: int
    entries: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a node has computed in a round: the version's digest, for the chunks that it owns, and
    the state of those that move to the receiver."""

    term: int
    round: int
    digest: int
    owned: tuple[int, ...]
    states: tuple[tuple[int, int], ...]


class EndOfFile:
    """What a socket yields when its other end is gone."""

    def __repr__(self) -> str:
        return "EndOfFile()"


END_OF_FILE = EndOfFile()
Item = Message | NodeMessage | Block | Parameters | EndOfFile


class Process:
    """Something with a pid that runs one thing at a time."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock = clock
        self.name = name
        self.pid = clock.next_pid()
        self.alive = True
        self.stopped = False
        self.inbox: deque[tuple[Connection, Item]] = deque()
        self.connections: list[Connection] = []
        self._deferred: list[Call] = []
        self._awake = False

    def after(self, delay_s: float, call: Call) -> None:
        """Have this process do something later, if it lives; if it is stopped, once resumed."""
        self.clock.push(delay_s, lambda: self._run(call))

    def wake(self, delay_s: float = 0.0) -> None:
        """Have `run` called soon. Several calls before that are one."""
        if not self._awake:
            self._awake = True
            self.after(delay_s, self._wakened)

    def run(self) -> None:
        """Do the next thing."""
        raise NotImplementedError

    def died(self) -> None:
        """Called once at the death."""

    def kill(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.clock.note(self.name, "dies")
        self._deferred.clear()
        for connection in list(self.connections):
            connection.break_off(self)
        self.died()

    def stop(self) -> None:
        self.stopped = True
        self.clock.note(self.name, "stops")

    def resume(self) -> None:
        if not self.alive or not self.stopped:
            return
        self.stopped = False
        self.clock.note(self.name, "resumes")
        deferred, self._deferred = self._deferred, []
        for call in deferred:
            self.after(0.0, call)
        self.wake()

    def _wakened(self) -> None:
        self._awake = False
        self.run()

    def _run(self, call: Call) -> None:
        if not self.alive:
            return
        if self.stopped:
            self._deferred.append(call)
        else:
            call()


class Connection:
    """A reliable, ordered socket between two processes."""

    def __init__(self, clock: Clock, opener: Process, acceptor: Process) -> None:
        self._clock = clock
        self.ends = (opener, acceptor)
        self.closed = False
        self._flying: tuple[deque[Item], deque[Item]] = (deque(), deque())
        self._last_s = [0.0, 0.0]
        opener.connections.append(self)
        acceptor.connections.append(self)

    def send(self, sender: Process, item: Item) -> None:
        """Deliver after a while, in order; nothing if either end has closed."""
        if not self.closed:
            self._fly(1 - self.ends.index(sender), item)

    def close(self, closer: Process) -> None:
        """Close in good order: what was sent before is still read, then end-of-file."""
        if self.closed:
            return
        self._fly(1 - self.ends.index(closer), END_OF_FILE)
        self._retire()

    def break_off(self, dead: Process) -> None:
        """One end died: some of what it had sent last is lost, also after a close."""
        other = 1 - self.ends.index(dead)
        flying, rng = self._flying[other], self._clock.rng
        closing = bool(flying) and flying[-1] is END_OF_FILE
        if flying and rng.random() < 0.5:
            for _ in range(rng.randint(1, len(flying))):
                self._clock.note(dead.name, "lost with it", flying.pop())
        if rng.random() < 0.5:
            self._lose_unread(self.ends[other])
        if not self.closed or (closing and (not flying or flying[-1] is not END_OF_FILE)):
            self._fly(other, END_OF_FILE)
        self._retire()

    def _lose_unread(self, reader: Process) -> None:
        mine = [entry for entry in reader.inbox if entry[0] is self]
        lost = mine[self._clock.rng.randint(0, len(mine)) :] if mine else []
        for entry in lost:
            if entry[1] is not END_OF_FILE:
                self._clock.note(reader.name, "never reads", entry[1])
                reader.inbox.remove(entry)

    def _retire(self) -> None:
        self.closed = True
        for process in self.ends:
            if self in process.connections and not process.alive:
                process.connections.remove(self)

    def _fly(self, to: int, item: Item) -> None:
        arrival_s = max(self._last_s[to], self._clock.now_s + self._clock.latency_s())
        self._last_s[to] = arrival_s
        self._flying[to].append(item)
        self._clock.push(arrival_s - self._clock.now_s, lambda: self._land(to))

    def _land(self, to: int) -> None:
        receiver = self.ends[to]
        if self._flying[to] and receiver.alive:
            receiver.inbox.append((self, self._flying[to].popleft()))
            receiver.wake()


class Link(Connection):
    """A connection between hosts. While it is cut, what is sent waits, as in TCP."""

    def __init__(self, clock: Clock, opener: Process, acceptor: Process) -> None:
        super().__init__(clock, opener, acceptor)
        self.is_cut = False
        self._held: list[tuple[int, Item]] = []

    def other(self, process: Process) -> Process:
        return self.ends[1 - self.ends.index(process)]

    def cut(self) -> None:
        self.is_cut = True

    def heal(self) -> None:
        self.is_cut = False
        held, self._held = self._held, []
        for to, item in held:
            self._fly(to, item)

    def _fly(self, to: int, item: Item) -> None:
        if self.is_cut:
            self._held.append((to, item))
        else:
            super()._fly(to, item)


class Clock:
    """The queue of events, the generator, the trace and the counts of what was seen."""

    def __init__(self, seed: int, *, trace_length: int | None = 40) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.num_events = 0
        self.seen: Counter[str] = Counter()
        self.trace: deque[tuple[float, str, str, object]] = deque(maxlen=trace_length)
        self.extra_latency_s = 0.0
        self._queue: list[tuple[float, int, Call]] = []
        self._num_pushed = 0
        self._num_pids = 0

    def push(self, delay_s: float, call: Call) -> None:
        self._num_pushed += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._num_pushed, call))

    def pop(self) -> None:
        """Let the next event happen."""
        self.now_s, _, call = heapq.heappop(self._queue)
        self.num_events += 1
        call()

    def latency_s(self) -> float:
        extra_s = self.extra_latency_s
        return self.rng.uniform(2e-5, 3e-4) + (self.rng.random() * extra_s if extra_s else 0.0)

    def note(self, who: str, what: str, thing: object = None) -> None:
        self.trace.append((self.now_s, who, what, thing))

    def next_pid(self) -> int:
        self._num_pids += 1
        return self._num_pids
