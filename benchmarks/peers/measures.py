"""What a run cost, from what was seen of it: gaps, steps redone, samples, goodput. Pure.

A phase belongs to one start of a system, and is measured against the calm phase of that start; a
later start of the same run has none, and takes that of the first.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.driver import Run, Seen
from benchmarks.peers.records import Step

CALM = "calm"
STILL = 5
"""Who has committed nothing for so many seconds or calm steps at the end stands still."""

FIRST = 5
"""Times between commits in which a fault shows; that all systems have as many makes them alike on
a machine that is noisy, however long each takes to recover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One phase of one run. None: there is no such figure, since the system ended or never trained
    again."""

    system: str
    scenario: str
    phase: str
    possible: bool
    ran: bool
    """Whether it took steps, survived, and was still taking them at the end."""
    step_s: float | None
    """Mean time of a new step, of those that lie in the phase as a whole."""
    median_s: float | None
    """Median time between two commits in the phase."""
    calm_s: float
    """The same, undisturbed."""
    next_s: float | None
    """From the fault to the next commit."""
    gap_s: float | None
    """The longest of the first times between two commits after the fault, beyond `calm_s`."""
    longest_s: float | None
    """The longest time without a commit in the whole phase, beyond `calm_s`."""
    redone: int
    """Steps that had been committed before, and were committed again."""
    samples_repeated: int
    """Samples in those."""
    samples_lost: int
    """Samples that steps of the phase, as they count in the end, should have held and did not."""
    full: float | None
    """Share of the steps that held the whole batch."""
    goodput: float | None
    """Samples a second, each counted once."""
    goodput_whole: float | None
    """The same, of steps that held the whole batch only."""


def costs(run: Run) -> list[Cost]:
    """All phases of a run."""
    return [cost(run, seen) for seen in run.phases]


def cost(run: Run, seen: Seen) -> Cost:
    """One phase."""
    steps = run.launches[seen.launch]
    calm_s = calm_step_s(run)
    inside = [one for one in steps if seen.begun_s < one.time_s <= seen.ended_s]
    begun = [one for one in steps if one.time_s <= seen.begun_s]
    gaps = intervals(steps, seen.begun_s, seen.ended_s)
    if inside:
        gaps.append(seen.ended_s - inside[-1].time_s)
    counted = last_of_each(inside)
    done = max((one.step for one in begun), default=-1)
    redone = redone_of(begun, inside)
    new = [one for one in counted if one.step > done]
    batch = run.config["batch"]
    ran = seen.survived and bool(inside) and gaps[-1] < STILL * max(1.0, calm_s)
    lasted_s = seen.ended_s - seen.begun_s
    useful = sum(min(batch, len(one.samples)) for one in new)
    whole = batch * sum(len(one.samples) == batch for one in new)
    return Cost(
        system=run.system,
        scenario=run.scenario,
        phase=seen.name,
        possible=seen.possible,
        ran=ran,
        step_s=(new[-1].time_s - new[0].time_s) / (len(new) - 1) if ran and new[1:] else None,
        median_s=statistics.median(gaps[:-1]) if ran and gaps[:-1] else None,
        calm_s=calm_s,
        next_s=inside[0].time_s - seen.begun_s if ran else None,
        gap_s=max(0.0, max(gaps[:FIRST]) - calm_s) if ran else None,
        longest_s=max(0.0, max(gaps) - calm_s) if ran else None,
        redone=len(redone),
        samples_repeated=sum(len(one.samples) for one in redone),
        samples_lost=sum(max(0, batch - len(one.samples)) for one in counted),
        full=statistics.mean(len(one.samples) == batch for one in counted) if counted else None,
        goodput=useful / lasted_s if seen.survived else None,
        goodput_whole=whole / lasted_s if seen.survived else None,
    )


def calm_step_s(run: Run) -> float:
    """The median time between two commits before the first fault; where the calm phase is too
    short for one, that of the last ones before its end."""
    first = run.phases[0]
    steps = run.launches[first.launch]
    gaps = intervals(steps, first.begun_s, first.ended_s, whole=True)
    gaps = gaps or intervals(steps, 0.0, first.ended_s)[-FIRST:]
    if first.name != CALM or not gaps:
        raise ValueError(f"{run.system}, {run.scenario}: no calm steps at the beginning")
    return statistics.median(gaps)


def intervals(
    steps: Iterable[Step], begun_s: float, ended_s: float, *, whole: bool = False
) -> list[float]:
    """Seconds between commits, of those that end in the time given, or lie in it as a whole."""
    pairs = itertools.pairwise(sorted(one.time_s for one in steps))
    return [
        after_s - before_s
        for before_s, after_s in pairs
        if begun_s < after_s <= ended_s and (before_s >= begun_s or not whole)
    ]


def last_of_each(steps: Iterable[Step]) -> list[Step]:
    """Each step as it was committed last: earlier ones were rolled back."""
    return sorted({one.step: one for one in steps}.values(), key=lambda one: one.step)


def redone_of(begun: Iterable[Step], inside: Iterable[Step]) -> list[Step]:
    """Those of `inside` that had been committed already."""
    seen, again = {one.step for one in begun}, []
    for one in inside:
        if one.step in seen:
            again.append(one)
        seen.add(one.step)
    return again


def deviation(run: Sequence[Step], reference: Sequence[Step]) -> float | None:
    """The largest relative difference of the loss of a step to that of an undisturbed run, over
    the steps that both have; None if there are none. 0 means equal to the last bit."""
    expected = {one.step: one.loss for one in last_of_each(reference)}
    differences = [
        abs(one.loss - expected[one.step]) / abs(expected[one.step])
        for one in last_of_each(run)
        if one.step in expected
    ]
    return max(differences, default=None)


def same_samples(run: Sequence[Step], reference: Sequence[Step]) -> bool:
    """Whether every step that both have held the same samples."""
    expected = {one.step: one.samples for one in last_of_each(reference)}
    both = [one for one in last_of_each(run) if one.step in expected]
    return all(one.samples == expected[one.step] for one in both)


def references(runs: Iterable[Run]) -> Mapping[str, Sequence[Step]]:
    """System -> the longest undisturbed run there is: nothing of `steady` ends or resizes it."""
    found: dict[str, Sequence[Step]] = {}
    for run in runs:
        if run.scenario == "steady":
            steps = run.launches[0]
            if len(steps) > len(found.get(run.system, ())):
                found[run.system] = steps
    return found
