"""Imports point down only, as in the layer table of the design."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import elastic

ROOT = Path(elastic.__file__).parent.parent
PACKAGES = ("elastic", "actors", "monitoring", "policies", "serve")
# The longest prefix of a module's name that is listed here decides its layer.
LAYERS = {"elastic": 5, "serve": 4, "actors": 3, "monitoring": 2, "elastic.core": 1, "policies": 0}
BESIDE = ("tests", "examples", "benchmarks", "scripts")
CORE_MAY_IMPORT = {
    *("torch", "numpy", "pyarrow", "pydantic", "pydantic_core", "safetensors"),
    *("yaml", "cloudpickle"),
}


class Import(NamedTuple):
    """`target` is the imported module; `name` what is taken from it, if anything."""

    module: str
    target: str
    name: str
    line: int
    is_executed: bool

    @property
    def place(self) -> str:
        return f"{self.module} line {self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for one in PACKAGES for path in (ROOT / one).rglob("*.py")}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def only_for_types(tree: ast.AST) -> set[ast.AST]:
    """What lies under `if TYPE_CHECKING`, and is never executed."""
    blocks = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    )
    return {inner for block in blocks for one in block.body for inner in ast.walk(one)}


def imports_of(module: str) -> Iterator[Import]:
    """Every import in the file, also in functions and under TYPE_CHECKING."""
    typing = only_for_types(TREES[module])
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, "", node.lineno, node not in typing)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = whole if whole in FILES else node.module
                yield Import(module, target, alias.name, node.lineno, node not in typing)


IMPORTS = [one for module in FILES for one in imports_of(module)]


def layer(module: str) -> int | None:
    """None for what is not ours."""
    parts = module.split(".")
    prefixes = (".".join(parts[:num]) for num in range(len(parts), 0, -1))
    return next((LAYERS[prefix] for prefix in prefixes if prefix in LAYERS), None)


def test_the_files_are_found() -> None:
    assert {"elastic", "elastic.core.store", "actors.worker", "policies.hangs"} <= set(FILES)
    assert any(one.target == "elastic.core.store" for one in IMPORTS)


def test_imports_point_down() -> None:
    wrong = []
    for one in IMPORTS:
        here, there = layer(one.module), layer(one.target)
        assert here is not None
        if there is not None and there > here:
            wrong.append(one.place)
    assert wrong == []


def test_nothing_imports_what_lies_beside_the_packages() -> None:
    assert [one.place for one in IMPORTS if one.target.split(".")[0] in BESIDE] == []


def test_policies_import_the_standard_library_and_numpy_only() -> None:
    allowed = {"numpy", "policies", *sys.stdlib_module_names}
    assert [
        one.place
        for one in IMPORTS
        if layer(one.module) == 0 and one.target.split(".")[0] not in allowed
    ] == []


def test_core_imports_what_the_design_lists_and_never_ray() -> None:
    allowed = {"elastic", "policies", *CORE_MAY_IMPORT, *sys.stdlib_module_names}
    assert [
        one.place
        for one in IMPORTS
        if layer(one.module) == 1 and one.target.split(".")[0] not in allowed
    ] == []


def test_there_are_no_import_cycles() -> None:
    graph = {
        module: {
            one.target for one in imports_of(module) if one.target in FILES and one.is_executed
        }
        for module in FILES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_takes_names_from_the_init_of_its_own_package() -> None:
    wrong = []
    for module in FILES:
        parts = module.split(".")
        own = {".".join(parts[:num]) for num in range(1, len(parts))}
        wrong += [one.place for one in imports_of(module) if one.target in own]
    assert wrong == []


def test_an_init_holds_a_docstring_and_little_else() -> None:
    for name, path in FILES.items():
        if path.name == "__init__.py":
            assert ast.get_docstring(TREES[name]), f"{path}: no docstring"
            assert name == "elastic" or len(TREES[name].body) == 1, path


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_no_module_is_named_utils() -> None:
    names = {part for name in FILES for part in name.split(".")}
    assert names.isdisjoint({"utils", "util", "helpers", "misc", "common"})


def makes_actors(tree: ast.AST) -> Iterator[int]:
    """Lines with ray.remote, @remote, or .options(...).remote."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ray":
            yield from (node.lineno for alias in node.names if alias.name == "remote")
        if not isinstance(node, ast.Attribute) or node.attr != "remote":
            continue
        owner = node.value
        options = owner.func if isinstance(owner, ast.Call) else None
        if ast.unparse(owner) == "ray" or (
            isinstance(options, ast.Attribute) and options.attr == "options"
        ):
            yield node.lineno


def test_only_the_launch_module_makes_actors() -> None:
    places = {name: list(makes_actors(tree)) for name, tree in TREES.items() if layer(name) != 4}
    assert [name for name, lines in places.items() if lines] == ["actors.launch"]
    assert len(places["actors.launch"]) >= 4


@pytest.mark.parametrize("name", [name for name in FILES if layer(name) != 5])
def test_nothing_prints(name: str) -> None:
    calls = (node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call))
    assert [
        call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"
    ] == []


LIGHT = {
    "policies": (["policies.scheduling", "policies.hangs", "policies.restarts"], "torch ray"),
    "elastic": (["elastic"], "torch ray pydantic"),
    "core": (sorted(name for name in FILES if name.startswith("elastic.core")), "ray"),
    "face": (["elastic.trainer", "elastic.core.task"], "torch ray pydantic"),
    "driver": (["elastic.driver"], "ray.train"),
    "runs": (["elastic.core.runs", "elastic.core.status"], "torch ray"),
    "processes": (["actors.worker", "actors.setup"], "torch ray"),
}


@pytest.mark.parametrize("case", LIGHT)
def test_what_an_import_does_not_load(case: str) -> None:
    modules, unwanted = LIGHT[case]
    script = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
        f"loaded = [name for name in {unwanted.split()} if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_public_names() -> None:
    trainer = {"Dataset", "ElasticTrainer", "Result", "Task", "load_model"}
    data_sets = {"ArrayRows", "MapDataset", "Rows", "TextWindows", "pad"}
    callbacks = {"Callback", "CSVLogger", "TensorBoardLogger"}
    assert elastic.__all__ == sorted(trainer | data_sets | callbacks)
    assert set(elastic._HOMES) == set(elastic.__all__)
    for name, home in elastic._HOMES.items():
        assert home in FILES
        tree = TREES[home]
        defined = (one for one in tree.body if isinstance(one, ast.ClassDef | ast.FunctionDef))
        assert name in {one.name for one in defined}, name


def test_public_names_load_when_they_are_used() -> None:
    task = importlib.import_module("elastic.core.task")
    assert elastic.Task is task.Task
    assert elastic.Dataset is task.Dataset
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        elastic.Trainer  # noqa: B018
