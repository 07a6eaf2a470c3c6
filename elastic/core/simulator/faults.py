"""Fault schedules as data: what happens, when, to whom. A seed gives a schedule.

Nothing here acts; the job strikes where a fault says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

AGGREGATOR_POINTS = (
    ("SaveRow", "before"),
    ("SaveRow", "during"),
    ("SaveManifest", "before"),
    ("SaveManifest", "after"),
    ("MarkDone", "after"),
    ("Send", "before"),
    ("Send", "after"),
    ("Update", "before"),
    ("Update", "during"),
    ("Update", "after"),
    ("SaveState", "before"),
    ("SaveState", "after"),
    ("int", "after"),  # the key word, stored after the commit record
    ("OpenSlot", "before"),
    ("OpenSlot", "after"),
    ("DropSlot", "before"),
    ("DropSlot", "after"),
    ("SaveMembership", "before"),
    ("SaveMembership", "after"),
    ("HangUp", "before"),
    ("HangUp", "after"),
    ("Finish", "before"),
)
NODE_POINTS = (
    ("SendNode", "before"),
    ("SendNode", "after"),
    ("SavePrepared", "before"),
    ("SavePrepared", "after"),
    ("SaveState", "before"),
    ("SaveState", "after"),
    ("SaveManifest", "after"),
    ("Update", "during"),
    ("MarkUndone", "after"),
    ("GiveUp", "before"),
    ("GiveUp", "after"),
)
JOIN_POINTS = (
    ("SavePrepared", "after"),
    ("Update", "after"),
    ("GiveUp", "after"),
    ("SaveState", "after"),
)
WORKER_POINTS = (
    ("Compute", "during"),
    ("Encode", "during"),
    ("Commit", "before"),
    ("Commit", "after"),
)
COORDINATOR_POINTS = (
    ("SetMembership", "before"),
    ("SetMembership", "after"),
    ("StartWorker", "before"),
    ("StartWorker", "after"),
    ("KillWorker", "after"),
    ("StartAggregator", "after"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`do` it `offset_s` after `step` has begun, or at the first `point` from then on.

    `target` picks a living worker, modulo their number; `for_s` is how long it lasts (0: for
    ever), `factor` how much slower, or how many in a row.
    """

    do: str
    step: int
    offset_s: float = 0.0
    target: int = 0
    point: tuple[str, str] | None = None
    for_s: float = 0.0
    factor: float = 1.0

    def __str__(self) -> str:
        parts = [f"{self.do} at step {self.step} + {self.offset_s:.4f} s"]
        if self.point:
            parts.append(f"{self.point[1]} {self.point[0]}")
        shown = {"target": 0, "for_s": 0.0, "factor": 1.0}
        for one in fields(self):
            value = getattr(self, one.name)
            if value != shown.get(one.name, value):
                parts.append(f"{one.name}={value:.4g}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One simulated job and its faults. `seed` decides everything that the rest does not say."""

    seed: int
    num_steps: int
    num_workers: int
    num_micro_batches: int
    standby: bool
    skip_nonfinite: bool
    faults: tuple[Fault, ...]
    evaluate_every: int = 0
    num_evaluated: int = 0
    num_nodes: int = 1
    copies: int = 1
    audited: float = 0.0
    code: Literal["", "c_code", "crc"] = ""
    num_models: int = 1

    def __str__(self) -> str:
        head = (
            f"seed {self.seed}: {self.num_steps} steps of {self.num_micro_batches} micro-batches,"
            f" {self.num_workers} workers, {'with' if self.standby else 'no'} standby"
        )
        if self.num_nodes > 1:
            head += f", {self.num_nodes} nodes"
        if self.copies > 1:
            head += f", each computed by {self.copies}"
        if self.code:
            head += f" ({self.code})"
        if self.num_models > 1:
            head += f", {self.num_models} models in turn"
        if self.audited:
            head += f", {self.audited:.0%} audited"
        if self.evaluate_every:
            head += f", {self.num_evaluated} evaluated every {self.evaluate_every} steps"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults)])


def random_schedule(seed: int) -> Schedule:
    """At least 5 steps, 3 workers, 3 faults."""
    rng = random.Random(seed)
    num_steps = rng.randint(5, 8) if rng.random() < 0.8 else rng.randint(15, 25)
    standby = rng.random() < 0.75
    num_nodes = rng.choice((1, 1, 2, 3))
    num_steps_of_a_join = rng.randint(12, 40)
    draw = _Draw(rng, num_steps, standby=standby, num_nodes=num_nodes)
    faults: list[Fault] = []
    while len(faults) < rng.randint(3, 8):
        faults += draw.some()
    if any(fault.do in ("join_node", "late_nodes") for fault in faults):
        num_steps = num_steps_of_a_join
    schedule = Schedule(
        seed=seed,
        num_steps=num_steps,
        num_workers=rng.randint(3, 5),
        num_micro_batches=rng.randint(3, 8),
        standby=standby,
        skip_nonfinite=rng.random() < 0.9,
        faults=tuple(sorted(faults, key=lambda fault: (fault.step, fault.offset_s))),
        evaluate_every=rng.choice((0, 0, 1, 2, 3)),
        num_evaluated=rng.randint(1, 9),
        num_nodes=num_nodes,
        copies=rng.choice((1, 1, 1, 2, 3)),
        audited=random.Random(f"audited {seed}").choice((0.0, 0.0, 0.0, 0.3)),
    )
    if num_nodes == 1 and schedule.copies > 1 and not any("node" in one.do for one in faults):
        return replace(schedule, code=random.Random(f"coded {seed}").choice(("", "c_code", "crc")))
    return schedule


