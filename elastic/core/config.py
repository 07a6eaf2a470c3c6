"""The job file: one frozen tree that describes a job, and nothing about the machines it runs on.

Defaults < YAML < command line. Everything is checked before anything starts, all errors at once.
Never reads the environment, never imports the user's task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from elastic.core.errors import ConfigError
from elastic.core.runs import MODELS
from elastic.core.storage import below, check_location, is_uri
from elastic.core.yaml_file import (
    Document,
    read_yaml,
    validate,
    with_overrides,
)

if TYPE_CHECKING:
    from policies.coding.m_sgc import MSgc
    from policies.coding.sr_sgc import SrSgc

MAX_SEED = 2**63 - 1
MAX_MICRO_BATCHES = 4096
MAX_WORKERS = 1024
MAX_NODES = 64
MAX_MODELS = 64
OF_SEVERAL_MODELS = ("speculation", "frc", "sr_sgc", "m_sgc", "uncoded", "auto")
"""Kinds of `stragglers` with which a job may have several models."""
FREE_AT_RESUME = frozenset(
    {
        "name",
        "steps",
        "workers",
        "nodes",
        "replicas",
        "stragglers",
        "audit",
        "standby",
        "nonfinite",
        "evaluate",
        "checkpoint",
        "preemption",
        "monitoring",
    }
)


class _Section(BaseModel):
    """What every section of the tree has in common."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Batch(_Section):
    """The global batch: micro_batches x micro_batch_size samples in every step."""

    micro_batches: int = Field(ge=1, le=MAX_MICRO_BATCHES)
    """Parts that a step is cut into; each is computed by whichever worker is free. More parts
    even out slow workers better and cost a little efficiency."""
    micro_batch_size: int = Field(ge=1)
    """Samples in one micro-batch. Memory of a worker grows with it."""


class Workers(_Section):
    """How many workers compute. The number changes the speed, never the result."""

    start: int = Field(default=4, ge=1, le=MAX_WORKERS)
    """Workers at the beginning."""
    min: int = Field(default=1, ge=1, le=MAX_WORKERS)
    """Scaling down stops here."""
    max: int = Field(default=8, ge=1, le=MAX_WORKERS)
    """Scaling up stops here; shared memory is set aside for this many."""
    threads: int = Field(default=1, ge=1, le=256)
    """Threads of one worker. Part of the job: another number may round differently."""
    spare: int = Field(default=1, ge=0, le=MAX_WORKERS)
    """Warm workers kept ready, so that a replacement computes at once."""
    preflight: float | None = Field(default=None, gt=1)
    """Each worker multiplies matrices and copies memory for a tenth of a second before it computes.
    One that takes so many times as long as the median of all is left out, while there are `min`
    others: 2, say. Of three hosts or more the links are probed, too, with a few megabytes each, and
    a host is left out whose links are so much slower, while there are nodes.min others. null:
    nobody is probed."""

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if not self.min <= self.start <= self.max:
            raise ValueError(
                f"got min {self.min}, start {self.start}, max {self.max}; needs min <= start <= max"
            )
        return self


class Nodes(_Section):
    """On how many hosts the job may run: one keeps its parameters on each, and the workers are
    spread over them. The number changes the speed, never the result."""

    min: int = Field(default=1, ge=1, le=MAX_NODES)
    """The job begins once so many are there."""
    max: int = Field(default=1, ge=1, le=MAX_NODES)
    """No more are taken. 1: all runs on the host of the driver."""

    @model_validator(mode="after")
    def _in_order(self) -> Nodes:
        if self.min > self.max:
            raise ValueError(f"got min {self.min}, max {self.max}; needs min <= max")
        return self


