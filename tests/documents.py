"""The documents as tests read them: their blocks, links and commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(path: Path) -> str:
    """For the ids of tests."""
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order. Python that starts a job is marked `py`."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    """Where the document leads to within the repository."""
    return sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())))


def commands() -> list[str]:
    """What the documents tell to type in a shell, and in passing, that begins with `elastic`."""
    shown = set()
    for path in DOCUMENTS:
        if path.name != "api.md":  # made from the commands themselves
            lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
            inline = re.findall(r"`(elastic [a-z]+ [^`]*)`", path.read_text())
            shown |= {line.removeprefix(".venv/bin/") for line in (*lines, *inline)}
    return sorted({re.split(" +[#>] ", line)[0] for line in shown if line.startswith("elastic ")})
