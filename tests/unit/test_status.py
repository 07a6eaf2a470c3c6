"""A status is plain data that crosses processes."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import get_args

import pytest

from elastic.core.runs import RunFolder
from elastic.core.status import MAX_AGE_S, PhaseName, Status, read_status, write_status


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


def test_a_status_is_read_from_the_run_folder_while_it_is_fresh(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_status(run) is None
    status = Status(phase="training", num_steps=3, run_dir="r", events=({"kind": "fault"},))
    write_status(run, status)
    assert read_status(run) == status
    made_s = run.status_json.stat().st_mtime
    os.utime(run.status_json, (made_s, made_s - MAX_AGE_S))
    assert read_status(run) is None
