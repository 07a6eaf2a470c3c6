"""The next version is what plain torch would make of the same gradient, however it is computed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from elastic.core.layout import BUFFERS
from elastic.core.mapped import EMA, bytes_of
from elastic.core.update import Digests, Plan, Snapshot, Updater, snapshot_state

MakeNode = Callable[..., Any]
NUM = 4  # micro-batches


def quiet(chunk: int) -> None:
    """A heartbeat that nobody listens to."""


class Trainer:
    """Steps of a node; `owners` says which worker computes which micro-batch."""

    def __init__(self, node: Any, *, num_threads: int = 1, seed: int = 0) -> None:
        self.node = node
        self.updater: Updater = node.updater(num_threads=num_threads)
        self.workers = [node.worker() for _ in range(2)]
        self.norms: list[float] = []
        self.weight = 0.0
        self._dice = random.Random(seed)
        node.measure(self.workers[0])

    def gather(self) -> None:
        """All micro-batches of a step, by random workers in random order."""
        order = list(range(NUM))
        self._dice.shuffle(order)
        self.weight = 0.0
        for one in order:
            worker = self._dice.randrange(2)
            self.weight += self.node.accumulate(self.workers[worker], worker, one).weight

    def step(self, factor: float = 1.0) -> None:
        self.gather()
        plan = self.node.plan(weight=self.weight, factor=factor)
        self.norms.append(self.updater.run(plan, quiet))
        self.node.commit()

    def run(self, num: int) -> dict[str, torch.Tensor]:
        for _ in range(num):
            self.step()
        self.updater.close()
        return self.node.parameters(self.node.state.step % 2)


def wide() -> nn.Module:
    """Several chunks of 1024 elements."""
    return nn.Sequential(
        nn.Linear(6, 200), nn.BatchNorm1d(200), nn.Linear(200, 13), nn.Linear(13, 1)
    )


def wide_node(make_node: MakeNode, tiny_task: Any, **job: Any) -> Any:
    task = tiny_task(wide)
    task.optimizer = lambda named: torch.optim.AdamW([one for _, one in named], lr=0.01)
    return make_node(task, **job)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_who_computes_on_how_many_threads_does_not_matter(
    make_node: MakeNode, tiny_task: Any
) -> None:
    results, norms = [], []
    for num_threads, seed in ((1, 0), (2, 5), (5, 9)):
        trainer = Trainer(
            wide_node(make_node, tiny_task, clip_norm=0.5), num_threads=num_threads, seed=seed
        )
        results.append(trainer.run(3))
        norms.append(trainer.norms)
    assert len(trainer.node.spec.layout.chunks) >= 5
    assert norms[0] == norms[1] == norms[2]
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])
    assert not equal(results[0], trainer.node.prepared.values)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
}


@pytest.mark.parametrize("clip_norm", [None, 0.1, 1e6], ids=["no clip", "clipped", "far"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_equal_plain_torch_on_the_same_gradient(
    kind: str, clip_norm: float | None, make_node: MakeNode, tiny_task: Any
) -> None:
    """Bit for bit: the gradient of plain torch is the decoded sum, everything else is torch's.

    Only clipping may differ, in the last bit of the coefficient: torch adds the norms of tensors
    in float32, this project those of chunks in float64.
    """
    task = tiny_task(wide)

    def optimizer(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        items = [one for _, one in named]
        return OPTIMIZERS[kind]([{"params": items[::2]}, {"params": items[1::2], "lr": 0.002}])

    task.optimizer = optimizer
    node = make_node(task, clip_norm=clip_norm)
    model = wide()
    model.load_state_dict(node.prepared.values)
    plain = optimizer(list(model.named_parameters()))
    base = [group["lr"] for group in plain.param_groups]
    trainer = Trainer(node, num_threads=2)
    gradients = {one.name: one for one in node.spec.layout.parameters}
    for factor in (0.5, 1.0, 0.25, 1.0):
        trainer.gather()
        trainer.updater.run(node.plan(weight=trainer.weight, factor=factor), quiet)
        node.commit()
        for name, parameter in model.named_parameters():
            one = gradients[name]
            part = trainer.updater._gradient[one.start : one.stop]
            parameter.grad = part.view(one.shape).clone()
        for group, lr in zip(plain.param_groups, base, strict=True):
            group["lr"] = lr * factor
        plain.step()
        ours = node.parameters(node.state.step % 2)
        for name, parameter in model.named_parameters():
            assert torch.equal(ours[name], parameter), (name, factor)
    trainer.updater.close()


def plain_gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The sum of the micro-batches' gradients over their weight, in float64."""
    node, computer = trainer.node, trainer.workers[0]
    total = {
        one.name: torch.zeros(one.shape, dtype=torch.float64) for one in node.spec.layout.fields
    }
    for one in range(NUM):
        computer.compute(node.lease(one))
        for field, value in zip(node.spec.layout.fields, computer._values(), strict=True):
            total[field.name] += value.double()
    trained = {one.name for one in node.spec.layout.parameters}
    return {
        name: value / (trainer.weight if name in trained else NUM) for name, value in total.items()
    }


