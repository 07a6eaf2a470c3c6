"""The settings of a served repository: one frozen tree, from defaults, a YAML file and `a.b=c`.

Only says what is allowed; starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from elastic.core.yaml_file import Document, read_yaml, validate, with_overrides
from policies.routing import policy_from


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Limits(_Section):
    """What one request may ask for; checked before anything is allocated."""

    body_bytes: int = Field(default=8 << 20, ge=1024)
    """Size of a request's body."""
    rows: int = Field(default=64, ge=1)
    """Samples, rows or prompts of one request."""
    num_steps: int = Field(default=250, ge=1)
    """Denoising steps."""
    num_tokens: int = Field(default=1024, ge=1)
    """Tokens that a completion may have."""
    magnitude: float = Field(default=1e6, gt=0)
    """Largest absolute value in an input or in noise: an expert that overflows on it would count
    as lost for everybody."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A request may wait so long; it may ask for less."""


class Batching(_Section):
    """How rows of different requests share a call of an expert."""

    max_rows: int = Field(default=32, ge=1)
    """Most rows of one call."""
    max_queue_rows: int = Field(default=512, ge=1)
    """Rows that are waiting or in work; more are refused with 429."""
    fixed: bool = False
    """Pad every call to max_rows: the same bits whatever batch a request shares, at more cost."""


class Failing(_Section):
    """When an expert counts as lost, and when it is tried again."""

    expert_timeout_s: float = Field(default=2.0, gt=0)
    """A call of an expert may take so long."""
    failures: int = Field(default=3, ge=1)
    """So many in a row, and the expert is left out."""
    cool_down_s: float = Field(default=1.0, gt=0)
    """It is tried again after so long, then after twice as long, and so on."""
    max_cool_down_s: float = Field(default=30.0, gt=0)
    """But at least so often."""


class Placement(_Section):
    """Which processes hold the experts."""

    mode: Literal["auto", "colocated", "distributed"] = "auto"
    """All experts in each replica, or each expert an application of its own; auto: as measured."""
    replicas: int = Field(default=1, ge=1)
    """Replicas that take requests."""
    max_replicas: int = Field(default=1, ge=1)
    """Autoscaling adds up to so many of them; at most `replicas` turns it off."""
    expert_replicas: int = Field(default=1, ge=1)
    """Distributed: replicas of each expert."""
    max_expert_replicas: int = Field(default=1, ge=1)
    """Distributed: autoscaling adds up to so many of each expert."""
    num_cpus: float = Field(default=0.2, ge=0)
    """Of each replica, as Ray counts; little, so that they fit beside training jobs."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Of each replica that holds experts."""
    threads: int = Field(default=1, ge=1)
    """Threads of torch in each replica."""


class Key(_Section):
    """An API key: `elastic serve --new-key NAME` prints one with its hash."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    """Who uses it; appears in logs."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The key itself is stored nowhere."""
    rate_per_s: float = Field(default=50.0, gt=0)
    """Requests in the long run, over all `placement.replicas`; each lets its share of them pass."""
    burst: int = Field(default=100, ge=1)
    """Requests at once."""
    is_admin: bool = False
    """May load and unload experts."""


class Canary(_Section):
    """How a new version takes over."""

    percent: float = Field(default=100.0, gt=0, le=100)
    """Share of the requests that a new version answers at first; 100: all, at once."""
    min_requests: int = Field(default=50, ge=1)
    """Requests that it must have answered before it is judged."""
    max_failed: float = Field(default=0.02, ge=0, le=1)
    """It is rolled back when a larger share, beyond that of the old version, fails or degrades."""
    max_slowdown: float = Field(default=2.0, ge=1)
    """It is rolled back when its median latency is more than so many times the old one's."""


class Serving(_Section):
    """A repository of experts and how it is served."""

    repository: Path
    """Folder with repository.json."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on."""
    selection: dict[str, Any] | None = None
    """A policy of policies/routing.py instead of the repository's own."""
    poll_s: float = Field(default=1.0, gt=0)
    """How often the repository's folder is looked at for new versions."""
    limits: Limits = Limits()
    batching: Batching = Batching()
    failing: Failing = Failing()
    placement: Placement = Placement()
    canary: Canary = Canary()
    keys: tuple[Key, ...] = ()
    """Empty: everybody may ask, and administer; so listen on loopback only then."""

    @field_validator("keys")
    @classmethod
    def _are_told_apart(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        names = [one.name for one in keys]
        if twice := sorted({one for one in names if names.count(one) > 1}):
            raise ValueError(f"the name {twice[0]} is there twice; each key has a rate of its own")
        return keys

    @field_validator("selection")
    @classmethod
    def _is_policy(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        if section is not None:
            policy_from(section)
        return section


def load_serving(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Serving:
    """Settings from a YAML file, a repository's folder, or a mapping, with `a.b=c` on top.

    Raises:
        ConfigError: one line for every mistake.
    """
    if isinstance(source, Mapping):
        document = Document(dict(source), "settings")
    elif Path(source).suffix in (".yaml", ".yml", ".json"):
        document = read_yaml(Path(source))
    else:
        document = Document({"repository": str(source)}, "settings")
    return validate(Serving, with_overrides(document, overrides))
