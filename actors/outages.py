"""Ray's control service (GCS) is away, such as while it restarts: when to ask again.

Most calls wait until it is back; those that raise come here. What raised may have been done all
the same. Knows nothing of Ray, and never what is asked.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from elastic.core.errors import ClusterError
from policies.pauses import pause_s

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 60.0
"""After so long without its GCS Ray ends its processes itself, unless it is told otherwise."""

_pause_s = partial(pause_s, base_s=0.1, cap_s=5.0)


@dataclass(slots=True)
class Outage:
    """Whether it is away, and when it may be asked again: after twice as long each time."""

    _num_failures: int = 0
    _again_s: float = 0.0

    def may_ask(self, now_s: float) -> bool:
        return now_s >= self._again_s

    def goes_on(self, now_s: float) -> bool:
        """It did not answer. Returns whether it did before."""
        self._again_s = now_s + _pause_s(self._num_failures)
        self._num_failures += 1
        return self._num_failures == 1

    def ends(self) -> None:
        """It has answered."""
        self._num_failures, self._again_s = 0, 0.0


def insist(
    ask: Callable[[], T],
    *,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Ask until it answers: for what nothing can go on without.

    Raises:
        ClusterError: it has not answered for `patience_s`.
    """
    begun_s = clock()
    for num_failures in itertools.count():
        try:
            return ask()
        except ClusterError as error:
            if clock() - begun_s >= patience_s:
                raise
            log.warning("%s; asks again", error)
        sleep(_pause_s(num_failures))
    raise AssertionError("it counts for ever")
