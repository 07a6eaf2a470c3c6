"""The checkpoints of the acting aggregator: written behind training, tried again, the old removed.

A failure is an event and a later try, never the end of training; only the last checkpoint of a job
is waited for, and not for ever. Decides nothing: see `policies.saving`, `policies.retention`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch

from actors.setup import NICE_BEHIND, JobSetup, set_nice
from elastic.core import checkpoint
from elastic.core.errors import StorageError
from elastic.core.fingerprint import fingerprint
from elastic.core.layout import Chunk
from elastic.core.ownership import check_owner
from elastic.core.protocol.messages import State
from elastic.core.retained import metrics_at, retention
from elastic.core.storage import Storage, open_storage
from elastic.core.update import Snapshot, snapshot_state
from policies.retention import Kept, RetentionView
from policies.saving import GiveUp, Hold, Save, SaveWithBackOff, SavingView

_WHOLE_S = 60.0  # for the state that other nodes keep


class Checkpointer:
    """Writes one job's checkpoints. One per acting aggregator.

    Args:
        durable: a file beside the state, which outlives this process: the newest step written.
        background: the one thread that writes.
        take: begins a snapshot of a state's version.
        release: lets training go on without the snapshot, once it is copied.
        weights: the model's state_dict out of a snapshot; of its average, if the flag is set.
        trained: loss and metrics of a state's last step.
        event: tells the run folder, from any thread.
    """

    def __init__(
        self,
        setup: JobSetup,
        durable: Path,
        background: ThreadPoolExecutor,
        *,
        first: State,
        chunks: Sequence[Chunk],
        take: Callable[[State], Snapshot],
        release: Callable[[Snapshot], None],
        weights: Callable[[Snapshot, bool], Mapping[str, torch.Tensor]],
        trained: Callable[[State], Mapping[str, float | None]],
        event: Callable[[str, str], None],
    ) -> None:
        config = setup.job.checkpoint
        self._setup, self._durable, self._background = setup, durable, background
        self._chunks, self._take, self._release = chunks, take, release
        self._weights, self._trained, self._event = weights, trained, event
        self._saving = SaveWithBackOff(every=config.every, patience_s=config.patience_s)
        self._retention = retention(config)
        self._metrics: dict[int, dict[str, float]] = {}
        self._failures_s: tuple[float, ...] = ()
        self._written: int | None = None
        self._writing: Future[str] | None = None
        self._stopped = self._abandoned = False
        if not durable.exists():
            self._note(first.step)
        self._tried = int(durable.read_text())

    @cached_property
    def _storage(self) -> Storage:
        """Opened by the thread in the background: a bucket may take a while to answer."""
        return open_storage(self._setup.checkpoints)

    def turn(self, state: State) -> None:
        """Start to write one behind training, if it is time and none is being written."""
        if self._stopped or state.step >= self._setup.job.steps or state.attempt:
            return
        if self._writing is not None:
            if not self._writing.done():
                return
            self._writing.result()
            self._writing = None
        view = SavingView(time.monotonic(), state.step, self._tried, self._failures_s)
        if isinstance(self._saving.decide(view), Save):
            self._tried = state.step
            self._writing = self._background.submit(self._try_behind, self._take(state), state)

    def stop(self) -> None:
        """Begin no more behind training: `finish` comes."""
        self._stopped = True

    def abandon(self) -> None:
        """The process ends: `finish` tries no more."""
        self._abandoned = True

    def finish(self, state: State) -> str:
        """Write the last one, patiently, on the thread in the background.

        Returns what prevented it, or nothing. Doing it twice does no harm.
        """
        if state.step in (0, self._written):
            return ""
        ended_s = time.monotonic()
        problem = ""
        while not self._abandoned:
            now_s = time.monotonic()
            view = SavingView(now_s, state.step, self._tried, self._failures_s, ended_s)
            match self._saving.decide(view):
                case GiveUp(reason):
                    return f"{reason}: {problem}"
                case Hold(until_s):
                    time.sleep(until_s - now_s)
                case Save():
                    problem = self._try(self._take(state), state, "the last one, ")
                    if not problem:
                        return ""
        return problem

    def _try_behind(self, snapshot: Snapshot, state: State) -> str:
        set_nice(NICE_BEHIND)
        return self._try(snapshot, state, "")

    def _try(self, snapshot: Snapshot, state: State, which: str) -> str:
        """Copy, then write. Returns what prevented it, or nothing."""
        try:
            path = self._write(snapshot, state)
        except StorageError as error:
            self._failures_s = (*self._failures_s, time.monotonic())
            self._event("checkpoint_failed", f"{which}step {state.step}: {error}")
            return str(error)
        self._failures_s = ()
        self._written = state.step
        self._note(state.step)
        self._event("checkpoint_written", f"{which}step {state.step}: {path}")
        try:
            self._remove_old(state.step)
        except StorageError as error:
            self._event("checkpoint_not_removed", str(error))
        return ""

    def _write(self, snapshot: Snapshot, state: State) -> str:
        snapshot.copy()
        self._release(snapshot)
        snapshot.wait_until_whole(_WHOLE_S)
        check_owner(self._storage, self._setup.run_id)
        job, tensors = self._setup.job, snapshot_state(snapshot)
        self._metrics[state.step] = metrics_at(self._setup.run, state.step, self._trained(state))
        return checkpoint.write_checkpoint(
            self._storage,
            step=state.step,
            weights=self._weights(snapshot, False),
            averaged=self._weights(snapshot, True) if job.ema else None,
            state=tensors,
            meta={
                "state": state.to_bytes().decode(),
                "job": job.model_dump(mode="json"),
                "fingerprint": fingerprint(job.workers.threads, job.device),
                "metrics": self._metrics[state.step],
                "initial": asdict(self._setup.initial) if self._setup.initial else None,
            },
            chunks=self._chunks,
            chunked=[name for name in tensors if name == "values" or name.startswith("state.")],
        )

    def _note(self, step: int) -> None:
        """Remember for a successor that this step is durable."""
        partial = self._durable.with_suffix(".partial")
        partial.write_text(str(step))
        partial.rename(self._durable)

    def _remove_old(self, written: int) -> None:
        kept = [
            Kept(step, self._value(step)) for step in checkpoint.checkpoint_steps(self._storage)
        ]
        decision = self._retention.decide(RetentionView(written, kept))
        for step in decision.steps:
            checkpoint.remove_checkpoint(self._storage, step)

    def _value(self, step: int) -> float | None:
        """The metric that decides which are best, also if it came after the checkpoint."""
        config = self._setup.job.checkpoint
        if not config.keep_best:
            return None
        if step not in self._metrics:
            meta = checkpoint.read_meta(self._storage, step)
            self._metrics[step] = meta.get("metrics", {}) if meta is not None else {}
        late = metrics_at(self._setup.run, step, {})
        return {**self._metrics[step], **late}.get(config.metric)
