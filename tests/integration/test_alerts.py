"""The alerts on a real job, by a real Prometheus: silent as long as all is well, then each fires.

A minute of the rules is a second here. What one host cannot have, replicas and links, and what
takes hours, is in tests/unit/test_monitoring.py; alerts of serving are in test_serving_metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from elastic.core.runs import RunFolder
from elastic.handle import connect
from tests.integration.support import make_job, run_job, wait_until, write_faults
from tests.prometheus import Prometheus, hurried, needs_prometheus, prometheus

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("cluster"),
    needs_prometheus,
]

NUM_WORKERS, LIAR = 3, 1
STEP_S, CALM_STEPS, CALM_S = 0.1, 250, 10.0
"""Nothing happens so long at least: ten minutes of the rules."""
STARTS_S = 10.0
"""Afterwards the start is in no rate any more."""
STOPPED_S = 30.0
SLOW_S = 30.0
EXPECTED = {
    "ElasticNotFinite",
    "ElasticSilentCorruption",
    "ElasticHang",
    "ElasticJobStalled",
    "ElasticGoodputLow",
    "ElasticStepTimeRegression",
}


def fired(server: Prometheus, begin_s: float, end_s: float) -> set[str]:
    """The alerts that were firing at some time between the two."""
    asked = f'max_over_time(ALERTS{{alertstate="firing"}}[{max(1, int(end_s - begin_s))}s])'
    return {one["metric"]["alertname"] for one in server.query(asked, end_s)}


def of_each(workers: Iterable[int], do: str, step: int, **more: Any) -> list[dict[str, Any]]:
    """The same fault for each of them."""
    return [{"do": do, "at": {"step": step}, "target": f"worker-{one}", **more} for one in workers]


@pytest.mark.chaos
def test_they_are_silent_until_something_happens_and_then_fire(tmp_path: Path) -> None:
    job = make_job(
        "alerts",
        workers=NUM_WORKERS,
        steps=100_000,
        audit=0.2,
        checkpoint={"every": 20, "keep_last": 2},
        evaluate={"every": 0},
    )
    faults = [
        *of_each((0, 1, 2, 3), "slow", 0, sleep_s=STEP_S),  # as long on each machine
        {"do": "nan_gradient", "at": {"step": CALM_STEPS}, "target": "worker-0"},
        *of_each((0, 1, 2), "slow", CALM_STEPS + 5, for_s=SLOW_S, sleep_s=5 * STEP_S),
        {"do": "flip_bit", "at": {"step": CALM_STEPS + 30}, "target": f"worker-{LIAR}"},
        *of_each((0, 2, 3), "stop", CALM_STEPS + 50, for_s=STOPPED_S),  # 3 replaces the liar
    ]
    run_dir = tmp_path / "runs" / "alerts"
    running = threading.Thread(
        target=lambda: run_job(
            job, run_dir=run_dir, faults=write_faults(tmp_path / "faults.yaml", faults)
        ),
        daemon=True,
    )
    with prometheus(tmp_path, is_hurried=True) as server:
        running.start()

        def times_s(kind: str) -> list[float]:
            events = RunFolder(run_dir).read_events() if run_dir.exists() else []
            return [float(one["time_s"]) for one in events if one["kind"] == kind]

        try:
            wait_until(lambda: bool(times_s("nonfinite")), "the calm is over", timeout_s=120)
            calm_until_s = times_s("nonfinite")[0]
            calm_s = calm_until_s - max(times_s("worker_joined")) - STARTS_S
            for alert in sorted(EXPECTED):
                wait_until(
                    lambda named=alert: named in fired(server, calm_until_s, time.time()),
                    f"{alert} fires",
                    timeout_s=150,
                )
        finally:
            connect(str(run_dir)).stop()
            running.join(60)
        assert calm_s > CALM_S
        assert fired(server, calm_until_s - calm_s, calm_until_s) == set()


def test_minutes_become_seconds_and_nothing_else_changes() -> None:
    rules = "expr: rate(a_5m[5m]) > 2 * b[1h] offset 15m\n  for: 10m\n"
    assert hurried(rules) == "expr: rate(a_5m[5s]) > 2 * b[60s] offset 15s\n  for: 10s\n"
