"""The HTTP face: every address, who may use it, and what happens around each handler.

One ASGI application per replica. Each request gets an id, a deadline, a line in the metrics, and
an answer in the form of its API; handlers only raise `Refusal`. Never computes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as version_of
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from serve import oip, openai
from serve.asking import model_policy, status_of
from serve.forms import (
    error_response,
    json_response,
    parse_object,
    read_body,
    request_id_of,
    timeout_of,
)
from serve.keys import Gate
from serve.openapi import document
from serve.refusals import Refusal, bad, failed, unavailable, unknown
from serve.service import Ask, Service

log = logging.getLogger(__name__)

Handler = Callable[["App", Request, Ask], Awaitable[Response]]

_CLIENT_LEFT = 499


@dataclass(frozen=True)
class Address:
    """A path and its method. `access`: anybody, who has a key, or whose key is an admin's."""

    method: str
    path: str
    handler: Handler
    access: str = "key"


class App:
    """Builds the ASGI application around a service."""

    def __init__(self, service: Service, mode: str, *, tells_id: bool = True) -> None:
        """`tells_id`: whether it puts the request's id on its answers; Serve's proxy does."""
        self.service, self.mode, self._tells_id = service, mode, tells_id
        self.started_s = int(time.time())
        settings = service.settings
        self._gate = Gate(settings.keys, time.monotonic, settings.placement.replicas)
        self._limit_s = settings.limits.timeout_s
        self.page = files("serve").joinpath("page.html").read_text("utf-8")

    def build(self) -> Starlette:
        """The application."""
        routes = [Route(one.path, self._endpoint(one), methods=[one.method]) for one in ADDRESSES]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._refuse})

    async def body(self, request: Request) -> bytes:
        return await read_body(request, self.service.settings.limits.body_bytes)

    def _endpoint(self, address: Address) -> Callable[[Request], Awaitable[Response]]:
        metrics = self.service.metrics
        seconds = metrics.request_s.labels(address.path)

        async def endpoint(request: Request) -> Response:
            begin_s, status = time.monotonic(), _CLIENT_LEFT
            request_id = request_id_of(request)
            try:
                response = await self._answer(address, request, request_id)
                status = response.status_code
            except ClientDisconnect:
                response = Response(status_code=_CLIENT_LEFT)
            finally:
                metrics.requests.labels(address.path, str(status)).inc()
                seconds.observe(time.monotonic() - begin_s)
            if response.headers.get("x-elastic-degraded") == "true":
                metrics.degraded.inc()
            return self._with_id(response, request_id)

        return endpoint

    async def _answer(self, address: Address, request: Request, request_id: str) -> Response:
        try:
            if address.access != "anybody":
                authorization = request.headers.get("authorization")
                self._gate.check(authorization, admin=address.access == "admin")
            ask = Ask(
                request_id,
                timeout_of(request, self._limit_s),
                version=request.path_params.get("version")
                or request.headers.get("x-elastic-version"),
            )
            return await address.handler(self, request, ask)
        except Refusal as refusal:
            return error_response(refusal, request.url.path)
        except (asyncio.CancelledError, ClientDisconnect):
            raise
        except Exception:
            log.exception("request %s failed", request_id)
            return error_response(failed("this is a bug; the log says more"), request.url.path)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """No such address, or not by this method."""
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            message = f"{request.method} is not for {request.url.path[:200]}"
            refusal = Refusal(message, 405, "method_not_allowed")
        else:
            refusal = unknown(f"there is nothing at {request.url.path[:200]}")
            refusal.status = error.status_code
        response = error_response(refusal, request.url.path)
        response.headers.update(error.headers or {})
        self.service.metrics.requests.labels("none", str(refusal.status)).inc()
        return self._with_id(response, request_id_of(request))

    def _with_id(self, response: Response, request_id: str) -> Response:
        if self._tells_id:
            response.headers["x-request-id"] = request_id
        return response


async def _page(app: App, request: Request, ask: Ask) -> Response:
    return HTMLResponse(app.page, headers={"cache-control": "no-cache"})


async def _status(app: App, request: Request, ask: Ask) -> Response:
    return json_response(status_of(app.service, app.mode))


async def _metrics(app: App, request: Request, ask: Ask) -> Response:
    text, content_type = app.service.metrics_text(request.headers.get("accept", ""))
    return Response(text, headers={"content-type": content_type})


async def _openapi(app: App, request: Request, ask: Ask) -> Response:
    return json_response(document([(one.method, one.path, one.access) for one in ADDRESSES]))


async def _docs(app: App, request: Request, ask: Ask) -> Response:
    return HTMLResponse(files("serve").joinpath("docs.html").read_text("utf-8"))


async def _server(app: App, request: Request, ask: Ask) -> Response:
    extensions = ["binary_tensor_data", "model_repository"]
    about = {"name": "elastic", "version": version_of("elastic"), "extensions": extensions}
    return json_response(about)


async def _live(app: App, request: Request, ask: Ask) -> Response:
    if not app.service.is_live():
        raise unavailable("the engine does not move")
    return json_response({"live": True})


