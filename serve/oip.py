"""The Open Inference Protocol v2: metadata and inference, as JSON or with binary tensors.

Specification: KServe, Open Inference Protocol (REST), and its extensions of binary tensor data and
of the model repository. Inputs by task: a flow takes `seed` (B,) or `noise` (B, shape), a
classifier `input` (B, shape), a language model `text` (B,) or `tokens` (B, T).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from starlette.responses import Response

from serve.asking import headers_of, model_policy, num_steps_of, policy_of
from serve.engine import Job
from serve.forms import json_response, known_fields, parse_object, text, whole
from serve.refusals import bad, too_large
from serve.service import Ask, Service
from serve.tensors import Array, Named, from_bytes, from_json, to_bytes, to_json
from serve.version import NUM_BYTES, Version
from serve.work import Denoising, Predicting, Work, noise_of

_HEADER_LENGTH = "inference-header-content-length"
_POLICY_FIELDS = ("k", "threshold", "at_most", "low", "high")
_PARAMETERS = ("num_steps", "selection", "binary_data_output", "timeout", *_POLICY_FIELDS)
_IGNORED = ("sequence_id", "sequence_start", "sequence_end", "priority", "content_type")
_MAX_MICROSECONDS = 2**63


def metadata(version: Version, name: str, versions: Sequence[Version]) -> dict[str, Any]:
    """Of the repository or of one of its experts."""
    model_policy(name, version)
    shape = list(version.sample_shape)
    inputs: dict[str, list[dict[str, Any]]] = {
        "flow": [_tensor("seed", "INT64", [-1]), _tensor("noise", "FP32", [-1, *shape])],
        "classifier": [_tensor("input", "FP32", [-1, *shape])],
        "language": [_tensor("text", "BYTES", [-1]), _tensor("tokens", "UINT8", [-1, -1])],
    }
    outputs = [
        _tensor(one, _DATATYPES[one], [-1, *_output_shape(version, one)])
        for one in output_names(version)
    ]
    return {
        "name": name,
        "versions": [one.identity for one in versions],
        "platform": "pytorch",
        "inputs": inputs[version.task],
        "outputs": outputs,
    }


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


_DATATYPES = {
    "sample": "FP32",
    "weights": "FP32",
    "probabilities": "FP32",
    "class": "INT64",
    "label": "BYTES",
}


def output_names(version: Version) -> tuple[str, ...]:
    """The first is what is given where nothing is asked for."""
    if version.task == "flow":
        return ("sample", "weights")
    if version.task == "language":
        return ("probabilities",)
    return ("probabilities", "class", *(("label",) if version.manifest.labels else ()))


def _output_shape(version: Version, name: str) -> list[int]:
    if name == "sample":
        return list(version.sample_shape)
    if name == "weights":
        return [-1, len(version.names)]
    return list(version.answer_shape()) if name == "probabilities" else []


async def infer(
    service: Service, name: str, ask: Ask, raw: bytes, header_length: str | None
) -> Response:
    """Answer an inference request. Raises Refusal."""
    version = service.version_for(ask)
    only = model_policy(name, version)
    body, rest = _split(raw, header_length)
    known_fields(body, ("id", "parameters", "inputs", "outputs"))
    identity = None if body.get("id") is None else text(body["id"], "id", 256)
    parameters = _object(body.get("parameters"), "parameters")
    known_fields(parameters, (*_PARAMETERS, *_IGNORED))
    policy = only or policy_of(_selection(parameters), version)
    outputs = _outputs(body.get("outputs"), parameters, version, is_binary=bool(header_length))
    inputs = _inputs(body.get("inputs"), rest, version, service)
    works = _works(inputs, version, parameters, service)
    timeout_s = _timeout_of(parameters, ask.timeout_s)
    ask = replace(ask, policy=policy, keeps_trace="weights" in outputs, timeout_s=timeout_s)
    job = await service.run(works, version, ask)
    tensors = [(_result(one, job), binary) for one, binary in outputs.items()]
    head: dict[str, Any] = {"model_name": name, "model_version": version.identity}
    head["id"] = identity or ask.request_id
    return _response(head, tensors, headers_of(job))


def _split(raw: bytes, header_length: str | None) -> tuple[dict[str, Any], bytes]:
    """The JSON, and the bytes of tensors behind it."""
    if header_length is None:
        return parse_object(raw), b""
    if not header_length.isdecimal() or len(header_length) > 18 or int(header_length) > len(raw):
        raise bad(f"{_HEADER_LENGTH} {header_length[:40]!r}: needs a length within the body")
    length = int(header_length)
    return parse_object(raw[:length]), raw[length:]


def _object(value: Any, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise bad(f"{name}: needs an object", name)
    return value or {}


def _timeout_of(parameters: Mapping[str, Any], limit_s: float) -> float:
    """Triton's `timeout`, in microseconds; 0 is none. Raises Refusal."""
    given = parameters.get("timeout") or 0
    return min(whole(given, "timeout", 0, _MAX_MICROSECONDS) / 1e6 or limit_s, limit_s)


