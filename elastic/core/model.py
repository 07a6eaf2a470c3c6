"""The model as a job needs it: looked at once, then rebuilt around shared memory anywhere.

`prepare` builds the model, tries one micro-batch on it, and refuses by name what cannot keep the
promise. `ModelSpec.build` gives the same modules with tensors in a store. Nothing here runs a step.
"""

from __future__ import annotations

import io
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import nn

from elastic.core.config import JobConfig
from elastic.core.data.map_style import as_dataset
from elastic.core.data.order import Int64Array, SampleStream
from elastic.core.device import to_device
from elastic.core.errors import TaskError
from elastic.core.layout import ALIGNMENT_BYTES, COMPILED, Layout, aligned, make_layout
from elastic.core.optim import OptimizerSpec, check_elementwise, inspect_optimizer
from elastic.core.permutation import derive_key
from elastic.core.task import Dataset, Task

MAX_POLLS = 16
MAX_METRICS = 64
MAX_CHUNKS = 32_768  # a message with a maximum for each fits the socket buffer of any Linux

_WRAPPERS = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
    "PipelineStage",
)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that never changes: a frozen parameter, or a buffer that forward leaves alone."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start_byte: int
    is_parameter: bool

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ModelSpec:
    """All that a process needs, besides the store, to hold the model. Picklable.

    `skeleton` is the model with every parameter and buffer replaced by its name.
    `state_dict` maps each key of the model's state_dict to the tensor that holds it. `metrics`
    names what `loss` sums besides the loss, in the order of an outcome's; `evaluated_metrics` what
    `evaluate` does.
    """

    layout: Layout
    optimizer: OptimizerSpec
    constants: tuple[Constant, ...]
    state_dict: Mapping[str, str]
    skeleton: bytes
    metrics: tuple[str, ...] = ()
    evaluated_metrics: tuple[str, ...] = ()

    @property
    def constants_bytes(self) -> int:
        last = self.constants[-1] if self.constants else None
        return aligned(last.start_byte + last.size_bytes, ALIGNMENT_BYTES) if last else 0

    def build(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model around `tensors`, by name; parameters and buffers alike."""
        made: dict[str, Any] = {}

        class Loader(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                kind, name, trained = pid
                if name not in made:
                    tensor = tensors[name]
                    made[name] = nn.Parameter(tensor, trained) if kind == "parameter" else tensor
                return made[name]

        model = Loader(io.BytesIO(self.skeleton)).load()
        assert isinstance(model, nn.Module)
        return model


@dataclass(frozen=True)
class Prepared:
    """The spec, and the values to start from: parameters, buffers and constants by name."""

    spec: ModelSpec
    values: Tensors


def sample_stream(job: JobConfig, dataset: Dataset) -> SampleStream:
    """Which samples each micro-batch of the job holds."""
    return SampleStream(
        num_samples=len(dataset), held_out=job.held_out, seed=job.seed, split_seed=job.split_seed
    )


def seed_generators(key: int) -> None:
    """Seed the default generators of torch, numpy and random; dropout takes no other."""
    torch.default_generator.manual_seed(key & (2**63 - 1))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(key & (2**63 - 1))
    np.random.seed(key & 0xFFFF_FFFF)
    random.seed(key)


@dataclass(frozen=True, slots=True)
class Sums:
    """What the task says of one micro-batch: sums over its samples."""

    loss: torch.Tensor
    weight: float
    metrics: dict[str, float]

    def in_order(self, names: Sequence[str]) -> tuple[float, ...]:
        """The metrics in the order of `names`.

        Raises:
            TaskError: they are not those of the first micro-batch.
        """
        if self.metrics.keys() != set(names):
            raise TaskError(
                f"the metrics are {', '.join(self.metrics) or 'none'}, and were"
                f" {', '.join(names) or 'none'} in the first try: return the same ones every time"
            )
        return tuple(self.metrics[name] for name in names)


def forward(task: Task, model: nn.Module, micro_batch: Any, precision: str) -> Sums:
    """The loss of one micro-batch, its weight and metrics, checked.

    Raises:
        TaskError: `loss` returned something else.
    """
    sums = _sums("loss", task.loss, model, micro_batch, precision)
    if not sums.loss.requires_grad:
        raise TaskError("loss_sum does not depend on any parameter (it has no gradient)")
    return sums


def evaluate(task: Task, model: nn.Module, micro_batch: Any, precision: str) -> Sums:
    """The same by the task's `evaluate`, without gradients, the model in evaluation mode.

    Raises:
        TaskError: `evaluate` returned something else.
    """
    method = getattr(task, "evaluate", None)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            if method is None:
                return _sums("loss", task.loss, model, micro_batch, precision)
            return _sums("evaluate", method, model, micro_batch, precision)
    finally:
        for module in training:
            module.training = True


def _sums(
    name: str, method: Callable[..., Any], model: nn.Module, micro_batch: Any, precision: str
) -> Sums:
    context: AbstractContextManager[Any] = nullcontext()
    if precision == "bfloat16":
        kind = next(model.parameters()).device.type
        context = torch.autocast(kind, torch.bfloat16)
    with context:
        result = method(model, micro_batch)
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        shown = type(result).__name__
        if isinstance(result, tuple):
            shown += f" of {len(result)}"
        raise TaskError(f"{name} returned {shown}, must be (loss_sum, weight[, metric_sums])")
    loss_sum, weight, *rest = result
    if not isinstance(loss_sum, torch.Tensor) or loss_sum.numel() != 1:
        shape = tuple(getattr(loss_sum, "shape", ()))
        raise TaskError(f"{name}: loss_sum must be a scalar tensor; its shape is {shape}")
    metrics = rest[0] if rest else {}
    if not isinstance(metrics, Mapping) or not all(isinstance(one, str) for one in metrics):
        shown = type(metrics).__name__
        raise TaskError(f"{name}: metric_sums is {shown}, must be a dict of sums by name")
    if len(metrics) > MAX_METRICS:
        raise TaskError(f"{name} returned {len(metrics)} metrics, at most {MAX_METRICS}")
    return Sums(
        loss_sum,
        _number(name, "weight", weight),
        {key: _number(name, f"metric {key!r}", value) for key, value in metrics.items()},
    )


def _number(name: str, what: str, value: Any) -> float:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise TaskError(f"{name}: {what} must be one number; its shape is {tuple(value.shape)}")
        value = value.detach()  # a term of the loss may be a metric as it is
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        kind = type(value).__name__
        raise TaskError(f"{name}: {what} is {value!r} ({kind}), must be a number") from error


def evaluation_samples(task: Task, job: JobConfig, dataset: Dataset) -> tuple[Dataset, Int64Array]:
    """What an evaluation reads: a data set, and its samples by micro-batch, shape (E, size).

    Raises:
        TaskError: there are too few.
    """
    shape = (job.evaluate.micro_batches, job.batch.micro_batch_size)
    need = shape[0] * shape[1]
    method = getattr(task, "evaluation_dataset", None)
    if method is not None:
        dataset = as_dataset(method())
        samples, where = np.arange(len(dataset), dtype=np.int64), "evaluation_dataset() has"
    else:
        samples, where = sample_stream(job, dataset).held_out_samples(), "held_out is"
    if len(samples) < need:
        raise TaskError(
            f"{where} {len(samples)}, an evaluation needs {need} samples: evaluate.micro_batches"
            f" ({shape[0]}) x batch.micro_batch_size ({shape[1]})"
        )
    return dataset, samples[:need].reshape(shape)


def prepare(task: Task, job: JobConfig, dataset: Dataset) -> Prepared:
    """Check the data, build the model once, try it on one micro-batch, and lay it out.

    Raises:
        DataError: the data set cannot be read by number, or its `check` found damage.
        TaskError: something cannot be trained exactly, by name and with the reason.
    """
    dataset = as_dataset(dataset)
    _check_data(dataset)
    seed_generators(derive_key("model", job.seed))
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"model() returned {type(model).__name__}, must be a torch.nn.Module")
    model.train()
    _check_wrappers(task, model)
    _check_tensors(model, job.device)
    model.cpu()
    named = list(model.named_parameters())
    optimizer = inspect_optimizer(task.optimizer(named), named)
    check_elementwise(optimizer)
    trained = {name for group in optimizer.groups for name in group.names}
    if not trained:
        raise TaskError("optimizer() holds no parameter that requires a gradient")
    model.to(job.device)
    changing, metrics = _try_micro_batch(task, job, model, dataset)
    evaluated = _try_evaluation(task, job, model, dataset) if job.evaluate.every else ()
    model.cpu()
    tensors = dict(_named_tensors(model))
    layout = _layout(optimizer, tensors, changing, job.chunk_elements)
    if len(layout.chunks) > MAX_CHUNKS:
        raise TaskError(
            f"{len(layout.chunks)} chunks of {job.chunk_elements} elements, at most {MAX_CHUNKS}:"
            " raise chunk_elements"
        )
    held = {field.name for field in layout.fields} | {one.name for one in layout.counters}
    constants = []
    at = 0
    for name, tensor in tensors.items():
        if name not in held:
            is_parameter = isinstance(tensor, nn.Parameter)
            constants.append(Constant(name, tuple(tensor.shape), tensor.dtype, at, is_parameter))
            at = aligned(at + constants[-1].size_bytes, ALIGNMENT_BYTES)
    names = {id(tensor): name for name, tensor in tensors.items()}
    state_dict = _state_names(model, names)
    spec = ModelSpec(
        layout,
        optimizer,
        tuple(constants),
        state_dict,
        _skeleton(model, names),
        metrics,
        evaluated,
    )
    return Prepared(spec, {name: tensor.detach() for name, tensor in tensors.items()})


def _state_names(model: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """The tensor behind each key of the state_dict, that of the plain model if it is compiled."""
    entries = model.state_dict(keep_vars=True)
    strange = [key for key, value in entries.items() if id(value) not in names]
    if strange:
        raise TaskError(
            f"state_dict() holds {', '.join(strange)}, which is no parameter or buffer: extra state"
            " is not shared between workers; register it as a buffer"
        )
    return {key.removeprefix(COMPILED): names[id(value)] for key, value in entries.items()}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_wrappers(task: Task, model: nn.Module) -> None:
    """What distributes or scales by itself would do so in every worker, of its own."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _WRAPPERS or any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            where = f"{name} is" if name else "model() returned"
            raise TaskError(f"{where} a {kind}: return the plain model, workers share it already")
    for name, value in vars(task).items() if hasattr(task, "__dict__") else ():
        if isinstance(value, torch.amp.GradScaler):
            raise TaskError(
                f"the task's {name} is a GradScaler: its scale would depend on what one worker saw;"
                " use precision: bfloat16, which needs none"
            )


def _check_tensors(model: nn.Module, device: str) -> None:
    problems = []
    for name, tensor in _named_tensors(model):
        if nn.parameter.is_lazy(tensor):
            problems.append(f"{name} is lazy: run the model once in model()")
        elif tensor.device.type not in ("cpu", device):
            problems.append(f"{name} is on {tensor.device}, and device is {device}")
        elif tensor.layout != torch.strided:
            problems.append(f"{name} is {tensor.layout}; only dense tensors can be trained")
        elif type(tensor) not in (nn.Parameter, torch.Tensor, nn.Buffer):
            problems.append(f"{name} is a {type(tensor).__name__}; sharded tensors are refused")
    if problems:
        raise TaskError("the model cannot be trained:\n  " + "\n  ".join(problems))


def _try_micro_batch(
    task: Task, job: JobConfig, model: nn.Module, dataset: Dataset
) -> tuple[set[str], tuple[str, ...]]:
    """Run one micro-batch; return the buffers that forward changes, and the names of the metrics.

    The model is left as it was.

    A parameter that forward changes would end a worker with SIGSEGV: it is mapped read-only there.
    """
    stream = sample_stream(job, dataset)
    batch = job.batch
    indices = stream.micro_batch(0, 0, batch.micro_batches, batch.micro_batch_size)
    before = {name: tensor.detach().clone() for name, tensor in _named_tensors(model)}
    seed_generators(derive_key("try", job.seed))
    data = to_device(dataset.fetch(indices), torch.device(job.device))
    sums = forward(task, model, data, job.precision)
    sums.loss.backward()  # type: ignore[no-untyped-call]
    _check_shapes(model, before)
    changed = {
        name for name, tensor in _named_tensors(model) if not _equal(tensor.detach(), before[name])
    }
    parameters = dict(model.named_parameters())
    written = sorted(changed & set(parameters))
    if written:
        raise TaskError(
            f"forward changes the parameter {', '.join(written)}: register it as a buffer, or"
            " compute the changed value into a new tensor"
        )
    for name, parameter in parameters.items():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise TaskError(f"the gradient of {name} is sparse: build the layer with sparse=False")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    model.zero_grad(set_to_none=True)
    return changed, tuple(sums.metrics)


def _try_evaluation(
    task: Task, job: JobConfig, model: nn.Module, dataset: Dataset
) -> tuple[str, ...]:
    """Evaluate one micro-batch; return the names of the metrics. It must change nothing."""
    evaluated, samples = evaluation_samples(task, job, dataset)
    if evaluated is not dataset:
        _check_data(evaluated)
    before = {name: tensor.detach().clone() for name, tensor in _named_tensors(model)}
    seed_generators(derive_key("try", job.seed))
    data = to_device(evaluated.fetch(samples[0]), torch.device(job.device))
    sums = evaluate(task, model, data, job.precision)
    _check_shapes(model, before)
    for name, tensor in _named_tensors(model):
        if not _equal(tensor.detach(), before[name]):
            raise TaskError(f"evaluate changes {name}: it may only look")
    return tuple(sums.metrics)


def _check_data(dataset: Dataset) -> None:
    """Once for all processes: workers may then open the data without reading it."""
    if hasattr(dataset, "check"):
        dataset.check()


def _check_shapes(model: nn.Module, before: Tensors) -> None:
    """What forward registers, drops or resizes has no place in the layout."""
    now = dict(_named_tensors(model))
    for name in now.keys() | before.keys():
        if name not in before or name not in now:
            raise TaskError(f"forward registers or removes {name}: do that in model()")
        if now[name].shape != before[name].shape:
            raise TaskError(
                f"forward changes the shape of {name} from {tuple(before[name].shape)} to"
                f" {tuple(now[name].shape)}: give it its final shape in model()"
            )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def _layout(
    optimizer: OptimizerSpec, tensors: Tensors, changing: set[str], chunk_elements: int
) -> Layout:
    floats, counters = [], []
    for name in (name for name in tensors if name in changing):
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        if tensor.dtype == torch.float32:
            floats.append((name, shape))
        elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            raise TaskError(
                f"forward changes the buffer {name}, which is {tensor.dtype}: only float32"
                " buffers can be averaged exactly"
            )
        else:
            size_bytes = tensor.numel() * tensor.element_size()
            counters.append((name, shape, str(tensor.dtype).removeprefix("torch."), size_bytes))
    groups = [
        [(name, tuple(tensors[name].shape)) for name in group.names] for group in optimizer.groups
    ]
    return make_layout(groups, buffers=floats, counters=counters, chunk_elements=chunk_elements)


def _skeleton(model: nn.Module, names: Mapping[int, str]) -> bytes:
    class Dumper(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, torch.Tensor) and id(obj) in names:
                is_parameter = isinstance(obj, nn.Parameter)
                kind = "parameter" if is_parameter else "buffer"
                return (kind, names[id(obj)], obj.requires_grad)
            return None

    stream = io.BytesIO()
    try:
        Dumper(stream).dump(model)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TaskError(f"the model cannot be sent to workers: {error}") from error
    return stream.getvalue()


def polled(model: nn.Module, poll: Callable[[], None]) -> None:
    """Call `poll` between layers: before leaf modules, and after gradients of parameters.

    At most `MAX_POLLS` times in either direction, evenly spread: a hook costs about 10 us.
    """
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    for module in leaves[:: _stride(leaves)]:
        module.register_forward_pre_hook(lambda *_: poll())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained[:: _stride(trained)]:
        parameter.register_post_accumulate_grad_hook(lambda _: poll())  # type: ignore[no-untyped-call]


def _stride(things: Sequence[Any]) -> int:
    return max(1, math.ceil(len(things) / MAX_POLLS))


def raw_bytes(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """The bytes of each tensor, whatever its dtype."""
    return [
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for tensor in tensors
    ]