class _Draw:
    """Draws faults of every kind."""

    def __init__(
        self, rng: random.Random, num_steps: int, *, standby: bool, num_nodes: int
    ) -> None:
        self._rng = rng
        self._num_steps = num_steps
        self._standby = standby
        self._points = AGGREGATOR_POINTS + (NODE_POINTS if num_nodes > 1 else ())
        kinds: list[tuple[int, Callable[[], list[Fault]]]] = [
            (20, self._kill_worker),
            (14, self._stop_worker),
            (20, self._kill_aggregator),
            (6, self._stop_aggregator),
            (10, self._kill_coordinator),
            (8, self._slow_worker),
            (6, self._scale),
            (6, self._remove),
            (8, self._delay),
            (3, self._flap),
            (3, self._slow_start),
            (6, self._machine_errs),
            (8, self._zombie),
            (5, self._all_workers),
            (5, self._unheard),
            (2, self._stop_job),
            (2, self._fail_job),
            (2, self._preempt_job),
            (5, self._join_node),
        ]
        if num_nodes > 1:
            kinds += [(20, self._kill_node), (20, self._cut_node), (6, self._split_coordinator)]
            kinds += [(10, self._cut_link), (10, self._freeze_node), (2, self._late_nodes)]
            kinds += [(8, self._leave_node)]
        self._weights = [weight for weight, _ in kinds]
        self._kinds = [kind for _, kind in kinds]

    def some(self) -> list[Fault]:
        return self._rng.choices(self._kinds, self._weights)[0]()

    def _at(self, do: str, **more: object) -> Fault:
        step = self._rng.randrange(self._num_steps)
        offset_s = self._rng.uniform(0, 2.0 if step == 0 else 0.15)
        target = self._rng.randrange(8)
        return Fault(**{"do": do, "step": step, "offset_s": offset_s, "target": target, **more})  # type: ignore[arg-type]

    def _maybe_point(self, points: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
        return self._rng.choice(points) if self._rng.random() < 0.7 else None

    def _pause_s(self) -> float:
        return self._rng.choice((0.02, 0.1, 0.3, 1.0, 3.0)) * self._rng.uniform(0.5, 1.5)

    def _kill_worker(self) -> list[Fault]:
        return [self._at("kill_worker", point=self._maybe_point(WORKER_POINTS))]

    def _stop_worker(self) -> list[Fault]:
        for_s = 0.0 if self._rng.random() < 0.2 else self._pause_s()
        return [self._at("stop_worker", point=self._maybe_point(WORKER_POINTS), for_s=for_s)]

    def _kill_aggregator(self) -> list[Fault]:
        return [self._at("kill_aggregator", point=self._maybe_point(self._points))]

    def _stop_aggregator(self) -> list[Fault]:
        for_s = 0.0 if self._standby and self._rng.random() < 0.3 else self._pause_s()
        point = self._maybe_point(self._points)
        return [self._at("stop_aggregator", point=point, for_s=for_s)]

    def _kill_coordinator(self) -> list[Fault]:
        return [self._at("kill_coordinator", point=self._maybe_point(COORDINATOR_POINTS))]

    def _slow_worker(self) -> list[Fault]:
        factor = self._rng.choice((2.0, 5.0, 30.0))
        return [self._at("slow_worker", factor=factor, for_s=self._pause_s())]

    def _scale(self) -> list[Fault]:
        return [self._at("add_worker" if self._rng.random() < 0.5 else "drop_worker")]

    def _remove(self) -> list[Fault]:
        return [self._at("remove_worker" if self._rng.random() < 0.5 else "leave_worker")]

    def _delay(self) -> list[Fault]:
        factor = self._rng.choice((0.005, 0.03, 0.1))
        return [self._at("delay_messages", factor=factor, for_s=self._pause_s())]

    def _flap(self) -> list[Fault]:
        return [self._at("flap", factor=float(self._rng.randint(2, 6))), *self._kill_worker()]

    def _slow_start(self) -> list[Fault]:
        return [self._at("slow_start", for_s=3 * self._pause_s()), *self._kill_worker()]

    def _machine_errs(self) -> list[Fault]:
        if self._rng.random() < 0.5:
            return [self._at("machine_nan")]
        return [self._at("sick_worker", for_s=self._pause_s())]

    def _zombie(self) -> list[Fault]:
        """A worker stops, the aggregator changes meanwhile, and it comes back from the dead."""
        stop = self._at("stop_worker", for_s=self._rng.uniform(0.5, 4.0))
        faults = [stop]
        for do in ("remove_worker", "kill_aggregator", "kill_coordinator"):
            if self._rng.random() < 0.6:
                offset_s = stop.offset_s + self._rng.uniform(0, 0.5)
                faults.append(Fault(do=do, step=stop.step, offset_s=offset_s, target=stop.target))
        if self._rng.random() < 0.5:
            offset_s = stop.offset_s + stop.for_s
            faults.append(Fault(do="kill_aggregator", step=stop.step, offset_s=offset_s))
        return faults

    def _unheard(self) -> list[Fault]:
        """A worker is taken to hang, but comes back; the aggregator that dismissed it is gone."""
        stop = self._at(
            "stop_worker",
            point=self._rng.choice(WORKER_POINTS),
            for_s=self._rng.uniform(0.3, 1.2),
        )
        point = self._rng.choice(
            (("SaveMembership", "after"), ("HangUp", "after"), ("DropSlot", "after"))
        )
        kill = Fault(
            do="kill_aggregator", step=stop.step, offset_s=stop.offset_s + 0.05, point=point
        )
        slow = Fault(do="slow_kill", step=stop.step, for_s=self._rng.uniform(1.0, 4.0))
        return [stop, slow, kill]

    def _stop_job(self) -> list[Fault]:
        return [self._at("stop_job")]

    def _fail_job(self) -> list[Fault]:
        """The user's code raises an error in a worker's process."""
        return [self._at("fail_job")]

    def _preempt_job(self) -> list[Fault]:
        """The machine is taken away before the step can end."""
        return [self._at("preempt_job")]

    def _kill_node(self) -> list[Fault]:
        """A host vanishes with everything on it."""
        return [self._at("kill_node", point=self._maybe_point(NODE_POINTS))]

    def _cut_node(self) -> list[Fault]:
        """Nothing reaches a host for a while; what is there goes on."""
        return [self._at("cut_node", point=self._maybe_point(NODE_POINTS), for_s=self._loss_s())]

    def _cut_link(self) -> list[Fault]:
        """Two hosts do not reach each other, but all others."""
        point = self._maybe_point(NODE_POINTS)
        return [self._at("cut_link_node", point=point, for_s=self._loss_s())]

    def _freeze_node(self) -> list[Fault]:
        """All of a host stops."""
        point = self._maybe_point(NODE_POINTS)
        return [self._at("freeze_node", point=point, for_s=self._loss_s())]

    def _late_nodes(self) -> list[Fault]:
        """Hosts come after the job has begun."""
        return [self._at("late_nodes", step=0, offset_s=0.0, for_s=self._rng.uniform(0.3, 2.0))]

    def _join_node(self) -> list[Fault]:
        """A new host comes; something strikes soon after, the newcomer more often than others."""
        join = self._at("join_node")
        faults = [join]
        while self._rng.random() < 0.6:
            do = self._rng.choice(
                ("kill_node", "cut_node", "freeze_node", "cut_link_node", "kill_aggregator")
            )
            offset_s = join.offset_s + self._rng.uniform(0.4, 1.2)
            more = {"for_s": self._pause_s(), "point": self._maybe_point(JOIN_POINTS)}
            target = self._rng.choice((-1, -1, 0, 1))
            faults.append(self._at(do, step=join.step, offset_s=offset_s, target=target, **more))
        return faults

    def _leave_node(self) -> list[Fault]:
        """A host is to go as planned."""
        return [self._at("leave_node")]

    def _loss_s(self) -> float:
        """For ever, now and then; but never while the job waits for all nodes to begin on."""
        return 0.0 if self._rng.random() < 0.2 else self._pause_s()

    def _split_coordinator(self) -> list[Fault]:
        """Ray takes a coordinator for dead and starts another, and both act."""
        split = self._at("split_coordinator", for_s=self._pause_s())
        return [split, *self._some_trouble(split)]

    def _some_trouble(self, first: Fault) -> list[Fault]:
        """Something for a coordinator to decide about, soon after the first fault."""
        do = self._rng.choice(("kill_worker", "kill_node", "cut_node", "add_worker"))
        offset_s = first.offset_s + self._rng.uniform(0, 0.3)
        return [Fault(do=do, step=first.step, offset_s=offset_s, for_s=1.0)]

    def _all_workers(self) -> list[Fault]:
        """Every worker is lost at once."""
        one = self._at("kill_worker" if self._rng.random() < 0.6 else "stop_worker")
        return [
            Fault(
                do=one.do, step=one.step, offset_s=one.offset_s, target=0 if "kill" in one.do else n
            )
            for n in range(6)
        ]
