"""Update parameters chunk by chunk with the user's `torch.optim` optimizer.

The optimizer that a task builds on the real model is only read: its class, its groups and the keys
of its state. A chunk is then updated as a tensor of its own by an optimizer of its own, from one
version of the store into the other. Only elementwise optimizers give the same bits that way, so
others are refused; this module never lets one through because it happens to run.

The bits equal those of plain torch on the whole model, with one exception: torch's fused kernels
round the last few elements of a tensor differently if its size is no multiple of the vector width.
Chunks end on multiples of 16, so runs of ours agree with each other there too.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic.core.errors import TaskError
from elastic.core.layout import ALIGNMENT, BUFFERS, Chunk, Layout
from elastic.core.mapped import EMA, Version

ALLOWED: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)
_REASONS = {
    torch.optim.LBFGS: "it evaluates the loss several times in one step",
    torch.optim.Adafactor: "it scales by the root mean square of a whole tensor",
    torch.optim.Muon: "it orthogonalizes whole matrices",
    torch.optim.SparseAdam: "it updates only the rows that a sparse gradient names",
}
_FORBIDDEN_OPTIONS = {
    "differentiable": "updates are never differentiated",
    "capturable": "updates are never captured in a CUDA graph",
}
_NOT_OPTIONS = ("params", "param_names")
_NUM_NAMES_SHOWN = 5
# Where the start-up test cuts its tensor: uneven, aligned, some chunks smaller than a vector loop.
_TEST_CUTS = tuple(ALIGNMENT * units for units in (0, 1, 34, 301, 304, 560, 625))
_TEST_STEPS = 3

State = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Parameters that share hyper-parameters, by name and in the order that the optimizer has them.

    `options` holds the hyper-parameters, `lr` before any schedule. The keys name the state that
    this group's optimizer keeps: per element, and once per tensor.
    """

    names: tuple[str, ...]
    options: dict[str, Any]
    tensor_keys: tuple[str, ...] = ()
    scalar_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizerSpec:
    """All that is needed to build the task's optimizer again around any tensors. Picklable.

    `defaults` are the constructor's arguments besides the parameters. The keys are those of all
    groups together: `tensor_keys` of float32 state of the parameter's shape, `scalar_keys` of
    0-dim tensors, whose dtypes `scalar_dtypes` gives in the same order.
    """

    kind: type[torch.optim.Optimizer]
    groups: tuple[Group, ...]
    defaults: dict[str, Any]
    tensor_keys: tuple[str, ...] = ()
    scalar_keys: tuple[str, ...] = ()
    scalar_dtypes: tuple[torch.dtype, ...] = ()

    def build(self, group: int, parameter: torch.Tensor) -> torch.optim.Optimizer:
        """An optimizer with the options of `group` and one parameter."""
        return _build(self.kind, self.defaults, self.groups[group].options, parameter)


def inspect_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> OptimizerSpec:
    """Read what the task's optimizer does, without keeping it.

    Parameters without `requires_grad` are left out of their group. A parameter in no group is not
    trained. A parameter with two names goes by its first one.

    Raises:
        TaskError: the optimizer cannot be run chunk by chunk, with the reason.
    """
    _check_kind(optimizer)
    names: dict[int, str] = {}
    for name, parameter in named_parameters:
        names.setdefault(id(parameter), name)
    members = _members(optimizer, names)
    kind = type(optimizer)
    accepted = inspect.signature(kind.__init__).parameters
    defaults = {
        name: value
        for name, value in _plain_options(optimizer.defaults).items()
        if name in accepted
    }
    groups, dtypes = [], {}
    for group, trained in zip(optimizer.param_groups, members, strict=True):
        options = _plain_options(group)
        tensor_keys, scalar_dtypes = _discover(kind, defaults, options)
        dtypes.update(scalar_dtypes)
        groups.append(Group(trained, options, tensor_keys, tuple(scalar_dtypes)))
    return OptimizerSpec(
        kind,
        tuple(groups),
        defaults,
        tensor_keys=tuple(dict.fromkeys(key for group in groups for key in group.tensor_keys)),
        scalar_keys=tuple(dtypes),
        scalar_dtypes=tuple(dtypes.values()),
    )


