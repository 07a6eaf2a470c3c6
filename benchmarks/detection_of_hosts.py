"""How well, and how soon, faults of hosts and links are named: each several times, on a testbed.

    sudo python -m benchmarks.detection_of_hosts [--quick] [--seed N] [--times N]

Four hosts, eight workers, as a user has them, but that the hosts share this machine's kernel. In
each round one job is struck by every kind once, one after the other, in an order, at times and at
places drawn from the seed, which is printed; but flapping, for which departures are counted, has a
job of its own. What came of each is written down at once: with the
same --seed it goes on where it ended. A round takes minutes, and wants an idle machine: where
others compute, too, links are slow by themselves, and whoever watches sees them late.
`benchmarks.detection_of_jobs` strikes workers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from benchmarks.faults_of_hosts import KINDS, LOSSES, MEDIAN_STEPS, Kind, Struck
from benchmarks.hosts import HostJob, heal, host_job
from benchmarks.jobs import ENDLESS, say, timed
from benchmarks.naming import (
    FAILED,
    NOTHING,
    Asked,
    Injection,
    Kept,
    kept_of,
    matrix,
    parse,
    report,
)
from elastic.core.runs import Lines
from scripts.hosts import Host, HostError
from scripts.testbed import Testbed

NAME = "detection_of_hosts"
NUM_HOSTS, NUM_WORKERS = 4, 8
QUICK_HOSTS, QUICK_WORKERS = 3, 3
NUM_CALM, NUM_DRAWN = 25, 10
"""Steps before a fault, and up to so many more: a new host's links are known by then."""
PATIENCE_STEPS, PATIENCE_S = 40, 15.0
"""A verdict that has not come after so many usual steps, and seconds, does not come."""
APART_S = 1.2
"""Workers of a node that are lost within a second are one loss."""

Event = dict[str, Any]


def judge(
    kind: Asked, struck: Struck, events: Sequence[Event], steps: Sequence[float], *, at_s: float
) -> Injection:
    """Compare what was told since the fault began with what was done.

    What was told of a part of the culprit blames nobody else, and names nobody yet.

    Args:
        steps: when each step was committed. What hangs is measured by the usual length of the last
            ones before the fault, what is slow by the steps that there were.
    """
    told = [one for one in events if one["kind"] == "verdict" and one["time_s"] >= at_s]
    named = [one for one in told if one["verdict"]["culprit"] in struck.right]
    others = tuple(
        f"{one['verdict']['kind']}: {one['verdict']['culprit']}"
        for one in told
        if one["verdict"]["culprit"] not in struck.right | struck.partly
    )
    if not named:
        return Injection(kind.name, NOTHING, None, others)
    first_s = float(named[0]["time_s"])
    called = str(named[0]["verdict"]["kind"])
    if kind.unit == MEDIAN_STEPS:
        took = (first_s - at_s) / usual_s([one for one in steps if one < at_s])
        return Injection(kind.name, called, took, others)
    lost = [float(one["time_s"]) for one in events if one["kind"] == "worker_lost"]
    counted = lost if kind.unit == LOSSES else steps
    num = sum(at_s <= time_s <= first_s for time_s in counted)
    return Injection(kind.name, called, float(num), others)


def usual_s(steps: Sequence[float]) -> float:
    """The median length of the last steps."""
    return statistics.median(after - before for before, after in pairwise(steps[-NUM_CALM:]))


