"""A micro-batch has one right answer, whoever computes it and whatever was computed before."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from elastic.core.compute import AbandonedError, MicroBatches, deterministic, model_tensors
from elastic.core.data.memory import ArrayRows
from elastic.core.errors import TaskError
from elastic.core.mapped import EMA, MappedFile
from elastic.core.meter import Meter
from elastic.core.model import seed_generators
from elastic.core.permutation import derive_key
from elastic.core.protocol.advance import num_done, share_done
from elastic.core.protocol.messages import Combine, Key, Lease, Membership, Outcome
from elastic.core.update import Snapshot

MakeNode = Callable[..., Any]
FIELDS = ("micro_batch", "loss_sum", "weight", "samples", "counters")


def answer(computer: MicroBatches, outcome: Outcome) -> list[Any]:
    """Everything that a computation gave, but for its times."""
    gradients = [None if one is None else one.clone() for one in computer._values()]
    plain = [getattr(outcome, name) for name in FIELDS]
    return [*plain, outcome.maxima_C.tobytes(), *(as_bytes(one) for one in gradients)]


def as_bytes(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().numpy().tobytes()


def run(node: Any, computer: MicroBatches, micro_batch: int) -> list[Any]:
    return answer(computer, computer.compute(node.lease(micro_batch)))


def test_a_micro_batch_gives_the_same_bits_twice_and_elsewhere(make_node: MakeNode) -> None:
    node = make_node()
    first, second = node.worker(), node.worker()
    answers = [run(node, first, one) for one in range(4)]
    torch.rand(5)  # whatever else the process does with its generators
    assert [run(node, first, one) for one in reversed(range(4))] == answers[::-1]
    assert run(node, second, 2) == answers[2]
    assert len({str(one) for one in answers}) == 4


class Checkpointed(nn.Module):
    """Layers whose activations are computed again in backward, dropout and all."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.Tanh())
        self.last = nn.Linear(12, 1)
        self._again = again

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._again:
            inputs = checkpoint(self.layers, inputs, use_reentrant=False)
        else:
            inputs = self.layers(inputs)
        result: torch.Tensor = self.last(inputs)
        return result


def test_gradient_checkpointing_changes_no_bit(make_node: MakeNode, tiny_task: Any) -> None:
    answers = []
    for again in (False, True):
        node = make_node(tiny_task(lambda again=again: Checkpointed(again)))
        computer = node.worker()
        answers.append([run(node, computer, one) for one in (0, 1, 0)])
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][2]


def test_a_compiled_model_is_exact_and_keeps_its_names(make_node: MakeNode, tiny_task: Any) -> None:
    def build() -> nn.Module:
        plain = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3))
        model: nn.Module = torch.compile(plain.append(nn.Linear(12, 1)), backend="aot_eager")
        return model

    node = make_node(tiny_task(build))
    first, second = node.worker(), node.worker()
    answers = [run(node, first, one) for one in range(3)]
    assert [run(node, second, one) for one in reversed(range(3))] == answers[::-1]
    assert [key for key in node.spec.state_dict if "orig" in key] == []
    weights = model_tensors(node.spec, node.versions[0], None)
    tiny_task().model()[4].load_state_dict(
        {"weight": weights["3.weight"], "bias": weights["3.bias"]}
    )


class Draws(nn.Linear):
    """Remembers what dropout gave."""

    def __init__(self) -> None:
        super().__init__(6, 1)
        self.drawn: list[str] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.drawn.append(str(nn.functional.dropout(torch.ones(64)).tolist()))
        return super().forward(inputs)


def test_random_numbers_differ_with_step_micro_batch_and_seed(
    make_node: MakeNode, tiny_task: Any
) -> None:
    drawn = []
    for seed in (0, 1):
        node = make_node(tiny_task(Draws), seed=seed)
        node.versions[1].values.copy_(node.versions[0].values)
        computer = node.worker()
        computer._model.drawn.clear()
        for step in (0, 1):
            node.begin(replace(node.state, step=step))
            for micro_batch in (0, 1, 0, 1):
                run(node, computer, micro_batch)
        drawn.append(computer._model.drawn)
    for seen in drawn:
        assert seen[:2] == seen[2:4]
        assert seen[4:6] == seen[6:8]
    assert len({*drawn[0], *drawn[1]}) == 2 * 2 * 2


