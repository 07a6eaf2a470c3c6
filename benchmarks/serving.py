"""What serving experts costs: sampling, batching, HTTP, and answers while experts are killed.

    python -m benchmarks.serving [--only sampling,throughput,noop,load] [--minutes N] [--quick]

    sampling     one image of 50 steps by the co-located service, over the bare loop of the same
                 router and experts
    throughput   16 clients at once, top-1, over the same with one row per call
    noop         an address that does nothing, through our ingress, over a bare one of Ray Serve
    load         2 clients, experts in applications of their own, all of them asked: one is killed
                 every 10 s, one swapped every 20 s; every answer is checked

Experts are small diffusion transformers with random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve

from benchmarks.jobs import hand_over, run_parts
from benchmarks.record import figure, ratio
from elastic.cluster import local_cluster
from elastic.core.experts.ensemble import mix_velocities
from elastic.core.experts.flow import sample
from elastic.core.experts.manifest import ModelSpec
from elastic.core.experts.repository import Repository, Trained
from policies.routing import All, Policy, TopK
from serve.launch import Deployed, http_options
from serve.pool import LocalPool
from serve.service import Ask, Service
from serve.settings import load_serving
from serve.work import Denoising, noise_of

SAMPLING_LIMIT = 1.25
THROUGHPUT_LIMIT = 1 / 2.5
"""Time per image with batching over without."""
NOOP_LIMIT = 1.3
UNAVAILABLE_LIMIT = 0.001
SLOWEST_LIMIT = 5.0
"""p99 under faults over the quiet p99."""

NUM_STEPS, NUM_EXPERTS, NUM_CLIENTS, SHAPE = 50, 4, 16, (1, 8, 8)
_KILL_EVERY_S, _SWAP_EVERY_S = 10.0, 20.0
_SEED = 5
_MODULE = "elastic.core.experts.dit"
_WITHIN = 1e-3
"""An answer is right when no pixel differs by more."""


def _trained(target: str, seed: int, **arguments: Any) -> Trained:
    spec = ModelSpec(target=f"{_MODULE}:{target}", arguments=arguments)
    torch.manual_seed(seed)
    kind = getattr(importlib.import_module(_MODULE), target)
    weights = kind(**arguments).state_dict()
    return Trained(
        spec, {name: one + 0.02 * torch.randn_like(one) for name, one in weights.items()}
    )


@contextlib.contextmanager
def _repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="serving") as folder:
        path = Path(folder) / "bench"
        experts = {f"expert-{k}": _trained("DiT", k, shape=list(SHAPE)) for k in range(NUM_EXPERTS)}
        router = _trained("DiTRouter", 99, shape=list(SHAPE), num_experts=NUM_EXPERTS)
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
        repository = Repository.open(path)
        self._router = repository.load_router()
        self._experts = [repository.load_expert(name) for name in repository.names]
        self._alive = np.ones(len(self._experts), np.bool_)

    def __call__(self, seed: int) -> torch.Tensor:
        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            shares = self._router(x, t).double().softmax(1).numpy()
            weights_BK = torch.from_numpy(self._policy.weights(shares, self._alive))
            return mix_velocities(self._experts, weights_BK, x, t)

        with torch.inference_mode():
            return sample(velocity, noise_of(seed, SHAPE)[None], NUM_STEPS)[0]


@contextlib.contextmanager
def _service(path: Path, **settings: Any) -> Iterator[Service]:
    given = load_serving({"repository": str(path), **settings})
    service = Service(given, LocalPool(time.monotonic))
    service.start()
    try:
        yield service
    finally:
        service.stop()


async def _generate(service: Service, seed: int) -> torch.Tensor:
    work = Denoising(noise_of(seed, SHAPE), NUM_STEPS)
    await service.run([work], service.rollout.current, Ask("bench", 60.0))
    return work.x


def measure_sampling(options: argparse.Namespace) -> None:
    """One image at a time, in turn with the bare loop."""
    torch.set_num_threads(1)
    bare_s: list[float] = []
    ours_s: list[float] = []

    async def rounds(service: Service, bare: Bare) -> None:
        for seed in range(3 if options.quick else 40):
            begin_s = time.perf_counter()
            wanted = bare(seed)
            middle_s = time.perf_counter()
            got = await _generate(service, seed)
            bare_s.append(middle_s - begin_s)
            ours_s.append(time.perf_counter() - middle_s)
            assert (got - wanted).abs().max() < _WITHIN

    with _repository() as path, _service(path) as service:
        asyncio.run(rounds(service, Bare(path, TopK(k=1))))
    name = "co-located service over the bare loop, one image"
    figures = [
        figure("bare loop", bare_s[1:], unit="s"),
        figure("co-located service", ours_s[1:], unit="s"),
        ratio(name, ours_s[1:], bare_s[1:], limit=SAMPLING_LIMIT),
    ]
    hand_over("serving-sampling", options, {"num_steps": NUM_STEPS}, figures)


def measure_throughput(options: argparse.Namespace) -> None:
    """So many clients, each with one image at a time; with and without sharing calls, in turn."""
    torch.set_num_threads(1)

    async def images(service: Service) -> float:
        begin_s = time.perf_counter()
        await asyncio.gather(*(_generate(service, seed) for seed in range(NUM_CLIENTS)))
        return (time.perf_counter() - begin_s) / NUM_CLIENTS

    async def rounds(shared: Service, alone: Service) -> None:
        for _ in range(2 if options.quick else 12):
            shared_s.append(await images(shared))
            alone_s.append(await images(alone))

    shared_s: list[float] = []
    alone_s: list[float] = []
    with (
        _repository() as path,
        _service(path) as shared,
        _service(path, batching={"max_rows": 1}) as alone,
    ):
        asyncio.run(rounds(shared, alone))
    figures = [
        figure("time per image, batched", shared_s[1:], unit="s"),
        figure("time per image, one row per call", alone_s[1:], unit="s"),
        ratio("batched over not", shared_s[1:], alone_s[1:], limit=THROUGHPUT_LIMIT),
    ]
    hand_over("serving-throughput", options, {"num_clients": NUM_CLIENTS}, figures)


class Nothing:
    """The least that Ray Serve can answer."""

    async def __call__(self, request: Any) -> str:
        return "ok"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _ask(
    connection: http.client.HTTPConnection, path: str, body: Any = None
) -> tuple[int, Any, bytes]:
    headers = {"content-type": "application/json"}
    given = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, given, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def measure_noop(options: argparse.Namespace) -> None:
    """Requests that compute nothing, in turn, over one connection each."""
    times_s: dict[str, list[float]] = {"/v2/health/live": [], "/bare": []}
    with _repository() as path, local_cluster():
        settings = load_serving({"repository": str(path), "port": _free_port()})
        serve.start(http_options=http_options(settings))
        deployed = Deployed(settings, "colocated")
        bare = serve.deployment(max_ongoing_requests=1000)(Nothing).bind()
        serve.run(bare, name="bare", route_prefix="/bare")
        connections = {
            one: http.client.HTTPConnection("127.0.0.1", settings.port, timeout=30)
            for one in times_s
        }
        for number in range(40 if options.quick else 700):
            for one, connection in connections.items():
                begin_s = time.perf_counter()
                status, _, _ = _ask(connection, one)
                assert status == 200
                if number >= 20:
                    times_s[one].append(time.perf_counter() - begin_s)
        deployed.stop()
        serve.shutdown()  # type: ignore[no-untyped-call]
    ours, bare_s = times_s["/v2/health/live"], times_s["/bare"]
    figures = [
        figure("bare Serve", bare_s, unit="s"),
        figure("our ingress", ours, unit="s"),
        ratio("our ingress over bare Serve", ours, bare_s, limit=NOOP_LIMIT),
    ]
    hand_over("serving-noop", options, {}, figures)


@dataclass
class Tally:
    """What clients were told."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    num_degraded: int = 0
    num_wrong: int = 0
    strange: list[str] = field(default_factory=list)


