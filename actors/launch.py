"""Ray: the only module that makes actors. Everything else is plain classes.

Workers and aggregators are detached, so that they outlive the coordinator's process; the
coordinator, restarted by Ray, finds them again by their names.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from actors.cluster_nodes import ClusterNodes, asking
from actors.coordinator import CoordinatorShell
from actors.host_requests import HostRequests
from actors.islands import Island
from actors.mesh import Address, find_address
from actors.outages import insist
from actors.preemption import Drains, NodeWatch, cloud_sources, drain_notice
from actors.processes import Ended
from actors.setup import (
    NAMESPACE,
    NICE_STEP,
    JobSetup,
    compute_environment,
    importing,
    parse_actor_name,
    set_nice,
)
from elastic.core.errors import ElasticError
from elastic.core.status import Status
from elastic.core.store import remove_leftovers
from policies.preemption import Notice
from policies.preflight import Probe

if TYPE_CHECKING:
    from actors.worker import WorkerShell

_NAME_FREE_S = 5.0
_CLEAR_S = 2.0
_JOIN_S = 5.0
_MAX_JOINS = 16  # a coordinator that dies leaves one, for _JOIN_S at most
_WITHDRAW_S = 2.0
_ORPHAN_S = 60.0  # a coordinator ends this process long before, if there still is one


class Host:
    """A process that runs one worker or aggregator on a thread of its own."""

    def __init__(self, setup: JobSetup, role: str, number: int) -> None:
        self._setup = setup = here(setup)
        self._watch: NodeWatch | None = None
        self._result = ""
        self._error: BaseException | None = None
        self._probe: Future[Probe] = Future()
        self._worker: WorkerShell | None = None
        self._signals = _received_signals() if role == "worker" else -1
        self._thread = threading.Thread(
            target=self._run, args=(setup, role, number), name=role, daemon=True
        )
        self._thread.start()

    def _run(self, setup: JobSetup, role: str, number: int) -> None:
        try:
            if role == "worker":
                from actors.worker import WorkerShell

                self._worker = WorkerShell(setup, number, self._signals, self._probe.set_result)
                self._result = self._worker.run()
            else:
                if setup.has_nodes:
                    remove_leftovers()  # on the driver's host the driver does so
                if not setup.open_store().spec_path.exists():
                    set_nice(NICE_STEP)  # the first step waits for it, torch's import included
                with importing():
                    from actors.aggregator import AggregatorShell

                self._result = AggregatorShell(setup).run()
        except BaseException as error:  # handed to whoever joins
            self._error = error
        orphaned = threading.Timer(_ORPHAN_S, os._exit, (0,))
        orphaned.daemon = True
        orphaned.start()

    @ray.method(concurrency_group="short")
    def look_around(self) -> tuple[Address | None, Address | None, Notice | None]:
        """Where this node's acting aggregator listens, once it does, and its exporter; and whether
        the host will be taken away, as far as its cloud says so."""
        if self._watch is None:
            self._watch = NodeWatch(cloud_sources(self._setup.job.preemption.source))
            self._watch.start()
        address = find_address(self._setup.open_store().path, self._setup.address)
        return address, _exporter_of(self._setup), self._watch.notice()

    def probe(self, wait_s: float = _JOIN_S, *, again: bool = False) -> Probe | None:
        """What the worker has measured before it connects. None: not yet, ask again.

        Args:
            again: measure anew, while the worker is idle; the better of both.
        """
        with contextlib.suppress(TimeoutError):
            first = self._probe.result(wait_s)
            if again and self._worker is not None:
                return first.best(self._worker.measure())
            return first
        return None

    @ray.method(concurrency_group="short")
    def clear(self) -> None:
        """Free the memory of the job on this node."""
        self._setup.open_store().remove()

    def join(self, wait_s: float = _JOIN_S) -> str | None:
        """Wait for the end; return its reason or raise its error. None: not yet, ask again.

        Whoever asked may be gone, and Ray takes back no call that has begun.
        """
        self._thread.join(wait_s)
        if self._thread.is_alive():
            return None
        if self._error is not None:
            raise self._error
        return self._result


def _received_signals() -> int:
    """A file from which the numbers of the signals to this process are read: none of Python's
    handlers says so in time, for the main thread is in Ray's core for seconds."""
    signals, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # Ray's ends the process, whatever it holds
    return signals


