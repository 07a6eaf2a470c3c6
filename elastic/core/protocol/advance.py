"""How far workers are with their micro-batches, by the progress words that they raise meanwhile.

The upper half of a word counts micro-batches that are over, done or given up; the lower half is how
much of the one at hand is done: WHOLE is all of it, and there is room for as much again, so that
the word moves even where it takes longer than ever. Never reads a clock: what was seen when is
given.
"""

from __future__ import annotations

WHOLE = 1 << 31
ROOM = 1 << 32

LEAST_SEEN = 0.1
"""Of a micro-batch, to have been seen to pass before it is known how fast it does."""
MOST_BETWEEN = 1 / 3
"""Of a micro-batch time, between two looks: else nobody knows when it moved."""


def share_done(word: int) -> float:
    """How much of the micro-batch at hand is done, of 1; 0 between two of them."""
    return min(1.0, word % ROOM / WHOLE)


def num_done(word: int) -> float:
    """How many micro-batches are over, and how much of the one at hand is done."""
    return word // ROOM + share_done(word)


def rounded_up(word: int) -> int:
    """The word once the micro-batch at hand is over."""
    return (word // ROOM + 1) * ROOM


class Advance:
    """How one worker gets on with the micro-batch at hand: from where it was first seen, and last
    seen there, so that a late begin, or a look in the middle of it, says nothing of its pace."""

    def __init__(self) -> None:
        self._number = -1
        self._looked_s = -1.0
        self._first = self._last = (0.0, -1.0)

    def see(self, word: int, now_s: float, usual_s: float) -> None:
        """Look at the word of a worker, where a micro-batch usually takes `usual_s`."""
        number, share = word // ROOM, share_done(word)
        if share == 0 and number == self._number + 1:
            number, share = self._number, 1.0  # computed: what is left is to add it and to ask
        is_late = now_s - self._looked_s > MOST_BETWEEN * usual_s
        moved = number != self._number or share != self._last[0]
        self._looked_s = now_s
        if number != self._number or share == self._first[0] or (moved and is_late):
            self._number, self._first = number, (share, now_s)
        if moved or share == self._first[0]:
            self._last = share, now_s

    def end_s(self, since_s: float) -> float | None:
        """When the micro-batch that it has been at since then is over, if it goes on like that."""
        (before, before_s), (now, now_s) = self._first, self._last
        if now_s <= since_s or now - before < LEAST_SEEN:
            return None
        return now_s + (1 - now) * (now_s - before_s) / (now - before)
