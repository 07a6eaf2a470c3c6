"""The OpenAPI document of all addresses: what each takes, and every way it may answer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from serve.tensors import DTYPES

_JSON = "application/json"


def document(addresses: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """OpenAPI 3.1 of (method, path, access)."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, access in addresses:
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, access)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Elastic",
            "version": version("elastic"),
            "description": "Decentralized experts behind a router.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(method: str, path: str, access: str) -> dict[str, Any]:
    summary, request, answer, statuses = _WORDS[path]
    given: dict[str, Any] = {"summary": summary, "responses": {"200": _answer(answer)}}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("model", "version")
        if "{" + name + "}" in path
    ]
    if parameters:
        given["parameters"] = parameters
    if access != "anybody":
        given["security"] = [{"key": []}, {}]
        statuses = (*statuses, 400, 401, 403, 429)
    if request is not None:
        is_needed = request != "Anything"
        given["requestBody"] = {
            "required": is_needed,
            "content": {_JSON: {"schema": _ref(request)}},
        }
        statuses = (*statuses, 400, 413, 415, 429)
    kind, schema = _error_of(path)
    for status in sorted({*statuses, 400, 500}):
        content = {kind: {"schema": _ref(schema)}}
        given["responses"][str(status)] = {"description": _REASONS[status], "content": content}
    return given


def _answer(name: str) -> dict[str, Any]:
    kinds = {
        "Page": ("text/html", {"type": "string"}),
        "Metrics": ("text/plain", {"type": "string"}),
        "Empty": (_JSON, {"type": "object"}),
    }
    kind, schema = kinds.get(name, (_JSON, _ref(name)))
    content = {kind: {"schema": schema}}
    if name == "InferResponse":
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    if name == "Completion":
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": "As asked", "content": content}


def _error_of(path: str) -> tuple[str, str]:
    if path.startswith("/v2"):
        return _JSON, "InferenceError"
    return (_JSON, "OpenAIError") if path.startswith("/v1") else (
        "application/problem+json",
        "Problem",
    )  # fmt: skip


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_REASONS = {
    400: "The request makes no sense",
    401: "No API key, or an unknown one",
    403: "The key has not the right",
    404: "There is no such model or version",
    413: "Larger than a limit",
    415: "An encoding that is not read",
    429: "A rate or a queue is at its limit; come again after Retry-After",
    500: "A bug",
    503: "Nothing can answer; come again after Retry-After",
    504: "The deadline has passed",
}

_WORK = (404, 503, 504)
_INFER = ("Run a model", "InferRequest", "InferResponse", _WORK)
_META = ("What a model takes and gives", None, "ModelMetadata", (404,))
_MODEL_READY = ("Whether a model answers", None, "Empty", (404, 503))
_WORDS: dict[str, tuple[str, str | None, str, tuple[int, ...]]] = {
    "/": ("A page to generate with", None, "Page", ()),
    "/docs": ("This document as a page", None, "Page", ()),
    "/openapi.json": ("This document", None, "Empty", ()),
    "/status": ("How the service and its experts are doing", None, "Empty", ()),
    "/metrics": ("For Prometheus: this replica", None, "Metrics", ()),
    "/v2": ("What this server is", None, "Empty", ()),
    "/v2/health/live": ("Whether the engine moves", None, "Empty", (503,)),
    "/v2/health/ready": ("Whether requests are answered", None, "Empty", (503,)),
    "/v2/models/{model}": _META,
    "/v2/models/{model}/versions/{version}": _META,
    "/v2/models/{model}/ready": _MODEL_READY,
    "/v2/models/{model}/versions/{version}/ready": _MODEL_READY,
    "/v2/models/{model}/infer": _INFER,
    "/v2/models/{model}/versions/{version}/infer": _INFER,
    "/v2/repository/index": ("All models and their states", "Anything", "Index", ()),
    "/v2/repository/models/{model}/load": (
        "Let an expert answer again, or look for a new version",
        "Anything",
        "Empty",
        (404, 503),
    ),
    "/v2/repository/models/{model}/unload": ("Take an expert out", "Anything", "Empty", (404, 503)),
    "/v1/models": ("All models", None, "Models", ()),
    "/v1/models/{model}": ("One model", None, "Model", (404,)),
    "/v1/images/generations": ("Generate pictures", "ImageRequest", "Images", _WORK),
    "/v1/completions": ("Complete texts", "CompletionRequest", "Completion", _WORK),
}


