"""Policies against stragglers on real workers: kills, joins and delays change no bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from elastic.core.runs import RunFolder
from tests.integration.fixtures import NUM_STEPS
from tests.integration.support import (
    Outcome,
    check_faults_fired,
    kinds,
    make_job,
    outcome,
    run_job,
    write_faults,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]

POLICIES = {
    "frc of two": {"kind": "frc", "stragglers": 1},
    "frc of all": {"kind": "frc", "stragglers": 7},
    "c_code": {"kind": "c_code", "stragglers": 1},
    "crc": {"kind": "crc", "stragglers": 1},
    "uncoded": {"kind": "uncoded"},
    "auto": {"kind": "auto"},
}


def write_delays(path: Path, num_workers: int, least_s: float) -> Path:
    """A tenth of a second more for a worker in six."""
    dice = np.random.default_rng(0)
    seconds_RN = np.where(dice.random((NUM_STEPS, num_workers)) < 1 / 6, 0.1, 0) + least_s
    np.savez(path, dur=seconds_RN)
    return path


def calm(folder: Path) -> dict[str, str]:
    """All sleep in each step, so that all are there before all is done."""
    np.savez(folder / "calm.npz", dur=np.full((NUM_STEPS, 4), 0.3))
    return {"do": "delays", "trace": str(folder / "calm.npz")}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_no_bit(policy: str, undisturbed: Outcome, tmp_path: Path) -> None:
    is_code = POLICIES[policy]["kind"] in ("c_code", "crc")
    point = "mid_update" if is_code else "after_grant"  # no manifest says what is coded
    least_s = 0.3 if is_code else 1e-4  # a code waits for three to be there at once
    faults = write_faults(
        tmp_path / "faults.yaml",
        [
            {"do": "delays", "trace": str(write_delays(tmp_path / "delays.npz", 4, least_s))},
            {"do": "kill", "at": {"step": 4, "point": "before_compute"}, "target": "worker-1"},
            {"do": "kill", "at": {"step": 9, "point": "after_encode"}, "target": "worker-2"},
            {"do": "add_worker", "at": {"step": 12}},
            {"do": "nan_gradient", "at": {"step": 16}, "target": "worker-0"},
            {"do": "kill_aggregator", "at": {"step": 20, "point": point}},
            {"do": "remove_worker", "at": {"step": 24}, "target": "worker-0"},
        ],
    )
    job = make_job("coded", workers=3, spare=1, steps=NUM_STEPS, stragglers=POLICIES[policy])
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)
    # not "worker_left": on a busy machine the job may end first
    assert {"worker_lost", "worker_joined"} <= set(kinds(result))
    if is_code:
        shares = [one for one in result.events if "coded shares of 3" in one["reason"]]
        assert shares, "with two workers nothing is coded"
    chosen = [one["reason"] for one in result.events if one["kind"] == "scheduling"]
    assert chosen
    assert all(one.startswith(POLICIES[policy]["kind"]) for one in chosen), chosen


def test_a_worker_that_never_answers_is_as_good_as_absent(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """It sleeps for an hour in each step, and no step waits for it."""
    slow = {"do": "slow", "at": {"step": 5}, "target": "worker-1", "sleep_s": 3600.0}
    faults = write_faults(tmp_path / "faults.yaml", [slow, calm(tmp_path)])
    stragglers = {"kind": "frc", "stragglers": 1}
    job = make_job("never", workers=3, steps=NUM_STEPS, stragglers=stragglers)
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    assert result.path is not None
    lines = RunFolder(result.path).read_metrics()
    together = [
        line["num_duplicates"]
        for before, line in pairwise(lines[5:])
        if before["num_workers"] == line["num_workers"] == 3  # all were there when it began
    ]
    assert together
    assert all(num >= 8 for num in together), "each of 8 was held twice at least"
    assert "worker_lost" not in kinds(result), "it gives up with its step and is there again"


def test_a_code_waits_for_no_one_that_may_be_missing(undisturbed: Outcome, tmp_path: Path) -> None:
    """It sleeps for an hour in each step from the fifth on, and no step waits for it."""
    slow = {"do": "slow", "at": {"step": 5}, "target": "worker-1", "sleep_s": 3600.0}
    faults = write_faults(tmp_path / "faults.yaml", [slow, calm(tmp_path)])
    stragglers = {"kind": "c_code", "stragglers": 1}
    job = make_job("missing", workers=4, steps=NUM_STEPS, stragglers=stragglers)
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    assert "worker_lost" not in kinds(result), "it gives up with its step and is there again"


def test_more_that_are_lost_than_a_code_withstands_cost_an_attempt(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    """Three of four die within one step, one for which the code was made."""
    at = {"step": 12, "point": "before_compute"}
    kills = [{"do": "kill", "at": at, "target": f"worker-{worker}"} for worker in (1, 2, 3)]
    faults = write_faults(tmp_path / "faults.yaml", [*kills, calm(tmp_path)])
    stragglers = {"kind": "crc", "stragglers": 1}
    job = make_job("lost", workers=4, steps=NUM_STEPS, stragglers=stragglers)
    result = run_job(job, run_dir=tmp_path / "run", faults=faults)
    assert outcome(result) == undisturbed
    check_faults_fired(result, faults)
    told = [one["reason"] for one in result.events if one["kind"] == "uncoded"]
    assert any("are lost, and 1 may be missing" in one for one in told), told
    assert result.path is not None
    lines = RunFolder(result.path).read_metrics()
    assert lines[12]["attempt"] == 1
