"""The protocol under random faults, and that everything it can do is seen to be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from mutations import (
    FREEZE_JOINING,
    JOIN,
    KILL_NODE,
    KILL_TWO,
    LIAR,
    UNHEARD,
    coded,
    directed,
)

from elastic.core.protocol import aggregator, worker
from elastic.core.protocol.events import Send
from elastic.core.protocol.messages import Leases, step_of_job
from elastic.core.simulator.build import Build
from elastic.core.simulator.faults import (
    AGGREGATOR_POINTS,
    COORDINATOR_POINTS,
    JOIN_POINTS,
    NODE_POINTS,
    WORKER_POINTS,
    Fault,
    Schedule,
    random_schedule,
)
from elastic.core.simulator.job import Job
from elastic.core.simulator.network import SILENT_S
from elastic.core.simulator.search import Tried, check, check_seeds, search
from policies.choosing import Chosen
from policies.scheduling import Shares

OF_HOSTS = {
    "cut_link_node",
    "cut_node",
    "freeze_node",
    "join_node",
    "kill_node",
    "late_nodes",
    "leave_node",
}
PART = 60  # seeds of one test
NUM_TRIES = 60  # schedules within which a rare thing must be seen

STOP_IN_COMPUTE, SLOW_KILL, KILL_AFTER_DROP = UNHEARD
STOP_IN_ENCODE = replace(STOP_IN_COMPUTE, point=("Encode", "during"))


def moves(who: str, table: dict[object, set[object]]) -> list[str]:
    """Every legal move of a state machine, as the simulator counts it."""
    names = [(old.name, new.name) for old, to in table.items() for new in to]  # type: ignore[attr-defined]
    return sorted(f"{who} {old} -> {new}" for old, new in names)


COMMON = [
    "already yours",
    "coded",
    "dismissed: left as planned",
    "dismissed: no member any more",
    "duplicate",
    "duplicate won",
    "evaluated",
    "hung aggregator killed",
    "machine's NaN",
    "nonfinite",
    "overflow",
    "refused: granted to another worker",
    "refused: not finite",
    "refused: stale",
    "revoke",
    "slot dropped",
    "step committed",
    "step_skipped",
    "takeover mid-step",
    "takeover mid-update",
    "traffic_planned",
    "worker_hung",
    "worker_joined",
    "worker_leaving",
    "worker_left",
    "worker_lost",
    "refused: audited",
    "add_worker",
    "delay_messages",
    "drop_worker",
    "fail_job",
    "flap",
    "kill_aggregator",
    "kill_coordinator",
    "kill_worker",
    "leave_worker",
    "machine_nan",
    "preempt_job",
    "remove_worker",
    "sick_worker",
    "slow_kill",
    "slow_start",
    "slow_worker",
    "stop_aggregator",
    "stop_job",
    "stop_worker",
    "cut_link_node",
    "cut_node",
    "freeze_node",
    "generation refused",
    "kill_node",
    "late_nodes",
    "node fenced",
    "node_joined",
    "node_lost",
    "round given up",
    "state moved",
    "silent link given up",
    "split_coordinator",
    "join_node",
    "leave_node",
    "node_joining",
    "node_left",
]
NEVER = ["refused: sum"]  # a worker and its aggregator agree on what counts in its slot


def dismissed_while_holding(seed: int) -> Schedule:
    """A lone worker is taken to hang and comes back; the news crosses its question."""
    schedule = directed(
        seed,
        replace(STOP_IN_COMPUTE, for_s=1.4),
        SLOW_KILL,
        Fault(do="stop_aggregator", step=1, offset_s=0.1, point=("Tell", "after"), for_s=2.5),
    )
    return replace(schedule, num_workers=1, standby=False, num_micro_batches=6)


def dismissal_lost(seed: int) -> Schedule:
    """A lone worker is taken to hang; the aggregator dies between the record and telling it."""
    kill = replace(KILL_AFTER_DROP, point=("SaveMembership", "after"), offset_s=0.1)
    schedule = directed(seed, replace(STOP_IN_ENCODE, for_s=0.35), SLOW_KILL, kill)
    return replace(schedule, num_workers=1, num_micro_batches=6)


SOLE_LEAVES = tuple(Fault(do="leave_node", step=2, target=target) for target in (0, 1))


RARE: dict[str, Callable[[int], Schedule]] = {
    "worker COMPUTING -> ENDED": lambda seed: directed(seed, STOP_IN_COMPUTE, SLOW_KILL),
    "worker ENCODING -> ENDED": lambda seed: directed(seed, STOP_IN_ENCODE, SLOW_KILL),
    "worker HOLDING -> ENDED": dismissed_while_holding,
    "uncoded": lambda seed: coded(seed, *KILL_TWO),
    "dismissed: fenced": lambda seed: directed(seed, *UNHEARD),
    "refused: not a member": dismissal_lost,
    "refused: the step is complete": lambda seed: replace(
        random_schedule(seed), skip_nonfinite=False, num_steps=25, num_micro_batches=8
    ),
    "node_stays": lambda seed: directed(
        seed, *SOLE_LEAVES, Fault(do="kill_node", step=2, offset_s=0.02, target=2)
    ),
    "no_workers": lambda seed: directed(
        seed, *[Fault(do="kill_worker", step=1, target=target) for target in range(8)]
    ),
    "worker_given_up": lambda seed: directed(
        seed, *[Fault(do="kill_worker", step=step) for step in range(10)]
    ),
    "scaled after giving up": lambda seed: directed(
        seed,
        Fault(do="flap", step=1, factor=20.0),
        *[Fault(do="kill_worker", step=1) for _ in range(9)],
    ),
}


@pytest.mark.parametrize("first", range(0, 5 * PART, PART))
def test_random_faults_change_nothing_that_is_computed(first: int) -> None:
    tried = check_seeds(range(first, first + PART))
    assert tried.failure is None, str(tried.failure)
    assert tried.num_faults >= 2 * PART, "some faults never find their point"


def test_random_schedules_are_as_hard_as_they_are_said_to_be() -> None:
    for seed in range(500):
        schedule = random_schedule(seed)
        assert schedule.num_steps >= 5, seed
        assert schedule.num_workers >= 3, seed
        assert len(schedule.faults) >= 3, seed
        assert schedule == random_schedule(seed)


def test_what_is_common_is_seen() -> None:
    expected = COMMON + moves("worker", worker._MOVES) + moves("aggregator", aggregator._MOVES)
    missing = {what for what in expected if what not in RARE}
    for first in range(1000, 1000 + 6 * PART, PART // 3):
        tried = check_seeds(range(first, first + PART // 3))
        assert tried.failure is None, str(tried.failure)
        assert not any(tried.seen[what] for what in NEVER)
        missing -= set(tried.seen)
        if not missing:
            return
    pytest.fail(f"never seen: {sorted(missing)}")


@pytest.mark.parametrize("what", RARE)
def test_what_is_rare_is_seen(what: str) -> None:
    see(what, RARE[what])


@pytest.mark.parametrize("do", ["kill_aggregator", "stop_aggregator"])
@pytest.mark.parametrize("point", AGGREGATOR_POINTS, ids=" ".join)
def test_an_aggregator_may_die_or_stop_anywhere(do: str, point: tuple[str, str]) -> None:
    fault = Fault(do=do, step=1, point=point, for_s=0.5 if "stop" in do else 0.0)
    others = [Fault(do="kill_worker", step=1), Fault(do="remove_worker", step=2, target=1)]
    see(f"{do} {point[1]} {point[0]}", lambda seed: directed(seed, fault, *others))


@pytest.mark.parametrize("do", ["kill_node", "cut_node", "freeze_node", "kill_aggregator"])
@pytest.mark.parametrize("point", NODE_POINTS, ids=" ".join)
def test_a_node_may_be_lost_anywhere(do: str, point: tuple[str, str]) -> None:
    fault = Fault(do=do, step=2, point=point, for_s=1.0)
    first = Fault(do="kill_node", step=2, offset_s=0.02, target=1)
    see(f"{do} {point[1]} {point[0]}", lambda seed: directed(seed, first, fault))


@pytest.mark.parametrize("do", ["kill_node", "cut_node", "freeze_node", "kill_aggregator"])
@pytest.mark.parametrize("point", JOIN_POINTS, ids=" ".join)
def test_a_node_may_be_lost_anywhere_while_another_joins(do: str, point: tuple[str, str]) -> None:
    fault = Fault(do=do, step=1, offset_s=0.6, point=point, for_s=1.0)
    more = Fault(do="kill_worker", step=3)
    if point == ("GiveUp", "after"):
        more = Fault(do="kill_node", step=1, offset_s=0.62, point=("Update", "during"), target=1)
    see(f"{do} {point[1]} {point[0]}", lambda seed: directed(seed, JOIN, more, fault))


@pytest.mark.parametrize("copies", [2, 3, 8])
def test_a_repetition_changes_nothing_that_is_computed(copies: int) -> None:
    """Kills, stops, joins, slow workers, more hosts; with copies from the beginning of a step."""
    tried = Tried()
    for seed in range(2000, 2030):
        schedule = replace(random_schedule(seed), copies=copies)
        assert check(schedule, tried=tried), str(tried.failure)
    assert tried.seen["duplicate won"]
    assert not any(tried.seen[what] for what in NEVER)


@pytest.mark.parametrize("copies", [2, 3])
def test_coded_sums_change_nothing_that_is_computed(copies: int) -> None:
    """Kills, stops, joins, slow workers, NaN: each micro-batch counts once in what is decoded."""
    tried = Tried()
    for seed in range(4000, 4040):
        faults = tuple(one for one in random_schedule(seed).faults if one.do not in OF_HOSTS)
        schedule = replace(coded(seed), faults=faults, copies=copies, num_workers=5)
        assert check(schedule, tried=tried), str(tried.failure)
    assert tried.seen["coded"] > 5 * tried.seen["step committed"], "most steps are"
    assert tried.seen["takeover mid-step"]
    assert not any(tried.seen[what] for what in NEVER)


def test_a_code_does_not_wait_for_one_that_stops() -> None:
    """A worker that stops for ever is as good as absent; but for who else saw the model's NaN."""
    num_seen = 0
    for seed in range(12):
        stop = Fault(do="stop_worker", step=3, point=("Compute", "during"), target=seed)
        calm = replace(coded(seed, stop), evaluate_every=0, num_workers=5, skip_nonfinite=True)
        job = Job(calm, Build(), trace_length=None)
        job.run()
        if 3 not in job.truths[0].states[-1].skipped:
            num_seen += 1
            took_s = job.commits_s[3] - job.commits_s[2]
            assert took_s < 0.5, f"seed {seed}: one that hangs is noticed after a second"
    assert num_seen > 6


