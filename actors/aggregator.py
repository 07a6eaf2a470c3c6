"""An aggregator process: prepares the store or stands by, then acts until the job ends.

Carries events and actions between sockets, shared memory and the protocol, one action at a time
and in order: a crash between any two is what the protocol is made for.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import pickle
import select
import selectors
import socket
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from actors.channel import Channel, accept, listen
from actors.checkpointing import Checkpointer
from actors.injector import AggregatorInjector
from actors.setup import NICE_STEP, JobSetup, set_nice
from elastic.core import checkpoint
from elastic.core.compute import deterministic, make_sizes, model_tensors
from elastic.core.errors import ChannelClosed, CheckpointError
from elastic.core.faults import Fault
from elastic.core.fingerprint import differences, fingerprint, parameters_sha256
from elastic.core.mapped import (
    EMA,
    Control,
    MappedFile,
    Record,
    Slot,
    Version,
    check_space,
    open_manifest,
)
from elastic.core.memory import check_memory
from elastic.core.model import ModelSpec, prepare, raw_bytes
from elastic.core.optim import without_compiler
from elastic.core.protocol import aggregator as protocol
from elastic.core.protocol import events
from elastic.core.protocol.messages import (
    Hello,
    Manifest,
    Membership,
    Message,
    Scale,
    State,
    manifest_from_bytes,
    manifest_to_bytes,
    pack_outcome,
    unpack_outcome,
)
from elastic.core.retained import check_metric
from elastic.core.store import kill_and_wait
from elastic.core.task import Task
from elastic.core.update import Plan, Snapshot, Updater
from elastic.core.weights import initialize

log = logging.getLogger(__name__)

_TICK_S = 0.25
_LINGER_S = 60.0
_HUNG_S = 3.0  # an acting aggregator beats at least every _TICK_S


class AggregatorShell:
    """One aggregator: waits until it may act, then acts. `run` returns when the job has ended."""

    def __init__(self, setup: JobSetup) -> None:
        self._setup = setup
        self._job = setup.job
        self._run = setup.run
        self._store = setup.open_store()
        self._task: Task = setup.load_task()

    def run(self) -> str:
        """Stand by, act, end. Whatever happens, the lock is given back for a successor."""
        deterministic(threads=1)  # cores work on different chunks
        without_compiler()
        self._store.create()
        try:
            return self._live()
        finally:
            if hasattr(self, "_updater"):
                self._updater.close()
                self._background.shutdown()
            self._store.close()

    def _live(self) -> str:
        acting = self._store.try_act() or self._await_spec()
        self._took_over = self._store.spec_path.exists()
        if not self._took_over:
            if not acting:
                return "the job has ended"
            self._prepare()
            ctypes.CDLL(None).malloc_trim(0)  # the model and its trial took several times its size
        self._open()
        if not acting and not self._stand_by():
            return "the job has ended"
        return self._act()

    # ----------------------------------------------------------- preparing

    def _await_spec(self) -> bool:
        """Wait until the acting aggregator has prepared the store, or is dead. True: act now."""
        while self._store.path.exists() and not self._store.spec_path.exists():
            if self._store.try_act():
                return True
            time.sleep(0.05)
        return False

    def _prepare(self) -> None:
        """Make the store: from the task, or from a checkpoint. The spec, written last, seals it."""
        job = self._job
        prepared = prepare(self._task, job, self._task.dataset())
        spec = prepared.spec
        evaluated = spec.evaluated_metrics if job.evaluate.every else None
        check_metric(job.checkpoint, spec.metrics, evaluated)
        if self._setup.initial is not None and self._setup.resume_from is None:
            targets = {key: prepared.values[name] for key, name in spec.state_dict.items()}
            initialize(targets, self._setup.initial, job.init_skip)
        sizes = make_sizes(spec, job)
        check_memory(spec.layout, job.workers.start)
        check_space(sizes.total_bytes(max_workers=job.workers.max + job.workers.spare))
        versions = tuple(
            Version(self._store.path, index, sizes, writable=True, optimizer=True)
            for index in range(2)
        )
        for field in spec.layout.fields:
            for version in versions:
                view = version.values[field.start : field.stop].view(field.shape)
                view.copy_(prepared.values[field.name])
        if job.ema:
            for version in versions:
                average = version.states[EMA]
                average.copy_(version.values[: len(average)])
        for counter in spec.layout.counters:
            (data,) = raw_bytes([prepared.values[counter.name]])
            stop = counter.start_byte + counter.size_bytes
            for version in versions:
                version.counters[counter.start_byte : stop] = torch.frombuffer(
                    bytearray(data), dtype=torch.uint8
                )
        if spec.constants:
            file = MappedFile(self._store.path / "constants", sizes.constants_bytes, writable=True)
            for one in spec.constants:
                num = one.size_bytes // one.dtype.itemsize
                view = file.tensor(one.dtype, one.start_byte, num).view(one.shape)
                view.copy_(prepared.values[one.name])
        control = Control(self._store.path, sizes, writable=True)
        state = State(step=0, attempt=0, exponents=None)
        if self._setup.resume_from is not None:
            state = self._restore(spec, versions)
        control.state.write(state.to_bytes())
        partial = self._store.path / "spec.partial"
        partial.write_bytes(pickle.dumps(spec))
        partial.rename(self._store.spec_path)

    def _restore(self, spec: ModelSpec, versions: tuple[Version, ...]) -> State:
        """Fill the version of the checkpoint's step; return the state it was written in."""
        assert self._setup.resume_from is not None
        found = checkpoint.read_checkpoint(self._setup.resume_from)
        state = State.from_bytes(found.meta["state"].encode())
        version = versions[state.step % 2]
        targets = {"values": version.values, "counters": version.counters}
        targets |= {f"state.{key}": tensor for key, tensor in version.states.items()}
        targets |= {f"scalar.{key}": tensor for key, tensor in version.scalars.items()}
        for name, target in targets.items():
            if name not in found.state or found.state[name].shape != target.shape:
                raise CheckpointError(
                    f"{found.path}: {name} does not fit this job's model and optimizer; resume"
                    " with the job file of the run, or start a new run"
                )
            target.copy_(found.state[name])
        changed = differences(found.meta["fingerprint"], self._fingerprint())
        if changed:
            self._event("fingerprint", "; ".join(changed))
            state = State(**{**asdict(state), "exact": False})
        return state

    def _fingerprint(self) -> dict[str, str | int]:
        return fingerprint(self._job.workers.threads, self._job.device)

    # ------------------------------------------------------------ standing by

    def _open(self) -> None:
        """Map the store and make everything that acting needs, before it is needed."""
        job = self._job
        self._spec: ModelSpec = pickle.loads(self._store.spec_path.read_bytes())
        self._sizes = make_sizes(self._spec, job)
        self._control = Control(self._store.path, self._sizes, writable=True)
        self._versions = (
            Version(self._store.path, 0, self._sizes, writable=True, optimizer=True),
            Version(self._store.path, 1, self._sizes, writable=True, optimizer=True),
        )
        self._constants = None
        if self._spec.constants:
            path = self._store.path / "constants"
            self._constants = MappedFile(path, self._sizes.constants_bytes, writable=False)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._updater = Updater(
            self._spec,
            self._versions,
            num_micro_batches=job.batch.micro_batches,
            clip_norm=job.clip_norm,
            ema_decay=job.ema.decay if job.ema else None,
            num_threads=len(os.sched_getaffinity(0)),
        )
        self._schedule = getattr(self._task, "schedule", None)
        self._injector = AggregatorInjector(self._setup.faults, self._store.path)

    def _stand_by(self) -> bool:
        """Wait until the acting aggregator is dead; kill it if it hangs. False: the job ended.

        Acting needs the lock, which the kernel gives once the old process is gone: generations
        cannot fence stores to memory.
        """
        beat, beat_s = -1, time.monotonic()
        while self._store.path.exists():
            if self._store.try_act():
                return True
            self._injector.wake()
            pid = self._control.active_pid[0]
            if self._control.heartbeat[0] != beat:
                beat, beat_s = self._control.heartbeat[0], time.monotonic()
            elif pid and time.monotonic() - beat_s > _HUNG_S:
                self._event("aggregator_hung", f"pid {pid} hangs for {_HUNG_S:.0f} s; killed")
                kill_and_wait(pid, _HUNG_S)
                continue
            _wait_for_death(pid, _TICK_S)
        return False

    # ----------------------------------------------------------------- acting

    def _act(self) -> str:
        job = self._job
        set_nice(NICE_STEP)
        self._control.active_pid[0] = os.getpid()
        recovered = self._recover()
        self._slots: dict[int, Slot] = {}
        self._manifests: dict[int, Record] = {}
        for worker in recovered.manifests:
            self._open_slot(worker)
        self._protocol = protocol.Aggregator(
            protocol.Rules(
                num_steps=job.steps,
                num_micro_batches=job.batch.micro_batches,
                num_chunks=len(self._spec.layout.chunks),
                skip_nonfinite=job.nonfinite.action == "skip",
                max_skipped=job.nonfinite.max_skipped,
                evaluate_every=job.evaluate.every,
                num_evaluated=job.evaluate.micro_batches,
            ),
            recovered,
        )
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int | None, Channel] = {}
        self._strangers: set[Channel] = set()
        self._later: list[Any] = []
        self._commit_s = time.monotonic()
        self._update_s = 0.0
        self._checkpoints = Checkpointer(
            self._setup,
            self._store.path / "durable",
            self._background,
            first=recovered.state,
            chunks=self._spec.layout.chunks,
            take=self._take_snapshot,
            release=self._release_snapshot,
            weights=lambda snapshot, averaged: model_tensors(
                self._spec, snapshot, self._constants, averaged=averaged
            ),
            trained=lambda state: {
                "loss": state.loss,
                **_by_name(self._spec.metrics, state.metrics),
            },
            event=self._event,
        )
        self._finishing: Future[None] | None = None
        listener = listen(self._store.path / "socket")
        self._selector.register(listener, selectors.EVENT_READ, None)
        if self._took_over:
            self._take_over_metrics(recovered.state)
            key = recovered.state.key
            reason = f"pid {os.getpid()} goes on with step {key.step}, attempt {key.attempt}"
            self._event("aggregator_took_over", reason)
        self._handle(events.Started())
        while self._protocol.phase is not protocol.Phase.ENDED:
            self._turn(listener)
        self._handle(events.Tick())  # tell the coordinator
        self._linger(listener)
        return "the job has ended"

    def _take_over_metrics(self, state: State) -> None:
        """Go on where the predecessor's metrics end; add the step that it had no time to write."""
        now_s, unix_s = time.monotonic(), time.time()
        newest = self._run.newest_metrics()
        if newest is not None:
            self._commit_s = now_s - (unix_s - newest["time_s"])
        step = state.step - 1
        if step >= 0 and (newest is None or newest["step"] < step):
            skipped = step in state.skipped
            loss = float("nan") if skipped or state.loss is None else state.loss
            nan, metrics = float("nan"), () if skipped else state.metrics
            self._later.append(events.Committed(step, 0, loss, nan, skipped, 0, 0, (), metrics))

    def _recover(self) -> protocol.Recovered:
        """Read what counts from shared memory."""
        data = self._control.state.read()
        assert data is not None, "the spec is written after the state"
        state = State.from_bytes(data)
        manifests = {}
        for worker in self._store.worker_ids():
            raw = open_manifest(self._store.path, worker, self._sizes).read()
            manifests[worker] = manifest_from_bytes(raw) or Manifest(state.key)
        counted = {
            one
            for manifest in manifests.values()
            if manifest.key == state.key
            for one in manifest.micro_batches
        }
        rows = {one: unpack_outcome(self._control.read_row(one))[0] for one in counted}
        raw = self._control.membership.read()
        membership = Membership.from_bytes(raw) if raw else Membership()
        return protocol.Recovered(state, membership, manifests, rows)

    def _turn(self, listener: socket.socket) -> None:
        """Wait for something and handle it."""
        self._beat()
        timeout_s = min(max(0.0, self._protocol.next_tick_s - time.monotonic()), _TICK_S)
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            if key.fileobj is listener:
                self._register(accept(listener))
            else:
                assert isinstance(key.fileobj, Channel)
                self._read(key.fileobj, key.data)
        if not ready or time.monotonic() >= self._protocol.next_tick_s:
            self._tick()
        for action in self._later:
            self._write_down(action)
        self._later.clear()
        if self._finishing is not None and self._finishing.done():
            self._finishing.result()
            self._finishing = None
            self._handle(events.Finished())

    def _tick(self) -> None:
        self._injector.wake()
        progress = {worker: slot.progress[0] for worker, slot in self._slots.items()}
        self._handle(events.Tick(progress))
        self._checkpoints.turn(self._protocol.state)

    def _beat(self, _: int = 0) -> None:
        self._control.heartbeat[0] += 1

    def _linger(self, listener: socket.socket) -> None:
        """Tell every coordinator that the job has ended, until one frees the memory."""
        alone_s = time.monotonic()
        while self._store.path.exists():
            self._turn(listener)
            if None in self._channels:
                alone_s = time.monotonic()
            elif time.monotonic() - alone_s > _LINGER_S:
                self._store.remove()

    # --------------------------------------------------------------- channels

    def _register(self, channel: Channel) -> None:
        self._strangers.add(channel)
        self._selector.register(channel, selectors.EVENT_READ, channel)

    def _read(self, channel: Channel, sender: Any) -> None:
        """Handle what one channel has. Its first message says who it is."""
        try:
            while channel.fileno() >= 0 and (message := channel.receive()) is not None:
                if channel in self._strangers:
                    self._strangers.discard(channel)
                    sender = message.worker if isinstance(message, Hello) else None
                    self._channels[sender] = channel
                    self._selector.modify(channel, selectors.EVENT_READ, sender)
                self._receive(sender, message)
        except ChannelClosed:
            self._close(channel, sender)

    def _receive(self, sender: int | None, message: Message) -> None:
        step = self._protocol.state.step
        if self._setup.faults:
            self._at("step_start", step)
            self._at("before_grant", step)
        self._handle(events.Received(sender, message))

    def _close(self, channel: Channel, sender: Any) -> None:
        if channel.fileno() >= 0:
            self._selector.unregister(channel)
            channel.close()
        known = channel not in self._strangers
        self._strangers.discard(channel)
        if known and self._channels.get(sender) is channel:
            del self._channels[sender]
            self._handle(events.Disconnected(sender))

    def _send(self, receiver: int | None, message: Message) -> None:
        channel = self._channels.get(receiver)
        if channel is None:
            return
        with contextlib.suppress(ChannelClosed):  # its end of file is read in the next turn
            channel.send(message)

    # ---------------------------------------------------------------- actions

    def _handle(self, event: events.Event) -> None:
        for action in self._protocol.handle(event, time.monotonic()):
            self._carry_out(action)

    def _carry_out(self, action: events.Action) -> None:
        match action:
            case events.Send(worker, message):
                self._send(worker, message)
            case events.Tell(report):
                self._send(None, report)
            case events.OpenSlot(worker):
                self._open_slot(worker)
            case events.DropSlot(worker):
                self._slots.pop(worker, None)
                self._manifests.pop(worker, None)
                self._store.drop_slot(worker)
            case events.HangUp(worker):
                if worker in self._channels:
                    channel = self._channels.pop(worker)
                    self._selector.unregister(channel)
                    channel.close()
            case events.SaveRow(_, outcome):
                self._control.write_row(outcome.micro_batch, pack_outcome(outcome))
                self._at("after_row", self._protocol.state.step)
            case events.SaveManifest(worker, manifest):
                self._manifests[worker].write(manifest_to_bytes(manifest))
                self._at("after_grant", manifest.key.step)
            case events.MarkDone(micro_batches, key):
                for micro_batch in micro_batches:
                    self._control.done[micro_batch] = key.word
            case events.MarkUndone(micro_batches):
                for micro_batch in micro_batches:
                    self._control.done[micro_batch] = 0
            case events.SaveMembership(membership):
                self._control.membership.write(membership.to_bytes())
            case events.Update():
                self._handle(events.Updated(self._update(action), action.round))
            case events.SaveState(state):
                self._save_state(state)
            case events.Note() | events.Committed():
                self._later.append(action)
            case events.Evaluated():
                self._write_evaluation(action)
            case events.Finish(failure):
                self._checkpoints.stop()
                self._finishing = self._background.submit(self._finish, failure)

    def _open_slot(self, worker: int) -> None:
        if worker not in self._slots:
            self._manifests[worker] = open_manifest(self._store.path, worker, self._sizes)
            self._slots[worker] = Slot(self._store.path, worker, self._sizes, writable=True)

    def _update(self, action: events.Update) -> float:
        self._at("before_update", action.step)
        begin_s = time.monotonic()
        factor = 1.0 if self._schedule is None else float(self._schedule(action.step))
        plan = Plan(
            source=action.step % 2,
            slots=() if action.skip else [(self._slots[w], half) for w, half in action.slots],
            exponents=action.exponents,
            weight=action.weight,
            factor=factor,
            fresh=action.num_updates == 0,
        )
        middle = len(self._spec.layout.chunks) // 2

        def beat(chunk: int) -> None:
            self._beat()
            if chunk == middle and self._setup.faults:
                self._at("mid_update", action.step)

        norm = self._updater.run(plan, beat)
        self._update_s = time.monotonic() - begin_s
        self._at("before_flip", action.step)
        return norm

    def _save_state(self, state: State) -> None:
        self._control.state.write(state.to_bytes())
        self._control.key[0] = state.key.word
        if state.attempt == 0 and state.step > 0:
            self._at("after_flip", state.step - 1)
            self._checkpoints.turn(state)
        self._at("step_start", state.step)

    def _at(self, point: str, step: int) -> None:
        if not self._setup.faults:
            return
        coordinator = self._channels.get(None)
        self._injector.at(
            point,
            step,
            {worker: one.peer_pid for worker, one in self._channels.items() if worker is not None},
            coordinator_pid=coordinator.peer_pid if coordinator is not None else None,
            scale=self._scale,
            note=self._note_fault,
        )

    def _scale(self, delta: int, worker: int | None) -> bool:
        self._send(None, Scale(delta, worker))
        return True

    def _note_fault(self, fault: Fault) -> None:
        worker = fault.target if isinstance(fault.target, int) else None
        self._event("fault", str(fault), worker)

    # ---------------------------------------------------------- run folder

    def _event(self, kind: str, reason: str, worker: int | None = None) -> None:
        step = generation = 0
        if hasattr(self, "_protocol"):
            step = self._protocol.state.step
            generation = self._protocol.membership.generation
        elif hasattr(self, "_control") and (data := self._control.state.read()):
            step = State.from_bytes(data).step
        event = {
            "time_s": time.time(),
            "kind": kind,
            "step": step,
            "generation": generation,
            "worker": worker,
            "reason": reason,
        }
        self._run.append_event(event)

    def _write_down(self, action: events.Note | events.Committed) -> None:
        if isinstance(action, events.Note):
            self._event(action.kind, action.reason, action.worker)
            return
        now_s, batch = time.monotonic(), self._job.batch
        groups = self._spec.optimizer.groups
        factor = 1.0 if self._schedule is None else float(self._schedule(action.step))
        self._run.append_metrics(
            {
                "step": action.step,
                "time_s": time.time(),
                "step_s": now_s - self._commit_s,
                "loss": _finite(action.loss),
                "metrics": _by_name(self._spec.metrics, action.metrics),
                "grad_norm": _finite(action.grad_norm),
                "lr": groups[0].options["lr"] * factor,
                "samples": batch.micro_batches * batch.micro_batch_size,
                "num_workers": action.num_workers,
                "num_duplicates": action.num_duplicates,
                "attempt": action.attempt,
                "update_s": self._update_s,
                "work": _unix_times(action.work),
            }
        )
        self._commit_s = now_s

    def _write_evaluation(self, action: events.Evaluated) -> None:
        metrics = _by_name(self._spec.evaluated_metrics, action.metrics)
        self._run.append_evaluation(
            {
                "step": action.step,
                "time_s": time.time(),
                "loss": _finite(action.loss),
                "metrics": metrics,
                "work": _unix_times(action.work),
            }
        )
        shown = {"loss": _finite(action.loss), **metrics}
        text = ", ".join(
            f"{name} {'not finite' if value is None else format(value, '.4g')}"
            for name, value in shown.items()
        )
        self._event("evaluated", text)

    # --------------------------------------------------------- checkpoints

    def _take_snapshot(self, state: State) -> Snapshot:
        snapshot = Snapshot(self._sizes, state.step % 2, self._versions[state.step % 2])
        self._updater.snapshot = snapshot
        return snapshot

    def _release_snapshot(self, snapshot: Snapshot) -> None:
        if self._updater.snapshot is snapshot:
            self._updater.snapshot = None

    def _last_evaluation(self) -> dict[str, Any] | None:
        """The newest one, without who computed it."""
        evaluations = self._run.read_evaluations()
        if not evaluations:
            return None
        return {name: evaluations[-1][name] for name in ("step", "loss", "metrics")}

    def _finish(self, failure: str) -> None:
        """The last checkpoint and the result. Doing it twice does no harm."""
        state = self._protocol.state
        version = self._versions[state.step % 2]
        unwritten = self._checkpoints.finish(state)
        if unwritten:
            unwritten = (
                f"the last checkpoint, of step {state.step}, could not be written to"
                f" {self._setup.checkpoints}: {unwritten}"
            )
            failure = "; ".join(filter(None, (failure, unwritten)))
        metrics = self._run.read_metrics()
        happened = self._run.read_events()
        started = min((one["time_s"] for one in happened), default=time.time())
        steps_s = [one["step_s"] for one in metrics[1:]]
        kind = "job_failed" if failure else "job_finished"
        if not failure and state.step < self._job.steps:
            kind = "job_stopped"
        self._run.write_json(
            self._run.result_json,
            {
                "name": self._job.name,
                "outcome": kind.removeprefix("job_"),
                "failure": failure,
                "steps": state.step,
                "loss": state.loss,
                "first_loss": state.first_loss,
                "params_sha256": parameters_sha256(self._spec.layout, version.values),
                "samples_sha256": state.samples,
                "exact": state.exact,
                "wall_s": time.time() - started,
                "step_s_median": statistics.median(steps_s) if steps_s else None,
                "num_generations": self._protocol.membership.generation,
                "overflows": state.overflows,
                "skipped_steps": list(state.skipped),
                "metrics": _by_name(self._spec.metrics, state.metrics),
                "evaluation": self._last_evaluation(),
                "last_checkpoint_failure": unwritten,
                "init_sha256": self._setup.initial.sha256 if self._setup.initial else None,
                "faults_fired": sorted(self._injector.fired()),
                "versions": self._fingerprint(),
            },
        )
        self._event(kind, failure or f"step {state.step} of {self._job.steps}")


def _finite(value: float) -> float | None:
    """JSON knows no NaN: a skipped step has no loss."""
    return value if math.isfinite(value) else None


def _by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    """Metrics for JSON; all of a step that was skipped have no value."""
    known = values or [math.nan] * len(names)
    return {name: _finite(value) for name, value in zip(names, known, strict=True)}


def _unix_times(work: Iterable[tuple[int, int, float, float, str]]) -> list[list[Any]]:
    """Who computed what when, for JSON, in seconds since the epoch."""
    ahead_s = time.time() - time.monotonic()
    return [
        [worker, one, start_s + ahead_s, end_s + ahead_s, outcome]
        for worker, one, start_s, end_s, outcome in work
    ]


def _wait_for_death(pid: int, timeout_s: float) -> None:
    """Wait until the process is gone, at most that long."""
    if not pid:
        time.sleep(0.02)
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        time.sleep(0.001)  # the kernel is about to give its lock back
        return
    try:
        select.select([descriptor], [], [], timeout_s)
    finally:
        os.close(descriptor)
