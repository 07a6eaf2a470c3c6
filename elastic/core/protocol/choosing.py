"""What the aggregator remembers of its steps under `stragglers: auto`, to choose by.

Beside the protocol, and without I/O like it: a successor that has forgotten everything chooses
anew after some steps. Never decides what counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from elastic.core.protocol.messages import Outcome
from policies.choosing import PROBE, Choice, Chosen, StepsSeen, StepsView
from policies.gradient_coding import DRIFT_ROUNDS, MEMORY
from policies.scheduling import Shares


@dataclass(frozen=True, slots=True)
class _Row:
    """One step: of each worker when it first answered, and how long of that it was computing."""

    first_s: tuple[float, ...]
    computing_s: tuple[float, ...]
    end_s: float


class Choosing:
    """Watches steps, and says what the next ones run."""

    def __init__(self, num_micro_batches: int, seed: int = 0) -> None:
        self.choice: Choice = PROBE
        self._num_micro_batches = num_micro_batches
        self._seed = seed
        self._policy = Chosen()
        self._rows: deque[_Row] = deque(maxlen=MEMORY)
        self._num_since = 0
        self._begin_s: float | None = None
        self._last_s = 0.0
        self._is_told = False
        self._answers: dict[int, tuple[float, float]] = {}

    @property
    def scheduling(self) -> Shares:
        return self.choice.policy

    def begin(self, now_s: float) -> None:
        """A step is shared out."""
        self._begin_s = now_s
        self._answers.clear()

    def answered(self, worker: int, outcome: Outcome, now_s: float) -> None:
        """A worker has computed something, whether it counts or not."""
        if self._begin_s is None:  # a successor did not see the step begin
            return
        self._last_s = now_s
        first_s = now_s - self._begin_s
        computing_s = min(first_s, outcome.end_s - outcome.start_s)
        self._answers.setdefault(worker, (first_s, computing_s))

    def end(self, workers: Iterable[int]) -> str:
        """The step is complete; `workers` could have worked on it. What to tell, if anything.

        With another number of workers nothing that was seen counts any more.
        """
        answers = [self._answers.get(one, (np.inf, np.nan)) for one in workers]
        if self._begin_s is None or not any(first_s < np.inf for first_s, _ in answers):
            return ""
        if self._rows and len(self._rows[-1].first_s) != len(answers):
            self._rows.clear()
            self.choice, self._num_since = replace(self.choice, expected=None), 0
        first_s, computing_s = zip(*answers, strict=True)
        self._rows.append(_Row(first_s, computing_s, self._last_s - self._begin_s))
        self._num_since += 1
        self._begin_s = None
        view = self._view()
        return self._choose(view) if self._policy.is_due(view) else ""

    def _choose(self, view: StepsView) -> str:
        before, self.choice = self.choice, self._policy.decide(view)
        if self._policy.surprise(view) == "median":
            self._rows = deque(list(self._rows)[-DRIFT_ROUNDS:], MEMORY)
        self._num_since = 0
        is_news = self.choice.policy != before.policy or not self._is_told
        self._is_told = True
        return self.choice.reason if is_news else ""

    def _view(self) -> StepsView:
        steps = StepsSeen(
            np.array([row.first_s for row in self._rows]),
            np.array([row.computing_s for row in self._rows]),
            np.array([row.end_s for row in self._rows]),
        )
        seed = self._seed + self._num_since + len(self._rows)
        return StepsView(steps, self._num_micro_batches, seed, self.choice, self._num_since)