@pytest.mark.parametrize("num_models", [2, 3])
def test_models_in_turn_change_nothing_that_is_computed(num_models: int) -> None:
    """Each has a truth of its own, which knows of no other. Kills, stops, joins, NaN, liars."""
    tried = Tried()
    for seed in range(5000, 5030):
        schedule = random_schedule(seed)
        faults = tuple(one for one in schedule.faults if one.do not in OF_HOSTS)
        schedule = replace(schedule, num_models=num_models, num_nodes=1, code="", faults=faults)
        assert check(schedule, tried=tried), str(tried.failure)
    assert tried.seen["takeover mid-step"]
    assert tried.seen["worker_hung"]
    assert tried.seen["membership made up for"], "a successor finds models behind"
    assert not any(tried.seen[what] for what in NEVER)


def test_models_take_turns() -> None:
    """A step of each after the other: what is leased is of the model with the least step."""
    calm = replace(directed(1), num_models=3, num_nodes=1, code="", skip_nonfinite=True)
    job = Job(calm, Build(), trace_length=None)
    job.run()
    order = [
        step_of_job(told.message.leases[0].key.model, told.message.leases[0].key.step, 3)
        for _, _, _, told in job.clock.trace
        if isinstance(told, Send) and isinstance(told.message, Leases)
    ]
    assert order == sorted(order)
    assert set(order) >= set(range(3 * job.schedule.num_steps))


