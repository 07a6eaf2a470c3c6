"""The rules that were published, defects and all: only to compare with what was published.

A round ends at tau = (1 + mu) times its fastest worker if the pattern of those that are later still
conforms to the scheme's straggler model; else it waits for all. Gradient coding takes a round only
with fewer than s stragglers (off by one), a round never ends early though all could be decoded,
and every worker is charged the load of the worst case. Parameters are those that would have been
fastest on the recorded delays.

Source: Krishnan, Ebrahimi, Khisti, ICLR 2023, and their simulator. Letters: R rounds, N workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from policies.coding.codes import Bools, Floats
from policies.coding.delays import Delays
from policies.coding.m_sgc import MSgc
from policies.coding.simulation import Coded, Run, Uncoded, delay_of, load_of
from policies.coding.sr_sgc import SrSgc
from policies.coding.stragglers import PerRound

Published = Uncoded | Coded | SrSgc | MSgc


def simulate_published(
    scheme: Published, delays: Delays, num_gradients: int, *, mu: float = 1.0
) -> Run:
    """Run a scheme over the delays, by the authors' rules."""
    num_rounds = num_gradients + delay_of(scheme)
    load = load_of(scheme, delays.num_workers)
    seconds_RN = np.stack([delays.at(row, load) for row in range(num_rounds)])
    tau_R = (1 + mu) * seconds_RN.min(axis=1)
    slowest_R = seconds_RN.max(axis=1)
    late_RN = seconds_RN > tau_R[:, None]
    rounds_R = _rounds(scheme, late_RN, tau_R, slowest_R, num_gradients)
    return Run(rounds_R, np.full(num_rounds, load), seconds_RN)


def _rounds(
    scheme: Published, late_RN: Bools, tau_R: Floats, slowest_R: Floats, num_gradients: int
) -> Floats:
    match scheme:
        case Uncoded():
            return slowest_R
        case Coded():
            model = PerRound(scheme.stragglers - 1)
            conforms = [model.allows(late_RN[:0], late_N) for late_N in late_RN]
            return np.where(conforms, np.minimum(tau_R, slowest_R), slowest_R)
        case MSgc():
            return _m_sgc(scheme, late_RN, tau_R, slowest_R)
        case SrSgc():
            return _sr_sgc(scheme, late_RN, tau_R, slowest_R, num_gradients)


def _m_sgc(scheme: MSgc, late_RN: Bools, tau_R: Floats, slowest_R: Floats) -> Floats:
    durations_R = slowest_R.copy()
    counted_RN = np.zeros_like(late_RN)
    for row, late_N in enumerate(late_RN):
        window = counted_RN[max(0, row - scheme.window + 1) : row]
        if scheme.model.allows(window, late_N):
            counted_RN[row] = late_N
            durations_R[row] = min(tau_R[row], slowest_R[row])
    return durations_R


def _sr_sgc(
    scheme: SrSgc, late_RN: Bools, tau_R: Floats, slowest_R: Floats, num_gradients: int
) -> Floats:
    """Past rounds with at most s stragglers, in which all worked on their gradient, do not count.

    After the last gradient, a round of one that can be decoded already is left out.
    """
    rounds = scheme.begin(late_RN.shape[1], num_gradients)
    durations_R = slowest_R.copy()
    counted_RN = np.zeros_like(late_RN)
    for row, late_N in enumerate(late_RN):
        if row >= num_gradients and rounds.allows(np.zeros_like(late_N)):
            durations_R[row] = 0.0
            rounds.close(np.zeros_like(late_N))
            continue
        window = counted_RN[max(0, row - scheme.window + 1) : row]
        answered_N = np.ones_like(late_N)
        if scheme.model.allows(window, late_N):
            answered_N = ~late_N
            durations_R[row] = min(tau_R[row], slowest_R[row])
        repeats = bool((answered_N & (rounds.work() == rounds.due)).any())
        if repeats or np.count_nonzero(~answered_N) > scheme.num_stragglers:
            counted_RN[row] = ~answered_N
        rounds.close(answered_N)
    return durations_R


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A scheme and how it ran."""

    scheme: Published
    run: Run


def choose_published(
    schemes: Iterable[Published], delays: Delays, num_gradients: int, *, mu: float = 1.0
) -> Choice:
    """The scheme that would have been fastest; of equal ones the first."""
    made = (Choice(one, simulate_published(one, delays, num_gradients, mu=mu)) for one in schemes)
    return min(made, key=lambda choice: choice.run.total_s)


def gradient_codes(num_workers: int) -> Iterator[Coded]:
    """All parameters of gradient coding."""
    return (Coded(stragglers=most) for most in range(1, num_workers))


def sr_sgc_schemes(num_workers: int, max_slots: int) -> Iterator[SrSgc]:
    """All parameters with W - 1 + B up to `max_slots`."""
    for distinct in range(1, num_workers + 1):
        for burst in range(1, max_slots):
            for window in range(burst + 1, max_slots - burst + 2, burst):
                yield SrSgc(burst=burst, window=window, distinct=distinct)


def m_sgc_schemes(num_workers: int, max_slots: int) -> Iterator[MSgc]:
    """All parameters with W - 1 + B up to `max_slots`."""
    for distinct in range(1, num_workers + 1):
        for window in range(2, max_slots + 1):
            for burst in range(1, min(window, max_slots - window + 2)):
                yield MSgc(burst=burst, window=window, distinct=distinct, inner="coded")