class Client(threading.Thread):
    """Asks for one sample again and again, and checks what it gets."""

    def __init__(self, port: int, right: Sequence[np.ndarray], done: threading.Event) -> None:
        super().__init__(daemon=True)
        self._port, self._right, self._done = port, right, done
        self.tally = Tally()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        tensor = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [_SEED]}
        while not self._done.is_set():
            begin_s = time.perf_counter()
            try:
                status, headers, raw = _ask(
                    connection, "/v2/models/bench/infer", {"inputs": [tensor]}
                )
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self.tally.statuses[0] += 1
                self.tally.strange.append(repr(error))
                continue
            self.tally.seconds.append(time.perf_counter() - begin_s)
            self.tally.statuses[status] += 1
            if status == 200:
                self._check(headers, json.loads(raw)["outputs"][0]["data"])
            elif status != 503 or "retry-after" not in headers:
                self.tally.strange.append(f"{status}: {raw[:200]!r}")

    def _check(self, headers: Any, data: list[float]) -> None:
        got = np.array(data)
        if headers["x-elastic-degraded"] == "true":
            self.tally.num_degraded += 1
            self.tally.num_wrong += not np.isfinite(got).all()
        elif min(float(np.abs(got - one).max()) for one in self._right) > _WITHIN:
            self.tally.num_wrong += 1


