"""What a user writes: a task builds the model, the loss of a micro-batch, the optimizer, the data.

`MicroBatch` is whatever the data set's `fetch` returned; this project never looks inside. Light to
import: no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from elastic.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import nn

Number: TypeAlias = "torch.Tensor | float"
LossSums: TypeAlias = (
    "tuple[torch.Tensor, Number] | tuple[torch.Tensor, Number, Mapping[str, Number]]"
)


@runtime_checkable
class Dataset(Protocol):
    """A finite set of samples, numbered from 0, read by number in any order by any worker.

    Two methods are optional:

    - `check()` reads everything and raises an error for damage; it is called once, before training
      starts.
    - `prefetch(indices)` brings what `fetch(indices)` will read into memory. It is only a hint, is
      called on a thread of its own beside `fetch`, and must draw no random numbers. False says that
      there was no room: it is called again after the next `fetch`.
    """

    def __len__(self) -> int:
        """Number of samples, the held-out ones among them."""
        ...

    def fetch(self, indices: npt.NDArray[np.int64]) -> Any:
        """Read the samples `indices`, shape (micro_batch_size,), in order, as one micro-batch.

        What it returns goes to the task's `loss` as it is, and must depend on `indices` and the
        default random generators only. Those of torch, numpy and random are seeded for the
        micro-batch before it is read, so `fetch` may augment.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """The user's code: any class with these four methods. It need not derive from this one.

    Optional methods, for a task that has them:

    - `schedule(step) -> float`: a factor on every learning rate; steps count from 0.
    - `evaluate(model, micro_batch)`: what `loss` returns, of a model in evaluation mode and without
      gradients; where it is missing, `loss` is called that way.
    - `evaluation_dataset() -> Dataset`: what to evaluate on; where it is missing, the samples that
      the job holds out (`held_out`).

    What cannot be trained exactly is refused before anything starts, with a `TaskError`.
    """

    def model(self) -> nn.Module:
        """Build the model: dense float32 parameters on the CPU, not wrapped in DDP or FSDP.

        Called once per job with seeded generators; all workers share what it returns.
        """
        ...

    def dataset(self) -> Dataset:
        """Open the data set. Called once in every worker.

        One that has `__getitem__` instead of `fetch` is taken as `elastic.MapDataset` does.
        """
        ...

    def loss(self, model: nn.Module, micro_batch: Any) -> LossSums:
        """Return (sum of losses, sum of weights) of one micro-batch, not their mean.

        The first is a scalar tensor to differentiate; the second a number or a tensor of one
        element, such as the number of samples or of real tokens. The loss of the step is the sum of
        the first over the sum of the second, over all micro-batches. A third value, a dict of
        further sums by name, is reported likewise: each over the sum of weights. A loss of several
        terms returns their total, and the terms in the dict.

        Args:
            micro_batch: what the data set's `fetch` returned.
        """
        ...

    def optimizer(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """Build an elementwise `torch.optim` optimizer, with parameter groups if wanted.

        Called once per job. Its state is kept, updated and checkpointed for you.

        Args:
            named_parameters: the model's, as `model.named_parameters()` gives them; tied ones once.
        """
        ...


def load_task(reference: str, arguments: Mapping[str, Any]) -> Task:
    """Import `package.module:Class` and call it with `arguments`.

    Raises:
        ConfigError: the reference cannot be imported, or the object lacks a method of `Task`.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"task: {reference!r} is not of the form 'package.module:Class'")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task: cannot import {reference!r}: {error}") from error
    try:
        task = factory(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"task_args: {dict(arguments)!r} do not fit {reference}: {error}"
        ) from error
    check_task(task)
    return task  # type: ignore[no-any-return]


def check_task(task: object) -> None:
    """Refuse an object that lacks a method of `Task`, naming all that are missing."""
    if isinstance(task, type):
        raise ConfigError(
            f"task: got the class {task.__name__}; needs an object: {task.__name__}()"
        )
    required: Iterable[str] = ("model", "dataset", "loss", "optimizer")
    missing = [name for name in required if not callable(getattr(task, name, None))]
    if missing:
        raise ConfigError(f"task: {type(task).__name__} lacks {', '.join(missing)}")
