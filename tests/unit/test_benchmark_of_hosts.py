"""What the benchmark of hosts makes of a run's events, where it goes on, what hosts are shown."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.host_counters import HostCounters
from benchmarks.detection_of_hosts import judge, play
from benchmarks.faults_of_hosts import COUNTERS, KINDS, Kind, Struck, lacking, links_of
from benchmarks.naming import NOTHING, Injection, Kept
from policies.verdicts import Kind as Verdict
from policies.verdicts import Link, Node
from scripts.hosts import Host

BY_NAME = {kind.name: kind for kind in KINDS}
HOSTS = {number: Host("none", number + 1) for number in range(3)}
NODE = Struck(frozenset({"node 2"}), frozenset(links_of(2, HOSTS, "out")))


def verdict(kind: str, culprit: str, time_s: float) -> dict[str, Any]:
    return {"kind": "verdict", "time_s": time_s, "verdict": {"kind": kind, "culprit": culprit}}


def judged(kind: str, *events: dict[str, Any]) -> Injection:
    """The fault begins at 20 s; steps take half a second, and a whole one from then on."""
    steps = [one / 2 for one in range(40)] + [float(one) for one in range(20, 60)]
    return judge(BY_NAME[kind], NODE, events, [one + 0.01 for one in steps], at_s=20.0)


def test_the_first_verdict_on_the_culprit_counts() -> None:
    told = judged(
        "slow sender",
        verdict("slow link", "link 2 -> 0", 19.0),
        verdict("slow link", "link 2 -> 1", 22.0),
        verdict("slow sender", "node 2", 24.0),
        verdict("slow receiver", "node 2", 25.0),
    )
    assert told == Injection("slow sender", "slow sender", 4.0, ())


def test_its_links_alone_are_not_the_culprit() -> None:
    told = judged("slow sender", verdict("slow link", "link 2 -> 1", 22.0))
    assert (told.called, told.took, told.others) == (NOTHING, None, ())


def test_who_is_blamed_besides_is_named() -> None:
    told = judged(
        "slow sender",
        verdict("slow sender", "node 2", 24.0),
        verdict("slow receiver", "node 1", 24.0),
        verdict("slow link", "link 0 -> 2", 24.5),
    )
    assert told.others == ("slow receiver: node 1", "slow link: link 0 -> 2")


def test_a_hang_is_measured_by_steps_of_before() -> None:
    told = judged("frozen host", verdict("hang outside communication", "node 2", 21.5))
    assert told.took == pytest.approx(3.0)


def test_flapping_is_counted_in_losses() -> None:
    lost = [{"kind": "worker_lost", "time_s": at_s} for at_s in (19.0, 20.0, 23.0, 26.0, 30.0)]
    told = judged("flapping", *lost, verdict("flapping", "node 2", 26.2))
    assert (told.called, told.took) == ("flapping", 3.0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_asked_is_something_that_the_detector_says(kind: Kind) -> None:
    assert kind.says in {one.value for one in Verdict}


def test_culprits_are_called_as_verdicts_call_them() -> None:
    assert links_of(2, HOSTS) == {str(Link(*ends)) for ends in ((2, 0), (2, 1), (0, 2), (1, 2))}
    assert str(Node(2)) in NODE.right


def test_what_is_known_is_not_struck_again(tmp_path: Path) -> None:
    """Nor is a job struck any more in which something failed."""
    struck: list[tuple[int, str]] = []

    class Fake:
        """A job that does not survive the first cut link."""

        def __init__(self, number: int) -> None:
            self._number = number

        def strike(self, kind: Kind, dice: random.Random) -> Injection:
            struck.append((self._number, kind.name))
            if kind.name == "cut link" and struck.count((self._number, kind.name)) == 1:
                raise RuntimeError("it is dead")
            return Injection(kind.name, kind.says, dice.random(), ())

        def end(self) -> None:
            struck.append((self._number, "end"))

    jobs = iter(range(10))

    def begin() -> Fake:
        return Fake(next(jobs))

    kept = Kept(tmp_path / "kept.jsonl", KINDS)
    play(begin, 0, kept, seed=3, only=BY_NAME)
    first = [name for number, name in struck if number == 0]
    assert first[-2:] == ["cut link", "end"]
    assert {name for _, name in struck} == {*BY_NAME, "end"}
    last = struck[-1][0]
    assert [name for number, name in struck if number == last] == ["flapping", "end"]
    assert len(struck) == len(KINDS) + len({number for number, _ in struck})
    found = {one.kind: one for _, one in kept.injections()}
    assert found.pop("cut link").called == "the job failed"
    assert all(one.called == BY_NAME[name].says for name, one in found.items())
    struck.clear()
    again = Kept(tmp_path / "kept.jsonl", KINDS)
    assert again.injections() == kept.injections()
    play(begin, 0, again, seed=3, only=BY_NAME)
    assert struck == []


@pytest.mark.parametrize("name", COUNTERS)
def test_a_host_that_is_shown_a_lack_counts_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "pressure").mkdir()
    texts = {
        "stat": "cpu  11 22 33 44 55 66 77 88 0 0\ncpu0 11 22 33 44 55 66 77 88 0 0\n",
        "pressure/memory": "some avg10=0.0 total=500000\nfull avg10=0.0 total=100\n",
        "pressure/io": "some avg10=0.0 total=500000\nfull avg10=0.0 total=100\n",
        "vmstat": "nr_free 7\noom_kill 4\noom_other 9\n",
    }
    for one, text in texts.items():
        (tmp_path / one).write_text(text)
    before = HostCounters(tmp_path, clock=lambda: 0.0).read()
    (tmp_path / name).write_text(lacking(name, texts[name], 2.5))
    after = HostCounters(tmp_path, clock=lambda: 0.0).read()
    changed = {
        one: getattr(after, one) - getattr(before, one)
        for one in after._fields
        if getattr(after, one) != getattr(before, one)
    }
    expected = {
        "stat": ("steal_s", 2.5),
        "pressure/memory": ("memory_s", 2.5),
        "pressure/io": ("disk_s", 2.5),
        "vmstat": ("kills", 1),
    }[name]
    assert changed == {expected[0]: pytest.approx(expected[1], abs=0.01)}


def test_a_slow_link_is_between_two_and_in_both_directions() -> None:
    done: list[tuple[str, int, int]] = []

    @dataclass
    class Fake:
        number: int

        def slow_to(self, other: Fake, rate: str) -> None:
            done.append(("slow", self.number, other.number))

        def fast_to(self, other: Fake) -> None:
            done.append(("fast", self.number, other.number))

    scene: Any = SimpleNamespace(dice=random.Random(5), nodes={one: Fake(one) for one in range(3)})
    with BY_NAME["slow link"].make(scene) as struck:
        ((_, one, other),) = done
        assert struck.right == {f"link {one} -> {other}", f"link {other} -> {one}"}
    assert done[1:] == [("fast", one, other)]
