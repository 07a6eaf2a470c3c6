"""Writes docs/api.md from docstrings: public names, keys of the job file, commands, errors.

`python -m scripts.api_docs`; a test says when it must be run again. Never invents a word: what
reads badly in docs/api.md is mended in the docstring.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

import elastic
from elastic.cli import app
from elastic.core import errors, faults
from elastic.core.config import JobConfig

API_MD = Path(__file__).parents[1] / "docs" / "api.md"
COMMAND = "python -m scripts.api_docs"

_MAX_LINE = 96
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")
_ENTRY = re.compile(r"([*\w.]+): (.*)")

_HEAD = f"""# API

Written by `{COMMAND}` from the docstrings; edit those. For how the parts go together see
[guide.md](guide.md).
"""


def render() -> str:
    """The whole of docs/api.md."""
    parts = (_HEAD, *_names(), *_job_file(), *_fault_file(), *_commands(), *_errors())
    return "\n".join(parts).rstrip("\n") + "\n"


# --- public names ----------------------------------------------------------------------------


def _names() -> Iterator[str]:
    yield "## Python\n"
    yield "All are imported from `elastic`: " + ", ".join(
        f"[`{name}`](#{name.lower()})" for name in elastic.__all__
    )
    for name in elastic.__all__:
        yield f"\n### {name}\n"
        public = getattr(elastic, name)
        yield from _class(public) if inspect.isclass(public) else _function(name, public)


def _class(public: type) -> Iterator[str]:
    yield from _function(public.__name__, public)
    for name, member in public.__dict__.items():
        if name.startswith("_") and name != "__len__":
            continue
        if inspect.isfunction(member) and member.__doc__:
            yield f"\n#### `{public.__name__}.{name}`\n"
            yield from _function(name, member)


def _function(name: str, public: Callable[..., Any]) -> Iterator[str]:
    is_called = not (is_dataclass(public) or getattr(public, "_is_protocol", False))
    if is_called:  # the others are given to the user, or implemented by them
        yield f"```python\n{_signature(name, public)}\n```\n"
    yield markdown(inspect.getdoc(public) or "")


def _signature(name: str, public: Callable[..., Any]) -> str:
    """As it is called, without `self`; a line for each parameter where one would be too long."""
    signature = inspect.signature(public)
    words: list[str] = []
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        if one.name != "self":
            words.append(_parameter(one))
    returns = signature.return_annotation
    arrow = "" if inspect.isclass(public) or returns is signature.empty else f" -> {returns}"
    whole = f"{name}({', '.join(words)}){arrow}"
    if len(whole) <= _MAX_LINE:
        return whole
    return "\n".join([f"{name}(", *(f"    {one}," for one in words), f"){arrow}"])


def _parameter(one: inspect.Parameter) -> str:
    text = "**" * (one.kind is one.VAR_KEYWORD) + one.name
    if one.annotation is not one.empty:
        text += f": {inspect.formatannotation(one.annotation)}".replace("'", "")
    return text if one.default is one.empty else f"{text} = {one.default!r}"


def markdown(docstring: str) -> str:
    """A docstring as Markdown: its sections as lists, everything else as it is."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if match := _SECTION.fullmatch(line):
            section = match[1]
            lines.append(f"**{section}**\n")
        elif not line.startswith(" "):
            section = "" if line else section
            lines.append(line)
        elif not section:
            lines.append(line)
        elif section == "Returns":
            lines.append(line.strip())
        elif match := _ENTRY.fullmatch(line.removeprefix("    ")):
            lines.append(f"- `{match[1]}`: {match[2]}")
        else:
            lines.append(f"  {line.strip()}")
    return "\n".join(lines)


# --- the job file ----------------------------------------------------------------------------


def _job_file() -> Iterator[str]:
    yield "\n## The job file\n"
    yield "On the command line: `elastic train job.yaml batch.micro_batches=8`.\n"
    yield "| key | what may stand there | default | what it is |\n|---|---|---|---|"
    schema = JobConfig.model_json_schema()
    yield from _keys("", schema, schema["$defs"])


