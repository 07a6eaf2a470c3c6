"""Small repositories of random experts, experts that misbehave on command, and a clock."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from torch import Tensor, nn

from elastic.core.experts.manifest import ModelSpec
from elastic.core.experts.repository import Repository, Trained
from serve.app import App
from serve.engine import Engine, Job
from serve.metrics import Metrics
from serve.pool import Inputs, LocalPool
from serve.service import Service
from serve.settings import Serving, load_serving
from serve.version import Version, read_version
from tests.integration.support import wait_until

SHAPE, NUM_CLASSES, CONTEXT = (1, 4, 4), 3, 8


class Flow(nn.Module):
    """(x, t) -> `outputs` numbers, or a velocity where `outputs` is 0."""

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(17, 24), nn.SiLU(), nn.Linear(24, outputs or 16))
        self._shape = (outputs,) if outputs else SHAPE

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x.flatten(1), t[:, None]], dim=1))
        return out.view(-1, *self._shape)


class Classes(nn.Module):
    """x -> logits."""

    def __init__(self, outputs: int = NUM_CLASSES) -> None:
        super().__init__()
        self.net = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.flatten(1))
        return out


class Bytes(nn.Module):
    """Tokens -> logits of each next byte, or of an expert where `outputs` is given."""

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 12)
        self.head = nn.Linear(12, outputs or 256)
        self._per_token = not outputs

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        out: Tensor = self.head(h if self._per_token else h.mean(dim=1))
        return out


_MODULES: dict[str, type[nn.Module]] = {"flow": Flow, "classifier": Classes, "language": Bytes}


def trained(task: str, seed: int, **arguments: Any) -> Trained:
    """A module with random weights."""
    kind = _MODULES[task]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module = kind(**arguments)
    spec = ModelSpec(target=f"tests.served:{kind.__name__}", arguments=arguments)
    return Trained(spec, module.state_dict())


def make_repository(
    path: Path,
    task: str = "flow",
    *,
    num_experts: int = 3,
    selection: Mapping[str, Any] | None = None,
) -> Repository:
    fields: dict[str, Any] = {
        "name": "tiny",
        "task": task,
        "selection": selection or {"kind": "all"},
    }
    fields["input"] = {"shape": SHAPE, "dtype": "FP32"}
    if task == "flow":
        fields["sampling"] = {"num_steps": 5}
    elif task == "classifier":
        fields |= {"num_classes": NUM_CLASSES, "labels": ["a", "b", "c"]}
    else:
        fields["input"] = {"shape": (CONTEXT,), "dtype": "UINT8"}
    experts = {f"expert-{k}": trained(task, k) for k in range(num_experts)}
    router = trained(task, 99, outputs=num_experts)
    return Repository.create(path, experts, router, **fields)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Unruly(LocalPool):
    """Experts that do what a test says: by index, what to make of an answer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.faults: dict[int, Callable[[Tensor], Tensor | Exception]] = {}
        self.num_rows: list[tuple[int, int]] = []
        """Of each call: which expert, how many rows."""
        self.only_new: str | None = None
        """The version that works; all others fail."""

    def ask(
        self, version: Version, calls: Mapping[int, Inputs], timeout_s: float
    ) -> dict[int, Tensor | Exception]:
        answers = super().ask(version, calls, timeout_s)
        for k, answer in answers.items():
            self.num_rows.append((k, len(calls[k][0])))
            if self.only_new not in (None, version.identity):
                answers[k] = RuntimeError("a version that is worse")
            if k in self.faults and isinstance(answer, Tensor):
                answers[k] = self.faults[k](answer)
        return answers


class Bench:
    """An engine on a repository, without threads."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.settings: Serving = load_serving({"repository": str(path), **settings})
        self.clock = FakeClock()
        self.pool = Unruly(self.clock)
        self.metrics = Metrics("bench")
        self.version = read_version(path, self.settings.selection)
        assert self.pool.prepare(self.version) == {}
        self.engine = Engine(self.pool, self.settings, self.clock, self.metrics)

    def job(self, works: Iterable[Any], **fields: Any) -> Job:
        """A job in the queue."""
        given = {"version": self.version, "policy": self.version.policy, "deadline_s": 1e9}
        made = Job(list(works), **{**given, **fields})
        self.engine.submit(made)
        return made

    def run(self) -> int:
        """Tick until there is nothing to do; how often that was."""
        return next(num for num in itertools.count() if not self.engine.tick())


@contextlib.contextmanager
def http(path: Path, *, pool: LocalPool | None = None, **settings: Any) -> Iterator[Http]:
    """A service at an address of loopback, without Ray, until the end of the block."""
    given = load_serving({"repository": str(path), "poll_s": 0.05, **settings})
    service = Service(given, pool or Unruly(time.monotonic))
    config = uvicorn.Config(
        App(service, "colocated").build(), log_level="warning", lifespan="off", ws="none"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        service.start()
        thread.start()
        try:
            wait_until(lambda: server.started, "the server listens")
            yield Http(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            service.stop()


@dataclass(frozen=True)
class Http:
    """Where a service listens."""

    url: str
    service: Service

    @property
    def pool(self) -> Unruly:
        assert isinstance(self.service._pool, Unruly)
        return self.service._pool

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=20)

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        if isinstance(body, bytes):
            return httpx.post(self.url + path, content=body, headers=headers, timeout=20)
        return httpx.post(self.url + path, json=body, headers=headers, timeout=20)

    def infer(self, name: str, datatype: str, data: list[Any], **more: Any) -> httpx.Response:
        """One tensor to the repository's model."""
        shape = more.pop("shape", [len(data)])
        tensor = {"name": name, "datatype": datatype, "shape": shape, "data": data}
        return self.post("/v2/models/tiny/infer", {"inputs": [tensor], **more})
