"""Trains a family of jobs, an island each: any number at once as resources allow, all resumable.

Ray queues the islands that find no room. One that is lost begins again at its newest checkpoint,
and delays nobody else. Never computes anything itself.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elastic.core.config import check_resume
from elastic.core.errors import ConfigError, FatalError
from elastic.core.runs import RunFolder
from elastic.experts.config import Islands
from elastic.experts.jobs import Planned

log = logging.getLogger(__name__)

_POLL_S = 0.5
_TOLD_S = 10.0
_LOG_FILE = "driver.log"

Tell = Callable[[str], None]


class RunningIsland(Protocol):
    """What `actors.launch.RemoteIsland` is."""

    def poll(self) -> str | None:
        """None while it goes on; then "", or why it ended otherwise."""
        ...

    def end(self) -> None:
        """Give back what it holds."""
        ...


Start = Callable[[Planned], RunningIsland]


@dataclass
class Family:
    """The islands of a family of jobs: observe, begin again what was lost, until all have ended.

    `step` once in a while; nothing is kept that a second family of the same jobs would miss.

    Args:
        start: begins one island.
        tell: gets a line about each change.
    """

    jobs: Sequence[Planned]
    start: Start
    max_failures: int
    tell: Tell
    running: dict[str, RunningIsland] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def step(self) -> bool:
        """Whether all have ended."""
        for one in self.jobs:
            name = one.job.name
            if name in self.lost or (name not in self.running and is_finished(one)):
                continue
            if name not in self.running:
                self.running[name] = self.start(one)
            elif (why := self.running[name].poll()) is not None:
                self.running.pop(name).end()
                self._ended(one, why)
        return not self.running and all(
            one.job.name in self.lost or is_finished(one) for one in self.jobs
        )

    def end(self) -> None:
        """End what runs, in good order."""
        for island in self.running.values():
            island.end()
        self.running.clear()

    def _ended(self, one: Planned, why: str) -> None:
        name = one.job.name
        if is_finished(one):
            loss = RunFolder(one.run).read_json(RunFolder(one.run).result_json)["loss"]
            self.tell(f"{name}: finished, loss {loss:.4f}")
            return
        why = why or "it ended before its last step"
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] > self.max_failures:
            self.lost[name] = f"{why}; see {one.run / _LOG_FILE}"
            self.tell(f"{name}: given up after {self.failures[name]} failures: {why}")
        else:
            self.tell(f"{name}: lost ({why}), begins again at its newest checkpoint")


def is_finished(one: Planned) -> bool:
    """Whether a job has all its steps, and nothing of it lives on after a killed driver.

    Raises:
        ConfigError: its run was begun with other settings.
    """
    run = RunFolder(one.run)
    if not run.result_json.exists() or run.ray_json.exists():
        return False
    try:
        check_resume(run.read_json(run.job_json), one.job)
    except ConfigError as error:
        raise ConfigError(f"{one.run}: {error}; or remove that folder") from error
    result = run.read_json(run.result_json)
    return bool(result["outcome"] == "finished" and result["steps"] >= one.job.steps)


def train(jobs: Sequence[Planned], islands: Islands, tell: Tell) -> None:
    """Train all jobs that are not trained yet.

    Raises:
        FatalError: some were given up; the others are trained.
    """
    waiting = [one for one in jobs if not is_finished(one)]
    tell(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them trained already")
    if not waiting:
        return
    from elastic.cluster import local_cluster

    with local_cluster() as address:
        family = Family(waiting, _starter(islands, address), islands.max_failures, tell)
        try:
            _watch(family)
        finally:
            family.end()
    if family.lost:
        lines = (f"{name}: {why}" for name, why in family.lost.items())
        raise FatalError("\n".join((f"{len(family.lost)} jobs were given up:", *lines)))


def _watch(family: Family) -> None:
    told_s = time.monotonic()
    while not family.step():
        time.sleep(_POLL_S)
        if time.monotonic() - told_s >= _TOLD_S:
            told_s = time.monotonic()
            family.tell("; ".join(places(family)))


def places(family: Family) -> Iterator[str]:
    """How far each job is that trains, and how many are only about to."""
    num_waiting = 0
    for one in family.jobs:
        if one.job.name not in family.running:
            continue
        newest = RunFolder(one.run).newest_metrics()
        if newest is None:
            num_waiting += 1
        else:
            yield f"{one.job.name} {newest['step'] + 1}/{one.job.steps}"
    if num_waiting:
        yield f"{num_waiting} wait for resources, or start"


def _starter(islands: Islands, address: str) -> Start:
    from actors.launch import RemoteIsland
    from elastic.cluster import auth_mode

    environment = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": auth_mode(), **_import_paths()}

    def start(one: Planned) -> RunningIsland:
        one.run.mkdir(parents=True, exist_ok=True)
        file = one.run / "planned.json"
        file.write_text(json.dumps(one.job.model_dump(mode="json"), indent=2), encoding="utf-8")
        return RemoteIsland(
            islands.cpus,
            islands.labels,
            [sys.executable, "-m", "elastic.experts.island", str(file), str(one.run)],
            environment=environment,
            folder=os.getcwd(),
            log=str(one.run / _LOG_FILE),
        )

    return start


def _import_paths() -> Mapping[str, str]:
    paths = dict.fromkeys(path or os.getcwd() for path in (os.getcwd(), *sys.path))
    return {"PYTHONPATH": os.pathsep.join(paths)}
