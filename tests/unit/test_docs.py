"""What the documents show works: Python runs, job and fault files are read, links lead on."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from elastic.cli import app
from elastic.core.config import load_job
from elastic.core.faults import load_faults
from tests.conftest import Node
from tests.documents import DOCUMENTS, ROOT, blocks, commands, links, name_of

GUIDE = ROOT / "docs" / "guide.md"
MIGRATIONS = [ROOT / "docs" / "from-ray-train.md", ROOT / "docs" / "from-torchft.md"]
ALL = [path for path in DOCUMENTS if path.name != "api.md"]

each_document = pytest.mark.parametrize("path", ALL, ids=name_of)


@each_document
def test_python_compiles(path: Path) -> None:
    for text in blocks(path, "python") + blocks(path, "py"):
        compile(text, name_of(path), "exec")


@each_document
def test_job_and_fault_files_are_valid(path: Path, tmp_path: Path) -> None:
    for text in blocks(path, "yaml"):
        if text.startswith("- "):
            (tmp_path / "faults.yaml").write_text(text)
            assert load_faults(tmp_path / "faults.yaml")
        else:
            load_job(yaml.safe_load(text))


@pytest.mark.parametrize("line", commands())
def test_the_command_line_takes_it(line: str) -> None:
    """Commands, arguments and options exist; `test_command_line` runs them."""
    command, context = typer.main.get_command(app), None
    name, *arguments = shlex.split(line)
    while isinstance(command, TyperGroup):
        context = command.make_context(name, arguments, parent=context, resilient_parsing=True)
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert [one for one in links(path) if not (path.parent / one).exists()] == []


def test_every_document_is_listed() -> None:
    listed = set(links(ROOT / "docs" / "README.md"))
    assert listed >= {path.name for path in (ROOT / "docs").glob("*.md")} - {
        "README.md",
        "index.md",
    }
    assert "docs/README.md" in links(ROOT / "README.md")
    decisions = ROOT / "docs" / "decisions"
    assert set(links(decisions / "README.md")) == {path.name for path in decisions.glob("0*.md")}


@pytest.mark.timeout(180)  # Sphinx has much to read
def test_the_site_is_made_and_every_link_in_it_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "-b", "html"]
    subprocess.run([*command, str(ROOT / "docs"), str(tmp_path)], check=True, timeout=170)
    front = (tmp_path / "index.html").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f'href="{path.stem}.html"' in front or path.stem in ("index", "README")


def tasks_of(*texts: str) -> dict[str, type]:
    """The tasks that blocks of Python define, run one after the other in one module."""
    module: dict[str, Any] = {"__name__": "shown"}
    for text in texts:
        exec(compile(text, "shown", "exec"), module)
    return {
        name: one for name, one in module.items() if isinstance(one, type) and hasattr(one, "model")
    }


@pytest.mark.parametrize("path", MIGRATIONS, ids=name_of)
def test_our_side_of_a_migration_computes(path: Path, make_node: Callable[..., Node]) -> None:
    before, after = blocks(path, "python")
    (task,) = tasks_of(after).values()
    (model,) = re.findall(r"nn\.Sequential\(.*\)", after)
    assert model in before, "both sides are one program"
    train_a_step(make_node(task()))


def test_the_guide_computes(make_node: Callable[..., Node]) -> None:
    """Its blocks build upon each other; every task in them is prepared, evaluated and trained."""
    tasks = tasks_of(*blocks(GUIDE, "python"))
    assert len(tasks) >= 4
    for task in tasks.values():
        node = make_node(task(), held_out=50, evaluate={"every": 1, "micro_batches": 2})
        train_a_step(node)


def train_a_step(node: Node) -> None:
    """What workers and the aggregator do for one step, in this process."""
    before = node.parameters(0)
    computer = node.worker()
    node.measure(computer)
    outcomes = [node.accumulate(computer, 0, one) for one in range(node.job.batch.micro_batches)]
    weight = sum(outcome.weight for outcome in outcomes)
    node.updater().run(node.plan(weight=weight), lambda _: None)
    after = node.parameters(1)
    assert any(not before[name].equal(after[name]) for name in before)
