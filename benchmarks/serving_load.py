"""Two clients ask while replicas that hold experts are killed, and an expert is swapped.

Part `load` of `benchmarks.serving`. Each answer is compared with the bare loop over the experts
that it names, in the version that it names; one whose experts changed on the way, only with being
finite.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve

from benchmarks.jobs import hand_over, say
from benchmarks.record import Figure, figure
from benchmarks.served import WITHIN, Bare, ask, free_port, repository, trained
from elastic.cluster import local_cluster
from elastic.core.experts.repository import Repository
from policies.routing import All
from serve.launch import Deployed, start
from serve.settings import load_serving
from serve.version import identity_of

UNAVAILABLE_LIMIT = 0.001
SLOWEST_LIMIT = 5.0
"""p99 under faults over the quiet p99."""

_NUM_CLIENTS, _NUM_SEEDS = 2, 8
_KILL_EVERY_S, _SWAP_EVERY_S = 10.0, 20.0
_QUIET_S = 30.0
_CLIENT_TIMEOUT_S = 75.0
_HOLDERS = {
    "distributed": b"ray::ServeReplica:bench-expert-",
    "colocated": b"ray::ServeReplica:bench:",
}
"""How the processes of replicas that hold experts are called."""


@dataclass(frozen=True)
class Answer:
    """What a client was told. Status 0: nothing."""

    seed: int
    status: int
    seconds: float
    headers: dict[str, str] = field(default_factory=dict)
    sample: Any = None
    problem: str = ""

    def named(self, header: str) -> frozenset[str]:
        return frozenset(filter(None, self.headers.get(header, "").split(",")))

    @property
    def is_served(self) -> bool:
        return self.status == 200

    @property
    def is_allowed(self) -> bool:
        """200, or 503 that says when to come again."""
        return self.is_served or (self.status == 503 and "retry-after" in self.headers)


class Client(threading.Thread):
    """Asks for one sample after the other, until it is enough."""

    def __init__(self, port: int, number: int, enough: threading.Event) -> None:
        super().__init__(daemon=True)
        self._port, self._number, self._enough = port, number, enough
        self.answers: list[Answer] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_CLIENT_TIMEOUT_S)
        for turn in itertools.count(self._number):
            if self._enough.is_set():
                return
            self.answers.append(_asked(connection, turn % _NUM_SEEDS))


def _asked(connection: http.client.HTTPConnection, seed: int) -> Answer:
    tensor = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [seed]}
    begin_s = time.perf_counter()
    try:
        status, headers, raw = ask(connection, "/v2/models/bench/infer", {"inputs": [tensor]})
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return Answer(seed, 0, time.perf_counter() - begin_s, problem=repr(error))
    took_s = time.perf_counter() - begin_s
    told = {name.lower(): value for name, value in headers.items()}
    if status != 200:
        return Answer(seed, status, took_s, told, problem=f"{status}: {raw[:200]!r}")
    sample = np.array(json.loads(raw)["outputs"][0]["data"])
    return Answer(seed, status, took_s, told, sample)


Sampling = Callable[[int, frozenset[str]], torch.Tensor]


class Judge:
    """Knows each version that was ever there, and what its experts make of a seed."""

    def __init__(self, bare: Sequence[Sampling]) -> None:
        """`bare`: what each of the weights that take turns makes of a seed and of experts."""
        self._bare = bare
        self._which: dict[str, int] = {}
        self._sample = cache(self._sampled)

    def learn(self, path: Path, which: int) -> None:
        """The version that is in the folder now has these weights."""
        self._which[identity_of(Repository.open(path, verify=False).manifest)] = which

    def is_right(self, answer: Answer) -> bool:
        """Whether it is what the experts that it names make of its seed."""
        if answer.named("x-elastic-experts") & answer.named("x-elastic-lost"):
            return bool(np.isfinite(answer.sample).all())  # who was lost answered some of its steps
        which = self._which.get(answer.headers["x-elastic-version"])
        if which is None:
            return False
        wanted = self._sample(which, answer.seed, answer.named("x-elastic-experts"))
        return bool(np.abs(answer.sample - wanted).max() <= WITHIN)

    def _sampled(self, which: int, seed: int, experts: frozenset[str]) -> np.ndarray:
        sample: np.ndarray = self._bare[which](seed, experts).flatten().numpy()
        return sample


def _holders(mode: str) -> list[int]:
    """Processes of this session that hold experts, who has been there longest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            pid = int(path.parent.name)
            if path.read_bytes().startswith(_HOLDERS[mode]) and os.getsid(pid) == os.getsid(0):
                stat = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()
                found.append((int(stat[19]), pid))  # field 22 of proc(5): when it started
    return [pid for _, pid in sorted(found)]


