"""Every command that a document shows is run by a test, or there is a reason here why not.

What is quick is run in this file, as it is typed, but for arguments that would only make it long.
All are at least read by the command line that they are meant for.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.main
from ray.scripts.scripts import cli as ray_cli
from torch.distributed.run import get_args_parser as torchrun_parser

from elastic.cli import app
from scripts import testbed_commands
from tests.documents import DOCUMENTS, ROOT, all_typed, typed
from tests.served import http, make_repository
from tests.typing_in import Checkout, make_checkout


@dataclass(frozen=True)
class Here:
    """Run in this file. `instead`: what is typed for parts of it; `more`: what is typed besides."""

    shows: str
    """Is printed."""
    instead: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    code: Sequence[int] = (0,)


@dataclass(frozen=True)
class There:
    """Run by another test: a file below tests, and the name of a function in it.

    `says`: what the file must contain; by default that it types what the document shows.
    """

    file: str
    test: str
    says: Sequence[str] = ("typed(",)


@dataclass(frozen=True)
class Read:
    """Only read by its command line, for this reason."""

    reason: str


How = Here | There | Read

_README = There("integration/test_commands_of_documents.py", "test_the_readme")
_GUIDE = There("integration/test_commands_of_documents.py", "test_the_guide")
_EXPERTS = There("integration/test_commands_of_documents.py", "test_the_experts")
_SUBMIT = "integration/test_ray_jobs.py"
_CLOUD = Read(
    "starts machines of a cloud; test_cluster_yaml checks the file by the launcher's rules"
)
_BENCHMARK = Read("measures for minutes on an idle machine; test_benchmarks tests its parts")
_TORCHFT = Read("TorchFT is in an environment of its own, which benchmarks/peers/install makes")
_ROOT = Read("needs root; tests/hosts/test_testbed.py runs what each command calls")

TABLE: Mapping[str, How] = {
    r"git clone .*": Read("the clone is what the tests run in; its address is a placeholder"),
    r"scripts/quickstart": There(
        "integration/test_commands_of_documents.py", "test_the_quick_start", ("quickstart",)
    ),
    r"source .venv/bin/activate": Here(""),
    r"elastic train examples/stdlib_lm/job.yaml .*": _README,
    r"elastic (status|scale|stop|resume|report|top|diagnose) stdlib-lm.*": _README,
    r"elastic (train job.yaml|status digits|scale digits|stop digits).*": _GUIDE,
    r"python -m examples.digits_experts.data": _EXPERTS,
    r"elastic experts \w+ examples/digits_experts/experts.yaml": _EXPERTS,
    r"elastic serve runs/digits-experts/repository": _EXPERTS,
    r"elastic serve models/digits": There(
        "integration/test_serving.py", "test_experts_together", ("elastic_serve(",)
    ),
    r"curl http://127.0.0.1:8000/.*": There(
        "unit/test_commands_shown.py", "test_requests_are_answered"
    ),
    r"elastic diagnose trace.parquet": Here("goodput"),
    r"elastic simulate protocol --seeds .*": Here("no violation", {"10000": "20"}),
    r".venv/bin/elastic simulate protocol --minutes .*": Read(
        "takes the minutes that it says; test_cli tests the option, and --seeds is run here"
    ),
    r"elastic simulate stragglers .*": Here("plot:", more="--gradients 30"),
    r"elastic dashboards install .*": There(
        "unit/test_grafana.py", "test_from_the_command_line", ('"dashboards", "install"',)
    ),
    r"prometheus --config.file=monitoring/prometheus.yml": There(
        "integration/test_prometheus.py",
        "test_prometheus_finds_the_job_by_itself",
        ("prometheus.yml",),
    ),
    r"export \w+=.*": Here(""),
    r"elastic scale lm --nodes 4( --workers 24)?": There(
        "integration/test_autoscaling.py",
        "test_a_job_asks_for_hosts_and_takes_them",
        ('"--nodes", "3", "--workers", "3"',),
    ),
    r"ray (up|dashboard) cluster.yaml": _CLOUD,
    r"ray get-auth-token --generate": Read("writes the password of the user's clusters"),
    r"ray job submit --working-dir . (--submission-id lm-1 )?-- elastic train job.yaml": There(
        _SUBMIT, "test_a_submitted_job_trains", ('"elastic", "train", "job.yaml"',)
    ),
    r"ray job submit .*'{\"spot\": 1}' -- elastic train job.yaml": Read(
        "needs a node with the resource; the rest is test_a_submitted_job_trains"
    ),
    r"ray job submit -- elastic status lm": There(
        _SUBMIT, "test_a_stopped_job_goes_on", ('"--", "elastic", "status"',)
    ),
    r"ray job submit -- elastic scale lm --workers 6": Read(
        "goes to the job as status does, by test_a_stopped_job_goes_on, and test_the_readme scales"
    ),
    r"ray job stop lm-1": There(_SUBMIT, "test_a_stopped_job_goes_on", ('head.ray("job", "stop"',)),
    r"ray job submit --working-dir . -- elastic resume lm": There(
        _SUBMIT, "test_a_stopped_job_that_ray_kills_goes_on", ('"elastic", "resume", run',)
    ),
    r"ray job submit --working-dir . -- elastic resume s3://bucket/lm": There(
        "integration/test_checkpoints.py",
        "test_a_run_goes_on_from_a_bucket_past_a_damaged_checkpoint",
        ("bucket", "resume"),
    ),
    r"(.venv/bin/)?python -m benchmarks.table": Here("| what | must | measured |", code=(0, 1)),
    r"(.venv/bin/)?python -m benchmarks.(step|recovery|stragglers|straggler_runs|peers.sizes).*": (
        _BENCHMARK
    ),
    r".venv/bin/python -m benchmarks.(cluster|floor)": _BENCHMARK,
    r"scripts/chaos .*": Read("takes most of an hour; test_benchmarks tests its parts"),
    r"benchmarks/peers/run.*": Read("takes minutes to an hour; test_peers tests its parts"),
    r"torchft_lighthouse .*": _TORCHFT,
    r"REPLICA_GROUP_ID=\d .*": _TORCHFT,
    r"sudo scripts/testbed .*": _ROOT,
}
"""How each command is run, by a pattern of the whole of it."""

COMMANDS = all_typed()


def of(command: str) -> list[str]:
    """The patterns that a command fits."""
    return [one for one in TABLE if re.fullmatch(one, command)]


def chosen(kind: type[How]) -> list[str]:
    return [one for one in COMMANDS if any(isinstance(TABLE[name], kind) for name in of(one))]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_known_how_a_command_is_run(command: str) -> None:
    assert len(of(command)) == 1, "say in TABLE which test runs it, or why none does"


@pytest.mark.parametrize("pattern", TABLE)
def test_nothing_is_known_of_commands_that_nobody_shows(pattern: str) -> None:
    assert any(re.fullmatch(pattern, one) for one in COMMANDS)


@pytest.mark.parametrize("pattern", [name for name, one in TABLE.items() if isinstance(one, There)])
def test_there_is_the_test_that_runs_it(pattern: str) -> None:
    there = TABLE[pattern]
    assert isinstance(there, There)
    text = (ROOT / "tests" / there.file).read_text()
    functions = {one.name for one in ast.parse(text).body if isinstance(one, ast.FunctionDef)}
    assert there.test in functions
    assert [one for one in there.says if one not in text] == []


# What is run here.


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """With the files that commands read."""
    made = make_checkout(tmp_path)
    rows = [(worker, step) for step in range(30) for worker in range(3)]
    columns: dict[str, Any] = {
        "worker": [worker for worker, _ in rows],
        "step": [step for _, step in rows],
        "operation": ["compute"] * len(rows),
        "start": [float(step) for _, step in rows],
        "end": [step + 0.8 + 0.05 * worker for worker, step in rows],
    }
    pq.write_table(pa.table(columns), tmp_path / "trace.parquet")
    delays = np.random.default_rng(0).exponential(1.0, (40, 16))
    np.savez(tmp_path / "delays.npz", dur=delays)
    return made


@pytest.mark.parametrize("command", chosen(Here))
def test_it_runs(command: str, checkout: Checkout) -> None:
    (name,) = of(command)
    here = TABLE[name]
    assert isinstance(here, Here)
    typing = command
    for shown, instead in here.instead.items():
        typing = typing.replace(shown, instead)
    codes = " ".join(map(str, here.code))
    typing = f"{typing} {here.more}".strip()
    typing += f"\ncode=$?; for one in {codes}; do [ $code = $one ] && exit 0; done; exit $code"
    assert here.shows in checkout.run(f"set +e\n{typing}", timeout_s=50)


def test_requests_are_answered(tmp_path: Path) -> None:
    """Those of the document about serving, at a service with random experts."""
    requests = [one for one in typed(ROOT / "docs" / "serving.md") if one.startswith("curl ")]
    make_repository(tmp_path / "tiny")
    checkout = make_checkout(tmp_path / "checkout")
    with http(tmp_path / "tiny") as served:
        for one in requests:
            command = one.replace("http://127.0.0.1:8000", served.url).replace("/digits/", "/tiny/")
            answer = checkout.run(command.replace("curl ", "curl --fail --silent "))
            assert '"data"' in answer
    assert len(requests) >= 2


# All are read by the command lines that they are meant for.


def words_of(command: str) -> list[str]:
    """Without variables, `sudo` and the folder of the programs."""
    words = shlex.split(re.sub(r"^(\w+=\S+ +)+", "", command).removeprefix("sudo "))
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def read_by_click(command: Any, words: Sequence[str]) -> None:
    """Raises an error of usage for what it does not take."""
    context, (name, *arguments) = None, words
    while hasattr(command, "commands"):
        context = command.make_context(name, arguments, parent=context, resilient_parsing=True)
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, list(arguments), parent=context)


def read_elastic(words: Sequence[str]) -> None:
    read_by_click(typer.main.get_command(app), words)


def read_ray(words: Sequence[str]) -> None:
    """What is submitted is read, too."""
    read_by_click(ray_cli, words)
    if "--" in words:
        read_elastic(words[words.index("--") + 1 :])


def read_testbed(words: Sequence[str]) -> None:
    read_by_click(typer.main.get_command(testbed_commands.app), words)


def read_torchrun(words: Sequence[str]) -> None:
    torchrun_parser().parse_args(list(words[1:]))


def read_python(words: Sequence[str]) -> None:
    """A module's help names all its options that are typed."""
    assert words[1] == "-m"
    if words[2].startswith("benchmarks."):
        told = help_of(words[2])
        assert [one for one in words if one.startswith("--") and one not in told] == []


