"""The worker's side of the step, without I/O.

    IDLE ──lease──▶ COMPUTING ──computed──────────▶ ENCODING ──encoded, asks──▶ IDLE
                        │                               ▲
                        └─last answer out─▶ HOLDING ────┘ answered

From anywhere: given up ──▶ IDLE, dismissed ──▶ ENDED.

It computes the next micro-batch while the answer about the last one is out, but writes into its
slot only once that answer is in: only then is it known which half is spare. It holds nothing
that matters: everything it forgets is leased again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from elastic.core.errors import ProtocolError
from elastic.core.protocol.messages import (
    NO_DIGEST,
    Combine,
    Commit,
    Dismiss,
    Granted,
    Hello,
    Lease,
    Leases,
    Manifest,
    Message,
    Outcome,
    Refused,
    Release,
    Revoke,
    Welcome,
)


class Phase(Enum):
    IDLE = auto()
    COMPUTING = auto()
    HOLDING = auto()
    ENCODING = auto()
    ENDED = auto()


_MOVES = {
    Phase.IDLE: {Phase.COMPUTING, Phase.ENDED},
    Phase.COMPUTING: {Phase.IDLE, Phase.HOLDING, Phase.ENCODING, Phase.ENDED},
    Phase.HOLDING: {Phase.IDLE, Phase.ENCODING, Phase.ENDED},
    Phase.ENCODING: {Phase.IDLE, Phase.ENDED},
    Phase.ENDED: set(),
}

# Events beside the aggregator's messages


@dataclass(frozen=True, slots=True)
class Connected:
    """The socket to the acting aggregator is open."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The socket reached end-of-file: the aggregator is gone; another may come."""


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    lease: Lease
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The computation was given up: its lease had gone stale or was granted to another."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Encoded:
    """The sum of the live half and the computed gradient is in the spare half.

    `digest` is that of the gradient as it was added, if it is audited.
    """

    digest: bytes = NO_DIGEST


Event = (
    Connected
    | Disconnected
    | Computed
    | Abandoned
    | Encoded
    | Welcome
    | Leases
    | Revoke
    | Granted
    | Refused
    | Dismiss
)

# Actions


@dataclass(frozen=True, slots=True)
class Send:
    message: Message


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute the gradients; answer with Computed or Abandoned."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Encode:
    """Write (`base` half, or nothing) + gradient into `half`; answer with Encoded.

    If it is coded: into both halves as one, to what is there if there is a `base`.
    """

    lease: Lease
    half: int
    base: int | None


@dataclass(frozen=True, slots=True)
class Exit:
    reason: str


Action = Send | Compute | Encode | Exit


Words = Sequence[int]
"""Of each model, the word of the key that runs now, as shared memory says."""


