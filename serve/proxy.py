"""What runs inside of Ray Serve's HTTP proxies: requests outlive the replica that had them.

Serve drops such a request, and its HTTP server then answers with a text 500. Whatever is asked here
may be asked twice: an answer changes nothing, and to load or unload an expert again neither. What
Serve refuses by itself gets the form of the API that was asked. What is asked at other addresses
passes untouched. Light to import: a proxy holds no model.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.forms import error_event, error_response, request_id_of, timeout_of
from serve.refusals import Refusal, failed, too_late, too_many, unavailable, unknown

log = logging.getLogger(__name__)

_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Ray Serve 2.60: each proxy calls this function, and puts itself behind what it returns."""
_TIMEOUT = "ELASTIC_SERVE_TIMEOUT_S"
"""`limits.timeout_s`, for the proxies: they read no settings."""
_TRIES = 2
"""Not more: what a replica died of may be the request itself."""
_MAX_KEPT_BYTES = 16 << 20
"""Of one request's body; a request with a larger one is asked once."""
_MOST_S = 600.0
"""Whatever a client gives us, it does not wait longer for a replica to come."""
_GRACE_S = 1.0
"""Serve waits so much longer than a client: whoever is asked says more of what is wrong."""
_READ = re.compile(r"/|/docs|/openapi\.json|/status|/metrics|/v2|/v2/.+|/v1/models(/.+)?")
_ASKED = re.compile(
    r"/v2/models/[^/]+(/versions/[^/]+)?/infer"
    r"|/v2/repository/(index|models/[^/]+/(load|unload))"
    r"|/v1/(images/generations|completions)"
)
_SECONDS = re.compile(r"[0-9]{1,9}")
"""Of `retry-after`, which may also be a date (RFC 9110, section 10.2.3)."""
_PAGES = (404, 408, 429, 500, 503)
"""Statuses that Serve answers with by itself."""


def controller_options(timeout_s: float) -> dict[str, Any]:
    """Of Serve's controller, whose environment its proxies inherit. `timeout_s`: the most that a
    request may wait, over all tries."""
    called = f"{__name__}:{middlewares.__name__}"
    return {"runtime_env": {"env_vars": {_CALLBACK: called, _TIMEOUT: str(timeout_s)}}}


def middlewares() -> list[Middleware]:
    """What a proxy calls when it starts."""
    return [Middleware(Repeating, limit_s=float(os.environ.get(_TIMEOUT, "inf")))]


def is_ours(method: str, path: str) -> bool:
    """Whether it is an address of `serve.app`, which by what it is may be asked again: another
    application may have these paths tomorrow."""
    paths = {"GET": _READ, "HEAD": _READ, "POST": _ASKED}.get(method)
    return paths is not None and paths.fullmatch(path) is not None


