"""The job file: what is accepted, and every mistake named with its file, key, value and remedy."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from elastic.core.config import JobConfig, check_resume, load_job
from elastic.core.errors import ConfigError

GOOD: dict[str, Any] = {
    "name": "stdlib-lm",
    "task": "examples.stdlib_lm.task:StdlibLM",
    "steps": 200,
    "batch": {"micro_batches": 16, "micro_batch_size": 2},
}

GOOD_TEXT = """\
name: stdlib-lm
task: examples.stdlib_lm.task:StdlibLM
task_args: {size: small}              # small | 10m
seed: 0
steps: 200
batch: {micro_batches: 16, micro_batch_size: 2}
workers: {start: 4, min: 1, max: 8, threads: 1}
device: cpu
precision: float32
clip_norm: 1.0
checkpoint: {every: 50, keep_last: 3}
"""

# Each case: a line put into the good file (in place of the line of the same key), what the error
# says.
WRONG = {
    "name with a space": ("name: my job", ":1: name: got 'my job'; needs 1 to 64 letters"),
    "name too long": (f"name: {'x' * 65}", ":1: name: got 'xxxx"),
    "name is a number": ("name: 7", ":1: name: got 7; needs 1 to 64 letters"),
    "name is a path": ("name: ../x", "name: got '../x'"),
    "task without class": ("task: examples.task", "needs package.module:Class"),
    "task_args a list": ("task_args: [1]", "task_args: got [1]; needs keys"),
    "task_args key": ("task_args: {1: 2}", "got the key 1; keys must be text"),
    "steps zero": ("steps: 0", ":5: steps: got 0; needs a whole number, at least 1"),
    "steps text": ("steps: '200'", "steps: got '200'; needs a whole number"),
    "steps fraction": ("steps: 2.5", "steps: got 2.5; needs a whole number"),
    "steps a yes": ("steps: true", "steps: got True; needs a whole number"),
    "steps null": ("steps:", "steps: got null; needs a whole number"),
    "seed negative": ("seed: -1", ":4: seed: got -1; needs a whole number from 0 to 9223372036854"),
    "micro_batches": (
        "batch: {micro_batches: 4097, micro_batch_size: 2}",
        ":6: batch.micro_batches: got 4097; needs a whole number from 1 to 4096",
    ),
    "part missing": (
        "batch: {micro_batches: 4}",
        "batch.micro_batch_size: missing; needs a whole number, at least 1",
    ),
    "misspelled inside": (
        "batch: {micro_batches: 4, micro_batchsize: 2}",
        "batch.micro_batchsize: unknown key; did you mean micro_batch_size?",
    ),
    "section is a number": ("batch: 32", "got 32; needs keys: micro_batches, micro_batch_size"),
    "more than max": (
        "workers: {start: 9, max: 8}",
        ":7: workers: got min 1, start 9, max 8; needs min <= start <= max",
    ),
    "fewer than min": ("workers: {start: 2, min: 3}", "got min 3, start 2, max 8"),
    "no worker": ("workers: {start: 0}", "workers.start: got 0; needs a whole number from 1"),
    "code for nobody": ("stragglers: {kind: c_code}", "got kind c_code, stragglers 0; needs"),
    "code of few": (
        "stragglers: {kind: crc, stragglers: 7}",
        "stragglers.kind is crc with stragglers 7, and workers.max is 8; must be >= 9",
    ),
    "no such kind": ("stragglers: autos", "stragglers.kind: got 'autos'; needs speculation, frc"),
    "audit of two": ("audit: 2", "audit: got 2; needs a number from 0 to 1, or all"),
    "audit a yes": ("audit: true", "audit: got True; needs a number from 0 to 1, or all"),
    "no model": ("models: 0", "models: got 0; needs a whole number from 1 to 64, or a list of as"),
    "no list of models": ("models: []", "models: got a list of 0; needs a whole number from 1"),
    "models a text": ("models: two", "models: got 'two'; needs a whole number from 1 to 64"),
    "a model misspelled": (
        "models: [{seed: 1}, {sed: 2}]",
        "models: [1]: sed: unknown key; did you mean seed?",
    ),
    "models on hosts": (
        "models: 2\nnodes: {max: 2}",
        "models are 2, and nodes.max is 2; must be 1",
    ),
    "models with a code": (
        "models: 2\nstragglers: {kind: crc, stragglers: 1}",
        "models are 2, and stragglers.kind is crc; must be one of speculation, frc, sr_sgc,",
    ),
    "rounds of what": (
        "models: 2\nstragglers: {kind: m_sgc, burst: 1}",
        "m_sgc: burst must be 1 to window - 1, not 1 of 0",
    ),
    "micro-batches that make no parts": (
        "models: 2\nstragglers: {kind: m_sgc, burst: 1, window: 2, distinct: 1}",
        "batch.micro_batches is 16: m_sgc (1, 2, 1) with 4 workers needs a multiple of 6, the nea",
    ),
    "no such rounds": (
        "models: 4\nstragglers: {kind: sr_sgc, burst: 2, window: 4, distinct: 1}",
        "burst must divide window - 1, not 2 of 3",
    ),
    "rounds of few models": (
        "models: 2\nstragglers: {kind: m_sgc, burst: 2, window: 3, distinct: 1}",
        "stragglers.kind is m_sgc, and models are 2; must be >= 4",
    ),
    "rounds without repetition": (
        "stragglers: {kind: speculation, window: 2}",
        "got kind speculation, burst 0, window 2, distinct 0",
    ),
    "threads": ("workers: {threads: 0}", "workers.threads: got 0"),
    "tpu": ("device: tpu", ":8: device: got 'tpu'; needs cpu or cuda"),
    "precision": ("precision: fp16", "precision: got 'fp16'; needs float32 or bfloat16"),
    "clip zero": ("clip_norm: 0", "clip_norm: got 0; needs a number above 0, or null"),
    "clip infinite": ("clip_norm: .inf", "clip_norm: got inf; needs a number above 0"),
    "nonfinite": ("nonfinite: {action: sotp}", "got 'sotp'; needs skip or stop"),
    "every": ("checkpoint: {every: -5}", "checkpoint.every: got -5; needs a whole number, at leas"),
    "keep best": ("checkpoint: {keep_best: -1}", "checkpoint.keep_best: got -1; needs a whole num"),
    "metric": (
        "checkpoint: {metric: 'val loss'}",
        "checkpoint.metric: got 'val loss'; needs loss or a metric of the task; eval. before it",
    ),
    "mode": ("checkpoint: {mode: lowest}", "checkpoint.mode: got 'lowest'; needs min or max"),
    "patience": ("checkpoint: {patience_s: -1.0}", "checkpoint.patience_s: got -1.0; needs a num"),
    "relative storage": (
        "checkpoint: {storage: ckpts}",
        "checkpoint.storage: got 'ckpts'; needs an absolute path or a URI such as s3://bucket",
    ),
    "unknown storage": ("checkpoint: {storage: 'ftp://h/a'}", "known schemes are s3, gs"),
    "storage with a password": (
        "checkpoint: {storage: 's3://me:secret@bucket/a'}",
        "checkpoint.storage: got 's3://me:...@bucket/a', which holds a password",
    ),
    "no init": ("init_from: ''", "init_from: got ''; needs text"),
    "init from nowhere": ("init_from: 'ftp://h/a.pt'", "init_from: got 'ftp://h/a.pt'; needs an"),
    "init a list": ("init_from: [a, b]", "init_from: got ['a', 'b']; needs text"),
    "skip without init": ("init_skip: [head.*]", "init_skip is ['head.*'], and init_from is null"),
    "skip a text": ("init_skip: head.*", "init_skip: got 'head.*'; needs a list"),
    "keep none": ("checkpoint: {keep_last: 0}", "checkpoint.keep_last: got 0"),
    "chunk": ("chunk_elements: 1030", "from 1024 to 16777216, a multiple of 16"),
    "yes is text": ("standby: yes", "standby: got 'yes'; needs true or false"),
    "unknown": ("stesp: 3", ":12: stesp: unknown key; did you mean steps?"),
    "nothing like it": ("zzz: 3", "zzz: unknown key; known here: name, task, task_args"),
    "duplicate": ("steps: 5\nsteps: 6", ":6: steps: set twice, first in line 5"),
    "no YAML": ("seed: [1, 2", "not valid YAML"),
    "tab": ("batch:\n\tmicro_batches: 4", ":7: not valid YAML"),
}


def write(folder: Path, line: str) -> Path:
    """The good job file with one line put in place of that of the same key, or added."""
    key = line.partition(":")[0]
    lines = GOOD_TEXT.splitlines()
    places = [number for number, old in enumerate(lines) if old.startswith(f"{key}:")]
    if places:
        lines[places[0]] = line
    else:
        lines.append(line)
    path = folder / "job.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("nodes", {"max": 2}, "stragglers.kind is c_code, and nodes.max is 2; must be 1"),
        ("audit", "all", "coded sums cannot be audited one by one"),
    ],
)
def test_a_code_is_refused_with_what_it_cannot_be_together(
    key: str, value: object, expected: str
) -> None:
    code = {"kind": "c_code", "stragglers": 1}
    job = {"name": "t", "steps": 1, "batch": {"micro_batches": 4, "micro_batch_size": 2}}
    assert load_job(job | {"stragglers": code}).stragglers.is_code
    with pytest.raises(ConfigError, match=expected):
        load_job(job | {"stragglers": code, key: value})


@pytest.mark.parametrize(("line", "expected"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_job_file_is_refused_in_words(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path, line)
    with pytest.raises(ConfigError) as error:
        load_job(path)
    assert expected in str(error.value)
    assert str(error.value).startswith(str(path))


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("nmae: x\nsteps: -1\nworkers: {start: 9}\nbatch: {micro_batches: 0}\n")
    with pytest.raises(ConfigError) as error:
        load_job(path, ["seed=-3", "device=tpu"])
    lines = str(error.value).splitlines()
    places = {line.split(": ")[1]: line.split(": ")[0] for line in lines}
    assert places == {
        "nmae": f"{path}:1",
        "name": str(path),
        "steps": f"{path}:2",
        "workers": f"{path}:3",
        "batch.micro_batches": f"{path}:4",
        "batch.micro_batch_size": f"{path}:4",
        "seed": "command line",
        "device": "command line",
    }


def test_the_example_of_the_readme_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(GOOD_TEXT)
    job = load_job(path)
    assert job.task_args == {"size": "small"}
    assert (job.batch.micro_batches, job.workers.max, job.workers.spare) == (16, 8, 1)
    assert job.standby
    assert job.clip_norm == 1.0


def test_numbers_are_those_of_yaml_1_2() -> None:
    job = load_job(GOOD, ["task_args={lr: 1e-3, day: 2024-01-01, on: off, t: 1:30, n: 1_000}"])
    assert job.task_args == {"lr": 0.001, "day": "2024-01-01", "on": "off", "t": "1:30", "n": 1000}


def test_overrides_win_over_the_file_and_the_file_over_defaults() -> None:
    base = {**GOOD, "workers": {"start": 2}, "task_args": {"a": 1}}
    job = load_job(base, ["workers.max=3", "task_args.b=[1, 2]", "clip_norm=null", "seed=5"])
    assert (job.workers.start, job.workers.max, job.workers.min) == (2, 3, 1)
    assert job.task_args == {"a": 1, "b": [1, 2]}
    assert (job.clip_norm, job.seed) == (None, 5)
    assert base["task_args"] == {"a": 1}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "command line: 'steps' is not of the form key.key=value"),
        ("=3", "is not of the form"),
        ("workers..start=3", "is not of the form"),
        ("steps=[1", "command line: steps:1: not valid YAML"),
        ("steps.more=1", "command line: steps.more: a part before the last dot holds no keys"),
        ("workers.strat=1", "command line: workers.strat: unknown key; did you mean start?"),
        ("batch.micro_batches=x", "command line: batch.micro_batches: got 'x'; needs a whole num"),
    ],
)
def test_a_wrong_override_is_refused_in_words(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_job(GOOD, [override])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "name: missing; needs 1 to 64 letters"),
        ("- 1\n", "got [1]; needs keys: name, task"),
        ("&a {name: *a}", ":1: name: an alias of what it stands in"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_no_job_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_job(path)
    assert expected in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_job(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path / "bytes.yaml")


def test_the_resolved_job_reads_back_the_same(tmp_path: Path) -> None:
    job = load_job({**GOOD, "clip_norm": 1e-7, "task_args": {"x": 1e-5, "s": "yes", "n": None}})
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job.model_dump(mode="json")))
    assert load_job(path) == job
    assert pickle.loads(pickle.dumps(job)) == job


def test_a_job_does_not_change() -> None:
    with pytest.raises(ValidationError):
        load_job(GOOD).seed = 3  # type: ignore[misc]


def test_every_setting_says_what_it_is() -> None:
    def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
        inner = [field.annotation for field in model.model_fields.values()]
        found = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
        return [model, *(deeper for kind in found for deeper in sections(kind))]

    for section in sections(JobConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_a_resume_may_change_who_computes_and_for_how_long() -> None:
    begun = load_job(GOOD)
    changed = {"steps": 400, "workers": {"start": 2, "max": 3}, "standby": False}
    check_resume(begun.model_dump(mode="json"), load_job({**GOOD, **changed}))


def test_a_resume_may_not_change_what_is_computed() -> None:
    changed = {"seed": 7, "clip_norm": 0.5, "batch": {"micro_batches": 8, "micro_batch_size": 4}}
    with pytest.raises(ConfigError) as caught:
        check_resume(load_job(GOOD).model_dump(mode="json"), load_job({**GOOD, **changed}))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed", "batch", "clip_norm"]
    assert "begun with 0, got 7" in lines[0]


def test_a_run_of_an_earlier_version_goes_on_with_the_defaults() -> None:
    begun = load_job(GOOD).model_dump(mode="json")
    del begun["ema"], begun["device"], begun["evaluate"]["every"]
    check_resume(begun, load_job(GOOD))
    with pytest.raises(ConfigError, match="device: the run was begun with 'cpu', got 'cuda'"):
        check_resume(begun, load_job({**GOOD, "device": "cuda"}))


def test_a_run_of_a_later_version_is_refused_by_the_setting() -> None:
    begun = {**load_job(GOOD).model_dump(mode="json"), "tomorrow": 1}
    with pytest.raises(ConfigError, match="tomorrow: the run was begun with a job that this"):
        check_resume(begun, load_job(GOOD))


def test_each_of_several_models_is_a_job() -> None:
    given = {"seed": 7, "task_args": {"lr": 0.1, "depth": 2}, "checkpoint": {"storage": "/data"}}
    counted = load_job({**GOOD, **given, "models": 3})
    assert [counted.of_model(one).seed for one in range(3)] == [7, 8, 9]
    assert [counted.of_model(one).num_models for one in range(3)] == [1, 1, 1]
    listed = load_job({**GOOD, **given, "models": [{"task_args": {"lr": 0.2}}, {"seed": 1}]})
    first, second = listed.of_model(0), listed.of_model(1)
    assert (first.seed, first.task_args) == (7, {"lr": 0.2, "depth": 2})
    assert (second.seed, second.task_args) == (1, given["task_args"])
    assert second.checkpoint.storage == "/data/models/1"
    assert load_job(listed.model_dump(mode="json")) == listed


def test_a_kind_of_stragglers_may_stand_alone() -> None:
    given = {"name": "t", "task": "a:B", "steps": 3}
    batch = {"micro_batches": 4, "micro_batch_size": 2}
    job = load_job({**given, "batch": batch, "stragglers": "auto"}, ["stragglers=uncoded"])
    assert job.stragglers.kind == "uncoded"
    assert load_job({**given, "batch": batch, "stragglers": "auto"}).stragglers.kind == "auto"


def test_a_job_of_one_model_is_the_job_itself() -> None:
    job = load_job({**GOOD, "checkpoint": {"storage": "/data"}})
    assert job.of_model(0) == job


def test_the_seeds_of_all_models_are_seeds() -> None:
    with pytest.raises(ConfigError, match=r"models is 2, and seed is 9223372036854775807; must be"):
        load_job({**GOOD, "seed": 2**63 - 1, "models": 2})
