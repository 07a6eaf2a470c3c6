"""Settings files: YAML in, checked values out, every mistake at once with file, line and key.

Reads the YAML 1.2 core schema: `1e-3` is a number, `yes` and dates are text. Never guesses: a
duplicate key, an unknown key and a value of the wrong type are errors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from elastic.core.errors import ConfigError

Key = tuple[str | int, ...]
"""Where a value stands in its file: ("batch", "micro_batches")."""

T = TypeVar("T")

_MAX_VALUE_CHARS = 60


@dataclass(frozen=True)
class Document:
    """A parsed file, or a mapping given in its place, with the place of each of its keys."""

    value: Any
    name: str
    """What error messages call it."""
    places: Mapping[Key, str] = field(default_factory=dict)
    """From key to where it was set, such as 'job.yaml:7' or 'command line'."""

    def place(self, key: Key) -> str:
        """Where `key`, or the nearest part around it, was set."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.name


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core schema, so that no value silently changes its type."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name is PyYAML's


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )
# PyYAML's own float constructor handles every form above; its int constructor reads 1_000 and 0xff.


def read_yaml(path: Path) -> Document:
    """Read one YAML document.

    Raises:
        ConfigError: the file is missing, unreadable, no YAML, or sets a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """Parse YAML `text`; `name` is what error messages call it. Raises ConfigError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None, name)
        places: dict[Key, str] = {}
        problems = list(_walk(node, name, places))
        if problems:
            raise ConfigError("\n".join(problems))
        return Document(loader.construct_document(node), name, places)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{name}:{line}: not valid YAML: {what}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error


def _walk(root: yaml.Node, name: str, places: dict[Key, str]) -> Iterator[str]:
    """Fill `places` with the line of every key; yield what is set twice or holds itself."""
    seen: set[int] = set()
    stack: list[tuple[Key, yaml.Node, frozenset[int]]] = [((), root, frozenset())]
    while stack:
        key, node, above = stack.pop()
        if id(node) in above:
            yield f"{places[key]}: {dotted(key)}: an alias of what it stands in"
        if id(node) in seen:  # an alias: its first place is the one to name
            continue
        seen.add(id(node))
        above |= {id(node)}
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                places[(*key, index)] = f"{name}:{child.start_mark.line + 1}"
                stack.append(((*key, index), child, above))
        elif isinstance(node, yaml.MappingNode):
            first: dict[str | int, int] = {}
            for key_node, child in node.value:
                path, line = (*key, str(key_node.value)), key_node.start_mark.line + 1
                if path[-1] in first:
                    was = first[path[-1]]
                    yield f"{name}:{line}: {dotted(path)}: set twice, first in line {was}"
                first.setdefault(path[-1], line)
                places[path] = f"{name}:{line}"
                stack.append((path, child, above))


def dotted(key: Key) -> str:
    """`("a", 0, "b")` as `a[0].b`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def with_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """Set `a.b=c` for each override, in a copy of `document`; `c` is read as YAML.

    Raises:
        ConfigError: an override is not of that form, naming all that are not.
    """
    values: dict[Key, tuple[Any, str]] = {}
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        path = tuple(name.split("."))
        if not equals or not all(path):
            problems.append(f"command line: {override!r} is not of the form key.key=value")
            continue
        try:
            values[path] = parse_yaml(text, f"command line: {name}").value, "command line"
        except ConfigError as error:
            problems.append(str(error))
    try:
        changed = with_values(document, values)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return changed


def with_values(document: Document, values: Mapping[Key, tuple[Any, str]]) -> Document:
    """Set keys in a copy of `document`, each to a value and the place that it was set in.

    Raises:
        ConfigError: a part of a key holds no keys, naming all such.
    """
    if document.value is not None and not isinstance(document.value, Mapping):
        return document  # validation says what is wrong with it
    value, places, problems = _copy(document.value or {}), dict(document.places), []
    for path, (new, place) in values.items():
        if not _set(value, path, new):
            problems.append(f"{place}: {dotted(path)}: a part before the last dot holds no keys")
            continue
        for inner in [key for key in places if key[: len(path)] == path]:
            del places[inner]
        places[path] = place
    if problems:
        raise ConfigError("\n".join(problems))
    return Document(value, document.name, places)


def _copy(value: Any) -> Any:
    """Copy dicts and lists all the way down; anything else is shared."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _set(target: Any, path: Key, value: Any) -> bool:
    """Set a value deep in nested dicts, making those that are missing; False if one is no dict."""
    for part in path[:-1]:
        if not isinstance(target, dict):
            return False
        target = target.setdefault(part, {})
        if target is None:
            return False
    if not isinstance(target, dict):
        return False
    target[path[-1]] = value
    return True