def test_the_gradient_is_the_weighted_mean_to_float32(make_node: MakeNode, tiny_task: Any) -> None:
    node = wide_node(make_node, tiny_task)
    trainer = Trainer(node)
    trainer.gather()
    expected = plain_gradient(trainer)
    norm = trainer.updater.run(node.plan(weight=trainer.weight), quiet)
    flat = torch.zeros(node.spec.layout.num_elements, dtype=torch.float64)
    for one in node.spec.layout.parameters:
        flat[one.start : one.stop] = expected[one.name].reshape(-1)
    for chunk in node.spec.layout.chunks:
        if chunk.group != BUFFERS:
            part = slice(chunk.start, chunk.stop)
            unit = 2.0 ** -node.state.exponents[chunk.index] / trainer.weight
            error = (trainer.updater._gradient[part].double() - flat[part]).abs()
            bound = NUM * unit / 2 + flat[part].abs() * 2.0**-22  # each rounded once, then decoded
            assert (error <= bound).all()
    trained = [expected[one.name].norm() for one in node.spec.layout.parameters]
    assert norm == pytest.approx(float(torch.stack(trained).norm()), rel=1e-6)
    trainer.updater.close()


def test_buffers_become_the_mean_of_what_the_micro_batches_made(make_node: MakeNode) -> None:
    node = make_node()
    trainer = Trainer(node)
    trainer.gather()
    expected = plain_gradient(trainer)
    trainer.updater.run(node.plan(weight=trainer.weight), quiet)
    ours = node.parameters(1)
    for one in node.spec.layout.buffers:
        torch.testing.assert_close(
            ours[one.name].double(), expected[one.name], rtol=1e-6, atol=1e-8
        )
    assert node.versions[1].counters[:8].view(torch.int64).item() == 1
    trainer.updater.close()


@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_clipping_is_by_the_global_norm(
    clip_norm: float, make_node: MakeNode, tiny_task: Any
) -> None:
    free = Trainer(wide_node(make_node, tiny_task))
    clipped = Trainer(wide_node(make_node, tiny_task, clip_norm=clip_norm))
    for trainer in (free, clipped):
        trainer.step()
        trainer.updater.close()
    assert free.norms == clipped.norms  # what is reported is the norm before clipping
    assert free.norms[0] > 0.01
    after = float(clipped.updater._gradient.double().norm())
    assert after == pytest.approx(min(clip_norm, free.norms[0]), rel=1e-4)
    if clip_norm > 1:
        assert torch.equal(free.updater._gradient, clipped.updater._gradient)


def test_padding_stays_zero(make_node: MakeNode, tiny_task: Any) -> None:
    trainer = Trainer(wide_node(make_node, tiny_task))
    trainer.run(2)
    layout, version = trainer.node.spec.layout, trainer.node.versions[0]
    padding = torch.ones(layout.num_elements, dtype=torch.bool)
    for one in layout.fields:
        padding[one.start : one.stop] = False
    assert padding.any()
    assert not version.values[padding].any()
    trained = padding[: layout.num_parameter_elements]
    assert all(not state[trained].any() for state in version.states.values())


