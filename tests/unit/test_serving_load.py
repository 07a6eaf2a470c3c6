"""What the benchmark of serving under faults takes for a right answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from serve.version import identity_of
from tests.served import make_repository, trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve 2.60 declares settings as pydantic 1 did
    from benchmarks.serving_load import Answer, Judge


def bare(*values: float) -> Callable[[int, frozenset[str]], torch.Tensor]:
    """The sum of its experts' values, times the seed."""
    return lambda seed, experts: torch.tensor(
        [seed * sum(value for k, value in enumerate(values) if f"expert-{k}" in experts)]
    )


def test_an_answer_is_held_against_the_experts_and_the_version_that_it_names(
    tmp_path: Path,
) -> None:
    repository = make_repository(tmp_path / "tiny")
    judge = Judge([bare(1.0, 2.0, 4.0), bare(8.0, 2.0, 4.0)])
    judge.learn(tmp_path / "tiny", 0)
    first = identity_of(repository.manifest)
    second = repository.replace_expert("expert-0", trained("flow", 50).weights)
    judge.learn(tmp_path / "tiny", 1)

    def is_right(value: float, version: str, lost: str = "", changed: str = "") -> bool:
        experts = ",".join(one for one in repository.names if one != lost)
        headers = {"x-elastic-version": version, "x-elastic-experts": experts}
        headers["x-elastic-lost"] = lost or changed
        return judge.is_right(Answer(3, 200, 0.1, headers, np.array([value])))

    assert is_right(21.0, first)
    assert not is_right(21.1, first)
    assert is_right(42.0, identity_of(second.manifest))
    assert not is_right(21.0, identity_of(second.manifest))
    assert not is_right(21.0, "unknown")
    assert is_right(18.0, first, lost="expert-0")
    assert not is_right(21.0, first, lost="expert-0")
    assert is_right(20.0, first, changed="expert-0")
    assert not is_right(np.nan, first, changed="expert-0")


@pytest.mark.parametrize(
    ("status", "headers", "is_allowed"),
    [
        (200, {}, True),
        (503, {"retry-after": "1"}, True),
        (503, {}, False),
        (500, {"retry-after": "1"}, False),
        (0, {}, False),
    ],
)
def test_what_a_client_may_be_told(status: int, headers: dict[str, str], is_allowed: bool) -> None:
    assert Answer(0, status, 0.1, headers).is_allowed == is_allowed
