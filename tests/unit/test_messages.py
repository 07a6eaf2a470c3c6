"""Every message survives its bytes; what is no message is refused."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic.core.errors import ProtocolError
from elastic.core.layout import make_layout
from elastic.core.mapped import Sizes
from elastic.core.protocol.messages import (
    Admit,
    Combine,
    Commit,
    CopiesDigest,
    CutCount,
    Dismiss,
    GpuCount,
    Granted,
    Hello,
    HostCount,
    Key,
    Lease,
    Leases,
    Leave,
    LinkCount,
    Look,
    Manifest,
    Membership,
    Message,
    Outcome,
    Peers,
    ProbedLink,
    ProbeLink,
    Pulse,
    Refused,
    Release,
    Report,
    Revoke,
    Scale,
    State,
    Stop,
    Welcome,
    decode_message,
    encode_message,
    manifest_from_bytes,
    manifest_to_bytes,
    pack_outcome,
    unpack_outcome,
)
from policies.owning import SlowLink

WORDS = st.integers(0, 2**64 - 1)
SHORTS = st.integers(0, 2**16 - 1)
IDS = st.integers(0, 2**40)
SETS = st.lists(IDS, max_size=5).map(tuple)
SECONDS = st.floats(0, 1e9)
TEXT = st.text(max_size=30)
DOUBLES = st.floats(allow_nan=True)
KEYS = st.builds(Key, st.integers(0, 255), st.integers(0, 2**40 - 1), SHORTS)
MICRO_BATCHES = st.lists(SHORTS, max_size=4).map(tuple)
LEASES = st.builds(Lease, KEYS, MICRO_BATCHES, st.sampled_from(Combine))
HALVES = st.integers(0, 1)
MAXIMA = st.lists(st.floats(width=32), max_size=5).map(lambda one: np.array(one, np.float32))
OUTCOMES = st.builds(
    Outcome,
    SHORTS,
    DOUBLES,
    DOUBLES,
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=8, max_size=8),
    MAXIMA,
    start_s=st.floats(0, 1e9),
    end_s=st.floats(0, 1e9),
)
MEMBERSHIPS = st.builds(Membership, IDS, SETS, SETS, IDS, IDS)
REPORTS = st.builds(
    Report,
    IDS,
    MEMBERSHIPS,
    SETS,
    hung=st.lists(st.tuples(IDS, TEXT), max_size=2).map(tuple),
    wants_leave=SETS,
    lost=SETS,
    finished=st.booleans(),
    failure=TEXT,
)


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    outcomes = tuple(draw(st.lists(OUTCOMES, max_size=3)))
    lease = Lease(draw(KEYS), tuple(one.micro_batch for one in outcomes), draw(HALVES_COMBINE))
    return Commit(lease, draw(HALVES), draw(SHORTS), outcomes)


CARDS = st.builds(
    GpuCount,
    IDS,
    SECONDS,
    *(st.none() | one for one in (SECONDS, IDS, IDS, SECONDS, SECONDS, SECONDS, IDS, IDS)),
    IDS,
)
HALVES_COMBINE = st.sampled_from(Combine)
MESSAGES: dict[type, st.SearchStrategy[Any]] = {
    Hello: st.builds(Hello, IDS, IDS, st.booleans(), st.lists(LEASES, max_size=3).map(tuple)),
    Commit: commits(),
    Release: st.builds(Release, st.lists(LEASES, max_size=3).map(tuple)),
    Leave: st.builds(Leave, TEXT),
    Welcome: st.builds(Welcome, st.builds(Manifest, KEYS, HALVES, MICRO_BATCHES)),
    Leases: st.builds(Leases, st.lists(LEASES, max_size=3).map(tuple)),
    Revoke: st.builds(Revoke, LEASES),
    Granted: st.builds(Granted, LEASES, HALVES),
    Refused: st.builds(Refused, LEASES, TEXT),
    Dismiss: st.builds(Dismiss, TEXT),
    Report: REPORTS,
    Admit: st.builds(Admit, MEMBERSHIPS),
    Stop: st.builds(Stop, TEXT, st.booleans(), st.booleans()),
    Peers: st.builds(
        Peers, st.lists(st.tuples(IDS, TEXT, st.integers(0, 65535)), max_size=3).map(tuple)
    ),
    Scale: st.builds(Scale, st.integers(-9, 9), st.none() | IDS),
    ProbeLink: st.builds(ProbeLink, IDS),
    ProbedLink: st.builds(ProbedLink, IDS, IDS, SECONDS, SECONDS),
    Look: st.builds(
        Look,
        st.lists(st.builds(SlowLink, IDS, st.none() | IDS, SECONDS), max_size=3).map(tuple),
    ),
    Pulse: st.builds(
        Pulse,
        IDS,
        IDS,
        st.lists(st.tuples(IDS, WORDS), max_size=3).map(tuple),
        st.none() | st.lists(st.tuples(IDS, st.booleans()), max_size=3).map(tuple),
        st.lists(st.builds(LinkCount, IDS, IDS, SECONDS, SECONDS, SECONDS), max_size=3).map(tuple),
        st.none() | st.builds(HostCount, SECONDS, SECONDS, SECONDS, SECONDS, IDS),
        st.lists(st.builds(CutCount, IDS, IDS, IDS), max_size=3).map(tuple),
        st.lists(CARDS, max_size=3).map(tuple),
        st.none()
        | st.builds(CopiesDigest, IDS, st.lists(st.tuples(IDS, IDS), max_size=3).map(tuple)),
    ),
}


def plain(value: Any) -> Any:
    """Comparable: arrays as bytes, floats as their bits, types by name."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tobytes())
    if isinstance(value, float):
        return np.float64(value).tobytes()
    if dataclasses.is_dataclass(value):
        fields = [plain(getattr(value, one.name)) for one in dataclasses.fields(value)]
        return (type(value).__name__, *fields)
    if isinstance(value, tuple):
        return (type(value).__name__, *map(plain, value))
    return (type(value).__name__, value)


