"""What nodes say survives its bytes, and bytes that say nothing of ours are refused."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.core.errors import ProtocolError
from elastic.core.protocol.events import (
    Copy,
    DropSlot,
    GiveUp,
    HangUp,
    MarkDone,
    MarkUndone,
    Note,
    OpenSlot,
    SaveManifest,
    SaveMembership,
    SaveRow,
    SaveState,
    Send,
    Update,
)
from elastic.core.protocol.messages import (
    Commit,
    Key,
    Lease,
    Manifest,
    Membership,
    Message,
    Outcome,
    Report,
    State,
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
from elastic.core.protocol.wire import decode, encode
from policies.resharding import Move

TERM = 2**63
KEY = Key(0, 70_000, 3)
OUTCOME = Outcome(7, 1.5, 2.0, bytes(16), bytes(8), np.array([1.0, np.inf], np.float32), (0.25,))
MEMBERSHIP = Membership(
    4, (3, 9), (1,), 12, 2, nodes=(2, 0), former=(1,), joining=(3,), departing=(0,)
)
STATE = State(70_000, 3, (4, -9), samples="ab", loss=0.1, first_loss=float("nan"), metrics=(1.5,))
MANIFEST = Manifest(KEY, 1, (0, 5))
COMMIT = Commit(Lease(KEY, (7,)), 1, 2, (OUTCOME,))
ORDERS = (
    Send(9, COMMIT),
    OpenSlot(9),
    DropSlot(9),
    HangUp(9),
    SaveRow(9, OUTCOME),
    SaveManifest(9, MANIFEST),
    MarkDone((1, 2), KEY),
    MarkUndone(()),
    SaveMembership(MEMBERSHIP),
    SaveState(STATE),
    Update(
        5,
        (2, 0),
        70_000,
        ((9, 1),),
        (4, -9),
        0.1 + 0.2,
        60_000,
        skip=True,
        keepers=((2, 0), (0,)),
        moves=(Move(1, 0, 2),),
        observers=(3, 4),
        coefficients=(-(2**31) - 7,),
        limits=(2**31 - 1, 0),
    ),
    GiveUp(5),
    Copy(2**40, 3, 70_000, (2, 0, 2)),
)
MESSAGES: tuple[Message | NodeMessage, ...] = (
    *(Order(TERM, action) for action in ORDERS),
    Ask(TERM, MEMBERSHIP),
    Row(TERM, OUTCOME),
    Holds(TERM, STATE, KEY.word, {9: MANIFEST, 10: Manifest(KEY)}),
    Holds(TERM, STATE, KEY.word, {}, frozenset({0, 8, 70_000}), frozenset({15})),
    Relayed(TERM, 9, COMMIT),
    Relayed(TERM, 9, None),
    Progress(TERM, {9: 2**40, 10: 0}),
    Complete(TERM, 5, 0.1 + 0.2),
    Stalled(TERM, 5),
    CaughtUp(TERM, 70_000),
    Report(3, MEMBERSHIP, (3,), node=2, leads=False, gone=(0,), ready=(3,), free=(0,)),
)


def name(message: Message | NodeMessage) -> str:
    return type(message.action if isinstance(message, Order) else message).__name__


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_a_message_survives_its_bytes(message: Message | NodeMessage) -> None:
    again = decode(encode(message))
    assert type(again) is type(message)
    assert str(again) == str(message)
    assert encode(again) == encode(message)


def test_numbers_come_through_to_the_last_bit() -> None:
    (update,) = (one for one in ORDERS if isinstance(one, Update))
    again = decode(encode(Order(TERM, update)))
    assert isinstance(again, Order)
    assert again.action == update


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_what_is_cut_short_is_refused_or_says_less(message: Message | NodeMessage) -> None:
    """Never another error: what comes over a network must not end the process."""
    data = encode(message)
    for length in range(len(data)):
        try:
            decode(data[:length])
        except ProtocolError:
            continue


@settings(max_examples=2000, deadline=None)
@given(st.binary(min_size=1, max_size=80), st.integers(0, 60))
def test_no_bytes_raise_anything_else(body: bytes, kind: int) -> None:
    with contextlib.suppress(ProtocolError):
        decode(bytes([kind]) + body)


@given(st.frozensets(st.integers(0, 200)), st.frozensets(st.integers(0, 200)))
def test_which_chunks_are_kept_comes_through(
    kept: frozenset[int], next_kept: frozenset[int]
) -> None:
    again = decode(encode(Holds(TERM, STATE, 0, {}, kept, next_kept)))
    assert isinstance(again, Holds)
    assert (again.kept, again.next_kept) == (kept, next_kept)


def test_a_length_beyond_the_end_takes_no_memory() -> None:
    with pytest.raises(ProtocolError, match="4294967295 bytes are said to follow, 0 do"):
        decode(encode(Holds(TERM, STATE, 0, {}))[:9] + b"\xff\xff\xff\xff")


def test_what_is_no_order_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="Note is no order"):
        encode(Order(TERM, Note("fault", "what no other node must know")))
