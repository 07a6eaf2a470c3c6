"""The updating half of the aggregator: from the slots and version A to version B.

Each chunk is summed, decoded and updated on one thread; cores work on different chunks, so that
nothing rounds differently with the number of cores. Version A and the slots are only read: a crash
at any point loses nothing. Never flips a version: that is the protocol's.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from elastic.core.errors import StorageError
from elastic.core.fixed_point import add_slots, decode, decode_slots
from elastic.core.layout import BUFFERS, Chunk, Layout
from elastic.core.mapped import Sizes, Slot, Version, bytes_of
from elastic.core.model import ModelSpec
from elastic.core.optim import ChunkUpdater


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One update. `slots`: (slot, live half) of every slot that counts; empty: carry only.

    `coefficients` and `limits`, if the slots are coded, `num_added`, if micro-batches were dropped:
    see `events.Update`.
    """

    source: int
    slots: Sequence[tuple[Slot, int]]
    exponents: Sequence[int]
    weight: float
    factor: float
    fresh: bool
    coefficients: Sequence[int] = ()
    limits: Sequence[int] = ()
    num_added: int = 0

    def total(self, chunk: Chunk, out: torch.Tensor) -> None:
        """The sum of the slots that count, int32."""
        part = slice(chunk.start, chunk.stop)
        if not self.coefficients:
            add_slots([slot.halves[half][part] for slot, half in self.slots], out)
            return
        coded = [slot.coded[part] for slot, _ in self.slots]
        decode_slots(coded, self.coefficients, self.limits[chunk.index], out)

    @property
    def counters(self) -> torch.Tensor:
        """The integer buffers after the step: all slots have the same."""
        slot, half = self.slots[0]
        return slot.coded_counters if self.coefficients else slot.counters[half]


class Held:
    """Chunks of a version that are read behind training, and by whom they are changed waits."""

    def __init__(self, version: int, chunks: Iterable[int]) -> None:
        self.version = version
        self._left = set(chunks)
        self._changed = threading.Condition()

    def holds(self, chunk: int) -> bool:
        """Whether the chunk is still to be read."""
        return chunk in self._left

    def wait_for(self, chunk: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: chunk not in self._left)

    def _was_read(self, chunk: int) -> None:
        with self._changed:
            self._left.discard(chunk)
            self._changed.notify_all()


class Digests(Held):
    """Digests of what a node keeps in one version: all keepers of a chunk have the same."""

    def __init__(self, layout: Layout, version: int, source: Version) -> None:
        self._chunks = [layout.chunks[index] for index in sorted(source.kept_chunks)]
        self._source = source
        super().__init__(version, (chunk.index for chunk in self._chunks))

    def read(self) -> tuple[tuple[int, int], ...]:
        """Of each chunk its index, and the CRC-32 of its values and its state. On a thread of its
        own."""
        return tuple((chunk.index, self._of(chunk)) for chunk in self._chunks)

    def _of(self, chunk: Chunk) -> int:
        source, part = self._source, slice(chunk.start, chunk.stop)
        tensors = [source.values[part]]
        if chunk.group != BUFFERS:
            own = slice(chunk.index, chunk.index + 1)
            tensors += [state[part] for state in source.states.values()]
            tensors += [scalars[own] for scalars in source.scalars.values()]
        digest = 0
        for tensor in tensors:
            digest = zlib.crc32(bytes_of(tensor), digest)
        self._was_read(chunk.index)
        return digest