def test_the_list_of_messages_is_complete() -> None:
    assert set(MESSAGES) == set(get_args(Message))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_survives_its_bytes(kind: type) -> None:
    @settings(max_examples=25, deadline=None)
    @given(MESSAGES[kind])
    def check(message: Message) -> None:
        data = encode_message(message)
        assert isinstance(data, bytes)
        assert data
        assert plain(decode_message(data)) == plain(message)

    check()


ONE = Lease(Key(0, 7, 1), (3,))
OUTCOME = Outcome(3, 1.5, 2.0, b"s" * 16, b"c" * 8, np.ones(4, np.float32), (0.5, 7.0))
SAMPLES: list[Message] = [
    Commit(ONE, 1, 2, (OUTCOME,)),
    Granted(ONE, 0),
    Refused(ONE, ""),
    Leases((ONE, ONE)),
    Release((ONE,)),
    Revoke(ONE),
    Hello(1, 2, False, (ONE,)),
    Report(0, Membership(), ()),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda one: type(one).__name__)
def test_a_message_cut_short_is_refused(message: Message) -> None:
    data = encode_message(message)
    whole = {len(encode_message(other)) for other in (Leases((ONE,)), Leases(()), Release(()))}
    for num in range(len(data)):
        if isinstance(message, Leases | Release) and num in whole:
            continue  # that is a shorter message
        with pytest.raises(ProtocolError, match="not a message"):
            decode_message(data[:num])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00", id="kind 0"),
        pytest.param(b"\x63 and more", id="unknown kind"),
        pytest.param(b"\x07", id="no JSON"),
        pytest.param(b"\x07{}", id="JSON without kind"),
        pytest.param(b'\x07{"kind": "Bye"}', id="unknown JSON kind"),
        pytest.param(b'\x07{"kind": "Commit"}', id="a kind that is no JSON"),
        pytest.param(b'\x07{"kind": "Stop"}', id="field missing"),
        pytest.param(b'\x07{"kind": "Stop", "reason": "x", "when": 1}', id="field unknown"),
        pytest.param(b"\x07[1]", id="a list"),
        pytest.param(b"\x03" + encode_message(Refused(ONE, ""))[1:] + b"\xff", id="not UTF-8"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        decode_message(data)


def test_an_unknown_way_to_combine_is_refused() -> None:
    data = bytearray(encode_message(Revoke(ONE)))
    data[1 + 11] = 9  # after the model, the step and the attempt
    with pytest.raises(ProtocolError, match="9 is not a valid Combine"):
        decode_message(bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.binary(max_size=80))
def test_any_bytes_are_a_message_or_refused(kind: int, rest: bytes) -> None:
    try:
        message = decode_message(bytes([kind]) + rest)
    except ProtocolError:
        return
    assert isinstance(message, get_args(Message))


# --- keys, outcomes, records -----------------------------------------------------------------


@settings(max_examples=100)
@given(KEYS, KEYS)
@example(Key(0, 0, 2**16 - 1), Key(0, 1, 0))
@example(Key(0, 2**40 - 1, 0), Key(1, 0, 0))
def test_words_order_as_keys_do(one: Key, other: Key) -> None:
    assert (one < other) == (one.word < other.word)
    assert 0 < one.word < 2**64


@settings(max_examples=50)
@given(st.lists(OUTCOMES, min_size=1, max_size=3))
def test_outcomes_lie_one_behind_the_other(outcomes: list[Outcome]) -> None:
    data = b"".join(map(pack_outcome, outcomes))
    at = 0
    for outcome in outcomes:
        read, at = unpack_outcome(data, at)
        assert plain(read) == plain(outcome)
    assert at == len(data)


def test_an_outcome_fits_its_row() -> None:
    for num in (1, 17, 300):
        layout = make_layout([[("p", (16 * num,))]], chunk_elements=16)
        assert len(layout.chunks) == num
        outcome = dataclasses.replace(OUTCOME, maxima_C=np.ones(num, np.float32))
        assert len(pack_outcome(outcome)) <= Sizes(layout, 4).row_bytes


@pytest.mark.parametrize(
    ("change", "finite"),
    [
        ({}, True),
        ({"loss_sum": float("nan")}, False),
        ({"weight": float("inf")}, False),
        ({"maxima_C": np.array([1.0, np.nan], np.float32)}, False),
        ({"maxima_C": np.array([np.inf], np.float32)}, False),
        ({"maxima_C": np.zeros(0, np.float32)}, True),
    ],
    ids=["all", "loss", "weight", "NaN", "Inf", "none"],
)
def test_finite(change: dict[str, Any], finite: bool) -> None:
    assert dataclasses.replace(OUTCOME, **change).finite is finite


@settings(max_examples=50)
@given(st.builds(Manifest, KEYS, HALVES, MICRO_BATCHES))
def test_a_manifest_survives_its_bytes(manifest: Manifest) -> None:
    data = manifest_to_bytes(manifest)
    assert manifest_from_bytes(data) == manifest
    assert manifest_from_bytes(data + b"\x00" * 9) == manifest


def test_no_manifest() -> None:
    assert manifest_from_bytes(None) is None
    assert manifest_from_bytes(b"") is None


def test_the_largest_manifest_fits() -> None:
    num = 4096
    manifest = Manifest(Key(255, 2**40 - 1, 2**16 - 1), 1, tuple(range(num)))
    sizes = Sizes(make_layout([], chunk_elements=16), num)
    assert len(manifest_to_bytes(manifest)) <= sizes.manifest_bytes // 2 - 64


def test_a_manifest_grows_within_a_key_and_starts_anew_with_the_next() -> None:
    manifest = Manifest(Key(0, 1, 0), 0, (1,)).added(Lease(Key(0, 1, 0), (4,)), 1)
    assert manifest == Manifest(Key(0, 1, 0), 1, (1, 4))
    assert manifest.added(Lease(Key(0, 1, 1), (2,)), 0) == Manifest(Key(0, 1, 1), 0, (2,))


STATES = st.builds(
    State,
    IDS,
    SHORTS,
    st.none() | st.lists(st.integers(-120, 120), max_size=5).map(tuple),
    samples=st.binary(max_size=32).map(bytes.hex),
    num_updates=IDS,
    overflows=IDS,
    skipped=SETS,
    loss=st.none() | st.floats(allow_nan=False),
    first_loss=st.none() | st.floats(allow_nan=False),
    exact=st.booleans(),
)


@settings(max_examples=50)
@given(STATES)
def test_a_state_survives_its_bytes(state: State) -> None:
    assert State.from_bytes(state.to_bytes()) == state
    assert state.key == Key(0, state.step, state.attempt)


@settings(max_examples=50)
@given(MEMBERSHIPS)
def test_a_membership_survives_its_bytes(membership: Membership) -> None:
    assert Membership.from_bytes(membership.to_bytes()) == membership


def test_the_state_of_a_large_model_fits_its_record() -> None:
    num = 5000
    layout = make_layout([[("p", (16 * num,))]], chunk_elements=16)
    sizes = Sizes(layout, 4096)
    state = State(
        2**40, 99, (-120,) * num, "f" * 64, 2**40, 9999, tuple(range(10**6, 10**6 + 100)), 1 / 3
    )
    assert len(state.to_bytes()) <= sizes.state_bytes // 2 - 64
