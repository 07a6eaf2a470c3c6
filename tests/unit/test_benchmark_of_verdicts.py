"""What the benchmark of verdicts makes of a run's events; every fault of it can happen."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.detection_of_jobs import KINDS, judge
from benchmarks.jobs import Run, make_job
from benchmarks.naming import FAILED, GONE, NOTHING, Injection, confusion, figures_of, matrix
from elastic.core.faults import load_faults

BY_NAME = {kind.name: kind for kind in KINDS}


def run(*events: dict[str, Any]) -> Run:
    """Steps of half a second; a fault at 20 s."""
    metrics = [{"step": one, "time_s": one / 2, "step_s": 0.5} for one in range(1, 80)]
    fault = {"kind": "fault", "time_s": 20.0, "worker": 1}
    return Run(make_job("x"), Path(), metrics, [fault, *events], {}, 1.0)


def verdict(kind: str, time_s: float, worker: int) -> dict[str, Any]:
    return {"kind": "verdict", "time_s": time_s, "worker": worker, "verdict": {"kind": kind}}


def test_the_first_verdict_on_the_culprit_counts_in_steps() -> None:
    kind = BY_NAME["hang"]
    told = judge(kind, run(verdict(kind.says, 21.25, 1), verdict("slow computation", 30, 1)), 1)
    assert told == Injection("hang", kind.says, pytest.approx(2.5), ())


def test_a_verdict_on_somebody_else_is_none_on_the_culprit() -> None:
    kind = BY_NAME["slow computation"]
    told = judge(kind, run(verdict(kind.says, 21.0, 2)), 1)
    assert (told.called, told.took, told.others) == (NOTHING, None, ("slow computation",))


def test_a_dead_process_is_told_in_seconds() -> None:
    lost = {"kind": "worker_lost", "time_s": 20.04, "worker": 1}
    told = judge(BY_NAME["dead process"], run(lost), 1)
    assert told.took == pytest.approx(0.04)


def test_figures_hold_what_was_named_wrong_against_the_limit() -> None:
    hang = BY_NAME["hang"]
    right = Injection("hang", hang.says, 2.0, ())
    wrong = Injection("hang", NOTHING, None, ())
    first, healthy, steps = figures_of([(hang, right), (hang, wrong)], [])
    assert (first.value, first.ok, healthy.ok) == (0.5, False, True)
    assert (steps.value, steps.limit, steps.ok) == (2.0, 3.0, True)
    assert confusion([right, wrong]) == {
        "hang -> hang outside communication": 1,
        "hang -> nothing": 1,
    }


def test_the_matrix_says_what_was_called_what() -> None:
    right = Injection("hang", "hang outside communication", 2.0, ("slow computation",))
    dead = Injection("dead process", GONE, 0.01, ())
    head, *rows = matrix([right, right, dead, Injection("dead process", FAILED, None, ())]).split(
        "\n"
    )
    assert re.split(" {2,}", head.strip()) == [
        "fault", "hang outside communication", "its process is gone", "the job failed", "others",
    ]  # fmt: skip
    assert [re.split(" {2,}", row.strip()) for row in rows] == [
        ["hang", "2", "0", "0", "2"],
        ["dead process", "0", "1", "1", "0"],
    ]


def test_where_the_job_had_not_settled_its_first_steps_are_the_usual_ones() -> None:
    kind = BY_NAME["hang"]
    late = replace(run(verdict(kind.says, 21.25, 1)), settled_s=30.0)
    assert judge(kind, late, 1).took == pytest.approx(2.5)


def test_a_fault_that_never_struck_is_no_verdict() -> None:
    calm = run()
    calm.events.clear()
    with pytest.raises(RuntimeError, match="never struck"):
        judge(BY_NAME["hang"], calm, 1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_is_a_fault_that_can_happen(kind: Any, tmp_path: Path) -> None:
    entry = kind.make(random.Random(3), 7, 2)
    (tmp_path / "faults.yaml").write_text(yaml.safe_dump([entry]))
    (fault,) = load_faults(tmp_path / "faults.yaml", num_steps=100)
    assert (fault.step, fault.target) == (7, 2)
