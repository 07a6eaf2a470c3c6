"""Forms of what goes over HTTP: bodies read within limits, JSON, errors as each API has them.

/v2 tells errors as the Open Inference Protocol does, /v1 as OpenAI does, everything else by
RFC 9457. Never answers with a text page.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response

from serve.refusals import Refusal, bad, too_large

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ID = re.compile(r"[\x21-\x7e]{1,128}")


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON in ASCII, so that no text of a client breaks its encoding."""
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, media_type="application/json")


def error_response(refusal: Refusal, path: str) -> Response:
    """A refusal in the form of the API that was asked."""
    status, headers = refusal.status, {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(refusal.retry_after_s), 1))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if path == "/v2" or path.startswith("/v2/"):
        return json_response({"error": refusal.message}, status, headers)
    if path.startswith("/v1/"):
        kind = _OPENAI_TYPES.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        error = {
            "message": refusal.message,
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
        return json_response({"error": error}, status, headers)
    problem = {"type": "about:blank", "title": refusal.code, "status": status}
    response = json_response({**problem, "detail": refusal.message}, status, headers)
    response.headers["content-type"] = "application/problem+json"
    return response


def error_event(refusal: Refusal) -> str:
    """A refusal as the last of server-sent events, as OpenAI's clients read it."""
    error = {"message": refusal.message, "type": "server_error", "code": refusal.code}
    return f"data: {json.dumps({'error': error})}\n\n"


def request_id_of(request: Request) -> str:
    """The client's own where it is plain ASCII of at most 128 characters, else a fresh one."""
    given = request.headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def timeout_of(request: Request, limit_s: float) -> float:
    """Seconds that the client gives us, at most the limit. Raises Refusal."""
    given = request.headers.get("x-elastic-timeout-s")
    if given is None:
        return limit_s
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise bad(f"x-elastic-timeout-s {given[:40]!r}: needs seconds above 0")
    return min(timeout_s, limit_s)


async def read_body(request: Request, limit: int) -> bytes:
    """At most `limit` bytes, and no more is ever held. Raises Refusal."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(
            f"content-encoding {encoding[:40]!r}: only identity is read", 415, "unsupported"
        )
    message = f"the body is larger than {limit} bytes (limits.body_bytes)"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 19 and int(length) > limit:
        raise too_large(message)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large(message)
    return bytes(body)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refusal."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise bad("the body needs a JSON object")
    return body


def whole(value: Any, name: str, low: int, high: int, setting: str = "") -> int:
    """A whole number in a range. Raises Refusal that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        told = f" ({setting})" if setting else ""
        raise bad(f"{name} {str(value)[:40]!r}: needs a whole number, {low} to {high}{told}", name)
    return value


def number(value: Any, name: str, low: float, high: float) -> float:
    """A number in a range. Raises Refusal that names it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise bad(f"{name} {str(value)[:40]!r}: needs a number, {low:g} to {high:g}", name)
    return float(value)


def text(value: Any, name: str, max_chars: int) -> str:
    """A text of limited length. Raises Refusal that names it."""
    if not isinstance(value, str) or len(value) > max_chars:
        raise bad(f"{name}: needs text of at most {max_chars} characters", name)
    return value


def known_fields(body: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises Refusal where there is another field."""
    extra = next((name for name in body if name not in names), None)
    if extra is not None:
        raise bad(f"unknown field {extra[:40]!r}; known are {', '.join(names)}", extra[:40])
