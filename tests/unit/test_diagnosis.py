"""The goodput account adds up, causes are found and priced, foreign traces are read or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from pyarrow import csv, parquet

from elastic.cli import main
from elastic.core.errors import ConfigError
from elastic.report.account import account_of, account_of_trace
from elastic.report.diagnosis import diagnose, diagnose_trace
from elastic.report.excess import cells_of
from elastic.report.heatmap import draw_heatmap
from elastic.report.story import read_story
from elastic.report.trace import OPERATIONS, Trace, read_trace
from monitoring.account import PARTS
from tests.fake_run import FAULTS, FakeRun


def a_run(path: Path, faults: dict[int, str], *, num_steps: int = 120) -> FakeRun:
    fake = FakeRun(path, num_steps=num_steps)
    fake.run(faults)
    fake.finish()
    return fake


# --- the account ------------------------------------------------------------------------------


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.integers(0, 59), st.sampled_from(["kill", "stop", "aggregator", "join", "slow"])
    ),
    st.integers(0, 3),
)
def test_the_parts_add_up_to_the_wall_time(
    tmp_path_factory: pytest.TempPathFactory, faults: dict[int, str], kind: int
) -> None:
    fake = FakeRun(tmp_path_factory.mktemp("run"), num_steps=60)
    fake.run(faults)
    if kind == 1:  # resumed from step 50, ten steps are lost
        fake.now_s += 500
        fake.event("job_resumed", 50)
        fake.now_s += 2
        for step in range(50, 70):
            fake._step(step, None)
    account = account_of(read_story(fake.folder.path))
    note(f"{faults}, kind {kind}: {account}")
    assert sum(account.seconds.values()) == pytest.approx(account.wall_s, rel=1e-6)
    assert all(seconds >= -1e-9 for seconds in account.seconds.values())
    assert account.share("other") <= 0.02
    assert (account.seconds["recomputed"] > 1.0) == (kind == 1)


def test_each_second_is_called_what_it_was(tmp_path: Path) -> None:
    """Four steps of two workers, by hand; before the second an aggregator is lost for 3 s."""
    fake = FakeRun(tmp_path, num_steps=2)
    start_s = fake.now_s
    base: dict[str, Any] = {"loss": 1.0, "samples": 2, "attempt": 0, "num_workers": 2}

    def step(number: int, end_s: float, work: list[list[Any]]) -> None:
        rows = [[who, one, start_s + a, start_s + b, said] for who, one, a, b, said in work]
        line = {"step": number, "time_s": start_s + end_s, "step_s": 1.0, "work": rows}
        fake.folder.append_metrics({**base, **line, "num_duplicates": 0})

    ok, no = "granted", "refused"
    step(0, 2.0, [[0, 0, 1.0, 1.9, ok], [1, 1, 1.0, 1.4, ok], [1, 0, 1.5, 1.8, no]])
    fake.event("aggregator_lost", 1, time_s=start_s + 2.5)
    step(1, 6.0, [[0, 0, 5.0, 5.9, ok], [1, 1, 5.0, 5.9, ok]])
    step(2, 7.1, [[0, 0, 6.1, 7.0, ok], [1, 1, 6.1, 7.0, ok]])
    step(3, 8.2, [[0, 0, 7.2, 8.1, ok], [1, 1, 7.2, 8.1, ok]])
    for worker in (2, 3):
        fake.event("worker_lost", 0, worker=worker, time_s=start_s)
    account = account_of(read_story(tmp_path))
    expected = dict.fromkeys(PARTS, 0.0)
    expected["start-up"] = 3.0 + 1.0  # before the first step, and until its first work
    expected["recomputed"], expected["waiting"] = 0.3 / 2, 0.1 / 2
    expected["recovery"] = 3.0 - 1.5 * 0.1  # the pause beyond the usual one
    expected["coordination"] = 0.1 / 2 + 1.5 * 0.1 + 0.1 + 0.1
    expected["productive"] = (0.9 + 0.4) / 2 + 3 * 0.9 + 4 * 0.1
    assert account.wall_s == pytest.approx(11.2, abs=1e-5)
    assert account.seconds == pytest.approx(expected, abs=1e-5)


def test_a_healthy_run_is_productive(tmp_path: Path) -> None:
    account = account_of(read_story(a_run(tmp_path, {}).folder.path))
    assert account.goodput > 0.6
    assert account.seconds["recovery"] == 0.0


# --- causes -----------------------------------------------------------------------------------


def test_faults_are_named_with_their_time_and_their_cost(tmp_path: Path) -> None:
    fake = a_run(tmp_path, FAULTS, num_steps=200)
    found = diagnose(read_story(fake.folder.path))
    told = {(one.what, one.who) for one in found.causes}
    assert ("slow computation", "worker 2") in told
    assert ("worker killed", "worker 3") in told
    assert ("worker stopped or hung", "worker 1") in told
    assert ("aggregator fault, takeover", "") in told
    (slow,) = [one for one in found.causes if one.who == "worker 2" and one.what[0] == "s"]
    assert abs(slow.step - 60) <= 2
    assert slow.end_s == found.records.end_s_S[-1]
    costs = [one.cost_s for one in found.causes]
    assert costs == sorted(costs, reverse=True)
    took_s = found.records.end_s_S - found.records.begin_s_S
    assert sum(costs) <= np.maximum(took_s - found.usual_step_s, 0).sum() + 1e-9


def test_a_quiet_run_of_equals_has_no_cause(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, num_steps=150)
    fake.workers = dict.fromkeys(range(4), 1.0)
    fake.run({})
    assert diagnose(read_story(tmp_path)).causes == ()


# --- foreign traces ---------------------------------------------------------------------------


def rows(*, num_steps: int = 40, slow: Mapping[int, float], last: Mapping[int, int]) -> pa.Table:
    """Two stages of four workers; the second takes twice as long. `last`: a worker's last step."""
    dice = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("worker", "role", "step", "micro_batch", "operation", "start", "end")
    }

    def add(*values: Any) -> None:
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)

    for step in range(num_steps):
        for worker in range(8):
            if step > last.get(worker, num_steps):
                continue
            stage = worker // 4
            at_s = 100.0 + 10.0 * step
            for operation, takes_s in (("forward", 1.0), ("backward", 2.0)):
                factor = slow.get(worker, 1.0) if step >= 15 else 1.0
                took_s = takes_s * (1 + stage) * factor * float(np.exp(dice.normal(0, 0.03)))
                add(worker, f"stage {stage}", step, 0, operation, at_s, at_s + took_s)
                at_s += took_s
            add(worker, f"stage {stage}", step, -1, "allreduce", at_s, at_s + 0.5)
    return pa.table(columns)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_trace_of_another_framework_is_diagnosed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    table = rows(slow={6: 1.4}, last={1: 30})
    if suffix == ".csv":
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    trace = read_trace(path)
    assert trace.role_names == ("stage 0", "stage 1")
    assert trace.start_s[0] == 0.0
    found = diagnose_trace(trace)
    assert {(one.what, one.who) for one in found.causes} == {
        ("slow computation", "worker 6"),
        ("worker stopped or hung", "worker 1"),
    }
    account = account_of_trace(trace)
    assert sum(account.seconds.values()) == pytest.approx(account.wall_s)
    assert (
        draw_heatmap(found, "trace", tmp_path / "deep" / "map.png").read_bytes()[:4] == b"\x89PNG"
    )


