"""Faults of hosts and of what lies between them, made on a testbed while a job trains.

Each is a context: it begins, says who is at fault, and is over at the end of the block. Where it
strikes is drawn from the scene's dice. For `benchmarks.detection_of_hosts`, which judges.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.naming import HANG_STEPS, SLOW_STEPS, Asked
from scripts.hosts import Direction, Host

RATES = ("20mbit", "50mbit")
"""Of what is slow. Hosts that share two cores send 10 to 30 MB a second over each link."""
MEDIAN_STEPS, LOSSES = "median steps", "losses"
"""Units beside committed steps: usual steps as a time, workers of a node that were lost."""
SHARES = (0.4, 0.8)
"""Of the time in which a host under pressure lacks something."""
MAX_LOSSES = 12
_WRITE_S = 0.1


@dataclass(frozen=True, slots=True)
class Struck:
    """Who is at fault, as verdicts name it: any of `right` is right. `partly`: what is true of it,
    too, but less than could be said, such as the links of a host."""

    right: frozenset[str]
    partly: frozenset[str] = frozenset()


class Scene(Protocol):
    """A job on a testbed that something is about to happen to."""

    dice: random.Random
    nodes: Mapping[int, Host]
    """Those that take part, by their numbers. 0 is where the driver is, which nothing happens to
    but in its links."""

    def lose_worker(self, node: int) -> bool:
        """Kill a worker of a node once it has one; whether a verdict on the node followed."""
        ...


Make = Callable[[Scene], AbstractContextManager[Struck]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Asked):
    """How a kind of fault is made."""

    make: Make


def _drawn(scene: Scene) -> tuple[int, Host]:
    node = scene.dice.choice([one for one in scene.nodes if one])
    return node, scene.nodes[node]


def links_of(node: int, others: Mapping[int, Host], direction: Direction = "both") -> set[str]:
    """The links of a node, as verdicts name them."""
    ways = {"out": [f"link {node} -> {one}" for one in others if one != node]}
    ways["in"] = [f"link {one} -> {node}" for one in others if one != node]
    ways["both"] = ways["out"] + ways["in"]
    return set(ways[direction])


def _of_node(node: int, scene: Scene, direction: Direction = "both") -> Struck:
    return Struck(frozenset({f"node {node}"}), frozenset(links_of(node, scene.nodes, direction)))


def _between(one: int, other: int) -> Struck:
    return Struck(frozenset({f"link {one} -> {other}", f"link {other} -> {one}"}))


@contextlib.contextmanager
def _slow_link(scene: Scene) -> Iterator[Struck]:
    one, other = scene.dice.sample(sorted(scene.nodes), 2)
    scene.nodes[one].slow_to(scene.nodes[other], scene.dice.choice(RATES))
    try:
        yield _between(one, other)
    finally:
        scene.nodes[one].fast_to(scene.nodes[other])


def _on_host(
    begin: Callable[[Scene, Host], None], end: Callable[[Host], None], direction: Direction = "both"
) -> Make:
    @contextlib.contextmanager
    def make(scene: Scene) -> Iterator[Struck]:
        node, host = _drawn(scene)
        begin(scene, host)
        try:
            yield _of_node(node, scene, direction)
        finally:
            end(host)

    return make


def _slow_end(direction: Direction) -> Make:
    def begin(scene: Scene, host: Host) -> None:
        host.slow(scene.dice.choice(RATES), direction)

    return _on_host(begin, Host.fast, direction)


@contextlib.contextmanager
def _cut_link(scene: Scene) -> Iterator[Struck]:
    one, other = scene.dice.sample([one for one in sorted(scene.nodes) if one], 2)
    scene.nodes[one].part(scene.nodes[other])
    try:
        yield _between(one, other)
    finally:
        scene.nodes[one].meet(scene.nodes[other])


@contextlib.contextmanager
def _flapping(scene: Scene) -> Iterator[Struck]:
    """Its workers die again and again, until somebody says so."""
    node, _ = _drawn(scene)
    for _ in range(MAX_LOSSES):
        if scene.lose_worker(node):
            break
    yield _of_node(node, scene)


@contextlib.contextmanager
def _pressed(scene: Scene) -> Iterator[Struck]:
    """All hosts of a testbed share one kernel, and its counters. So this one is shown others: what
    a kernel of its own would say if it lacked something."""
    node, host = _drawn(scene)
    name = scene.dice.choice([one for one in COUNTERS if Path("/proc", one).exists()])
    share = scene.dice.uniform(*SHARES)
    with tempfile.TemporaryDirectory() as folder:
        file, is_over = Path(folder, "counter"), threading.Event()
        file.write_text(Path("/proc", name).read_text())
        writer = threading.Thread(target=_count, args=(file, name, share, is_over), daemon=True)
        host.show(name, file)
        writer.start()
        try:
            yield Struck(frozenset({f"node {node}"}))
        finally:
            is_over.set()
            writer.join()
            host.unshow(name)


More = Callable[[int, float], int]
"""What a counter of the kernel says after so many seconds of lack."""


def _steal(ticks: int, lacked_s: float) -> int:
    return ticks + round(os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1) * lacked_s)


def _stall(total_us: int, lacked_s: float) -> int:
    return total_us + round(1e6 * lacked_s)


def _kill(kills: int, lacked_s: float) -> int:
    return kills + (lacked_s > 0)


COUNTERS: Mapping[str, tuple[str, More]] = {
    "stat": (r"^(cpu +(?:\d+ ){7})(\d+)", _steal),
    "pressure/memory": (r"(total=)(\d+)", _stall),
    "pressure/io": (r"(total=)(\d+)", _stall),
    "vmstat": (r"^(oom_kill )(\d+)", _kill),
}
"""Files of /proc: where the number stands, behind what."""


def lacking(name: str, text: str, lacked_s: float) -> str:
    """A file of /proc as it would be after so many seconds of lack."""
    pattern, more = COUNTERS[name]
    return re.sub(
        pattern,
        lambda found: found[1] + str(more(int(found[2]), lacked_s)),
        text,
        flags=re.MULTILINE,
    )


def _count(file: Path, name: str, share: float, is_over: threading.Event) -> None:
    """Write down what the kernel would say, several times a second. It only grows, and whoever
    reads meanwhile never finds it empty."""
    begun, begin_s = file.read_text(), time.monotonic()
    with file.open("r+") as writing:
        while not is_over.wait(_WRITE_S):
            writing.seek(0)
            writing.write(lacking(name, begun, share * (time.monotonic() - begin_s)))
            writing.flush()


KINDS = (
    Kind(name="slow link", make=_slow_link, says="slow link", limit=SLOW_STEPS),
    Kind(name="slow sender", make=_slow_end("out"), says="slow sender", limit=SLOW_STEPS),
    Kind(name="slow receiver", make=_slow_end("in"), says="slow receiver", limit=SLOW_STEPS),
    Kind(
        name="cut link",
        make=_cut_link,
        says="hang in communication",
        limit=HANG_STEPS,
        unit=MEDIAN_STEPS,
    ),
    Kind(
        name="cut host",
        make=_on_host(lambda _, host: host.cut(), Host.join),
        says="hang in communication",
        limit=HANG_STEPS,
        unit=MEDIAN_STEPS,
    ),
    Kind(
        name="frozen host",
        make=_on_host(lambda _, host: host.freeze(), Host.thaw),
        says="hang outside communication",
        limit=HANG_STEPS,
        unit=MEDIAN_STEPS,
    ),
    Kind(name="pressure", make=_pressed, says="resource pressure"),
    Kind(name="flapping", make=_flapping, says="flapping", unit=LOSSES),
)
