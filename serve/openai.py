"""What clients of OpenAI's API expect: models, pictures, completions with streaming.

Beyond it, and optional: `seed`, `num_steps`, `selection`, `trace`. A flow has no text condition:
the prompt is required as clients send it, and does not change the picture.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.responses import Response, StreamingResponse

from serve.asking import (
    headers_of,
    model_policy,
    needs_task,
    num_steps_of,
    policy_of,
    seed_of,
    to_png,
)
from serve.engine import Job
from serve.forms import error_event, json_response, known_fields, number, parse_object, text, whole
from serve.refusals import Refusal, bad
from serve.service import Ask, Service
from serve.version import Version
from serve.work import Completing, Denoising, noise_of

_MAX_IMAGES = 10
_MAX_PIXELS = 1024
_MAX_PROMPT = 32_000
_MAX_STOPS = 4
_IMAGE_FIELDS = ("prompt", "model", "n", "size", "response_format", "output_format", "user")
_OUR_FIELDS = ("seed", "num_steps", "selection", "trace")
_IMAGE_IGNORED = ("quality", "style", "background", "moderation", "output_compression")
_COMPLETION_FIELDS = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream"),
    *("user", "selection", "echo", "logprobs", "stream_options", "best_of", "suffix"),
    *("frequency_penalty", "presence_penalty", "logit_bias"),
)
_NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
}
"""Known to OpenAI's clients, and only accepted with the value that changes nothing."""


def models(version: Version, started_s: int) -> list[dict[str, Any]]:
    """The repository, then each of its experts."""
    return [
        {"id": name, "object": "model", "created": started_s, "owned_by": "elastic"}
        for name in (version.manifest.name, *version.names)
    ]


async def images(service: Service, ask: Ask, raw: bytes) -> Response:
    """Pictures as base64 of PNG files. Raises Refusal."""
    version = service.version_for(ask)
    body = parse_object(raw)
    known_fields(body, (*_IMAGE_FIELDS, *_OUR_FIELDS, *_IMAGE_IGNORED))
    text(body.get("prompt"), "prompt", _MAX_PROMPT)
    only = model_policy(body.get("model", version.manifest.name), version)
    needs_task(version, "flow")
    most = min(_MAX_IMAGES, service.settings.limits.rows)
    num = whole(1 if body.get("n") is None else body["n"], "n", 1, most, "limits.rows")
    if body.get("response_format") not in (None, "b64_json"):
        raise bad("response_format: only b64_json is given", "response_format")
    if body.get("output_format") not in (None, "png"):
        raise bad("output_format: only png is given", "output_format")
    size, seed = _size(body.get("size")), seed_of(body.get("seed"))
    num_steps = num_steps_of(body.get("num_steps"), version, service)
    policy = only or policy_of(body.get("selection"), version)
    keeps_trace = body.get("trace") is True
    seeds = [(seed + index) % 2**63 for index in range(num)]
    works = [Denoising(noise_of(one, version.sample_shape), num_steps) for one in seeds]
    job = await service.run(works, version, replace(ask, policy=policy, keeps_trace=keeps_trace))
    data = [{"b64_json": base64.b64encode(to_png(one.x, size)).decode()} for one in works]
    answer: dict[str, Any] = {"created": int(time.time()), "data": data}
    if keeps_trace:
        answer["trace"] = {"seeds": seeds, "experts": version.names, "weights": job.trace}
    return json_response(answer, headers={**headers_of(job), "x-elastic-seed": str(seed)})


def _size(value: Any) -> tuple[int, int] | None:
    """Width and height; None: as the model has it."""
    if value in (None, "auto"):
        return None
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", value) if isinstance(value, str) else None
    if match is None or not all(1 <= int(one) <= _MAX_PIXELS for one in match.groups()):
        raise bad(f"size {str(value)[:40]!r}: needs WxH, each 1 to {_MAX_PIXELS}, or auto", "size")
    return int(match[1]), int(match[2])


