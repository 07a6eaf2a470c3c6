"""Hosts in network namespaces for the tests that need some, and the marks of these tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.hosts import HEAD, HostJob, HostRun
from scripts.hosts import why_impossible
from scripts.testbed import Testbed

ELASTIC = ("python", "-c", "from elastic.cli import main; main()")
"""The command line, on one of the hosts."""


def on_hosts(timeout_s: int) -> list[pytest.MarkDecorator]:
    """For `pytestmark`. Left out, and why is said, where this machine can have no such hosts."""
    reason = why_impossible()
    skip = pytest.mark.skipif(bool(reason), reason=reason)
    return [pytest.mark.ray, skip, pytest.mark.timeout(timeout_s)]


def hosts_up(name: str, num: int) -> Any:
    """A fixture: so many hosts with Ray, for all tests of a module."""

    @pytest.fixture(scope="module")
    def bed() -> Iterator[Testbed]:
        with Testbed(f"{name}{os.getpid()}") as made:
            made.up(num)
            yield made

    return bed


def bits(run: HostRun) -> tuple[str, str]:
    """What a run that lost no step must have in common with others."""
    assert run.result["outcome"] == "finished"
    assert run.lost_steps() == []
    return run.result["params_sha256"], run.result["samples_sha256"]


def scraped(bed: Testbed, job: HostJob, **labels: str) -> dict[str, float]:
    """What the job tells Prometheus now, by series; or what a node does."""
    targets = json.loads(job.run.prometheus_json.read_text())
    (told,) = (one for one in targets if one["labels"].get("node") == labels.get("node"))
    look = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
    done = bed.run(HEAD, "python", "-c", look, f"http://{told['targets'][0]}/metrics")
    assert done.returncode == 0, done.stderr
    lines = [one.rpartition(" ") for one in done.stdout.splitlines() if one[:1] not in ("#", "")]
    return {series: float(value) for series, _, value in lines}