def test_choosing_by_measurement_changes_nothing_that_is_computed() -> None:
    chosen = Tried()
    for seed in range(3000, 3030):
        schedule = replace(random_schedule(seed), num_steps=35)
        job = Job(schedule, Build(), trace_length=None)
        job.rules = replace(job.rules, scheduling=Chosen())
        job.run()
        chosen.seen += job.clock.seen
    assert chosen.seen["scheduling"], "long enough for a choice"


def test_a_repetition_does_not_wait_for_one_that_stops() -> None:
    """A worker that stops for ever is as good as absent: the others of its group have its share."""
    slowest_s = {}
    for policy in (Shares(helps=False), Shares(copies=2)):
        waits_s = []
        for seed in range(12):
            stop = Fault(do="stop_worker", step=3, point=("Compute", "during"), target=seed)
            calm = replace(directed(seed, stop), evaluate_every=0, skip_nonfinite=True)
            calm = replace(calm, audited=0.0)  # an audit waits for whoever is asked
            job = Job(calm, Build(), trace_length=None)
            job.rules = replace(job.rules, scheduling=policy)
            job.run()
            waits_s.append(job.commits_s[3] - job.commits_s[2])
        slowest_s[policy.name] = max(waits_s)
    assert 2 * slowest_s["frc with s=1"] < slowest_s["uncoded"], slowest_s


