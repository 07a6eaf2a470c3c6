"""How far a worker is, in a word that others read."""

from __future__ import annotations

import pytest

from elastic.core.meter import Meter
from elastic.core.protocol.advance import num_done, share_done

PLACES_S = (1.0, 2.0, 5.0)


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def compute(one: Meter, clock: Clock, places_s: tuple[float, ...] = PLACES_S) -> list[float]:
    """A micro-batch; how much of it was done at each place."""
    seen = []
    with one.micro_batch("train"):
        for place_s in places_s:
            clock.now_s += place_s
            one.move()
            seen.append(share_done(one.word[0]))
    return seen


def test_a_place_counts_as_much_as_it_took_before(clock: Clock) -> None:
    one = Meter(clock)
    assert compute(one, clock) == pytest.approx([0, 0, 0], abs=1e-6)  # nothing is known yet
    assert compute(one, clock) == pytest.approx([1 / 8, 3 / 8, 1])
    assert num_done(one.word[0]) == 2


def test_what_disturbed_one_micro_batch_says_nothing_of_the_next(clock: Clock) -> None:
    one = Meter(clock)
    compute(one, clock)
    compute(one, clock, (1.0, 90.0, 5.0))
    assert compute(one, clock) == pytest.approx([1 / 8, 3 / 8, 1])
    compute(one, clock, (0.5, 0.5, 1.0))
    assert compute(one, clock) == pytest.approx([1 / 4, 1 / 2, 1])


def test_the_word_grows_at_every_place_though_nothing_takes_time(clock: Clock) -> None:
    one = Meter(clock)
    for _ in range(2):
        before = one.word[0]
        with one.micro_batch("train"):
            for _ in range(3):
                one.move()
                assert one.word[0] > before
                before = one.word[0]
    assert num_done(one.word[0]) == 2


def test_more_places_than_before_end_no_micro_batch(clock: Clock) -> None:
    one = Meter(clock)
    compute(one, clock)
    assert compute(one, clock, (*PLACES_S, 1.0, 1.0)) == pytest.approx([1 / 8, 3 / 8, 1, 1, 1])
    assert compute(one, clock, (*PLACES_S, 1.0, 1.0))[-1] == pytest.approx(1)
    assert num_done(one.word[0]) == 3


def test_one_that_is_given_up_is_over_and_taught_nothing(clock: Clock) -> None:
    def give_up() -> None:
        with one.micro_batch("train"):
            one.move()
            raise KeyError

    one = Meter(clock)
    compute(one, clock)
    with pytest.raises(KeyError):
        give_up()
    assert num_done(one.word[0]) == 2
    assert compute(one, clock) == pytest.approx([1 / 8, 3 / 8, 1])


def test_kinds_have_places_of_their_own(clock: Clock) -> None:
    one = Meter(clock)
    compute(one, clock)
    with one.micro_batch("evaluate"):
        clock.now_s += 1.0
        one.move()
    assert compute(one, clock) == pytest.approx([1 / 8, 3 / 8, 1])


def test_words_of_several_models_may_be_added(clock: Clock) -> None:
    first, second = Meter(clock), Meter(clock)
    compute(first, clock)
    compute(second, clock)
    with second.micro_batch("train"):
        clock.now_s += 1.0
        second.move()
        assert share_done(first.word[0] + second.word[0]) == pytest.approx(1 / 8)
