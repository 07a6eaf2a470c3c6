"""A cluster of several hosts on one machine: a raylet on each, the first is the head.

    with Testbed("mine") as bed:
        bed.up(3)
        bed.run("h1", "elastic", "train", "job.yaml")
        bed.host("h2").kill()

`scripts/testbed` is this for the hand. A testbed is known by its name to all processes: what is not
in the kernel lies in its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.hosts import Host, HostError, hosts_of, make_switch, remove_all, why_impossible

ROOT = Path("/var/lib/elastic-testbeds")
GCS_PORT = 6379
SOON_NOTICED = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}
"""Ray then says within 3 s that a host is gone, not after a minute."""

_GCS = "gcs_server"
_AS_STARTED = ("cmdline", "environ")
_OBJECT_STORE_BYTES = 100 * 2**20  # tensors never go through Ray
_START_DEADLINE_S = 120
_ANSWER_DEADLINE_S = 10
_ALIVE = """
import json, sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5).values()
print(json.dumps([one.node_manager_address for one in nodes if one.state == 0]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What each start of a raylet is told."""

    cpus: int = 2
    """For Ray, on each host; the cores are shared by all."""
    system_config: Mapping[str, Any] = field(default_factory=lambda: dict(SOON_NOTICED))
    dashboard: bool = False
    """Needed by `ray job submit`; costs a few processes."""


class Testbed:
    """A named set of hosts, the first of which is the head of a Ray cluster.

    As a context it is taken down at the end of the block.
    """

    __test__ = False  # for pytest

    def __init__(self, name: str) -> None:
        if not (name.isascii() and name.isalnum()):
            raise HostError(f"testbed {name!r}: a name is of letters and digits")
        self.name = name
        self.folder = ROOT / name
        self.address = f"{Host(name, 1).address}:{GCS_PORT}"

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    @property
    def hosts(self) -> list[Host]:
        return hosts_of(self.name)

    def host(self, name: str) -> Host:
        """The host of this name.

        Raises:
            HostError: there is none.
        """
        for host in self.hosts:
            if host.name == name:
                return host
        if not self.hosts:
            raise HostError(self._not_up)
        names = ", ".join(host.name for host in self.hosts)
        raise HostError(f"testbed {self.name}: no host {name!r}, only {names}")

    @property
    def _not_up(self) -> str:
        return f"testbed {self.name} is not up; `scripts/testbed up N` makes one"

    def up(self, num_hosts: int, settings: Settings = Settings()) -> None:
        """Make hosts and start Ray on them; variables RAY_* count here and for all later starts.

        Raises:
            HostError: it is up already, the machine forbids it, or Ray does not start.
        """
        if reason := why_impossible():
            raise HostError(reason)
        if num_hosts < 1:
            raise HostError(f"{num_hosts} hosts: at least 1, the head")
        try:
            self.folder.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            raise HostError(
                f"testbed {self.name} is there already; `scripts/testbed down` takes it down"
            ) from None
        try:
            self._write(settings)
            make_switch(self.name)
            for _ in range(num_hosts):
                self._add()
            head, *others = self.hosts
            self.start(head)
            with ThreadPoolExecutor(max(1, len(others))) as pool:
                list(pool.map(self.start, others))
        except BaseException:
            self.down()
            raise

    def _write(self, settings: Settings) -> None:
        kept = {key: value for key, value in os.environ.items() if key.startswith("RAY_")}
        variables = {"RAY_AUTH_MODE": "disabled", **kept, "RAY_ADDRESS": self.address}
        text = json.dumps({"settings": asdict(settings), "variables": variables})
        (self.folder / "settings.json").write_text(text)

    def _read(self) -> tuple[Settings, dict[str, str]]:
        try:
            text = (self.folder / "settings.json").read_text()
        except FileNotFoundError:
            raise HostError(self._not_up) from None
        written = json.loads(text)
        return Settings(**written["settings"]), written["variables"]

    def _add(self) -> Host:
        host = Host(self.name, len(self.hosts) + 1)
        host.plug_in()
        host.boot(self.disk(host))
        return host

    def add(self) -> Host:
        """One more host, which joins the cluster."""
        self._read()
        host = self._add()
        self.start(host)
        return host

    def disk(self, host: Host) -> Path:
        """Its /tmp/ray, which outlives it: logs of Ray, and what it spills."""
        return self.folder / host.name / "ray"

    def start(self, host: Host) -> None:
        """Start Ray on a host, after switching it on if it is down.

        Raises:
            HostError: it has a raylet, it is frozen, or Ray does not start.
        """
        if not host.is_up:
            host.boot(self.disk(host))
        if host.is_frozen:
            raise HostError(f"{host.name} is frozen; thaw it first")
        if has_raylet(host):
            raise HostError(
                f"{host.name} has a raylet already; one that was given up ends when it is told so"
            )
        log = self.folder / host.name / "start.log"
        words = ("timeout", str(_START_DEADLINE_S), "ray", "start", *self._start_options(host))
        with log.open("w") as file:
            done = subprocess.run(
                host.command(*words),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        if done.returncode != 0:
            raise HostError(f"Ray does not start on {host.name}: {log.read_text()}")

    def _start_options(self, host: Host) -> list[str]:
        settings, _ = self._read()
        options = [
            f"--node-ip-address={host.address}",
            f"--num-cpus={settings.cpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
        ]
        if host.number > 1:
            return [*options, f"--address={self.address}"]
        return [
            *options,
            "--head",
            f"--port={GCS_PORT}",
            f"--include-dashboard={str(settings.dashboard).lower()}",
            f"--dashboard-host={host.address}",
            f"--system-config={json.dumps(settings.system_config)}",
        ]

    def kill_gcs(self) -> None:
        """SIGKILL Ray's control service on the head; Ray waits a minute for its return.

        Raises:
            HostError: there is none.
        """
        pids = [one.pid for one in self.host("h1").processes() if one.name == _GCS]
        if not pids:
            raise HostError(f"there is no {_GCS} on h1")
        words, variables = (Path(f"/proc/{pids[0]}/{name}").read_bytes() for name in _AS_STARTED)
        (self.folder / _GCS).write_bytes(words + b"\0" + variables)
        os.kill(pids[0], signal.SIGKILL)

    def start_gcs(self) -> None:
        """Start it as it was. It knows what it knew if RAY_gcs_storage was `rocksdb` at `up`."""
        words, _, variables = (self.folder / _GCS).read_bytes().partition(b"\0\0")
        pairs = (one.split(b"=", 1) for one in variables.rstrip(b"\0").split(b"\0"))
        with (self.folder / f"{_GCS}.log").open("w") as log:
            subprocess.run(
                self.host("h1").command("setsid", "--fork", *map(os.fsdecode, words.split(b"\0"))),
                env={os.fsdecode(name): os.fsdecode(value) for name, value in pairs},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )

    def alive(self) -> set[str]:
        """Names of the hosts that Ray takes to be alive.

        Raises:
            HostError: the head does not answer.
        """
        words = ("timeout", str(_ANSWER_DEADLINE_S), "python", "-W", "ignore", "-c", _ALIVE)
        done = self.run("h1", *words, self.address)
        if done.returncode != 0:
            raise HostError(f"Ray does not answer on h1: {done.stderr.strip()}")
        addresses = set(json.loads(done.stdout))
        return {host.name for host in self.hosts if host.address in addresses}

    def environment(self) -> dict[str, str]:
        """For a process on a host: the variables and programs at hand, the way to the cluster."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, **self._read()[1]}

    def run(
        self, host: str, *words: str, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, and keep what it prints.

        Raises:
            HostError: there is no such host, or it is down.
            subprocess.TimeoutExpired: it took longer than `timeout_s`, and was killed.
        """
        return subprocess.run(
            self.host(host).command(*words),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def down(self) -> None:
        """Take away hosts, network, processes and files, also of one that is there in part."""
        remove_all(self.name)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            ROOT.rmdir()  # the last one


def has_raylet(host: Host) -> bool:
    """Whether Ray runs on a host, frozen or not."""
    return any(one.name == "raylet" for one in host.processes())