class Repeating:
    """Stands before a proxy, in its process."""

    def __init__(
        self,
        app: ASGIApp,
        clock: Callable[[], float] = time.monotonic,
        *,
        limit_s: float = math.inf,
    ) -> None:
        """`limit_s`: nobody waits longer, over all tries; infinite where Serve was started by
        others, whose proxies know no limit of ours."""
        self._app, self._clock, self._limit_s = app, clock, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_ours(scope["method"], scope["path"]):
            timeout_s = _timeout_of(scope, self._limit_s)
            await _Exchange(self._app, scope, receive, send, self._clock, timeout_s).run()
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One request: what was heard of it, and how far its answer went."""

    def __init__(
        self,
        app: ASGIApp,
        scope: Scope,
        receive: Receive,
        send: Send,
        clock: Callable[[], float],
        timeout_s: float,
    ) -> None:
        self._app, self._scope, self._receive, self._send = app, scope, receive, send
        self._clock, self._begin_s = clock, clock()
        self._id = request_id_of(Request(scope))
        self._timeout_s = timeout_s
        self._heard: list[Message] = []
        self._heard_bytes = 0
        self._has_left = False
        self._tries = 0
        self._page: Refusal | None = None
        self._has_begun = self._is_stream = self._is_whole = False

    async def run(self) -> None:
        """Ask until there is an answer, of whatever kind."""
        await self._try()
        while self._may_repeat():
            log.warning("request %s is asked again: its replica is lost", self._id)
            await self._try()
        if self._has_left or self._is_whole:
            return
        lost = unavailable("the replica that had the request is lost")
        if not self._has_begun:
            response = error_response(self._page or lost, self._scope["path"])
            response.headers["x-request-id"] = self._id
            await response(self._scope, self._receive, self._send)
        elif self._is_stream:
            body = error_event(lost).encode()
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _may_repeat(self) -> bool:
        is_over = self._has_begun or self._has_left or self._page is not None
        return not is_over and self._tries < _TRIES and self._heard_bytes <= _MAX_KEPT_BYTES

    async def _try(self) -> None:
        self._tries += 1
        headers = MutableHeaders(raw=list(self._scope["headers"]))
        headers["x-request-id"] = self._id
        del headers["x-request-timeout-seconds"]  # Serve would wait for a replica as long as that
        left_s = self._timeout_s - (self._clock() - self._begin_s)
        if left_s <= 0:
            self._page = too_late(f"no answer within {self._timeout_s:g} s")
            return
        if self._tries > 1 and left_s < math.inf:
            headers["x-elastic-timeout-s"] = f"{left_s:.6f}"
        if "x-elastic-timeout-s" in headers and left_s < math.inf:
            headers["x-request-timeout-seconds"] = f"{min(left_s, _MOST_S) + _GRACE_S:.6f}"
        try:
            await self._app({**self._scope, "headers": headers.raw}, self._hearing(), self._tell)
        except Exception:  # a proxy that fails is a try that failed
            log.exception("request %s failed in the proxy", self._id)

    def _hearing(self) -> Receive:
        """What was heard by earlier tries, then what comes."""
        place = 0

        async def hear() -> Message:
            nonlocal place
            place += 1
            if place <= len(self._heard):
                return self._heard[place - 1]
            message = await self._receive()
            self._heard_bytes += len(message.get("body", b""))
            self._has_left |= message["type"] == "http.disconnect"
            if self._heard_bytes <= _MAX_KEPT_BYTES:
                self._heard.append(message)
            else:
                self._heard.clear()  # it is asked once
            return message

        return hear

    async def _tell(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=[(name, value) for name, value in message["headers"]])
            kind = headers.get("content-type", "")
            is_text = kind.startswith("text/plain")  # errors of ours never are
            if is_text and message["status"] in _PAGES:
                self._page = _typed(message["status"], headers)
                return
            self._has_begun, self._is_stream = True, kind.startswith("text/event-stream")
            if self._tries > 1:
                headers["x-elastic-repeated"] = str(self._tries - 1)
                message = {**message, "headers": headers.raw}
        elif self._page is not None:
            return
        else:
            self._is_whole = not message.get("more_body", False)
        await self._send(message)


def _timeout_of(scope: Scope, limit_s: float) -> float:
    """The client's own, at most the limit; infinite where the replica will refuse the client's."""
    try:
        return timeout_of(Request(scope), limit_s)
    except Refusal:
        return math.inf


def _typed(status: int, headers: Headers) -> Refusal:
    """What a text page of Serve's own says."""
    given = headers.get("retry-after", "")
    wait_s = float(given) if _SECONDS.fullmatch(given) else 1.0
    if status == 404:
        return unknown("nothing is served here now")
    if status == 408:
        return too_late("no replica answered in time")
    if status == 429:
        return too_many("more requests wait than the replicas may have", wait_s)
    if status == 503:
        return unavailable("no replica can take the request", wait_s)
    return failed(f"Ray Serve answered with status {status}; its log says why")