class Stragglers(_Section):
    """What is done about workers that are slow now and then: docs/stragglers.md. It changes the
    speed, never the result, but for the two kinds that say `exact: false`."""

    kind: Literal[
        "speculation",
        "frc",
        "c_code",
        "crc",
        "uncoded",
        "auto",
        "sr_sgc",
        "m_sgc",
        "drop_compute",
        "erasure_head",
    ] = "speculation"
    """speculation: shares by measured speed; who is done takes what is left, and computes besides
    what is late. frc: `stragglers` + 1 workers hold each share from the beginning, the first to
    finish each micro-batch counts. c_code: as many compute each micro-batch and add it up with
    coefficients, and all sums but `stragglers` give the result; shares by measured speed. crc: the
    same with even shares. uncoded: even shares, nobody helps; to compare with. auto: what is the
    fastest by what the last steps have shown, looked at again and again.

    Of several `models`, in rounds that end without who is late: sr_sgc: in each round all work on
    one model's step, by a code, and some on what a step begun `burst` rounds before lacks. m_sgc:
    on window - 1 + `burst` steps at once, most parts with one worker only, which retries what it
    has missed.

    Inexact, never chosen by auto, the result says `exact: false`: drop_compute: as speculation, but
    a step ends at a deadline, without the micro-batches that are not done by then. erasure_head: as
    frc, but a step ends once `wait_for` workers have done their shares. The step is divided by the
    number of all its micro-batches all the same."""
    stragglers: int = Field(default=0, ge=0, lt=MAX_WORKERS)
    """With frc, c_code, crc, erasure_head: so many workers may straggle, whichever they are, and no
    step waits for them."""
    burst: int = Field(default=0, ge=0)
    """With sr_sgc and m_sgc: a worker straggles in so many rounds one after the other (B)."""
    window: int = Field(default=0, ge=0)
    """With sr_sgc and m_sgc: rounds in which at most `distinct` straggle (W). `burst` is less; with
    sr_sgc it divides window - 1."""
    distinct: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """With sr_sgc and m_sgc: so many workers straggle within a window (lambda)."""
    inner: Literal["frc", "coded"] = "frc"
    """With m_sgc: how many workers compute what is not retried: a repetition, or cyclic shares."""
    deadline_s: float | None = Field(default=None, gt=0)
    """With drop_compute: from the beginning of each step. null: the one that gets the most done in
    the same time, by the steps that waited for all: ten, then one in ten."""
    wait_for: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """With erasure_head: the number of workers whose shares are waited for."""

    @model_validator(mode="after")
    def _what_the_kind_needs(self) -> Stragglers:
        if (self.kind in ("frc", "erasure_head") or self.is_code) != (self.stragglers > 0):
            raise ValueError(
                f"got kind {self.kind}, stragglers {self.stragglers}; needs stragglers, at least 1,"
                " with frc, c_code, crc and erasure_head, and none with other kinds"
            )
        if (self.kind == "erasure_head") != (self.wait_for > 0):
            raise ValueError(
                f"got kind {self.kind}, wait_for {self.wait_for}; needs wait_for, at least 1, with"
                " erasure_head, and none with other kinds"
            )
        if self.is_sequential:
            _ = self.scheme  # which says what is wrong with it
        elif any((self.burst, self.window, self.distinct)):
            raise ValueError(
                f"got kind {self.kind}, burst {self.burst}, window {self.window}, distinct"
                f" {self.distinct}; needs none of them but with sr_sgc and m_sgc"
            )
        if self.deadline_s is not None and self.kind != "drop_compute":
            raise ValueError(
                f"got kind {self.kind}, deadline_s {self.deadline_s}; needs none but with"
                " drop_compute"
            )
        return self

    @property
    def is_code(self) -> bool:
        """Whether sums are coded."""
        return self.kind in ("c_code", "crc")

    @property
    def is_sequential(self) -> bool:
        """Whether models are trained in rounds."""
        return self.kind in ("sr_sgc", "m_sgc")

    @property
    def scheme(self) -> SrSgc | MSgc | None:
        """The sequential code, if it is one. Raises ValueError if there is none such."""
        if not self.is_sequential:
            return None
        from policies.coding.m_sgc import MSgc  # and numpy, which no other job needs yet
        from policies.coding.sr_sgc import SrSgc

        burst, window, distinct = self.burst, self.window, self.distinct
        if self.kind == "sr_sgc":
            return SrSgc(burst=burst, window=window, distinct=distinct)
        return MSgc(burst=burst, window=window, distinct=distinct, inner=self.inner)

    @property
    def is_exact(self) -> bool:
        """Whether slow workers cannot change the result."""
        return self.kind not in ("drop_compute", "erasure_head")