def test_steps_go_on_while_a_joining_node_is_frozen() -> None:
    """Faster than anybody could notice: nobody waits, not even for it to be taken for dead."""
    num_frozen = 0
    for seed in range(24):  # it joins within a step or two: not every fault strikes meanwhile
        freeze = replace(FREEZE_JOINING, offset_s=0.3 + 0.02 * seed)
        schedule = replace(directed(seed, JOIN, freeze), num_steps=40, evaluate_every=0)
        job = Job(schedule, Build(), trace_length=None)
        job.run()
        joined = any(schedule.num_nodes in one.nodes for one in job.generations.values())
        if joined or not job.clock.seen["node_joining"]:
            continue
        num_frozen += 1
        struck_s = next(
            at_s for at_s, who, what, _ in job.clock.trace if who == "fault" and "freeze" in what
        )
        commits_s = [at_s for at_s in job.commits_s if at_s > struck_s]
        gaps_s = [after - before for before, after in pairwise([struck_s, *commits_s])]
        assert max(gaps_s[:20]) < SILENT_S[0], seed
    assert num_frozen, "no fault struck while it joined"


def test_nothing_is_computed_again_when_a_node_leaves_as_planned() -> None:
    tried = Tried()
    for seed in range(10):
        leave = Fault(do="leave_node", step=2, offset_s=0.01, target=seed)
        assert check(directed(seed, leave), tried=tried), tried.failure
    assert tried.seen["node_left"] >= 8
    assert not tried.seen["granted again"]
    for seed in range(10):
        assert check(directed(seed, KILL_NODE), tried=tried), tried.failure
    assert tried.seen["granted again"], "as it is where one is lost"


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(do="lying_worker", step=1, factor=0.2, target=1)],
        [Fault(do="kill_aggregator", step=1, point=("MarkUndone", "after"))],
        [Fault(do="kill_aggregator", step=1, point=("HangUp", "after"))],
        [Fault(do="kill_aggregator", step=4, point=("SaveManifest", "after"))],
        [Fault(do="kill_coordinator", step=2), Fault(do="kill_worker", step=2, target=2)],
        [KILL_NODE],
    ],
    ids=["two liars", "taken back", "hung up", "granted", "replaced", "on hosts"],
)
def test_liars_are_named_and_nothing_that_they_said_counts(faults: list[Fault]) -> None:
    tried = Tried()
    for seed in range(12):
        assert check(directed(seed, LIAR, *faults), tried=tried), str(tried.failure)
    assert tried.seen["worker_lied"] >= 4


def lies(*where: tuple[int, int, float]) -> tuple[Fault, ...]:
    return tuple(
        Fault(do="lying_worker", step=step, target=target, factor=factor)
        for step, target, factor in where
    )