class Augmented:
    """Draws a random number for every micro-batch that is read."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: Any) -> Any:
        batch = self._dataset.fetch(indices)
        draws = (float(torch.rand(())), float(np.random.rand()), random.random())
        return {**batch, "inputs": batch["inputs"] * sum(draws)}


def test_random_numbers_of_the_data_set_belong_to_the_micro_batch(make_node: MakeNode) -> None:
    node = make_node()
    dataset = node.task.dataset
    node.task.dataset = lambda: Augmented(dataset())
    first, second = node.worker(), node.worker()
    answers = [run(node, first, one) for one in (0, 1, 0)]
    assert answers[0] == answers[2] == run(node, second, 0)
    assert answers[1] == run(node, second, 1)


def test_the_gradient_equals_that_of_plain_torch(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    outcome = computer.compute(node.lease(3))
    model = node.task.model()
    model.load_state_dict(node.prepared.values)
    batch = node.task.dataset().fetch(computer._stream.micro_batch(0, 3, 4, 5))
    seed_generators(derive_key("micro-batch", node.job.seed, 0, 3))
    loss, weight = node.task.loss(model, batch)
    loss.backward()
    assert (outcome.loss_sum, outcome.weight) == (loss.item(), weight)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected |= {name: one for name, one in model.named_buffers() if one.is_floating_point()}
    for one, value in zip(node.spec.layout.fields, computer._values(), strict=True):
        assert value is not None
        assert torch.equal(value, expected[one.name]), one.name


def test_each_step_reads_its_own_version(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    start = run(node, computer, 0)
    node.versions[1].values.copy_(node.versions[0].values * 0.5)
    node.begin(replace(node.state, step=1))
    other = run(node, computer, 0)
    node.begin(replace(node.state, step=2))
    node.versions[1].values.fill_(torch.nan)
    assert np.isfinite(run(node, computer, 0)[1])
    node.begin(replace(node.state, step=0))
    assert other != start
    assert run(node, computer, 0) == start


def test_buffers_start_from_the_version_in_a_private_copy(make_node: MakeNode) -> None:
    node = make_node()
    values, counters = node.versions[0].values.clone(), node.versions[0].counters.clone()
    computer = node.worker()
    names = [one.name for one in node.spec.layout.buffers]
    for micro_batch in (0, 1, 1):
        computer.compute(node.lease(micro_batch))
        changed = [
            not torch.equal(computer._tensor(one), node.prepared.values[one]) for one in names
        ]
        assert all(changed)
        assert computer._tensor("1.num_batches_tracked").item() == 1
    assert torch.equal(node.versions[0].values, values)
    assert torch.equal(node.versions[0].counters, counters)


def test_what_forward_puts_in_the_place_of_a_buffer_counts(
    make_node: MakeNode, tiny_task: Any
) -> None:
    class Replaces(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.mean = 0.5 * self.mean + 0.5 * inputs.mean(0)
            self.calls = self.calls + 1
            return super().forward(inputs)

    node = make_node(tiny_task(Replaces))
    computer = node.worker()
    answers = [run(node, computer, 1) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert computer._tensor("calls").item() == 1
    batch = node.task.dataset().fetch(computer._stream.micro_batch(0, 1, 4, 5))
    assert torch.equal(computer._tensor("mean"), 0.5 * batch["inputs"].mean(0))


def test_a_change_of_a_buffer_that_was_constant_is_refused_by_name(
    make_node: MakeNode, tiny_task: Any
) -> None:
    class Late(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.register_buffer("phase", torch.zeros(1))
            self.num_calls = 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            if self.num_calls > 2:
                self.phase = self.phase + 1
            return super().forward(inputs)

    node = make_node(tiny_task(Late))
    computer = node.worker()
    computer.compute(node.lease(0))
    with pytest.raises(TaskError, match="forward changed the buffer phase, which it left alone"):
        computer.compute(node.lease(0))


def test_constants_are_read_from_the_store(make_node: MakeNode, tiny_task: Any) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
        model[0].requires_grad_(False)
        return model

    node = make_node(tiny_task(build))
    computer = node.worker()
    model = computer._model
    assert torch.equal(model[0].weight, node.prepared.values["0.weight"])
    first = run(node, computer, 0)
    assert run(node, computer, 0) == first
    assert model[0].weight.grad is None


def test_an_unused_parameter_has_gradient_zero(make_node: MakeNode, tiny_task: Any) -> None:
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.never = nn.Parameter(torch.ones(3))

    node = make_node(tiny_task(Unused))
    computer = node.worker()
    node.measure(computer)
    node.accumulate(computer, 0, 0)
    (field,) = [one for one in node.spec.layout.parameters if one.name == "never"]
    assert not node.slots[0].halves[0][field.start : field.stop].any()
    assert node.slots[0].halves[0].any()


def test_a_parameter_used_now_and_then_has_no_gradient_of_another_micro_batch(
    make_node: MakeNode, tiny_task: Any
) -> None:
    class Sometimes(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.extra = nn.Parameter(torch.ones(1))
            self.is_used = True

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            out = super().forward(inputs)
            return out + self.extra if self.is_used else out

    node = make_node(tiny_task(Sometimes))
    computer = node.worker()
    computer.compute(node.lease(0))
    assert computer._parameters["extra"].grad is not None
    computer._model.is_used = False  # type: ignore[assignment]
    computer.compute(node.lease(0))
    assert computer._parameters["extra"].grad is None


def test_tied_weights_add_both_gradients(make_node: MakeNode, tiny_task: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.two(self.one(inputs).relu()).sum(1, keepdim=True)
            return result

    node = make_node(tiny_task(Tied))
    computer = node.worker()
    computer.compute(node.lease(0))
    model = Tied()
    model.load_state_dict({"one.weight": node.prepared.values["one.weight"]}, strict=False)
    batch = node.task.dataset().fetch(computer._stream.micro_batch(0, 0, 4, 5))
    node.task.loss(model, batch)[0].backward()
    (gradient,) = computer._values()
    assert gradient is not None
    assert torch.equal(gradient, model.one.weight.grad)  # type: ignore[arg-type]


# --- slots -----------------------------------------------------------------------------------


def test_who_computes_what_does_not_change_the_sum(make_node: MakeNode) -> None:
    totals = []
    for owners in ([0, 0, 0, 0], [3, 1, 3, 2], [1, 0, 0, 1]):
        node = make_node()
        computers = {worker: node.worker() for worker in set(owners)}
        node.measure(computers[owners[0]])
        for micro_batch in (2, 0, 3, 1) if owners[0] else range(4):
            node.accumulate(computers[owners[micro_batch]], owners[micro_batch], micro_batch)
        live = [node.slots[worker].halves[half] for worker, half in node.live.items()]
        totals.append(sum(half.long() for half in live).tolist())
        counters = [node.slots[worker].counters[half] for worker, half in node.live.items()]
        assert all(torch.equal(one, counters[0]) for one in counters)
        assert counters[0][:8].view(torch.int64).item() == 1
    assert totals[0] == totals[1] == totals[2]
    assert any(totals[0])


def test_encoding_leaves_the_live_half_alone(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    node.measure(computer)
    node.accumulate(computer, 0, 0)
    slot = node.slots[0]
    live = slot.halves[0].clone()
    node.accumulate(computer, 0, 1)
    assert torch.equal(slot.halves[0], live)
    both = slot.halves[1].clone()
    node.live.clear()
    node.accumulate(computer, 0, 1)  # the first of a step overwrites
    assert torch.equal(slot.halves[0] + live, both)


def test_encoding_under_another_key_is_abandoned(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    node.measure(computer)
    lease = node.lease(0)
    node.accumulate(computer, 0, 0)
    before = node.slots[0].halves[1].clone()
    node.begin(replace(node.state, attempt=node.state.attempt + 1))
    with pytest.raises(AbandonedError):
        computer.encode(lease, node.slots[0], half=1, base=0)
    assert torch.equal(node.slots[0].halves[1], before)


def test_encoding_before_exponents_exist_is_abandoned(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    lease = node.lease(0)
    computer.compute(lease)
    with pytest.raises(AbandonedError):
        computer._exponents(lease.key)


# --- abandoning ------------------------------------------------------------------------------


def test_what_is_stale_or_done_is_not_begun(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    stale = node.lease(0, step=5)
    with pytest.raises(AbandonedError):
        computer.compute(stale)
    node.control.done[1] = node.state.key.word
    with pytest.raises(AbandonedError):
        computer.compute(node.lease(1))
    computer.compute(node.lease(2))
    node.control.done[2] = Key(0, 0, 5).word  # done in another attempt: still wanted
    computer.compute(node.lease(2))


@pytest.mark.parametrize("layer", ["0", "2", "4", "4.bias", "1.weight", "0.weight"])
@pytest.mark.parametrize("how", ["done", "moved on"])
def test_a_computation_is_given_up_between_layers(
    layer: str, how: str, make_node: MakeNode
) -> None:
    """In the forward pass after a module, in the backward pass after a parameter's gradient."""
    node = make_node()
    computer = node.worker()
    expected = run(node, computer, 0)
    lease, word = node.lease(0), node.state.key.word

    def lose_interest(*_: Any) -> None:
        if how == "done":
            node.control.done[0] = word
        else:
            node.control.key[0] = word + 1

    if layer in computer._parameters:
        parameter = computer._parameters[layer]
        handle = parameter.register_post_accumulate_grad_hook(lose_interest)  # type: ignore[no-untyped-call]
    else:
        handle = computer._model.get_submodule(layer).register_forward_hook(lose_interest)
    with pytest.raises(AbandonedError):
        computer.compute(lease)
    handle.remove()
    node.control.done[0], node.control.key[0] = 0, word
    assert run(node, computer, 0) == expected