class Model(_Section):
    """What one of several models has of its own."""

    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """In place of the job's; null: the same."""
    task_args: dict[str, JsonValue] = {}
    """Keyword arguments of the task, besides the job's or in their place."""


class Nonfinite(_Section):
    """What to do when the model itself produces NaN or Inf (two workers agreed on it)."""

    action: Literal["skip", "stop"] = "stop"
    """skip: leave the parameters as they are and go on; stop: write a checkpoint and fail."""
    max_skipped: int = Field(default=100, ge=1, le=1000)
    """With skip: the job fails after this many skipped steps."""


class Ema(_Section):
    """An exponential moving average of the parameters, updated with every step."""

    decay: float = Field(gt=0, lt=1)
    """Share of the old average in the new one, such as 0.999."""


class Evaluate(_Section):
    """When the model is evaluated on samples that it is not trained on."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; there is one at the end, too. 0: never."""
    micro_batches: int = Field(default=8, ge=1, le=MAX_MICRO_BATCHES)
    """Micro-batches of one evaluation, each of batch.micro_batch_size samples: always the same
    ones. They are leased to workers like those of a step. With `ema` the average is evaluated."""


class CheckpointConfig(_Section):
    """When checkpoints are written. They are written behind training."""

    every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = Field(default=3, ge=1)
    """So many of the newest stay."""
    keep_best: int = Field(default=0, ge=0)
    """So many of the best by `metric` stay besides."""
    metric: Annotated[
        str,
        Field(
            pattern=r"^(eval\.)?[A-Za-z_][\w-]*$",
            json_schema_extra={"allowed": "loss or a metric of the task; eval. before it"},
        ),
    ] = "loss"
    """What decides which is best: loss or a metric of the last step before the checkpoint, or
    eval.loss or eval.NAME, what evaluating that very state gave."""
    mode: Literal["min", "max"] = "min"
    """Whether low or high values of `metric` are good."""
    storage: str | None = None
    """Folder of the checkpoints: an absolute path or a URI such as s3://bucket/folder; null: in the
    run folder. Credentials come from the environment, endpoints too or from the URI's query. What
    is on its way from or to a URI lies in TMPDIR."""
    patience_s: float = Field(default=60.0, ge=0)
    """The last checkpoint of a job is tried for so long where the disk or bucket refuses it; the
    others are tried again, with back-off, while training goes on."""

    @field_validator("storage")
    @classmethod
    def _known_kind(cls, value: str | None) -> str | None:
        if value is not None:
            check_location(value)
        return value


class Preemption(_Section):
    """How the job hears that its machine will be taken away. It then finishes the step, writes a
    checkpoint and ends with an error, and its run goes on elsewhere. Ray's own notices (a node is
    drained) and SIGTERM are always heeded."""

    source: Literal["none", "auto", "aws", "gcp"] = "none"
    """Whose metadata service is asked, every few seconds, whether a spot machine ends. auto: the
    one that the machine's firmware names, if any. none: no service is asked."""


