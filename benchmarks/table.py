"""Prints the newest results as a Markdown table for the README. Measures nothing.

python -m benchmarks.table [--results DIR] [--all]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record

HEADER = ("what", "must", "measured", "ok")


def render(records: Mapping[str, Mapping[str, Any]], *, everything: bool = False) -> str:
    """The table, in the order of the benchmarks' names; without limits only with `everything`."""
    lines = [_line(HEADER), _line("---" for _ in HEADER)]
    for what in sorted(records):
        for one in records[what]["figures"]:
            if everything or one["limit"] is not None:
                lines.append(_line(cells(one)))
    return "\n".join(lines) + "\n"


def cells(one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """The four cells of one figure."""
    unit = f" {one['unit']}" if one["unit"] not in ("", "x") else ""
    must = "report" if one["limit"] is None else f"<= {number(one['limit'])}{unit}"
    measured = number(one["value"]) + unit
    if one["n"] > 1:
        low, high = (number(end) for end in one["spread"])
        measured += f" ({low} to {high}, n={one['n']})"
    verdict = {None: "", True: "yes", False: "**no**"}[one["ok"]]
    return one["name"], must, measured, verdict


def number(value: float) -> str:
    """Three figures, without an exponent where it reads well without."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def sources(records: Mapping[str, Mapping[str, Any]]) -> str:
    """On what and when the figures were measured, a line per machine and commit."""
    seen: dict[str, list[str]] = {}
    for what in sorted(records):
        one = records[what]
        machine = one["hardware"]
        where = f"{machine['cpu_model']}, {machine['cores']} cores, commit {one['commit'][:12]}"
        seen.setdefault(where, []).append(what)
    return "".join(f"{where}: {', '.join(names)}\n" for where, names in seen.items())


def _line(words: Any) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def main() -> int:
    """Print the table. 1 if a figure misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--all", action="store_true", help="also figures that have no limit")
    options = parser.parse_args()
    records = record.read_newest(options.results)
    print(render(records, everything=options.all))
    print(sources(records))
    missed = [one for made in records.values() for one in made["figures"] if one["ok"] is False]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