def _keys(prefix: str, section: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    for name, given in section["properties"].items():
        inner = _section_of(given, known)
        default = "needed" if name in section.get("required", ()) else ""
        if given.get("default") is not None and not inner:
            default = _code(json.dumps(given["default"]))
        elif given.get("default", 0) is None:
            default = _code("null")
        kind = ("keys, or `null`" if "anyOf" in given else "keys") if inner else allowed(given)
        yield _row(_code(prefix + name), kind, default, given.get("description", ""))
        if inner:
            yield from _keys(f"{prefix}{name}.", inner, known)


def _section_of(given: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The section that a key holds; {} if it holds a plain value."""
    for one in (given, *given.get("anyOf", ())):
        section: dict[str, Any] = known.get(one.get("$ref", "").rpartition("/")[2], {})
        if "properties" in section:
            return section
    return {}


_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "array": "list",
    "object": "mapping",
    "null": "`null`",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def allowed(given: dict[str, Any]) -> str:
    """What may stand at a key, from its JSON schema."""
    if "allowed" in given:
        return str(given["allowed"])
    if "anyOf" in given:
        return ", or ".join(allowed(one) for one in given["anyOf"])
    if "enum" in given or "const" in given:
        return ", ".join(_code(str(one)) for one in given.get("enum", [given.get("const")]))
    bounds = [f"{sign} {given[name]}" for name, sign in _BOUNDS.items() if name in given]
    if "multipleOf" in given:
        bounds.append(f"a multiple of {given['multipleOf']}")
    return ", ".join([" ".join([_TYPES[given["type"]], *bounds[:1]]), *bounds[1:]])


# --- fault files, commands, errors -----------------------------------------------------------


def _fault_file() -> Iterator[str]:
    yield "\n## The fault file\n"
    yield (
        "For `elastic train --faults`, or `load_faults` of `elastic.core.faults` and"
        " `ElasticTrainer(faults=...)`: a list of\n"
    )
    yield "```yaml\n- {do: kill, at: {step: 5, point: after_grant}, target: worker-1}\n```\n"
    for what, words in (
        ("do", get_args(faults.Action)),
        ("point, in the aggregator", faults.AGGREGATOR_POINTS),
        ("point, in a worker", faults.WORKER_POINTS),
    ):
        yield f"- {what}: " + ", ".join(map(_code, words))
    yield (
        "- target: a worker, such as `worker-1`; `any`, of `kill` and `stop`: the first one that"
        " gets to the point, of `slow` with `sleep_s` and `probability`: another one in each step"
    )


def _commands() -> Iterator[str]:
    yield "\n## The command line"
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    for words, command in _leaves("elastic", root):
        yield f"\n### {words}\n"
        yield f"```sh\n{words} {_usage(command)}\n```\n"
        yield inspect.cleandoc(command.help or "")
        rows = [_row(*_option(one)) for one in command.params if one.name != "help"]
        if rows:
            yield "\n| | |\n|---|---|"
            yield from rows


def _leaves(words: str, group: TyperGroup) -> Iterator[tuple[str, TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _leaves(f"{words} {name}", command)
        elif isinstance(command, TyperCommand):
            yield f"{words} {name}", command


def _usage(command: TyperCommand) -> str:
    arguments = [one for one in command.params if isinstance(one, TyperArgument)]
    shown = [f"{one.metavar}" if one.required else f"[{one.metavar}]..." for one in arguments]
    return " ".join([*shown, "[OPTIONS]"] if len(arguments) < len(command.params) else shown)


def _option(one: Any) -> tuple[str, str]:
    text = one.help or ""
    if isinstance(one, TyperOption):
        words = ", ".join(one.opts) + ("" if one.is_flag else f" {one.metavar or one.name.upper()}")
        if one.default is not None and not one.is_flag:
            text += f" Default: {one.default}."
        return _code(words), text
    return _code(one.metavar), text


def _errors() -> Iterator[str]:
    yield "\n## Errors\n"
    yield "In `elastic.core.errors`. Every message gives the value, the limit and the setting.\n"
    tree = (inspect.getdoc(errors) or "").partition("\n\n")[2]
    yield f"```text\n{tree}\n```"


def _code(text: str) -> str:
    return f"`{text}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(one.split()).replace("|", "\\|") for one in cells) + " |"


if __name__ == "__main__":
    API_MD.write_text(render(), encoding="utf-8")