class Monitoring(_Section):
    """How one hears of a running job, and what is done about faults: docs/monitoring.md."""

    detect: bool = True
    """Look for workers that are slow, hang, or are lost again and again. Events tell of them."""
    steering: Literal["observe", "notify", "act"] = "observe"
    """What is done about them. observe: events say what would be done; notify: they say so, and it
    is done a minute later; act: it is done at once. Who is slow, is replaced by another worker; on
    a node that is at fault nothing is started, and if that does not help, it is let go."""
    share_per_hour: float = Field(default=0.1, gt=0, le=1)
    """At most this share of the workers is taken away by that within an hour; at least one."""
    compare_every: int = Field(default=50, ge=0)
    """Of a job of several nodes: every so many steps those that keep the state of the same part of
    the model compare it, if `detect` is set; 0: never. Whoever differs from two or more that agree
    is left behind, and comes back with what they have."""

    port: int | None = Field(default=0, ge=0, le=65535)
    """Where the metrics of the job can be read, on the host of its driver. 0: any free port, which
    RUN.prometheus.json beside the run folder names; null: nowhere."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """The address to listen at; 0.0.0.0: all of that host. Whoever reaches it may read: nobody is
    asked for a password."""
    node_port: int | None = Field(default=None, ge=0, le=65535)
    """Where each node tells of its own host, links and workers: at `host`, or, where a job may have
    several, at the address at which the others reach it. 0: any free port, which
    RUN.prometheus.json names; null: nowhere."""
    ray: bool = False
    """Hand the metrics to Ray, too, for a Prometheus that scrapes Ray: it names them ray_elastic_,
    and the job in the label elastic_job."""


class JobConfig(_Section):
    """A job: one model being trained, or several in turn."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            json_schema_extra={
                "allowed": "1 to 64 letters, digits, - _ . and a letter or digit first"
            },
        ),
    ]
    """Names the run folder, the actors and the shared memory."""
    task: Annotated[
        str,
        Field(
            pattern=r"^$|^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
            json_schema_extra={"allowed": "package.module:Class"},
        ),
    ] = ""
    """The user's code as package.module:Class. Needed unless a task object is given in Python."""
    task_args: dict[str, JsonValue] = {}
    """Keyword arguments of the task."""
    init_from: str | None = Field(default=None, min_length=1)
    """Weights to begin with: a checkpoint or run folder of ours, a .safetensors file, or a
    state_dict of PyTorch (.pt, .pth, .bin, .ckpt); a path or a URI."""
    init_skip: list[str] = []
    """Names in the model or in that file, or patterns such as head.*, that are left as the task
    makes them. Everything else must fit."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Decides initial parameters, order of samples and every random number of the model."""
    models: int | list[Model] = 1
    """Several models, trained in turn by the same workers, a step of each after the other. A
    number: with `seed`, `seed` + 1 and so on; or what each has of its own. Each ends with the
    parameters that a job of its own would give it. Shared memory holds the state of all."""
    steps: int = Field(ge=1)
    """Optimizer updates in all."""
    batch: Batch
    """The global batch."""
    held_out: int = Field(default=0, ge=0)
    """Samples kept away from training."""
    split_seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Decides which samples are held out, independent of `seed`."""
    workers: Workers = Workers()
    """How many workers compute."""
    nodes: Nodes = Nodes()
    """On how many hosts the job runs."""
    replicas: int = Field(default=2, ge=1, le=MAX_NODES)
    """Hosts that keep the optimizer state of each chunk, where there are so many. If one fewer
    is lost at once nothing is lost; all hosts keep all parameters in any case."""
    stragglers: Stragglers = Stragglers()
    """What is done about slow workers; `stragglers: auto` is short for `{kind: auto}`."""
    audit: Annotated[float, Field(ge=0, le=1)] | Literal["all"] = 0.001
    """The share of micro-batches that a second worker computes, too: a worker that computes
    something else than two others is named and replaced. all: twice the work, and nothing counts
    that was not computed alike by two; steps wait where there is only one. 0: none."""
    standby: bool = True
    """Keep a warm second aggregator, on each node, that takes over when the first dies."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where workers compute. Several may share a GPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward and backward under autocast; parameters stay float32."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global norm of the gradient; null: no clipping."""
    ema: Ema | None = None
    """Average the parameters over the steps; null: do not."""
    nonfinite: Nonfinite = Nonfinite()
    """What to do about NaN and Inf."""
    evaluate: Evaluate = Evaluate()
    """When the model is evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written."""
    preemption: Preemption = Preemption()
    """How the job hears that its machine will be taken away."""
    monitoring: Monitoring = Monitoring()
    """How one hears of the running job."""
    chunk_elements: int = Field(default=262_144, ge=1024, le=2**24, multiple_of=16)
    """Parameters in one chunk, the unit of summing, updating and checksums."""

    @field_validator("init_from")
    @classmethod
    def _without_password(cls, value: str | None) -> str | None:
        if value is not None and is_uri(value):
            check_location(value)
        return value

    @model_validator(mode="after")
    def _somebody_audits(self) -> JobConfig:
        if self.audit == "all" and self.workers.max < 3:
            raise ValueError(f"audit is all, and workers.max is {self.workers.max}; must be >= 3")
        return self

    @model_validator(mode="after")
    def _fits_the_code(self) -> JobConfig:
        """A code of fewer workers would have each compute everything."""
        if not self.stragglers.is_code:
            return self
        from policies.coding.field import least_workers  # and numpy, which no other job needs yet

        what, num = f"stragglers.kind is {self.stragglers.kind}", self.stragglers.stragglers
        least = least_workers(num)
        if self.workers.max < least:
            raise ValueError(
                f"{what} with stragglers {num}, and workers.max is {self.workers.max};"
                f" must be >= {least}"
            )
        self._check_alone(what, "coded sums cannot be audited one by one")
        return self

    def _check_alone(self, what: str, why: str) -> None:
        """On one host, and not audited in full; `why` not."""
        if self.nodes.max > 1:
            raise ValueError(f"{what}, and nodes.max is {self.nodes.max}; must be 1")
        if self.audit == "all":
            raise ValueError(f"{what}, and audit is all; {why}")

    @field_validator("stragglers", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("audit", mode="before")
    @classmethod
    def _share_or_all(cls, value: Any) -> Any:
        """In words of its own: of a union pydantic would tell what each part of it expects."""
        is_share = isinstance(value, int | float) and not isinstance(value, bool)
        if value != "all" and not (is_share and 0 <= value <= 1):
            raise ValueError(f"got {value!r}; needs a number from 0 to 1, or all")
        return value

    @field_validator("models", mode="before")
    @classmethod
    def _number_or_list(cls, value: Any) -> Any:
        """In words of its own: of a union pydantic would tell what each part of it expects."""
        num = len(value) if isinstance(value, list) else value
        if not isinstance(num, int) or isinstance(num, bool) or not 1 <= num <= MAX_MODELS:
            what = f"a list of {num}" if isinstance(value, list) else repr(value)
            raise ValueError(
                f"got {what}; needs a whole number from 1 to {MAX_MODELS}, or a list of as many"
            )
        if not isinstance(value, list):
            return value
        try:
            return [
                one if isinstance(one, Model) else validate(Model, Document(one, f"[{number}]"))
                for number, one in enumerate(value)
            ]
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _several_models(self) -> JobConfig:
        num = self.num_models
        if num == 1:
            return self
        if isinstance(self.models, int) and self.seed > MAX_SEED - (num - 1):
            raise ValueError(
                f"models is {num}, and seed is {self.seed}; must be <= {MAX_SEED - (num - 1)}"
            )
        if self.nodes.max > 1:
            raise ValueError(f"models are {num}, and nodes.max is {self.nodes.max}; must be 1")
        if self.stragglers.kind not in OF_SEVERAL_MODELS:
            raise ValueError(
                f"models are {num}, and stragglers.kind is {self.stragglers.kind}; must be one of"
                f" {', '.join(OF_SEVERAL_MODELS)}"
            )
        return self

    @property
    def num_models(self) -> int:
        return self.models if isinstance(self.models, int) else len(self.models)

    def of_model(self, model: int) -> JobConfig:
        """The job that one of several models would be by itself; its checkpoints lie apart."""
        models = self.models
        own = Model(seed=self.seed + model) if isinstance(models, int) else models[model]
        storage = self.checkpoint.storage
        if storage is not None and self.num_models > 1:
            storage = below(storage, f"{MODELS}/{model}")
        return self.model_copy(
            update={
                "models": 1,
                "stragglers": Stragglers() if self.stragglers.is_sequential else self.stragglers,
                "seed": self.seed if own.seed is None else own.seed,
                "task_args": {**self.task_args, **own.task_args},
                "checkpoint": self.checkpoint.model_copy(update={"storage": storage}),
            }
        )

    @model_validator(mode="after")
    def _fits_its_rounds(self) -> JobConfig:
        if not self.stragglers.is_sequential:
            return self
        from policies.coding.sequential import check_sequential, least_models

        scheme, what = self.stragglers.scheme, f"stragglers.kind is {self.stragglers.kind}"
        assert scheme is not None, "checked by the section itself"
        least = least_models(scheme)
        if self.num_models < least:
            raise ValueError(f"{what}, and models are {self.num_models}; must be >= {least}")
        self._check_alone(what, "a round waits for no second opinion")
        try:
            check_sequential(scheme, self.workers.start, self.batch.micro_batches)
        except ValueError as error:
            raise ValueError(
                f"{what}, and workers.start is {self.workers.start}: {error}"
            ) from None
        return self

    @model_validator(mode="after")
    def _fits_what_is_dropped(self) -> JobConfig:
        if self.stragglers.is_exact:
            return self
        what, wait_for = f"stragglers.kind is {self.stragglers.kind}", self.stragglers.wait_for
        if wait_for > self.workers.max:
            raise ValueError(
                f"{what} with wait_for {wait_for}, and workers.max is {self.workers.max};"
                f" must be >= {wait_for}"
            )
        self._check_alone(what, "what is dropped cannot be audited")
        return self

    @model_validator(mode="after")
    def _skip_of_something(self) -> JobConfig:
        if self.init_skip and self.init_from is None:
            raise ValueError(f"init_skip is {self.init_skip}, and init_from is null; needs both")
        return self


def load_job(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job from a YAML (or JSON) file or a mapping, with overrides such as 'batch.x=4'.

    Raises:
        ConfigError: one line for every mistake: file and line, key, value seen, what is allowed.
    """
    return validate(JobConfig, with_overrides(read_job(source), overrides))