class Snapshot(Held):
    """A copy of one version, made behind training, chunk by chunk, into a buffer of its own.

    The next update of a chunk of that version waits for that chunk's copy; nothing else does.
    The state of chunks that are not kept here is `missing`: others send it.

    Args:
        share: the chunks whose state alone is copied; if none are named, everything is.
        moved: called after each chunk, by the thread that copies.
    """

    def __init__(
        self,
        sizes: Sizes,
        version: int,
        source: Version,
        share: Sequence[int] | None = None,
        moved: Callable[[], None] | None = None,
    ) -> None:
        self.values = torch.empty_like(source.values)
        self.counters = source.counters.clone()
        self.states = {key: torch.empty_like(state) for key, state in source.states.items()}
        self.scalars = {key: scalars.clone() for key, scalars in source.scalars.items()}
        chunks, kept = sizes.layout.chunks, source.kept_chunks
        self._chunks = chunks if share is None else [chunks[index] for index in share]
        self._has_values = share is None
        self._source, self._kept, self._moved = source, kept, moved
        super().__init__(version, (chunk.index for chunk in self._chunks))
        self.missing = {
            one.index for one in self._chunks if one.index not in kept and one.group != BUFFERS
        }
        self._problem = ""

    def copy(self) -> None:
        """Copy everything. On a thread of its own."""
        for chunk in self._chunks:
            part = slice(chunk.start, chunk.stop)
            if self._has_values:
                self.values[part] = self._source.values[part]
            if chunk.index in self._kept and chunk.group != BUFFERS:
                for key, state in self.states.items():
                    state[part] = self._source.states[key][part]
            self._was_read(chunk.index)
            if self._moved is not None:
                self._moved()

    def received(self, chunk: int) -> None:
        """The state of a missing chunk is in its place."""
        with self._changed:
            self.missing.discard(chunk)
            self._changed.notify_all()

    def fail(self, problem: str) -> None:
        """What is missing will not come."""
        with self._changed:
            self._problem = problem
            self._changed.notify_all()

    def wait_until_whole(self, timeout_s: float) -> None:
        """Wait until nothing is missing.

        Raises:
            StorageError: it will not come, or not in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.missing or self._problem, timeout_s)
            if self.missing:
                problem = self._problem or f"it did not come within {timeout_s:.0f} s"
                raise StorageError(f"the state of {len(self.missing)} chunks is missing: {problem}")


def tensors_of(source: Version | Snapshot) -> list[memoryview]:
    """The bytes of the parameters and of each tensor of the state, the same on every node."""
    tensors = (source.values, *source.states.values(), *source.scalars.values())
    return [bytes_of(one) for one in tensors]


class Updater:
    """Computes the next version. One per acting aggregator."""

    def __init__(
        self,
        spec: ModelSpec,
        versions: tuple[Version, Version],
        *,
        num_micro_batches: int,
        clip_norm: float | None,
        ema_decay: float | None,
        num_threads: int,
    ) -> None:
        self._layout = spec.layout
        self._versions = versions
        self._num_micro_batches = num_micro_batches
        self._clip_norm = clip_norm
        self._chunks = ChunkUpdater(spec.optimizer, spec.layout, versions, ema_decay=ema_decay)
        self._gradient = torch.zeros(spec.layout.num_parameter_elements)
        largest = max(chunk.size for chunk in spec.layout.chunks)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="update")
        self._num_threads = num_threads
        self._scratch = [torch.zeros(largest, dtype=torch.int32) for _ in range(num_threads)]
        self.held: list[Held] = []

    def close(self) -> None:
        """Wait until no thread writes any more."""
        self._threads.shutdown()

    def run(self, plan: Plan, beat: Callable[[int], None]) -> float:
        """Fill version 1 - source; return the global norm of the gradient before clipping.

        Args:
            beat: called with the number of chunks done, to show that work goes on.

        Raises:
            DecodingError: the slots are coded and do not fit together; nothing was filled that
                another run does not fill anew.
        """
        squares: dict[int, float] = {}

        def take(chunk: Chunk, scratch: torch.Tensor) -> None:
            total = scratch[: chunk.size]
            plan.total(chunk, total)
            self._decode(plan, chunk, total, squares)
            beat(chunk.index)

        def carry(chunk: Chunk, _: torch.Tensor) -> None:
            self._wait(plan, chunk)
            self._chunks.carry(chunk, plan.source)
            beat(chunk.index)

        kept = self._versions[plan.source].kept_chunks
        if not plan.slots:
            self._each(carry)
            self.seal(plan, kept, self._versions[plan.source].counters)
            return 0.0
        self._each(take)
        norm = self.step(plan, squares, range(len(self._layout.chunks)), beat)
        self.seal(plan, kept, plan.counters)
        return norm

    def add_up(
        self, plan: Plan, sums_N: torch.Tensor, order: Sequence[int], ready: Callable[[int], None]
    ) -> None:
        """The first half of `run` where several nodes add theirs: this node's sum of each chunk.

        Args:
            sums_N: int32, as long as the flat space: filled.
            order: all chunks.
            ready: called with each chunk whose sum is complete, on the thread that made it.
        """

        def add(chunk: Chunk, _: torch.Tensor) -> None:
            part = slice(chunk.start, chunk.stop)
            if plan.slots:
                plan.total(chunk, sums_N[part])
            else:
                sums_N[part].zero_()
            ready(chunk.index)

        self._each(add, [self._layout.chunks[index] for index in order])

    def take(
        self,
        plan: Plan,
        totals_N: torch.Tensor,
        chunks: Sequence[int],
        beat: Callable[[int], None],
    ) -> dict[int, float]:
        """The gradient of these chunks out of their totals; the square of the norm of each."""
        squares: dict[int, float] = {}

        def take(chunk: Chunk, _: torch.Tensor) -> None:
            self._decode(plan, chunk, totals_N[chunk.start : chunk.stop], squares)
            beat(chunk.index)

        self._each(take, [self._layout.chunks[index] for index in chunks])
        return squares

    def _decode(
        self, plan: Plan, chunk: Chunk, total: torch.Tensor, squares: dict[int, float]
    ) -> None:
        """From a total to the gradient and the square of its norm, or to float buffers."""
        part, exponent = slice(chunk.start, chunk.stop), plan.exponents[chunk.index]
        if chunk.group == BUFFERS:
            self._wait(plan, chunk)
            target = self._versions[1 - plan.source].values[part]
            decode(total, exponent, float(plan.num_added or self._num_micro_batches), target)
            return
        gradient = self._gradient[part]
        decode(total, exponent, plan.weight, gradient)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        squares[chunk.index] = float(norm) ** 2

    def step(
        self,
        plan: Plan,
        squares: Mapping[int, float],
        chunks: Sequence[int],
        done: Callable[[int], None],
    ) -> float:
        """Clip, and update these chunks, whose gradient was taken; return the norm before clipping.

        Args:
            squares: of the norms of all chunks.
            done: called with each chunk that is complete, on the thread that made it.
        """
        norm = math.sqrt(math.fsum(squares[index] for index in sorted(squares)))
        coefficient = 1.0
        if self._clip_norm is not None:
            coefficient = self._clip_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_

        def step(chunk: Chunk, _: torch.Tensor) -> None:
            if chunk.group != BUFFERS:
                gradient = self._gradient[chunk.start : chunk.stop]
                if coefficient < 1:
                    gradient.mul_(coefficient)
                self._wait(plan, chunk)
                self._chunks.update(
                    chunk, gradient, source=plan.source, factor=plan.factor, fresh=plan.fresh
                )
            done(chunk.index)

        self._each(step, [self._layout.chunks[index] for index in chunks])
        return norm

    def seal(self, plan: Plan, kept: Collection[int], counters: torch.Tensor) -> None:
        """Say of which chunks the next version has the state, once everything is in its place."""
        version = self._versions[1 - plan.source]
        version.counters.copy_(counters)
        version.kept.zero_()
        version.kept[list(kept)] = 1

    def is_held(self, version: int, chunk: int) -> bool:
        """Whether somebody is still to read that chunk before it may be overwritten."""
        return any(one.version == version and one.holds(chunk) for one in tuple(self.held))

    def _each(
        self,
        work: Callable[[Chunk, torch.Tensor], None],
        chunks: Sequence[Chunk] | None = None,
    ) -> None:
        """Do it for all chunks, each on one thread; the scratch memory is the thread's."""
        chunks = self._layout.chunks if chunks is None else chunks

        def some(thread: int) -> None:
            for chunk in chunks[thread :: self._num_threads]:
                work(chunk, self._scratch[thread])

        num = min(self._num_threads, len(chunks))
        others = [self._threads.submit(some, thread) for thread in range(1, num)]
        try:
            some(0)
        finally:
            wait(others)  # nobody writes any more, whatever happened
        for other in others:
            other.result()

    def _wait(self, plan: Plan, chunk: Chunk) -> None:
        for held in tuple(self.held):  # another thread takes complete ones away
            if held.version == 1 - plan.source:
                held.wait_for(chunk.index)


def snapshot_state(snapshot: Snapshot) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint besides the weights, by name."""
    state = {"values": snapshot.values, "counters": snapshot.counters}
    state |= {f"state.{key}": tensor for key, tensor in snapshot.states.items()}
    return state | {f"scalar.{key}": tensor for key, tensor in snapshot.scalars.items()}
