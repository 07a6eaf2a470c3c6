"""docs/api.md is what the docstrings say, and the docstrings say what one needs."""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import elastic
from elastic.core import errors
from elastic.core.config import JobConfig
from scripts.api_docs import API_MD, COMMAND, allowed, markdown, render


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Classes and functions that `elastic` offers, and the methods that a user calls or writes."""
    for name in elastic.__all__:
        public = getattr(elastic, name)
        yield name, public
        members = vars(public).items() if inspect.isclass(public) else ()
        for method, member in members:
            if inspect.isfunction(member) and not method.startswith("_"):
                yield f"{name}.{method}", member


FUNCTIONS = dict(public_functions())
OVERRIDES = ("CSVLogger.on_", "TensorBoardLogger.on_")  # told what Callback says


def test_it_is_up_to_date() -> None:
    assert API_MD.read_text() == render(), f"docstrings have changed: {COMMAND}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_name_is_described(name: str) -> None:
    text = inspect.getdoc(FUNCTIONS[name])
    assert text, name
    if not name.startswith(OVERRIDES):
        assert f"{name}`\n" in API_MD.read_text() or f"### {name}\n" in API_MD.read_text()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_errors_that_are_described_exist(name: str) -> None:
    shown = markdown(inspect.getdoc(FUNCTIONS[name]) or "")
    _, _, arguments = shown.partition("**Args**\n\n")
    parameters = set(inspect.signature(FUNCTIONS[name]).parameters)
    assert set(re.findall(r"^- `(\w+)`", arguments.partition("\n\n")[0], re.M)) <= parameters
    _, _, raised = shown.partition("**Raises**\n\n")
    for error in re.findall(r"^- `(\w+)`", raised.partition("\n\n")[0], re.M):
        assert hasattr(errors, error) or hasattr(builtins, error), error


def test_every_key_of_the_job_file_is_described() -> None:
    text = API_MD.read_text()
    for name, field in JobConfig.model_fields.items():
        assert f"| `{name}` |" in text
        assert field.description, name


def test_a_docstring_becomes_markdown() -> None:
    text = "What.\n\nMore.\n\nArgs:\n    one: first\n        and on.\n\nReturns:\n    A thing."
    assert markdown(text) == (
        "What.\n\nMore.\n\n**Args**\n\n- `one`: first\n  and on.\n\n**Returns**\n\nA thing."
    )


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "whole number ≥ 1"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "number > 0, < 1"),
        ({"enum": ["a", "b"], "type": "string"}, "`a`, `b`"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text, or `null`"),
        (
            {"type": "integer", "minimum": 16, "multipleOf": 16},
            "whole number ≥ 16, a multiple of 16",
        ),
        ({"allowed": "a letter", "type": "string", "pattern": "x"}, "a letter"),
    ],
    ids=["bound", "open", "choice", "optional", "multiple", "words"],
)
def test_what_may_stand_at_a_key(schema: dict[str, Any], words: str) -> None:
    assert allowed(schema) == words
