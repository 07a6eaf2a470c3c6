"""The commands that the documents show, typed as they stand there, one after the other."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from elastic.core.runs import RunFolder
from tests.documents import ROOT, blocks, typed
from tests.integration.heads import free_ports
from tests.integration.support import wait_until
from tests.typing_in import Checkout, make_checkout

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

_DOCS = ROOT / "docs"
_FEW_STEPS = "expert.steps=8 router.steps=8"
_FEW_SAMPLES = "evaluation.num_samples=60 evaluation.num_steps=3"


@pytest.fixture
def checkout(cluster: str, tmp_path: Path) -> Checkout:
    """On the cluster of the tests."""
    return make_checkout(tmp_path / "checkout", RAY_ADDRESS=cluster)


class Commands:
    """Those of one document; each is to be typed."""

    def __init__(self, path: Path) -> None:
        self.left = typed(path)

    def take(self, start: str) -> str:
        """The first command that begins so."""
        command = next(one for one in self.left if one.startswith(start))
        self.left.remove(command)
        return command


@contextmanager
def training(checkout: Checkout, command: str, name: str, num_steps: int) -> Iterator[RunFolder]:
    """A job, once so many more steps are done; it ends by what is done in the block."""
    runs = checkout.folder / "runs"
    before = _num_steps(runs, name)
    with checkout.started(command) as process:

        def trains() -> list[RunFolder]:
            assert process.poll() is None, checkout.log.read_text()
            now = _num_steps(runs, name).items()
            return [RunFolder(run) for run, num in now if num >= before.get(run, 0) + num_steps]

        (run,) = wait_until(trains, f"{command}: steps are done", timeout_s=120)
        yield run
        assert process.wait(timeout=90) == 0, checkout.log.read_text()


def _num_steps(runs: Path, name: str) -> dict[Path, int]:
    """Of each run of a job, a new one or one that goes on."""
    found = runs.glob(f"{name}-*/metrics.jsonl")
    return {file.parent: len(file.read_text().splitlines()) for file in found}


def test_the_readme(checkout: Checkout) -> None:
    """From `train` to `diagnose`; what follows there has tests of its own."""
    told = Commands(ROOT / "README.md")
    stop = told.take("elastic stop")
    with training(checkout, told.take("elastic train"), "stdlib-lm", 3) as run:
        assert " of 500" in checkout.run(told.take("elastic status"))
        assert "4 → 2 workers" in checkout.run(told.take("elastic scale"))
        assert "elastic resume" in checkout.run(stop)
    stopped = run.read_json(run.result_json)
    assert stopped["outcome"] == "stopped"
    with training(checkout, told.take("elastic resume"), "stdlib-lm", 3):
        checkout.run(stop)
    resumed = run.read_json(run.result_json)
    assert resumed["steps"] > stopped["steps"]
    checkout.run(told.take("elastic report"))
    assert (run.path / "report.html").stat().st_size > 50_000
    assert "productive" in checkout.run(told.take("elastic top"))
    assert "goodput" in checkout.run(told.take("elastic diagnose"))
    with training(checkout, told.take("elastic train"), "stdlib-lm", 22) as run:
        wait_until(lambda: "worker_lost" in _kinds(run), "the killed worker is missed")
        checkout.run(stop)


def _kinds(run: RunFolder) -> list[str]:
    return [one["kind"] for one in run.read_events()]


def test_the_guide(checkout: Checkout) -> None:
    """Its job file and its faults, as a job of the name that it speaks of."""
    told, path = Commands(_DOCS / "guide.md"), _DOCS / "guide.md"
    (faults,) = (one for one in blocks(path, "yaml") if one.startswith("- {do: kill"))
    job = next(one for one in blocks(path, "yaml") if one.startswith("name: stdlib-lm\n"))
    (checkout.folder / "job.yaml").write_text(job.replace("stdlib-lm\n", "digits\n", 1))
    (checkout.folder / "faults.yaml").write_text(faults)
    stop = told.take("elastic stop")
    with training(checkout, told.take("elastic train"), "digits", 1):
        assert " of 500" in checkout.run(told.take("elastic status"))
        assert "2 → 6 workers" in checkout.run(told.take("elastic scale"))
        checkout.run(stop)
    with training(checkout, told.take("elastic train"), "digits", 10) as run:
        wait_until(lambda: len(_faults(run)) == 2, "both faults happen")
        checkout.run(stop)
    assert told.left == []


def _faults(run: RunFolder) -> list[str]:
    return [one["reason"] for one in run.read_events() if one["kind"] == "fault"]


@pytest.mark.timeout(600)
def test_the_experts(checkout: Checkout) -> None:
    """From a data set to answers, with a few steps for each expert."""
    told = Commands(_DOCS / "experts.md")
    checkout.run(told.take("python -m examples.digits_experts.data"))
    for command in ("partition", "train", "router", "evaluate", "pack"):
        shown = told.take(f"elastic experts {command}")
        checkout.run(f"{shown} {_FEW_STEPS} {_FEW_SAMPLES}", timeout_s=300)
    serve = told.take("elastic serve")
    assert told.left == []
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    alone = "env RAY_ADDRESS=local RAY_AUTH_MODE=disabled"
    with checkout.started(f"{alone} {serve} port={port}") as serving:

        def answers() -> bool:
            assert serving.poll() is None, checkout.log.read_text()
            return f"answers at {url}" in checkout.log.read_text()

        wait_until(answers, "it answers", timeout_s=150)
        body = {"prompt": "", "n": 1, "seed": 1}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        serving.send_signal(signal.SIGINT)
        assert serving.wait(timeout=60) == 0, checkout.log.read_text()


def test_the_quick_start(checkout: Checkout) -> None:
    """What `scripts/quickstart` runs once it has installed: all of it, with fewer steps."""
    script = (ROOT / "scripts" / "quickstart").read_text()
    (command,) = (line for line in script.splitlines() if "examples.quickstart" in line)
    command = command.removeprefix("exec ").replace('"$@"', "--steps 55")
    assert "equal, bit for bit" in checkout.run(command, timeout_s=240)
