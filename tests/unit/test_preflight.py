"""Who is fit to compute: by what is measured, among whom, and who is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from actors.preflight import PATIENCE_S, Preflight
from elastic.core.probe import BUDGET_S, LEAST, measure
from elastic.core.protocol.messages import Membership, Report
from policies.preflight import Fitness, Probe

FAST = Probe(0.01, 0.02)


def fleet(**others: Probe) -> dict[int, Probe]:
    """Four that are alike, but for those named `w2` and so on."""
    return dict.fromkeys(range(4), FAST) | {int(name[1:]): one for name, one in others.items()}


@pytest.mark.parametrize(
    ("probes", "unfit"),
    [
        pytest.param({}, {}, id="nobody"),
        pytest.param({0: FAST}, {}, id="one alone is the median"),
        pytest.param(fleet(), {}, id="all alike"),
        pytest.param(fleet(w2=Probe(0.02, 0.04)), {}, id="at the limit"),
        pytest.param(fleet(w2=Probe(0.021, 0.02)), {2: "multiplies matrices in 21.00 ms, 2.1 times"
                     " the fleet's median (workers.preflight 2)"}, id="multiplies slowly"),
        pytest.param(fleet(w1=Probe(0.01, 0.06)), {1: "copies memory in 60.00 ms, 3.0 times"
                     " the fleet's median (workers.preflight 2)"}, id="copies slowly"),
        pytest.param(fleet(w3=Probe(0.01, 0.02, is_right=False)),
                     {3: "a product of matrices comes out wrong"}, id="errs"),
        pytest.param({0: FAST, 1: Probe(0.5, 0.02)}, {1: "multiplies matrices in 500.00 ms, 50.0"
                     " times the fleet's median (workers.preflight 2)"}, id="the slower of two"),
    ],
)  # fmt: skip
def test_unfit_is_who_takes_far_longer_than_the_median(
    probes: Mapping[int, Probe], unfit: Mapping[int, str]
) -> None:
    assert Fitness().decide(probes) == unfit


def test_where_all_are_slow_nobody_is_unfit() -> None:
    slow = Probe(5.0, 5.0)
    assert Fitness().decide(dict.fromkeys(range(4), slow)) == {}


class Ticks:
    """A clock of which each look takes so long."""

    def __init__(self, tick_s: float) -> None:
        self._tick_s, self.now_s = tick_s, 0.0

    def __call__(self) -> float:
        self.now_s += self._tick_s
        return self.now_s


def test_a_probe_measures_and_takes_no_longer_than_it_may() -> None:
    found = measure(torch.device("cpu"))
    assert found.is_right
    assert found.multiply_s > 0
    assert found.copy_s > 0
    assert measure(torch.device("cpu"), Ticks(1.0)) == Probe(1.0, 1.0)
    ticks = Ticks(BUDGET_S / 10)
    measure(torch.device("cpu"), ticks)
    assert ticks.now_s < 3 * BUDGET_S
    assert LEAST >= 3


def test_a_probe_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    measure(torch.device("cpu"), Ticks(1.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no card")
def test_a_probe_leaves_no_memory_taken_on_a_card() -> None:
    card = torch.device("cuda")
    measure(card, Ticks(1.0))  # libraries take some for good
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    measure(card, Ticks(1.0))
    assert torch.cuda.memory_reserved() == before


def again(probes: Mapping[int, Probe]) -> dict[int, Probe]:
    """As workers answer that are probed once more."""
    return {worker: replace(probe) for worker, probe in probes.items()}


class Turns:
    """The pre-flight of a job for three workers, of which the test says who is where."""

    def __init__(self, limit: float | None = 2.0) -> None:
        self.told: list[tuple[int, str]] = []
        self.again: list[int] = []
        """Who is to be probed once more."""
        self._preflight = Preflight(
            limit, lambda worker, why: self.told.append((worker, why)), self.again.append
        )
        self.members: tuple[int, ...] = ()
        self.membership = Membership()

    def connected(
        self,
        connected: tuple[int, ...],
        probes: Mapping[int, Probe],
        *,
        living: set[int] | None = None,
        now_s: float = 0.0,
    ) -> tuple[int, ...]:
        report = self._preflight.judge(
            Report(3, self.membership, connected),
            probes,
            living or {0, 1, 2},
            members=self.members,
            target=3,
            now_s=now_s,
        )
        assert report is not None
        return report.connected

    @property
    def unfit(self) -> frozenset[int]:
        return self._preflight.unfit


def test_the_job_begins_once_all_are_probed() -> None:
    turns = Turns()
    assert turns.connected((0,), {0: FAST}) == ()
    assert turns.connected((0, 1), {0: FAST, 1: FAST}) == ()
    slow = {0: FAST, 1: FAST, 2: replace(FAST, copy_s=1.0)}
    assert turns.connected((0, 1, 2), slow) == (), "it is probed once more"
    assert turns.again == [2]
    slow = again(slow)
    assert turns.connected((0, 1, 2), slow) == (0, 1, 2)
    assert turns.unfit == {2}
    assert turns.connected((0, 1, 2), slow) == (0, 1, 2)
    assert turns.again == [2], "and no more"
    assert [worker for worker, _ in turns.told] == [2], "named once"


def test_nobody_waits_for_one_that_does_not_come() -> None:
    turns = Turns()
    assert turns.connected((0,), {0: FAST}, living={0}) == (0,), "no others live"
    assert turns.connected((0, 1), {0: FAST, 1: FAST}, now_s=1.0) == ()
    late_s = 1.0 + PATIENCE_S
    assert turns.connected((0, 1), {0: FAST, 1: FAST}, now_s=late_s) == (0, 1)


def test_a_joiner_is_compared_with_those_who_compute() -> None:
    turns = Turns()
    turns.members = (0, 1)
    known = {0: FAST, 1: FAST}
    assert turns.connected((0, 1, 2), known) == (0, 1), "its probe is on its way"
    assert turns.connected((0, 1, 2), {**known, 2: FAST}) == (0, 1, 2)
    assert turns.unfit == frozenset()


def test_after_a_restart_nobody_is_its_own_median() -> None:
    """The probes of all come anew, in any order."""
    slow = replace(FAST, copy_s=1.0)
    for is_told in (True, False):
        turns = Turns()
        if is_told:
            turns.members = (0, 1)
        else:  # the protocol takes up what the report says later in that turn
            turns.membership = Membership(members=(0, 1))
        assert turns.connected((0, 1, 2), {2: slow}) == (0, 1)
        assert turns.connected((0, 1, 2), {0: FAST, 2: slow}) == (0, 1)
        known = {0: FAST, 1: FAST, 2: slow}
        assert turns.connected((0, 1, 2), known) == (0, 1)
        assert turns.connected((0, 1, 2), again(known)) == (0, 1, 2)
        assert turns.unfit == {2}
    turns = Turns()
    turns.members = (0, 1)
    assert turns.connected((0, 1, 2), {2: slow}) == (0, 1)
    late_s = PATIENCE_S
    assert turns.connected((0, 1, 2), {2: slow}, now_s=late_s) == (0, 1, 2), "they do not come"


def test_it_is_told_whether_who_is_unfit_is_left_out() -> None:
    slow = {0: FAST, 1: FAST, 2: replace(FAST, copy_s=1.0)}
    for members, what in [((0, 1), "left out"), ((0, 1, 2), "computes, since there are too few")]:
        turns = Turns()
        turns.connected((0, 1, 2), slow)
        slow = again(slow)
        turns.connected((0, 1, 2), slow)
        assert turns.told == []
        turns.members = members
        for _ in range(3):
            turns.connected((0, 1, 2), slow)
        ((worker, why),) = turns.told
        assert (worker, why.partition(":")[0]) == (2, what)


def test_who_was_slow_since_others_loaded_is_probed_again_and_takes_part() -> None:
    turns = Turns()
    slow = Probe(0.05, 0.02)
    assert turns.connected((0, 1, 2), {0: FAST, 1: FAST, 2: slow}) == ()
    better = slow.best(Probe(0.011, 0.03))
    assert better == Probe(0.011, 0.02)
    assert turns.connected((0, 1, 2), {0: FAST, 1: FAST, 2: better}) == (0, 1, 2)
    assert (turns.unfit, turns.told) == (frozenset(), [])
    assert not better.best(Probe(0.011, 0.02, is_right=False)).is_right


def test_whose_second_probe_does_not_come_is_judged_by_the_first() -> None:
    turns = Turns()
    slow = {0: FAST, 1: FAST, 2: replace(FAST, copy_s=1.0)}
    assert turns.connected((0, 1, 2), slow) == ()
    for _ in range(2):
        assert turns.connected((0, 1, 2), slow, now_s=PATIENCE_S) == (0, 1, 2)
    assert (turns.unfit, [worker for worker, _ in turns.told]) == ({2}, [2])


def test_a_member_is_not_told_of_where_others_that_come_are_faster() -> None:
    turns = Turns()
    turns.members = (0, 1)
    known = dict.fromkeys((0, 1), replace(FAST, copy_s=1.0)) | {2: FAST, 3: FAST}
    for _ in range(3):
        turns.connected((0, 1, 2, 3), known, living={0, 1, 2, 3})
    turns.members, turns.membership = (0,), Membership(members=(0,), leaving=(1,))
    for _ in range(3):
        turns.connected((0, 1, 2, 3), known, living={0, 1, 2, 3})
    assert (turns.unfit, turns.told) == ({0, 1}, [])


def test_of_the_dead_nothing_counts() -> None:
    turns = Turns()
    turns.members = (0,)
    probes = {0: replace(FAST, copy_s=1.0), 1: FAST, 2: FAST}
    turns.connected((0,), probes, living={0})
    assert turns.unfit == frozenset()


def test_without_the_setting_nobody_is_waited_for() -> None:
    turns = Turns(None)
    assert turns.connected((0,), {}) == (0,)
    assert turns.unfit == frozenset()
