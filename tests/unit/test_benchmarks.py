"""The parts of the benchmarks that measure nothing: statistics, records, table, schedules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import (
    changes,
    chaos,
    chaos_of_hosts,
    checkpoint,
    cluster,
    data,
    ddp,
    hosts,
    processes,
    record,
    recovery,
    startup,
    step,
    straggler_runs,
    stragglers,
    table,
)
from benchmarks.jobs import Run, make_job
from elastic.core.data.memory import ArrayRows
from elastic.core.errors import ConfigError
from elastic.core.faults import load_faults
from policies.coding.m_sgc import MSgc
from policies.coding.simulation import Coded
from policies.coding.sr_sgc import SrSgc
from policies.scheduling import Shares


def a_record(
    what: str, figures: list[record.Figure], date: str = "2026-01-02T03:04:05"
) -> dict[str, Any]:
    return {
        "what": what,
        "date": date,
        "commit": "0123456789abcdef",
        "hardware": {"cpu_model": "ACME (R) 9", "cores": 2},
        "figures": [asdict(one) for one in figures],
    }


# --- record ----------------------------------------------------------------------------------


def test_a_figure_holds_its_statistic_against_the_limit() -> None:
    samples = [1.0, 2.0, 3.0, 10.0]
    median = record.figure("m", samples, unit="s", limit=2.5)
    largest = record.figure("l", samples, unit="s", limit=9.0, statistic="largest")
    assert (median.value, median.ok, median.n) == (2.5, True, 4)
    assert (largest.value, largest.ok, largest.median) == (10.0, False, 2.5)
    assert record.figure("r", samples, unit="s").ok is None
    assert median.spread == pytest.approx((1.3, 7.9))


def test_no_samples_are_no_figure() -> None:
    with pytest.raises(ValueError, match="x: there are no samples"):
        record.figure("x", [], unit="s")
    with pytest.raises(ValueError, match="x: 1 and 0 samples"):
        record.ratio("x", [1.0], [])


def test_a_ratio_is_that_of_the_statistics_and_its_spread_is_seeded() -> None:
    ours, theirs = [2.0, 2.2, 2.4, 9.0], [1.0, 1.1, 1.2]
    one = record.ratio("x", ours, theirs, limit=2.0)
    assert one == record.ratio("x", ours, theirs, limit=2.0)
    assert one.value == pytest.approx(2.3 / 1.1)
    assert (one.n, one.ok) == (3, False)
    assert one.spread[0] <= one.value <= one.spread[1]
    mean = record.ratio("x", ours, theirs, statistic="mean")
    assert mean.value == pytest.approx(3.9 / 1.1)


def test_a_record_is_written_under_its_name_and_the_newest_is_read(tmp_path: Path) -> None:
    figures = [record.figure("x", [1.0], unit="s")]
    made = record.make_record("step-ratio", {"size": "small"}, figures)
    path = record.write(made, tmp_path)
    assert path.name.startswith("step-ratio_")
    assert path.name.endswith(f"_{made['date'][:10].replace('-', '')}.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(made))
    assert {"commit", "hardware", "versions", "config"} <= set(made)
    older = a_record("step-ratio", figures, "2001-01-01T00:00:00")
    record.write(older, tmp_path)
    assert record.read_newest(tmp_path)["step-ratio"]["date"] == made["date"]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match=r"x\.json: holds no record"):
        record.read_newest(tmp_path)


# --- table -----------------------------------------------------------------------------------


def test_the_table_shows_limits_and_what_misses_them() -> None:
    figures = [
        record.figure("kept | here", [0.5, 0.5], unit="x", limit=1.0),
        record.figure("missed", [1234.0], unit="ms", limit=3.0),
        record.figure("only told", [0.0123], unit="s"),
    ]
    records = {"b": a_record("b", figures[1:]), "a": a_record("a", figures[:1])}
    assert table.render(records).splitlines() == [
        "| what | must | measured | ok |",
        "| --- | --- | --- | --- |",
        "| kept \\| here | <= 1 | 0.5 (0.5 to 0.5, n=2) | yes |",
        "| missed | <= 3 ms | 1234 ms | **no** |",
    ]
    assert "| only told | report | 0.012 s |  |" in table.render(records, everything=True)
    assert table.sources(records) == "ACME (R) 9, 2 cores, commit 0123456789ab: a, b\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00001234, "1.2e-05"),
        (0.1234, "0.123"),
        (-0.5, "-0.5"),
        (1.5, "1.5"),
        (2.0, "2"),
        (12.34, "12.3"),
        (20.0, "20"),
        (100.0, "100"),
        (1234.4, "1234"),
    ],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert table.number(value) == text


# --- chaos -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [60, 200])
def test_schedules_are_seeded_and_accepted_as_fault_files(tmp_path: Path, num_steps: int) -> None:
    path = tmp_path / "faults.yaml"
    seen: set[str] = set()
    for seed in range(200):
        faults = chaos.schedule(seed, num_steps)
        assert faults == chaos.schedule(seed, num_steps), f"seed {seed}"
        path.write_text(yaml.safe_dump(faults))
        loaded = load_faults(path, num_steps=num_steps)
        assert len(loaded) >= chaos.MIN_FAULTS, f"seed {seed}"
        assert len(chaos.shown(faults).split(", ")) == len(faults)
        seen |= {one.do for one in loaded}
    assert seen == {
        *("kill", "stop", "resume", "slow", "add_worker", "remove_worker"),
        *("kill_aggregator", "stop_aggregator", "kill_coordinator", "nan_gradient"),
    }


def test_every_fault_of_a_schedule_can_happen() -> None:
    for seed in range(200):
        faults = chaos.schedule(seed, 200)
        struck = [one["target"] for one in faults if "target" in one and one["do"] != "resume"]
        assert len(struck) == len(set(struck)) < chaos.NUM_WORKERS, f"seed {seed}"
        stopped = {one["target"]: one["at"]["step"] for one in faults if one["do"] == "stop"}
        for one in faults:
            if one["do"] == "resume":
                assert stopped[one["target"]] < one["at"]["step"], f"seed {seed}"
        later = [one["do"] for one in faults if one["at"]["step"] > 0.65 * 200]
        assert later in ([], ["kill_coordinator"]), f"seed {seed}"


def test_a_job_too_short_for_a_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="10 steps are too few"):
        chaos.schedule(0, 10)


def test_runs_are_compared_by_parameters_and_samples() -> None:
    same = {"params_sha256": "p", "samples_sha256": "s", "steps": 3, "exact": True}
    assert chaos.compare(a_run(result=same), a_run(result=dict(same))) == ""
    other = a_run(result={**same, "samples_sha256": "t"})
    assert chaos.compare(other, a_run(result=same)) == "samples_sha256: t instead of s"


# --- runs ------------------------------------------------------------------------------------


def a_run(
    metrics: list[dict[str, Any]] | None = None,
    events: list[dict[str, Any]] | None = None,
    result: Mapping[str, Any] | None = None,
    settled_s: float = 0.0,
) -> Run:
    job = make_job("test", "steps=3")
    return Run(job, Path("x"), metrics or [], events or [], dict(result or {}), settled_s)


def a_step(step: int, time_s: float, *, step_s: float = 1.0, attempt: int = 0) -> dict[str, Any]:
    work = [[0, 0, time_s - step_s, time_s - 0.5, "granted"], [1, 0, 0.0, 9.0, "refused"]]
    return {"step": step, "time_s": time_s, "step_s": step_s, "attempt": attempt, "work": work}


def test_only_settled_steps_count() -> None:
    run = a_run([a_step(step, 10.0 + step) for step in range(6)], settled_s=12.0)
    assert [one["step"] for one in run.settled] == [3, 4, 5]
    assert run.settled_step == 3
    assert (run.median_s, run.micro_batch_s) == (1.0, 0.5)


def test_missing_and_repeated_steps_are_lost() -> None:
    steps = [a_step(0, 1.0, attempt=1), a_step(1, 2.0), a_step(2, 3.0, attempt=1)]
    assert a_run(steps, result={"steps": 4}).lost_steps() == [2, 3]
    assert a_run(steps[:2], result={"steps": 2}).lost_steps() == []


def test_the_gap_runs_to_the_next_committed_step() -> None:
    events = [{"kind": "fault", "time_s": 2.5}, {"kind": "worker_lost", "time_s": 2.6}]
    run = a_run([a_step(0, 1.0), a_step(1, 2.0), a_step(2, 4.0)], events)
    assert recovery.gaps(run) == [1.5]


def test_slow_segments_are_valid_faults(tmp_path: Path) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text(yaml.safe_dump([recovery.slow("one", 0.1), recovery.slow("random", 0.1)]))
    one, any_worker = load_faults(path, num_steps=1)
    assert (one.target, one.sleep_s, one.probability) == (1, 0.1, 1.0)
    assert (any_worker.target, any_worker.probability) == ("any", ddp.RANDOM_SHARE)


# --- step ------------------------------------------------------------------------------------


def test_wake_up_runs_from_the_last_result_to_the_first_and_last_worker() -> None:
    before = {"work": [[0, 0, 0.0, 1.0, "granted"], [1, 1, 0.0, 1.1, "granted"]]}
    before["work"].append([0, 1, 0.0, 1.4, "refused"])
    after = {"work": [[0, 0, 1.5, 1.6, "granted"], [1, 1, 1.7, 1.8, "granted"]], "update_s": 0.1}
    first, last = step.wake_up([before, after])
    assert (first.value, last.value) == (pytest.approx(300.0), pytest.approx(500.0))


def test_losses_are_compared_step_by_step() -> None:
    end, worst = step.loss_figures([2.0, 1.02, 1.0], [2.0, 1.0, 1.0])
    assert (end.value, end.ok) == (0.0, True)
    assert (worst.value, worst.ok) == (pytest.approx(0.02), False)


# --- peer ------------------------------------------------------------------------------------


def test_one_rank_sleeps_in_every_step_and_a_random_one_in_a_fifth() -> None:
    assert [ddp.sleeps("one", rank, 4, 7) for rank in range(4)] == [False, True, False, False]
    assert not any(ddp.sleeps("calm", rank, 4, 7) for rank in range(4))
    asleep = [[ddp.sleeps("random", rank, 4, at) for rank in range(4)] for at in range(1000)]
    assert all(sum(ranks) <= 1 for ranks in asleep)
    assert 150 < sum(map(sum, asleep)) < 250
    assert all(sum(column) > 20 for column in zip(*asleep, strict=True))


def test_the_peer_reads_its_pattern() -> None:
    assert ddp.parse(["--pattern", "calm,one"]).pattern == ("calm", "one")
    with pytest.raises(SystemExit):
        ddp.parse(["--pattern", "one,calm"])
    with pytest.raises(SystemExit):
        ddp.parse(["--pattern", "calm,other"])


# --- processes -------------------------------------------------------------------------------


def test_smaps_are_added_up_by_file() -> None:
    head = "7f00-7f10 rw-s 00000000 00:1a 77 "
    text = (
        f"{head}                 /dev/shm/elastic/j.r.local/slot-0\nSize: 64 kB\nPss:  12 kB\n"
        f"{head}                 /dev/shm/elastic/j.r.local/slot-0\nPss:   4 kB\n"
        "7f20-7f30 r--p 00000000 00:1a 77     /usr/lib/libc.so\nPss: 99 kB\n"
        "7f40-7f50 rw-p 00000000 00:00 0\nPss: 99 kB\n"
    )
    assert processes.parse_smaps(text, "/dev/shm/elastic/j.r.local/") == {"slot-0": 16 * 1024}


def test_memory_and_time_of_this_process_are_read() -> None:
    import os

    own = processes.memory([os.getpid()])
    assert own.total >= own.anonymous > 2**20
    assert processes.memory([2**22 + 1]).total == 0
    assert processes.cpu_s(os.getpid()) > 0


# --- checkpoint ------------------------------------------------------------------------------


def test_a_checkpoint_counts_from_its_last_step_to_the_disk() -> None:
    metrics = [{"step": step, "time_s": 100.0 + step} for step in range(12)]
    events = [
        {"kind": "checkpoint_written", "time_s": 110.5, "reason": "step 10: /c/step-00000010"},
        {"kind": "checkpoint_failed", "time_s": 111.0, "reason": "step 11: full"},
        {"kind": "checkpoint_written", "time_s": 119.0, "reason": "the last one, step 12: /c"},
    ]
    run = Run(make_job("x", "steps=12"), Path("x"), metrics, events, {}, 0.0)
    assert checkpoint.written_s(run) == [1.5]


def test_what_checkpoints_cost_is_a_ratio_of_means() -> None:
    first, *_ = checkpoint.figures("10m", [1.0] * 9 + [2.0], [1.0] * 10, [0.5])
    assert first.value == pytest.approx(1.1)
    assert first.ok is False
    assert len(checkpoint.figures("10m", [1.0], [1.0], [])) == 4


# --- data ------------------------------------------------------------------------------------


def test_what_a_worker_waited_counts_for_the_step_in_which_it_did() -> None:
    metrics = [{"time_s": 10.0, "step_s": 2.0}, {"time_s": 14.0, "step_s": 4.0}]
    waits = [(7.9, 9.0), (8.5, 0.1), (10.0, 0.3), (10.1, 0.2), (14.5, 9.0)]
    assert data.shares_percent(metrics, waits) == pytest.approx([20.0, 5.0])


def test_a_process_counts_that_fetched_in_most_steps() -> None:
    metrics = [{"time_s": 10.0 + step, "step_s": 1.0} for step in range(4)]
    assert data.computes(metrics, [(9.5, 0.1), (11.5, 0.1), (12.5, 0.1)])
    assert not data.computes(metrics, [(9.5, 0.1), (9.6, 0.1), (12.5, 0.1)])
    assert not data.computes(metrics, [(8.5, 0.1), (9.5, 0.1), (14.5, 0.1)])


def test_waits_are_read_by_process(tmp_path: Path) -> None:
    timed = data.Timed(ArrayRows(x=torch.arange(4)), tmp_path)
    assert timed.fetch(np.array([2]))["x"].tolist() == [2]
    timed.fetch(np.array([1]))
    ((first, second),) = data.read_waits(tmp_path)
    assert first[0] <= second[0]
    assert 0 < first[1] < 10
    assert not hasattr(timed, "prefetch")
    assert hasattr(data.TimedAhead(ArrayRows(x=torch.arange(4)), tmp_path), "prefetch")


# --- startup ---------------------------------------------------------------------------------


def test_the_phases_of_a_start_are_its_whole_and_none_is_negative() -> None:
    marks_s = {"ray": 2.0, "job": 4.0, "coordinator": 4.5, "aggregator": 7.0, "spec": 7.5}
    marks_s |= {"socket": 7.6, "worker": 7.1, "maxima": 8.5, "commit": 9.0}
    one = startup.Start(marks_s, all_joined_s=12.0, cpu_s={})
    phases_s = one.phases_s()
    assert list(phases_s) == list(startup.PHASES)
    assert sum(phases_s.values()) == pytest.approx(9.0)
    assert phases_s["worker"] == 0.0, "it was ready before the aggregator was"
    assert phases_s["maxima"] == pytest.approx(0.9)
    del marks_s["ray"]  # as on a cluster that runs already
    assert startup.Start(marks_s, 12.0, {}).phases_s()["job"] == 4.0


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ray::Host.join", "Host"),
        ("ray::IDLE", "IDLE"),
        (f"{sys.executable} -c from elastic.cli import main; main() train", "elastic train"),
        ("/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp", "gcs_server"),
        ("sleep 5", "other"),
    ],
)
def test_processes_are_known_by_their_command(command: str, kind: str) -> None:
    assert startup._kind(command) == kind


def test_descendants_and_their_birth() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in processes.below(os.getpid())
        assert abs(processes.start_s(child.pid) - time.time()) < 5
    finally:
        child.communicate(b"\n")
    assert child.pid not in processes.below(os.getpid())


# --- cluster ---------------------------------------------------------------------------------


def test_an_exchange_takes_as_long_as_its_slowest_node() -> None:
    bound_bytes = 40_000_000  # 2(N-1)/N of 40 MB at two nodes
    seen = [
        cluster.Seen([1.0, 4.0], [2.0, 4.0], [bound_bytes, bound_bytes + 4000]),
        cluster.Seen([2.0, 3.0], [3.0, 6.0], [bound_bytes, bound_bytes]),
    ]
    against, ours, theirs, sent = cluster.figures(seen)
    assert (ours.median, theirs.median) == (3.0, 4.5)
    assert against.value == pytest.approx(3.0 / 4.5)
    assert against.ok
    assert sent.value == pytest.approx(1.0001)
    assert sent.ok


def a_host_run(steps_s: list[float], *, at_s: list[float], **more: Any) -> hosts.HostRun:
    """Step after step, from the unix time 0 on."""
    times_s = np.cumsum(steps_s)
    rows: list[dict[str, Any]] = [
        {"step": step, "step_s": one, "time_s": float(time_s), "work": []}
        for step, (one, time_s) in enumerate(zip(steps_s, times_s, strict=True))
    ]
    result = {"steps": len(rows), "outcome": "finished", "params_sha256": "p"}
    return hosts.HostRun(rows, [], {**result, "samples_sha256": "s", **more}, 0, at_s)


def test_a_join_is_as_bad_as_its_longest_step() -> None:
    run = a_host_run([1.0] * 10 + [9.0] + [1.0, 1.4, 1.2] + [5.0], at_s=[])
    assert changes.longest_over_median(run, 10.0, 19.5, 23.0) == pytest.approx(1.4)


def test_copies_that_were_sent_are_counted_by_change() -> None:
    run = a_host_run([1.0] * 3, at_s=[])
    assert changes.copies_moved(run) == []
    reason = "90 copies of chunks' state were sent in 9 steps"
    run.events.append({"kind": "state_moved", "reason": reason})
    assert changes.copies_moved(run) == [90.0]


def test_the_first_contribution_of_each_worker() -> None:
    rows = [
        {"work": [[0, 1, 5.0, 6.0, "granted"], [1, 2, 4.0, 6.0, "late"]]},
        {"work": [[1, 0, 7.0, 8.0, "granted"], [0, 1, 6.5, 8.0, "granted"]]},
    ]
    assert hosts.contributions(rows) == {0: 5.0, 1: 7.0}


def test_schedules_of_hosts_are_those_of_their_seeds_and_know_every_kind() -> None:
    all_of_them = [chaos_of_hosts.schedule(seed) for seed in range(200)]
    assert all_of_them == [chaos_of_hosts.schedule(seed) for seed in range(200)]
    assert {what.do for one in all_of_them for what in one} == set(chaos_of_hosts.KINDS)
    for one in all_of_them:
        assert 1 <= len(one) <= chaos_of_hosts.MAX_HAPPENINGS
        assert [what.after for what in one] == sorted({what.after for what in one})
        for what in one:
            assert (what.host == hosts.HEAD) == (what.do in chaos_of_hosts.AT_HEAD)
            assert (what.for_s is None) == (what.do in chaos_of_hosts.ENDS_A_PROCESS)


@pytest.mark.parametrize("other", [{"params_sha256": "q"}, {"steps": 4}, {"outcome": "failed"}])
def test_a_run_of_hosts_differs_in_bits_or_in_how_it_ended(other: dict[str, Any]) -> None:
    calm = chaos_of_hosts.bits(a_host_run([1.0] * 3, at_s=[]))
    assert chaos_of_hosts.bits(a_host_run([2.0] * 3, at_s=[1.0])) == calm
    assert chaos_of_hosts.bits(a_host_run([1.0] * 3, at_s=[], **other)) != calm


def test_the_gcs_lasts_only_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_gcs_storage"
    monkeypatch.delenv(name, raising=False)
    with chaos_of_hosts.lasting_gcs():
        assert os.environ[name] == "rocksdb"
    assert name not in os.environ


# --- stragglers ----------------------------------------------------------------------------------


def test_the_regimes_span_what_auto_must_master() -> None:
    fixed, rates, bursts, _, outliers = zip(*stragglers.REGIMES, strict=True)
    assert len(set(stragglers.REGIMES)) == 20
    assert (min(fixed), max(fixed)) == (0.05, 0.99)
    assert (min(rates), max(rates)) == (0.0, 0.2)
    assert (min(bursts), max(bursts)) == (1.0, 10.0)
    assert max(outliers) > 0


# --- real workers beside the simulator


@pytest.mark.parametrize("policy", straggler_runs.POLICIES)
def test_the_jobs_of_straggler_runs_ask_for_their_policy(policy: str) -> None:
    job = straggler_runs.make_job(policy, 5)
    assert job.stragglers.kind == policy.partition("/")[0]
    if policy != "auto":
        wanted = straggler_runs.fixed(policy)
        if isinstance(wanted, SrSgc | MSgc):
            assert (wanted, job.num_models) == (job.stragglers.scheme, 2)
            return
        if isinstance(wanted, Coded):
            assert (wanted.kind, wanted.stragglers) == (job.stragglers.kind, 1)
            return
        assert (wanted.copies - 1, wanted.helps) == (job.stragglers.stragglers, policy != "uncoded")


def test_what_is_simulated_of_straggler_runs_waits_for_the_slowest_only_if_nobody_helps() -> None:
    delays_RN = np.full((3, 8), 0.1)
    delays_RN[:, 2] = 0.9
    waited_s = straggler_runs.simulated_s(Shares(helps=False), delays_RN, [0, 4], 0.01)
    helped_s = straggler_runs.simulated_s(Shares(copies=2), delays_RN, [0, 4], 0.01)
    assert waited_s == pytest.approx(0.9 + 2 * 0.01)
    assert helped_s < 0.2
    coded_s = straggler_runs.simulated_s(Coded(stragglers=1), delays_RN, [0, 4], 0.01)
    assert coded_s == pytest.approx(0.1 + 4 * 0.01), "twice the load, and nobody waits for one"
