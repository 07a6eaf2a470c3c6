"""What serving experts costs: sampling, batching, HTTP, and answers while experts are killed.

python -m benchmarks.serving [--only sampling,throughput,noop,load] [--minutes N] [--mode MODE]

sampling     one image of 50 steps by the co-located service, over the bare loop of the same
             router and experts
throughput   16 clients at once, top-1, over the same with one row per call
noop         an address that does nothing, through our ingress, over a bare one of Ray Serve
load         2 clients, all experts asked, 2 replicas of each: one is killed every 10 s, one
             swapped every 20 s; every answer is checked. --mode: experts in applications of
             their own, or all of them in each replica
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ray import serve

from benchmarks import serving_load
from benchmarks.jobs import hand_over, run_parts
from benchmarks.record import figure, ratio
from benchmarks.served import NUM_STEPS, SHAPE, WITHIN, Bare, ask, free_port, repository
from elastic.cluster import local_cluster
from policies.routing import TopK
from serve.launch import Deployed, start
from serve.pool import LocalPool
from serve.service import Ask, Service
from serve.settings import load_serving
from serve.work import Denoising, noise_of

SAMPLING_LIMIT = 1.25
THROUGHPUT_LIMIT = 1 / 2.5
"""Time per image with batching over without."""
NOOP_LIMIT = 1.3
NUM_CLIENTS = 16


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
            assert (got - wanted).abs().max() < WITHIN

    with repository() as path, _service(path) as service:
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
        repository() as path,
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


def measure_noop(options: argparse.Namespace) -> None:
    """Requests that compute nothing, in turn, over one connection each."""
    times_s: dict[str, list[float]] = {"/v2/health/live": [], "/bare": []}
    with repository() as path, local_cluster():
        settings = load_serving({"repository": str(path), "port": free_port()})
        start(settings)
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
                status, _, _ = ask(connection, one)
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


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load with faults")
    parser.add_argument("--mode", choices=("distributed", "colocated"), default="distributed")
    parser.add_argument("--replicas", type=int, default=2, help="of each expert, under load")
    measure = {
        "sampling": measure_sampling,
        "throughput": measure_throughput,
        "noop": measure_noop,
        "load": serving_load.measure,
    }
    return run_parts(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
