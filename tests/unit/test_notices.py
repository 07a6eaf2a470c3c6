"""Who says that a node will be taken away: what is asked, and what is made of the answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors import preemption
from actors.preemption import AwsSpot, Drains, GcpPreemption, NodeWatch, Source, cloud_sources
from policies.preemption import Notice
from tests.metadata import PREEMPTED, REBALANCE, SPOT, Metadata, metadata_server

ACTION = b'{"action": "terminate", "time": "2026-01-02T03:04:05Z"}'
ENDS_S = 1767323045.0


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    with metadata_server() as service:
        for name, value in service.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # these never go by a proxy
        yield service


# --- AWS ---------------------------------------------------------------------------------------


def test_aws_is_asked_with_a_token_for_both_notices(metadata: Metadata) -> None:
    source = AwsSpot()
    assert source.ask() is None
    assert source.ask() is None
    once = [("GET", SPOT), ("GET", REBALANCE)]
    assert metadata.asked == [("PUT", "/latest/api/token"), *once, *once]


def test_aws_says_when_a_spot_machine_ends(metadata: Metadata) -> None:
    metadata.answers = {SPOT: ACTION, REBALANCE: b"{}"}
    assert AwsSpot().ask() == Notice("AWS will terminate this node", ENDS_S)


def test_aws_may_only_recommend(metadata: Metadata) -> None:
    metadata.answers = {REBALANCE: b'{"noticeTime": "2026-01-02T03:04:05Z"}'}
    notice = AwsSpot().ask()
    assert notice is not None
    assert not notice.certain


@pytest.mark.parametrize("answer", [b"soon", b"{}", b"[]", b'{"action": "stop", "time": "soon"}'])
def test_an_interruption_that_cannot_be_read_is_one(metadata: Metadata, answer: bytes) -> None:
    metadata.answers = {SPOT: answer}
    notice = AwsSpot().ask()
    assert notice is not None
    assert (notice.certain, notice.deadline_s) == (True, None)


def test_a_token_that_expired_is_renewed(metadata: Metadata) -> None:
    source = AwsSpot()
    metadata.tokens = ["first", "second"]
    assert source.ask() is None
    metadata.valid = "another"
    metadata.answers = {SPOT: ACTION}
    assert source.ask() is not None
    assert sum(method == "PUT" for method, _ in metadata.asked) == 2


def test_a_service_that_refuses_its_own_token_is_an_error(metadata: Metadata) -> None:
    metadata.tokens = ["told"]
    source = AwsSpot()
    source.ask()
    metadata.respond = lambda _: (401, {}, b"")  # type: ignore[method-assign]
    with pytest.raises(OSError, match="401"):
        source.ask()


# --- Google ------------------------------------------------------------------------------------


def test_google_is_asked_to_wait_for_news(metadata: Metadata) -> None:
    metadata.answers = {PREEMPTED: b"FALSE"}
    source = GcpPreemption(wait_s=20)
    assert source.ask() is None
    waiting = threading.Timer(0.05, _preempt, (metadata,))
    waiting.start()
    begun_s = time.time()
    notice = source.ask()
    assert time.time() - begun_s < 10
    assert notice is not None
    assert notice.deadline_s == pytest.approx(time.time() + 30, abs=10)
    again = f"{PREEMPTED}?wait_for_change=true&last_etag=e1&timeout_sec=20"
    assert metadata.asked == [("GET", PREEMPTED), ("GET", again)]


def _preempt(metadata: Metadata) -> None:
    metadata.answers = {PREEMPTED: b"TRUE"}
    metadata.changed.set()


def test_the_deadline_of_google_does_not_move(metadata: Metadata) -> None:
    metadata.answers = {PREEMPTED: b"TRUE"}
    metadata.changed.set()
    source = GcpPreemption()
    assert source.ask() == source.ask()


def test_a_server_that_is_not_googles_is_an_error(metadata: Metadata) -> None:
    """Networks with a login page answer anything."""
    metadata.answers = {PREEMPTED: b"TRUE"}
    metadata.headers = {"Metadata-Flavor": "none"}
    with pytest.raises(OSError, match="Metadata-Flavor"):
        GcpPreemption().ask()


# --- Ray ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draining", "notice"),
    [
        ({}, None),
        ({"other": 5000}, None),
        ({"mine": 5000}, Notice("Ray drains this node", 5.0)),
        ({"mine": 0}, Notice("Ray drains this node", None)),
    ],
)
def test_ray_drains_a_node(draining: dict[str, int], notice: Notice | None) -> None:
    assert Drains("mine", lambda: draining).ask() == notice


# --- a node ------------------------------------------------------------------------------------


class Said:
    """A source that says one thing after the other, and then the last one for ever."""

    every_s = 0.001

    def __init__(self, *answers: Notice | OSError | None) -> None:
        self.answers = list(answers)
        self.num_asked = 0

    def ask(self) -> Notice | None:
        self.num_asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., NodeWatch]]:
    monkeypatch.setattr(preemption, "_RETRY_S", 0.001)
    watches: list[NodeWatch] = []

    def make(**sources: Source) -> NodeWatch:
        watches.append(NodeWatch(sources))
        watches[-1].start()
        return watches[-1]

    yield make
    for one in watches:
        one.stop()


def await_it(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


LATER, SOON = Notice("later", 100.0), Notice("soon", 50.0)


@pytest.mark.parametrize(
    ("notices", "counts"),
    [
        ([None, None], None),
        ([LATER, SOON], SOON),
        ([LATER, Notice("perhaps", 1.0, certain=False)], LATER),
        ([Notice("some time"), LATER], LATER),
        ([None, Notice("some time")], Notice("some time")),
    ],
)
def test_the_most_urgent_notice_counts(
    watch: Callable[..., NodeWatch], notices: list[Notice | None], counts: Notice | None
) -> None:
    first, second = (Said(one) for one in notices)
    node = watch(first=first, second=second)
    await_it(lambda: first.num_asked > 1 and second.num_asked > 1)
    assert node.notice() == counts


def test_a_source_that_does_not_answer_is_told_and_asked_again(
    watch: Callable[..., NodeWatch],
) -> None:
    broken = Said(OSError("no route"))
    node = watch(cloud=broken)
    await_it(lambda: node.problems() == {"cloud": "no route"})
    broken.answers = [SOON]
    await_it(lambda: node.notice() == SOON)
    assert node.problems() == {}


def test_a_notice_may_be_taken_back(watch: Callable[..., NodeWatch]) -> None:
    source = Said(SOON)
    node = watch(cloud=source)
    await_it(lambda: node.notice() == SOON)
    source.answers = [None]
    await_it(lambda: node.notice() is None)


@pytest.mark.parametrize(
    ("source", "vendor", "kinds"),
    [
        ("none", "Amazon EC2", []),
        ("auto", "Amazon EC2", [AwsSpot]),
        ("auto", "Google", [GcpPreemption]),
        ("auto", "LENOVO", []),
        ("auto", None, []),
        ("aws", None, [AwsSpot]),
        ("gcp", "Amazon EC2", [GcpPreemption]),
    ],
)
def test_nobody_is_asked_unless_the_job_says_so(
    metadata: Metadata, tmp_path: Path, source: str, vendor: str | None, kinds: list[type]
) -> None:
    firmware = tmp_path / "sys_vendor"
    if vendor is not None:
        firmware.write_text(f"{vendor}\n")
    assert [type(one) for one in cloud_sources(source, firmware).values()] == kinds
    assert metadata.asked == []
