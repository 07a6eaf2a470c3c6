"""From what a client sent to rows, and back: what all APIs share.

Everything is checked here, before a row exists. Never parses HTTP.
"""

from __future__ import annotations

import secrets
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic.core.errors import ConfigError
from policies.routing import Selection, policy_from
from serve.engine import Job
from serve.forms import whole
from serve.mixing import Only
from serve.refusals import Refusal, bad
from serve.service import Service
from serve.version import Version, check_policy

_MAX_SEED = 2**63 - 1


def headers_of(job: Job) -> dict[str, str]:
    """How a request was routed, for its response."""
    names = job.version.names
    return {
        "x-elastic-experts": ",".join(names[k] for k in sorted(job.answered)),
        "x-elastic-degraded": "true" if job.lost else "false",
        "x-elastic-version": job.version.identity,
    } | ({"x-elastic-lost": ",".join(names[k] for k in sorted(job.lost))} if job.lost else {})


def policy_of(section: Any, version: Version) -> Selection | None:
    """The policy that a request asks for; None: that of the version. Raises Refusal."""
    if section is None:
        return None
    if not isinstance(section, dict):
        raise bad("selection: needs an object such as {'kind': 'top_k', 'k': 1}", "selection")
    try:
        policy = policy_from(section)
        check_policy(policy, version.task)
    except (ValueError, ConfigError) as error:
        raise bad(str(error)[:300], "selection") from None
    return policy


def model_policy(name: Any, version: Version) -> Selection | None:
    """None for the repository's own name, one expert for an expert's. Raises Refusal: 404."""
    if name == version.manifest.name:
        return None
    if isinstance(name, str) and name in version.index:
        return Only(version.index[name])
    shown = str(name)[:80]
    names = ", ".join((version.manifest.name, *version.names))
    told = f"no model {shown!r}; there are {names}"
    raise Refusal(told, 404, "model_not_found", param="model")  # OpenAI's word for it


def seed_of(value: Any) -> int:
    """The seed that was given, or a random one. Raises Refusal."""
    return secrets.randbits(48) if value is None else whole(value, "seed", 0, _MAX_SEED)


def num_steps_of(value: Any, version: Version, service: Service) -> int:
    """Denoising steps. Raises Refusal."""
    sampling = version.manifest.sampling
    if value is None and sampling is not None:
        return min(sampling.num_steps, service.settings.limits.num_steps)
    limit = service.settings.limits.num_steps
    return whole(value, "num_steps", 1, limit, "limits.num_steps")


def needs_task(version: Version, task: str) -> None:
    """Raises Refusal where a model does something else."""
    if version.task != task:
        raise bad(f"model {version.manifest.name} is a {version.task} model; needs {task}", "model")


def to_png(sample: Tensor, size: tuple[int, int] | None = None) -> bytes:
    """A sample (C, H, W) with values from -1 to 1 as PNG, enlarged to (width, height) by repeating
    pixels. Raises Refusal where it is no picture."""
    if sample.ndim != 3 or sample.shape[0] not in (1, 3):
        raise bad(f"samples of shape {tuple(sample.shape)} are no pictures of 1 or 3 channels")
    levels = ((sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = levels.permute(1, 2, 0).numpy()
    if size is not None:
        rows = np.arange(size[1]) * pixels.shape[0] // size[1]
        columns = np.arange(size[0]) * pixels.shape[1] // size[0]
        pixels = pixels[rows][:, columns]
    height, width, channels = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # filter 0 before each line
    lines[:, 1:] = pixels.reshape(height, -1)
    kind = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG file (W3C PNG, section 5.3)."""
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def status_of(service: Service, mode: str) -> dict[str, Any]:
    """What the page shows."""
    version = service.rollout.current
    candidate = service.rollout.candidate
    manifest = version.manifest
    policy = version.policy
    section: Mapping[str, Any] = {
        name: getattr(policy, name) for name in type(policy).__dataclass_fields__
    }
    return {
        "name": manifest.name,
        "task": manifest.task,
        "mode": mode,
        "is_ready": service.is_ready(),
        "version": version.identity,
        "candidate": None if candidate is None else candidate.identity,
        "rolled_back": dict(service.rollout.refused),
        "selection": section,
        "shape": list(manifest.input.shape),
        "labels": manifest.labels,
        "num_steps": None if manifest.sampling is None else manifest.sampling.num_steps,
        "max_steps": service.settings.limits.num_steps,
        "queue_rows": service.engine.num_rows,
        "experts": [
            {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason}
            for one in service.engine.patients.conditions(version)
        ],
    }
