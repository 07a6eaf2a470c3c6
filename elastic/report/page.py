"""The page of a run: one HTML file with everything in it, which asks no network for anything.

Its looks and its behaviour are in `page_files/`; this module only puts them and the data together.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from elastic.core.runs import RunFolder
from elastic.report.page_data import page_data
from elastic.report.story import read_story

SCRIPTS = ("data", "view", "chart", "timeline", "heat", "overview", "diagnosis", "tables", "main")
"""In the order in which they need one another."""


def write_page(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of the run in `run_dir`, by default `run_dir`/report.html; return its path.

    Raises:
        ConfigError: it is no run folder, or no step has been committed yet.
    """
    folder = RunFolder(run_dir)
    data = page_data(read_story(run_dir), is_running=folder.is_running())
    path = Path(output) if output is not None else folder.report_html
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(data), encoding="utf-8")
    return path


def render(data: Mapping[str, Any]) -> str:
    """The whole page as text."""
    source = files("elastic.report") / "page_files"
    scripts = [(source / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    parts = {
        "name": html.escape(str(data["name"])),
        "style": (source / "page.css").read_text(encoding="utf-8"),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "script": "\n".join(scripts),
    }
    template = (source / "page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template)
