"""Ray clusters of one node as `ray start --head` makes them, with a server for jobs, and what a
user types at them. Each has ports, a temporary folder and a home of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from tests.documents import ROOT
from tests.integration.support import session, wait_until

_PORTS = (
    *("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
    *("metrics-export-port", "runtime-env-agent-port", "ray-client-server-port"),
)


@dataclass(frozen=True)
class Head:
    """A running cluster. `address` is where jobs are submitted, `gcs` where drivers connect; runs
    lie in `home`/ray_results."""

    address: str
    gcs: str
    home: Path
    environment: Mapping[str, str]

    def ray(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a `ray` command to its end."""
        return subprocess.run(
            self._command(arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
            check=False,
        )

    def status(self, identity: str) -> str:
        """What Ray says of a job, in a word."""
        with urllib.request.urlopen(f"{self.address}/api/jobs/{identity}", timeout=10) as answer:
            return str(json.load(answer)["status"])

    def stop(self, identity: str) -> None:
        """Ask Ray to stop a job, as `ray job stop` does, which takes seconds to start."""
        request = urllib.request.Request(f"{self.address}/api/jobs/{identity}/stop", method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["stopped"]

    def python(self, text: str) -> None:
        """Run a script on this cluster to its end."""
        environment = {**self.environment, "RAY_ADDRESS": self.gcs}
        subprocess.run([sys.executable, "-c", text], env=environment, timeout=60, check=True)

    @contextlib.contextmanager
    def started(self, *arguments: str | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A `ray` command that goes on in the background."""
        with log.open("w") as file:
            process = subprocess.Popen(
                self._command(arguments), env=self.environment, stdout=file, stderr=file
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _command(self, arguments: tuple[str | Path, ...]) -> list[str]:
        name, action, *rest = map(str, arguments)
        return [_program("ray"), name, action, f"--address={self.address}", *rest]


_HEAD_ID, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # as Ray's fake provider has them
_AUTOSCALING = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


@contextlib.contextmanager
def started_head(home: Path, *, num_more: int = 0, **variables: str) -> Iterator[Head]:
    """A cluster until the end of the block. `variables` are added to everybody's environment.

    Args:
        num_more: so many hosts more can Ray's autoscaler start, as raylets on this machine.
    """
    home.mkdir()
    temporary = Path(tempfile.mkdtemp(prefix="rayhead"))  # short: it holds Unix sockets
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    environment = {name: one for name, one in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        **variables,
    }
    arguments = [f"--{name}={port}" for name, port in ports.items()]
    arguments += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={temporary}"]
    arguments += ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
    if num_more:
        environment |= _AUTOSCALING
        config = temporary / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling(ports["port"], num_more)))
        arguments.append(f"--autoscaling-config={config}")
    log = temporary / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [_program("ray"), "start", "--head", "--block", *arguments],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait_until(lambda: _answers(process, address, log), "Ray takes jobs", timeout_s=90)
        yield Head(address, f"127.0.0.1:{ports['port']}", home, environment)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
        for pid in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _autoscaling(port: int, num_more: int) -> dict[str, Any]:
    """What `ray up` would make of a cluster's file. Ray's wheel lacks the defaults of its fake
    provider, so it is named as an external one."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    lists = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray")
    commands: dict[str, list[str]] = {f"{one}_commands": [] for one in lists}
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    host = {"resources": {"CPU": 2, "object_store_memory": 100_000_000}, "node_config": {}}
    return {
        **commands,
        "cluster_name": "autoscaling",
        "max_workers": num_more,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": f"{address}:{port}",
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "host": {**host, "min_workers": 0, "max_workers": num_more},
        },
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def free_ports(num: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _answers(process: subprocess.Popen[bytes], address: str, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=10):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401  # it asks for a token
    except OSError:
        return False