class RayProcesses:
    """Workers and aggregators as detached Ray actors."""

    def __init__(self, setup: JobSetup) -> None:
        self._setup = setup
        self._actors: dict[str, dict[int, Any]] = {"worker": {}, "aggregator": {}}
        self._joins: dict[str, dict[int, Any]] = {"worker": {}, "aggregator": {}}
        self._ended: dict[str, dict[int, Ended | None]] = {"worker": {}, "aggregator": {}}
        self._homes: dict[str, dict[int, int]] = {"worker": {}, "aggregator": {}}
        self._here = ray.get_runtime_context().get_node_id()
        self._nodes: ClusterNodes | None = None
        self._requests: HostRequests | None = None
        if setup.has_nodes:
            self._nodes = ClusterNodes(f"{setup.job.name}/{setup.run_id}", self._here)
            bundle = {"CPU": 1.0} | ({"GPU": 1.0} if setup.job.device == "cuda" else {})
            self._requests = HostRequests(f"{setup.job.name}/{setup.run_id}/hosts", bundle)
        self._asked: dict[int, Any] = {}
        self._addresses: dict[int, Address] = {}
        self._exporters: dict[int, Address] = {}
        self._ending: dict[str, Notice] = {}
        self._probing: dict[int, Any] = {}
        self._probes: dict[int, Probe] = {}
        for name in _named(f"{setup.job.name}/{setup.run_id}/"):
            role, number, node = parse_actor_name(name)
            with contextlib.suppress(ValueError), asking():  # it ended meanwhile
                self._adopt(role, number, node, ray.get_actor(name, NAMESPACE))

    def look(self, num_nodes: int, former: Sequence[int]) -> None:
        """Ask Ray once which processes have ended since, and which nodes there are."""
        if self._nodes is not None:
            self._look_around(self._nodes)
            self._nodes.look(num_nodes, former, self._ending)
        if self._setup.job.workers.preflight is not None:
            self._look_at_probes()
        waiting = {
            join: (role, number)
            for role, joins in self._joins.items()
            for number, join in joins.items()
            if self._ended[role][number] is None
        }
        if not waiting:
            return
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
        for join in done:
            role, number = waiting[join]
            self._ended[role][number] = ended = _how_it_ended(join)
            if ended is None:
                self._joins[role][number] = self._actors[role][number].join.remote()

    def _look_around(self, nodes: ClusterNodes) -> None:
        """Ask one aggregator of each node again and again; none waits for the answer."""
        for node, asked in list(self._asked.items()):
            if ray.wait([asked], timeout=0, fetch_local=False)[0]:
                del self._asked[node]
                with contextlib.suppress(RayError):  # it died: another one is asked
                    address, exporter, notice = ray.get(asked)
                    if address is not None:
                        self._addresses[node] = address
                    if exporter is not None:
                        self._exporters[node] = exporter
                    if notice is not None and notice.certain:
                        self._ending[nodes.ray_id(node)] = notice
        for number, ended in self._ended["aggregator"].items():
            node = self._homes["aggregator"][number]
            if ended is None and node not in self._asked:
                self._asked[node] = self._actors["aggregator"][number].look_around.remote()
        if nodes.is_due:
            for ray_id, deadline_ms in drains().items():
                self._ending[ray_id] = drain_notice(deadline_ms)

    def _look_at_probes(self) -> None:
        """Ask each worker for its probe until it has answered; none waits for it."""
        for worker, asked in list(self._probing.items()):
            if ray.wait([asked], timeout=0, fetch_local=False)[0]:
                del self._probing[worker]
                with contextlib.suppress(RayError):  # it died: nobody asks for it any more
                    probe = ray.get(asked)
                    if probe is not None:
                        self._probes[worker] = probe
        for worker, ended in self._ended["worker"].items():
            if ended is None and worker not in self._probing and worker not in self._probes:
                self._probing[worker] = self._actors["worker"][worker].probe.remote()

    def known(self, role: str) -> Mapping[int, Ended | None]:
        """Every process started so far, by number, and how it had ended at the last look."""
        return self._ended[role]

    def homes(self, role: str) -> Mapping[int, int]:
        """The node of each of them."""
        return self._homes[role]

    def nodes(self) -> Sequence[int]:
        """The nodes that the job may use now."""
        return (0,) if self._nodes is None else self._nodes.present

    def machines(self) -> Mapping[int, str]:
        """The address of the host of each node that there is or was, as far as it is known."""
        return {} if self._nodes is None else self._nodes.addresses

    def addresses(self) -> Mapping[int, Address]:
        """Where the aggregators of nodes listen, as far as they have said so."""
        return self._of_living(self._addresses)

    def exporters(self) -> Mapping[int, Address]:
        """Where the exporters of nodes are scraped, as far as there are any."""
        if self._nodes is not None:
            return self._of_living(self._exporters)
        where = _exporter_of(self._setup)
        return {} if where is None else {0: where}

    def _of_living(self, addresses: Mapping[int, Address]) -> dict[int, Address]:
        """Of nodes where an aggregator lives."""
        ended = list(self._ended["aggregator"].items())  # at one stroke: any thread may ask
        living = {self._homes["aggregator"][number] for number, end in ended if end is None}
        return {node: where for node, where in list(addresses.items()) if node in living}

    def ending(self) -> Mapping[int, Notice]:
        """The nodes on other hosts that will be taken away."""
        if self._nodes is None:
            return {}
        ids = {node: self._nodes.ray_id(node) for node in self._nodes.present}
        return {
            node: self._ending[ray_id]
            for node, ray_id in ids.items()
            if ray_id in self._ending and ray_id != self._here
        }

    def probes(self) -> Mapping[int, Probe]:
        """What workers have measured before they connected, as far as they have said so."""
        return self._probes

    def probe_again(self, worker: int) -> None:
        """Have a worker measure once more, which is idle now; the better of both counts."""
        self._probing[worker] = self._actors["worker"][worker].probe.remote(again=True)

    def claim(self, generation: int, membership: bytes) -> bytes | None:
        """Make a generation exist; or return the one of that number that exists already."""
        assert self._nodes is not None, "a job of one node has one coordinator at a time"
        return self._nodes.claim(f"generation/{generation}", membership)

    def start(self, role: str, number: int, node: int) -> None:
        threads = self._setup.job.workers.threads if role == "worker" else 1
        ray_id = self._here if self._nodes is None else self._nodes.ray_id(node)
        setup = replace(self._setup, node=node)
        remote: Any = ray.remote
        with asking():
            actor = (
                remote(concurrency_groups={"short": 1})(Host)
                .options(
                    name=setup.actor_name(role, number),
                    namespace=NAMESPACE,
                    get_if_exists=True,  # asked again where the GCS did it, and could not say so
                    lifetime="detached",
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(ray_id, soft=False),
                    max_concurrency=_MAX_JOINS,
                    runtime_env=_runtime_env(compute_environment(threads)),
                )
                .remote(setup, role, number)
            )
        self._adopt(role, number, node, actor)

    def kill(self, role: str, number: int) -> None:
        with asking():
            ray.kill(self._actors[role][number], no_restart=True)

    def clear(self) -> None:
        """Free the memory of the job on all nodes, as far as they can be reached."""
        if self._nodes is None:
            return
        living = {
            self._homes[role][number]: self._actors[role][number]
            for role, processes in self._ended.items()
            for number, ended in processes.items()
            if ended is None
        }
        cleared = [actor.clear.remote() for actor in living.values()]
        if cleared:
            ray.wait(cleared, num_returns=len(cleared), timeout=_CLEAR_S, fetch_local=False)

    def forget(self) -> None:
        """The job has ended: nothing of it is to be found any more."""
        if self._requests is not None:
            self._requests.close(_WITHDRAW_S)
        if self._nodes is not None:
            self._nodes.forget()

    def lost(self, node: int) -> None:
        """A node went without being asked to: its host may have to wait before it is used again."""
        if self._nodes is not None:
            self._nodes.lost(node)

    def held(self) -> Mapping[str, str]:
        """Hosts that are not used for now, by address, and why."""
        return {} if self._nodes is None else self._nodes.held

    def forgive(self) -> None:
        """Forget how often hosts were lost."""
        if self._nodes is not None:
            self._nodes.forgive()

    def ask(self, num_hosts: int) -> None:
        """Have the cluster start so many hosts more than there are, if it can; 0: none."""
        if self._nodes is not None and self._requests is not None:
            self._requests.ask(num_hosts, self._nodes.living)

    def avoid(self, node: int, reason: str) -> None:
        """Use the host of a node no more; nothing where none has that number."""
        assert self._nodes is not None, "a job of one node has no other host"
        if node in self._nodes:
            self._ending[self._nodes.ray_id(node)] = Notice(reason)

    def allow(self, node: int) -> None:
        """Use it again, as another node, unless it will be taken away: that is heard of anew."""
        assert self._nodes is not None, "a job of one node has no other host"
        if node in self._nodes:
            self._ending.pop(self._nodes.ray_id(node), None)

    def _adopt(self, role: str, number: int, node: int, actor: Any) -> None:
        self._actors[role][number] = actor
        self._homes[role][number] = node
        self._joins[role][number] = actor.join.remote()
        self._ended[role][number] = None


