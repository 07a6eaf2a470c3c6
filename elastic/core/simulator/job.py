"""One simulated job: its processes, its memory, the faults that strike it, and what was seen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TypeVar

from elastic.core.protocol.aggregator import Rules
from elastic.core.protocol.coordinator import Life, Limits
from elastic.core.protocol.events import Committed
from elastic.core.protocol.messages import (
    Combine,
    Dismiss,
    Granted,
    Key,
    Leases,
    Manifest,
    Membership,
    Message,
    Refused,
    Report,
    Revoke,
    State,
    Stop,
)
from elastic.core.protocol.orders import NodeMessage
from elastic.core.protocol.wire import decode, encode
from elastic.core.simulator.aggregator_process import AggregatorProcess
from elastic.core.simulator.build import Build
from elastic.core.simulator.coordinator_process import CoordinatorProcess
from elastic.core.simulator.faults import Fault, Schedule
from elastic.core.simulator.invariants import LIVENESS_S, Checker, Violation
from elastic.core.simulator.memory import Memory
from elastic.core.simulator.network import Machine, Network
from elastic.core.simulator.truth import NUM_CHUNKS, make_truth
from elastic.core.simulator.worker_process import WorkerProcess
from elastic.core.simulator.world import Clock, Process
from policies.auditing import Audits
from policies.coding.simulation import Coded
from policies.hangs import Silence
from policies.restarts import BackOff
from policies.scheduling import Shares

M = TypeVar("M", bound=Message | NodeMessage)

MAX_EVENTS = 50_000  # and for each step as many as none needed that was right
MAX_EVENTS_OF_A_STEP = 1_000
START_S = 30.0  # longer than any start here
PATIENCE_S = 3.0  # longer than a silence that ends
PERSON_S = 5.0  # after so long without anybody who can go on somebody scales
JOIN_S = 3.0  # a node that all can reach is a member after so long of steps and no fault


class Job:
    """Runs one schedule to the end of the job, or to the first violation."""

    def __init__(self, schedule: Schedule, build: Build, *, trace_length: int | None = 40) -> None:
        self.schedule = schedule
        self.build = build
        self.clock = Clock(schedule.seed, trace_length=trace_length)
        self.truths = [
            make_truth(
                schedule.seed,
                num_steps=schedule.num_steps,
                num_micro_batches=schedule.num_micro_batches,
                skip=schedule.skip_nonfinite,
                evaluate_every=schedule.evaluate_every,
                num_evaluated=schedule.num_evaluated,
                model=model,
            )
            for model in range(schedule.num_models)
        ]
        self.machines: dict[int, Machine] = {}
        for _ in range(schedule.num_nodes):
            self._add_machine()
        self.generations: dict[int, Membership] = {}
        self.checkers = [
            Checker(truth, {0: memory}, num_nodes=schedule.num_nodes)
            for truth, memory in zip(self.truths, self.machines[0].memories, strict=True)
        ]
        for checker in self.checkers:
            checker.may_redo = bool(schedule.code)
        self.rules = Rules(
            num_steps=schedule.num_steps,
            num_micro_batches=schedule.num_micro_batches,
            num_chunks=NUM_CHUNKS,
            skip_nonfinite=schedule.skip_nonfinite,
            evaluate_every=schedule.evaluate_every,
            num_evaluated=schedule.num_evaluated,
            scheduling=_scheduling(schedule),
            hangs=Silence(factor=8.0, floor_s=0.2),
            audits=Audits(seed=schedule.seed, probability=schedule.audited)
            if schedule.audited
            else None,
        )
        self._liars: set[int] = set()
        self.limits = Limits(
            min_workers=1,
            max_workers=schedule.num_workers + 2,
            standby=schedule.standby,
            restarts=BackOff(limit=7),
            start_s=START_S,
            replicas=self.rules.replicas,
            patience_s=PATIENCE_S,
        )
        self.workers: dict[int, WorkerProcess] = {}
        self.aggregators: list[AggregatorProcess] = []
        self.acting: list[AggregatorProcess] = []
        self.finished = False
        self.stops: list[Stop] = []
        self.num_fired = 0
        self._armed: list[tuple[Fault, str]] = []
        self._num_coordinators = 0
        self._step = -1
        self._quiet_s = 0.0
        self._calm_s = 0.0
        self.commits_s: list[float] = []
        self._granted: set[tuple[Key, int]] = set()
        self._flaps = 0
        self._slow_start_until_s = 0.0
        self._slow_kill_s = 0.0
        self._errs: set[str] = set()
        self._erred: dict[tuple[Key, int], int] = {}
        self._holders: dict[tuple[Key, int], list[int]] = {}
        self._alone: set[tuple[int, Key, int]] = set()
        self._fresh: int | None = None
        self.network = Network(self.clock, self.machines)

    def run(self) -> None:
        """Raises Violation at the first event after which an invariant does not hold."""
        self._start_coordinator()
        self._begin_step(0)
        clock, acting = self.clock, self.acting
        most = MAX_EVENTS + MAX_EVENTS_OF_A_STEP * self.schedule.num_steps * len(self.truths)
        while not self.finished:
            clock.pop()
            for checker in self.checkers:
                checker.after_event(acting)
            if self._all_lost():
                clock.seen["all nodes lost"] += 1
                return
            if clock.now_s - self._quiet_s > PERSON_S:
                self._stands_still()
            if clock.num_events > most:
                raise Violation(f"{most} events and no end: it runs in a circle")

    def _stands_still(self) -> None:
        """For ever only where too few workers live and no more are started; then have some.

        Where all is audited two must answer alike; of three that live two are honest, or one will
        be replaced.
        """
        proto = self.coordinator.proto
        least = 3 if self.schedule.audited >= 1 else 1
        if proto.has_given_up and sum(one.alive for one in self.workers.values()) < least:
            self.clock.seen["scaled after giving up"] += 1
            proto.scale(proto.target)
            self._touch(0.0)
        elif self.clock.now_s - self._quiet_s > LIVENESS_S:
            raise Violation(f"no step was committed for {LIVENESS_S:.0f} s without a fault")

    # --------------------------------------------------------------- processes

    def has_heir(self, dead: AggregatorProcess) -> bool:
        """Whether somebody stands by in its place; if not, whoever calls its host is refused."""
        return any(
            one.alive and one.ready and one.machine is dead.machine for one in self.aggregators
        )

    def process(self, pid: int) -> AggregatorProcess | None:
        return next((one for one in self.aggregators if one.pid == pid), None)

    def start_delay_s(self) -> float:
        slow_s = max(0.0, self._slow_start_until_s - self.clock.now_s)
        return self.clock.rng.uniform(0.2, 0.6) + slow_s

    def start_worker(self, worker: int, node: int) -> None:
        old = self.workers.get(worker)
        if old is not None and old.alive:
            raise Violation(f"worker {worker} is started twice")
        machine = self.machines[node]
        process = WorkerProcess(self, worker, machine)
        self.workers[worker] = process
        machine.workers.add(worker)
        if not machine.is_alive or machine.has_left:
            process.kill()
        self.clock.note(process.name, "starts")
        if self._flaps:
            self._flaps -= 1
            self._disturb(0.0)
            delay_s = self.clock.rng.uniform(0.2, 1.0)
            self.clock.push(delay_s, lambda: self._flap(process))

    def _flap(self, process: WorkerProcess) -> None:
        self._disturb(0.0)
        process.kill()

    def kill_later(self, worker: int) -> None:
        rng, process = self.clock.rng, self.workers[worker]
        delay_s = rng.uniform(0, 0.01) if rng.random() < 0.7 else rng.uniform(0, 2.0)
        delay_s += self._slow_kill_s
        self.clock.push(delay_s, process.kill)

    def life(self, worker: int) -> Life:
        process = self.workers[worker]
        if not process.alive and self.clock.now_s > process.dead_s + process.notice_s:
            return Life.DEAD
        return Life.ALIVE if process.ready else Life.STARTING

    def worker_died(self, process: WorkerProcess) -> None:
        process.dead_s = self.clock.now_s
        process.notice_s = self.clock.rng.uniform(0, 0.3)

    def worker_of(self, process: Process) -> int:
        assert isinstance(process, WorkerProcess)
        return process.worker

    def start_aggregator(self, node: int) -> None:
        machine = self.machines[node]
        process = AggregatorProcess(self, len(self.aggregators), machine)
        self.aggregators.append(process)
        self.clock.note(process.name, "starts on node", node)
        if not machine.is_alive or machine.has_left:
            process.kill()

    def try_lock(self, process: AggregatorProcess) -> bool:
        if process.machine.lock_owner is not None:
            return False
        process.machine.lock_owner = process
        process.machine.memory.active_pid = process.pid
        return True

    def listen(self, process: AggregatorProcess) -> None:
        process.machine.listener = process
        for worker in self.workers.values():
            if worker.alive and worker.ready and worker.machine is process.machine:
                worker.wake(self.clock.rng.uniform(1e-4, 5e-3))
        self.network.link_all(process.machine)

    def aggregator_died(self, process: AggregatorProcess) -> None:
        machine = process.machine
        if process in self.acting:
            self.acting.remove(process)
        if machine.listener is process:
            machine.listener = None
        if machine.lock_owner is process:
            machine.lock_owner = None
            for other in self.aggregators:
                if other.alive and other.ready and other.machine is machine:
                    other.look_again()

    # ------------------------------------------------------------------- nodes

    def _add_machine(self) -> None:
        node, schedule = len(self.machines), self.schedule
        num = max(schedule.num_micro_batches, schedule.num_evaluated)
        first = [truth.states[0] for truth in self.truths]
        memories = tuple(Memory(num, state, state.key.word) for state in first)
        self.machines[node] = Machine(node, memories, comes_s=self.clock.now_s)

    def _heal(self, machine: Machine) -> None:
        self._disturb(0.0)
        self.network.heal(machine)

    def put_generation(self, membership: Membership) -> Membership | None:
        """Put-if-absent, as Ray's GCS does it: the one that exists already, if one does."""
        exists = self.generations.get(membership.generation)
        if exists is not None and self.build.needs_generations:
            self.clock.seen["generation refused"] += 1
            return exists
        self.generations[membership.generation] = membership
        newest = self._newest
        for model, checker in enumerate(self.checkers):
            checker.memories = self._memories(newest.nodes, model)
            checker.joining = self._memories(newest.joining, model)
            checker.is_alone = len(self.machines) == 1
        return None

    @property
    def _newest(self) -> Membership:
        return self.generations[max(self.generations)]

    def _memories(self, nodes: Iterable[int], model: int = 0) -> dict[int, Memory]:
        """Those that are still there."""
        machines = {node: self.machines[node] for node in nodes}
        return {
            node: one.memories[model]
            for node, one in machines.items()
            if one.is_alive and not one.has_left
        }

    def node_left(self, machine: Machine) -> None:
        """A fenced node ends everything of the job that it runs."""
        self.clock.seen["node fenced"] += 1
        machine.has_left = True
        self._end_processes(machine)

    def _kill_node(self, machine: Machine) -> None:
        machine.is_alive = False
        machine.dead_s = self.clock.now_s + self.clock.rng.uniform(0.0, 0.7)
        self._end_processes(machine)

    def _end_processes(self, machine: Machine) -> None:
        self._disturb(0.0)
        for checker in self.checkers:
            checker.memories.pop(machine.node, None)
            checker.joining.pop(machine.node, None)
        aggregators = [one for one in self.aggregators if one.machine is machine]
        workers = [one for one in self.workers.values() if one.machine is machine]
        for process in (*aggregators, *workers):
            process.kill()

    def nodes(self) -> dict[int, int]:
        """The nodes that Ray thinks are there, and how many aggregators live on each."""
        return {
            node: sum(one.alive for one in self.aggregators if one.machine is machine)
            for node, machine in self.machines.items()
            if not machine.has_left
            and machine.comes_s <= self.clock.now_s
            and (machine.is_alive or self.clock.now_s < machine.dead_s)
        }

    def _all_lost(self) -> bool:
        """Whether no member lives: what the others hold is older."""
        if len(self.machines) == 1 or not self.generations:
            return False
        return not self._memories(self._newest.nodes)

    def _connected_members(self) -> set[int]:
        """As whoever leads knows them."""
        leads = (one.proto for one in self.acting if one.proto and one.proto.connected)
        return {one for lead in leads for one in lead.connected & set(lead.membership.members)}

    def _start_coordinator(self) -> None:
        self._num_coordinators += 1
        self.coordinator = CoordinatorProcess(
            self, self._num_coordinators, self.schedule.num_workers
        )

    def coordinator_died(self, process: CoordinatorProcess) -> None:
        if process is self.coordinator:
            self.clock.push(self.clock.rng.uniform(0.2, 1.5), self._start_coordinator)

    # ------------------------------------------------------------------ the step

    def save_state(self, machine: Machine, state: State) -> None:
        """`_step` counts those of all models."""
        memory, checker = machine.memories[state.model], self.checkers[state.model]
        checker.saving(machine.node, state)
        step = state.step - memory.state.step + sum(one.state.step for one in machine.memories)
        if step > max(self._step, 0):
            checker.committing(state.step, memory.membership)
        memory.state = state
        memory.serial += 1
        if step > self._step:
            self._begin_step(step)

    def _begin_step(self, step: int) -> None:
        self._step = step
        if self.clock.now_s - max([*self.commits_s[-1:], 0.0]) > 1.0:
            self._calm_s = max(self._calm_s, self.clock.now_s)  # nobody was there to receive from
        self._touch(0.0)
        self._check_joining()
        for fault in self.schedule.faults:
            if fault.step == step:
                self.clock.push(fault.offset_s, partial(self._fire, fault))

    def _check_joining(self) -> None:
        """Nobody copies for ever."""
        if not self.generations or self.finished:
            return
        for node in self._newest.joining:
            machine = self.machines[node]
            calm_s = self.clock.now_s - max(self._calm_s, machine.comes_s)
            if calm_s > JOIN_S and self.network.reaches_all(machine):
                raise Violation(f"node {node} is no member after {calm_s:.1f} s without a fault")

    def told(self, report: Report) -> None:
        """Whoever leads says what a coordinator must know."""
        newest = self._newest if self.generations else Membership()
        if not report.leads or report.node != newest.nodes[0]:
            return  # it does not know yet that it leads no more
        for node, memory in self._memories(report.ready).items():
            self.checkers[0].ready(node, memory, report.step)

    def committed(self, committed: Committed) -> None:
        self.commits_s.append(self.clock.now_s)
        self.clock.seen["step committed"] += 1
        self.clock.seen["duplicate"] += committed.num_duplicates

    def machine_errs(self, process: WorkerProcess, key: Key, micro_batch: int) -> bool:
        """Whether this result comes out as NaN by the machine's fault.

        Never such that two workers, or one that was alone, see it twice: that is by the rules the
        model's own, and no invariant.
        """
        once = process.name in self._errs
        if not once and process.sick_until_s < self.clock.now_s:
            return False
        before = self._erred.get((key, micro_batch))
        if before is not None:
            alone = (process.worker, key, micro_batch) in self._alone
            if before != process.worker or once or alone:
                return False
        self._errs.discard(process.name)
        self._erred[key, micro_batch] = process.worker
        self.clock.seen["machine's NaN"] += 1
        return True

    def over_the_wire(self, message: M) -> M:
        """In every fourth schedule messages go through their bytes."""
        if self.schedule.seed % 4:
            return message
        same: M = decode(encode(message))  # type: ignore[assignment]
        return same

    def watch_message(self, worker: int, message: Message) -> None:
        """Count what is worth being seen."""
        seen = self.clock.seen
        match message:
            case Leases(leases):
                self._watch_leases(worker, leases)
            case Granted(lease) if lease.combine is Combine.CODED:
                seen["coded"] += 1
            case Granted(lease):
                if self._fresh != worker:
                    seen["already yours"] += 1
                self._fresh = None
                holders = self._holders.get((lease.key, lease.micro_batches[0]), [])
                if len(holders) > 1 and holders[0] != worker:
                    seen["duplicate won"] += 1
            case Refused(_, reason):
                seen[
                    "refused: " + ("sum" if reason.startswith("sum") else reason.split(":")[0])
                ] += 1
            case Dismiss(reason):
                seen["dismissed: " + reason] += 1
            case Revoke():
                seen["revoke"] += 1

    def _watch_leases(self, worker: int, leases: tuple) -> None:  # type: ignore[type-arg]
        others = self._connected_members() - {worker}
        for lease in leases:
            for micro_batch in lease.micro_batches:
                self._holders.setdefault((lease.key, micro_batch), []).append(worker)
                if not others:
                    self._alone.add((worker, lease.key, micro_batch))

    def accused(self, worker: int | None) -> None:
        """A worker is said to have lied. NaN beside two numbers that agree is a lie, too."""
        if worker not in self._liars and worker not in self._erred.values():
            raise Violation(f"worker {worker} is said to have lied, and is honest")

    def granted_now(self, worker: int, manifest: Manifest) -> None:
        """A grant. Where others held the same before, it was computed again."""
        if not manifest.micro_batches:
            return  # what was granted is taken back
        self._fresh = worker
        name = manifest.key, manifest.micro_batches[-1]
        self.clock.seen["granted again"] += name in self._granted
        self._granted.add(name)

    # -------------------------------------------------------------------- faults

    def _touch(self, for_s: float) -> None:
        """Something happened: the next step may take its time from the end of it on."""
        self._quiet_s = max(self._quiet_s, self.clock.now_s + for_s)

    def _disturb(self, for_s: float) -> None:
        """It was a fault: a node that joins may need its time, too."""
        self._touch(for_s)
        self._calm_s = max(self._calm_s, self.clock.now_s + for_s)

    def _fire(self, fault: Fault) -> None:
        self._disturb(fault.for_s)
        if fault.point is not None:
            owner = self._owner(fault)
            if owner is not None:
                self._armed.append((fault, owner))
            return
        self._strike(fault, self._target(fault))

    def _owner(self, fault: Fault) -> str | None:
        """The name of the process that the fault waits for, without its number if any will do."""
        if fault.do.endswith("_worker"):
            process = self._target(fault)
            return process.name if process is not None else None
        return "aggregator" if fault.do.endswith("_node") else fault.do.split("_")[1]

    def _target(self, fault: Fault) -> Process | None:
        if fault.do.endswith("aggregator") or fault.do.endswith("node"):
            return self.acting[fault.target % len(self.acting)] if self.acting else None
        if fault.do.endswith("coordinator"):
            return self.coordinator if self.coordinator.alive else None
        living = [one for one in self.workers.values() if one.alive]
        return living[fault.target % len(living)] if living else None

    def point(self, process: Process, name: str, when: str, seconds: float = 0.0) -> None:
        """A process is at a named point; a fault that waits for it strikes."""
        for entry in self._armed:
            fault, owner = entry
            if fault.point == (name, when) and process.name.startswith(owner):
                self._armed.remove(entry)
                self.clock.seen[f"{fault.do} {when} {name}"] += 1
                if seconds:
                    delay_s = self.clock.rng.uniform(0, seconds)
                    self.clock.push(delay_s, partial(self._strike, fault, process))
                else:
                    self._strike(fault, process)
                return

    def _strike(self, fault: Fault, process: Process | None) -> None:
        self._disturb(fault.for_s)
        self.num_fired += 1
        self.clock.seen[fault.do] += 1
        self.clock.note("fault", str(fault))
        match fault.do:
            case "split_coordinator":
                self._split_coordinator(fault.for_s)
            case "flap":
                self._flaps = int(fault.factor)
            case "slow_kill":
                self._slow_kill_s = fault.for_s
            case "slow_start":
                self._slow_start_until_s = self.clock.now_s + fault.for_s
            case "delay_messages":
                self.clock.extra_latency_s = fault.factor
                self.clock.push(fault.for_s, self._end_delay)
            case "late_nodes":
                for node in range(1 + fault.target % 2, len(self.machines)):
                    self.machines[node].comes_s = self.clock.now_s + fault.for_s
            case "join_node":
                self._add_machine()
            case "stop_job":
                self.stops.append(Stop("asked to"))
            case "preempt_job":
                self.stops.append(Stop("no time is left", at_once=True))
            case "fail_job":
                self.stops.append(Stop("the task raised an error", failed=True))
            case "add_worker":
                self._scale(1)
            case "drop_worker":
                self._scale(-1)
            case _ if process is None or not process.alive:
                self.clock.seen["no target"] += 1
            case "kill_worker" | "kill_aggregator" | "kill_coordinator":
                process.kill()
            case "stop_worker" | "stop_aggregator":
                process.stop()
                if fault.for_s:
                    self.clock.push(fault.for_s, process.resume)
                if isinstance(process, AggregatorProcess):
                    self.network.froze(process)
            case _ if isinstance(process, AggregatorProcess):
                self._strike_node(fault, process.machine)
            case _ if isinstance(process, WorkerProcess):
                self._trouble(fault, process)

    def _split_coordinator(self, for_s: float) -> None:
        """The old one is taken for dead, and acts on for a while."""
        old = self.coordinator
        if old.alive:
            self._start_coordinator()
            self.clock.push(for_s, old.kill)

    def _strike_node(self, fault: Fault, machine: Machine) -> None:
        """Never the last member that could go on."""
        others = [
            self.machines[node]
            for node in self.checkers[0].memories
            if node != machine.node and not self.machines[node].is_lost
            if fault.do == "kill_node" or not self.machines[node].departs
        ]
        too_early = fault.do != "kill_node" and not fault.for_s and self._step == 0
        if too_early or not others or not machine.is_alive or machine.is_cut:
            self.clock.seen["no target"] += 1
            return
        if fault.do == "leave_node":
            machine.departs = True
            if self.coordinator.alive:
                self.coordinator.proto.leave(machine.node)
            return
        if fault.do == "kill_node":
            self._kill_node(machine)
            return
        machine.is_lost = machine.is_lost or not fault.for_s
        if fault.do == "freeze_node":
            self._freeze(machine, fault.for_s)
            return
        if fault.do == "cut_node":
            self.network.cut(machine)
        else:
            self.network.cut_between(machine, others[fault.target % len(others)])
        if fault.for_s:
            self.clock.push(fault.for_s, partial(self._heal, machine))

    def _freeze(self, machine: Machine, for_s: float) -> None:
        """Everything on a host stops; what it has not read yet it reads when it wakes."""
        frozen: list[Process] = [one for one in self.aggregators if one.machine is machine]
        frozen += [one for one in self.workers.values() if one.machine is machine]
        for process in frozen:
            if process.alive and not process.stopped:
                process.stop()
                if for_s:
                    self.clock.push(for_s, process.resume)
                if process is machine.listener:
                    self.network.froze(process)

    def _trouble(self, fault: Fault, process: WorkerProcess) -> None:
        match fault.do:
            case "slow_worker":
                process.slow = fault.factor
                self.clock.push(fault.for_s, lambda: setattr(process, "slow", 1.0))
            case "remove_worker":
                if self.coordinator.alive:
                    self.coordinator.proto.remove(process.worker)
            case "leave_worker":
                process.leave()
            case "machine_nan":
                self._errs.add(process.name)
            case "lying_worker":
                for checker in self.checkers:
                    checker.has_liars = True
                self._liars.add(process.worker)
                process.lies = fault.factor
            case "sick_worker":
                process.sick_until_s = self.clock.now_s + fault.for_s
            case _:
                raise ValueError(f"no fault {fault.do!r}")

    def _scale(self, delta: int) -> None:
        if self.coordinator.alive:
            self.coordinator.proto.scale(self.coordinator.proto.target + delta)

    def _end_delay(self) -> None:
        self.clock.extra_latency_s = 0.0


def _scheduling(schedule: Schedule) -> Shares | Coded:
    """With a code, one fewer may straggle than compute each micro-batch."""
    if schedule.code:
        return Coded(stragglers=schedule.copies - 1, kind=schedule.code)
    return Shares(copies=schedule.copies)
