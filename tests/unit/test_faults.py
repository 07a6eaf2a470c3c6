"""Fault files: what is accepted, and every mistake named."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from elastic.core.errors import ConfigError
from elastic.core.faults import (
    AGGREGATOR_POINTS,
    WORKER_POINTS,
    Action,
    Fault,
    load_faults,
    read_trace,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    """A folder with traces, good and bad."""
    np.savez(tmp_path / "good.npz", dur=np.ones((3, 4)))
    np.savez(tmp_path / "flat.npz", dur=np.ones(3))
    np.savez(tmp_path / "other.npz", times=np.ones((3, 4)))
    np.savez(tmp_path / "negative.npz", dur=-np.ones((3, 4)))
    np.savez(tmp_path / "objects.npz", dur=np.array([[None]]))
    (tmp_path / "text.npz").write_text("hello")
    return tmp_path


def load(folder: Path, text: str, num_steps: int | None = None) -> tuple[Fault, ...]:
    """Load a fault file that holds `text`."""
    path = folder / "faults.yaml"
    path.write_text(text)
    return load_faults(path, num_steps=num_steps)


WRONG = {
    "no list": ("do: kill", "needs a list of faults"),
    "no fault": ("- 7", ":1: [0]: got 7; needs keys: do, at, target"),
    "no do": ("- {at: {step: 1}}", "[0].do: missing; needs kill, stop, resume"),
    "do": ("- {do: slwo, at: {step: 1}}", "[0].do: got 'slwo'; needs kill, stop, resume"),
    "unknown": ("- {do: add_worker, at: {step: 1}, taget: 3}", "unknown key; did you mean target?"),
    "no at": ("- {do: add_worker}", "[0].at: missing; add_worker needs at: {step: N}"),
    "at a number": ("- {do: add_worker, at: 3}", "[0].at: got 3; needs keys: step, point"),
    "no step": ("- {do: add_worker, at: {point: step_start}}", "[0].at.step: missing"),
    "step": ("- {do: add_worker, at: {step: -1}}", "[0].at.step: got -1; needs a whole number, at"),
    "step too late": ("- {do: add_worker, at: {step: 9}}", "got 9; the job has steps 0 to 8"),
    "point": ("- {do: add_worker, at: {step: 1, point: x}}", "got 'x'; needs step_start, before"),
    "worker point": (
        "- {do: add_worker, at: {step: 1, point: after_encode}}",
        "got after_encode; add_worker happens in the aggregator, at step_start",
    ),
    "resume in worker": (
        "- {do: resume, at: {step: 1, point: before_compute}, target: worker-1}",
        "resume happens in the aggregator",
    ),
    "nan with a point": (
        "- {do: nan_gradient, at: {step: 1, point: after_grant}, target: worker-1}",
        "nan_gradient happens while computing; leave it out",
    ),
    "no target": ("- {do: kill, at: {step: 1}}", "[0].target: missing; kill needs target: worker"),
    "target": ("- {do: kill, at: {step: 1}, target: w1}", "got 'w1'; needs worker-0, worker-1"),
    "target a number": ("- {do: kill, at: {step: 1}, target: 1}", "[0].target: got 1; needs work"),
    "target of nobody": (
        "- {do: kill_aggregator, at: {step: 1}, target: worker-1}",
        "got worker-1; kill_aggregator has no target",
    ),
    "nan of any": (
        "- {do: nan_gradient, at: {step: 1}, target: any}",
        "got any; only for kill, stop, and slow with sleep_s",
    ),
    "slow any": (
        "- {do: slow, at: {step: 1}, target: any, factor: 2}",
        "got any; only for kill, stop, and slow with sleep_s",
    ),
    "kill for": (
        "- {do: kill, at: {step: 1}, target: worker-1, for_s: 3}",
        "[0].for_s: only for do: stop, slow, stop_aggregator; here do is kill",
    ),
    "for": (
        "- {do: stop, at: {step: 1}, target: worker-1, for_s: 0}",
        "[0].for_s: got 0; needs a number above 0, or null",
    ),
    "slow how": (
        "- {do: slow, at: {step: 1}, target: worker-1}",
        "slow needs either factor or sleep_s",
    ),
    "slow twice": (
        "- {do: slow, at: {step: 1}, target: worker-1, factor: 2, sleep_s: 1}",
        "slow needs either factor or sleep_s",
    ),
    "faster": (
        "- {do: slow, at: {step: 1}, target: worker-1, factor: 0.5}",
        "[0].factor: got 0.5; needs a number, at least 1, or null",
    ),
    "probability": (
        "- {do: slow, at: {step: 1}, target: worker-1, sleep_s: 1, probability: 20}",
        "[0].probability: got 20; needs a number above 0, at most 1, or null",
    ),
    "probability of factor": (
        "- {do: slow, at: {step: 1}, target: worker-1, factor: 2, probability: .2}",
        "[0].probability: needs sleep_s",
    ),
    "delays without trace": ("- {do: delays}", "delays needs trace: FILE.npz"),
    "delays at": ("- {do: delays, at: {step: 1}, trace: good.npz}", "delays act in every step"),
    "no trace": ("- {do: delays, trace: nothing.npz}", "nothing.npz: no such file"),
    "no array": ("- {do: delays, trace: other.npz}", "has no array 'dur', only ['times']"),
    "flat": ("- {do: delays, trace: flat.npz}", "has shape (3,); needs (rounds, columns)"),
    "negative": ("- {do: delays, trace: negative.npz}", "negative or non-finite seconds"),
    "objects": ("- {do: delays, trace: objects.npz}", "is no readable .npz file"),
    "text": ("- {do: delays, trace: text.npz}", "is no readable .npz file"),
    "scale": ("- {do: delays, trace: good.npz, scale: 0}", "[0].scale: got 0; needs a number abov"),
    "duplicate": ("- {do: delays, do: delays}", ":1: [0].do: set twice"),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_fault_file_is_refused_in_words(folder: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(folder, text, num_steps=9)
    assert expected in str(error.value)
    assert str(folder / "faults.yaml") in str(error.value)


def test_all_mistakes_come_at_once(folder: Path) -> None:
    text = "\n".join(line for line, _ in list(WRONG.values())[1:9])
    with pytest.raises(ConfigError) as error:
        load(folder, text)
    found = {line.split(": ")[1][:3] for line in str(error.value).splitlines()}
    assert found == {f"[{index}]" for index in range(8)}


def test_faults_are_read_with_their_defaults(folder: Path) -> None:
    kill, stop, slow, any_slow, delays, remove, kill_any = load(
        folder,
        """