def test_giving_up_is_no_exception_that_a_model_may_catch(
    make_node: MakeNode, tiny_task: Any
) -> None:
    assert not issubclass(AbandonedError, Exception)

    class Catches(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            try:
                return self.inner(inputs)  # type: ignore[no-any-return, operator]
            except Exception:
                return super().forward(inputs)

        def __init__(self) -> None:
            super().__init__(6, 1)
            self.inner = nn.Linear(6, 1)

    node = make_node(tiny_task(Catches))
    computer = node.worker()
    lease = node.lease(0)
    computer._model.inner.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda *_: node.control.key.__setitem__(0, 99)
    )
    with pytest.raises(AbandonedError):
        computer.compute(lease)


def test_progress_moves_while_a_micro_batch_is_computed(make_node: MakeNode) -> None:
    node = make_node()
    words: list[int] = []

    class Seen(Meter):
        def move(self) -> None:
            super().move()
            words.append(self.word[0])

    computer = node.worker()
    computer.meter = Seen()
    for micro_batch in range(3):
        computer.compute(node.lease(micro_batch))
        assert num_done(computer.meter.word[0]) == micro_batch + 1
    assert all(before < after for before, after in pairwise(words))
    assert len(words) >= 3 * (5 + 6)  # five layers, six parameters
    assert 0.9 < share_done(words[-1]) <= 1.0