@functools.cache
def help_of(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    ).stdout


def read_lighthouse(words: Sequence[str]) -> None:
    """As the benchmark starts it."""
    text = (ROOT / "benchmarks" / "peers" / "systems.py").read_text()
    assert [one for one in words if one.startswith("--") and one not in text] == []


def read_script(module: str = "") -> Callable[[Sequence[str]], None]:
    """A script of ours, which hands its arguments to a module."""

    def read(words: Sequence[str]) -> None:
        subprocess.run(["bash", "-n", words[0]], cwd=ROOT, check=True)
        if module:
            assert module in (ROOT / words[0]).read_text()
            read_python(["python", "-m", module, *words[1:]])

    return read


READERS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "elastic": read_elastic,
    "ray": read_ray,
    "python": read_python,
    "scripts/testbed": read_testbed,
    "scripts/quickstart": read_script(),
    "scripts/chaos": read_script("benchmarks.chaos"),
    "benchmarks/peers/run": read_script("benchmarks.peers"),
    "torchrun": read_torchrun,
    "torchft_lighthouse": read_lighthouse,
}
NO_READER = ("git", "source", "curl", "export", "prometheus")
"""Run for real, but for git."""


@pytest.mark.parametrize("command", COMMANDS)
def test_its_command_line_takes_it(command: str) -> None:
    words = words_of(command)
    if words[0] not in NO_READER:
        READERS[words[0]](words)