# --- what is only read -----------------------------------------------------------------------


def everything(version: Any) -> list[torch.Tensor]:
    return [version.values, version.counters, *version.states.values(), *version.scalars.values()]


def test_an_update_only_reads_the_old_version_and_the_slots(make_node: MakeNode) -> None:
    node = make_node()
    trainer = Trainer(node)
    trainer.step()
    trainer.gather()
    old = [one.clone() for one in everything(node.versions[1])]
    slots = {worker: [half.clone() for half in slot.halves] for worker, slot in node.slots.items()}
    trainer.updater.run(node.plan(weight=trainer.weight), quiet)
    trainer.updater.close()
    assert all(torch.equal(a, b) for a, b in zip(old, everything(node.versions[1]), strict=True))
    for worker, halves in slots.items():
        now = node.slots[worker].halves
        assert all(torch.equal(a, b) for a, b in zip(halves, now, strict=True))


def test_an_update_done_twice_gives_the_same_bits(make_node: MakeNode) -> None:
    """As by a successor, after a crash before the flip."""
    node = make_node()
    trainer = Trainer(node)
    trainer.step()
    trainer.gather()
    plan = node.plan(weight=trainer.weight)
    norm = trainer.updater.run(plan, quiet)
    first = [one.clone() for one in everything(node.versions[0])]
    trainer.updater.close()
    for chunk in node.spec.layout.chunks:  # whatever a crash left half-written
        node.versions[0].values[chunk.start : chunk.stop] = 17
        if chunk.group != BUFFERS:
            node.versions[0].states["exp_avg"][chunk.start : chunk.stop] = 17
            node.versions[0].scalars["step"][chunk.index] = 17
    node.versions[0].counters.fill_(17)
    successor = node.updater(num_threads=2)
    assert successor.run(plan, quiet) == norm
    successor.close()
    assert all(torch.equal(a, b) for a, b in zip(first, everything(node.versions[0]), strict=True))


def test_a_successor_goes_on_with_the_same_trajectory(make_node: MakeNode, tiny_task: Any) -> None:
    alone = Trainer(wide_node(make_node, tiny_task)).run(4)
    first = Trainer(wide_node(make_node, tiny_task))
    first.run(2)
    second = first.node.updater(num_threads=2)
    first.updater = second
    first.step()
    first.step()
    second.close()
    assert equal(alone, first.node.parameters(0))