def _check_kind(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    name = kind.__name__
    if kind not in ALLOWED:
        allowed = ", ".join(one.__name__ for one in ALLOWED)
        for refused, reason in _REASONS.items():
            if isinstance(optimizer, refused):
                raise TaskError(f"optimizer: {name} is refused: {reason}. Allowed: {allowed}")
        bases = [one.__name__ for one in kind.__mro__[1:] if one in ALLOWED]
        reason = (
            f"a subclass of {bases[0]} may update in another way; use {bases[0]} itself"
            if bases
            else "only elementwise optimizers of torch.optim are known to be exact"
        )
        raise TaskError(f"optimizer: {name} is refused: {reason}. Allowed: {allowed}")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise TaskError(f"optimizer: {name} has step hooks, which chunked updates would not run")
    if "step" in vars(optimizer):
        raise TaskError(
            f"optimizer: the step of {name} is wrapped, as by a learning-rate scheduler:"
            " give the task a method schedule(step) -> factor instead"
        )


def _members(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[tuple[str, ...]]:
    """The names of each group's trained parameters."""
    seen: set[int] = set()
    members: list[tuple[str, ...]] = []
    wrong_dtype: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        trained = []
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise TaskError(
                    f"optimizer: group {index} holds a parameter of shape"
                    f" {tuple(parameter.shape)} that is not the model's: build the optimizer"
                    " from the parameters it is given"
                )
            if id(parameter) in seen:
                raise TaskError(f"optimizer: {name} is listed twice")
            seen.add(id(parameter))
            if not parameter.requires_grad:
                continue
            if parameter.dtype != torch.float32:
                wrong_dtype.append(f"{name} ({str(parameter.dtype).removeprefix('torch.')})")
            trained.append(name)
        members.append(tuple(trained))
    if wrong_dtype:
        more = len(wrong_dtype) - _NUM_NAMES_SHOWN
        raise TaskError(
            f"model: not float32: {', '.join(wrong_dtype[:_NUM_NAMES_SHOWN])}"
            + (f" and {more} more" if more > 0 else "")
            + ". Keep parameters in float32; precision: bfloat16 is for autocast"
        )
    if not any(members):
        raise TaskError("optimizer: it trains no parameter of the model")
    return members


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a group, tensors of one element as numbers."""
    for name, reason in _FORBIDDEN_OPTIONS.items():
        if group.get(name):
            raise TaskError(f"optimizer: {name}=True is refused: {reason}")
    return {name: _plain(value) for name, value in group.items() if name not in _NOT_OPTIONS}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _build(
    kind: type[torch.optim.Optimizer],
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    parameter: torch.Tensor,
) -> torch.optim.Optimizer:
    """Both what the constructor took and what the group says: Adagrad reads the former."""
    return kind([{"params": [parameter], **options}], **defaults)


def _discover(
    kind: type[torch.optim.Optimizer], defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, torch.dtype]]:
    """The state keys of elements and of scalars, found by stepping twice."""
    parameter = torch.linspace(-1, 1, ALIGNMENT, dtype=torch.float32)
    optimizer = _build(kind, defaults, options, parameter)
    found: list[State] = []
    for _ in range(2):
        _step(optimizer, parameter, torch.linspace(1, -1, ALIGNMENT, dtype=torch.float32))
        found.append(dict(optimizer.state.get(parameter, {})))
    if found[0].keys() != found[1].keys():
        changed = sorted(found[0].keys() ^ found[1].keys())
        raise TaskError(f"optimizer: {kind.__name__} changes its state keys: {', '.join(changed)}")
    tensor_keys: list[str] = []
    scalar_dtypes: dict[str, torch.dtype] = {}
    for key, value in found[1].items():
        if not isinstance(value, torch.Tensor):
            raise TaskError(
                f"optimizer: {kind.__name__} keeps {key} as {type(value).__name__}, not as a tensor"
            )
        if value.dim() == 0:
            scalar_dtypes[key] = value.dtype
        elif value.shape == parameter.shape and value.dtype == torch.float32:
            tensor_keys.append(key)
        else:
            raise TaskError(
                f"optimizer: {kind.__name__} keeps {key} as {value.dtype} of shape"
                f" {tuple(value.shape)}, neither one float32 per element nor one number"
            )
    return tuple(tensor_keys), scalar_dtypes


def without_compiler() -> None:
    """Keep torch's optimizers from importing the compiler, which takes a second and 77 MiB.

    They shield these functions from it in a wrapper that imports it at the first call. The wrapper
    remembers the shielded function; here the bare one is put in its place, as nothing is compiled
    around an optimizer of ours. Where torch does it otherwise one day, the import comes back.
    """
    bare = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
    if bare is not None:
        bare.__dynamo_disable = bare


def _step(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Step without the wrappers of `step`: hooks, profiler, and the compiler's, which loads it."""
    parameter.grad = gradient
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)
    parameter.grad = None


def check_elementwise(spec: OptimizerSpec) -> None:
    """Start-up test: a tensor updated whole and in chunks must have equal bits, state too.

    Raises:
        TaskError: it has not.
    """
    generator = torch.Generator().manual_seed(0)
    size = _TEST_CUTS[-1]
    start = torch.randn(size, generator=generator, dtype=torch.float32)
    gradients = torch.randn(_TEST_STEPS, size, generator=generator, dtype=torch.float32)
    for index, group in enumerate(spec.groups):
        whole = _trace(spec, index, start.clone(), gradients)
        flat = start.clone()
        cuts = itertools.pairwise(_TEST_CUTS)
        parts = [_trace(spec, index, flat[a:b], gradients[:, a:b]) for a, b in cuts]
        for key, value in whole.items():
            pieces = [part[key] for part in parts]
            if value.dim():
                equal = _equal_bits(value, torch.cat(pieces))
            else:
                equal = all(_equal_bits(value, piece) for piece in pieces)
            if not equal:
                raise TaskError(
                    f"optimizer: {spec.kind.__name__} with {group.options} gives other bits for"
                    f" {key} when a tensor is updated in chunks: it is not elementwise here"
                )


def _trace(
    spec: OptimizerSpec, group: int, parameter: torch.Tensor, gradients: torch.Tensor
) -> dict[str, torch.Tensor]:
    optimizer = spec.build(group, parameter)
    for gradient in gradients:
        _step(optimizer, parameter, gradient)
    return {"the parameters": parameter, **optimizer.state.get(parameter, {})}


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """One call, because threads pay for every time that a call gives up the interpreter's lock."""
    torch._foreach_copy_(targets, sources)


class ChunkUpdater:
    """Updates chunks from one version of the store into the other.

    Different chunks may be updated on different threads at the same time; one chunk may not.
    Every chunk has an optimizer per version, so nothing mutable is shared between chunks.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        layout: Layout,
        versions: tuple[Version, Version],
        *,
        ema_decay: float | None = None,
    ) -> None:
        """`versions` are written, and need the optimizer state mapped, with the average if any."""
        self._cells = tuple(
            [_Cell(spec, chunk, version, ema_decay) for chunk in layout.chunks]
            for version in versions
        )

    def update(
        self,
        chunk: Chunk,
        gradient: torch.Tensor,
        *,
        source: int,
        factor: float,
        fresh: bool,
    ) -> None:
        """Step from version `source` into the other, which is overwritten whatever it holds.

        Args:
            gradient: float32 of shape (chunk.size,), zeros in the padding, aligned to 64 bytes.
                Read only, and not kept.
            factor: of the schedule, on the group's learning rate.
            fresh: no update has happened yet (steps carried do not count), so the optimizer
                makes its own first state and what the store holds of it is not read.
        """
        old, new = self._pair(chunk, source)
        new.step(old, gradient, factor=factor, fresh=fresh)

    def carry(self, chunk: Chunk, source: int) -> None:
        """Copy version `source` to the other one without a step, float buffers too."""
        old, new = self._pair(chunk, source)
        new.copy(old)

    def _pair(self, chunk: Chunk, source: int) -> tuple[_Cell, _Cell]:
        return self._cells[source][chunk.index], self._cells[1 - source][chunk.index]


class _Cell:
    """One chunk in one version: views of the store, and the optimizer that steps on them."""

    __slots__ = (
        "_base_lr",
        "_chunk",
        "_ema_decay",
        "_group",
        "_optimizer",
        "_spec",
        "ema",
        "scalars",
        "states",
        "values",
    )

    def __init__(
        self, spec: OptimizerSpec, chunk: Chunk, version: Version, ema_decay: float | None
    ) -> None:
        self._spec, self._chunk, self._ema_decay = spec, chunk, ema_decay
        self.values = version.values[chunk.start : chunk.stop]
        self.states: dict[str, torch.Tensor] = {}
        self.scalars: dict[str, torch.Tensor] = {}
        self.ema: list[torch.Tensor] = []
        if chunk.group == BUFFERS:
            return
        if ema_decay is not None:
            self.ema = [version.states[EMA][chunk.start : chunk.stop]]
        group = spec.groups[chunk.group]
        self._base_lr = group.options["lr"]
        self.states = {
            key: version.states[key][chunk.start : chunk.stop] for key in group.tensor_keys
        }
        self.scalars = {key: version.scalars[key][chunk.index] for key in group.scalar_keys}
        self._reset()
        dtypes = dict(zip(spec.scalar_keys, spec.scalar_dtypes, strict=True))
        zeros = {key: torch.zeros((), dtype=dtypes[key]) for key in self.scalars}
        self._optimizer.state[self.values] = {**self.states, **zeros}

    def _reset(self) -> None:
        """An optimizer that has not stepped yet."""
        self._optimizer = self._spec.build(self._chunk.group, self.values)
        self._group = self._optimizer.param_groups[0]

    def copy(self, source: _Cell) -> None:
        _copy(
            [self.values, *self.ema, *self.states.values(), *self.scalars.values()],
            [source.values, *source.ema, *source.states.values(), *source.scalars.values()],
        )

    def step(self, source: _Cell, gradient: torch.Tensor, *, factor: float, fresh: bool) -> None:
        if self._chunk.group == BUFFERS:
            raise ValueError(f"chunk {self._chunk.index} holds buffers, which no optimizer updates")
        if fresh:
            self._reset()
            self.values.copy_(source.values)
        else:
            state = self._optimizer.state[self.values]
            _copy(
                [self.values, *self.states.values(), *(state[key] for key in self.scalars)],
                [source.values, *source.states.values(), *source.scalars.values()],
            )
        self._group["lr"] = self._base_lr * factor
        _step(self._optimizer, self.values, gradient)
        self._keep(self._optimizer.state.get(self.values, {}))
        if self._ema_decay is not None:
            torch.lerp(source.ema[0], self.values, 1 - self._ema_decay, out=self.ema[0])

    def _keep(self, state: State) -> None:
        """Write what the optimizer made new, rather than changed in place, to the store."""
        for key, view in self.states.items():
            if state[key] is not view:
                view.copy_(state[key])
                state[key] = view
        for key, number in self.scalars.items():
            number.copy_(state[key])
