"""What the README shows works: its blocks are read, its links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from elastic.core.config import load_job

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_quick_start_comes_early() -> None:
    lines = README.splitlines()
    assert next(n for n, line in enumerate(lines, 1) if "scripts/quickstart" in line) <= 25


def test_the_job_file_is_valid() -> None:
    (text,) = blocks("yaml")
    assert load_job(yaml.safe_load(text)).steps == 200


def test_the_python_block_compiles() -> None:
    (text,) = blocks("python")
    compile(text, "README", "exec")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_the_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"-m (benchmarks\.\w+)", README))))
def test_the_benchmarks_exist(name: str) -> None:
    assert (ROOT / f"{name.replace('.', '/')}.py").exists()


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"RESULTS_TABLE|TODO", README)
