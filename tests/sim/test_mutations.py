"""The simulator notices broken protocols, and only those."""

from __future__ import annotations

import pytest
from mutations import MUTATIONS, Mutation

from elastic.core.protocol import worker as wrk
from elastic.core.simulator.build import Build, RecordedWorker
from elastic.core.simulator.faults import random_schedule
from elastic.core.simulator.search import Tried, check, search, shrink


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_protocol_is_noticed(mutation: Mutation) -> None:
    for seed in range(mutation.num_seeds):
        if not check(mutation.schedule(seed), mutation.build):
            return
    pytest.fail(f"{mutation.name} is not noticed within {mutation.num_seeds} seeds")


@pytest.mark.parametrize(
    "mutation",
    [one for one in MUTATIONS if one.faults or one.is_coded],
    ids=lambda mutation: mutation.name,
)
def test_the_real_protocol_passes_where_a_broken_one_is_caught(mutation: Mutation) -> None:
    tried = Tried()
    for seed in range(15):
        assert check(mutation.schedule(seed), tried=tried), tried.failure


def test_the_first_violating_schedule_is_shrunk_and_told() -> None:
    build = next(one.build for one in MUTATIONS if one.name == "RepeatedQuestionGrantedAgain")
    tried = search(range(200), build)
    assert tried.failure is not None
    first = random_schedule(tried.failure.schedule.seed)
    assert len(tried.failure.schedule.faults) <= len(first.faults)
    assert tried.failure.schedule.num_steps <= first.num_steps
    text = str(tried.failure)
    assert f"seed {first.seed}: " in text
    assert "violated: micro-batch" in text
    assert "aggregator-0" in text
    again = Tried()
    assert not check(tried.failure.schedule, build, tried=again)
    assert again.failure == tried.failure, "a schedule says everything"


def test_what_needs_no_fault_is_shrunk_to_none() -> None:
    build = next(one.build for one in MUTATIONS if one.name == "FlipBeforeSum")
    tried = Tried()
    check(random_schedule(0), build, tried=tried)
    assert tried.failure is not None
    small = shrink(tried.failure, build).schedule
    assert (small.faults, small.num_workers, small.num_steps) == ((), 1, 1)


class Asserts(RecordedWorker):
    """A worker with a bug of another kind."""

    def handle(self, event: wrk.Event, words: wrk.Words) -> list[wrk.Action]:
        raise AssertionError(f"no {type(event).__name__}")


def test_an_assertion_of_the_protocol_that_fails_is_a_violation() -> None:
    tried = Tried()
    assert not check(random_schedule(1), Build(worker=Asserts), tried=tried)
    assert tried.failure is not None
    assert tried.failure.violation == "AssertionError: no Connected"