def test_a_skipped_step_carries_the_state_over(make_node: MakeNode) -> None:
    node = make_node()
    trainer = Trainer(node)
    trainer.step()
    plan = Plan(
        source=1, slots=(), exponents=node.state.exponents, weight=1.0, factor=1.0, fresh=False
    )
    beats: list[int] = []
    assert trainer.updater.run(plan, beats.append) == 0.0
    trainer.updater.close()
    assert sorted(beats) == list(range(len(node.spec.layout.chunks)))
    pairs = zip(everything(node.versions[0]), everything(node.versions[1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_step_skipped_first_leaves_the_optimizer_fresh(make_node: MakeNode) -> None:
    node, other = make_node(), make_node()
    trainer = Trainer(node)
    exponents = node.state.exponents
    carry = Plan(source=0, slots=(), exponents=exponents, weight=1.0, factor=1.0, fresh=True)
    trainer.updater.run(carry, quiet)
    assert torch.equal(node.versions[0].values, node.versions[1].values)
    node.versions[1].states["exp_avg"].fill_(9)  # must not be read
    node.begin(replace(node.state, step=1))
    trainer.gather()
    trainer.updater.run(node.plan(weight=trainer.weight), quiet)
    trainer.updater.close()
    same = Trainer(other)
    other.versions[1].values.copy_(other.versions[0].values)
    other.versions[1].counters.copy_(other.versions[0].counters)
    other.begin(replace(other.state, step=1))
    same.step()
    same.updater.close()
    assert equal(node.parameters(0), other.parameters(0))
    assert torch.equal(node.versions[0].states["exp_avg"], other.versions[0].states["exp_avg"])


# --- beats and errors ------------------------------------------------------------------------


def test_an_update_beats_for_every_chunk_in_both_passes(
    make_node: MakeNode, tiny_task: Any
) -> None:
    trainer = Trainer(wide_node(make_node, tiny_task), num_threads=3)
    trainer.gather()
    beats: list[int] = []
    trainer.updater.run(trainer.node.plan(weight=trainer.weight), beats.append)
    trainer.updater.close()
    assert sorted(beats) == sorted(list(range(len(trainer.node.spec.layout.chunks))) * 2)


def test_an_error_on_a_thread_escapes(make_node: MakeNode, tiny_task: Any) -> None:
    trainer = Trainer(wide_node(make_node, tiny_task), num_threads=2)
    trainer.gather()

    def fail(chunk: int) -> None:
        if chunk == 1:
            raise RuntimeError("crashed in chunk 1")

    with pytest.raises(RuntimeError, match="crashed in chunk 1"):
        trainer.updater.run(trainer.node.plan(weight=trainer.weight), fail)
    trainer.updater.close()
    assert not any(thread.is_alive() for thread in trainer.updater._threads._threads)


# --- in two halves ---------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 0.1], ids=["no clip", "clipped"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_two_halves_over_parts_of_the_slots_equal_the_whole(
    num_threads: int, clip_norm: float | None, make_node: MakeNode, tiny_task: Any
) -> None:
    node = wide_node(make_node, tiny_task, clip_norm=clip_norm)
    trainer = Trainer(node, num_threads=num_threads)
    trainer.step()
    trainer.gather()
    plan = node.plan(weight=trainer.weight)
    assert len(plan.slots) == 2
    norm = trainer.updater.run(plan, quiet)
    expected = [one.clone() for one in everything(node.versions[0])]
    layout = node.spec.layout
    for chunk in layout.chunks:  # so that nothing of the first time is left
        node.versions[0].values[chunk.start : chunk.stop] = 17
        if chunk.group != BUFFERS:
            node.versions[0].states["exp_avg"][chunk.start : chunk.stop] = 17
            node.versions[0].scalars["step"][chunk.index] = 17
    node.versions[0].counters.fill_(17)
    order = list(reversed(range(len(layout.chunks))))
    totals_N = torch.zeros(layout.num_elements, dtype=torch.int32)
    for slots in (plan.slots[:1], plan.slots[1:], []):
        sums_N = torch.full_like(totals_N, 7)
        ready: list[int] = []
        trainer.updater.add_up(replace(plan, slots=slots), sums_N, order, ready.append)
        assert sorted(ready) == sorted(order)
        if num_threads == 1:
            assert ready == order
        for chunk in layout.chunks:
            totals_N[chunk.start : chunk.stop] += sums_N[chunk.start : chunk.stop]
    everywhere = range(len(layout.chunks))
    squares = trainer.updater.take(plan, totals_N, everywhere, quiet)
    assert trainer.updater.step(plan, squares, everywhere, quiet) == norm
    slot, half = plan.slots[0]
    trainer.updater.seal(plan, everywhere, slot.counters[half])
    trainer.updater.close()
    assert all(
        torch.equal(a, b) for a, b in zip(expected, everything(node.versions[0]), strict=True)
    )


# --- snapshots -------------------------------------------------------------------------------


class SteppedCopy:
    """A source whose chunks are copied one at a time, when the test says so."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._allowed = threading.Semaphore(0)
        chunks = snapshot._chunks

        def one_at_a_time() -> Any:
            for chunk in chunks:
                assert self._allowed.acquire(timeout=30)
                yield chunk

        snapshot._chunks = one_at_a_time()
        self.thread = threading.Thread(target=snapshot.copy)
        self.thread.start()

    def allow(self, num: int) -> None:
        self._allowed.release(num)


def bare() -> nn.Module:
    """Several chunks, none of them of buffers."""
    return nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 13), nn.Linear(13, 1))


def test_a_chunk_is_updated_once_it_is_copied(make_node: MakeNode, tiny_task: Any) -> None:
    node = make_node(tiny_task(bare))
    trainer = Trainer(node)
    trainer.step()
    expected = [one.clone() for one in everything(node.versions[1])]
    snapshot = Snapshot(node.sizes, 1, node.versions[1])
    trainer.updater.held.append(snapshot)
    copying = SteppedCopy(snapshot)
    trainer.step()  # writes version 0: waits for nothing
    copying.allow(2)
    trainer.gather()
    plan = node.plan(weight=trainer.weight)
    moved = threading.Condition()
    done: list[int] = []

    def beat(chunk: int) -> None:
        with moved:
            done.append(chunk)
            moved.notify()

    update = threading.Thread(target=trainer.updater.run, args=(plan, beat))
    update.start()
    with moved:
        assert moved.wait_for(lambda: done.count(1) == 2, timeout=30)  # summed and updated
    update.join(0.1)
    assert update.is_alive()
    assert done.count(2) == 1  # summed, and not updated: it is not copied yet
    chunk = node.spec.layout.chunks[2]
    part = slice(chunk.start, chunk.stop)
    assert torch.equal(node.versions[1].values[part], expected[0][part])
    copying.allow(len(node.spec.layout.chunks))
    for thread in (copying.thread, update):
        thread.join(30)
        assert not thread.is_alive()
    trainer.updater.close()
    assert all(torch.equal(a, b) for a, b in zip(expected, everything(snapshot), strict=True))
    assert not torch.equal(node.versions[1].values, snapshot.values)


@pytest.fixture
def stepped(make_node: MakeNode) -> Iterator[Trainer]:
    """After a step; it has buffers, and a state with scalars."""
    trainer = Trainer(make_node())
    trainer.step()
    yield trainer
    trainer.updater.close()


def digests_of(trainer: Trainer) -> dict[int, int]:
    node = trainer.node
    return dict(Digests(node.spec.layout, 1, node.versions[1]).read())


def test_digests_tell_any_bit_of_what_is_kept(stepped: Trainer) -> None:
    node, before = stepped.node, digests_of(stepped)
    chunks, version = node.spec.layout.chunks, node.versions[1]
    assert set(before) == {chunk.index for chunk in chunks}
    assert digests_of(stepped) == before
    trained = next(one for one in reversed(chunks) if one.group != BUFFERS)
    places = [(version.values, chunk, chunk.stop - 1) for chunk in chunks]
    places += [(state, trained, trained.start) for state in version.states.values()]
    places += [(scalar, trained, trained.index) for scalar in version.scalars.values()]
    assert len(places) > len(chunks) + 2
    for tensor, chunk, at in places:
        raw = bytes_of(tensor)
        first = at * tensor.element_size()
        raw[first] ^= 1
        now = digests_of(stepped)
        assert {one for one in now if now[one] != before[one]} == {chunk.index}
        raw[first] ^= 1


def test_a_chunk_that_is_not_kept_has_no_digest(stepped: Trainer) -> None:
    before = digests_of(stepped)
    stepped.node.versions[1].kept[0] = 0
    del before[0]
    assert digests_of(stepped) == before


def test_a_chunk_is_updated_once_it_is_digested(stepped: Trainer) -> None:
    before, node = digests_of(stepped), stepped.node
    digests = Digests(node.spec.layout, 1, node.versions[1])
    stepped.updater.held.append(digests)
    stepped.step()  # writes version 0: waits for nothing
    update = threading.Thread(target=stepped.step)
    update.start()
    update.join(0.1)
    assert update.is_alive()
    assert dict(digests.read()) == before
    update.join(30)
    assert not update.is_alive()
    assert digests_of(stepped) != before


def test_buffers_are_in_a_snapshot_too(make_node: MakeNode) -> None:
    node = make_node()
    trainer = Trainer(node, num_threads=2)
    trainer.step()
    expected = [one.clone() for one in everything(node.versions[1])]
    snapshot = Snapshot(node.sizes, 1, node.versions[1])
    trainer.updater.held.append(snapshot)
    copying = SteppedCopy(snapshot)
    trainer.step()
    trainer.gather()
    plan = node.plan(weight=trainer.weight)
    update = threading.Thread(target=trainer.updater.run, args=(plan, quiet))
    update.start()
    update.join(0.1)
    assert update.is_alive()
    copying.allow(len(node.spec.layout.chunks))
    for thread in (copying.thread, update):
        thread.join(30)
        assert not thread.is_alive()
    trainer.updater.close()
    assert all(torch.equal(a, b) for a, b in zip(expected, everything(snapshot), strict=True))
    for one in node.spec.layout.buffers:
        part = slice(one.start, one.stop)
        assert not torch.equal(node.versions[1].values[part], snapshot.values[part])


def test_a_snapshot_changes_no_result(make_node: MakeNode, tiny_task: Any) -> None:
    alone = Trainer(wide_node(make_node, tiny_task)).run(4)
    node = wide_node(make_node, tiny_task)
    trainer = Trainer(node, num_threads=2)
    for step in range(4):
        snapshot = Snapshot(node.sizes, step % 2, node.versions[step % 2])
        trainer.updater.held.append(snapshot)
        copying = threading.Thread(target=snapshot.copy)
        copying.start()
        trainer.step()
        copying.join()
    trainer.updater.close()
    assert equal(alone, node.parameters(0))


def test_a_snapshot_names_everything_that_a_resume_needs(make_node: MakeNode) -> None:
    node = make_node()
    trainer = Trainer(node)
    trainer.step()
    trainer.updater.close()
    snapshot = Snapshot(node.sizes, 1, node.versions[1])
    snapshot.copy()
    state = snapshot_state(snapshot)
    assert set(state) == {
        "values",
        "counters",
        "state.exp_avg",
        "state.exp_avg_sq",
        "scalar.step",
    }
    assert torch.equal(state["values"], node.versions[1].values)
    trained = [one.index for one in node.spec.layout.chunks if one.group != BUFFERS]
    assert state["scalar.step"][trained].tolist() == [1.0] * len(trained)
    node.versions[1].values.zero_()
    assert state["values"].any()


def test_a_model_without_optimizer_state_has_snapshots_too(
    make_node: MakeNode, tiny_task: Any
) -> None:
    task = tiny_task(lambda: nn.Linear(6, 1))
    task.optimizer = lambda named: torch.optim.SGD([one for _, one in named], lr=0.1)
    node = make_node(task)
    assert node.versions[0].states == {}
    snapshot = Snapshot(node.sizes, 0, node.versions[0])
    snapshot.copy()
    assert torch.equal(snapshot.values, node.versions[0].values)
    snapshot.wait_for(0)
    assert set(snapshot_state(snapshot)) == {"values", "counters"}


EMA_JOB = {"ema": {"decay": 0.75}}


def averages(node: Any) -> torch.Tensor:
    average: torch.Tensor = node.versions[node.state.step % 2].states[EMA]
    return average.clone()


def test_the_average_follows_the_parameters(make_node: MakeNode, tiny_task: Any) -> None:
    node = wide_node(make_node, tiny_task, **EMA_JOB)
    expected = averages(node)
    trainer = Trainer(node, num_threads=2)
    for _ in range(3):
        trainer.step()
        values = node.versions[node.state.step % 2].values[: len(expected)]
        get_ema_multi_avg_fn(0.75)([expected], [values], None)
        assert torch.equal(averages(node), expected)
    trainer.updater.close()
    assert not torch.equal(expected, values)


def test_averaging_changes_no_parameter(make_node: MakeNode, tiny_task: Any) -> None:
    plain, averaged = (
        Trainer(wide_node(make_node, tiny_task, **job)).run(3) for job in ({}, EMA_JOB)
    )
    assert equal(plain, averaged)


def test_a_skipped_step_carries_the_average_over(make_node: MakeNode, tiny_task: Any) -> None:
    node = wide_node(make_node, tiny_task, **EMA_JOB)
    trainer = Trainer(node)
    trainer.step()
    before = averages(node)
    plan = replace(node.plan(weight=1.0), slots=[])
    trainer.updater.run(plan, quiet)
    node.commit()
    trainer.updater.close()
    assert torch.equal(averages(node), before)
