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


def typed(path: Path) -> list[str]:
    """What the document tells to type in a shell, in order, without comments."""
    lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in (re.split("(?:^| +)# ", one)[0].strip() for one in lines) if line]


def all_typed() -> list[str]:
    """The same of all documents but the reference, which is made from the commands themselves."""
    return sorted({one for path in DOCUMENTS if path.name != "api.md" for one in typed(path)})


def commands() -> list[str]:
    """What begins with `elastic` of all that, and of what is told in passing."""
    shown = set(all_typed())
    for path in DOCUMENTS:
        if path.name != "api.md":
            shown |= set(re.findall(r"`(elastic [a-z]+ [^`]*)`", path.read_text()))
    lines = (line.removeprefix(".venv/bin/") for line in shown)
    return sorted({re.split(" +[#>] ", line)[0] for line in lines if line.startswith("elastic ")})
