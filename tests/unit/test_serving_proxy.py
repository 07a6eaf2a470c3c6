"""A proxy whose replicas die: requests are asked again, and every refusal is typed."""

from __future__ import annotations

import asyncio
import json
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from serve.app import ADDRESSES
from serve.proxy import Repeating, controller_options, is_ours, middlewares
from tests.served import FakeClock

INFER = "/v2/models/tiny/infer"


async def body_of(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message["more_body"]
    return b"".join(parts)


async def respond(
    send: Send,
    status: int,
    kind: str,
    *parts: bytes,
    is_whole: bool = True,
    retry_after: str | None = None,
) -> None:
    headers = [(b"content-type", kind.encode())]
    if retry_after is not None:
        headers.append((b"retry-after", retry_after.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for index, part in enumerate(parts):
        more = not is_whole or index + 1 < len(parts)
        await send({"type": "http.response.body", "body": part, "more_body": more})


@dataclass
class Proxy:
    """What Serve's proxy does with each try: `fates` in turn, the last one for all that follow."""

    fates: Sequence[str]
    clock: FakeClock = field(default_factory=FakeClock)
    took_s: float = 0.0
    retry_after: str | None = None
    """Of its text pages."""
    heard: list[bytes] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fate = self.fates[min(len(self.scopes), len(self.fates) - 1)]
        self.scopes.append(scope)
        if fate == "dies before it reads":
            return
        if fate == "waits until the client leaves":
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        self.heard.append(await body_of(receive))
        self.clock.now_s += self.took_s
        if fate == "breaks":
            raise RuntimeError("the proxy")
        if fate == "answers":
            await respond(send, 200, "application/json", b'{"a":', b"1}")
        elif fate == "streams and dies":
            await respond(send, 200, "text/event-stream", b"data: 1\n\n", is_whole=False)
        elif fate == "begins and dies":
            await respond(send, 200, "application/json", b'{"a":', is_whole=False)
        elif fate.isdecimal():
            kind = "text/plain; charset=utf-8"
            await respond(send, int(fate), kind, b"a text page", retry_after=self.retry_after)
        else:
            assert fate == "dies"


@dataclass
class Answer:
    """What the client got; status 0: nothing at all."""

    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"]) if self.messages else 0

    @property
    def headers(self) -> Headers:
        return Headers(raw=self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(one["body"] for one in self.messages[1:])

    @property
    def is_whole(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", False)


def ask(
    proxy: Proxy,
    path: str = INFER,
    method: str = "POST",
    parts: Sequence[bytes] = (b"ab", b"cd"),
    leaves: bool = False,
    limit_s: float = math.inf,
    **headers: str,
) -> Answer:
    given = [(name.replace("_", "-").encode(), one.encode()) for name, one in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given}
    coming: list[Message] = [
        {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)}
        for index, part in enumerate(parts)
    ]
    if leaves:
        coming.append({"type": "http.disconnect"})
    answer = Answer()

    async def receive() -> Message:
        if not coming:
            await asyncio.Event().wait()  # the client waits
        return coming.pop(0)

    async def send(message: Message) -> None:
        answer.messages.append(message)

    async def run() -> None:
        repeating = Repeating(proxy, proxy.clock, limit_s=limit_s)
        await asyncio.wait_for(repeating(scope, receive, send), 10)

    asyncio.run(run())
    return answer


def seen(proxy: Proxy, name: str) -> list[str | None]:
    return [Headers(raw=one["headers"]).get(name) for one in proxy.scopes]


@pytest.mark.parametrize("fate", ["dies", "dies before it reads", "breaks"])
def test_a_request_whose_replica_died_is_asked_again_whole(fate: str) -> None:
    proxy = Proxy([fate, "answers"])
    answer = ask(proxy, x_request_id="mine")
    assert (answer.status, answer.body, answer.is_whole) == (200, b'{"a":1}', True)
    assert answer.headers["x-elastic-repeated"] == "1"
    assert proxy.heard[-1] == b"abcd"
    assert seen(proxy, "x-request-id") == ["mine"] * 2


def test_an_answer_at_once_passes_as_it_is() -> None:
    proxy = Proxy(["answers"])
    answer = ask(proxy, x_request_timeout_seconds="0")
    assert (answer.status, answer.body) == (200, b'{"a":1}')
    assert "x-elastic-repeated" not in answer.headers
    assert len(proxy.scopes) == 1
    assert seen(proxy, "x-request-timeout-seconds") == [None]


def test_a_request_that_kills_its_replica_takes_two_at_most() -> None:
    proxy = Proxy(["dies"])
    answer = ask(proxy)
    assert len(proxy.scopes) == 2
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert list(json.loads(answer.body)) == ["error"]
    assert answer.headers["x-request-id"] == seen(proxy, "x-request-id")[0]


def test_a_body_that_is_too_large_to_keep_is_asked_once() -> None:
    proxy = Proxy(["dies"])
    answer = ask(proxy, parts=[bytes(9 << 20), bytes(9 << 20)])
    assert (answer.status, len(proxy.scopes)) == (503, 1)
    assert len(proxy.heard[0]) == 18 << 20


class Part(dict[str, Any]):
    """A message that can be asked after: a plain dict takes no weak reference."""


@pytest.mark.parametrize(("size_bytes", "num_held"), [(5 << 20, 3), (9 << 20, 0)])
def test_only_a_body_that_can_be_asked_again_is_held(size_bytes: int, num_held: int) -> None:
    coming = [
        Part(type="http.request", body=bytes(size_bytes), more_body=more) for more in (1, 1, 0)
    ]
    parts = [weakref.ref(one) for one in coming]
    held = []

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        held.append(sum(one() is not None for one in parts))

    scope = {"type": "http", "method": "POST", "path": INFER, "headers": []}
    asyncio.run(Repeating(Proxy(["answers"]))(scope, receive, send))
    assert held[0] == num_held


def test_who_has_left_is_not_asked_for_again() -> None:
    proxy = Proxy(["waits until the client leaves"])
    assert ask(proxy, leaves=True).status == 0
    assert len(proxy.scopes) == 1


def test_what_has_begun_is_not_repeated_and_a_stream_ends_with_an_error() -> None:
    streamed = Proxy(["streams and dies"])
    answer = ask(streamed, "/v1/completions")
    assert (len(streamed.scopes), answer.is_whole) == (1, True)
    first, last = answer.body.decode().strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    begun = Proxy(["begins and dies"])
    assert not ask(begun).is_whole  # the connection breaks: half an answer is none
    assert len(begun.scopes) == 1


def _code(error: dict[str, Any]) -> Any:
    return error["error"]["code"]


@pytest.mark.parametrize(
    ("page", "status", "code"),
    [
        ("404", 404, "not_found"),
        ("408", 504, "deadline_exceeded"),
        ("429", 429, "rate_limit_exceeded"),
        ("503", 503, "unavailable"),
        ("500", 500, "internal_error"),
    ],
)
def test_text_pages_of_serve_get_the_form_of_the_api(page: str, status: int, code: str) -> None:
    forms: dict[str, Callable[[Any], bool]] = {
        INFER: lambda body: isinstance(body["error"], str),
        "/v1/completions": lambda body: bool(_code(body) == code),
        "/status": lambda body: bool(body["title"] == code),
    }
    for path, has_form in forms.items():
        proxy = Proxy([page])
        answer = ask(proxy, path, "GET" if path == "/status" else "POST")
        assert (answer.status, len(proxy.scopes)) == (status, 1)
        assert has_form(json.loads(answer.body))
        assert ("retry-after" in answer.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("7", "7"),
        ("0", "1"),
        ("Fri, 31 Dec 1999 23:59:59 GMT", "1"),
        ("nan", "1"),
        ("9" * 400, "1"),
        ("", "1"),
    ],
)
def test_whatever_a_page_says_of_when_to_come_again_is_no_lost_replica(
    given: str, told: str
) -> None:
    proxy = Proxy(["503"], retry_after=given)
    answer = ask(proxy)
    assert (answer.status, len(proxy.scopes)) == (503, 1)
    assert answer.headers["retry-after"] == told
    assert "no replica can take the request" in json.loads(answer.body)["error"]


def test_a_client_s_deadline_holds_over_all_tries() -> None:
    proxy = Proxy(["dies", "answers"], took_s=2.0)
    assert ask(proxy, x_elastic_timeout_s="5").status == 200
    assert seen(proxy, "x-elastic-timeout-s") == ["5", "3.000000"]
    assert seen(proxy, "x-request-timeout-seconds") == ["6.000000", "4.000000"]
    late = Proxy(["dies", "answers"], took_s=2.0)
    answer = ask(late, x_elastic_timeout_s="1.5")
    assert (answer.status, len(late.scopes)) == (504, 1)


def test_the_limit_holds_over_all_tries_without_a_client_s_deadline() -> None:
    proxy = Proxy(["dies", "answers"], took_s=20.0)
    assert ask(proxy, limit_s=60.0).status == 200
    assert seen(proxy, "x-elastic-timeout-s") == [None, "40.000000"]
    assert seen(proxy, "x-request-timeout-seconds") == [None, "41.000000"]
    late = Proxy(["dies", "answers"], took_s=61.0)
    answer = ask(late, limit_s=60.0)
    assert (answer.status, len(late.scopes)) == (504, 1)
    assert "60 s" in json.loads(answer.body)["error"]


def test_a_client_that_gives_more_than_the_limit_waits_for_the_limit() -> None:
    proxy = Proxy(["dies", "answers"], took_s=20.0)
    assert ask(proxy, limit_s=60.0, x_elastic_timeout_s="500").status == 200
    assert seen(proxy, "x-elastic-timeout-s") == ["500", "40.000000"]
    assert seen(proxy, "x-request-timeout-seconds") == ["61.000000", "41.000000"]


def test_where_no_limit_is_known_a_request_is_asked_again_as_it_is() -> None:
    proxy = Proxy(["dies", "answers"], took_s=1000.0)
    assert ask(proxy).status == 200
    assert seen(proxy, "x-elastic-timeout-s") == [None, None]
    assert seen(proxy, "x-request-timeout-seconds") == [None, None]


@pytest.mark.parametrize("wrong", ["soon", "-1", "nan", "inf"])
def test_a_wrong_deadline_is_left_to_the_replica(wrong: str) -> None:
    proxy = Proxy(["dies", "answers"])
    assert ask(proxy, limit_s=60.0, x_elastic_timeout_s=wrong).status == 200
    assert seen(proxy, "x-elastic-timeout-s") == [wrong, wrong]
    assert seen(proxy, "x-request-timeout-seconds") == [None, None]


def test_requests_for_others_pass_untouched() -> None:
    proxy = Proxy(["dies"])
    assert ask(proxy, "/other/v1/completions").status == 0
    assert len(proxy.scopes) == 1
    page = Proxy(["500"])
    assert ask(page, "/other").body == b"a text page"
    assert ask(Proxy(["400"])).body == b"a text page"


def test_each_address_is_ours_and_serve_finds_what_it_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(is_ours(one.method, one.path) for one in ADDRESSES)
    assert not is_ours("POST", "/v1/files")
    assert not is_ours("POST", "/status")
    assert not is_ours("DELETE", "/v1/models/mine")
    environment = controller_options(7.5)["runtime_env"]["env_vars"]
    assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "serve.proxy:middlewares"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [(one.cls, one.kwargs) for one in middlewares()] == [(Repeating, {"limit_s": 7.5})]
    monkeypatch.delenv("ELASTIC_SERVE_TIMEOUT_S")
    assert [one.kwargs for one in middlewares()] == [{"limit_s": math.inf}]