def _replicas() -> list[int]:
    """Processes of experts' replicas below this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            is_expert = path.read_bytes().startswith(b"ray::ServeReplica:bench-expert-")
            if is_expert and os.getsid(int(path.parent.name)) == os.getsid(0):
                found.append(int(path.parent.name))
    return sorted(found)


def _disturb(path: Path, until_s: float, weights: Sequence[Any], told: Counter[str]) -> None:
    """Kill and swap until it is time."""
    next_kill_s = next_swap_s = time.monotonic() + _KILL_EVERY_S / 2
    while time.monotonic() < until_s:
        now_s = time.monotonic()
        replicas = _replicas()
        if now_s >= next_kill_s and replicas:
            with contextlib.suppress(ProcessLookupError):
                os.kill(replicas[told["killed"] % len(replicas)], signal.SIGKILL)
                told["killed"] += 1
            next_kill_s = now_s + _KILL_EVERY_S
        if now_s >= next_swap_s:
            told["swapped"] += 1
            Repository.open(path).replace_expert("expert-0", weights[told["swapped"] % 2])
            next_swap_s = now_s + _SWAP_EVERY_S
        time.sleep(0.1)


def _clients(port: int, right: Sequence[np.ndarray], work: Any) -> Tally:
    done = threading.Event()
    clients = [Client(port, right, done) for _ in range(2)]
    for one in clients:
        one.start()
    work()
    done.set()
    whole = Tally()
    for one in clients:
        one.join(timeout=90)
        whole.statuses += one.tally.statuses
        whole.seconds += one.tally.seconds
        whole.num_degraded += one.tally.num_degraded
        whole.num_wrong += one.tally.num_wrong
        whole.strange += one.tally.strange
    return whole


def measure_load(options: argparse.Namespace) -> None:
    """Quiet for a while, then kills and swaps."""
    minutes = 0.3 if options.quick else options.minutes
    told: Counter[str] = Counter()
    with _repository() as path, local_cluster():
        other = _trained("DiT", 50, shape=list(SHAPE)).weights
        first = Repository.open(path).load_expert("expert-0").state_dict()
        copy = path.parent / "copy"
        shutil.copytree(path, copy)
        Repository.open(copy).replace_expert("expert-0", other)
        right = [Bare(one, All())(_SEED).flatten().numpy() for one in (path, copy)]
        settings = load_serving(
            {
                "repository": str(path),
                "port": _free_port(),
                "selection": {"kind": "all"},  # so that each expert is missed
                "placement": {
                    "expert_replicas": options.replicas,
                    "num_cpus": 0.01,
                },
            }
        )
        serve.start(http_options=http_options(settings))
        deployed = Deployed(settings, "distributed")
        quiet = _clients(settings.port, right, lambda: time.sleep(10 if options.quick else 30))
        until_s = time.monotonic() + 60 * minutes
        with ThreadPoolExecutor(1):
            load = _clients(
                settings.port, right, lambda: _disturb(path, until_s, (first, other), told)
            )
        deployed.stop()
        serve.shutdown()  # type: ignore[no-untyped-call]
    num = sum(load.statuses.values())
    other_errors = sum(count for status, count in load.statuses.items() if status not in (200, 503))
    name = "p99 under faults over the quiet p99"
    p99 = [float(np.percentile(one.seconds, 99)) for one in (load, quiet)]
    figures = [
        figure("requests under faults", [num], unit=""),
        figure(
            "share not answered by 200",
            [1 - load.statuses[200] / num],
            unit="",
            limit=UNAVAILABLE_LIMIT,
            note=str(dict(load.statuses)),
        ),
        figure("share of degraded answers", [load.num_degraded / num], unit=""),
        figure("wrong answers", [load.num_wrong + quiet.num_wrong], unit="", limit=0),
        figure("errors other than 503 with Retry-After", [other_errors], unit="", limit=0),
        figure("quiet p99", [p99[1]], unit="s"),
        figure("p99 under faults", [p99[0]], unit="s"),
        figure(name, [p99[0] / p99[1]], unit="x", limit=SLOWEST_LIMIT),
    ]
    config = {"minutes": minutes, "replicas": options.replicas, **told}
    hand_over("serving-load", options, {**config, "strange": load.strange[:5]}, figures)


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load with faults")
    parser.add_argument("--replicas", type=int, default=2, help="of each expert, under load")
    measure = {
        "sampling": measure_sampling,
        "throughput": measure_throughput,
        "noop": measure_noop,
        "load": measure_load,
    }
    return run_parts(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
