"""A Ray cluster of several hosts on this machine: what Ray and a job make of what happens to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from elastic.core.runs import RunFolder
from scripts.hosts import HostError
from scripts.testbed import ROOT, Settings, Testbed, has_raylet
from tests.hosts.testbeds import on_hosts
from tests.integration.support import make_job, wait_until

pytestmark = on_hosts(180)

NAME = f"test{os.getpid()}"
COMMAND = [sys.executable, "-m", "scripts.testbed_commands", "--name", NAME]
NOTICED_S = 15.0
"""Ray should say within 3 s that a host is gone; the machine may be busy."""

LOOK = """
import json, os, socket
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
def look():
    return [socket.gethostname(), ray.util.get_node_ip_address(), os.path.exists("/dev/shm/own")]
nodes = {node["NodeManagerAddress"]: On(node["NodeID"], soft=False) for node in ray.nodes()}
seen = [ray.get(look.options(scheduling_strategy=on).remote()) for _, on in sorted(nodes.items())]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    """Two hosts, up with Ray; a test leaves it as it found it."""
    with Testbed(NAME) as made:
        made.up(2, Settings(cpus=1))
        yield made


def is_seen(bed: Testbed, *names: str) -> None:
    """Wait until Ray takes exactly these hosts to be alive."""
    what = f"only {names} live for Ray"
    wait_until(lambda: bed.alive() == set(names), what, timeout_s=NOTICED_S)


def by_hand(*words: str) -> str:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tasks_run_on_the_host_that_they_are_sent_to(bed: Testbed) -> None:
    (bed.host("h2").root / "dev/shm/own").touch()
    for driver in ("h1", "h2"):
        done = bed.run(driver, "python", "-W", "ignore", "-c", LOOK)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [["h1", "10.77.0.1", False], ["h2", "10.77.0.2", True]]


def test_ray_sees_a_host_that_is_cut_off(bed: Testbed) -> None:
    """It gives the host up; its raylet ends when it hears of that, and a new one may be started."""
    host = bed.host("h2")
    with pytest.raises(HostError, match="h2 has a raylet already"):
        bed.start(host)
    host.cut()
    is_seen(bed, "h1")
    host.join()
    wait_until(lambda: not has_raylet(host), "the raylet gives up", timeout_s=NOTICED_S)
    assert host.is_up
    bed.start(host)
    is_seen(bed, "h1", "h2")


def test_by_hand(bed: Testbed) -> None:
    by_hand("kill", "h2")
    is_seen(bed, "h1")
    by_hand("slow", "h1", "100mbit")
    rows = table(by_hand("status"))
    assert rows["h1"][:5] == ["10.77.0.1", "up", "100 Mbit/s", "runs", "alive"]
    assert rows["h2"] == ["10.77.0.2", "down", "fast", "none", "dead", "0"]
    by_hand("fast", "h1")
    by_hand("start", "h2")
    is_seen(bed, "h1", "h2")
    assert by_hand("run", "h2", "--", "sh", "-c", "hostname; echo $RAY_ADDRESS").split() == [
        "h2",
        "10.77.0.1:6379",
    ]


def table(shown: str) -> dict[str, list[str]]:
    """The rows of a status by the name of the host."""
    lines = (line.strip("│").split("│") for line in shown.splitlines() if "10.77." in line)
    rows = ([cell.strip() for cell in cells] for cells in lines)
    return {name: rest for name, *rest in rows}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("kill", "h7"), "no host 'h7', only h1, h2"),
        (("up", "2"), "is there already; `scripts/testbed down`"),
        (("up", "2", "--system-config", "[1]"), "is not an object"),
        (("slow", "h1", "2horses"), "2horses"),
        (("start", "h1"), "h1 has a raylet already"),
        (("--name", f"{NAME}none", "status"), "is not up; `scripts/testbed up N`"),
        (("--name", "a-b", "down"), "a name is of letters and digits"),
    ],
    ids=["host", "twice", "config", "rate", "raylet", "name", "letters"],
)
def test_what_cannot_be_done_is_said(bed: Testbed, words: tuple[str, ...], error: str) -> None:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert error in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_trains_on_the_host_of_its_driver(bed: Testbed, tmp_path: Path) -> None:
    """Not the head's. On a testbed with the same addresses as the other; then all of it is gone."""
    job = make_job("housed", workers=2)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    command = (sys.executable, "-c", "from elastic.cli import main; main()", "train")
    with Testbed(f"{NAME}other") as other:
        other.up(2, Settings(cpus=1))
        pids = [one.pid for host in other.hosts for one in host.processes()]
        arguments = (str(tmp_path / "job.yaml"), "--run-dir", str(tmp_path / "run"))
        done = other.run("h2", *command, *arguments, timeout_s=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert other.run("h2", "find", "/dev/shm", "-name", f"{job.name}*").stdout == ""
        assert bed.alive() == {"h1", "h2"}
    run = RunFolder(tmp_path / "run")
    result = run.read_json(run.result_json)
    assert (result["outcome"], result["steps"]) == ("finished", job.steps)
    assert not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids)
    assert not other.folder.exists()
    assert other.hosts == []


def test_what_fails_on_the_way_up_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here Ray is to use a token, and there is none. Variables RAY_* reach it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    with Testbed(f"{NAME}wrong") as wrong, pytest.raises(HostError, match="Ray does not start"):
        wrong.up(1)
    assert wrong.hosts == []
    assert not (ROOT / wrong.name).exists()