async def completions(service: Service, ask: Ask, raw: bytes) -> Response:
    """Bytes after a prompt, at once or as server-sent events. Raises Refusal."""
    version = service.version_for(ask)
    body = parse_object(raw)
    known_fields(body, _COMPLETION_FIELDS)
    only = model_policy(body.get("model", version.manifest.name), version)
    needs_task(version, "language")
    policy = only or policy_of(body.get("selection"), version)
    ask = replace(ask, policy=policy)
    prompts = _prompts(body, service)
    tells_usage = _tells_usage(body)
    is_stream = body.get("stream") is True
    arrived: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    works = [
        _completing(
            body,
            prompt,
            version,
            service,
            seed_shift=index,
            on_byte=(lambda token, row=index: loop.call_soon_threadsafe(
                arrived.put_nowait, (row, token)
            )) if is_stream else None,
        )
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    head = {
        "id": f"cmpl-{ask.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.get("model", version.manifest.name),
    }
    if not is_stream:
        job = await service.run(works, version, ask)
        return json_response(_whole_answer(head, body, works, prompts), headers=headers_of(job))
    running = asyncio.create_task(service.run(works, version, ask))
    running.add_done_callback(lambda _: arrived.put_nowait(None))
    first = await _first(running, arrived)
    events = _events(head, works, running, arrived, first, prompts if tells_usage else None)
    headers = {"cache-control": "no-store", "x-elastic-version": version.identity}
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


def _tells_usage(body: dict[str, Any]) -> bool:
    """Whether a stream ends with what it used. Raises Refusal."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or body.get("stream") is not True:
        raise bad("stream_options: needs an object, and stream true", "stream_options")
    return options.get("include_usage") is True


def _prompts(body: dict[str, Any], service: Service) -> list[str]:
    given = body.get("prompt")
    prompts = given if isinstance(given, list) else [given]
    num = whole(1 if body.get("n") is None else body["n"], "n", 1, _MAX_IMAGES)
    limit = service.settings.limits.rows
    if not 1 <= len(prompts) * num <= limit:
        raise bad(f"prompt: {len(prompts)} times n {num}; limits.rows is {limit}", "prompt")
    for name, allowed in _NEUTRAL.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise bad(f"{name}: is not supported here", name)
    if body.get("logprobs") is not None or body.get("echo") not in (None, False):
        raise bad("logprobs, echo: are not supported here", "logprobs")
    return [text(one, "prompt", _MAX_PROMPT) for one in prompts for _ in range(num)]


def _completing(
    body: dict[str, Any],
    prompt: str,
    version: Version,
    service: Service,
    *,
    seed_shift: int,
    on_byte: Any,
) -> Completing:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS:
        raise bad(f"stop: needs text or a list of at most {_MAX_STOPS}", "stop")
    limit = service.settings.limits.num_tokens

    def given(name: str, default: Any) -> Any:
        return default if body.get(name) is None else body[name]

    return Completing(
        prompt.encode("utf-8", "replace"),
        version.sample_shape[0],
        max_tokens=whole(given("max_tokens", 16), "max_tokens", 0, limit, "limits.num_tokens"),
        temperature=number(given("temperature", 1.0), "temperature", 0, 2),
        top_p=number(given("top_p", 1.0), "top_p", 0, 1),
        seed=seed_of(body.get("seed")) + seed_shift,
        stop=[text(one, "stop", 100).encode("utf-8", "replace") for one in stops],
        on_byte=on_byte,
    )


def _whole_answer(
    head: dict[str, Any], body: dict[str, Any], works: list[Completing], prompts: list[str]
) -> dict[str, Any]:
    choices = [
        {
            "text": bytes(work.text).decode("utf-8", "replace"),
            "index": index,
            "logprobs": None,
            "finish_reason": work.finish_reason,
        }
        for index, work in enumerate(works)
    ]
    return {**head, "choices": choices, "usage": _usage(works, prompts)}


def _usage(works: list[Completing], prompts: list[str]) -> dict[str, int]:
    """In bytes, which are the tokens here."""
    num_given = sum(len(one.encode("utf-8", "replace")) for one in prompts)
    num_made = sum(len(work.text) for work in works)
    return {
        "prompt_tokens": num_given,
        "completion_tokens": num_made,
        "total_tokens": num_given + num_made,
    }


async def _first(
    running: asyncio.Task[Job], arrived: asyncio.Queue[tuple[int, int] | None]
) -> tuple[int, int] | None:
    """Wait for a byte, so that a refusal still has its status. Raises Refusal."""
    try:
        first = await arrived.get()
    except asyncio.CancelledError:
        running.cancel()
        raise
    if first is None:
        await running
    return first


async def _events(
    head: dict[str, Any],
    works: list[Completing],
    running: asyncio.Task[Job],
    arrived: asyncio.Queue[tuple[int, int] | None],
    first: tuple[int, int] | None,
    prompts: list[str] | None,
) -> AsyncIterator[str]:
    """Server-sent events; when the client leaves, the rows leave the engine.

    With `prompts` the last one tells what was used.
    """
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in works]

    def event(index: int, words: str, reason: str | None) -> str:
        choice = {"text": words, "index": index, "logprobs": None, "finish_reason": reason}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    try:
        one = first
        while one is not None:
            index, token = one
            words = decoders[index].decode(bytes((token,)))
            if words:
                yield event(index, words, None)
            one = await arrived.get()
        try:
            await running
        except Refusal as refusal:
            yield error_event(refusal)
            return
        for index, work in enumerate(works):
            yield event(index, decoders[index].decode(b"", True), work.finish_reason)
        if prompts is not None:
            told = {**head, "choices": [], "usage": _usage(works, prompts)}
            yield f"data: {json.dumps(told)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, Refusal):
            await running
