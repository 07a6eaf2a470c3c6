"""Reads what a job records, beside it: tells Prometheus, and lets the fault detector look at it.

A thread of the coordinator; nothing that a step waits for happens here. Where it fails, the job
goes on and its events say why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from actors.mesh import Address
from actors.pulses import Pulses
from actors.setup import NICE_STEP, JobSetup, set_nice
from elastic.core.runs import Lines
from monitoring.account import BEGINS
from monitoring.actions import STEERED, UNDONE, action_fields, taken_of
from monitoring.tally import VERDICT, VERDICT_ENDED, Now, Tally, in_order
from policies.steering import Act, Remedy, Steering, SteeringView, Taken, Tell, drained, undo
from policies.verdicts import Culprit, Kind, Node, Verdict, Worker

if TYPE_CHECKING:
    from actors.ray_metrics import RayMetrics
    from monitoring.detection import Detector
    from monitoring.exporter import Exporter, Values
    from monitoring.progress import Progress

log = logging.getLogger(__name__)

_TURN_S = 0.25
_POLL_S = 0.05
_RAY_S = 5.0
_REPLACES = (Remedy.RESTART, Remedy.QUARANTINE)
_TAKES_AWAY = (*_REPLACES, Remedy.DRAIN)


class Tells(Protocol):
    """Appends to the events of the run."""

    def __call__(self, kind: str, reason: str, worker: int | None = None, **more: Any) -> None: ...


class Monitor:
    """Of one job.

    Args:
        now: says how the job stands; called from the threads of this and of scrapes.
        event: appends to the events of the run.
        swap: lets a worker leave and another take its place.
        pulses: of all nodes.
    """

    def __init__(
        self,
        setup: JobSetup,
        now: Callable[[], Now],
        event: Tells,
        swap: Callable[[int], None],
        pulses: Pulses,
    ) -> None:
        self._setup, self._now, self._event, self._swap = setup, now, event, swap
        self._pulses = pulses
        self._step_s: float | None = None
        self._turned_s = 0.0
        job, run = setup.job, setup.run
        self._steps = Lines(run.metrics_jsonl)
        self._events = Lines(run.events_jsonl)
        self._evaluations = Lines(run.evaluations_jsonl)
        self._tally = Tally(job.model_dump(mode="json"))
        self._detector: Detector | None = None
        self._progress: Progress | None = None
        self._held: dict[tuple[str, str], float] = {}
        self._advised: set[tuple[tuple[str, str], Remedy]] = set()
        self._taken: list[Taken] = []
        self._machine_of: Mapping[int, str] = {}
        self.avoided: frozenset[int] = frozenset()
        """Nodes on which nothing is to be started. Replaced, never changed, like what follows."""
        self.drained: Mapping[int, str] = {}
        """Nodes that are to go, and why."""
        self.outvoted: frozenset[int] = frozenset()
        """Nodes whose state is wrong: they are to be left behind, whatever `monitoring.steering`
        is."""
        self._steering = Steering(
            mode=job.monitoring.steering,
            min_workers=job.workers.min,
            min_nodes=job.nodes.min,
            share_per_hour=job.monitoring.share_per_hour,
        )
        self._lock = threading.Lock()
        self._of_ray: RayMetrics | None = None
        self._target: Address | None = None
        self._targets: list[dict[str, Any]] = []
        self._told_ray_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)

    def start(self) -> None:
        self._remember()
        self._thread.start()

    def stop(self) -> None:
        """Listen no more; whoever asks this does not wait for it."""
        self._ended.set()

    def _loop(self) -> None:
        set_nice(NICE_STEP)
        try:
            self._begin()
            exporter = self._listen()
            try:
                while not self._ended.wait(_POLL_S if self._detector is not None else _TURN_S):
                    if self._has_news() or time.monotonic() - self._turned_s >= _TURN_S:
                        self._turn()
            finally:
                self._pulses.slow = ()  # nobody sees any more whether they still are
                self._setup.run.prometheus_json.unlink(missing_ok=True)
                if exporter is not None:
                    exporter.close()
        except Exception as error:  # told; the job has no need of it
            log.exception("the monitor failed")
            self._event("monitoring_failed", f"{type(error).__name__}: {error}")

    # -------------------------------------------------------------- Prometheus

    def _listen(self) -> Exporter | None:
        """Answer scrapes from now on."""
        from monitoring.exporter import Exporter, reached_at, registry_of  # behind the job's start

        job = self._setup.job
        if job.monitoring.port is None:
            return None
        host, port = job.monitoring.host, job.monitoring.port
        try:
            exporter = Exporter(registry_of(self._values), host, port)
        except OSError as error:
            self._event("monitoring_failed", f"monitoring.port {port} at {host}: {error}")
            return None
        self._target = reached_at(host, self._setup.address), exporter.port
        self._point({})
        return exporter

    def _point(self, nodes: Mapping[int, Address]) -> None:
        """Write down where scrapes are answered, whenever that changes."""
        from monitoring.exporter import discovery

        job, run = self._setup.job, self._setup.run
        targets = discovery(self._target, nodes, job=job.name, run=run.path.name)
        if targets != self._targets:
            self._targets = targets
            run.write_json(run.prometheus_json, targets)

    def _values(self) -> Mapping[str, Values]:
        """What a scrape reads, as of now."""
        from monitoring.exporter import values_of

        now = self._now()
        with self._lock:
            self._read(now)
            links = [] if self._detector is None else self._detector.links()
            return values_of(self._tally, now, links)

    def _read(self, now: Now, *, most_steps: int | None = None) -> None:
        """Take in what was written since. What a line tells of was written before it: so files are
        read in the opposite order.

        Args:
            most_steps: the detector looks at so many of the last ones only.
        """
        evaluations, events, steps = (
            self._evaluations.read(),
            self._events.read(),
            self._steps.read(),
        )
        first = 0 if most_steps is None else max(0, len(steps) - most_steps)
        passed = {id(one) for one in steps[:first]}
        if self._detector is not None:
            self._detector.join(is_joining=now.num_joining > 0)
            self._detector.know(now.machine_of)
        for what, line in in_order(steps=steps, events=events, evaluations=evaluations):
            self._tally.add(what, line)
            if self._detector is not None and id(line) not in passed:
                self._detector.add(what, line, now.node_of)

    # ---------------------------------------------------------------- verdicts

    def _begin(self) -> None:
        """Read what there is already: a predecessor may have died, with verdicts that held."""
        from monitoring.detection import NUM_STEPS, Detector  # numpy: behind the job's start
        from monitoring.progress import Progress

        job = self._setup.job
        if job.monitoring.detect:
            self._detector, self._progress = Detector(), Progress()
        if job.monitoring.ray:
            from ray.util import metrics

            from actors.ray_metrics import RayMetrics

            self._of_ray = RayMetrics(job.name, metrics)
        with self._lock:
            self._read(self._now(), most_steps=NUM_STEPS)
            self._held = dict.fromkeys(self._tally.verdicts, time.time())

    def _has_news(self) -> bool:
        """Look at how all processes get on: whether a verdict on it begins or ends."""
        if self._detector is None or self._progress is None:
            return False
        to_unix_s = time.time() - time.monotonic()
        for heard_s, pulse in self._pulses.take():
            self._progress.take(pulse, heard_s)
            self._detector.take(pulse, heard_s + to_unix_s)
        if self._step_s is None:
            return False
        now_s, waiting = time.monotonic(), self._pulses.waiting
        is_news = self._detector.poll(self._progress.view(now_s, self._step_s, waiting))
        self._progress.hung = self._detector.hung
        return is_news

    def _turn(self) -> None:
        self._turned_s = time.monotonic()
        if self._of_ray is not None and time.monotonic() - self._told_ray_s >= _RAY_S:
            self._told_ray_s = time.monotonic()
            self._of_ray.tell(self._values())
        now = self._now()
        self._point(now.exporters)
        self._step_s = now.status.step_s_median
        with self._lock:
            self._read(now)
            if self._detector is None or self._tally.is_over:
                return  # the end of a job is the last that is told of it
            found = self._detector.verdicts(time.time(), now.status.num_nodes)
            outvoted = self._detector.outvoted
            node_of = {one: now.node_of.get(one, 0) for one in self._tally.members}
        self._machine_of = now.machine_of
        self._tell(found)
        self.outvoted = outvoted
        self._steer(found, node_of, [now.node_of.get(one, 0) for one in now.spares])

    def _tell(self, found: list[Verdict]) -> None:
        """Write down which verdicts begin and which end."""
        from monitoring.detection import verdict_fields

        names = {_name(one): one for one in found}
        for name, verdict in names.items():
            if name not in self._held:
                self._held[name] = self._since_s(verdict)
                reason = f"{name[0]}: {verdict.reason}"
                self._event(VERDICT, reason, _worker(verdict), verdict=verdict_fields(verdict))
        for name in set(self._held) - set(names):
            del self._held[name]
            kind, culprit = name
            self._advised = {one for one in self._advised if one[0] != name}
            fields = {"kind": kind, "culprit": culprit}
            self._event(VERDICT_ENDED, f"{kind}: {culprit} no longer", verdict=fields)

    def _since_s(self, verdict: Verdict) -> float:
        """Now; or when it was said of another node, if that was the same machine."""
        kind, now_s, former = verdict.kind.value, time.time(), self._others(verdict.culprit)
        return min([self._held.get((kind, str(one)), now_s) for one in former], default=now_s)

    def _others(self, culprit: Culprit) -> list[Node]:
        """What else the machine of a node is or was."""
        if not isinstance(culprit, Node):
            return []
        machine = self._machine_of.get(culprit.number)
        alike = [node for node, other in self._machine_of.items() if other == machine]
        return [Node(node) for node in alike if node != culprit.number]

    def _steer(
        self, found: list[Verdict], node_of: Mapping[int, int], spares: Sequence[int]
    ) -> None:
        """Do about them what the policy says, or say what it would do: once."""
        view = SteeringView(
            now_s=time.time(),
            verdicts=found,
            since_s={one.name: self._held[_name(one)] for one in found},
            node_of=node_of,
            spares=spares,
            taken=self._taken_by_machine(),
        )
        for decision in self._steering.decide(view):
            if isinstance(decision, Tell):
                said = (_name(decision.verdict), decision.remedy)
                if said not in self._advised:
                    self._advised.add(said)
                    self._event("advice", decision.reason, _worker(decision.verdict))
            else:
                self._act(decision)
        with self._lock:
            view = replace(view, taken=self._taken_by_machine())
            self.avoided = self._steering.avoided(view)
            self._pulses.slow = self._steering.slow_links(view)
            self._drain()

    def _taken_by_machine(self) -> tuple[Taken, ...]:
        """What a person took back from a node is taken back from all that its machine ever is; what
        was done about its coming and going was done about each."""
        again = [
            replace(one, culprit=other, num_workers=0)
            for one in self._taken
            if one.undone or one.kind is Kind.FLAPPING
            for other in self._others(one.culprit)
        ]
        return (*self._taken, *again)

    def _drain(self) -> None:
        """Say which nodes are to go: what follows is the coordinator's."""
        reason = "monitoring.steering"
        self.drained = {
            node: f"{reason}: {kind.value}" for node, kind in drained(self._taken).items()
        }

    def undo(self, culprit: str) -> list[str]:
        """Take back what was done about a culprit, such as 'worker 3'; all of it: 'all'.

        It is not done to it again by itself, and counts against no budget. Asked by any thread.
        """
        with self._lock:
            told = []
            for place, one in enumerate(self._taken):
                if not one.undone and culprit in ("all", str(one.culprit)):
                    self._taken[place] = undo(one)
                    told.append(f"{one.remedy.value} {one.culprit}")
            self._drain()
        for what in told:
            self._event(UNDONE, f"not any more, as a person asked: {what}", culprit=culprit)
        return told

    def _remember(self) -> None:
        """What a predecessor has done, and what a person has taken back since. Where a job begins
        anew in its folder, workers and nodes have other numbers."""
        for event in self._setup.run.read_events():
            if event["kind"] in BEGINS:
                self._taken.clear()
            elif event["kind"] == STEERED and "action" in event:
                self._taken.append(taken_of(event))
            elif event["kind"] == UNDONE:
                self._taken = [
                    undo(one) if event["culprit"] in ("all", str(one.culprit)) else one
                    for one in self._taken
                ]
        self._drain()

    def _act(self, act: Act) -> None:
        """Workers are replaced here; where nothing is to be started, and who is to go, the
        coordinator looks up; over which links less is to go every question to the nodes says. The
        rest is done anyway: shares adapt, work is duplicated."""
        verdict = act.verdict
        num = len(act.workers) if act.remedy in _TAKES_AWAY else 0
        taken = Taken(time.time(), act.remedy, verdict.culprit, verdict.kind, num_workers=num)
        with self._lock:
            self._taken.append(taken)
        self._event(STEERED, act.reason, _worker(verdict), action=action_fields(taken))
        if act.remedy in _REPLACES:
            for worker in act.workers:
                self._swap(worker)


def _name(verdict: Verdict) -> tuple[str, str]:
    """As events have it."""
    return verdict.kind.value, str(verdict.culprit)


def _worker(verdict: Verdict) -> int | None:
    return verdict.culprit.number if isinstance(verdict.culprit, Worker) else None