def _exporter_of(setup: JobSetup) -> Address | None:
    """Where the exporter of its node is scraped, if there is to be one and it listens."""
    if setup.job.monitoring.node_port is None:
        return None
    from actors.node_exporter import exporter_address

    return exporter_address(setup)


def drains() -> Mapping[str, int]:
    """Ray nodes that are drained, and deadlines in milliseconds since the epoch, 0: none."""
    with asking():
        draining: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
    return draining


def _named(prefix: str) -> list[str]:
    """The actors of jobs whose names begin like that."""
    with asking():
        named = ray.util.list_named_actors(all_namespaces=True)
    names: list[str] = [one["name"] for one in named if one["namespace"] == NAMESPACE]
    return [name for name in names if name.startswith(prefix)]


def here(setup: JobSetup) -> JobSetup:
    """The setup as a process of this host needs it."""
    if not setup.has_nodes:
        return setup
    return replace(setup, address=ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _runtime_env(wanted: Mapping[str, str]) -> dict[str, dict[str, str]] | None:
    """What is missing in the environment of this node; None if nothing is.

    Ray starts a process of its own for an actor that has a runtime environment, and takes one that
    is there already for one that has none.
    """
    missing = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    return {"env_vars": missing} if missing else None


def _this_node() -> NodeAffinitySchedulingStrategy:
    """The coordinator belongs where the driver is: the job ends with that host.

    A soft affinity of Ray would place it on any.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _how_it_ended(join: Any) -> Ended | None:
    """None: it has not."""
    try:
        reason = ray.get(join)
        return None if reason is None else Ended(reason)
    except RayTaskError as error:
        cause = error.cause
        text = str(cause) if isinstance(cause, ElasticError) else f"{type(cause).__name__}: {cause}"
        return Ended(text or type(cause).__name__, cause, str(error))
    except ActorUnavailableError:  # the call got lost; of a death the next one tells
        return None
    except RayActorError as error:
        return Ended(f"its process died\n{error}")
    except ActorUnschedulableError as error:  # such as on a node that is drained
        return Ended(f"its process cannot start\n{error}")


class CoordinatorActor:
    """The coordinator as an actor: Ray restarts it where it dies."""

    def __init__(self, setup: JobSetup) -> None:
        setup = here(setup)
        node = ray.get_runtime_context().get_node_id()
        cloud = cloud_sources(setup.job.preemption.source)
        watch = NodeWatch({"Ray": Drains(node, drains), **cloud})
        processes = insist(partial(RayProcesses, setup))
        self._shell = CoordinatorShell(setup, processes, watch)
        self._shell.start()

    def status(self) -> Status:
        return self._shell.status()

    def failure(self) -> BaseException | None:
        return self._shell.failure()

    def scale(self, num_workers: int | None, num_nodes: int | None) -> str:
        return self._shell.scale(num_workers, num_nodes)

    def undo(self, culprit: str) -> list[str]:
        return self._shell.undo(culprit)

    def stop(self, reason: str) -> None:
        self._shell.stop(reason)


def launch_coordinator(setup: JobSetup) -> Any:
    """Start the job's coordinator; it starts the rest. Returns the actor."""
    return (
        ray.remote(CoordinatorActor)
        .options(
            name=setup.coordinator_name,
            namespace=NAMESPACE,
            num_cpus=0,
            scheduling_strategy=_this_node(),
            max_restarts=-1,
            max_concurrency=8,
        )
        .remote(setup)
    )


class RemoteIsland:
    """An island in a placement group of its own, on any node that has room."""

    def __init__(
        self, cpus: float, labels: Mapping[str, str], command: Sequence[str], **where: Any
    ) -> None:
        self._group: PlacementGroup = placement_group(
            [{"CPU": cpus}], bundle_label_selector=[dict(labels)] if labels else None
        )
        remote: Any = ray.remote
        self._actor: Any = (
            remote(Island)
            .options(
                num_cpus=cpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group),
            )
            .remote()
        )
        self._exit: Any = self._actor.run.remote(list(command), **where)

    def poll(self) -> str | None:
        """None while it waits for room or runs; then "", or why it ended otherwise."""
        if not ray.wait([self._exit], timeout=0)[0]:
            return None
        try:
            status = int(ray.get(self._exit))
        except RayActorError as error:
            return f"its process died: {str(error).splitlines()[0]}"
        return "" if status == 0 else f"its driver ended with status {status}"

    def end(self) -> None:
        """Give back what it holds; a driver that still runs ends in good order."""
        ray.kill(self._actor, no_restart=True)
        remove_placement_group(self._group)


def end_coordinator(name: str, coordinator: Any) -> None:
    """End a job's coordinator, and wait until its name is free: its run may go on at once."""
    ray.kill(coordinator, no_restart=True)
    deadline_s = time.monotonic() + _NAME_FREE_S
    while find_coordinator(name) is not None and time.monotonic() < deadline_s:
        time.sleep(0.01)


def end_orphans(name: str) -> None:
    """End the workers and aggregators of a job whose coordinator died with its driver."""
    for actor in insist(partial(_named, f"{name}/")):
        insist(partial(_end, actor))


def _end(name: str) -> None:
    with contextlib.suppress(ValueError), asking():  # it ended meanwhile
        ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)


def find_coordinator(name: str) -> Any | None:
    """The coordinator of a running job, by the job's name."""
    try:
        return ray.get_actor(f"{name}/coordinator", NAMESPACE)
    except (ValueError, RayError):
        return None
