"""A model is looked at once, refused by name, or rebuilt anywhere around shared memory."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from elastic.core.config import JobConfig
from elastic.core.data.memory import ArrayRows
from elastic.core.errors import DataError, TaskError
from elastic.core.layout import BUFFERS
from elastic.core.model import (
    Prepared,
    evaluate,
    forward,
    polled,
    prepare,
    raw_bytes,
    seed_generators,
)

Build = Callable[[], nn.Module]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prepared(tiny_task: Any, make_job: Callable[..., JobConfig]) -> Callable[..., Prepared]:
    """Prepare the tiny task, with another model or other methods."""

    def call(build: Build | None = None, *, job: dict[str, Any] = {}, **methods: Any) -> Prepared:  # noqa: B006
        task = tiny_task(build)
        for name, method in methods.items():
            setattr(task, name, method)
        return prepare(task, make_job(**job), task.dataset())

    return call


class Model(nn.Module):
    """A linear layer and whatever `init` and `change` do."""

    def __init__(
        self,
        init: Callable[[Any], None] = lambda model: None,
        change: Callable[[Any], None] = lambda model: None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)
        init(self)
        self._change = change

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self._change(self)
        result: torch.Tensor = self.linear(inputs)
        return result


BOOL, DOUBLE = torch.bool, torch.float64


def keep(model: nn.Module) -> None:
    """A forward that changes nothing."""


def buffer(name: str, value: torch.Tensor) -> Callable[[nn.Module], None]:
    return lambda model: model.register_buffer(name, value.clone())


# --- what is laid out ------------------------------------------------------------------------


def test_tensors_are_sorted_by_what_happens_to_them(prepared: Callable[..., Prepared]) -> None:
    spec = prepared().spec
    names = [one.name for one in spec.layout.parameters]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]
    assert [one.name for one in spec.layout.buffers] == ["1.running_mean", "1.running_var"]
    assert [one.name for one in spec.layout.counters] == ["1.num_batches_tracked"]
    assert spec.constants == ()
    assert [chunk.group for chunk in spec.layout.chunks] == [0, BUFFERS, BUFFERS]
    assert set(spec.state_dict) == set(spec.state_dict.values())


def test_the_try_leaves_no_trace(prepared: Callable[..., Prepared], tiny_task: Any) -> None:
    task = tiny_task()
    seen = []
    build = tiny_task().model
    task_model: list[nn.Module] = []

    def model() -> nn.Module:
        task_model.append(build())
        seen.append({name: value.clone() for name, value in task_model[0].state_dict().items()})
        return task_model[0]

    values = prepared(model).values
    assert values.keys() == seen[0].keys()
    for name, value in seen[0].items():
        assert torch.equal(values[name], value), name
    assert all(parameter.grad is None for parameter in task_model[0].parameters())
    assert task.model is not model


def test_the_model_is_a_function_of_the_seed(prepared: Callable[..., Prepared]) -> None:
    first, again, other = (prepared(job={"seed": seed}).values["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_spec_crosses_processes(prepared: Callable[..., Prepared]) -> None:
    made = prepared()
    spec = pickle.loads(pickle.dumps(made.spec))
    assert spec.layout == made.spec.layout
    assert spec.build(made.values).state_dict().keys() == made.values.keys()


def test_the_rebuilt_model_is_around_the_given_tensors(prepared: Callable[..., Prepared]) -> None:
    made = prepared()
    model = made.spec.build(made.values)
    assert model.training
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.data_ptr() == made.values[name].data_ptr(), name
    assert all(one.requires_grad and one.is_leaf for one in model.parameters())


def test_the_skeleton_holds_no_values(prepared: Callable[..., Prepared]) -> None:
    made = prepared(lambda: nn.Sequential(nn.Linear(6, 5000), nn.Linear(5000, 1)))
    assert sum(value.nbytes for value in made.values.values()) > 100_000
    assert len(made.spec.skeleton) < 5_000


def test_a_tied_parameter_is_there_once(prepared: Callable[..., Prepared]) -> None:
    def build() -> nn.Module:
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)
        second.weight = first.weight
        return nn.Sequential(first, second, nn.Linear(6, 1))

    made = prepared(build)
    names = [one.name for one in made.spec.layout.parameters]
    assert names == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    assert made.spec.state_dict["1.weight"] == "0.weight"
    model = made.spec.build(made.values)
    assert model[0].weight is model[1].weight  # type: ignore[index]


def test_parameters_without_gradient_or_optimizer_are_constants(
    prepared: Callable[..., Prepared],
) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
        model[0].requires_grad_(False)
        return model

    def optimizer(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for name, p in named if not name.startswith("1.")], lr=0.1)

    made = prepared(build, optimizer=optimizer)
    assert [one.name for one in made.spec.layout.parameters] == ["2.weight", "2.bias"]
    constants = made.spec.constants
    assert [one.name for one in constants] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(one.start_byte % 64 == 0 for one in constants)
    assert made.spec.constants_bytes >= sum(one.size_bytes for one in constants)
    model = made.spec.build(made.values)
    assert [one.requires_grad for one in model.parameters()] == [False] * 2 + [True] * 4


def test_optimizer_groups_have_chunks_of_their_own(prepared: Callable[..., Prepared]) -> None:
    def optimizer(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        matrices = [p for _, p in named if p.ndim > 1]
        vectors = [p for _, p in named if p.ndim < 2]
        return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])

    layout = prepared(optimizer=optimizer).spec.layout
    assert [one.name for one in layout.parameters][:2] == ["0.weight", "4.weight"]
    assert [chunk.group for chunk in layout.chunks] == [0, 1, BUFFERS, BUFFERS]


@pytest.mark.parametrize(
    ("value", "change", "kind"),
    [
        pytest.param(torch.zeros(3), lambda m: m.b.add_(1), "buffers", id="float changed"),
        pytest.param(torch.zeros(3), lambda m: setattr(m, "b", m.b + 1), "buffers", id="replaced"),
        pytest.param(torch.zeros(()), lambda m: m.b.add_(1), "buffers", id="0-d float"),
        pytest.param(torch.tensor(4), lambda m: m.b.add_(1), "counters", id="0-d integer"),
        pytest.param(
            torch.zeros(3, dtype=BOOL), lambda m: m.b.logical_not_(), "counters", id="bool"
        ),
        pytest.param(torch.zeros(3), keep, "constants", id="float kept"),
        pytest.param(torch.full((3,), torch.nan), keep, "constants", id="NaN kept"),
        pytest.param(torch.ones(2, 2, dtype=BOOL), keep, "constants", id="mask kept"),
        pytest.param(torch.zeros(3, dtype=DOUBLE), keep, "constants", id="double kept"),
        pytest.param(torch.empty(0), keep, "constants", id="empty"),
    ],
)
def test_what_a_buffer_is_depends_on_forward(
    value: torch.Tensor,
    change: Callable[[Any], None],
    kind: str,
    prepared: Callable[..., Prepared],
) -> None:
    made = prepared(lambda: Model(buffer("b", value), change))
    groups = {
        "buffers": made.spec.layout.buffers,
        "counters": made.spec.layout.counters,
        "constants": made.spec.constants,
    }
    assert {name: [one.name for one in group] for name, group in groups.items() if group} == {
        kind: ["b"]
    }
    assert raw_bytes([made.values["b"]]) == raw_bytes([value])


def test_a_buffer_that_is_not_saved_is_distributed_too(prepared: Callable[..., Prepared]) -> None:
    def init(model: nn.Module) -> None:
        model.register_buffer("mask", torch.ones(2), persistent=False)

    made = prepared(lambda: Model(init))
    assert [one.name for one in made.spec.constants] == ["mask"]
    assert "mask" not in made.spec.state_dict


# --- what is refused -------------------------------------------------------------------------


def write_parameter(model: Any) -> None:
    with torch.no_grad():
        model.linear.weight.mul_(0.5)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6, sparse=True)
        self.linear = nn.Linear(6, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(inputs)) % 10
        result: torch.Tensor = self.linear(inputs + self.embed(rows))
        return result


class Unpicklable(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 1)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: 5, r"model\(\) returned int, must be a torch.nn.Module"),
        (lambda: nn.Sequential(nn.LazyLinear(1)), r"0.weight is lazy"),
        (lambda: Model(change=write_parameter), r"forward changes the parameter linear.weight"),
        (lambda: nn.Linear(6, 1, device="meta"), r"weight is on meta, and device is cpu"),
        (lambda: nn.Linear(6, 1).double(), r"not float32: weight \(float64\), bias \(float64\)"),
        (Sparse, r"the gradient of embed.weight is sparse"),
        (Unpicklable, r"the model cannot be sent to workers"),
        (
            lambda: Model(
                buffer("b", torch.zeros(2, dtype=torch.float16)), lambda model: model.b.add_(1)
            ),
            r"forward changes the buffer b, which is torch.float16",
        ),
        (
            lambda: Model(buffer("b", torch.eye(3).to_sparse())),
            r"b is torch.sparse_coo; only dense tensors",
        ),
    ],
    ids=["type", "lazy", "write", "device", "dtype", "sparse", "pickle", "half", "layout"],
)
def test_a_model_is_refused_by_name(
    build: Build, message: str, prepared: Callable[..., Prepared]
) -> None:
    def loss(model: nn.Module, batch: Any) -> tuple[torch.Tensor, float]:
        return model(batch["inputs"]).sum(), 5.0

    with pytest.raises(TaskError, match=message):
        prepared(build, loss=loss)


def test_every_problem_of_a_model_is_named_at_once(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(TaskError) as caught:
        prepared(lambda: nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1, device="meta")))
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"model\(\) returned a DataParallel: return the plain model"),
        (
            lambda model: nn.Sequential(nn.DataParallel(model)),
            "0 is a DataParallel: return the plain model",
        ),
    ],
    ids=["outside", "inside"],
)
def test_a_model_that_distributes_itself_is_refused(
    wrap: Callable[[nn.Module], nn.Module], message: str, prepared: Callable[..., Prepared]
) -> None:
    with pytest.raises(TaskError, match=message):
        prepared(lambda: wrap(nn.Linear(6, 1)))


def test_a_loss_scaler_is_refused(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(TaskError, match=r"task's scaler is a GradScaler.*precision: bfloat16"):
        prepared(scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda out: out.sum(), r"loss returned Tensor, must be \(loss_sum, weight"),
        (lambda out: (out.sum(), 1, {}, 3), r"loss returned tuple of 4"),
        (lambda out: (out.sum(), 1, 2), r"metric_sums is int, must be a dict of sums by name"),
        (lambda out: (out.sum(), 1, {"a": out}), r"metric 'a' must be one number; its shape is"),
        (lambda out: (out.sum(), "x"), r"weight is 'x' \(str\), must be a number"),
        (
            lambda out: (out.sum(), 1, {str(one): 0 for one in range(65)}),
            r"loss returned 65 metrics, at most 64",
        ),
        (lambda out: (1.0, 1.0), r"loss_sum must be a scalar tensor; its shape is \(\)"),
        (lambda out: (out, 1.0), r"loss_sum must be a scalar tensor; its shape is \(5, 1\)"),
        (lambda out: (out.sum().detach(), 1.0), r"loss_sum does not depend on any parameter"),
    ],
    ids=[
        "no tuple",
        "four",
        "metrics",
        "metric",
        "weight",
        "too many",
        "number",
        "not reduced",
        "detached",
    ],
)
def test_a_loss_is_refused(
    result: Callable[[torch.Tensor], Any], message: str, prepared: Callable[..., Prepared]
) -> None:
    with pytest.raises(TaskError, match=message):
        prepared(loss=lambda model, batch: result(model(batch["inputs"])))


def test_an_optimizer_without_trained_parameters_is_refused(
    prepared: Callable[..., Prepared],
) -> None:
    def build() -> nn.Module:
        return nn.Linear(6, 1).requires_grad_(False)

    with pytest.raises(TaskError, match="trains no parameter"):
        prepared(build)


def test_held_out_samples_must_leave_some(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(DataError, match="held_out is 60"):
        prepared(job={"held_out": 60})


# --- forward ---------------------------------------------------------------------------------


def test_a_loss_of_one_element_and_a_weight_tensor_are_taken(tiny_task: Any) -> None:
    task, model = tiny_task(), nn.Linear(6, 1)
    task.loss = lambda model, batch: (model(batch).sum().reshape(1), torch.tensor(3))
    sums = forward(task, model, torch.ones(2, 6), "float32")
    assert (sums.loss.shape, sums.weight, sums.metrics) == ((1,), 3.0, {})


def test_metrics_are_numbers_in_the_order_of_the_first_try(tiny_task: Any) -> None:
    task, model = tiny_task(), nn.Linear(6, 1)
    task.loss = lambda model, batch: (
        model(batch).sum(),
        2,
        {"b": torch.tensor([3.0], requires_grad=True), "a": True},
    )
    sums = forward(task, model, torch.ones(2, 6), "float32")
    assert sums.metrics == {"a": 1.0, "b": 3.0}
    assert sums.in_order(("a", "b")) == (1.0, 3.0)
    with pytest.raises(TaskError, match="the metrics are b, a, and were a in the first try"):
        sums.in_order(("a",))


# --- evaluation ------------------------------------------------------------------------------

EVALUATE = {"held_out": 20, "evaluate": {"every": 2, "micro_batches": 4}}


def test_a_model_is_evaluated_without_gradients_and_left_as_it_was(tiny_task: Any) -> None:
    task = tiny_task()
    model = task.model()
    model[1].eval()
    seen = []

    def look(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        seen.append((model.training, model[3].training, torch.is_grad_enabled()))
        return model(batch).sum(), 2.0

    task.evaluate = look
    sums = evaluate(task, model, torch.ones(2, 6), "float32")
    assert seen == [(False, False, False)]
    assert not sums.loss.requires_grad
    assert [one.training for one in model] == [True, False, True, True, True]


def test_the_metrics_of_both_are_in_the_spec(prepared: Callable[..., Prepared]) -> None:
    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        out = model(batch["inputs"])
        names = ("train",) if torch.is_grad_enabled() else ("x", "y")
        return out.sum(), 1.0, dict.fromkeys(names, 0.0)

    spec = prepared(loss=loss, job=EVALUATE).spec
    assert (spec.metrics, spec.evaluated_metrics) == (("train",), ("x", "y"))
    assert prepared(loss=loss).spec.evaluated_metrics == (), "it is not even tried"


def change_batch_norm(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    model.train()
    return model(batch["inputs"]).sum(), 1.0


@pytest.mark.parametrize(
    ("job", "methods", "message"),
    [
        (
            {**EVALUATE, "held_out": 19},
            {},
            r"held_out is 19, an evaluation needs 20 samples: evaluate.micro_batches \(4\) x batch",
        ),
        (
            EVALUATE,
            {"evaluation_dataset": lambda: ArrayRows(inputs=torch.ones(3, 6))},
            r"evaluation_dataset\(\) has 3, an evaluation needs 20",
        ),
        (EVALUATE, {"evaluate": lambda model, batch: 1.0}, "evaluate returned float, must be"),
        (EVALUATE, {"evaluate": change_batch_norm}, "evaluate changes 1.running_mean"),
    ],
    ids=["held out", "data set", "result", "changes"],
)
def test_an_evaluation_is_refused(
    job: dict[str, Any],
    methods: dict[str, Any],
    message: str,
    prepared: Callable[..., Prepared],
) -> None:
    with pytest.raises(TaskError, match=message):
        prepared(job=job, **methods)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_precision_is_that_of_the_layers(
    precision: str, dtype: torch.dtype, tiny_task: Any
) -> None:
    task, model = tiny_task(), nn.Linear(6, 1)
    seen = []

    def loss(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        out = model(batch)
        seen.append(out.dtype)
        return out.float().sum(), 1.0

    task.loss = loss
    forward(task, model, torch.ones(2, 6), precision).loss.backward()  # type: ignore[no-untyped-call]
    assert seen == [dtype]
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_seeding_reaches_every_default_generator() -> None:
    import random

    import numpy as np

    def draw(key: int) -> tuple[float, ...]:
        seed_generators(key)
        return (
            torch.rand(()).item(),
            float(np.random.rand()),
            random.random(),
            *nn.functional.dropout(torch.ones(20)).tolist(),
        )

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        assert draw(7) == draw(7)
        assert all(a != b for a, b in zip(draw(7)[:3], draw(8)[:3], strict=True))
        assert draw(2**64 - 1) == draw(2**64 - 1)
        assert draw(0) != draw(2**63)[:3]
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


# --- polling ---------------------------------------------------------------------------------


class Gone(BaseException):
    pass


def test_a_model_is_polled_before_each_layer_and_after_each_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))
    polls = []
    polled(model, lambda: polls.append(1))
    loss = model(torch.ones(1, 3)).sum()
    assert len(polls) == 3
    loss.backward()
    assert len(polls) == 3 + 4


@pytest.mark.parametrize("after", range(7))
def test_polling_may_end_a_computation_anywhere(after: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    polls: list[int] = []

    def poll() -> None:
        polls.append(1)
        if len(polls) == after + 1:
            raise Gone

    polled(model, poll)
    with pytest.raises(Gone):
        model(torch.ones(1, 3)).sum().backward()
    assert len(polls) == after + 1
    polls.clear()
    polls.extend([1] * 100)  # the model still works
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_parameters_are_not_polled() -> None:
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    polls = []
    polled(model, lambda: polls.append(1))
    model(torch.ones(1, 3)).sum().backward()
    assert len(polls) == 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.zeros(2, 3).T,
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.empty(0),
    ],
    ids=["0-d", "transposed", "bool", "bfloat16", "empty"],
)
def test_raw_bytes(tensor: torch.Tensor) -> None:
    (data,) = raw_bytes([tensor])
    assert len(data) == tensor.numel() * tensor.element_size()
