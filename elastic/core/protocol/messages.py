"""What worker, aggregator and coordinator say to each other, and what is kept in shared memory.

Plain values and their bytes. Frequent messages are packed structs, rare ones JSON; never pickle,
since they cross sockets. Nothing here decides anything.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from elastic.core.errors import ProtocolError
from policies.owning import SlowLink

NO_DIGEST = bytes(16)


class Combine(IntEnum):
    """How the micro-batches of a lease are combined in the slot."""

    SUM = 0
    MAXIMA = 1  # nothing is written: only the maxima are wanted
    EVALUATE = 2  # forward only, on held-out samples; nothing is written
    CODED = 3  # times a coefficient, in the numbers that both halves are together


class Key(NamedTuple):
    """Which redoing of which step of which model. Later keys are larger."""

    model: int
    step: int
    attempt: int

    @property
    def word(self) -> int:
        """The key as 8 bytes for shared memory; 0 is no key."""
        return (self.model << 56 | self.step << 16 | self.attempt) + 1


def step_of_job(model: int, step: int, num_models: int) -> int:
    """Which step of the job a step of one of several models is: they are trained in turn."""
    return step * num_models + model


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to compute: (model, step, attempt, set of micro-batches, how to combine).

    `audits`: only the answer is wanted, to compare it; what it says counts already, for another.
    `coefficient`: what the gradient is multiplied with, if it is coded. `round`, if it is not 0:
    what is not done in that round of the job is another's, or is leased anew.
    """

    key: Key
    micro_batches: tuple[int, ...]
    combine: Combine = Combine.SUM
    audits: bool = False
    coefficient: int = 1
    round: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a worker reports of one micro-batch; the gradient itself is in the slot.

    `samples` and `counters` are digests of the sample indices and of the raw counters after it.
    `metrics` are sums, in the order of the names in the model's spec. Times are seconds of this
    node's monotonic clock. `digest` is that of the rounded gradient, if the answer is audited.
    """

    micro_batch: int
    loss_sum: float
    weight: float
    samples: bytes
    counters: bytes
    maxima_C: npt.NDArray[np.float32]
    metrics: tuple[float, ...] = ()
    start_s: float = 0.0
    end_s: float = 0.0
    digest: bytes = NO_DIGEST

    @property
    def finite(self) -> bool:
        values = (self.loss_sum, self.weight)
        return bool(np.isfinite(values).all() and np.isfinite(self.maxima_C).all())


@dataclass(frozen=True, slots=True)
class Manifest:
    """What counts in a slot: these micro-batches of this key, summed in that half."""

    key: Key
    half: int = 0
    micro_batches: tuple[int, ...] = ()

    def added(self, lease: Lease, half: int) -> Manifest:
        """The manifest after `lease` was granted, its sum being in `half`."""
        mine = self.micro_batches if self.key == lease.key else ()
        return Manifest(lease.key, half, mine + lease.micro_batches)


@dataclass(frozen=True, slots=True)
class State:
    """The commit record: what the job is, besides the tensors of version `step % 2`.

    `exponents` is None until the first pass over the maxima. `samples` is a running digest of
    (step, micro-batch, sample indices) of all committed steps. `loss` and `metrics` are those of
    the newest committed step. `evaluated` is the newest step at which the model was evaluated:
    before the first training attempt of that step. `dropped` counts micro-batches that steps under
    an inexact policy ended without. `model` is its number in a job of several.
    """

    step: int
    attempt: int
    exponents: tuple[int, ...] | None
    samples: str = ""
    evaluated: int = 0
    num_updates: int = 0
    overflows: int = 0
    skipped: tuple[int, ...] = ()
    loss: float | None = None
    first_loss: float | None = None
    metrics: tuple[float, ...] = ()
    exact: bool = True
    dropped: int = 0
    model: int = 0

    @property
    def key(self) -> Key:
        return Key(self.model, self.step, self.attempt)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        fields = json.loads(data)
        if fields["exponents"] is not None:
            fields["exponents"] = tuple(fields["exponents"])
        tuples = {name: tuple(fields[name]) for name in ("skipped", "metrics")}
        return cls(**{**fields, **tuples})


_MEMBERSHIP_TUPLES = ("members", "leaving", "nodes", "former", "joining", "departing")


@dataclass(frozen=True, slots=True)
class Membership:
    """Who may commit. `leaving` finish what they hold; worker ids are never used again.

    `nodes` take part in the step, the first of them leads: it is the home of every micro-batch.
    `former` ones did: what their memory holds counts no more, and their numbers never come back.
    `joining` ones receive parameters; `departing` ones are among `nodes` until they hold nothing.
    """

    generation: int = 0
    members: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()
    next_worker: int = 0
    target: int = 0
    target_nodes: int = 0
    nodes: tuple[int, ...] = (0,)
    former: tuple[int, ...] = ()
    joining: tuple[int, ...] = ()
    departing: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Membership:
        return cls.from_json(json.loads(data))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Membership:
        tuples = {name: tuple(fields[name]) for name in _MEMBERSHIP_TUPLES}
        return cls(**{**fields, **tuples})


# Worker -> aggregator


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a worker on a new socket: what it holds already.

    `has_slot`: it was welcomed before, so it maps a slot that must still be the same file.
    """

    worker: int
    pid: int
    has_slot: bool = False
    holding: tuple[Lease, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """May this count? `half` holds the sum of `num_base` earlier micro-batches and this lease."""

    lease: Lease
    half: int
    num_base: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """The worker gives these leases back uncomputed."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Leave:
    """The worker's machine takes it away soon: it wants to finish what it holds and go."""

    reason: str


# Aggregator -> worker


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to Hello: what the aggregator knows to count in the worker's slot."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Leases:
    """Compute these, in this order, after what you hold."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Revoke:
    """Forget this lease if you have not begun with it."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Granted:
    """The commit of `lease` counts: `half` is live now. Also the answer to a repeated question."""

    lease: Lease
    half: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The commit of `lease` does not count: the spare half may be overwritten."""

    lease: Lease
    reason: str


@dataclass(frozen=True, slots=True)
class Dismiss:
    """You are no member any more: end."""

    reason: str


# Coordinator <-> aggregator


@dataclass(frozen=True, slots=True)
class Report:
    """What the coordinator must know, sent whenever it changes.

    `node` says it, and `leads` the step or not. `gone`: members that it cannot reach. `ready`:
    joining nodes that are at most one step behind. `free`: departing ones that hold nothing of the
    running step, and no state that is nowhere else.
    """

    step: int
    membership: Membership
    connected: tuple[int, ...]
    hung: tuple[tuple[int, str], ...] = ()
    wants_leave: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    finished: bool = False
    failure: str = ""
    node: int = 0
    leads: bool = True
    gone: tuple[int, ...] = ()
    ready: tuple[int, ...] = ()
    free: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Admit:
    """The new membership."""

    membership: Membership


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish the step, write a checkpoint, end the job.

    `failed`: the step cannot be finished. `at_once`: there is no time to finish it.
    """

    reason: str
    failed: bool = False
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Peers:
    """Where the aggregators of all nodes listen: node, IP address, port."""

    addresses: tuple[tuple[int, str, int], ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """A request to the coordinator: that many more (or fewer) workers; or one named to go."""

    delta: int
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class ProbeLink:
    """A request to measure the link to `peer`: see `policies.preflight`."""

    peer: int


@dataclass(frozen=True, slots=True)
class ProbedLink:
    """The answer: what went from `node` to `peer`, and how fast."""

    node: int
    peer: int
    round_trip_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Look:
    """A request for a Pulse, by whoever watches the job. One at a time: nothing piles up.

    `slow`: the links over which less is to go, as long as every one says so.
    """

    slow: tuple[SlowLink, ...] = ()


class LinkCount(NamedTuple):
    """What a node counts of its connection to `peer`, since that is open.

    `sent`: bytes that the peer has acknowledged; `busy_s`: time in which there were any on their
    way; `send_wait_s`: in which the kernel took no more; `receive_wait_s`: in which a message had
    begun and its next bytes did not come.
    """

    peer: int
    sent: int = 0
    busy_s: float = 0.0
    send_wait_s: float = 0.0
    receive_wait_s: float = 0.0


class CutCount(NamedTuple):
    """How often a node gave its link to `peer` up since nothing came of it; how often of these the
    peer's kernel had not acknowledged what it was sent, either."""

    peer: int
    num: int
    unanswered: int = 0


class HostCount(NamedTuple):
    """What the kernel of a host counts: seconds until `at_s` of its clock.

    `steal_s` is of a processor, on average; `memory_s`, `disk_s`: some task stood still for it.
    `kills`: for lack of memory.
    """

    at_s: float
    steal_s: float
    memory_s: float
    disk_s: float
    kills: int


class GpuCount(NamedTuple):
    """What the driver of a graphics card says, at `at_s` of the host's clock. None: nothing of it.

    `utilisation`: share of time, 0 to 1; `memory`, `memory_used`: bytes. `throttled_s`: time in
    which heat or its power supply held the card back. `ecc_errors`: of its memory, uncorrected;
    `xid`: the driver's newest error, 0: none; `faults`: how many of those were the card's own.
    """

    number: int
    at_s: float
    utilisation: float | None = None
    memory_used: int | None = None
    memory: int | None = None
    celsius: float | None = None
    watts: float | None = None
    throttled_s: float | None = None
    ecc_errors: int | None = None
    xid: int | None = None
    faults: int = 0


class CopiesDigest(NamedTuple):
    """What a node keeps in the version of `step`: the digest of each chunk."""

    step: int
    digests: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the counters of a node say now. Nothing that the protocol decides depends on it.

    `progress`: of each worker here, its progress word, which moves within a micro-batch, too.
    `holding` is said by the lead only: who holds work, on whatever node, and whether it has
    completed any. `cuts`: of the nodes to which the link was given up here. `copies`: the newest.
    """

    node: int
    step: int
    progress: tuple[tuple[int, int], ...] = ()
    holding: tuple[tuple[int, bool], ...] | None = None
    links: tuple[LinkCount, ...] = ()
    host: HostCount | None = None
    cuts: tuple[CutCount, ...] = ()
    gpus: tuple[GpuCount, ...] = ()
    copies: CopiesDigest | None = None


Message = (
    Hello
    | Commit
    | Release
    | Leave
    | Welcome
    | Leases
    | Revoke
    | Granted
    | Refused
    | Dismiss
    | Report
    | Admit
    | Stop
    | Peers
    | Scale
    | ProbeLink
    | ProbedLink
    | Look
    | Pulse
)

_LEASE = struct.Struct("<BQHBIH")
_COEFFICIENT = struct.Struct("<q")
_OUTCOME = struct.Struct("<Hdd16s8sdd16sHH")
_AUDITS = 0x80  # beside how to combine
_COMMIT, _GRANTED, _REFUSED, _LEASES, _RELEASE, _REVOKE, _JSON, _PULSE = range(1, 9)
_RARE: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(Hello, Leave, Welcome, Dismiss, Report, Admit, Stop, Peers, Scale),
        *(ProbeLink, ProbedLink, Look),
    )
}
MAX_MESSAGE_BYTES = 1 << 20


def pack_outcome(outcome: Outcome) -> bytes:
    """An outcome as bytes: a row of the control file, or a part of a message."""
    head = _OUTCOME.pack(
        outcome.micro_batch,
        outcome.loss_sum,
        outcome.weight,
        outcome.samples,
        outcome.counters,
        outcome.start_s,
        outcome.end_s,
        outcome.digest,
        len(outcome.metrics),
        len(outcome.maxima_C),
    )
    metrics = struct.pack(f"<{len(outcome.metrics)}d", *outcome.metrics)
    return head + metrics + np.ascontiguousarray(outcome.maxima_C, np.float32).tobytes()


def unpack_outcome(data: bytes, start: int = 0) -> tuple[Outcome, int]:
    """The outcome at `start`, and where the next thing begins."""
    *values, num_metrics, num_chunks = _OUTCOME.unpack_from(data, start)
    at = start + _OUTCOME.size
    metrics = struct.unpack_from(f"<{num_metrics}d", data, at)
    at += 8 * num_metrics
    maxima_C = np.frombuffer(data, np.float32, num_chunks, at)
    micro_batch, loss_sum, weight, samples, counters, start_s, end_s, digest = values
    outcome = Outcome(
        micro_batch,
        loss_sum,
        weight,
        samples,
        counters,
        maxima_C,
        metrics=metrics,
        start_s=start_s,
        end_s=end_s,
        digest=digest,
    )
    return outcome, at + 4 * num_chunks


def _pack_lease(lease: Lease) -> bytes:
    num = len(lease.micro_batches)
    how = lease.combine | (_AUDITS if lease.audits else 0)
    head = _LEASE.pack(*lease.key, how, lease.round, num)
    body = head + struct.pack(f"<{num}H", *lease.micro_batches)
    return body + _COEFFICIENT.pack(lease.coefficient) if lease.combine is Combine.CODED else body


def _unpack_lease(data: bytes, start: int) -> tuple[Lease, int]:
    model, step, attempt, how, number, num = _LEASE.unpack_from(data, start)
    at = start + _LEASE.size
    micro_batches = struct.unpack_from(f"<{num}H", data, at)
    at += 2 * num
    key, combine = Key(model, step, attempt), Combine(how & ~_AUDITS)
    lease = Lease(key, micro_batches, combine, bool(how & _AUDITS), round=number)
    if combine is not Combine.CODED:
        return lease, at
    (coefficient,) = _COEFFICIENT.unpack_from(data, at)
    return replace(lease, coefficient=coefficient), at + _COEFFICIENT.size


def _unpack_leases(data: bytes, start: int) -> tuple[Lease, ...]:
    leases = []
    while start < len(data):
        lease, start = _unpack_lease(data, start)
        leases.append(lease)
    return tuple(leases)


def encode_message(message: Message) -> bytes:
    """The bytes of one message; its length is the datagram's."""
    match message:
        case Commit(lease, half, num_base, outcomes):
            head = struct.pack("<BBH", _COMMIT, half, num_base)
            return head + _pack_lease(lease) + b"".join(map(pack_outcome, outcomes))
        case Granted(lease, half):
            return struct.pack("<BB", _GRANTED, half) + _pack_lease(lease)
        case Refused(lease, reason):
            return bytes([_REFUSED]) + _pack_lease(lease) + reason.encode()
        case Leases(leases):
            return bytes([_LEASES]) + b"".join(map(_pack_lease, leases))
        case Release(leases):
            return bytes([_RELEASE]) + b"".join(map(_pack_lease, leases))
        case Revoke(lease):
            return bytes([_REVOKE]) + _pack_lease(lease)
        case Pulse(node, step, progress, holding, links, host, cuts, gpus, copies):
            told = json.dumps((node, step, progress, holding, links, host, cuts, gpus, copies))
            return bytes([_PULSE]) + told.encode()
        case _:
            body = {"kind": type(message).__name__, **asdict(message)}
            return bytes([_JSON]) + json.dumps(body).encode()


def decode_message(data: bytes) -> Message:
    """The message of `encode_message`.

    Raises:
        ProtocolError: the bytes are no message of ours.
    """
    try:
        return _decode(data)
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise ProtocolError(f"not a message: {data[:32]!r} ({error})") from error


def _decode(data: bytes) -> Message:
    kind = data[0]
    if kind == _COMMIT:
        _, half, num_base = struct.unpack_from("<BBH", data)
        lease, at = _unpack_lease(data, 4)
        outcomes = []
        for _ in lease.micro_batches:
            outcome, at = unpack_outcome(data, at)
            outcomes.append(outcome)
        return Commit(lease, half, num_base, tuple(outcomes))
    if kind == _GRANTED:
        return Granted(_unpack_lease(data, 2)[0], data[1])
    if kind == _REFUSED:
        lease, at = _unpack_lease(data, 1)
        return Refused(lease, data[at:].decode())
    if kind == _LEASES:
        return Leases(_unpack_leases(data, 1))
    if kind == _RELEASE:
        return Release(_unpack_leases(data, 1))
    if kind == _REVOKE:
        return Revoke(_unpack_lease(data, 1)[0])
    if kind == _PULSE:
        return _pulse(*json.loads(data[1:]))
    if kind != _JSON:
        raise ValueError(f"kind {kind}")
    body = json.loads(data[1:])
    if not isinstance(body, dict):
        raise ValueError("not an object")
    return _from_json(body)


def _pulse(
    node: int,
    step: int,
    progress: list[Any],
    holding: list[Any] | None,
    links: list[Any],
    host: Any,
    cuts: list[Any],
    gpus: list[Any],
    copies: Any,
) -> Pulse:
    return Pulse(
        node,
        step,
        tuple((worker, count) for worker, count in progress),
        None if holding is None else tuple((worker, bool(done)) for worker, done in holding),
        tuple(LinkCount(*one) for one in links),
        None if host is None else HostCount(*host),
        tuple(CutCount(*one) for one in cuts),
        tuple(GpuCount(*one) for one in gpus),
        None if copies is None else _copies(*copies),
    )


def _copies(step: int, digests: list[Any]) -> CopiesDigest:
    return CopiesDigest(step, tuple((chunk, digest) for chunk, digest in digests))


def _from_json(body: dict[str, Any]) -> Message:
    kind = _RARE[body.pop("kind")]
    if kind is Hello:
        holding = tuple(
            Lease(
                Key(*one["key"]),
                tuple(one["micro_batches"]),
                Combine(one["combine"]),
                one["audits"],
                one["coefficient"],
                one["round"],
            )
            for one in body["holding"]
        )
        return Hello(body["worker"], body["pid"], body["has_slot"], holding)
    if kind is Welcome:
        manifest = body["manifest"]
        return Welcome(
            Manifest(Key(*manifest["key"]), manifest["half"], tuple(manifest["micro_batches"]))
        )
    if kind in (Report, Admit):
        body["membership"] = Membership.from_json(body["membership"])
    if kind is Report:
        for name in ("connected", "wants_leave", "lost", "gone", "ready", "free"):
            body[name] = tuple(body[name])
        body["hung"] = tuple((worker, reason) for worker, reason in body["hung"])
    if kind is Peers:
        body["addresses"] = tuple((node, host, port) for node, host, port in body["addresses"])
    if kind is Look:
        body["slow"] = tuple(SlowLink(*one) for one in body["slow"])
    message: Message = kind(**body)
    return message


def manifest_to_bytes(manifest: Manifest) -> bytes:
    return struct.pack("<B", manifest.half) + _pack_lease(
        Lease(manifest.key, manifest.micro_batches)
    )


def manifest_from_bytes(data: bytes | None) -> Manifest | None:
    if not data:
        return None
    lease, _ = _unpack_lease(data, 1)
    return Manifest(lease.key, data[0], lease.micro_batches)
