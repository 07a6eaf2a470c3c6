"""The tree of errors is as drawn, and each crosses processes whole."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterator

import cloudpickle
import pytest

from elastic.core import errors
from elastic.core.errors import ElasticError


def subclasses(kind: type) -> Iterator[type]:
    yield kind
    for one in kind.__subclasses__():
        if one.__module__ == errors.__name__:
            yield from subclasses(one)


TREE = list(subclasses(ElasticError))


def drawn() -> dict[str, str]:
    """Name -> parent, as in the drawing at the top of the file."""
    parents: dict[str, str] = {}
    path: list[str] = []
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        match = re.match(r"([│ ]*)(?:[├└]── )?([A-Z]\w+(?:Error|Closed))\b", line)
        if match:
            depth = (len(match[1]) + 4 * ("──" in line)) // 4
            path = [*path[:depth], match[2]]
            parents[match[2]] = path[-2] if depth else "Exception"
    return parents


def test_the_tree_is_as_drawn() -> None:
    assert drawn() == {kind.__name__: kind.__mro__[1].__name__ for kind in TREE}


def test_every_error_of_the_module_is_in_the_tree() -> None:
    defined = {
        one
        for _, one in inspect.getmembers(errors, inspect.isclass)
        if one.__module__ == errors.__name__
    }
    assert defined == set(TREE)


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("library", [pickle, cloudpickle], ids=lambda one: one.__name__)
def test_an_error_survives_pickling(kind: type[ElasticError], library: type[pickle]) -> None:  # type: ignore[valid-type]
    error = kind("workers.max is 3, must be at least 4")
    error.add_note("while starting")
    again = pickle.loads(library.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)
    assert again.__notes__ == ["while starting"]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_an_error_says_what_it_is_for(kind: type[ElasticError]) -> None:
    assert kind.__doc__
    assert kind.__doc__.endswith(".")


def test_an_error_is_retryable_or_fatal_not_both() -> None:
    for kind in TREE[1:]:
        retryable = issubclass(kind, errors.RetryableError)
        assert retryable != issubclass(kind, errors.FatalError), kind
