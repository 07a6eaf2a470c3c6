"""When a micro-batch will be over, by how far its worker is seen to be."""

from __future__ import annotations

import pytest

from elastic.core.protocol.advance import ROOM, WHOLE, Advance, num_done, share_done

PACE_S = 1.0


def word(number: int, share: float) -> int:
    return number * ROOM + int(share * WHOLE)


def seen(*looks: tuple[float, int, float], pace_s: float = PACE_S) -> Advance:
    """Of (when, the number of the micro-batch, how much of it is done)."""
    made = Advance()
    for now_s, number, share in looks:
        made.see(word(number, share), now_s, pace_s)
    return made


def test_a_word_says_how_much_is_done() -> None:
    assert (num_done(word(3, 0.25)), share_done(word(3, 0.25))) == (3.25, 0.25)
    assert num_done(word(3, 1.5)) == 4.0, "it takes longer than ever"
    assert num_done(0) == 0


def test_what_is_left_takes_as_long_as_what_was_seen() -> None:
    assert seen((10.0, 3, 0.25), (10.25, 3, 0.5)).end_s(9.0) == pytest.approx(10.75)


def test_a_late_begin_says_nothing_of_the_pace() -> None:
    """It waited for its input for most of a second, and computes as ever since."""
    looks = [(10 + 0.25 * one, 3, 0.0) for one in range(4)]
    advance = seen(*looks, (11.0, 3, 0.25), (11.25, 3, 0.5))
    assert advance.end_s(9.9) == pytest.approx(11.75)


def test_little_is_known_before_a_tenth_has_passed() -> None:
    assert seen((10.0, 3, 0.5)).end_s(9.0) is None
    assert seen((10.0, 3, 0.5), (10.25, 3, 0.59)).end_s(9.0) is None


def test_nobody_knows_when_a_word_moved_that_was_not_looked_at() -> None:
    assert seen((10.0, 3, 0.1), (10.9, 3, 0.4)).end_s(9.0) is None
    advance = seen((10.0, 3, 0.1), (10.9, 3, 0.4), (11.15, 3, 0.65))
    assert advance.end_s(9.0) == pytest.approx(11.5)
    slow = seen((10.0, 3, 0.1), (10.9, 3, 0.4), pace_s=3.0)
    assert slow.end_s(9.0) == pytest.approx(12.7)


def test_what_was_seen_of_another_micro_batch_says_nothing() -> None:
    advance = seen((10.0, 3, 0.25), (10.25, 3, 0.5))
    assert advance.end_s(10.25) is None, "it was leased after that"
    advance.see(word(4, 0.25), 10.5, PACE_S)
    assert advance.end_s(9.0) is None


def test_who_adds_what_it_has_computed_is_nearly_done() -> None:
    advance = seen((10.0, 3, 0.25), (10.25, 3, 0.5), (10.5, 4, 0.0))
    assert advance.end_s(9.0) == pytest.approx(10.5)
    advance.see(word(4, 0.0), 10.75, PACE_S)
    assert advance.end_s(9.0) == pytest.approx(10.5), "and is late from then on"


def test_who_stands_still_was_seen_before() -> None:
    advance = seen(*((10 + 0.25 * one, 3, min(0.5, 0.25 * one)) for one in range(8)))
    assert advance.end_s(9.0) == pytest.approx(11.0)
