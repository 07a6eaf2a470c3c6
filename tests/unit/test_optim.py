"""Chunked updates give the bits of plain torch.optim on the whole model, or are refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from elastic.core.errors import TaskError
from elastic.core.layout import ALIGNMENT, Chunk, Field, Layout, make_layout
from elastic.core.mapped import Sizes, Version
from elastic.core.optim import (
    ALLOWED,
    ChunkUpdater,
    Group,
    OptimizerSpec,
    _discover,
    check_elementwise,
    inspect_optimizer,
)

SHAPES = {"a": (37, 11), "b": (13,), "c": (5, 3, 7), "d": (1000,), "e": (1,)}
CHUNK_ELEMENTS = 160  # cuts inside tensors, and leaves small rests
NUM_STEPS = 5
FACTORS = (0.1, 0.55, 1.0, 1.0, 0.3)

Options = dict[str, Any]
CASES: list[tuple[type[optim.Optimizer], Options, Options]] = [
    # class, its arguments, what the second group says otherwise
    (optim.SGD, {"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"momentum": 0, "nesterov": False}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "fused": True}, {"lr": 0.3}),
    (optim.Adam, {"lr": 1e-2, "amsgrad": True}, {"amsgrad": False, "weight_decay": 0.01}),
    (optim.Adam, {"lr": 1e-2, "maximize": True, "foreach": True}, {"betas": (0.8, 0.95)}),
    (optim.AdamW, {"lr": 1e-2}, {"weight_decay": 0.0}),
    (optim.AdamW, {"lr": 1e-2, "fused": True, "amsgrad": True}, {"weight_decay": 0.0}),
    (optim.RMSprop, {"lr": 1e-2, "momentum": 0.9, "centered": True}, {"centered": False}),
    (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1, "lr_decay": 0.01}, {"lr": 0.2}),
    (optim.Adagrad, {"lr": 0.1, "fused": True}, {"weight_decay": 0.1}),
    (optim.Adadelta, {"lr": 1.0}, {"rho": 0.5}),
    (optim.Adamax, {"lr": 1e-2}, {"weight_decay": 0.1}),
    (optim.NAdam, {"lr": 1e-2, "decoupled_weight_decay": True}, {"momentum_decay": 0.1}),
    (optim.RAdam, {"lr": 1e-2}, {"weight_decay": 0.1}),
    (optim.ASGD, {"lr": 1e-2, "t0": 2}, {"alpha": 0.5}),
    (optim.Rprop, {"lr": 1e-2}, {"etas": (0.4, 1.3)}),
]
IDS = [f"{kind.__name__}-{index}" for index, (kind, _, _) in enumerate(CASES)]


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def groups_of(parameters: dict[str, nn.Parameter], second: Options) -> list[Options]:
    items = list(parameters.values())
    return [{"params": items[::2]}, {"params": items[1::2], **second}]


def make_gradients() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(NUM_STEPS)
    ]


def run_plain(
    kind: type[optim.Optimizer], arguments: Options, second: Options
) -> tuple[dict[str, nn.Parameter], optim.Optimizer]:
    parameters = make_parameters()
    optimizer = kind(groups_of(parameters, second), **arguments)
    base = [group["lr"] for group in optimizer.param_groups]
    for factor, gradients in zip(FACTORS, make_gradients(), strict=True):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        optimizer.step()
    return parameters, optimizer


class Setup:
    """A spec with its layout, two versions on files, and an updater."""

    def __init__(self, root: Path, spec: OptimizerSpec, *, buffers: Sequence[str] = ()) -> None:
        self.spec = spec
        self.layout: Layout = make_layout(
            [[(name, SHAPES[name]) for name in group.names] for group in spec.groups],
            buffers=[(name, (20,)) for name in buffers],
            chunk_elements=CHUNK_ELEMENTS,
        )
        sizes = Sizes(self.layout, 1, optimizer_keys=spec.tensor_keys, scalar_keys=spec.scalar_keys)
        first, second = (
            Version(root, index, sizes, writable=True, optimizer=True) for index in range(2)
        )
        self.versions = (first, second)
        self.gradient = torch.zeros(self.layout.num_parameter_elements)
        fill(self.layout, first.values, dict(make_parameters()))
        self.new_updater()

    def new_updater(self) -> None:
        self.updater = ChunkUpdater(self.spec, self.layout, self.versions)

    def update(self, chunk: Chunk, step: int) -> None:
        self.updater.update(
            chunk,
            self.gradient[chunk.start : chunk.stop],
            source=step % 2,
            factor=FACTORS[step],
            fresh=step == 0,
        )

    def step(self, step: int, each: Callable[..., Any] = map) -> None:
        fill(self.layout, self.gradient, make_gradients()[step])
        list(each(lambda chunk: self.update(chunk, step), self.layout.chunks))

    def result(self) -> Version:
        return self.versions[NUM_STEPS % 2]


def fill(layout: Layout, flat: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    for field in layout.parameters:
        flat[field.start : field.stop] = tensors[field.name].detach().reshape(-1)


def spec_of(kind: type[optim.Optimizer], arguments: Options, second: Options) -> OptimizerSpec:
    parameters = make_parameters()
    return inspect_optimizer(kind(groups_of(parameters, second), **arguments), parameters.items())


def assert_equal_field(
    field: Field, flat: torch.Tensor, plain: torch.Tensor, *, fused: bool
) -> None:
    """Equal bits. Fused kernels of torch round the last elements of a tensor in another way, which
    happens to a plain tensor of any size and never to a chunk, whose size is a multiple of 16."""
    exact = field.size - field.size % ALIGNMENT if fused else field.size
    found, expected = flat[field.start : field.stop], plain.reshape(-1)
    assert torch.equal(found[:exact], expected[:exact]), field.name
    torch.testing.assert_close(found[exact:], expected[exact:])


def assert_equals_plain(setup: Setup, case: tuple[type[optim.Optimizer], Options, Options]) -> None:
    parameters, optimizer = run_plain(*case)
    fused = bool(case[1].get("fused"))
    result = setup.result()
    for field in setup.layout.parameters:
        parameter = parameters[field.name]
        assert_equal_field(field, result.values, parameter.detach(), fused=fused)
        for key, value in optimizer.state.get(parameter, {}).items():
            if value.dim():
                assert_equal_field(field, result.states[key], value, fused=fused)
    for group, plain in enumerate(optimizer.param_groups):
        state = optimizer.state.get(plain["params"][0], {})
        for chunk in setup.layout.chunks:
            if chunk.group == group:
                for key in setup.spec.groups[group].scalar_keys:
                    assert result.scalars[key][chunk.index] == state[key].double()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_chunked_updates_equal_plain_torch(
    tmp_path: Path, case: tuple[type[optim.Optimizer], Options, Options]
) -> None:
    setup = Setup(tmp_path, spec_of(*case))
    assert len(setup.layout.chunks) > 8
    check_elementwise(setup.spec)
    for step in range(NUM_STEPS):
        setup.step(step)
    assert_equals_plain(setup, case)


def test_every_allowed_class_is_tried() -> None:
    assert {kind for kind, _, _ in CASES} == set(ALLOWED)


@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[14]], ids=["SGD", "AdamW", "ASGD"])
def test_threads_new_processes_and_repeated_updates_change_nothing(
    tmp_path: Path, case: tuple[type[optim.Optimizer], Options, Options]
) -> None:
    setup = Setup(tmp_path, pickle.loads(pickle.dumps(spec_of(*case))))
    with ThreadPoolExecutor(4) as pool:
        for step in range(NUM_STEPS):
            setup.step(step, pool.map)
            setup.step(step)  # as a successor would, over what is there
            setup.new_updater()
    assert_equals_plain(setup, case)


def test_carry_copies_parameters_state_scalars_and_buffers(tmp_path: Path) -> None:
    setup = Setup(tmp_path, spec_of(*CASES[3]), buffers=["mean"])
    old, new = setup.versions
    for number, tensor in enumerate([old.values, *old.states.values(), *old.scalars.values()]):
        tensor.copy_(torch.arange(tensor.numel()) + number)
    for chunk in setup.layout.chunks:
        setup.updater.carry(chunk, 0)
    assert torch.equal(new.values, old.values)
    for key, value in old.states.items():  # the second group keeps no max_exp_avg_sq
        last = setup.layout.chunks[-2] if key != "max_exp_avg_sq" else setup.layout.chunks[3]
        assert torch.equal(new.states[key][: last.stop], value[: last.stop])
    for key, value in old.scalars.items():
        assert torch.equal(new.scalars[key][:-1], value[:-1])


def test_a_chunk_of_buffers_is_not_updated(tmp_path: Path) -> None:
    setup = Setup(tmp_path, spec_of(*CASES[0]), buffers=["mean"])
    chunk = setup.layout.chunks[-1]
    with pytest.raises(ValueError, match="holds buffers"):
        setup.updater.update(chunk, torch.zeros(chunk.size), source=0, factor=1.0, fresh=True)


def test_a_factor_of_one_is_exactly_the_base_rate(tmp_path: Path) -> None:
    lr = 0.1 + 2**-55
    setup = Setup(tmp_path, spec_of(optim.SGD, {"lr": lr}, {}))
    chunk = setup.layout.chunks[0]
    before = setup.versions[0].values[: chunk.size].clone()
    gradient = torch.randn(chunk.size)
    setup.updater.update(chunk, gradient, source=0, factor=1.0, fresh=True)
    assert torch.equal(setup.versions[1].values[: chunk.size], before.add(gradient, alpha=-lr))
    assert torch.equal(setup.versions[0].values[: chunk.size], before)


def test_the_spec_names_groups_options_and_state() -> None:
    parameters = make_parameters()
    parameters["c"].requires_grad_(False)
    named = [*parameters.items(), ("tied", parameters["a"])]
    optimizer = optim.Adam(
        [
            {"params": [("x", parameters["b"]), ("y", parameters["a"])], "lr": torch.tensor(0.5)},
            {"params": [("z", parameters["c"]), ("w", parameters["d"])], "amsgrad": True},
        ],
        lr=1e-3,
    )
    spec = inspect_optimizer(optimizer, named)
    first, second = spec.groups
    assert (first.names, second.names) == (("b", "a"), ("d",))
    assert (first.options["lr"], second.options["lr"]) == (0.5, 1e-3)
    assert not {"params", "param_names"} & first.options.keys()
    assert first.tensor_keys == ("exp_avg", "exp_avg_sq")
    assert spec.tensor_keys == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert (spec.scalar_keys, spec.scalar_dtypes) == (("step",), (torch.float32,))
    assert pickle.loads(pickle.dumps(spec)) == spec


class MySGD(optim.SGD):
    pass


class MyOwn(optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def scheduled(parameters: list[nn.Parameter]) -> optim.Optimizer:
    optimizer = optim.SGD(parameters, lr=0.1)
    optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def hooked(parameters: list[nn.Parameter]) -> optim.Optimizer:
    optimizer = optim.SGD(parameters, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def twice(parameters: list[nn.Parameter]) -> optim.Optimizer:
    optimizer = optim.SGD(parameters, lr=0.1)
    optimizer.param_groups[0]["params"].append(parameters[0])
    return optimizer


REFUSED: dict[str, tuple[Callable[[list[nn.Parameter]], optim.Optimizer], str]] = {
    "LBFGS": (optim.LBFGS, "LBFGS is refused: it evaluates the loss several times"),
    "Adafactor": (optim.Adafactor, "Adafactor is refused: it scales by the root mean square"),
    "Muon": (lambda ps: optim.Muon(ps[:1]), "Muon is refused: it orthogonalizes"),
    "SparseAdam": (optim.SparseAdam, "SparseAdam is refused: .* sparse gradient"),
    "subclass": (MySGD, "MySGD is refused: a subclass of SGD .* use SGD itself"),
    "own": (MyOwn, "MyOwn is refused: only elementwise"),
    "differentiable": (lambda ps: optim.SGD(ps, differentiable=True), "differentiable=True"),
    "capturable": (lambda ps: optim.Adam(ps, capturable=True), "capturable=True"),
    "stranger": (
        lambda ps: optim.SGD([*ps, nn.Parameter(torch.zeros(3, 4))]),
        r"group 0 holds a parameter of shape \(3, 4\) that is not the model's",
    ),
    "twice": (twice, "a is listed twice"),
    "scheduler": (scheduled, r"wrapped.*schedule\(step\)"),
    "hook": (hooked, "step hooks"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_with_the_reason(
    make: Callable[[list[nn.Parameter]], optim.Optimizer], message: str
) -> None:
    parameters = make_parameters()
    with pytest.raises(TaskError, match=message):
        inspect_optimizer(make(list(parameters.values())), parameters.items())


def test_other_dtypes_are_refused_by_name() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.raises(TaskError, match=r"weight \(bfloat16\), bias .*precision: bfloat16"):
        inspect_optimizer(optim.SGD(model.parameters()), model.named_parameters())


def test_an_optimizer_that_trains_nothing_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(TaskError, match="trains no parameter"):
        inspect_optimizer(optim.SGD(model.parameters()), model.named_parameters())


def test_the_start_up_test_finds_what_is_not_elementwise() -> None:
    spec = OptimizerSpec(
        optim.Adafactor,
        (Group(("a",), {"lr": 0.1}),),
        {"lr": 0.1},
    )
    with pytest.raises(TaskError, match=r"Adafactor .* is not elementwise"):
        check_elementwise(spec)


class Keeps(optim.Optimizer):
    """Keeps a state of the given kinds, one more at each step."""

    def __init__(self, params: Any, values: Sequence[Any] = ()) -> None:
        super().__init__(params, {"values": values})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            state = self.state[group["params"][0]]
            state[f"key{len(state)}"] = group["values"][len(state)]


class KeepsAtOnce(Keeps):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.state[group["params"][0]] = dict(zip("ab", group["values"], strict=True))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Keeps, (torch.tensor(0.0), torch.tensor(0.0)), "changes its state keys: key1"),
        (KeepsAtOnce, (torch.tensor(0.0), 3), "keeps b as int, not as a tensor"),
        (KeepsAtOnce, (torch.zeros(3), torch.zeros(16)), r"keeps a as torch.float32 of shape \(3,"),
        (KeepsAtOnce, (torch.zeros(16, dtype=torch.float64), None), "keeps a as torch.float64"),
    ],
    ids=["keys", "number", "shape", "dtype"],
)
def test_state_that_the_store_cannot_hold_is_refused(
    kind: type[optim.Optimizer], values: Sequence[Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        _discover(kind, {}, {"values": values})


def test_no_optimizer_imports_the_compiler() -> None:
    script = """
import sys
from torch import nn
from elastic.core.optim import ALLOWED, check_elementwise, inspect_optimizer, without_compiler

without_compiler()
model = nn.Linear(4, 4)
for kind in ALLOWED:
    optimizer = kind(model.parameters(), lr=0.1)
    check_elementwise(inspect_optimizer(optimizer, model.named_parameters()))
sys.exit("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch._dynamo is loaded"
