"""A worker process: carries events and actions between its socket, its slot and its protocol.

Importing this module loads neither torch nor the task: that happens on a thread of low priority,
so that a worker that starts does not slow down those that compute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import wait as wait_for
from typing import TYPE_CHECKING

from actors.setup import (
    NICE_BEHIND,
    JobSetup,
    datasets_of,
    hurry,
    importing,
    load_tasks,
    nice_to_load,
    set_nice,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.channel import Channel
    from elastic.core.compute import MicroBatches
    from elastic.core.faults import Fault
    from elastic.core.mapped import Slot
    from elastic.core.protocol import worker as protocol
    from elastic.core.protocol.messages import Lease, Message
    from policies.preflight import Probe

log = logging.getLogger(__name__)

_RETRY_S = 0.003
_IDLE_S = 0.5


class WorkerShell:
    """Runs one worker until it is dismissed or its job is gone.

    Args:
        signals: a file descriptor from which the numbers of signals are read.
        probed: told what was measured before it connects, if `workers.preflight` is set.
    """

    def __init__(
        self,
        setup: JobSetup,
        worker: int,
        signals: int,
        probed: Callable[[Probe], None] = lambda _: None,
    ) -> None:
        self._setup = setup
        self._worker = worker
        self._signals = signals
        self._probed = probed
        self._leaves = False
        self._slots: dict[int, Slot] = {}
        self._channel: Channel | None = None
        self._pending: protocol.Compute | protocol.Encode | None = None
        self._held: Message | None = None
        self._exit = ""

    def run(self) -> str:
        """Work until dismissed; return the reason. Errors of the user's code escape."""
        begun = self._setup.open_store().spec_path.exists()
        together = begun or bool(self._setup.faults)  # faults strike workers that must be there
        loader = _Loader(self._load, nice_to_load(self._worker, together=together))
        loader.start()
        loader.join()
        if loader.error is not None:
            raise loader.error
        hurry()
        if self._setup.job.workers.preflight is not None and not self._exit:
            self._probed(self.measure())
        while not self._exit:
            if self._channel is None and not self._reconnect():
                break
            self._drain(wait=self._pending is None)
            if self._pending is not None:
                self._work()
        return self._exit or "the job is gone"

    def _load(self) -> None:
        """Everything slow: imports, data, model."""
        with importing():
            import pickle

            from actors.injector import WorkerInjector
            from elastic.core.compute import MicroBatches, deterministic
            from elastic.core.device import make_device
            from elastic.core.protocol.worker import Worker

        self._store = self._setup.open_store()
        if self._setup.has_nodes:
            self._store.create()  # it may be the first process of the job on this host
        else:
            self._store.hold_alive()
        tasks = load_tasks(self._setup)
        while not self._store.spec_path.exists():  # the first aggregator is still preparing
            if not self._store.path.exists():
                self._exit = "the job is gone"
                return
            time.sleep(0.02)
        job = self._setup.job
        deterministic(job.workers.threads)
        self._models: list[MicroBatches] = []
        for lane, task, dataset in zip(self._setup.lanes, tasks, datasets_of(tasks), strict=True):
            store = lane.open_store()
            spec = pickle.loads(store.spec_path.read_bytes())
            device = make_device(job.device, spec.layout, self._worker)
            one = MicroBatches(lane.job, task, spec, store, device, dataset)
            if job.device != "cpu":
                one.between = self._send_held
            one.warm_up()
            one.forget()
            self._models.append(one)
        self._computed = self._models[0]
        self._injector = WorkerInjector(
            self._setup.faults, self._store.path, self._worker, job.seed, self._note
        )
        self._protocol = Worker(self._worker, os.getpid())

    def measure(self) -> Probe:
        """What this worker is fit for, once it has loaded. One that is slow from step 0 on shows it
        here. May be called from another thread while it is idle."""
        from elastic.core.probe import measure

        found = measure(self._models[0].device.kind)
        factor = self._injector.slowness(0)
        multiply_s, copy_s = found.multiply_s * factor, found.copy_s * factor
        return replace(found, multiply_s=multiply_s, copy_s=copy_s)

    def _note(self, fault: Fault, step: int) -> None:
        """Tell the event log that a fault happens here."""
        self._setup.run.tell("fault", str(fault), step=step, worker=self._worker)

    # ------------------------------------------------------------------ socket

    def _reconnect(self) -> bool:
        """Wait for an acting aggregator. False if the job has ended."""
        from actors.channel import connect
        from elastic.core.protocol.worker import Connected

        path = self._store.path / "socket"
        while self._store.path.exists():
            self._channel = connect(path)
            if self._channel is not None:
                self._handle(Connected())
                if self._leaves:
                    self._ask_to_leave()
                return True
            time.sleep(_RETRY_S)
        return False

    def _drain(self, *, wait: bool) -> None:
        """Handle what has arrived; with `wait`, wait for something to arrive first."""
        from elastic.core.errors import ChannelClosed
        from elastic.core.protocol.worker import Disconnected

        if self._channel is None:
            return
        if wait:
            self._computed.device.wait()
            self._send_held()
            wait_for([self._channel.fileno(), self._signals], _IDLE_S)
        if signal.SIGTERM in self._read_signals() and not self._leaves:
            self._leaves = True
            self._ask_to_leave()
        try:
            while self._channel is not None and (message := self._channel.receive()) is not None:
                self._receive(message)
        except ChannelClosed:
            self._channel.close()
            self._channel = self._held = None
            self._handle(Disconnected())

    def _receive(self, message: Message) -> None:
        from elastic.core.mapped import Slot
        from elastic.core.protocol.messages import Leases, Welcome

        if isinstance(message, Welcome) and message.manifest.key.model not in self._slots:
            model = message.manifest.key.model
            store, compute = self._setup.lanes[model].open_store(), self._models[model]
            slot = Slot(store.path, self._worker, compute.sizes, writable=True)
            self._slots[model], compute.meter.word = slot, slot.progress
        if isinstance(message, Leases):
            for model, compute in enumerate(self._models):
                compute.read_ahead([one for one in message.leases if one.key.model == model])
        self._handle(message)  # type: ignore[arg-type]

    def _handle(self, event: protocol.Event) -> None:
        from elastic.core.protocol.messages import Commit
        from elastic.core.protocol.worker import Exit, Send

        words = [compute.key_word() for compute in self._models]
        for action in self._protocol.handle(event, words, self._models[0].round_word()):
            if isinstance(action, Send):
                if isinstance(action.message, Commit):
                    self._held = action.message
                    self._send_held()
                else:
                    self._send(action.message)
            elif isinstance(action, Exit):
                self._exit = action.reason
            else:
                assert self._pending is None, "one computation at a time"
                self._pending = action

    def _send_held(self) -> None:
        """Ask only once the sum is in the slot: it may be on its way while the next is computed."""
        if self._held is not None and self._computed.device.arrived():
            message, self._held = self._held, None
            self._send(message)

    def _read_signals(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(self._signals, select.PIPE_BUF)
        return b""

    def _ask_to_leave(self) -> None:
        """Its machine is taken away soon: finish what it holds, then go."""
        from elastic.core.protocol.messages import Leave

        self._send(Leave("SIGTERM"))

    def _send(self, message: Message) -> None:
        from elastic.core.errors import ChannelClosed

        try:
            if self._channel is not None:
                self._channel.send(message)
        except ChannelClosed:
            pass  # the end of file is read next; Hello repeats what matters

    # -------------------------------------------------------------------- work

    def _work(self) -> None:
        """Do the pending computation, then tell the protocol, news first."""
        from elastic.core.protocol.worker import Compute, Encode

        action, self._pending = self._pending, None
        match action:
            case Compute():
                event = self._run_compute(action)
            case Encode():
                event = self._run_encode(action)
            case _:
                return
        self._drain(wait=False)
        if not self._exit:
            self._handle(event)

    def _turn_to(self, model: int) -> MicroBatches:
        """The gradients of one model at a time are in memory."""
        compute = self._models[model]
        if compute is not self._computed:
            self._computed.device.wait()
            self._send_held()
            self._computed.forget()
            self._computed = compute
        return compute

    def _step_of(self, lease: Lease) -> int:
        """Of the job: faults of a schedule count those."""
        from elastic.core.protocol.messages import step_of_job

        return step_of_job(lease.key.model, lease.key.step, len(self._models))

    def _run_compute(self, action: protocol.Compute) -> protocol.Event:
        from elastic.core.compute import AbandonedError
        from elastic.core.protocol.messages import Combine
        from elastic.core.protocol.worker import Abandoned, Computed

        lease, compute = action.lease, self._turn_to(action.lease.key.model)
        step = self._step_of(lease)
        try:
            self._injector.sleep(
                step, compute.members, lambda: compute.runs(lease), round_=lease.round
            )
            self._injector.at("before_compute", step)
            outcome = compute.compute(lease)
            took_s = outcome.end_s - outcome.start_s
            late_s = self._injector.stretch(step, took_s, compute.meter.word)
            outcome = replace(outcome, end_s=outcome.end_s + late_s)
            if self._injector.poisons(step):
                outcome = compute.poisoned(outcome)
            has_gradient = lease.combine is not Combine.EVALUATE
            if has_gradient and self._injector.flips(step):
                outcome = compute.flipped(outcome)
            self._injector.at("after_compute", step)
        except AbandonedError:
            return Abandoned(lease)
        return Computed(lease, (outcome,))

    def _run_encode(self, action: protocol.Encode) -> protocol.Event:
        from elastic.core.compute import AbandonedError
        from elastic.core.protocol.worker import Abandoned, Encoded

        lease, half, base = action.lease, action.half, action.base
        model = lease.key.model
        try:
            digest = self._models[model].encode(lease, self._slots[model], half=half, base=base)
        except AbandonedError:
            return Abandoned(lease)
        self._injector.at("after_encode", self._step_of(lease))
        return Encoded(digest)


class _Loader(threading.Thread):
    """Runs a function at low priority. Nice values belong to threads on Linux."""

    def __init__(self, load: object, nice: int) -> None:
        super().__init__(name="loader")
        self._load = load
        self._nice = nice
        self.error: BaseException | None = None

    def run(self) -> None:
        set_nice(NICE_BEHIND)
        set_nice(self._nice)  # where that is not allowed, everything computes at Ray's 15
        try:
            self._load()  # type: ignore[operator]
        except BaseException as error:  # handed to the thread that waits
            self.error = error