@pytest.mark.parametrize(
    ("seed", "num_nodes", "copies", "faults"),
    [
        (
            1143,
            3,
            1,
            (
                *lies((3, 2, 0.3)),
                Fault(do="join_node", step=1),
                Fault(do="kill_worker", step=7, target=2),
                Fault(do="kill_worker", step=7, target=4),
            ),
        ),
        (
            1337,
            3,
            2,
            (
                *lies((2, 3, 0.1), (6, 2, 0.3), (6, 4, 0.3), (1, 5, 0.3)),
                Fault(do="kill_worker", step=1, target=3),
            ),
        ),
        (
            1398,
            4,
            1,
            (
                *lies((2, 0, 0.3), (6, 3, 0.3), (7, 2, 0.3)),
                Fault(do="stop_worker", step=1, point=("Compute", "during"), target=2, for_s=3.0),
                Fault(do="stop_worker", step=9, point=("Compute", "during"), target=3, for_s=3.0),
            ),
        ),
    ],
    ids=["joins", "repeated", "stops"],
)
def test_many_liars_do_not_have_honest_workers_taken_to_hang(
    seed: int, num_nodes: int, copies: int, faults: tuple[Fault, ...]
) -> None:
    """Workers of other hosts, whose counters are told of once a second, but who answer."""
    schedule = replace(
        random_schedule(seed),
        faults=faults,
        num_steps=12,
        standby=True,
        audited=1.0,
        num_nodes=num_nodes,
        num_workers=3 if seed < 1398 else 4,
        copies=copies,
    )
    tried = Tried()
    assert check(schedule, tried=tried), str(tried.failure)
    assert tried.seen["worker_lied"]
    assert tried.seen["worker_hung"] <= sum(one.do == "stop_worker" for one in faults)


def test_where_all_is_audited_somebody_must_help_a_worker_that_is_left_alone() -> None:
    """No more are started, since too many died: two must answer alike."""
    kills = [Fault(do="kill_worker", step=step) for step in range(10)]
    see(
        "scaled after giving up",
        lambda seed: replace(directed(seed, *kills), audited=1.0, num_workers=4),
    )


@pytest.mark.parametrize("do", ["kill_worker", "stop_worker"])
@pytest.mark.parametrize("point", WORKER_POINTS, ids=" ".join)
def test_a_worker_may_die_or_stop_anywhere(do: str, point: tuple[str, str]) -> None:
    fault = Fault(do=do, step=2, point=point, for_s=0.5 if "stop" in do else 0.0)
    see(f"{do} {point[1]} {point[0]}", lambda seed: directed(seed, fault))


@pytest.mark.parametrize("point", COORDINATOR_POINTS, ids=" ".join)
def test_a_coordinator_may_die_anywhere(point: tuple[str, str]) -> None:
    kill = Fault(do="kill_coordinator", step=1, point=point)
    others = [
        Fault(do="stop_worker", step=1),
        *[Fault(do="kill_worker", step=2, target=1) for _ in range(3)],
        Fault(do="kill_aggregator", step=3),
    ]
    see(f"kill_coordinator {point[1]} {point[0]}", lambda seed: directed(seed, kill, *others))


def see(what: str, make: Callable[[int], Schedule]) -> None:
    """Try the schedules of seeds 0, 1, ... until something is seen; none may break a rule."""
    tried = Tried()
    for seed in range(NUM_TRIES):
        assert check(make(seed), tried=tried), str(tried.failure)
        if tried.seen[what]:
            return
    pytest.fail(f"{what!r} is not seen in {NUM_TRIES} schedules")


def test_processes_share_the_work_and_find_the_same() -> None:
    told: list[int] = []
    together = search(range(30), processes=2, found=told.append)
    alone = search(range(30))
    assert together.failure is None
    assert together.seen == alone.seen
    assert (together.num_schedules, together.num_faults) == (30, alone.num_faults)
    assert told == [25, 30]


def test_a_deadline_ends_an_endless_search() -> None:
    assert search(iter(int, 1), deadline_s=0.0).num_schedules == 0
