"""A status is plain data that crosses processes."""

from __future__ import annotations

import dataclasses
import pickle
from typing import get_args

import pytest

from elastic.core.status import PhaseName, Status


def test_only_three_things_are_required() -> None:
    status = Status(phase="starting", num_steps=10, run_dir="runs/x")
    assert (status.step, status.loss, status.events) == (0, None, ())
    with pytest.raises(TypeError, match="num_steps"):
        Status(phase="starting", run_dir="runs/x")  # type: ignore[call-arg]


def test_a_status_is_frozen_and_survives_pickling() -> None:
    status = Status(
        phase="training", num_steps=3, run_dir="r", step=2, loss=0.5, events=({"kind": "fault"},)
    )
    assert pickle.loads(pickle.dumps(status)) == status
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.step = 3  # type: ignore[misc]


def test_phases() -> None:
    assert get_args(PhaseName) == ("starting", "training", "finishing", "done", "failed")
