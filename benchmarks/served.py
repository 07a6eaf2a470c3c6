"""What the benchmarks of serving share: random experts, the bare loop over them, plain HTTP.

Experts are small diffusion transformers with random weights: time does not depend on them.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import socket
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic.core.experts.ensemble import mix_velocities
from elastic.core.experts.flow import sample
from elastic.core.experts.manifest import ModelSpec
from elastic.core.experts.repository import Repository, Trained
from policies.routing import Policy
from serve.work import noise_of

NUM_STEPS, NUM_EXPERTS, SHAPE = 50, 4, (1, 8, 8)
WITHIN = 1e-3
"""A sample is right when no pixel differs by more."""

_MODULE = "elastic.core.experts.dit"


def trained(target: str, seed: int, **arguments: Any) -> Trained:
    spec = ModelSpec(target=f"{_MODULE}:{target}", arguments=arguments)
    torch.manual_seed(seed)
    kind = getattr(importlib.import_module(_MODULE), target)
    weights = kind(**arguments).state_dict()
    return Trained(
        spec, {name: one + 0.02 * torch.randn_like(one) for name, one in weights.items()}
    )


@contextlib.contextmanager
def repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="serving") as folder:
        path = Path(folder) / "bench"
        experts = {f"expert-{k}": trained("DiT", k, shape=list(SHAPE)) for k in range(NUM_EXPERTS)}
        router = trained("DiTRouter", 99, shape=list(SHAPE), num_experts=NUM_EXPERTS)
        fields: dict[str, Any] = {
            "name": "bench",
            "task": "flow",
            "input": {"shape": SHAPE, "dtype": "FP32"},
            "selection": {"kind": "top_k", "k": 1},
            "sampling": {"num_steps": NUM_STEPS},
        }
        Repository.create(path, experts, router, **fields)
        yield path


class Bare:
    """The plain loop: router, the chosen experts, a step."""

    def __init__(self, path: Path, policy: Policy) -> None:
        self._policy = policy
        found = Repository.open(path)
        self._names, self._router = found.names, found.load_router()
        self._experts = [found.load_expert(name) for name in found.names]

    def __call__(self, seed: int, alive: Collection[str] | None = None) -> torch.Tensor:
        """The sample of a seed; `alive`: only these experts can be asked."""
        alive_K = np.array([alive is None or one in alive for one in self._names], np.bool_)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            shares = self._router(x, t).double().softmax(1).numpy()
            weights_BK = torch.from_numpy(self._policy.weights(shares, alive_K))
            return mix_velocities(self._experts, weights_BK, x, t)

        with torch.inference_mode():
            return sample(velocity, noise_of(seed, SHAPE)[None], NUM_STEPS)[0]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def ask(
    connection: http.client.HTTPConnection, path: str, body: Any = None
) -> tuple[int, Any, bytes]:
    headers = {"content-type": "application/json"}
    given = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, given, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()