class Worker:
    """One worker, for all models of the job. Each has a slot of its own."""

    def __init__(self, worker: int, pid: int) -> None:
        self.worker = worker
        self.phase = Phase.IDLE
        self._pid = pid
        self._connected = False
        self._welcome: set[int] = set()
        self._queue: deque[Lease] = deque()
        self._current: Lease | None = None
        self._outcomes: tuple[Outcome, ...] = ()
        self._asked: Commit | None = None
        self._live: dict[int, Manifest] = {}
        self._encoded_on: Manifest | None = None
        self._round = 0

    def handle(self, event: Event, words: Words, round_word: int = 0) -> list[Action]:
        """Take one event; return what to do, in order. `round_word`: the round that runs now."""
        self._round = round_word
        actions = self._react(event, words)
        if self.phase is Phase.IDLE:
            actions += self._begin_next(words)
        return actions

    def _react(self, event: Event, words: Words) -> list[Action]:
        match event:
            case Connected():
                self._connected = True
                has_slot = bool(self._live)
                return [Send(Hello(self.worker, self._pid, has_slot, self._holding()))]
            case Disconnected():
                self._connected = False
                self._welcome.clear()
            case Welcome(manifest):
                return self._welcomed(manifest, words)
            case Leases(leases):
                self._queue.extend(leases)
            case Revoke(lease):
                if lease in self._queue:
                    self._queue.remove(lease)
            case Granted(lease, half):
                if self._asked is not None and self._asked.lease == lease:
                    self._granted(lease, half)
                    return self._answered(words)
            case Refused(lease):
                if self._asked is not None and self._asked.lease == lease:
                    return self._answered(words)
            case Computed(lease, outcomes):
                self._expect(Phase.COMPUTING, lease)
                self._outcomes = outcomes
                return self._computed(words)
            case Abandoned(lease):
                if self.phase is not Phase.ENCODING:
                    self._expect(Phase.COMPUTING, lease)
                return self._give_up()
            case Encoded(digest):
                self._expect(Phase.ENCODING, self._current)
                self._outcomes = tuple(replace(one, digest=digest) for one in self._outcomes)
                return self._ask()
            case Dismiss(reason):
                self._move(Phase.ENDED)
                return [Exit(reason)]
        return []

    def _begin_next(self, words: Words) -> list[Action]:
        stale = [lease for lease in self._queue if self._is_past(lease, words)]
        actions: list[Action] = []
        if stale and self._connected:
            self._queue = deque(one for one in self._queue if not self._is_past(one, words))
            actions.append(Send(Release(tuple(stale))))
        if self._queue and not self._is_past(self._queue[0], words):
            self._current = self._queue.popleft()
            self._move(Phase.COMPUTING)
            actions.append(Compute(self._current))
        return actions

    def _is_past(self, lease: Lease, words: Words) -> bool:
        """Whether it is not worth beginning. What is computed already may still count."""
        return _is_stale(lease, words) or lease.round not in (0, self._round)

    def _computed(self, words: Words) -> list[Action]:
        assert self._current is not None
        if _is_stale(self._current, words):
            return self._give_up()
        if self._asked is not None:
            if self.phase is not Phase.HOLDING:
                self._move(Phase.HOLDING)
            return []
        if self._current.combine not in (Combine.SUM, Combine.CODED):
            return self._ask()
        base = self._encoded_on = self._base(self._current)
        self._move(Phase.ENCODING)
        half = _spare_half(self._current, base)
        return [Encode(self._current, half, base.half if base.micro_batches else None)]

    def _ask(self) -> list[Action]:
        lease = self._current
        assert lease is not None
        assert self._asked is None, "one question at a time"
        base = self._base(lease)
        if self._encoded_on is not None:  # a welcome may have told of another one since
            base, self._encoded_on = self._encoded_on, None
        half = _spare_half(lease, base)
        self._asked = Commit(lease, half, len(base.micro_batches), self._outcomes)
        self._current, self._outcomes = None, ()
        self._move(Phase.IDLE)
        # before the welcome: that sends it, so that one computation is one question
        return [Send(self._asked)] if lease.key.model in self._welcome else []

    def _granted(self, lease: Lease, half: int) -> None:
        base = self._base(lease)
        if not set(lease.micro_batches) <= set(base.micro_batches):  # else the welcome said so
            self._live[lease.key.model] = base.added(lease, half)

    def _answered(self, words: Words) -> list[Action]:
        self._asked = None
        return self._computed(words) if self.phase is Phase.HOLDING else []

    def _give_up(self) -> list[Action]:
        lease, self._current, self._outcomes = self._current, None, ()
        self._encoded_on = None
        assert lease is not None
        self._move(Phase.IDLE)
        # while disconnected the lease is simply forgotten: Hello will not name it
        return [Send(Release((lease,)))] if self._connected else []

    def _welcomed(self, manifest: Manifest, words: Words) -> list[Action]:
        model = manifest.key.model
        self._welcome.add(model)
        self._live[model] = manifest
        if self._asked is None or self._asked.lease.key.model != model:
            return []
        if not _is_stale(self._asked.lease, words):
            return [Send(self._asked)]  # granted before, it is answered the same way again
        lease = self._asked.lease
        return [Send(Release((lease,))), *self._answered(words)]

    def _base(self, lease: Lease) -> Manifest:
        """What counts in the slot already for the key of `lease`."""
        live = self._live.get(lease.key.model)
        return live if live is not None and live.key == lease.key else Manifest(lease.key)

    def _holding(self) -> tuple[Lease, ...]:
        asked = (self._asked.lease,) if self._asked is not None else ()
        current = (self._current,) if self._current is not None else ()
        return asked + current + tuple(self._queue)

    def _expect(self, phase: Phase, lease: Lease | None) -> None:
        if self.phase is not phase or lease != self._current:
            raise ProtocolError(f"worker {self.worker} is {self.phase} with {self._current}")

    def _move(self, phase: Phase) -> None:
        if phase not in _MOVES[self.phase]:
            raise ProtocolError(f"worker {self.worker}: illegal move {self.phase} -> {phase}")
        self.phase = phase


def _is_stale(lease: Lease, words: Words) -> bool:
    return words[lease.key.model] != lease.key.word


def _spare_half(lease: Lease, base: Manifest) -> int:
    """Where the sum goes. What is coded grows in place: it counts only once all of it is there."""
    is_first = not base.micro_batches or lease.combine is Combine.CODED
    return 0 if is_first else 1 - base.half
