"""Tasks where users write them: in a script, typed into an interpreter, in the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support import TAG

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]

SCRIPT = f"""
import sys
from pathlib import Path
import torch
from torch import nn
from ray.train import RunConfig
from elastic import ElasticTrainer
from beside import WIDTH
from examples.digits.task import Digits  # a task that another module holds

FACTOR = 2.0

class Squares:
    def __len__(self):
        return len(self.values)
    def __init__(self, path):
        self.values = torch.tensor([float(word) for word in Path(path).read_text().split()])
    def fetch(self, indices):
        return self.values[torch.from_numpy(indices)][:, None]

class Parabola:
    def model(self):
        return nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    def dataset(self):
        return Squares("numbers.txt")  # relative to where the user is
    def loss(self, model, x):
        import in_work
        return in_work.HALF * FACTOR * (model(x) - x**2).square().sum(), len(x)
    def optimizer(self, named):
        return torch.optim.Adam([parameter for _, parameter in named], lr=0.03)

result = ElasticTrainer(
    Parabola(),
    name="typed{TAG}",
    steps=8,
    batch={{"micro_batches": 4, "micro_batch_size": 8}},
    workers={{"start": 1, "spare": 0}},
    standby=False,
    run_config=RunConfig(storage_path=sys.argv[1]),
).fit()
print(result.params_sha256)
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The user's folder, with data and a module; the script lies in another with its own."""
    work, scripts = tmp_path / "work", tmp_path / "scripts"
    work.mkdir()
    scripts.mkdir()
    (work / "numbers.txt").write_text(" ".join(str(number / 64) for number in range(64)))
    (work / "in_work.py").write_text("HALF = 0.5\n")
    (scripts / "beside.py").write_text("WIDTH = 16\n")
    (scripts / "train.py").write_text(SCRIPT)
    return work


@pytest.fixture
def python(cluster: str, work: Path) -> Callable[..., str]:
    """Runs Python in the user's folder, on the cluster of the tests; returns its last line."""

    def run(*arguments: str, typed: str | None = None, path: str = "") -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            input=typed,
            cwd=work,
            env={**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": f"{ROOT}:{path}"},
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    return run


def test_a_script_and_an_interpreter_give_the_same(
    python: Callable[..., str], work: Path, tmp_path: Path
) -> None:
    """The script lies elsewhere and uses what is beside it; an interpreter has no file at all."""
    script = python("../scripts/train.py", str(tmp_path / "one"))
    typed = python("-", str(tmp_path / "two"), typed=SCRIPT, path=str(tmp_path / "scripts"))
    assert re.fullmatch("[0-9a-f]{64}", script)
    assert script == typed


def test_the_readme_runs_unchanged(python: Callable[..., str], work: Path) -> None:
    """Typed into an empty file; run again, it finds its run by name."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (work / "first.py").write_text(block)
    first = python("first.py")
    assert re.search("[0-9a-f]{64}", first)
    assert python("first.py") == first
    (run,) = work.glob("runs/*/result.json")
    assert run.parent.name == "first"
