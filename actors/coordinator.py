"""The coordinator process: looks at the world, lets the protocol decide, acts. Over and over.

Steps go on while it is gone. It remembers nothing that it cannot ask for again: members from the
aggregator, processes from Ray, progress from the run folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from actors.contacts import Contacts, ManyContacts, OneContact
from actors.growth import HostGrowth
from actors.link_preflight import LinkPreflight
from actors.monitor import Monitor
from actors.outages import Outage, insist
from actors.preemption import NodeWatch
from actors.preflight import Preflight
from actors.processes import Processes
from actors.pulses import Pulses
from actors.setup import JobSetup, hurry
from elastic.core.errors import (
    ClusterError,
    ElasticError,
    FatalError,
    PreemptedError,
    ProcessError,
)
from elastic.core.protocol.coordinator import (
    Action,
    Coordinator,
    KillWorker,
    Life,
    Limits,
    Note,
    SetMembership,
    StartAggregator,
    StartWorker,
    View,
)
from elastic.core.protocol.messages import Admit, Membership, Report, Scale, Stop
from elastic.core.runs import Lines
from elastic.core.status import ModelStatus, PhaseName, Status
from monitoring.tally import Now
from policies.preemption import Leave, LeaveInTime, PreemptionView, Stay, TooLate

log = logging.getLogger(__name__)

_TURN_S = 0.05
_NUM_EVENTS = 50
_MAX_AGGREGATOR_DEATHS = 20


class CoordinatorShell:
    """Runs the coordinator of one job on a thread; the methods may be called from others."""

    def __init__(self, setup: JobSetup, processes: Processes, watch: NodeWatch) -> None:
        job = setup.job
        self._setup = setup
        self._processes = processes
        self._watch = watch
        self._preemption = LeaveInTime()
        self._heeded: Stay | Leave | TooLate | None = None
        self._unwatched: set[str] = set()
        self._let_gone: set[int] = set()
        self._drained: set[int] = set()
        self._store = setup.open_store()
        self._lock = threading.Lock()
        limits = Limits(
            min_workers=job.workers.min,
            max_workers=job.workers.max,
            spare=job.workers.spare,
            standby=job.standby,
            min_nodes=job.nodes.min,
            max_nodes=job.nodes.max,
            first_step=setup.first_step,
            replicas=job.replicas,
        )
        self._protocol = Coordinator(limits, job.workers.start, insist(self._is_first))
        self._undone: deque[Action] = deque()
        self._outage = Outage()
        self._growth = HostGrowth(processes, job.nodes.min)
        self._preflight = Preflight(job.workers.preflight, self._leave_out, processes.probe_again)
        self._contacts = self._make_contacts()
        self._links = LinkPreflight(
            job.workers.preflight, job.nodes.min, self._contacts, self._leave_host_out
        )
        self._pulses = Pulses(self._contacts, wanted=job.monitoring.detect)
        self._newest = 0
        self._report: Report | None = None
        self._step = 0
        self._connected: set[int] = set()
        self._buried: set[int] = set()
        self._stop = ""
        self._at_once = False
        self._preempted: PreemptedError | None = None
        self._failure: BaseException | None = None
        self._phase: PhaseName = "starting"
        self._metrics = _Tail(setup.run.metrics_jsonl, 64)
        self._events = _Tail(setup.run.events_jsonl, _NUM_EVENTS)
        self._monitor = Monitor(setup, self._now, self._event, self._swap, self._pulses)
        self._thread = threading.Thread(target=self._loop, name="coordinator", daemon=True)

    def _is_first(self) -> bool:
        """Whether no coordinator of this job came before."""
        if self._setup.has_nodes:
            return self._processes.claim(0, secrets.token_bytes(8)) is None
        return not self._store.path.exists()

    def _make_contacts(self) -> Contacts:
        setup = self._setup
        if setup.has_nodes:
            return ManyContacts(setup.address, setup.secret, self._processes.addresses)
        return OneContact(self._store.path / "socket")

    def start(self) -> None:
        """Begin; on what is there already if an earlier coordinator died."""
        aggregators = self._processes.known("aggregator")
        is_over = not aggregators if self._setup.has_nodes else not self._store.path.exists()
        if self._setup.run.result_json.exists() and is_over:
            self._phase = "done"  # it died between the end of the job and saying so
            return
        self._store.create()
        if self._processes.known("aggregator"):
            self._event("coordinator_restarted", f"pid {os.getpid()} takes up where it died")
        self._watch.start()
        self._monitor.start()
        self._thread.start()

    # ------------------------------------------------------- for other threads

    def status(self) -> Status:
        """One snapshot, from the run folder and the last report."""
        with self._lock:
            self._metrics.read()
            self._events.read()
            report = self._report
            members = set(self._protocol.membership.members)
            metrics = list(self._metrics.lines)
            median_s = self._step_s()
            connected = set(report.connected) if report is not None else set()
            ends = list(self._processes.known("aggregator").values())  # at one stroke
            return Status(
                phase=self._phase,
                num_steps=self._setup.job.steps * self._setup.job.num_models,
                run_dir=str(self._setup.run.path),
                step=metrics[-1]["step"] + 1 if metrics else 0,
                loss=metrics[-1]["loss"] if metrics else None,
                first_loss=self._metrics.first["loss"] if self._metrics.first else None,
                models=self._metrics.models(self._setup.job.num_models),
                samples_per_s=metrics[-1]["samples"] / median_s if median_s else None,
                step_s_median=median_s,
                num_workers=len(members & connected),
                num_spare=len(self._spares()),
                num_unfit=len(connected & self._preflight.unfit - members),
                target_workers=self._protocol.target,
                num_nodes=len(self._protocol.membership.nodes),
                target_nodes=self._protocol.target_nodes,
                generation=self._protocol.membership.generation,
                aggregator="acting + standby" if ends.count(None) > 1 else "acting, no standby",
                events=tuple(self._events.lines),
            )

    def failure(self) -> BaseException | None:
        """Why the job failed before it had a result, or who took its machine away."""
        return self._failure or self._preempted

    def scale(self, num_workers: int | None, num_nodes: int | None = None) -> str:
        """Want that many workers, on that many nodes. Returns the reason of a refusal, or nothing.

        None: as many as before.
        """
        with self._lock:
            refusal = self._protocol.scale(num_workers, num_nodes)
        if not refusal:
            self._growth.forgive()
            workers, nodes = self._protocol.target, self._protocol.target_nodes
            self._event("scaled", f"{workers} workers on {nodes} nodes wanted")
        return refusal

    def undo(self, culprit: str) -> list[str]:
        """Take back what steering did to a culprit. What that was."""
        return self._monitor.undo(culprit)

    def stop(self, reason: str) -> None:
        """Finish the step, write a checkpoint, end."""
        self._stop = reason

    # ------------------------------------------------------------------- loop

    def _loop(self) -> None:
        hurry()
        try:
            while self._phase not in ("done", "failed"):
                self._turn()
        except Exception as error:  # kept: the driver raises it
            log.exception("the coordinator failed")
            self._abandon(error)

    def _turn(self) -> None:
        """Observe, decide, act once."""
        self._listen()
        self._heed()
        if self._outage.may_ask(time.monotonic()):
            try:
                self._govern()
                self._outage.ends()
            except ClusterError as error:
                if self._outage.goes_on(time.monotonic()):
                    self._event("gcs_away", f"{error}: steps go on, changes of membership wait")
        if self._phase == "failed":
            return
        report = self._report
        if report is not None and report.finished:
            self._finish(report)
        elif report is not None and self._phase == "starting" and report.step > 0:
            self._phase = "training"

    def _govern(self) -> None:
        """Have the membership follow the world.

        Raises:
            ClusterError: what is not done yet is done later, before anything else is decided: a
                generation that is not known to exist has no successor.
        """
        if not self._undone:
            self._processes.look(self._protocol.target_nodes, self._protocol.membership.former)
            self._let_go()
            if self._setup.has_nodes:
                self._grow()
            lives = self._observe()
            if self._phase == "failed":
                return
            with self._lock:
                self._protocol.avoided = self._monitor.avoided
                self._undone.extend(self._protocol.decide(self._view(lives)))
        while self._undone:
            if not self._act(self._undone[0]):
                self._undone.clear()
                return
            self._undone.popleft()

    def _view(self, lives: Mapping[int, Life]) -> View:
        former = {*self._protocol.membership.former, *self._monitor.outvoted}
        aggregators = {node: 0 for node in self._processes.nodes() if node not in former}
        homes = self._processes.homes("aggregator")
        for number, ended in self._processes.known("aggregator").items():
            if ended is None and homes[number] in aggregators:
                aggregators[homes[number]] += 1
        reports = {node: one for node, one in self._contacts.reports.items() if one is not None}
        now_s = time.monotonic()
        report = self._preflight.judge(
            self._report,
            self._processes.probes(),
            {worker for worker, life in lives.items() if life is not Life.DEAD},
            members=self._protocol.membership.members,
            target=self._protocol.target,
            now_s=now_s,
        )
        if self._setup.has_nodes:
            self._links.turn(
                aggregators,
                self._report,
                self._protocol.membership,
                first_step=self._setup.first_step,
                now_s=now_s,
            )
        return View(
            now_s=now_s,
            report=report,
            processes=lives,
            aggregators=aggregators,
            ends={
                number: ended.text.partition("\n")[0]
                for number, ended in self._processes.known("worker").items()
                if ended is not None
            },
            others={node: one for node, one in reports.items() if one is not self._report},
            homes=self._processes.homes("worker"),
            unfit=self._preflight.unfit,
            held=self._links.held,
        )

    def _leave_host_out(self, node: int, reason: str) -> None:
        """For the pre-flight of links: name who is unfit, also where it takes part."""
        self._event("node_unfit", reason)
        if node in self._links.unfit:
            self._growth.refused()
            if node not in self._protocol.membership.nodes:
                self._let_gone.add(node)  # nothing of it has to end first

    def _leave_out(self, worker: int, reason: str) -> None:
        """For the pre-flight: name who computes only where there would be too few without it."""
        self._event("worker_unfit", reason, worker)

    def _listen(self) -> None:
        """Take what the aggregators say."""
        for request in self._contacts.turn(_TURN_S):
            self._scale_by(request)
        self._pulses.turn()
        reports = [one for one in self._contacts.reports.values() if one is not None]
        self._report = next((one for one in reports if _leads(one)), None)
        if self._report is not None:
            self._step = self._report.step
            self._connected |= set(self._report.connected)
        if self._stop:
            failed = self._failure is not None
            stop = Stop(self._stop, failed=failed, at_once=self._at_once)
            for node in list(self._contacts.reports):
                self._contacts.send(node, stop)

    def _heed(self) -> None:
        """End the job in good order where its node will be taken away: the run goes on elsewhere.

        Asked in every turn: where the step takes too long after all, it is given up.
        """
        for name, problem in self._watch.problems().items():
            if name not in self._unwatched:
                self._unwatched.add(name)
                self._event("preemption_unwatched", f"{name}: {problem}")
        notice = self._watch.notice()
        if notice is None and self._heeded is None:
            return
        with self._lock:
            self._metrics.read()
            view = PreemptionView(time.time(), notice, self._step_s())
        decision = self._preemption.decide(view)
        again = type(decision) is type(self._heeded)
        if again or (self._heeded is not None and isinstance(decision, Stay)):
            return
        self._heeded = decision
        match decision:
            case Stay(reason):
                self._event("preemption_possible", reason)
            case Leave(reason):
                self._event("preempted", f"{reason}: finishes the step, writes a checkpoint")
                self._stop = reason
            case TooLate(reason):
                self._event("preempted", f"{reason}: writes a checkpoint at once")
                self._stop, self._at_once = reason, True

    def _let_go(self) -> None:
        """Have nodes leave whose hosts will be taken away, or that steering drains: nothing is
        lost, nothing done again."""
        leaving = {node: notice.reason for node, notice in self._processes.ending().items()}
        if self._setup.has_nodes:
            leaving |= self._shun()
        for node, why in leaving.items():
            with self._lock:
                refusal = self._protocol.leave(node)
            if node not in self._let_gone:
                self._let_gone.add(node)
                reason = f"{why}: its workers finish what they hold"
                self._event("node_leaving", f"node {node}: {refusal or reason}")

    def _shun(self) -> dict[int, str]:
        """Take the hosts of drained and unfit nodes no more, and those again of which it was
        undone. Returns those that are still there: nobody knows before the nodes have said who
        left."""
        unfit = dict.fromkeys(self._links.unfit, "workers.preflight")
        drained = {**unfit, **self._monitor.drained}
        for node, reason in drained.items():
            self._processes.avoid(node, reason)
        for node in self._drained - drained.keys():
            self._processes.allow(node)
            self._let_gone.discard(node)
        self._drained = set(drained)
        now = self._protocol.membership
        there = {*self._processes.nodes()} - {*now.former} if now.generation else set()
        return {node: reason for node, reason in drained.items() if node in there}

    def _now(self) -> Now:
        """For the monitor, on its thread. Copies that are still on their way count."""
        status, job = self.status(), self._setup.job
        with self._lock:
            node_of = dict(self._processes.homes("worker"))
            num_joining = len(self._protocol.membership.joining)
            spares = self._spares()
            exporters = self._processes.exporters()
            machine_of = dict(self._processes.machines())
        wanted = min(job.replicas, job.nodes.max)
        return Now(
            status=status,
            node_of=node_of,
            replicas=min(wanted, status.num_nodes),
            replicas_wanted=wanted,
            num_joining=num_joining,
            spares=tuple(sorted(spares)),
            machine_of=machine_of,
            exporters=exporters,
        )

    def _spares(self) -> set[int]:
        """Workers that are ready to compute."""
        connected = set() if self._report is None else {*self._report.connected}
        return connected - {*self._protocol.membership.members} - self._preflight.unfit

    def _grow(self) -> None:
        """Have the cluster start what is missing; nothing any more once the job is to end."""
        if self._stop:
            self._processes.ask(0)
            return
        for kind, reason in self._growth.turn(self._protocol):
            self._event(kind, reason)

    def _swap(self, worker: int) -> None:
        """For the monitor: let one worker leave, and another take its place."""
        with self._lock:
            self._protocol.swap(worker)

    def _step_s(self) -> float | None:
        """The median of the last steps."""
        steps_s = [one["step_s"] for one in self._metrics.lines]
        return statistics.median(steps_s) if steps_s else None

    def _scale_by(self, request: Scale) -> None:
        with self._lock:
            if request.delta < 0 and request.worker is not None:
                self._protocol.remove(request.worker)
                return
            limits = self._protocol.limits
            target = self._protocol.target + request.delta
            self._protocol.scale(min(limits.max_workers, max(limits.min_workers, target)))

    def _observe(self) -> dict[int, Life]:
        """What the processes do. A refusal by the task or the machine ends the job.

        So does an error that ends two processes alike: the code is wrong, not the machine.
        """
        for role in ("aggregator", "worker"):
            seen = set()
            for number, ended in self._processes.known(role).items():
                if ended is None or ended.error is None:
                    continue
                if role == "aggregator" and self._refuses(self._processes.homes(role)[number]):
                    self._do_without(self._processes.homes(role)[number], ended.text)
                    continue
                if isinstance(ended.error, FatalError):
                    self._fail(ended.error)
                elif ended.text in seen:
                    text = f"{role} {number} failed like one before it: {ended.text}"
                    self._fail(ProcessError(f"{text}\n{ended.traceback}"))
                seen.add(ended.text)
        if self._phase == "failed":
            return {}  # every process is being ended
        self._bury_aggregators()
        return {
            number: (
                Life.DEAD
                if ended is not None
                else Life.ALIVE
                if number in self._connected
                else Life.STARTING
            )
            for number, ended in self._processes.known("worker").items()
        }

    def _refuses(self, node: int) -> bool:
        """Whether a host only wants to join: the job can do without it."""
        return self._step > 0 and node not in self._protocol.membership.nodes

    def _do_without(self, node: int, reason: str) -> None:
        if node in self._let_gone:
            return
        self._let_gone.add(node)
        self._event("node_refused", f"node {node} cannot join: {reason}".partition("\n")[0])
        self._processes.avoid(node, reason)
        self._growth.refused()
        with self._lock:
            self._protocol.leave(node)

    def _bury_aggregators(self) -> None:
        """Note each death once, and end what is left of the process: it may hold the lock."""
        former, homes = self._protocol.membership.former, self._processes.homes("aggregator")
        ended = self._processes.known("aggregator")
        dead = {number: end for number, end in ended.items() if end is not None}
        for number in sorted(set(dead) - self._buried):
            self._processes.kill("aggregator", number)
            self._buried.add(number)
            if homes[number] not in former:  # else it went with its host
                self._event("aggregator_lost", dead[number].text.partition("\n")[0])
                self._begin_anew(homes[number])
        members = self._protocol.membership.nodes
        dead = {number: end for number, end in dead.items() if homes[number] in members}
        if len(dead) > _MAX_AGGREGATOR_DEATHS:
            last = dead[max(dead)]
            self._abandon(ProcessError(f"{len(dead)} aggregators died; the last: {last.text}"))

    def _begin_anew(self, node: int) -> None:
        """A node that only joins has lost its aggregator: its host may come again as another one,
        not as often as it likes."""
        if node in self._let_gone or node in self._protocol.membership.nodes:
            return
        self._growth.lost(node)
        with self._lock:
            self._protocol.leave(node)

    def _act(self, action: Action) -> bool:
        """False if nothing that follows may be done."""
        match action:
            case SetMembership(membership):
                return self._set_membership(membership)
            case StartWorker(worker, node):
                self._processes.start("worker", worker, node)
                self._event("worker_started", "its process is starting", worker)
            case KillWorker(worker):
                self._processes.kill("worker", worker)
            case StartAggregator(node):
                number = max(self._processes.known("aggregator"), default=-1) + 1
                self._processes.start("aggregator", number, node)
            case Note(kind, reason, worker, node):
                self._event(kind, reason, worker)
                if kind == "node_lost" and node is not None:
                    self._growth.lost(node)
        return True

    def _set_membership(self, membership: Membership) -> bool:
        """Tell the nodes that have not heard of it, once it is the generation of its number."""
        if self._setup.has_nodes and membership.generation > self._newest:
            other = self._processes.claim(membership.generation, membership.to_bytes())
            self._newest = membership.generation
            if other is not None:
                with self._lock:
                    self._protocol.adopt(Membership.from_bytes(other))
                return False
        for node, report in list(self._contacts.reports.items()):
            if report is None or report.membership.generation < membership.generation:
                self._contacts.send(node, Admit(membership))
        return True

    def _event(self, kind: str, reason: str, worker: int | None = None, **more: Any) -> None:
        generation = self._protocol.membership.generation
        self._setup.run.tell(
            kind, reason, step=self._step, generation=generation, worker=worker, **more
        )

    def _finish(self, report: Report) -> None:
        """The result is written: end every process, free the memory."""
        self._phase = "finishing"
        job = self._setup.job
        num_steps = job.steps * job.num_models
        if isinstance(self._heeded, Leave | TooLate) and report.step < num_steps:
            where = self._setup.run.path if job.num_models > 1 else self._setup.checkpoints
            self._preempted = PreemptedError(
                f"{self._heeded.reason}: stopped at step {report.step} of {num_steps}; on another"
                f" node go on by: elastic resume {where}"
            )
        self._clean_up()
        self._phase = "failed" if report.failure else "done"

    def _fail(self, error: BaseException) -> None:
        """End the job by way of the aggregator, which writes a checkpoint, if there is one."""
        if self._failure is not None:
            return
        if not self._contacts.reports:
            self._abandon(error)
            return
        self._failure, self._stop = error, str(error).partition("\n")[0]

    def _abandon(self, error: BaseException) -> None:
        """End the job at once."""
        known = isinstance(error, ElasticError)
        self._failure = error if known else FatalError(f"{type(error).__name__}: {error}")
        self._event("job_failed", str(error).partition("\n")[0])
        self._clean_up()
        self._phase = "failed"

    def _clean_up(self) -> None:
        self._watch.stop()
        self._monitor.stop()
        self._contacts.close()
        self._store.remove()  # first: nobody may connect to a standby, nobody may stand by
        self._processes.clear()
        try:
            for role in ("worker", "aggregator"):
                for number in self._processes.known(role):
                    insist(partial(self._processes.kill, role, number))
            insist(self._processes.forget)  # last: till then a restarted one finds what is left
        except ClusterError as error:
            log.warning("%s: processes of the job may be left", error)
        self._store.close()
        self._store.remove()


def _leads(report: Report) -> bool:
    return report.leads and report.membership.nodes[0] == report.node


class _Tail:
    """The last lines of a file of JSON objects that others append to."""

    def __init__(self, path: Path, num_lines: int) -> None:
        self.lines: deque[dict[str, Any]] = deque(maxlen=num_lines)
        self.first: dict[str, Any] | None = None
        self._of_models: dict[int, dict[str, Any]] = {}
        self._appended = Lines(path)

    def read(self) -> None:
        """Take in what was appended."""
        for line in self._appended.read():
            self.lines.append(line)
            self.first = self.first or line
            if "model" in line:
                self._of_models[line["model"]] = line

    def models(self, num: int) -> tuple[ModelStatus, ...]:
        """Where each of so many models is; nothing if it is the only one."""
        newest = [self._of_models.get(model) for model in range(num if num > 1 else 0)]
        return tuple(
            ModelStatus() if line is None else ModelStatus(line["step"] // num + 1, line["loss"])
            for line in newest
        )