def told_in_passing() -> list[str]:
    """Within a sentence, such as `ray status`; parts of them may be left to the reader."""
    shape = r"`((?:sudo )?(?:ray [a-z]|python -m |scripts/[a-z])[^`]*)`"
    return sorted({one for path in DOCUMENTS for one in re.findall(shape, path.read_text())})


@pytest.mark.parametrize("command", told_in_passing())
def test_what_is_told_in_passing_is_there(command: str) -> None:
    """Programs, modules, subcommands, and the options that are named."""
    words = words_of(command)
    if words[0] == "ray":
        found: Any = ray_cli
        while hasattr(found, "commands") and len(words) > 1:
            found, words = found.commands[words[1]], words[1:]
        known = {option for one in found.params for option in one.opts}
        named = itertools.takewhile(lambda word: word != "--", words)
        assert {one.partition("=")[0] for one in named if one.startswith("--")} <= known
    elif words[0] == "python":
        assert (ROOT / f"{words[2].replace('.', '/')}.py").exists()
        read_python(words)
    else:
        assert (ROOT / words[0]).exists()


@pytest.mark.parametrize(
    "words", ["elastic train", "elastic scale x --worker 3", "ray job submit -- elastic fly"]
)
def test_what_makes_no_sense_is_refused(words: str) -> None:
    with pytest.raises(Exception, match=r"(?i)missing|no such option|fly"):
        READERS[words.split()[0]](shlex.split(words))


def test_all_documents_are_looked_at() -> None:
    assert {path.name for path in DOCUMENTS} >= {"README.md", "guide.md", "api.md"}
    assert "elastic stop stdlib-lm" in COMMANDS