async def _ready(app: App, request: Request, ask: Ask) -> Response:
    if not app.service.is_ready():
        raise unavailable("no expert is alive, or the engine does not move")
    return json_response({"ready": True})


async def _model(app: App, request: Request, ask: Ask) -> Response:
    version = app.service.version_for(ask)
    name = request.path_params["model"]
    return json_response(oip.metadata(version, name, app.service.rollout.versions()))


async def _model_ready(app: App, request: Request, ask: Ask) -> Response:
    version, name = app.service.version_for(ask), request.path_params["model"]
    alive_K = app.service.engine.patients.alive(version)
    is_alive = alive_K.any() if model_policy(name, version) is None else alive_K[
        version.index[name]
    ]  # fmt: skip
    if not (is_alive and app.service.is_live()):
        raise unavailable(f"model {name} does not answer now")
    return json_response({"name": name, "ready": True})


async def _infer(app: App, request: Request, ask: Ask) -> Response:
    length = request.headers.get("inference-header-content-length")
    name = request.path_params["model"]
    return await oip.infer(app.service, name, ask, await app.body(request), length)


async def _index(app: App, request: Request, ask: Ask) -> Response:
    body = parse_object(await app.body(request) or b"{}")
    only_ready = body.get("ready", False)
    if not isinstance(only_ready, bool):
        raise bad(f"ready {str(only_ready)[:40]!r}: needs true or false", "ready")
    version = app.service.rollout.current
    is_ready = app.service.is_ready()
    whole = {
        "name": version.manifest.name,
        "version": version.identity,
        "state": "READY" if is_ready else "UNAVAILABLE",
        "reason": "" if is_ready else "no expert is alive",
    }
    experts = [
        {"name": one.name, "version": version.identity, "state": one.state, "reason": one.reason}
        for one in app.service.engine.patients.conditions(version)
    ]
    found = [one for one in (whole, *experts) if one["state"] == "READY" or not only_ready]
    return json_response(found)


async def _load(app: App, request: Request, ask: Ask) -> Response:
    await app.body(request)
    name, service = request.path_params["model"], app.service
    version = service.rollout.current
    loop = asyncio.get_running_loop()
    if name == version.manifest.name:
        await loop.run_in_executor(None, service.try_again)
        if service.fault:
            raise bad(f"the newest version in the folder is refused: {service.fault[:1000]}")
    else:
        model_policy(name, version)
        await loop.run_in_executor(None, service.load, name)
    return json_response({})


async def _unload(app: App, request: Request, ask: Ask) -> Response:
    await app.body(request)
    name, version = request.path_params["model"], app.service.rollout.current
    if model_policy(name, version) is None:
        raise Refusal(f"{name} is what is served here; its experts can be unloaded", 400)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, app.service.unload, name)  # it may wait for a writer
    return json_response({})


async def _models(app: App, request: Request, ask: Ask) -> Response:
    found = openai.models(app.service.rollout.current, app.started_s)
    return json_response({"object": "list", "data": found})


async def _one_model(app: App, request: Request, ask: Ask) -> Response:
    name = request.path_params["model"]
    model_policy(name, app.service.rollout.current)
    found = openai.models(app.service.rollout.current, app.started_s)
    return json_response(next(one for one in found if one["id"] == name))


async def _images(app: App, request: Request, ask: Ask) -> Response:
    return await openai.images(app.service, ask, await app.body(request))


async def _completions(app: App, request: Request, ask: Ask) -> Response:
    return await openai.completions(app.service, ask, await app.body(request))


_MODEL = "/v2/models/{model}"
_PINNED = _MODEL + "/versions/{version}"
_REPOSITORY = "/v2/repository"

ADDRESSES = (
    Address("GET", "/", _page, "anybody"),
    Address("GET", "/docs", _docs, "anybody"),
    Address("GET", "/openapi.json", _openapi, "anybody"),
    Address("GET", "/status", _status),
    Address("GET", "/metrics", _metrics),
    Address("GET", "/v2", _server, "anybody"),
    Address("GET", "/v2/health/live", _live, "anybody"),
    Address("GET", "/v2/health/ready", _ready, "anybody"),
    Address("GET", _MODEL, _model),
    Address("GET", _PINNED, _model),
    Address("GET", _MODEL + "/ready", _model_ready),
    Address("GET", _PINNED + "/ready", _model_ready),
    Address("POST", _MODEL + "/infer", _infer),
    Address("POST", _PINNED + "/infer", _infer),
    Address("POST", _REPOSITORY + "/index", _index),
    Address("POST", _REPOSITORY + "/models/{model}/load", _load, "admin"),
    Address("POST", _REPOSITORY + "/models/{model}/unload", _unload, "admin"),
    Address("GET", "/v1/models", _models),
    Address("GET", "/v1/models/{model}", _one_model),
    Address("POST", "/v1/images/generations", _images),
    Address("POST", "/v1/completions", _completions),
)
"""The table of all addresses."""


def describe() -> Mapping[str, Any]:
    """The OpenAPI document, for tests and tools."""
    return document([(one.method, one.path, one.access) for one in ADDRESSES])