def _disturb(
    path: Path, mode: str, minutes: float, weights: Sequence[Any], judge: Judge
) -> Counter[str]:
    """Kill and swap until it is time; how often."""
    told: Counter[str] = Counter()
    end_s = time.monotonic() + 60 * minutes
    next_kill_s = next_swap_s = time.monotonic() + _KILL_EVERY_S / 2
    while (now_s := time.monotonic()) < end_s:
        holders = _holders(mode) if now_s >= next_kill_s else []
        if holders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holders[0], signal.SIGKILL)
                told["killed"] += 1
            next_kill_s += _KILL_EVERY_S
        if now_s >= next_swap_s:
            told["swapped"] += 1
            which = told["swapped"] % 2
            Repository.open(path).replace_expert("expert-0", weights[which])
            judge.learn(path, which)
            next_swap_s += _SWAP_EVERY_S
        time.sleep(0.1)
    return told


def _asked_while(port: int, work: Callable[[], object]) -> list[Answer]:
    enough = threading.Event()
    clients = [Client(port, number, enough) for number in range(_NUM_CLIENTS)]
    for one in clients:
        one.start()
    work()
    enough.set()
    for one in clients:
        one.join(timeout=_CLIENT_TIMEOUT_S + 5)
    return [answer for one in clients for answer in one.answers]


def measure(options: argparse.Namespace) -> None:
    """Quiet for a while, then kills and swaps."""
    minutes = 0.5 if options.quick else options.minutes
    quiet_s = 10.0 if options.quick else _QUIET_S
    with repository() as path, local_cluster():
        copy = path.parent / "copy"
        shutil.copytree(path, copy)
        other = trained("DiT", 50, shape=[1, 8, 8]).weights
        first = Repository.open(path).load_expert("expert-0").state_dict()
        Repository.open(copy).replace_expert("expert-0", other)
        original = shutil.copytree(path, path.parent / "original")
        judge = Judge([Bare(original, All()), Bare(copy, All())])
        judge.learn(path, 0)
        settings = load_serving(_settings(path, options))
        start(settings)
        deployed = Deployed(settings, options.mode)
        say("quiet")
        quiet = _asked_while(settings.port, lambda: time.sleep(quiet_s))
        say("kills and swaps")
        told: list[Counter[str]] = []
        load = _asked_while(
            settings.port,
            lambda: told.append(_disturb(path, options.mode, minutes, (first, other), judge)),
        )
        deployed.stop()
        serve.shutdown()  # type: ignore[no-untyped-call]
    config = {"minutes": minutes, "mode": options.mode, "replicas": options.replicas, **told[0]}
    strange = [one.problem for one in load if not one.is_allowed][:5]
    name = f"serving-load-{options.mode}"
    hand_over(name, options, {**config, "strange": strange}, _figures(quiet, load, judge))


def _settings(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    holders = "expert_replicas" if options.mode == "distributed" else "replicas"
    return {
        "repository": str(path),
        "port": free_port(),
        "selection": {"kind": "all"},  # so that each expert is missed
        "placement": {holders: options.replicas, "num_cpus": 0.01},
    }


def _figures(quiet: Sequence[Answer], load: Sequence[Answer], judge: Judge) -> list[Figure]:
    num, served = len(load), [one for one in load if one.is_served]
    wrong = [one for one in (*quiet, *load) if one.is_served and not judge.is_right(one)]
    statuses = Counter(one.status for one in load)
    degraded = sum(one.headers["x-elastic-degraded"] == "true" for one in served)
    repeated = sum("x-elastic-repeated" in one.headers for one in served)
    p99 = [float(np.percentile([one.seconds for one in group], 99)) for group in (quiet, load)]
    return [
        figure("requests under faults", [num], unit=""),
        figure(
            "share not answered by 200",
            [1 - len(served) / num],
            unit="",
            limit=UNAVAILABLE_LIMIT,
            note=", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())),
        ),
        figure("share of degraded answers", [degraded / num], unit=""),
        figure("requests asked again at another replica", [repeated], unit=""),
        figure("wrong answers", [len(wrong)], unit="", limit=0),
        figure(
            "errors other than 503 with Retry-After",
            [sum(not one.is_allowed for one in load)],
            unit="",
            limit=0,
        ),
        figure("quiet p99", [p99[0]], unit="s"),
        figure("p99 under faults", [p99[1]], unit="s"),
        figure(
            "p99 under faults over the quiet p99", [p99[1] / p99[0]], unit="x", limit=SLOWEST_LIMIT
        ),
    ]