- {do: kill, at: {step: 5, point: after_grant}, target: worker-1}
- {do: stop, at: {step: 6}, target: worker-12, for_s: 30}
- {do: slow, at: {step: 0}, target: worker-0, factor: 2}
- {do: slow, at: {step: 0}, target: any, sleep_s: 0.3, probability: 0.2}
- {do: delays, trace: good.npz, scale: 0.5}
- {do: remove_worker, at: {step: 8}}
- {do: kill, at: {step: 9, point: after_encode}, target: any}
""",
    )
    assert kill == Fault(index=0, do="kill", step=5, point="after_grant", target=1)
    assert (stop.index, stop.point, stop.target, stop.for_s) == (1, "step_start", 12, 30)
    assert (slow.factor, slow.probability, slow.sleep_s) == (2, 1.0, None)
    assert (any_slow.target, any_slow.probability) == ("any", 0.2)
    assert (delays.step, delays.trace, delays.scale) == (0, folder / "good.npz", 0.5)
    assert (remove.target, remove.happens_in_worker) == (None, False)
    assert str(kill) == "kill worker-1 at after_grant"
    assert str(kill_any) == "kill any worker at after_encode"
    assert str(any_slow) == "slow a random worker by 0.3 s a step in 20% of steps"


@pytest.mark.parametrize("point", [*AGGREGATOR_POINTS, *WORKER_POINTS])
def test_a_worker_may_be_killed_at_every_point(folder: Path, point: str) -> None:
    (fault,) = load(folder, f"- {{do: kill, at: {{step: 1, point: {point}}}, target: worker-0}}")
    assert fault.happens_in_worker == (point in WORKER_POINTS)


def test_every_action_can_be_written(folder: Path) -> None:
    more = {"slow": "factor: 2, ", "delays": "trace: good.npz, "}
    targets = ("kill", "stop", "resume", "slow", "nan_gradient", "flip_bit")
    for action in get_args(Action):
        at = "" if action == "delays" else "at: {step: 1}, "
        target = "target: worker-1, " if action in targets else ""
        (fault,) = load(folder, f"- {{do: {action}, {at}{target}{more.get(action, '')}}}")
        assert fault.do == action


def test_an_empty_file_means_no_faults(folder: Path) -> None:
    assert load(folder, "") == ()


def test_a_trace_is_read_in_seconds(folder: Path) -> None:
    assert read_trace(folder / "good.npz").shape == (3, 4)
