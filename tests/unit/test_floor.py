"""How a step is held against its floor: the arithmetic, and the kernels alone in processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.setup import compute_environment
from benchmarks import bare, floor
from benchmarks.bare import Bare
from examples.stdlib_lm.task import StdlibLM

LEAST = {"wake-up": 0.0, "compute": 1.0, "encode": 0.1, "update": 0.15}
KERNELS = {"compute": [1.1], "maxima": [0.01], "encode": [0.2], "sum": [0.1], "update": [0.1]}


def line(begin_s: float, *, update_s: float = 0.25) -> dict[str, Any]:
    """A step of two seconds, and who computed what when."""
    work = [
        [0, 0, begin_s + 0.05, begin_s + 1.0, "granted"],
        [1, 1, begin_s + 0.25, begin_s + 1.5, "granted"],
        [2, 1, begin_s + 0.01, begin_s + 1.9, "late"],
    ]
    return {"time_s": begin_s + 2.0, "update_s": update_s, "work": work, "num_duplicates": 1}


def test_the_phases_of_a_step_add_up_to_it() -> None:
    found = floor.phases(line(8.0), line(10.0))
    assert found == pytest.approx(
        {"wake-up": 0.05, "compute": 1.45, "encode": 0.25, "update": 0.25}
    )
    assert sum(found.values()) == pytest.approx(2.0)


def test_the_floor_counts_what_must_be_read_and_written() -> None:
    found = floor.floor(1_000_000, 4, 0.5, 4e9)  # a tensor takes 1 ms
    assert found == pytest.approx({"wake-up": 0, "compute": 0.5, "encode": 0.008, "update": 0.012})


def test_figures_hold_steps_against_their_floor() -> None:
    lines = [line(8.0), line(10.0), line(12.0, update_s=0.35)]
    figures = floor.figures_of("x", LEAST, KERNELS, {"compute": [1.0]}, lines)
    by_name = {one.name: one for one in figures}
    whole = by_name["step time / its floor, x"]
    assert (whole.value, whole.ok) == (pytest.approx(2.0 / 1.25), False)
    assert by_name["forward and backward as in a job / plain, x"].value == pytest.approx(1.1)
    assert by_name["compute of a step beyond its floor, x"].value == pytest.approx(0.45)
    assert "alone 200 ms, in the job 300 ms" in by_name["update of a step beyond its floor, x"].note


def test_what_is_asked_for_is_checked() -> None:
    options = floor.parse(["--sizes", "small,100m", "--workers", "2"])
    assert (options.sizes, options.workers) == (["small", "100m"], [2])
    for words in (["--sizes", "1b"], ["--workers", "3"]):
        with pytest.raises(SystemExit):
            floor.parse(words)


@pytest.mark.timeout(180)  # processes import torch
def test_every_phase_is_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    StdlibLM().dataset()  # written once
    what = Bare(size="small", num_workers=2, batch=2, steps=2, as_in_job=True)
    seconds, num_parameters = bare.measure(what, compute_environment(1))
    assert tuple(seconds) == bare.PHASES
    assert all(len(one) == 2 and min(one) > 0 for one in seconds.values())
    assert num_parameters == pytest.approx(0.85e6, rel=0.02)
    assert not list(bare.ROOT.glob("elastic-floor-*"))


def test_an_error_of_a_process_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    StdlibLM().dataset()
    what = Bare(size="none", num_workers=1, batch=2, steps=1, as_in_job=False)
    with pytest.raises(Exception, match=r"task_args\.size is 'none'"):
        bare.measure(what, {})