class Played:
    """A job on a testbed that something happens to, again and again."""

    def __init__(self, bed: Testbed, num_workers: int) -> None:
        self._bed, self._num = bed, num_workers
        config = host_job(
            "named",
            "small",
            len(bed.hosts),
            f"steps={ENDLESS}",
            f"workers.start={self._num}",
            f"workers.max={self._num}",
            "workers.spare=0",
            "standby=false",
            f"batch.micro_batches={4 * self._num}",
            "evaluate.every=0",
            "monitoring.node_port=0",
        )
        self.job = HostJob(bed, config)
        self.dice = random.Random()
        self.nodes: Mapping[int, Host] = {}
        self.events: list[Event] = []
        self._told = Lines(self.job.run.events_jsonl)
        self._struck_s = 0.0
        self._rows: list[dict[str, Any]] = []

    def strike(self, kind: Kind, dice: random.Random) -> Injection:
        """Let it happen, once all is calm, and see what is told until all is calm again."""
        self.dice = dice
        self.calm(NUM_CALM + dice.randrange(NUM_DRAWN))
        self._struck_s = at_s = time.time()
        with kind.make(self) as struck:
            self._await_verdict(struck, PATIENCE_STEPS * usual_s(self._steps))
        heal(self._bed)
        self._await_end()
        return judge(kind, struck, self.events, self._steps, at_s=at_s)

    @property
    def _steps(self) -> list[float]:
        return [float(one["time_s"]) for one in self._rows]

    def calm(self, num_steps: int) -> None:
        """Wait until all hosts and workers take part for so many steps."""
        hosts = {host.address: host for host in self._bed.hosts}
        since: int | None = None

        def is_calm(rows: list[dict[str, Any]]) -> bool:
            nonlocal since
            self._rows = rows
            whole = bool(rows) and rows[-1]["num_workers"] >= self._num
            found = self._find(hosts) if whole else {}
            if since is None or len(found) < len(hosts):
                since = len(rows)
                return False
            self.nodes = found
            return len(rows) - since >= num_steps

        self.job.await_rows(is_calm)

    def _find(self, hosts: Mapping[str, Host]) -> dict[int, Host]:
        """Which node is on which host, as Prometheus is told."""
        path = self.job.run.prometheus_json
        told = json.loads(path.read_text()) if path.exists() else []
        return {
            int(one["labels"]["node"]): hosts[one["targets"][0].rpartition(":")[0]]
            for one in told
            if "node" in one["labels"]
        }

    def _await_verdict(self, struck: Struck, patience_s: float) -> None:
        """Wait until it is told, or does not come any more."""
        deadline_s = time.time() + max(PATIENCE_S, patience_s)
        self.job.await_rows(lambda _: self._is_told(struck.right) or time.time() > deadline_s)

    def _is_told(self, culprits: Collection[str]) -> bool:
        self.events += self._told.read()
        return any(
            one["kind"] == "verdict"
            and one["time_s"] >= self._struck_s
            and one["verdict"]["culprit"] in culprits
            for one in self.events
        )

    def _await_end(self) -> None:
        """Wait until no verdict holds that could be over, or it seems to hold for ever."""
        deadline_s = time.time() + PATIENCE_S
        self.job.await_rows(lambda _: not self._open() or time.time() > deadline_s)

    def _open(self) -> set[tuple[str, str]]:
        self.events += self._told.read()
        begun = [_name(one) for one in self.events if one["kind"] == "verdict"]
        ended = [_name(one) for one in self.events if one["kind"] == "verdict_ended"]
        return {one for one in begun if begun.count(one) > ended.count(one) and _may_end(one)}

    def end(self) -> None:
        """End the job, whatever has become of it, and bring all hosts back."""
        try:
            self.job.stop()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            say(f"{self.job.run.path}: {error}")
            self.job.abandon()

    def lose_worker(self, node: int) -> bool:
        """See `faults_of_hosts.Scene`."""
        host, before_s = self.nodes[node], time.time()
        self.job.await_rows(lambda _: self.job.kill_worker(host))

        def is_lost(_: list[dict[str, Any]]) -> bool:
            self.events += self._told.read()
            return any(
                one["kind"] == "worker_lost" and one["time_s"] >= before_s for one in self.events
            )

        self.job.await_rows(is_lost)
        apart_s = time.time() + APART_S
        culprit = {f"node {node}"}
        self.job.await_rows(lambda _: self._is_told(culprit) or time.time() > apart_s)
        return self._is_told(culprit)


def _name(event: Event) -> tuple[str, str]:
    return event["verdict"]["kind"], event["verdict"]["culprit"]


def _may_end(name: tuple[str, str]) -> bool:
    return name[0] != "flapping"  # it holds for an hour


class Struckable(Protocol):
    """See `Played`."""

    def strike(self, kind: Kind, dice: random.Random) -> Injection: ...
    def end(self) -> None: ...


def play(
    begin: Callable[[], Struckable], number: int, kept: Kept, *, seed: int, only: Collection[str]
) -> None:
    """Strike with what a round lacks; another job, which `begin` begins, where one has failed.

    Who flaps has a job of its own: one that left again and again for other reasons is named before.
    """
    kinds = [kind for kind in KINDS if kind.name in only]
    random.Random(f"{seed} {number}").shuffle(kinds)
    for flaps in False, True:
        left = [kind for kind in kinds if (kind.unit == LOSSES) is flaps]
        left = [kind for kind in left if (number, kind.name) not in kept]
        while left:
            left = _play(begin(), left, number, kept, seed)


def _play(played: Struckable, left: list[Kind], number: int, kept: Kept, seed: int) -> list[Kind]:
    """Strike as long as the job lives. What is left then."""
    try:
        for place, kind in enumerate(left):
            try:
                with timed(f"round {number + 1}, {kind.name}"):
                    found = played.strike(kind, random.Random(f"{seed} {number} {kind.name}"))
            except (RuntimeError, HostError, TimeoutError) as error:
                say(f"{kind.name}: {error}")
                kept.add(number, Injection(kind.name, FAILED, None, ()))
                return left[place + 1 :]
            say(f"  {found}")
            kept.add(number, found)
        return []
    finally:
        played.end()


def healthy(played: Played, minutes: float) -> list[str]:
    """The verdicts in a job that nothing happens to."""
    try:
        played.calm(NUM_CALM)
        begin_s = time.time()
        while time.time() < begin_s + 60 * minutes:
            played.calm(NUM_CALM)
    finally:
        played.end()
    told = played.job.run.read_events()
    return [one["reason"] for one in told if one["kind"] == "verdict" and one["time_s"] >= begin_s]


def measure(options: argparse.Namespace) -> None:
    """So many rounds, then the healthy job."""
    kept = kept_of(NAME, options, KINDS)
    num_hosts = QUICK_HOSTS if options.quick else NUM_HOSTS
    with Testbed(f"named{os.getpid()}") as bed:
        bed.up(num_hosts)
        begin = functools.partial(Played, bed, _num_workers(options))
        for number in range(options.times):
            play(begin, number, kept, seed=options.seed, only=options.only)
            say(matrix([one for _, one in kept.injections()]))
        false = healthy(begin(), options.healthy_minutes) if options.healthy_minutes else None
    report(NAME, options, kept, false, hosts=num_hosts, workers=_num_workers(options))


def _num_workers(options: argparse.Namespace) -> int:
    return QUICK_WORKERS if options.quick else NUM_WORKERS


def main() -> int:
    """Measure the matrix."""
    measure(parse(__doc__, KINDS, healthy_minutes=0.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
