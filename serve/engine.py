"""Answers jobs by calls that their rows share, whatever step each is at. Plain code, one thread.

Each tick takes the rows that wait longest, asks the router and the chosen experts once, and moves
each row one step. An expert that fails, is slow or answers garbage is left out, and the weights are
taken anew over the survivors. Time and experts are passed in. Never blocks without a limit.

Letters: B rows of a call, K experts, V outcomes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from policies.routing import Floats, NobodyLives, Selection
from serve.metrics import Metrics
from serve.mixing import Mixture
from serve.patients import Patients
from serve.pool import Inputs, Pool
from serve.refusals import Refusal, failed, too_late, too_many, unavailable
from serve.settings import Serving
from serve.version import Version
from serve.work import Work

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A request's rows. The engine fills in who answered; `done` tells when it is over."""

    works: Sequence[Work]
    version: Version
    policy: Selection
    deadline_s: float
    keeps_trace: bool = False
    done: Future[None] = field(default_factory=Future)
    is_cancelled: bool = False
    answered: set[int] = field(default_factory=set)
    """Experts whose answers it holds."""
    lost: set[int] = field(default_factory=set)
    """Experts that would have been chosen, and were left out."""
    trace: list[list[list[float]]] = field(default_factory=list)
    """For each row, the weights of each of its steps."""


@dataclass
class _Row:
    job: Job
    index: int
    inputs: Inputs

    @property
    def work(self) -> Work:
        return self.job.works[self.index]