def read_job(source: str | Path | Mapping[str, Any]) -> Document:
    """The job as it was given, unchecked. Raises ConfigError where a file cannot be read."""
    return Document(dict(source), "job") if isinstance(source, Mapping) else read_yaml(Path(source))


def check_resume(begun: Mapping[str, Any], job: JobConfig) -> None:
    """Refuse to go on with a run under settings that would compute something else.

    Args:
        begun: the job that the checkpoint was written by, as JSON values. What an earlier version
            did not know yet it did as the defaults say.

    Raises:
        ConfigError: one line for every such setting.
    """
    now = job.model_dump(mode="json")
    then = _read_begun(begun).model_dump(mode="json")
    problems = [
        f"{key}: the run was begun with {then[key]!r}, got {now[key]!r}; that would compute"
        " something else: leave it as it was, or start a new run"
        for key in now
        if key not in FREE_AT_RESUME and then[key] != now[key]
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _read_begun(begun: Mapping[str, Any]) -> JobConfig:
    try:
        return JobConfig.model_validate_json(json.dumps(begun))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(
            f"{where}: the run was begun with a job that this version cannot read"
            f" ({error.errors()[0]['msg']}); resume it with the version that began it"
        ) from error


__all__ = [
    "FREE_AT_RESUME",
    "Batch",
    "CheckpointConfig",
    "Ema",
    "Evaluate",
    "JobConfig",
    "Model",
    "Monitoring",
    "Nodes",
    "Nonfinite",
    "Preemption",
    "Stragglers",
    "Workers",
    "check_resume",
    "load_job",
    "read_job",
]
