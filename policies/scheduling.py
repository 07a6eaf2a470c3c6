"""Who computes what: shares by measured speed, taking what is left, then duplicates.

A repetition (FRC) is the same with groups in the place of workers: all members of a group hold the
group's share, each begins elsewhere in it, and what one has finished the others skip. So copies
cost time only where a member has nothing else to do.

Pure: the time and the measured paces arrive in the view. Never decides who is a member, and never
whether a result counts: duplicates are safe because every answer to a micro-batch is the same.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from policies.coding.codes import frc

SILENCE = 0.5  # micro-batch times without progress, after which nothing is expected any more
SILENCE_FLOOR_S = 0.03  # a runnable process may wait that long for a core
MARGIN = 0.5  # of a micro-batch time, by which a duplicate must be expected to win
MARGIN_SEEN = 0.25  # the same, where it is seen how fast the holder is
PACE_WINDOW = 9  # samples; the median of them outvotes four bad ones
LEAST_S = 1e-6  # of a pace: a clock may stand still
FEW_SAMPLES = 3  # with fewer, the usual pace counts in the place of those missing


@dataclass(frozen=True, slots=True)
class Queue:
    """What one worker holds: micro-batches in the order in which it computes them.

    `since_s` is when it began with the first of them, as far as is known; `silent_s` for how long
    its progress counter is known not to have moved; `end_s` when the first will be done, if it goes
    on as it was seen to.
    """

    worker: int
    micro_batches: tuple[int, ...]
    since_s: float
    pace_s: float
    silent_s: float = 0.0
    end_s: float | None = None

    @property
    def is_silent(self) -> bool:
        """Stopped, asleep or stuck, for all that can be seen; a slow one still moves on."""
        return self.silent_s > max(SILENCE_FLOOR_S, SILENCE * self.pace_s)

    def expected_end_s(self, position: int, now_s: float) -> float:
        """When the micro-batch at `position` will be done.

        A worker that is late is expected to need as long again as it is late: the remaining time
        of a heavy-tailed delay grows with its age.
        """
        if self.is_silent:
            return math.inf
        first = self.since_s + self.pace_s if self.end_s is None else self.end_s
        if first < now_s:
            first = now_s + (now_s - first)
        return first + position * self.pace_s


@dataclass(frozen=True, slots=True)
class IdleView:
    """A worker with nothing to do. `pending` are the micro-batches that nobody holds."""

    now_s: float
    worker: int
    pace_s: float
    pending: Sequence[int]
    queues: Sequence[Queue]


@dataclass(frozen=True, slots=True)
class Take:
    """Compute a micro-batch that nobody has begun; `holder` loses it, if there is one."""

    micro_batch: int
    holder: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Compute a micro-batch that `holder` is computing too; whoever is first counts."""

    micro_batch: int
    holder: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing worth doing; ask again at `until_s`, or when something changes."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class StepView:
    """A step that begins: paces of those who are idle (seconds per micro-batch), what is to be
    computed, and on which host each worker is, if there are several."""

    paces: Mapping[int, float]
    micro_batches: Sequence[int]
    hosts: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The micro-batches of each worker, in the order in which it computes them."""

    queues: Mapping[int, tuple[int, ...]]
    num_copies: int
    """Leases beyond one for each micro-batch."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares in proportion to speed, then what is left, then duplicates of what is late.

    `copies`: so many workers hold each micro-batch from the beginning. Without `helps` shares are
    even, and nobody computes what another one holds.
    """

    copies: int = 1
    helps: bool = True

    @property
    def name(self) -> str:
        """The `kind` of the job file that asks for this, and what it was given."""
        if not self.helps:
            return "uncoded"
        return "speculation" if self.copies == 1 else f"frc with s={self.copies - 1}"

    def assign(self, view: StepView) -> Assignment:
        """Who holds what at the beginning of a step."""
        groups = self._groups(view)
        reason = f"{self.name}: {len(groups)} shares for {len(view.paces)} workers"
        rates = {
            one: 1 / max(view.paces[one], LEAST_S) if self.helps else 1.0 for one in view.paces
        }
        paces = {
            number: 1 / sum(rates[one] for one in group) for number, group in enumerate(groups)
        }
        queues: dict[int, tuple[int, ...]] = {}
        num_copies = 0
        rest = list(view.micro_batches)
        for number, num in split(paces, len(rest)).items():
            part, rest = tuple(rest[:num]), rest[num:]
            num_copies += num * (len(groups[number]) - 1)
            begin = 0.0
            for worker in groups[number]:  # each begins where the one before will be by then
                first = round(begin * num)
                queues[worker] = part[first:] + part[:first]
                begin += rates[worker] * paces[number]
        return Assignment(queues, num_copies, reason)

    def _groups(self, view: StepView) -> list[tuple[int, ...]]:
        workers = sorted(view.paces)
        copies = min(self.copies, len(workers))
        if copies <= 1:
            return [(worker,) for worker in workers]
        hosts = [f"{view.hosts.get(worker, 0):06}" for worker in workers]
        groups = frc(len(workers), copies - 1, hosts if len(set(hosts)) > 1 else None).groups
        return [tuple(workers[place] for place in group) for group in groups]

    def decide(self, view: IdleView) -> Take | Duplicate | Wait:
        """What an idle worker should do next."""
        if view.pending:
            return Take(view.pending[0], None, "nobody holds it")
        wait = Wait(view.now_s + max(view.pace_s / 8, 0.005), "every holder will be done first")
        if not self.helps:
            return wait
        mine_s = view.now_s + view.pace_s
        ends_s: dict[int, float] = {}
        for queue in view.queues:
            for position, micro_batch in enumerate(queue.micro_batches):
                end_s = queue.expected_end_s(position, view.now_s)
                ends_s[micro_batch] = min(end_s, ends_s.get(micro_batch, end_s))
        held = [queue for queue in view.queues if queue.micro_batches]
        latest = max(held, key=lambda queue: ends_s[queue.micro_batches[-1]], default=None)
        if latest is None:
            return wait
        micro_batch = latest.micro_batches[-1]
        gain_s = ends_s[micro_batch] - mine_s
        reason = f"worker {latest.worker} is expected {gain_s:.3f} s later"
        if gain_s == math.inf:
            reason = f"worker {latest.worker} has made no progress for {latest.silent_s:.3f} s"
        if len(latest.micro_batches) > 1 and gain_s > 0:
            return Take(micro_batch, latest.worker, reason)
        margin = MARGIN if latest.end_s is None else MARGIN_SEEN
        if gain_s > margin * view.pace_s:
            return Duplicate(micro_batch, latest.worker, reason)
        return wait


def split(paces: Mapping[int, float], num: int) -> dict[int, int]:
    """Split `num` micro-batches so that the last one ends as early as possible.

    Args:
        paces: seconds per micro-batch of each who gets a share, > 0.
    """
    shares = dict.fromkeys(paces, 0)
    ends = [(pace_s, one) for one, pace_s in paces.items()]  # if each got one more
    heapq.heapify(ends)
    for _ in range(num if paces else 0):
        end_s, one = ends[0]
        heapq.heapreplace(ends, (end_s + paces[one], one))
        shares[one] += 1
    return shares


def pace(samples_s: Sequence[float], usual_s: float) -> float:
    """Seconds per micro-batch: the median of the last samples, robust to one bad one at once."""
    recent = list(samples_s)[-PACE_WINDOW:]
    missing = max(0, FEW_SAMPLES - len(recent))
    return statistics.median([*recent, *[usual_s] * missing])