class Engine:
    """Holds the queue. `submit` and `cancel` may be called from any thread, `tick` from one."""

    def __init__(
        self, pool: Pool, settings: Serving, clock: Callable[[], float], metrics: Metrics
    ) -> None:
        self._pool, self._settings, self._clock, self._metrics = pool, settings, clock, metrics
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self.patients = Patients(settings.failing, clock, metrics)
        self._tick_s = 0.01

    @property
    def num_rows(self) -> int:
        """Rows that wait or are in work."""
        with self._lock:
            return sum(len(job.works) for job in self._jobs)

    def versions(self) -> list[Version]:
        """Those that rows in work began with."""
        with self._lock:
            return [job.version for job in self._jobs]

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises Refusal where the queue is full."""
        limit = self._settings.batching.max_queue_rows
        with self._lock:
            num = sum(len(one.works) for one in self._jobs)
            if num + len(job.works) > limit:
                wait_s = max(1.0, self._tick_s * num)
                raise too_many(f"{num} rows wait; batching.max_queue_rows is {limit}", wait_s)
            job.done.set_running_or_notify_cancel()  # from now on only the engine ends it
            self._jobs.append(job)
            self._metrics.queue_rows.set(num + len(job.works))

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more."""
        job.is_cancelled = True

    def tick(self) -> bool:
        """Move the rows of one call by a step. False when there is nothing to do."""
        self._drop()
        rows = self._batch()
        if not rows:
            self._settle()  # who asked for nothing, such as no tokens at all
            return False
        begin_s = self._clock()
        try:
            self._advance(rows)
        except Refusal as refusal:
            self._fail(rows, refusal)
        except Exception:
            log.exception("a batch of %d rows failed", len(rows))
            self._fail(rows, failed("the engine failed; its log says why"))
        self._tick_s = 0.9 * self._tick_s + 0.1 * (self._clock() - begin_s)
        self._settle()
        return True

    def _drop(self) -> None:
        """End the jobs that nobody waits for, or not any longer."""
        now_s = self._clock()
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            if job.is_cancelled:
                self._end(job)
            elif now_s >= job.deadline_s:
                self._end(job, too_late("the deadline has passed before there was an answer"))

    def _batch(self) -> list[_Row]:
        """The oldest row, and those after it that can share its calls."""
        rows: list[_Row] = []
        key: object = None
        with self._lock:
            for job in self._jobs:
                for index, work in enumerate(job.works):
                    if work.is_done:
                        continue
                    inputs = work.inputs()
                    shape = (job.version.identity, *(one.shape for one in inputs))
                    key = key or shape
                    if shape == key:
                        rows.append(_Row(job, index, inputs))
                    if len(rows) == self._settings.batching.max_rows:
                        return rows
        return rows

    def _advance(self, rows: Sequence[_Row]) -> None:
        version = rows[0].job.version
        given = zip(*(row.inputs for row in rows), strict=True)
        inputs = tuple(torch.stack(parts) for parts in given)
        padded = self._padded(inputs)
        shares_BK = self._route(version, padded)[: len(rows)]
        lost = set(np.flatnonzero(~np.isfinite(shares_BK).all(axis=1)).tolist())
        if lost:  # of these rows only: the others go on without them
            refusal = unavailable("the router answered with numbers that are not finite")
            self._fail([rows[b] for b in sorted(lost)], refusal)
            if others := [row for b, row in enumerate(rows) if b not in lost]:
                self._advance(others)
            return
        mixture = self._mixture(version, rows, inputs, padded, shares_BK)
        answer, lost_BK = mixture.answer(), mixture.lost()
        self._metrics.batch_rows.observe(len(rows))
        self._fail([rows[b] for b in sorted(mixture.hopeless)], self._nobody(version))
        for b, row in enumerate(rows):
            if b in mixture.hopeless:
                continue
            weights_K, job = mixture.weights_BK[b], row.job
            job.answered.update(np.flatnonzero(weights_K).tolist())
            job.lost.update(np.flatnonzero(lost_BK[b]).tolist())
            if job.keeps_trace:
                self._trace(job, row.index, weights_K.tolist())
            row.work.take(answer[b])

    def _mixture(
        self,
        version: Version,
        rows: Sequence[_Row],
        inputs: Inputs,
        padded: Inputs,
        shares_BK: Floats,
    ) -> Mixture:
        """Ask who is chosen until all of them have answered, or are known to be lost."""
        num_rows = len(rows)
        mixture = Mixture([row.job.policy for row in rows], shares_BK, self.patients.alive(version))
        while True:
            try:
                calls = mixture.missing()
            except NobodyLives:
                raise self._nobody(version) from None
            if not calls:
                return mixture
            asked = {
                k: padded
                if len(rows_k) == num_rows
                else self._padded(tuple(one[rows_k] for one in inputs))
                for k, rows_k in calls.items()
            }
            for k, answer in self._ask(version, asked).items():
                if isinstance(answer, Tensor):
                    mixture.take(k, calls[k], answer[: len(calls[k])])
                else:
                    mixture.lose(k)

    def _ask(self, version: Version, calls: dict[int, Inputs]) -> dict[int, Tensor | None]:
        """Answers that were checked; None of who failed."""
        begin_s = self._clock()
        answers = self._pool.ask(version, calls, self._settings.failing.expert_timeout_s)
        took_s = self._clock() - begin_s
        return {
            k: self.patients.examine(version, k, answers[k], len(inputs[0]), took_s)
            for k, inputs in calls.items()
        }

    def _nobody(self, version: Version) -> Refusal:
        wait_s = max(self.patients.retry_after_s(version), 0.1)
        return unavailable("no expert that could answer is alive", wait_s)

    def _route(self, version: Version, inputs: Inputs) -> Floats:
        with torch.inference_mode():
            probabilities: Floats = version.router(*inputs).double().softmax(dim=1).numpy()
        return probabilities

    def _padded(self, inputs: Inputs) -> Inputs:
        """Up to the fixed size, where there is one, by repeating the first row."""
        missing = self._settings.batching.max_rows - len(inputs[0])
        if not self._settings.batching.fixed or missing <= 0:
            return inputs
        return tuple(torch.cat([one, one[:1].expand(missing, *one.shape[1:])]) for one in inputs)

    def _trace(self, job: Job, index: int, weights: list[float]) -> None:
        while len(job.trace) < len(job.works):
            job.trace.append([])
        job.trace[index].append(weights)

    def _settle(self) -> None:
        """Tell the jobs that are done."""
        with self._lock:
            jobs = [job for job in self._jobs if all(work.is_done for work in job.works)]
        for job in jobs:
            self._end(job)

    def _fail(self, rows: Sequence[_Row], refusal: Refusal) -> None:
        for job in {id(row.job): row.job for row in rows}.values():
            self._end(job, refusal)

    def _end(self, job: Job, refusal: Refusal | None = None) -> None:
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)
            self._metrics.queue_rows.set(sum(len(one.works) for one in self._jobs))
        if not job.done.done():
            if refusal is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(refusal)