# --- outcomes --------------------------------------------------------------------------------


def test_an_outcome_says_what_was_computed(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    outcomes = [computer.compute(node.lease(one)) for one in range(4)]
    assert [one.micro_batch for one in outcomes] == [0, 1, 2, 3]
    assert all(one.weight == 5.0 and one.finite for one in outcomes)
    assert all(0 < one.start_s <= one.end_s for one in outcomes)
    assert len({one.samples for one in outcomes}) == 4
    assert len({one.counters for one in outcomes}) == 1
    assert {len(one.samples) for one in outcomes} == {16}
    assert {len(one.counters) for one in outcomes} == {8}
    assert all(len(one.maxima_C) == len(node.spec.layout.chunks) for one in outcomes)


class Correct:
    """Counts right signs; looks at dropout and BatchNorm as they are in evaluation."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def evaluate(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        out = model(batch["inputs"])
        correct = (out.sign() == batch["targets"].sign()).sum()
        return out.square().sum(), len(out), {"correct": correct}


def test_an_evaluation_is_that_of_plain_torch(make_node: MakeNode, tiny_task: Any) -> None:
    job = {"held_out": 15, "evaluate": {"every": 1, "micro_batches": 3}}
    node = make_node(Correct(tiny_task()), **job)
    computer = node.worker()
    before = node.versions[0].values.clone()
    lease = Lease(node.state.key, (2,), Combine.EVALUATE)
    outcome = computer.compute(lease)
    again = node.worker().compute(lease)
    same = ("loss_sum", "weight", "samples", "metrics", "micro_batch")
    assert [getattr(outcome, one) for one in same] == [getattr(again, one) for one in same]
    assert torch.equal(before, node.versions[0].values)

    model = node.task.model()
    model.load_state_dict(node.prepared.values)
    model.eval()
    samples = computer._stream.held_out_samples()[10:15]
    loss_sum, weight, metrics = node.task.evaluate(model, node.task.dataset().fetch(samples))
    assert (outcome.loss_sum, outcome.weight) == (loss_sum.item(), weight)
    assert outcome.metrics == (metrics["correct"].item(),)
    trained = run(node, computer, 0)
    assert trained == run(node, node.worker(), 0), "training goes on as if nothing had been"


def test_with_an_average_it_is_the_average_that_is_evaluated(
    make_node: MakeNode, tiny_task: Any
) -> None:
    job = {"held_out": 5, "evaluate": {"every": 1, "micro_batches": 1}, "ema": {"decay": 0.5}}
    node = make_node(tiny_task(lambda: nn.Linear(6, 1)), **job)
    computer = node.worker()
    lease = Lease(node.state.key, (0,), Combine.EVALUATE)
    before, gradient = computer.compute(lease).loss_sum, run(node, computer, 0)
    node.versions[0].states[EMA].zero_()
    targets = node.task.dataset().fetch(computer._stream.held_out_samples())["targets"]
    assert computer.compute(lease).loss_sum == targets.square().sum().item() != before
    assert run(node, computer, 0) == gradient, "training reads the parameters"


def test_an_evaluation_reads_the_data_set_of_its_own(make_node: MakeNode, tiny_task: Any) -> None:
    task = tiny_task()
    task.evaluation_dataset = lambda: ArrayRows(
        inputs=torch.zeros(10, 6), targets=torch.arange(10.0)[:, None]
    )
    task.evaluate = lambda model, batch: (batch["targets"].sum(), 1.0)
    node = make_node(task, evaluate={"every": 1, "micro_batches": 2})
    computer = node.worker()
    sums = [
        computer.compute(Lease(node.state.key, (one,), Combine.EVALUATE)).loss_sum for one in (0, 1)
    ]
    assert sums == [0 + 1 + 2 + 3 + 4, 5 + 6 + 7 + 8 + 9]


def test_maxima_are_those_of_gradients_and_buffers(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    outcome = computer.compute(node.lease(0))
    values = [one for one in computer._values() if one is not None]
    largest = [float(one.abs().max()) for one in values]
    assert outcome.maxima_C.tolist() == [max(largest[:6]), *largest[6:]]


def test_a_poisoned_outcome_is_not_finite(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    outcome = computer.compute(node.lease(0))
    poisoned = computer.poisoned(outcome)
    assert not poisoned.finite
    assert poisoned.loss_sum == outcome.loss_sum
    assert computer.compute(node.lease(0)).finite


def test_a_weight_of_zero_is_reported_as_it_is(make_node: MakeNode) -> None:
    """One micro-batch may weigh nothing; all together may not, which the protocol checks."""
    node = make_node()
    node.task.loss = lambda model, batch: (0.0 * model(batch["inputs"]).sum(), 0.0)
    outcome = node.worker().compute(node.lease(0))
    assert (outcome.loss_sum, outcome.weight, outcome.finite) == (0.0, 0.0, True)


def test_bfloat16_changes_the_gradient_and_stays_reproducible(make_node: MakeNode) -> None:
    answers = {}
    for precision in ("float32", "bfloat16"):
        node = make_node(precision=precision)
        computer = node.worker()
        answers[precision] = run(node, computer, 0)
        assert run(node, computer, 0) == answers[precision]
        assert all(one is None or one.dtype == torch.float32 for one in computer._values())
    assert answers["float32"] != answers["bfloat16"]
    assert answers["float32"][1] == pytest.approx(answers["bfloat16"][1], rel=0.1)


def test_members_are_read_from_the_store(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker()
    assert computer.members() == ()
    node.control.membership.write(Membership(3, (1, 4)).to_bytes())
    assert computer.members() == (1, 4)
    assert computer.key_word() == node.state.key.word


def test_only_one_micro_batch_a_lease(make_node: MakeNode) -> None:
    node = make_node()
    with pytest.raises(ValueError, match="too many values"):
        node.worker().compute(Lease(node.state.key, (0, 1)))


def test_deterministic_settles_what_could_differ(one_thread: None) -> None:
    deterministic(1)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


# --- checkpoints -----------------------------------------------------------------------------


def test_the_tensors_of_a_version_load_in_plain_torch(make_node: MakeNode, tiny_task: Any) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 1))
        model[0].requires_grad_(False)
        model[2].weight = model[0].weight  # tied to what is frozen
        return model

    def optimizer(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([one for _, one in named], lr=0.1)

    task = tiny_task(build)
    task.optimizer = optimizer
    node = make_node(task)
    snapshot = Snapshot(node.sizes, 0, node.versions[0])
    snapshot.copy()
    path = node.store.path / "constants"
    file = MappedFile(path, node.spec.constants_bytes, writable=False)
    tensors = model_tensors(node.spec, snapshot, file)
    model = build()
    assert model.load_state_dict(tensors).missing_keys == []
    for name, value in model.state_dict().items():
        expected = node.prepared.values[node.spec.state_dict[name]]
        assert torch.equal(value, expected), name
