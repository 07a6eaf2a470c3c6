"""What a model repository says of itself: repository.json as a tree of types.

Describes and checks; never reads weights.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Input(_Section):
    """What goes into an expert: the shape of one sample, and its type in the words of the Open
    Inference Protocol."""

    shape: tuple[Positive, ...] = Field(min_length=1)
    dtype: Literal["FP32", "UINT8"]


class ModelSpec(_Section):
    """How to build a module: an `nn.Module` by name, and what to call it with."""

    target: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    arguments: dict[str, Any] = {}


class Weights(_Section):
    """A version of a module: where its weights lie, below the repository's folder."""

    version: Version
    weights: str
    sha256: Digest
    model: ModelSpec
    num_parameters: Positive
    flops_per_call: Annotated[int, Field(ge=0)]
    """Forward, of one sample; a multiplication and an addition are two."""

    @field_validator("weights")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{value!r} must be a path below the repository's folder")
        return value


class ExpertEntry(Weights):
    """An expert that answers."""

    name: Name


class RouterEntry(Weights):
    """The router, and which expert each of its outputs means.

    An expert that is no output gets no weight by the router; an output whose expert is gone is left
    out.
    """

    outputs: tuple[Name, ...] = Field(min_length=1)


class Sampling(_Section):
    """How a flow is sampled unless a request says otherwise."""

    num_steps: Positive


class Manifest(_Section):
    """repository.json."""

    format: Literal[1] = 1
    name: Name
    task: Literal["flow", "language", "classifier"]
    input: Input
    num_classes: Positive | None = None
    labels: tuple[str, ...] | None = None
    """Of a classifier: names of its classes."""
    experts: tuple[ExpertEntry, ...] = Field(min_length=1)
    router: RouterEntry
    selection: dict[str, Any]
    """A policy of `policies.routing` with its `kind`, as chosen on validation data."""
    sampling: Sampling | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        names = [one.name for one in self.experts]
        found = []
        if len(set(names)) < len(names):
            found.append(f"experts: names repeat: {', '.join(names)}")
        if len(set(self.router.outputs)) < len(self.router.outputs):
            found.append(f"router.outputs: names repeat: {', '.join(self.router.outputs)}")
        if not set(names) & set(self.router.outputs):
            found.append(
                f"router.outputs: {', '.join(self.router.outputs)} are none of the experts"
                f" {', '.join(names)}"
            )
        if "kind" not in self.selection:
            found.append("selection: needs a kind, such as top_k")
        if (self.task == "classifier") != (self.num_classes is not None):
            found.append(f"num_classes: is {self.num_classes}; classifiers need it, no other does")
        if self.labels is not None and len(self.labels) != self.num_classes:
            found.append(f"labels: {len(self.labels)} for num_classes {self.num_classes}")
        if (self.task == "flow") != (self.sampling is not None):
            found.append(f"sampling: is {self.sampling}; a flow needs it, no other task does")
        if (self.input.dtype == "UINT8") != (self.task == "language"):
            found.append(f"input.dtype: {self.input.dtype} is not for the task {self.task}")
        return found