def _object(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _list(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of}


_TEXT, _WHOLE, _NUMBER, _BOOL = (
    {"type": one} for one in ("string", "integer", "number", "boolean")
)
_SHAPE = _list({"type": "integer", "minimum": -1})
_SELECTION = {
    **_object(["kind"], kind=_TEXT, k=_WHOLE, threshold=_NUMBER, at_most=_WHOLE),
    "description": "Such as {'kind': 'top_k', 'k': 2} or {'kind': 'all'}",
}
_TENSOR = _object(
    ["name", "shape", "datatype"],
    name=_TEXT,
    shape=_list({"type": "integer", "minimum": 0}),
    datatype={"type": "string", "enum": list(DTYPES)},
    parameters={"type": "object"},
    data={"type": "array"},
)

_SCHEMAS: dict[str, Any] = {
    "Anything": {"type": "object"},
    "InferRequest": _object(
        ["inputs"],
        id=_TEXT,
        parameters={"type": "object"},
        inputs={**_list(_TENSOR), "minItems": 1, "maxItems": 4},
        outputs=_list(_object(["name"], name=_TEXT, parameters={"type": "object"})),
    ),
    "InferResponse": _object(
        ["model_name", "outputs"],
        model_name=_TEXT,
        model_version=_TEXT,
        id=_TEXT,
        outputs=_list(_TENSOR),
    ),
    "ModelMetadata": _object(
        ["name", "versions", "platform", "inputs", "outputs"],
        name=_TEXT,
        versions=_list(_TEXT),
        platform=_TEXT,
        inputs=_list(_object(["name", "shape", "datatype"], shape=_SHAPE)),
        outputs=_list(_object(["name", "shape", "datatype"], shape=_SHAPE)),
    ),
    "Index": _list(
        _object(["name", "version", "state"], name=_TEXT, version=_TEXT, state=_TEXT, reason=_TEXT)
    ),
    "Model": _object(["id", "object"], id=_TEXT, object=_TEXT, created=_WHOLE, owned_by=_TEXT),
    "Models": _object(["object", "data"], object=_TEXT, data=_list(_ref("Model"))),
    "ImageRequest": _object(
        ["prompt"],
        prompt={"type": "string", "maxLength": 32000},
        model=_TEXT,
        n={"type": "integer", "minimum": 1, "maximum": 10},
        size={"type": "string", "description": "WxH, or auto"},
        response_format={"type": "string", "enum": ["b64_json"]},
        seed={"type": "integer", "minimum": 0},
        num_steps={"type": "integer", "minimum": 1},
        selection=_SELECTION,
        trace={**_BOOL, "description": "Tell which experts answered at each step"},
    ),
    "Images": _object(
        ["created", "data"], created=_WHOLE, data=_list(_object(["b64_json"], b64_json=_TEXT))
    ),
    "CompletionRequest": _object(
        ["prompt"],
        prompt={"anyOf": [_TEXT, _list(_TEXT)]},
        model=_TEXT,
        max_tokens={"type": "integer", "minimum": 0},
        temperature={"type": "number", "minimum": 0, "maximum": 2},
        top_p={"type": "number", "minimum": 0, "maximum": 1},
        n={"type": "integer", "minimum": 1, "maximum": 10},
        stop={"anyOf": [_TEXT, _list(_TEXT)]},
        seed={"type": "integer", "minimum": 0},
        stream=_BOOL,
        selection=_SELECTION,
    ),
    "Completion": _object(
        ["id", "object", "choices"],
        id=_TEXT,
        object=_TEXT,
        created=_WHOLE,
        model=_TEXT,
        choices=_list({"type": "object"}),
        usage={"type": "object"},
    ),
    "InferenceError": _object(["error"], error=_TEXT),
    "OpenAIError": _object(
        ["error"], error=_object(["message", "type"], message=_TEXT, type=_TEXT)
    ),
    "Problem": _object(
        ["type", "title", "status"], type=_TEXT, title=_TEXT, status=_WHOLE, detail=_TEXT
    ),
}
