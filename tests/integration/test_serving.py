"""`elastic serve` on real processes: both placements, lost replicas, swaps, a clean end."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import pytest

from benchmarks.processes import cpu_s
from elastic.core.experts.repository import Repository
from tests.integration.serving import elastic_serve
from tests.integration.support import wait_until
from tests.served import make_repository, trained

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_experts_together(tmp_path: Path) -> None:
    make_repository(tmp_path / "tiny")
    with elastic_serve(tmp_path / "tiny", tmp_path / "log", "placement.replicas=2") as serving:
        first = serving.infer()
        assert first.status_code == 200
        assert first.headers["x-elastic-degraded"] == "false"
        assert first.headers.get_list("x-request-id") == [first.headers["x-request-id"]]
        assert serving.status()["mode"] == "colocated"
        assert len(serving.replicas("tiny")) == 2
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: serving.infer(), range(40)))
        assert {one.status_code for one in answers} == {200}
        wanted = pytest.approx(first.json()["outputs"][0]["data"], abs=1e-4)
        assert all(one.json()["outputs"][0]["data"] == wanted for one in answers)


def test_requests_outlive_a_replica_with_all_experts(tmp_path: Path) -> None:
    """Who it was working for is answered by the other one, and told so."""
    make_repository(tmp_path / "tiny")
    overrides = ("placement.mode=colocated", "placement.replicas=2", "limits.num_steps=2000")
    with elastic_serve(tmp_path / "tiny", tmp_path / "log", *overrides) as serving:
        wanted = serving.infer(num_steps=2000).json()["outputs"][0]["data"]
        before = {pid: cpu_s(pid) for pid in serving.replicas("tiny")}
        assert len(before) == 2

        def at_work() -> list[int]:
            return [pid for pid, spent_s in before.items() if cpu_s(pid) > spent_s + 0.2]

        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(serving.infer, num_steps=2000) for _ in range(4)]
            os.kill(wait_until(at_work, "a replica works")[0], signal.SIGKILL)
            answers = [one.result(timeout=60) for one in asked]
        assert [one.text for one in answers if one.status_code != 200] == []
        assert "1" in [one.headers.get("x-elastic-repeated") for one in answers]
        assert all(
            one.json()["outputs"][0]["data"] == pytest.approx(wanted, abs=1e-4) for one in answers
        )
        for pid in serving.replicas("tiny"):  # nobody is left, for longer than this client waits
            os.kill(pid, signal.SIGKILL)
        late = httpx.get(serving.url + "/v2", headers={"x-elastic-timeout-s": "0.5"}, timeout=30)
        assert (late.status_code, list(late.json())) == (504, ["error"])
        patient = serving.infer(num_steps=2000)
        assert patient.json()["outputs"][0]["data"] == pytest.approx(wanted, abs=1e-4)


def test_experts_apart_are_killed_swapped_and_added_under_load(tmp_path: Path) -> None:
    """No answer but 200, whatever happens: degraded ones say so."""
    make_repository(tmp_path / "tiny")
    overrides = ("placement.mode=distributed", "failing.expert_timeout_s=5")
    with elastic_serve(tmp_path / "tiny", tmp_path / "log", *overrides) as serving:
        whole = serving.infer()
        assert whole.headers["x-elastic-experts"] == "expert-0,expert-1,expert-2"
        done, answers = Event(), []

        def load() -> None:
            while not done.is_set():
                answers.append(serving.infer())

        with ThreadPoolExecutor(2) as threads:
            clients = [threads.submit(load) for _ in range(2)]
            try:
                (victim,) = serving.replicas("tiny-expert-1")
                os.kill(victim, signal.SIGKILL)
                wait_until(
                    lambda: serving.infer().headers.get("x-elastic-lost") == "expert-1",
                    "it is missed",
                )
                wait_until(
                    lambda: serving.infer().headers.get("x-elastic-degraded") == "false",
                    "it is back",
                    timeout_s=90,
                )
                version = serving.status()["version"]
                repository = Repository.open(tmp_path / "tiny")
                repository = repository.replace_expert("expert-0", trained("flow", 50).weights)
                wait_until(lambda: serving.status()["version"] != version, "it is swapped")
                version = serving.status()["version"]
                repository.add_expert(
                    "expert-3", trained("flow", 51), router=trained("flow", 52, outputs=4)
                )
                wait_until(
                    lambda: serving.status()["version"] != version, "it is added", timeout_s=90
                )
                assert serving.infer().headers["x-elastic-experts"].endswith("expert-3")
            finally:
                done.set()
            for client in clients:
                client.result(timeout=60)
        assert {one.status_code for one in answers} == {200}, [
            one.text for one in answers if one.status_code != 200
        ][:3]