def _selection(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    settings = {name: parameters[name] for name in _POLICY_FIELDS if name in parameters}
    if "selection" not in parameters:
        if settings:
            raise bad(f"parameters: {', '.join(settings)} without selection", "selection")
        return None
    return {"kind": parameters["selection"], **settings}


def _outputs(
    given: Any, parameters: Mapping[str, Any], version: Version, *, is_binary: bool
) -> dict[str, bool]:
    """What is asked for, and whether as bytes. A flow's weights only where they are named."""
    everything = parameters.get("binary_data_output", False) is True
    known = output_names(version)
    if given is None or given == []:
        return {one: everything for one in known if one != "weights"}
    if not isinstance(given, list) or len(given) > len(known):
        raise bad(f"outputs: needs a list of at most {len(known)} objects", "outputs")
    found: dict[str, bool] = {}
    for one in given:
        name = one.get("name") if isinstance(one, dict) else None
        if name not in known:
            raise bad(f"output {str(name)[:40]!r}: none of {', '.join(known)}", "outputs")
        found[name] = _object(one.get("parameters"), "parameters").get("binary_data") is True or (
            everything and "parameters" not in one
        )
    return found


def _inputs(given: Any, rest: bytes, version: Version, service: Service) -> dict[str, Named]:
    if not isinstance(given, list) or not 1 <= len(given) <= 4:
        raise bad("inputs: needs a list of 1 to 4 tensors", "inputs")
    limit = service.settings.limits.rows * max(math.prod(version.sample_shape), 1)
    found: dict[str, Named] = {}
    place = 0
    for one in given:
        parameters = _object(one.get("parameters") if isinstance(one, dict) else None, "parameters")
        size = parameters.get("binary_data_size")
        if size is None:
            tensor = from_json(one, limit)
        elif isinstance(size, bool) or not isinstance(size, int) or not size >= 0:
            raise bad("binary_data_size: needs a whole number from 0", "inputs")
        elif place + size > len(rest):
            raise bad(f"binary_data_size {size}: {len(rest) - place} bytes are left", "inputs")
        else:
            tensor = from_bytes(one, rest[place : place + size], limit)
            place += size
        if tensor.name in found:
            raise bad(f"input {tensor.name!r}: given twice", "inputs")
        found[tensor.name] = tensor
    if place != len(rest):
        raise bad(f"{len(rest) - place} bytes behind the last binary tensor", "inputs")
    return found


def _works(
    inputs: Mapping[str, Named],
    version: Version,
    parameters: Mapping[str, Any],
    service: Service,
) -> list[Work]:
    known = {"flow": ("seed", "noise"), "classifier": ("input",), "language": ("text", "tokens")}
    names = known[version.task]
    if len(inputs) != 1 or next(iter(inputs)) not in names:
        shown = ", ".join(one[:40] for one in inputs)
        raise bad(f"inputs {shown}: needs one of {' or '.join(names)}", "inputs")
    tensor = next(iter(inputs.values()))
    array, limit = tensor.array, service.settings.limits.rows
    if array.ndim == 0 or not len(array) >= 1:
        raise bad(f"input {tensor.name!r}: needs at least one row", "inputs")
    if len(array) > limit:
        raise too_large(f"input {tensor.name!r}: {len(array)} rows; limits.rows is {limit}")
    if version.task == "flow":
        num_steps = num_steps_of(parameters.get("num_steps"), version, service)
        return [Denoising(one, num_steps) for one in _noises(tensor, version, service)]
    if version.task == "classifier":
        return [Predicting(one) for one in _floats(tensor, version, service)]
    return [Predicting(one) for one in _tokens(tensor, version)]


def _noises(tensor: Named, version: Version, service: Service) -> list[torch.Tensor]:
    if tensor.name == "noise":
        return _floats(tensor, version, service)
    seeds = tensor.array
    if seeds.ndim != 1 or seeds.dtype.kind not in "iu" or (seeds < 0).any():
        raise bad("input 'seed': needs whole numbers from 0, shape (B,)", "inputs")
    return [noise_of(int(seed) % 2**63, version.sample_shape) for seed in seeds]


def _floats(tensor: Named, version: Version, service: Service) -> list[torch.Tensor]:
    array, shape = tensor.array, version.sample_shape
    if array.dtype.kind not in "fiub" or array.shape[1:] != shape:
        told = f"{tensor.datatype} {list(array.shape)}"
        raise bad(f"input {tensor.name!r}: {told}; needs numbers [-1, {list(shape)}]", "inputs")
    with np.errstate(over="ignore"):
        rows = torch.from_numpy(array.astype(np.float32))
    if not bool(torch.isfinite(rows).all()):
        raise bad(f"input {tensor.name!r}: a value is not finite as FP32", "inputs")
    limit = service.settings.limits.magnitude
    if (largest := float(rows.abs().max())) > limit:
        told = f"a value of {largest:g}; limits.magnitude is {limit:g}"
        raise bad(f"input {tensor.name!r}: {told}", "inputs")
    return list(rows)


def _tokens(tensor: Named, version: Version) -> list[torch.Tensor]:
    array, context = tensor.array, version.sample_shape[0]
    if tensor.name == "text":
        if tensor.datatype != "BYTES" or array.ndim != 1:
            raise bad("input 'text': needs BYTES, shape (B,)", "inputs")
        return [torch.tensor(list(one[-context:] or b"\n"), dtype=torch.int64) for one in array]
    is_token = array.ndim == 2 and array.dtype.kind in "iu" and 1 <= array.shape[1] <= context
    if not is_token or array.min() < 0 or array.max() >= NUM_BYTES:
        raise bad(f"input 'tokens': needs (B, 1 to {context}) of 0 to 255", "inputs")
    return list(torch.from_numpy(array.astype(np.int64)))


def _result(name: str, job: Job) -> Named:
    return Named(name, _DATATYPES[name], _array(name, job))


def _array(name: str, job: Job) -> Array:
    if name == "sample":
        return torch.stack([one.x for one in job.works if isinstance(one, Denoising)]).numpy()
    if name == "weights":
        return np.array(job.trace, np.float32)
    found = [one.probabilities for one in job.works if isinstance(one, Predicting)]
    probabilities = torch.stack([one for one in found if one is not None])
    if name == "probabilities":
        return probabilities.float().numpy()
    best = probabilities.argmax(dim=1).numpy()
    if name == "class":
        return best.astype(np.int64)
    labels = job.version.manifest.labels or ()
    named = np.empty(len(best), object)
    named[:] = [labels[one].encode() for one in best]
    return named


def _response(
    head: dict[str, Any], tensors: Sequence[tuple[Named, bool]], headers: Mapping[str, str]
) -> Response:
    described, raws = [], []
    for tensor, is_binary in tensors:
        if is_binary:
            described_one, raw = to_bytes(tensor)
            raws.append(raw)
        else:
            described_one = to_json(tensor)
        described.append(described_one)
    head["outputs"] = described
    if not raws:
        return json_response(head, headers=headers)
    start = json.dumps(head, allow_nan=False).encode()
    sizes = {_HEADER_LENGTH: str(len(start)), **headers}
    return Response(b"".join((start, *raws)), 200, sizes, media_type="application/octet-stream")
