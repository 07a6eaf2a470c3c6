"""What the fault detector looks at: counters that workers, aggregators and links keep anyway.

Plain arrays, one row per thing counted, so that ten thousand workers cost milliseconds. Times are
seconds; those that are compared with each other come from one clock. Nothing here decides anything.

Letters: W workers, B micro-batches, L links, N nodes, P processes, G memberships in groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fleet:
    """Who takes part in a step. Workers are in ascending order.

    Those of one role do the same work on the same hardware: a pipeline stage, say. Only they are
    compared with each other.
    """

    worker_W: Ints
    role_W: Ints
    node_W: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Computed:
    """Every micro-batch that a worker had in its hands in this step, in any order.

    `load_B` is how much work it was, in any unit, such as tokens: the sum of its weights. One that
    was given up (`done_B` false) took at least as long as is said here.
    """

    worker_B: Ints
    start_s_B: Floats
    end_s_B: Floats
    load_B: Floats
    done_B: Bools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transfers:
    """What went over each link in this step, one row per (sender, receiver).

    Links of one kind should be alike: the same speed, the same size of messages. `took_s_L` is the
    time in which there was something to send and it had not arrived; so nobody's delay is in it
    that made the sender wait for its data. `send_wait_s_L`: the kernel did not take what was there
    to be sent. `receive_wait_s_L`: a message had begun and its next bytes did not come.
    """

    sender_L: Ints
    receiver_L: Ints
    kind_L: Ints
    bytes_L: Ints
    took_s_L: Floats
    send_wait_s_L: Floats
    receive_wait_s_L: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hosts:
    """What the operating system of each node says: shares of time, 0 to 1, over the last step.

    Steal: the processors were given to somebody else. Memory and disk: tasks stood still for them
    (the `some` line of Linux's pressure stall information). Throttled: of its graphics cards the
    one that heat or its power supply held back most. Card faults: errors in a card's memory that
    could not be corrected, and what else the driver calls the card's own.
    """

    node_N: Ints
    steal_N: Floats
    memory_N: Floats
    disk_N: Floats
    throttled_N: Floats
    out_of_memory_kills_N: Ints
    card_faults_N: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepView:
    """One committed step.

    `is_exempt`: it is no step like the others: the first of a process or generation, redone after
    an overflow, with an evaluation or a checkpoint within. Nothing is learned from it.
    """

    step: int
    fleet: Fleet
    computed: Computed
    transfers: Transfers | None = None
    hosts: Hosts | None = None
    is_exempt: bool = False
    plan: int = 0
    """By which nodes own chunks, counted: after another one links carry otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Processes:
    """Every process of the job, workers and aggregators, one row each.

    `silent_s_P`: since its progress counter moved. `is_busy_P`: it holds work, or is in a round.
    `has_done_P`: it has completed something before; until then it may be compiling or loading.
    """

    is_node_P: Bools
    number_P: Ints
    silent_s_P: Floats
    is_busy_P: Bools
    has_done_P: Bools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Who takes part in which communication: the round of an exchange, a collective.

    A row is a process (its row in `Processes`) in a group, with the numbers of the newest operation
    it has started and done.
    """

    group_G: Ints
    process_G: Ints
    started_G: Ints
    done_G: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenTransfers:
    """Transfers that have begun and not ended: rows of `Processes` at both ends, and since when no
    byte has moved."""

    group_L: Ints
    sender_L: Ints
    receiver_L: Ints
    silent_s_L: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PollView:
    """The progress of all, looked at every few hundredths of a second.

    `waits_WQ`: pairs (waiter, awaited) of rows of `processes`, for waits outside of groups: a
    worker for its aggregator's answer, a pipeline stage for the one before.
    `usual_step_s` is the median of the last steps. `is_exempt`: an evaluation or a checkpoint.
    """

    now_s: float
    step: int
    usual_step_s: float
    processes: Processes
    waits_WQ: Ints
    groups: Groups
    open_transfers: OpenTransfers
    is_exempt: bool = False