def validate(schema: type[T], document: Document, *, at: Key = ()) -> T:
    """Check the part of `document` at `at` against a pydantic type.

    Raises:
        ConfigError: one line for every mistake: file and line, key, value seen, what is allowed.
    """
    adapter, value = TypeAdapter(schema), document.value
    for part in at:
        value = value[part]
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        json_schema = adapter.json_schema()
        lines = [
            complain(document, (*at, *key), message)
            for key, message in (_explain(problem, json_schema) for problem in error.errors())
        ]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def complain(document: Document, key: Key, message: str) -> str:
    """One line of an error about `key`: where it was set, what it is called, what is wrong."""
    return (
        f"{document.place(key)}: {dotted(key)}: {message}"
        if key
        else (f"{document.place(key)}: {message}")
    )


def nearest(word: str, known: Sequence[str]) -> str:
    """', did you mean X?', or all that is known when nothing is near."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {match[0]}?" if match else f"known here: {', '.join(known)}"


def _explain(problem: Any, json_schema: dict[str, Any]) -> tuple[Key, str]:
    """Turn one pydantic problem into its key and words."""
    key: Key = problem["loc"]
    kind: str = problem["type"]
    if kind == "extra_forbidden":
        known = _schema_at(key[:-1], json_schema)["properties"]
        return key, f"unknown key; {nearest(str(key[-1]), list(known))}"
    if kind == "value_error":
        return key, str(problem["ctx"]["error"])
    if key[-1:] == ("[key]",):
        return key[:-1], f"got the key {_shown(key[-2])}; keys must be text"
    allowed = _allowed(_schema_at(key, json_schema))
    if kind == "missing":
        return key, f"missing; needs {allowed}"
    return key, f"got {_shown(problem['input'])}; needs {allowed}"


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."


def _schema_at(key: Key, root: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of the value at `key`; {} where the schema says nothing."""
    here = _resolved(root, root)
    for part in key:
        branch = (
            here.get("items") if isinstance(part, int) else here.get("properties", {}).get(part)
        )
        if not isinstance(branch, dict):
            return {"properties": {}}
        here = _resolved(branch, root)
    return here


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference, and take the branch that is not null out of an optional."""
    if "$ref" in schema:
        return {**_resolved(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root), "title": ""}
    branches = [branch for branch in schema.get("anyOf", ()) if branch.get("type") != "null"]
    if len(branches) == 1:
        nullable = len(branches) < len(schema["anyOf"])
        return {**schema, **_resolved(branches[0], root), "anyOf": [], "nullable": nullable}
    return schema


_TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
}


def _allowed(schema: dict[str, Any]) -> str:
    """What a value may be, in words taken from its schema."""
    if "allowed" in schema:
        words = str(schema["allowed"])
    elif "const" in schema:
        words = str(schema["const"])
    elif "enum" in schema:
        words = " or ".join(", ".join(schema["enum"]).rsplit(", ", 1))
    elif schema.get("type") == "object":
        words = (
            "keys" if not schema.get("properties") else f"keys: {', '.join(schema['properties'])}"
        )
    else:
        words = _TYPE_WORDS.get(
            str(schema.get("type")),
            "text, a number, true, false, null, or a list or mapping of these",
        ) + _range(schema)
    return f"{words}, or null" if schema.get("nullable") else words


def _range(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, step = schema.get("exclusiveMinimum"), schema.get("multipleOf")
    words = ""
    if low is not None and high is not None:
        words = f" from {low} to {high}"
    elif low is not None:
        words = f", at least {low}"
    elif above is not None:
        words = f" above {above}" + (f", at most {high}" if high is not None else "")
    elif high is not None:
        words = f", at most {high}"
    return words + (f", a multiple of {step}" if step is not None else "")