def test_each_cell_holds_the_excess_over_the_median_of_the_role() -> None:
    trace = Trace(
        worker=np.array([0, 1, 2, 3, 0, 1, 2]),
        role=np.array([0, 0, 0, 1, 0, 0, 0]),
        step=np.array([0, 0, 0, 0, 1, 1, 1]),
        micro_batch=np.zeros(7, np.int64),
        operation=np.full(7, OPERATIONS.index("compute")),
        start_s=np.array([0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 10.0]),
        end_s=np.array([1.0, 1.0, 1.5, 9.0, 12.0, 11.0, 12.0]),
    )
    edges_s, _, cells = cells_of(diagnose_trace(trace).records, np.arange(4))
    assert edges_s.tolist() == [0.0, 10.0, 12.0]
    np.testing.assert_allclose(cells, [[0, 0], [0, -0.5], [0.5, 0], [0, np.nan]])


WRONG = [
    pytest.param({"end": None}, r"no column end; there are: worker", id="a column is missing"),
    pytest.param({"worker": [0.5]}, r"column worker holds .*; needs integers", id="a float"),
    pytest.param({"step": [-1]}, r"column step holds -1; needs >= 0", id="a negative step"),
    pytest.param({"operation": ["nap"]}, r"operation nap; allowed: compute", id="an operation"),
    pytest.param({"end": [0.5]}, r"row 1: end 0.5 is before start 1", id="backwards"),
    pytest.param({"start": [np.inf]}, r"column start must hold finite", id="infinite"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_trace_is_refused_in_words(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    columns: dict[str, Any] = {
        "worker": [0],
        "step": [0],
        "operation": ["compute"],
        "start": [1.0],
        "end": [2.0],
        **change,
    }
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    parquet.write_table(table, tmp_path / "trace.parquet")
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / "trace.parquet")


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    for name in ("trace.parquet", "trace.csv"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(tmp_path / name)
    (tmp_path / "trace.parquet").write_bytes(b"no table at all")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "trace.parquet")
    empty = pa.table(
        {name: pa.array([], pa.int64()) for name in ("worker", "step", "start", "end")}
    )
    parquet.write_table(empty.append_column("operation", [[]]), tmp_path / "trace.parquet")
    with pytest.raises(ConfigError, match="has no rows"):
        read_trace(tmp_path / "trace.parquet")


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_the_account_and_the_causes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = a_run(tmp_path / "run", FAULTS, num_steps=150)
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", str(fake.folder.path)])
    assert stopped.value.code in (0, None)
    said = capsys.readouterr().out
    assert "goodput" in said
    assert f"recovery: {PARTS['recovery']}" in said
    assert "slow computation. worker 2 computes" in said
    assert fake.folder.diagnosis_png.read_bytes()[:4] == b"\x89PNG"
    trace = tmp_path / "trace.csv"
    csv.write_csv(rows(slow={6: 1.5}, last={}), trace)
    with pytest.raises(SystemExit):
        main(["diagnose", str(trace)])
    assert "worker 6 computes" in capsys.readouterr().out
    assert trace.with_suffix(".png").exists()
