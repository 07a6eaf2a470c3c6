"""What the comparison with the peers makes of what it has seen."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import measures, records, report, scenarios, sizes
from benchmarks.peers.__main__ import parse
from benchmarks.peers.driver import Run, Seen, read_run
from benchmarks.peers.faults import Injection, Kill, Slow
from benchmarks.peers.records import Step, Tail
from benchmarks.peers.settings import Settings, read_settings
from benchmarks.peers.systems import SYSTEMS
from tests.documents import ROOT, blocks

BATCH = 4


def step(number: int, time_s: float, samples: int = BATCH, loss: float = 1.0) -> Step:
    held = tuple(range(number * BATCH, number * BATCH + samples))
    return Step(step=number, time_s=time_s, loss=loss, samples=held, num_workers=samples)


def line(worker: int, number: int, time_s: float, incarnation: str = "a") -> dict[str, Any]:
    samples = [number * 2 + worker]
    return {"kind": "step", "worker": worker, "step": number, "time_s": time_s} | {
        "incarnation": incarnation,
        "loss": float(worker),
        "samples": samples,
    }


def run(steps: list[Step], *, survived: bool = True, system: str = "x") -> Run:
    """Calm until 10 s, then a fault; seen until 30 s."""
    calm = Seen(name="calm", begun_s=0.0, ended_s=10.0, launch=0, survived=True)
    kill = Seen(name="kill", begun_s=10.0, ended_s=30.0, launch=0, survived=survived)
    made = Run(system=system, scenario="faults", repeat=0, config={"batch": BATCH})
    made.phases, made.launches = [calm, kill], [steps]
    return made


CALM = [step(number, number + 1.0) for number in range(10)]


def test_lines_of_workers_become_one_step_at_the_time_of_the_first() -> None:
    (one,) = records.merge([line(1, 0, 5.5), line(0, 0, 5.0)])
    assert one == Step(step=0, time_s=5.0, loss=0.5, samples=(0, 1), num_workers=2)


def test_a_step_of_another_incarnation_is_another_one() -> None:
    merged = records.merge([line(0, 3, 1.0), line(0, 3, 9.0, "b")])
    assert [(one.step, one.time_s) for one in merged] == [(3, 1.0), (3, 9.0)]


def test_our_steps_hold_the_samples_of_what_was_granted() -> None:
    work = [[0, 0, 1.0, 2.0, "granted"], [1, 1, 1.0, 2.0, "granted"], [2, 1, 1.0, 2.0, "late"]]
    metrics = {"step": 7, "time_s": 3.0, "loss": 2.0, "num_workers": 3, "work": work, "samples": 2}
    (one,) = records.of_ours([metrics], lambda number, part: [number * 10 + part])
    assert one.samples == (70, 71)
    more = {**metrics, "samples": 3}  # one had been granted by an aggregator that died
    (one,) = records.of_ours([more], lambda number, part: [number * 10 + part])
    assert one.samples == (70, 71, 72)


def test_a_file_that_grows_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    tail = Tail(file)
    assert tail.lines() == []
    file.write_text('{"a": 1}\n{"a"')
    assert tail.lines() == [{"a": 1}]
    with file.open("a") as more:
        more.write(": 2}\n")
    assert tail.lines() == [{"a": 1}, {"a": 2}]


def test_the_gap_is_beyond_a_calm_step() -> None:
    after = [step(10 + number, 15.0 + number) for number in range(15)]
    found = measures.cost(run([*CALM, *after]), run([]).phases[1])
    assert found.calm_s == 1.0
    assert (found.next_s, found.gap_s, found.longest_s) == (5.0, 4.0, 4.0)
    assert (found.redone, found.samples_lost, found.full) == (0, 0, 1.0)
    assert found.goodput == pytest.approx(15 * BATCH / 20)


def test_who_stands_still_at_the_end_has_no_gap() -> None:
    found = measures.cost(run([*CALM, step(10, 11.0)]), run([]).phases[1])
    assert (found.ran, found.gap_s, found.goodput) == (False, None, BATCH / 20)


def test_a_late_gap_is_not_that_of_the_fault() -> None:
    after = [step(10 + number, 11.0 + number) for number in range(8)]
    found = measures.cost(run([*CALM, *after, step(18, 24.0), step(19, 30.0)]), run([]).phases[1])
    assert (found.gap_s, found.longest_s) == (0.0, 5.0)


def test_steps_that_are_done_again_count_once() -> None:
    after = [step(number, 12.0 + number - 6) for number in range(6, 22)]
    found = measures.cost(run([*CALM, *after]), run([]).phases[1])
    assert (found.redone, found.samples_repeated) == (4, 4 * BATCH)
    assert found.goodput == pytest.approx(12 * BATCH / 20)
    assert found.step_s == pytest.approx(1.0)


def test_a_smaller_batch_shows() -> None:
    after = [step(10, 11.0, samples=3), step(11, 12.0)]
    found = measures.cost(run([*CALM, *after]), run([]).phases[1])
    assert (found.samples_lost, found.full) == (1, 0.5)
    found = measures.cost(run([*CALM, *after, step(12, 28.0)]), run([]).phases[1])
    assert found.goodput == pytest.approx((3 + BATCH + BATCH) / 20)
    assert found.goodput_whole == pytest.approx(2 * BATCH / 20)


def test_who_ended_has_no_gap() -> None:
    found = measures.cost(run(CALM, survived=False), run([], survived=False).phases[1])
    assert (found.ran, found.gap_s, found.next_s, found.goodput) == (False, None, None, None)


def test_a_run_without_calm_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no calm steps"):
        measures.calm_step_s(run([step(0, 11.0)]))


def test_the_deviation_is_that_of_the_step_that_counts() -> None:
    reference = [step(number, number, loss=2.0) for number in range(4)]
    again = [step(2, 9.0, loss=2.5), step(2, 11.0, loss=2.1)]
    assert measures.deviation(again, reference) == pytest.approx(0.05)
    assert measures.deviation(reference, reference) == 0
    assert measures.deviation([step(9, 1.0)], reference) is None
    assert measures.same_samples(again, reference)
    assert not measures.same_samples([step(2, 1.0, samples=3)], reference)


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    made = run(CALM)
    made.write(tmp_path / "one.json")
    assert read_run(tmp_path / "one.json") == made


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = Settings(
        system="x", size="small", batch=8, num_workers=4, folder=str(tmp_path), variables={"A": "b"}
    )
    assert read_settings(settings.write()) == settings
    assert json.loads(settings.file.read_text())["batch"] == 8


@pytest.mark.parametrize("size", ["small", "10m", "100m"])
def test_every_scenario_begins_calm(size: str) -> None:
    for scenario in scenarios.make(size, num_workers=4, cores=2).values():
        assert scenario.phases[0].name == measures.CALM
        assert scenario.phases[0].fault is None


@pytest.mark.parametrize(("cores", "share"), [(2, 0.25), (4, 0.5), (16, 0.5)])
def test_half_as_fast_is_half_of_the_share_of_the_cores(cores: int, share: float) -> None:
    phases = scenarios.make("10m", num_workers=4, cores=cores)["steady"].phases
    assert [one.fault for one in phases if one.name == "slow"] == [Slow(worker=1, share=share)]


def test_a_slow_worker_is_frozen_and_thawed_in_turn_and_runs_in_the_end() -> None:
    with subprocess.Popen(["sleep", "60"]) as worker:
        stat = Path(f"/proc/{worker.pid}/stat")
        slow = Injection(Slow(worker=1, share=0.25), lambda: {1: worker.pid})
        seen, deadline_s = "", time.monotonic() + 30
        while not re.search("TS+T", seen) and time.monotonic() < deadline_s:
            seen += "T" if stat.read_text().split()[2] == "T" else "S"
        slow.finish()
        last = stat.read_text().split()[2]
        worker.kill()
    assert re.search("TS+T", seen)
    assert last != "T"


def test_a_victim_that_is_not_there_is_told() -> None:
    with pytest.raises(KeyError):
        Kill(workers=(1,))(lambda: {0: 1}, threading.Event())


def steady(system: str, step_s: float) -> Run:
    """Ten calm seconds."""
    calm = Seen(name="calm", begun_s=0.0, ended_s=10.0, launch=0, survived=True)
    made = Run(system=system, scenario="steady", repeat=0, config={"batch": BATCH})
    made.phases, made.launches = [calm], [[step(one, one * step_s) for one in range(1, 20)]]
    return made


def test_a_peer_that_is_better_is_bold() -> None:
    table = report.render(report.Runs([steady("ddp", 0.5), steady("ours", 1.0)]))
    assert "| step time, no fault (s) | **0.5** | 1 |" in table
    assert "| … / DDP's (x) | **1** | 2 |" in table
    table = report.render(report.Runs([steady("ddp", 1.0), steady("ours", 0.5)]))
    assert "**" not in table


def test_who_ended_says_so_and_wins_nothing() -> None:
    ended = report.cells({"ddp": "ended 1 of 1", "ours": [1.0, 3.0]}, "low")
    assert ended == ["ended 1 of 1", "2 (1 to 3)"]
    assert report.cells({"ray": [90.0], "ours": [80.0]}, "high") == ["**90**", "80"]


def test_the_fault_of_a_run_fills_its_lines() -> None:
    after = [step(number, 14.0 + number - 6) for number in range(6, 22)]
    fine, ended = run([*CALM, *after], system="ray"), run(CALM, survived=False, system="ray")
    table = report.render(report.Runs([fine]))
    assert "| SIGKILL to 1 of 4: gap beyond the median step (s) | 3 |" in table
    assert "| … steps redone | 4 |" in table
    table = report.render(report.Runs([fine, ended]))
    assert "| SIGKILL to 1 of 4: gap beyond the median step (s) | ended 1 of 2, else 3 |" in table


def shown() -> list[str]:
    """How the document tells to run it."""
    lines = "".join(blocks(ROOT / "docs" / "peers.md", "sh")).splitlines()
    return [re.split(" +#", line)[0] for line in lines if line.startswith("benchmarks/peers/run")]


@pytest.mark.parametrize("command", shown())
def test_what_the_document_tells_to_type_is_taken(command: str) -> None:
    options = parse(shlex.split(command)[1:])
    assert set(options.scenarios) <= set(scenarios.make(options.size, num_workers=4, cores=2))


def test_the_document_describes_every_system_and_scenario() -> None:
    text = (ROOT / "docs" / "peers.md").read_text()
    assert [name for name in SYSTEMS if f"| {report.TITLES[name]} |" not in text] == []
    known = scenarios.make("small", num_workers=4, cores=2)
    assert [name for name in known if f"| {name} |" not in text] == []


def a_size(system: str, size: str, num: int, step_s: float, repeat: int = 0) -> Run:
    made = steady(system, step_s)
    made.repeat, made.config = repeat, {"batch": BATCH, "size": size, "workers": num}
    made.memory, made.start_s = {"total": num * 2**20}, [9.0]
    return made


def test_sizes_have_a_line_each_in_order_and_a_picture(tmp_path: Path) -> None:
    runs = [
        *(a_size("ddp", "10m", 4, 2.0, repeat) for repeat in range(2)),
        a_size("ours", "10m", 4, 3.0),
        a_size("ddp", "small", 8, 1.0),
        a_size("ours", "small", 8, 0.5),
        a_size("ours", "small", 1, 0.5),
    ]
    grid = sizes.Grid(runs)
    assert grid.cells == [("small", 1), ("small", 8), ("10m", 4)]
    table = sizes.render(grid)
    assert "| 0.85M, 8 workers | 1 | 0.5 |" in table
    assert "| 10.8M, 4 workers | **2** | 3 |" in table
    assert "| 10.8M, 4 workers | **1** | 1.5 |" in table
    assert "| 0.85M, 1 worker | - | 0.5 |" in table
    assert "| 0.85M, 8 workers | 8 | 8 |" in table
    assert sizes.draw(grid, tmp_path / "sizes.png").stat().st_size > 10_000


def test_what_sizes_are_asked_for() -> None:
    options = sizes.parse(["--sizes", "small,100m", "--workers", "2,8", "--quick"])
    assert (options.sizes, options.workers, options.repeats) == (["small", "100m"], [2, 8], 1)
    for words in (["--sizes", "1b"], ["--systems", "horovod"], ["--workers", "3"]):
        with pytest.raises(SystemExit):
            sizes.parse(words)


def test_a_wrong_system_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--systems", "ddp,horovod"])
    assert "--systems: got ddp,horovod; allowed are ddp" in capsys.readouterr().err
