"""What `elastic serve --print-config` prints is what `serve deploy` takes, on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.documents import ROOT
from tests.integration.heads import free_ports, started_head
from tests.integration.support import wait_until
from tests.served import make_repository

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(400)]

PROGRAMS = Path(sys.executable).parent


@pytest.mark.parametrize("mode", ["co-located", "distributed"])
def test_a_printed_config_is_deployed(mode: str, tmp_path: Path) -> None:
    make_repository(tmp_path / "flow")
    (port,) = free_ports(1)
    settings = [f"port={port}", "placement.replicas=2", f"placement.mode={mode}"]
    printed = subprocess.run(
        [PROGRAMS / "elastic", "serve", tmp_path / "flow", *settings, "--print-config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (tmp_path / "deploy.yaml").write_text(printed.stdout)
    with started_head(tmp_path / "home") as head, httpx.Client(timeout=30) as client:
        done = subprocess.run(
            [PROGRAMS / "serve", "deploy", tmp_path / "deploy.yaml", "--address", head.address],
            env={**os.environ, **head.environment},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            try:
                return client.get(f"{url}/v2/health/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, "the application is ready", timeout_s=200)
        body = {"prompt": "", "n": 1, "seed": 1}
        answer = client.post(f"{url}/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"][0]["b64_json"]
