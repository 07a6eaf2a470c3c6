"""The bytes of what nodes say to each other, besides the messages that workers know.

Packed structs, and JSON for what is rare; never pickle, since it comes over a network. Bytes that
no node of ours writes are a ProtocolError.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import fields as fields_of
from enum import IntEnum
from typing import Any

import numpy as np

from elastic.core.errors import ProtocolError
from elastic.core.protocol.events import (
    Action,
    Copy,
    DropSlot,
    GiveUp,
    HangUp,
    MarkDone,
    MarkUndone,
    OpenSlot,
    SaveManifest,
    SaveMembership,
    SaveRow,
    SaveState,
    Send,
    Update,
)
from elastic.core.protocol.messages import (
    Key,
    Manifest,
    Membership,
    Message,
    State,
    decode_message,
    encode_message,
    manifest_from_bytes,
    manifest_to_bytes,
    pack_outcome,
    unpack_outcome,
)
from elastic.core.protocol.orders import (
    Ask,
    CaughtUp,
    Complete,
    Holds,
    NodeMessage,
    Order,
    Progress,
    Relayed,
    Row,
    Stalled,
)
from policies.resharding import Move


class _Kind(IntEnum):
    """The first byte; those below are of the messages that workers know."""

    ASK = 32
    ORDER = 33
    ROW = 34
    HOLDS = 35
    RELAYED = 36
    PROGRESS = 37
    COMPLETE = 38
    STALLED = 39
    CAUGHT_UP = 40


_UPDATE_FIELDS = [one.name for one in fields_of(Update) if one.name not in ("keepers", "moves")]
_TERM = struct.Struct("<BQ")
_NUMBER = struct.Struct("<I")
_COUNT = struct.Struct("<IQ")
_KEY = struct.Struct("<BQH")
_COMPLETE_BODY = struct.Struct("<Qd")
_ROUND = struct.Struct("<Q")
_STEP = struct.Struct("<Q")
_PREPARED = struct.Struct("<QI")
_COPY_HEAD = struct.Struct("<QIQ")


def encode(message: Message | NodeMessage) -> bytes:
    """The bytes of one message; their number is told by the frame around them."""
    match message:
        case Ask(term, membership):
            return _TERM.pack(_Kind.ASK, term) + membership.to_bytes()
        case Order(term, action):
            return _TERM.pack(_Kind.ORDER, term) + _pack_action(action)
        case Row(term, outcome):
            return _TERM.pack(_Kind.ROW, term) + pack_outcome(outcome)
        case Holds(term):
            return _TERM.pack(_Kind.HOLDS, term) + _pack_holds(message)
        case Relayed(term, worker, said):
            body = b"" if said is None else encode_message(said)
            return _TERM.pack(_Kind.RELAYED, term) + _NUMBER.pack(worker) + body
        case Progress(term, counts):
            pairs = b"".join(_COUNT.pack(worker, count) for worker, count in counts.items())
            return _TERM.pack(_Kind.PROGRESS, term) + pairs
        case Complete(term, number, grad_norm):
            return _TERM.pack(_Kind.COMPLETE, term) + _COMPLETE_BODY.pack(number, grad_norm)
        case Stalled(term, number):
            return _TERM.pack(_Kind.STALLED, term) + _ROUND.pack(number)
        case CaughtUp(term, step):
            return _TERM.pack(_Kind.CAUGHT_UP, term) + _STEP.pack(step)
    return encode_message(message)


def decode(data: bytes) -> Message | NodeMessage:
    """The message of `encode`.

    Raises:
        ProtocolError: the bytes are no message of ours.
    """
    if not data or data[0] < _Kind.ASK:
        return decode_message(data)
    try:
        tag, term = _TERM.unpack_from(data)
        return _decode(tag, term, data[_TERM.size :])
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise ProtocolError(f"not a message: {data[:32]!r} ({error})") from error


def _decode(tag: int, term: int, body: bytes) -> NodeMessage:
    match tag:
        case _Kind.ASK:
            return Ask(term, Membership.from_bytes(body))
        case _Kind.ORDER:
            return Order(term, _unpack_action(body))
        case _Kind.ROW:
            return Row(term, unpack_outcome(body)[0])
        case _Kind.HOLDS:
            return _unpack_holds(term, body)
        case _Kind.RELAYED:
            (worker,) = _NUMBER.unpack_from(body)
            said = body[_NUMBER.size :]
            return Relayed(term, worker, decode_message(said) if said else None)
        case _Kind.PROGRESS:
            return Progress(term, dict(_COUNT.iter_unpack(body)))
        case _Kind.COMPLETE:
            return Complete(term, *_COMPLETE_BODY.unpack(body))
        case _Kind.STALLED:
            return Stalled(term, *_ROUND.unpack(body))
        case _Kind.CAUGHT_UP:
            return CaughtUp(term, *_STEP.unpack(body))
    raise ValueError(f"kind {tag}")


def _pack_holds(holds: Holds) -> bytes:
    parts = [
        holds.state.to_bytes(),
        _PREPARED.pack(holds.prepared, holds.checksum),
        _pack_chunks(holds.kept),
        _pack_chunks(holds.next_kept),
    ]
    for worker, manifest in holds.manifests.items():
        parts.append(_NUMBER.pack(worker) + manifest_to_bytes(manifest))
    return _pack_parts(parts)


def _pack_parts(parts: Iterable[bytes]) -> bytes:
    return b"".join(_NUMBER.pack(len(part)) + part for part in parts)


def _unpack_parts(body: bytes) -> list[bytes]:
    parts, at = [], 0
    while at < len(body):
        (length,) = _NUMBER.unpack_from(body, at)
        at += _NUMBER.size
        if length > len(body) - at:
            raise ValueError(f"{length} bytes are said to follow, {len(body) - at} do")
        parts.append(body[at : at + length])
        at += length
    return parts


def _unpack_holds(term: int, body: bytes) -> Holds:
    state, prepared, kept, next_kept, *entries = _unpack_parts(body)
    word, checksum = _PREPARED.unpack(prepared)
    manifests = {
        _NUMBER.unpack_from(entry)[0]: _manifest(entry[_NUMBER.size :]) for entry in entries
    }
    return Holds(
        term,
        State.from_bytes(state),
        word,
        manifests,
        _unpack_chunks(kept),
        _unpack_chunks(next_kept),
        checksum,
    )


def _pack_chunks(chunks: frozenset[int]) -> bytes:
    return np.packbits(np.isin(np.arange(max(chunks, default=-1) + 1), list(chunks))).tobytes()


def _unpack_chunks(body: bytes) -> frozenset[int]:
    return frozenset(np.flatnonzero(np.unpackbits(np.frombuffer(body, np.uint8))).tolist())


def _manifest(data: bytes) -> Manifest:
    manifest = manifest_from_bytes(data)
    if manifest is None:
        raise ValueError("no manifest")
    return manifest


def _pack_micro_batches(micro_batches: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(micro_batches)}H", *micro_batches)


def _unpack_micro_batches(body: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(body) // 2}H", body)


def _pack_action(action: Action) -> bytes:
    match action:
        case Send(worker, message):
            return b"S" + _NUMBER.pack(worker) + encode_message(message)
        case SaveRow(worker, outcome):
            return b"R" + _NUMBER.pack(worker) + pack_outcome(outcome)
        case SaveManifest(worker, manifest):
            return b"M" + _NUMBER.pack(worker) + manifest_to_bytes(manifest)
        case OpenSlot(worker):
            return b"O" + _NUMBER.pack(worker)
        case DropSlot(worker):
            return b"D" + _NUMBER.pack(worker)
        case HangUp(worker):
            return b"H" + _NUMBER.pack(worker)
        case MarkDone(micro_batches, key):
            return b"+" + _KEY.pack(*key) + _pack_micro_batches(micro_batches)
        case MarkUndone(micro_batches):
            return b"-" + _pack_micro_batches(micro_batches)
        case SaveMembership(membership):
            return b"G" + membership.to_bytes()
        case SaveState(state):
            return b"C" + state.to_bytes()
        case Update():
            return b"U" + _pack_update(action)
        case GiveUp(number):
            return b"X" + _ROUND.pack(number)
        case Copy():
            return b"J" + _pack_copy(action)
    raise ProtocolError(f"{type(action).__name__} is no order")


def _pack_update(update: Update) -> bytes:
    """JSON, and arrays of what may be long."""
    fields = {name: getattr(update, name) for name in _UPDATE_FIELDS}
    widths = [len(nodes) for nodes in update.keepers]
    moves = [(one.chunk, one.sender, one.receiver) for one in update.moves]
    arrays = (widths, [node for nodes in update.keepers for node in nodes], moves)
    head = json.dumps(fields, separators=(",", ":")).encode()
    return _pack_parts([head, *(np.array(one, np.uint32).tobytes() for one in arrays)])


def _unpack_update(body: bytes) -> Update:
    head, *arrays = _unpack_parts(body)
    fields: dict[str, Any] = json.loads(head)
    for name in ("nodes", "exponents", "observers", "coefficients", "limits"):
        fields[name] = tuple(fields[name])
    fields["slots"] = tuple((worker, half) for worker, half in fields["slots"])
    widths, nodes, moves = (np.frombuffer(part, np.uint32) for part in arrays)
    bounds = np.cumsum(widths)
    if len(nodes) != (bounds[-1] if len(bounds) else 0):
        raise ValueError(f"{len(nodes)} keepers")
    flat, stops = nodes.tolist(), bounds.tolist()
    fields["keepers"] = tuple(
        tuple(flat[stop - width : stop]) for stop, width in zip(stops, widths.tolist(), strict=True)
    )
    fields["moves"] = tuple(Move(*move) for move in moves.reshape(-1, 3).tolist())
    return Update(**fields)


def _pack_copy(copy: Copy) -> bytes:
    head = _COPY_HEAD.pack(copy.number, copy.node, copy.step)
    return head + struct.pack(f"<{len(copy.senders)}I", *copy.senders)


def _unpack_copy(body: bytes) -> Copy:
    number, node, step = _COPY_HEAD.unpack_from(body)
    num = (len(body) - _COPY_HEAD.size) // _NUMBER.size
    return Copy(number, node, step, struct.unpack_from(f"<{num}I", body, _COPY_HEAD.size))


def _of_worker(make: Callable[[int, bytes], Action]) -> Callable[[bytes], Action]:
    def unpack(body: bytes) -> Action:
        (worker,) = _NUMBER.unpack_from(body)
        return make(worker, body[_NUMBER.size :])

    return unpack


def _unpack_done(body: bytes) -> MarkDone:
    key = Key(*_KEY.unpack_from(body))
    return MarkDone(_unpack_micro_batches(body[_KEY.size :]), key)


_UNPACK: dict[bytes, Callable[[bytes], Action]] = {
    b"S": _of_worker(lambda worker, rest: Send(worker, decode_message(rest))),
    b"R": _of_worker(lambda worker, rest: SaveRow(worker, unpack_outcome(rest)[0])),
    b"M": _of_worker(lambda worker, rest: SaveManifest(worker, _manifest(rest))),
    b"O": _of_worker(lambda worker, _: OpenSlot(worker)),
    b"D": _of_worker(lambda worker, _: DropSlot(worker)),
    b"H": _of_worker(lambda worker, _: HangUp(worker)),
    b"+": _unpack_done,
    b"-": lambda body: MarkUndone(_unpack_micro_batches(body)),
    b"G": lambda body: SaveMembership(Membership.from_bytes(body)),
    b"C": lambda body: SaveState(State.from_bytes(body)),
    b"U": _unpack_update,
    b"X": lambda body: GiveUp(*_ROUND.unpack(body)),
    b"J": _unpack_copy,
}


def _unpack_action(body: bytes) -> Action:
    return _UNPACK[body[:1]](body[1:])
